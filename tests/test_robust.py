"""`trim` and `jbn.trimmed_weights`: what an outlier can, and a change of data must."""

import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ways import mapped_by

import jbn
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


FEATURES = 3
TRIM, MOMENTUM, EPSILON = 4.0, 0.9, 1e-3
LESS: Any = {"rtol": 1e-5, "atol": 1e-5}


def state(rng, mean=0.0, var=1.0) -> tuple[Params, BatchStats]:
    """Parameters, and statistics that describe data of this mean and variance."""
    scale, bias = (jnp.asarray(v, "f") for v in rng.normal(size=(2, FEATURES)))
    of = lambda v: jnp.full(FEATURES, v, jnp.float32)
    return Params(scale, bias), BatchStats(of(mean), of(var))


@functools.partial(jax.jit, static_argnames="others")
def run(x, params, stats, *, trim=TRIM, others=(), **options):
    given: Any = {"momentum": MOMENTUM, "epsilon": EPSILON} | options | dict(others)
    return jbn.batch_norm(
        x, params, stats, use_running_average=False, trim=trim, **given
    )


def loop_trimmed(x, mean, var, trim, w=None, axis=-1, epsilon=1e-5):
    """The weights left, one feature at a time, by the words of the docstring."""
    x = np.moveaxis(np.asarray(x), axis, -1)
    w = (
        np.ones(x.shape)
        if w is None
        else np.broadcast_to(np.moveaxis(w, axis, -1), x.shape)
    )
    left = np.array(w, float)
    for c in range(x.shape[-1]):
        wild = abs(x[..., c] - mean[c]) > trim * np.sqrt(var[c] + epsilon)
        wild |= np.isnan(x[..., c])
        if w[..., c][wild].sum() <= w[..., c].sum() / 2:
            left[..., c][wild] = 0
    return np.moveaxis(left, -1, axis)


def reference(x, params, stats, w):
    """Output and new statistics of batch norm with these weights, in float64."""
    tame = np.where(w > 0, x, 0)
    total, mean, var = oracle.moments(tame, w)
    y = oracle.normalize(tame, mean, var, *params, epsilon=EPSILON)
    keep = np.where(total > 0, MOMENTUM, 1)
    return y, keep * stats.mean + (1 - keep) * mean, keep * stats.var + (1 - keep) * var


def assert_is(got, want, w, close=LESS):
    """Raises unless statistics, and outputs of what counts, are as they should be."""
    y, new = got
    np.testing.assert_allclose(new.mean, want[1], **close)
    np.testing.assert_allclose(new.var, want[2], **close)
    counts = np.broadcast_to(w, y.shape) > 0
    np.testing.assert_allclose(np.asarray(y)[counts], want[0][counts], **close)


@pytest.mark.parametrize("wild", [1e6, -1e6, 1e30, np.inf, -np.inf, np.nan])
def test_an_outlier_does_not_move_anything(rng, wild):
    params, stats = state(rng)
    x = rng.normal(size=(64, FEATURES)).astype("f")
    hit = x.copy()
    hit[17, 1] = wild
    others = np.arange(64) != 17
    y, new = run(hit, params, stats)
    # As if the element were not there, to far less than a millionth of its size.
    w = np.ones_like(x)
    w[17, 1] = 0
    assert_is((y, new), reference(x, params, stats, w), w)
    same_y, same = run(x[others], params, stats)
    for got, want in ((new.mean, same.mean), (new.var, same.var), (y[others], same_y)):
        np.testing.assert_allclose(got[..., 1], want[..., 1], rtol=1e-6, atol=1e-6)
    # Which it would have moved by thousands, or to no number at all.
    _, moved = run(hit, params, stats, trim=None)
    distance = abs(np.asarray(moved.mean) - same.mean)[1]
    assert not distance < 1e3
    np.testing.assert_allclose(moved.mean[::2], new.mean[::2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wild", [np.nan, np.inf])
def test_an_outlier_that_is_no_number_comes_out_as_the_bias(rng, wild):
    params, stats = state(rng)
    x = rng.normal(size=(8, FEATURES)).astype("f")
    x[3, 1] = wild
    y, _ = run(x, params, stats)
    assert params.bias is not None
    np.testing.assert_array_equal(y[3, 1], params.bias[1])
    assert np.isfinite(y).all()


def test_an_outlier_is_still_normalized(rng):
    params, stats = state(rng)
    x = rng.normal(size=(64, FEATURES)).astype("f")
    x[17, 1] = 1e4
    w = np.ones_like(x)
    w[17, 1] = 0
    y, _ = run(x, params, stats)
    _, mean, var = oracle.moments(x, w)
    want = oracle.normalize(x, mean, var, *params, epsilon=EPSILON)
    np.testing.assert_allclose(y, want, **LESS)


# To where the data moves, after a hundred steps with momentum 0.9.
SHIFTS = {
    "far": (100.0, 1.0),
    "within the limit": (3.0, 1.0),
    "at the limit": (4.0, 1.0),
    "beyond it": (5.0, 1.0),
    "wider": (0.0, 3.0),
    "much wider": (0.0, 10.0),
    "narrower": (0.0, 0.1),
    "both": (30.0, 5.0),
}


@pytest.mark.parametrize(("mean", "std"), SHIFTS.values(), ids=SHIFTS)
def test_a_change_of_the_data_is_followed(rng, mean, std):
    xs = (rng.normal(size=(100, 256, FEATURES)) * std + mean).astype("f")
    _, stats = state(rng)

    @functools.partial(jax.jit, static_argnames="trim")
    def train(stats, xs, trim):
        def step(stats, x):
            return run(x, None, stats, trim=trim)[1], None

        return jax.lax.scan(step, stats, xs)[0]

    # The variance of some 19 batches of 256 is uncertain by 2 %.
    end, plain = train(stats, xs, TRIM), train(stats, xs, None)
    assert (abs(end.mean - mean) < 0.1 * std).all()
    assert (abs(end.var / std**2 - 1) < 0.1).all()
    np.testing.assert_allclose(end.mean, plain.mean, atol=0.02 * std)
    np.testing.assert_allclose(end.var, plain.var, rtol=0.03)


def test_a_cold_start_is_not_a_deadlock(rng):
    # Nothing that is seen fits mean 0 and variance 1, so everything counts.
    _, stats = jbn.init(FEATURES)
    x = (rng.normal(size=(64, FEATURES)) + 100).astype("f")
    y, new = run(x, None, stats)
    w = np.ones_like(x)
    assert_is((y, new), reference(x, Params(), stats, w), w)
    assert (new.mean > 9).all()
    # Debiased statistics fit after the first batch, and an outlier is out by then.
    _, stats = jbn.init(FEATURES, track_weight=True)
    _, stats = run(x, None, stats)
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-6)
    x[5] = 1e6
    _, new = run(x, None, stats)
    np.testing.assert_allclose(new.mean, np.delete(x, 5, 0).mean(0), rtol=1e-3)


@pytest.mark.parametrize("wild", [0, 1, 7, 8, 9, 15, 16])
def test_more_than_half_that_is_wild_all_counts(rng, wild):
    params, stats = state(rng)
    x = rng.normal(size=(16, FEATURES)).astype("f")
    x[:wild, 1] += 50
    w = np.ones_like(x)
    if wild <= 8:
        w[:wild, 1] = 0
    assert_is(run(x, params, stats), reference(x, params, stats, w), w)


def test_a_batch_of_one_row_all_counts(rng):
    params, stats = state(rng)
    x = np.full((1, FEATURES), 1e3, "f")
    _, new = run(x, params, stats)
    np.testing.assert_allclose(new.mean, np.full(FEATURES, 100), rtol=1e-5)


def test_each_feature_has_outliers_of_its_own(rng):
    params, stats = state(rng)
    x = rng.normal(size=(16, FEATURES)).astype("f")
    x[2, 0] = x[3, 1] = 1e6
    x[5:, 2] += 50  # of which there are too many
    w = loop_trimmed(x, stats.mean, stats.var, TRIM, epsilon=EPSILON)
    np.testing.assert_array_equal(w.sum(0), [15, 15, 16])
    assert_is(run(x, params, stats), reference(x, params, stats, w), w)


def test_at_inference_there_is_nothing_to_trim(rng):
    params, stats = state(rng)
    x = rng.normal(size=(8, FEATURES)).astype("f")
    x[3] = 1e3
    f = functools.partial(jbn.batch_norm, use_running_average=True)
    y, new = f(x, params, stats, trim=TRIM)
    np.testing.assert_array_equal(y, f(x, params, stats)[0])
    assert new is stats
    _, new = f(x, params, stats, trim=TRIM, update_stats=True, momentum=0.0)
    np.testing.assert_allclose(new.mean, np.delete(x, 3, 0).mean(0), **LESS)


@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_half_is_of_the_weight(rng, kind):
    params, stats = state(rng)
    x = rng.normal(size=(16, FEATURES)).astype("f")
    w = rng.random((16, 1)) < 0.7
    if kind == "weights":
        w = (w * rng.uniform(0.2, 2, (16, 1))).astype("f")
    x[:5, 0] += 50
    x[:9, 1] += 50
    x[np.ravel(w == 0), 2] = np.nan
    left = loop_trimmed(np.nan_to_num(x), stats.mean, stats.var, TRIM, w, -1, EPSILON)
    got = run(x, params, stats, **{kind: w})
    assert_is(got, reference(x, params, stats, left), left)


def test_what_has_no_weight_is_not_part_of_the_half(rng):
    params, stats = state(rng)
    x = rng.normal(size=(9, FEATURES)).astype("f")
    mask = np.arange(9) < 3
    x[0, 1] = 1e6  # one of three, but of the nine all that is masked is wild as well
    x[3:] = 1e6
    w = np.broadcast_to(mask[:, None], x.shape).copy()
    w[0, 1] = False
    assert_is(run(x, params, stats, mask=mask), reference(x, params, stats, w), w)


def test_no_weight_at_all_changes_nothing(rng):
    params, stats = state(rng)
    x = np.full((4, FEATURES), 1e6, "f")
    _, new = run(x, params, stats, mask=np.zeros(4, bool))
    jax.tree.map(np.testing.assert_array_equal, new, stats)


def test_each_domain_by_its_own_statistics(rng):
    ids = np.repeat([0, 1, 2, 3], [10, 10, 4, 2])  # of which 3 is none
    x = rng.normal(size=(26, FEATURES)) + 100 * ids[:, None]
    x = x.astype("f")
    x[4, 1] = 105  # usual in the other domain
    x[12, 0] = np.nan
    x[20:] = 1e6  # all of the third, so that these count
    stats = BatchStats(
        jnp.asarray(np.full((3, FEATURES), 100.0) * [[0], [1], [2]], "f"),
        jnp.ones((3, FEATURES)),
    )

    @jax.jit
    def norm(x, ids):
        return jbn.domain_batch_norm(
            x,
            None,
            stats,
            use_running_average=False,
            domain=ids,
            trim=TRIM,
            momentum=MOMENTUM,
            epsilon=EPSILON,
        )

    y, new = norm(x, ids)
    for i in range(3):
        rows, of_domain = x[ids == i], BatchStats(stats.mean[i], stats.var[i])
        w = loop_trimmed(rows, *of_domain[:2], TRIM, epsilon=EPSILON)
        assert w.all() == (i == 2)
        got = y[ids == i], BatchStats(new.mean[i], new.var[i])
        want = reference(rows, Params(), of_domain, w)
        # Around a mean of 1e2 standard deviations.
        assert_is(got, want, w, {"rtol": 1e-4, "atol": 1e-4})


def test_groups_of_a_batch_are_trimmed_before_they_are_cut(rng):
    params, stats = state(rng)
    x = rng.normal(size=(12, FEATURES)).astype("f")
    x[4:8, 1] += 50  # a whole group, but a minority of the batch

    @jax.jit
    def norm(x):
        return jbn.ghost_batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            num_groups=3,
            trim=TRIM,
            momentum=MOMENTUM,
            epsilon=EPSILON,
        )

    y, new = norm(x)
    w = loop_trimmed(x, stats.mean, stats.var, TRIM, epsilon=EPSILON)
    want = reference(x, params, stats, w)
    np.testing.assert_allclose(new.mean, want[1], **LESS)
    np.testing.assert_allclose(new.var, want[2], **LESS)
    for part in np.split(np.arange(12), 3):
        total, mean, var = oracle.moments(x[part], w[part])
        mean = np.where(total > 0, mean, stats.mean)
        var = np.where(total > 0, var, stats.var)
        group = oracle.normalize(x[part], mean, var, *params, epsilon=EPSILON)
        np.testing.assert_allclose(y[part], group, **LESS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wild", [1e3, np.nan])
def test_gradients_are_those_of_the_rows_that_count(rng, wild):
    params, stats = state(rng)
    params, stats = jax.tree.map(lambda v: v.astype(jnp.float64), (params, stats))
    x, ct = rng.normal(size=(2, 16, FEATURES))
    x[3, 1] = wild

    @jax.jit
    def gradients(x, params):
        loss = lambda x, params: (run(x, params, stats)[0] * ct).sum()
        return jax.grad(loss, (0, 1))(x, params)

    dx, dparams = gradients(x, params)
    w = np.ones_like(x)
    w[3, 1] = 0
    tame, counted = np.nan_to_num(x), ct.copy()
    if np.isnan(wild):
        counted[3, 1] = 0
    want, dscale, _ = oracle.input_gradient(
        tame, counted, np.asarray(params.scale), w, epsilon=EPSILON
    )
    np.testing.assert_allclose(dx, want, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dparams.scale, dscale, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dparams.bias, ct.sum(0), rtol=1e-9, atol=1e-9)


# Devices: the half is that of all rows, wherever they are.

DEVICES, ROWS = 4, 8


def mesh():
    return jax.make_mesh(
        (DEVICES,), ("d",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )


@pytest.mark.parametrize(
    "kind", mapped_by("vmap", "shard_map checked", "shard_map unchecked", "jit")
)
def test_the_half_is_taken_over_all_devices(rng, kind):
    params, stats = state(rng)
    x = rng.normal(size=(DEVICES * ROWS, FEATURES)).astype("f")
    x[:ROWS, 0] += 50  # all of one device, a quarter of all
    x[: 3 * ROWS, 1] += 50  # three quarters of all, nothing of the last device
    x[::5, 2] = 1e6  # some everywhere
    w = loop_trimmed(x, stats.mean, stats.var, TRIM, epsilon=EPSILON)
    assert list(w.sum(0)) == [24, 32, 25]
    f = functools.partial(run, others=(("axis_name", "d"),))
    if kind == "vmap":
        mapped = jax.vmap(f, (0, None, None), (0, None), axis_name="d")
        y, new = jax.jit(mapped)(x.reshape(DEVICES, ROWS, -1), params, stats)
        y = y.reshape(x.shape)
    elif kind == "jit":
        y, new = run(jax.device_put(x, NamedSharding(mesh(), P("d"))), params, stats)
    else:
        mapped = jax.shard_map(
            f,
            mesh=mesh(),
            in_specs=(P("d"), P(), P()),
            out_specs=(P("d"), P()),
            check_vma=kind == "shard_map checked",
        )
        y, new = jax.jit(mapped)(x, params, stats)
    assert_is((y, new), reference(x, params, stats, w), w)


@pytest.mark.devices
def test_the_half_is_taken_within_groups_of_devices(rng):
    _, stats = state(rng)
    x = rng.normal(size=(DEVICES, ROWS, FEATURES)).astype("f")
    x[:3, :, 1] += 50
    groups = ((0, 1), (2, 3))
    w = jax.pmap(
        lambda x: jbn.trimmed_weights(
            x, stats, trim=TRIM, axis_name="d", axis_index_groups=groups
        ),
        "d",
        devices=jax.devices()[:DEVICES],
    )(x)
    for members in map(list, groups):
        rows = x[members].reshape(-1, FEATURES)
        want = loop_trimmed(rows, stats.mean, stats.var, TRIM)
        np.testing.assert_array_equal(w[np.asarray(members)].reshape(want.shape), want)
    assert np.asarray(w).reshape(-1, FEATURES).sum(0)[1] == 2 * ROWS + ROWS


@pytest.mark.devices
def test_it_costs_one_more_all_reduce(rng):
    params, stats = state(rng)
    for trim, number in ((None, 1), (TRIM, 2)):
        f = jax.shard_map(
            functools.partial(run, trim=trim, others=(("axis_name", "d"),)),
            mesh=mesh(),
            in_specs=(P("d"), P(), P()),
            out_specs=(P("d"), P()),
        )
        x = np.zeros((DEVICES * ROWS, FEATURES), "f")
        hlo = jax.jit(f).lower(x, params, stats).compile().as_text()
        assert hlo
        assert hlo.count(" all-reduce(") == number


# The weights themselves.


@pytest.mark.parametrize("kind", [None, "mask", "weights", "weights of rows"])
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("trim", [2.0, 4])
def test_trimmed_weights(rng, axis, trim, kind):
    shape = (6, 5, 4)
    x = rng.normal(size=shape).astype("f") * 2
    x[0, 0, 0] = np.nan
    stats = BatchStats(
        jnp.asarray(rng.normal(size=shape[axis]), "f"),
        jnp.asarray(rng.uniform(0.01, 2, shape[axis]), "f"),
    )
    w, given = None, {}
    if kind == "mask":
        w = rng.random(shape) < 0.7
        given = {"mask": w}
    elif kind == "weights":
        w = rng.uniform(0.1, 2, shape).astype("f")
        given = {"weights": w}
    elif kind == "weights of rows":
        w = rng.uniform(
            0.1, 2, [1 if a == axis % 3 else n for a, n in enumerate(shape)]
        )
        w = w.astype("f")
        given = {"weights": w}
    f = functools.partial(jbn.trimmed_weights, trim=trim, axis=axis, epsilon=0.1)
    got = jax.jit(f)(x, stats, **given)
    assert got.shape == shape
    assert got.dtype == (bool if kind in (None, "mask") else jnp.float32)
    want = loop_trimmed(x, stats.mean, stats.var, trim, w, axis, 0.1)
    assert 0 < (want == 0).sum() < want.size
    np.testing.assert_allclose(got, want, rtol=1e-6)


@hypothesis.given(
    values=st.lists(
        st.one_of(st.integers(-9, 9), st.sampled_from([np.nan, np.inf, 1e30])),
        min_size=7,
        max_size=7,
    ),
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=7, max_size=7),
    trim=st.sampled_from([0.75, 2.5, 20.0]),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=100)
def test_any_values(values, weights, trim):
    # Numbers such that no sum or limit is rounded.
    x, w = np.asarray(values, "f")[:, None], np.asarray(weights, "f")[:, None]
    got = trimmed_one(x, w, trim)
    np.testing.assert_array_equal(got, loop_trimmed(x, [1.0], [4.0], trim, w))


@jax.jit
def trimmed_one(x, w, trim):
    stats = BatchStats(jnp.ones(1), jnp.full(1, 4.0))
    return jbn.trimmed_weights(x, stats, trim=trim, weights=w)


def test_by_statistics_of_your_own(rng):
    # A median and its deviation stand even the first batch.
    x = (rng.normal(size=(101, FEATURES)) * 2 + 100).astype("f")
    x[:30] = 1e6
    median = np.median(x, 0)
    spread = 1.4826 * np.median(abs(x - median), 0)
    own = jbn.Moments(jnp.ones(FEATURES), jnp.asarray(median), jnp.asarray(spread**2))
    weights = jbn.trimmed_weights(x, own, trim=4)
    want = np.broadcast_to(np.arange(101)[:, None] >= 30, x.shape)
    np.testing.assert_array_equal(weights, want)
    got = jbn.moments(x, mask=weights)
    np.testing.assert_allclose(got.var, oracle.moments(x[30:])[2], rtol=1e-4)


def test_complex_numbers_by_their_distance(rng):
    x = rng.normal(size=(16, FEATURES, 2)) @ np.asarray([1, 1j])
    x[3, 1] = 3 + 3j  # neither part is beyond 4
    x = x.astype(np.complex64)
    stats = BatchStats(jnp.zeros(FEATURES, jnp.complex64), jnp.ones(FEATURES))
    got = jbn.trimmed_weights(x, stats, trim=4)
    assert not got[3, 1]
    np.testing.assert_array_equal(got, loop_trimmed(x, np.zeros(3), np.ones(3), 4))


def test_few_of_normal_data_are_trimmed(rng):
    x = rng.normal(size=(1_000_000, 1)).astype("f")
    stats = BatchStats(jnp.zeros(1), jnp.ones(1))
    trimmed = x.size - int(jbn.trimmed_weights(x, stats, trim=4.0).sum())
    # 6.3e-5 of them, and four standard deviations of that count.
    assert abs(trimmed - 63) < 4 * np.sqrt(63)


def test_16_bits_are_judged_in_32():
    # In bfloat16 the mean is 10, from which 10.0625 is 5 standard deviations.
    stats = BatchStats(jnp.full(1, 10.03), jnp.full(1, 0.0125**2))
    x = jnp.asarray([[10.0], [10.0], [10.0625], [9.9375]], jnp.bfloat16)
    got = jbn.trimmed_weights(x, stats, trim=4, epsilon=0)
    np.testing.assert_array_equal(got.ravel(), [True, True, True, False])


def test_a_traced_trim_does_not_recompile(rng):
    params, stats = state(rng)
    x = rng.normal(size=(64, FEATURES)).astype("f")
    traces = 0

    @jax.jit
    def norm(x, trim):
        nonlocal traces
        traces += 1
        return jbn.batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            trim=trim,
            momentum=MOMENTUM,
            epsilon=EPSILON,
        )

    for trim in (1.0, 2.0, np.inf):
        w = loop_trimmed(x, stats.mean, stats.var, trim, epsilon=EPSILON)
        assert_is(norm(x, trim), reference(x, params, stats, w), w)
    assert traces == 1


X, STATS = np.ones((4, 2), "f"), jbn.init(2)[1]
PLAIN: Any = {"use_running_average": False}
MISTAKES = {
    "a negative trim": (
        lambda: jbn.batch_norm(X, None, STATS, **PLAIN, trim=-1.0),
        ValueError,
        "got -1.0",
        "4 to 6 leave normal data alone",
    ),
    "a trim that is no number": (
        lambda: jbn.trimmed_weights(X, STATS, trim=np.nan),
        ValueError,
        "got nan",
        "`trim` must be at least 0",
    ),
    "a trim for each feature": (
        lambda: jbn.trimmed_weights(X, STATS, trim=np.ones(2)),
        ValueError,
        "shape (2,)",
        "`trim` must be one number",
    ),
    "nothing to judge by": (
        lambda: jbn.batch_norm(X, None, None, **PLAIN, trim=4.0),
        ValueError,
        "got None",
        "to normalize or trim by the running statistics",
    ),
    "statistics of other features": (
        lambda: jbn.trimmed_weights(X, jbn.init(3)[1], trim=4),
        ValueError,
        "it has shape (3,)",
        "`stats.mean` must have one entry per feature",
    ),
    "integers": (
        lambda: jbn.trimmed_weights(np.ones((4, 2), int), STATS, trim=4),
        TypeError,
        "got int64",
        "x.astype(jnp.float32)",
    ),
    "mask and weights": (
        lambda: jbn.trimmed_weights(
            X, STATS, trim=4, mask=np.ones(4, bool), weights=np.ones(4)
        ),
        ValueError,
        "got both",
        "Pass `weights=weights * mask`",
    ),
    "a negative epsilon": (
        lambda: jbn.trimmed_weights(X, STATS, trim=4, epsilon=-1.0),
        ValueError,
        "got -1.0",
        "`epsilon` must be at least 0",
    ),
    "an unknown axis name": (
        lambda: jbn.trimmed_weights(X, STATS, trim=4, axis_name="d"),
        NameError,
        "got 'd'",
        "Under plain `jit` leave it None",
    ),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "came", "fix"), MISTAKES.values(), ids=MISTAKES
)
def test_mistakes(call, error, came, fix):
    with pytest.raises(error, match=re.escape(fix)) as raised:
        call()
    assert came in str(raised.value)
