"""`jbn.sample_weights` and `jbn.group_weights`: what counts alike."""

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


FEATURES = 2
# A dozen float32 roundings.
LESS: Any = {"rtol": 1e-5, "atol": 1e-5}
EPSILON = 1e-3


def samples(rng, sizes, offset=3.0):
    """Sequences that differ, so that it shows how much each counts."""
    return [
        (rng.normal(size=(n, FEATURES)) * (i + 1) + offset * i).astype("f")
        for i, n in enumerate(sizes)
    ]


def by_sample(rows):
    """Moments in which each sample counts once, by the definition of an average."""
    rows = [np.asarray(r, float) for r in rows if len(r)]
    mean = np.mean([r.mean(0) for r in rows], 0)
    var = np.mean([((r - mean) ** 2).mean(0) for r in rows], 0)
    return np.full(FEATURES, len(rows)), mean, var


def padded(rows, length):
    """A dense batch (batch, length, features) and its mask, with NaN as padding."""
    mask = np.arange(length) < np.asarray([len(r) for r in rows])[:, None]
    x = np.full((*mask.shape, FEATURES), np.nan, "f")
    x[mask] = np.concatenate(rows)
    return x, mask


def packed(rows, num_rows):
    """Packed rows and their ids, with NaN as padding of id -1."""
    x = np.full((num_rows, FEATURES), np.nan, "f")
    ids = np.full(num_rows, -1)
    n = sum(map(len, rows))
    x[:n] = np.concatenate(rows)
    ids[:n] = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    return x, ids


def assert_moments(got, want, **close):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **(close or LESS))


@jax.jit
def of_batch(x, mask):
    return jbn.moments(x, weights=jbn.sample_weights(mask))


@functools.partial(jax.jit, static_argnums=2)
def of_groups(x, ids, num):
    return jbn.moments(x, weights=jbn.group_weights(ids, num)[:, None])


def of_elements(x, mask):
    return jbn.moments(x, mask=mask)


SIZES = {"uneven": (5, 1, 3), "even": (4, 4, 4), "one empty": (5, 0, 2, 1)}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_each_sample_counts_once(rng, sizes):
    rows = samples(rng, sizes)
    want = by_sample(rows)
    # Dense and packed are the same batch.
    assert_moments(of_batch(*padded(rows, 6)), want)
    assert_moments(of_groups(*packed(rows, 16), len(sizes)), want)


def test_samples_of_one_size_are_elements(rng):
    rows = samples(rng, (4, 4, 4))
    x, mask = padded(rows, 5)
    _, mean, var = oracle.moments(np.concatenate(rows))
    for got in (of_batch(x, mask), of_groups(*packed(rows, 16), 3)):
        assert_moments(got, (np.full(FEATURES, 3), mean, var))


def test_repeating_a_sample_in_itself_changes_nothing(rng):
    rows = samples(rng, (5, 1, 3))
    tiled = [np.tile(rows[0], (4, 1)), *rows[1:]]
    for f, num_rows in ((padded, 20), (packed, 32)):
        per_sample = of_batch if f is padded else lambda x, ids: of_groups(x, ids, 3)
        before, after = (per_sample(*f(r, num_rows)) for r in (rows, tiled))
        assert_moments(after, before)
    # Whereas elements are drawn to the sample that has become long.
    before, after = (of_elements(*padded(r, 20)) for r in (rows, tiled))
    assert abs(after.mean - before.mean).max() > 0.5
    assert_moments(after, oracle.moments(np.concatenate(tiled)))


@hypothesis.given(
    sizes=st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),
    times=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=40)
def test_any_sizes(sizes, times, seed):
    rows = samples(np.random.default_rng(seed), sizes)
    tiled = [np.tile(rows[0], (times, 1)), *rows[1:]]
    want = by_sample(rows)
    assert_moments(of_batch(*padded(tiled, 15)), want, rtol=1e-4, atol=1e-4)
    assert_moments(of_groups(*packed(tiled, 25), 3), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, (0, 1), -1, (1, 0)], ids=str)
@pytest.mark.parametrize("dtype", [bool, np.float32, np.int32, np.float16])
def test_sample_weights_are_shares_of_the_sample(rng, axis, dtype):
    w = rng.integers(0, 2 if dtype is bool else 4, (3, 4, 2)).astype(dtype)
    w[1] = 0
    got = jax.jit(functools.partial(jbn.sample_weights, axis=axis))(w)
    assert got.dtype == jnp.float32
    kept = [a % 3 for a in (axis if isinstance(axis, tuple) else (axis,))]
    want = np.zeros(w.shape)
    for index in np.ndindex(w.shape):
        sample = tuple(i if a in kept else slice(None) for a, i in enumerate(index))
        total = w[sample].astype(float).sum()
        want[index] = float(w[index]) / total if total else 0
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_mask_that_differs_between_features(rng):
    rows = samples(rng, (5, 1, 3))
    x, mask = padded(rows, 6)
    mask = mask[..., None] & (rng.random(x.shape) < 0.7)
    mask[0, 0] = True
    weights = jbn.sample_weights(mask, axis=(0, -1))
    got = jbn.moments(x, weights=weights)
    for c in range(FEATURES):
        columns = [x[b, mask[b, :, c], c] for b in range(3)]
        columns = [np.stack([v, v], -1) for v in columns]
        want = by_sample(columns)
        assert_moments([g[c] for g in got], [w[c] for w in want])


@pytest.mark.usefixtures("x64")
def test_float64_stays_wide(rng):
    w = rng.uniform(size=(3, 4))
    got = jbn.sample_weights(w)
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, w / w.sum(1, keepdims=True), rtol=1e-15)
    got = jbn.group_weights(np.zeros((3, 4), int), 1, weights=w)
    np.testing.assert_allclose(got, w / w.sum(), rtol=1e-15)


@pytest.mark.parametrize("dtype", [None, bool, np.float32, np.int32, np.float16])
@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_group_weights_are_shares_of_the_group(rng, shape, dtype):
    ids = rng.integers(-1, 5, shape)  # of four groups, and two that are none
    w = np.ones(shape)
    given = None
    if dtype is not None:
        w = rng.integers(0, 2 if dtype is bool else 4, shape)
        given = w.astype(dtype)
    got = jax.jit(lambda ids, w: jbn.group_weights(ids, 4, weights=w))(ids, given)
    assert got.dtype == jnp.float32
    want = np.zeros(shape)
    for index in np.ndindex(*shape):
        total = w[ids == ids[index]].sum()
        if 0 <= ids[index] < 4 and total:
            want[index] = w[index] / total
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_ids_far_out_of_range_have_no_weight():
    ids = np.asarray([0, -1, 2, 2**31 - 1, -(2**31), 1])
    got = jbn.group_weights(ids, 2)
    np.testing.assert_array_equal(got, [1, 0, 0, 0, 0, 1])


# Composition with batch norm, on devices too: weights come before devices are summed.

DEVICES, ROWS = 4, 6


def state(rng) -> tuple[Params, BatchStats]:
    scale, bias, mean = (jnp.asarray(v, "f") for v in rng.normal(size=(3, FEATURES)))
    var = jnp.asarray(rng.uniform(0.5, 2, FEATURES), "f")
    return Params(scale, bias), BatchStats(mean, var)


def mesh():
    return jax.make_mesh(
        (DEVICES,), ("d",), (AxisType.Auto,), devices=jax.devices()[:DEVICES]
    )


def norm(x, ids, params, stats, *, num, spread=False, axis_name=None):
    """Batch norm in which each group counts once, whichever device it is on."""
    over: Any = {"axis_name": axis_name} if spread else {}
    weights = jbn.group_weights(ids, num, **over)
    return jbn.batch_norm(
        x,
        params,
        stats,
        use_running_average=False,
        weights=weights,
        axis_name=axis_name,
        momentum=0.7,
        epsilon=EPSILON,
    )


def on_devices(kind, num, spread):
    f = functools.partial(norm, num=num, spread=spread, axis_name="d")
    if kind == "vmap":
        mapped = jax.vmap(f, (0, 0, None, None), (0, None), axis_name="d")

        def call(x, ids, params, stats):
            parts = x.reshape(DEVICES, ROWS, -1), ids.reshape(DEVICES, ROWS)
            y, new = mapped(parts[0], parts[1], params, stats)
            return y.reshape(x.shape), new

        return call
    if kind == "jit":
        return functools.partial(norm, num=num)
    return jax.shard_map(
        f,
        mesh=mesh(),
        in_specs=(P("d"), P("d"), P(), P()),
        out_specs=(P("d"), P()),
        check_vma=kind == "shard_map checked",
    )


def groups_on_devices(rng, spread):
    """Rows of groups, either spread over all devices or each whole on one of them."""
    x = (rng.normal(size=(DEVICES * ROWS, FEATURES)) * 2 + 1).astype("f")
    if spread:
        ids = rng.integers(-1, 5, len(x))
    else:
        # One to three groups a device, the last having nothing but padding.
        ids = np.repeat([0, 1, 2, 3, 4, -1], [2, 4, 6, 1, 5, 6])
    x[ids < 0] = np.nan
    return x, ids


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(
    "kind", mapped_by("vmap", "shard_map checked", "shard_map unchecked", "jit")
)
def test_groups_over_devices_are_one_batch(rng, kind, spread):
    x, ids = groups_on_devices(rng, spread)
    params, stats = state(rng)
    ct = np.where(ids[:, None] < 0, 0, rng.normal(size=x.shape)).astype("f")
    call = on_devices(kind, 5, spread)

    def loss(x, params):
        y, new = call(x, ids, params, stats)
        return (y * ct).sum(), (y, new)

    args: Any = (x, params)
    if kind == "jit":
        args = (jax.device_put(x, NamedSharding(mesh(), P("d"))), params)
    grads, (y, new) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*args)

    counts = np.bincount(ids[ids >= 0], minlength=5)
    w = np.where(ids < 0, 0, 1 / np.maximum(counts, 1)[ids])[:, None]
    tame = np.where(np.isnan(x), 0, x)
    _, mean, var = oracle.moments(tame, w)
    want = oracle.normalize(tame, mean, var, *params, epsilon=EPSILON)
    np.testing.assert_allclose(y[ids >= 0], want[ids >= 0], **LESS)
    np.testing.assert_allclose(new.mean, 0.7 * stats.mean + 0.3 * mean, **LESS)
    np.testing.assert_allclose(new.var, 0.7 * stats.var + 0.3 * var, **LESS)
    wide = np.broadcast_to(w, x.shape)
    dx, dscale, dbias = oracle.input_gradient(
        tame, ct, np.asarray(params.scale), wide, epsilon=EPSILON
    )
    np.testing.assert_allclose(grads[0], dx, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads[1].scale, dscale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grads[1].bias, dbias, rtol=1e-4, atol=1e-4)


@pytest.mark.devices
def test_samples_over_devices_are_one_batch(rng):
    sizes = (5, 1, 3, 0, 2, 4, 1, 1)
    rows = samples(rng, sizes)
    x, mask = padded(rows, 5)
    got = jax.jit(
        jax.shard_map(
            lambda x, mask: jbn.moments(
                x, weights=jbn.sample_weights(mask), axis_name="d"
            ),
            mesh=mesh(),
            in_specs=P("d"),
            out_specs=P(),
        )
    )(x, mask)
    assert_moments(got, by_sample(rows))


@pytest.mark.devices
def test_groups_within_groups_of_devices(rng):
    _, ids = groups_on_devices(rng, spread=True)
    index_groups = ((0, 2), (1, 3))
    weights = jax.pmap(
        lambda ids: jbn.group_weights(
            ids, 5, axis_name="d", axis_index_groups=index_groups
        ),
        "d",
        devices=jax.devices()[:DEVICES],
    )(ids.reshape(DEVICES, -1))
    shares = np.split(ids, DEVICES)
    for members in index_groups:
        among = np.concatenate([shares[i] for i in members])
        for i in members:
            want = [0 if g < 0 else 1 / (among == g).sum() for g in shares[i]]
            np.testing.assert_allclose(weights[i], want, rtol=1e-6)


def test_weights_within_groups(rng):
    x = rng.normal(size=(9, FEATURES)).astype("f")
    ids, w = np.repeat([0, 1, 2], 3), rng.uniform(0.1, 2, 9).astype("f")

    @jax.jit
    def run(x, ids, w):
        return jbn.moments(x, weights=jbn.group_weights(ids, 3, weights=w)[:, None])

    shares = np.concatenate([p / p.sum() for p in np.split(w.astype(float), 3)])
    assert_moments(run(x, ids, w), oracle.moments(x, shares[:, None]))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["samples", "groups"])
def test_gradients_flow_to_the_weights(rng, kind):
    x, w = rng.normal(size=(3, 4, FEATURES)), rng.uniform(0.5, 2, (3, 4))
    ids, ct = np.repeat([[0], [1], [1]], 4, 1), rng.normal(size=x.shape)

    @jax.jit
    @jax.grad
    def gradient(w):
        weights = (
            jbn.sample_weights(w)
            if kind == "samples"
            else jbn.group_weights(ids, 2, weights=w)
        )
        y, _ = jbn.batch_norm(
            x, None, None, use_running_average=False, weights=weights, epsilon=EPSILON
        )
        return (y * ct).sum()

    def loss(w):
        totals = w.sum(1, keepdims=True)
        if kind == "groups":
            totals = np.stack([w[0].sum(), w[1:].sum(), w[1:].sum()])[:, None]
        y = oracle.batch_norm(x, weights=(w / totals)[..., None], epsilon=EPSILON)
        return (y * ct).sum()

    got, want, h = gradient(w), np.zeros_like(w), 1e-6
    for index in np.ndindex(w.shape):
        step = np.zeros_like(w)
        step[index] = h
        want[index] = (loss(w + step) - loss(w - step)) / (2 * h)
    # Central differences of float64 with this step are good to some 1e-9.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


MISTAKES = {
    "complex weights of samples": (
        lambda: jbn.sample_weights(np.ones((2, 3), np.complex64)),
        TypeError,
        "got complex64",
        "`weights` must be real",
    ),
    "an axis out of range": (
        lambda: jbn.sample_weights(np.ones((2, 3)), axis=2),
        ValueError,
        "got axis=2",
        "Pass values from -2 to 1",
    ),
    "a repeated axis": (
        lambda: jbn.sample_weights(np.ones((2, 3)), axis=(0, 0)),
        ValueError,
        "got axis=(0, 0)",
        "Remove the repeated one",
    ),
    "fractional ids": (
        lambda: jbn.group_weights(np.ones(3, "f"), 2),
        TypeError,
        "got float32",
        "`ids` must be of integers",
    ),
    "a mask for ids": (
        lambda: jbn.group_weights(np.ones(3, bool), 2),
        TypeError,
        "got bool",
        "`ids` must be of integers",
    ),
    "complex weights of groups": (
        lambda: jbn.group_weights(np.ones(3, int), 2, weights=np.ones(3, complex)),
        TypeError,
        "got complex64",
        "`weights` must be real",
    ),
    "weights of another shape": (
        lambda: jbn.group_weights(np.ones(3, int), 2, weights=np.ones((3, 1))),
        ValueError,
        "got (3, 1) and (3,)",
        "`weights` must have the shape of `ids`",
    ),
    "an unknown axis name": (
        lambda: jbn.group_weights(np.ones(3, int), 2, axis_name="d"),
        NameError,
        "got 'd'",
        "Under plain `jit` leave it None",
    ),
    "groups of devices without an axis name": (
        lambda: jbn.group_weights(np.ones(3, int), 2, axis_index_groups=[[0]]),
        ValueError,
        "which is None",
        "Pass `axis_name`, or drop `axis_index_groups`",
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
