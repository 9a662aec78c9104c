"""Running statistics that count rows: `reference_weight` and `second_moment`."""

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
from jax.sharding import AxisType, PartitionSpec as P
from ways import mapped_by

import jbn
from jbn import BatchStats, Moments


pytestmark = pytest.mark.sweep


FEATURES = 3
update = jax.jit(jbn.update_batch_stats, static_argnames=("unbiased", "second_moment"))
# Ten float32 updates, each rounded a few times.
CLOSE: Any = {"rtol": 2e-6, "atol": 2e-6}


def make(rng, weight=None) -> BatchStats:
    return BatchStats(
        jnp.asarray(rng.normal(size=FEATURES), jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2, FEATURES), jnp.float32),
        None if weight is None else jnp.full(FEATURES, weight, jnp.float32),
    )


def batches(rng, sizes) -> tuple[list, list[Moments]]:
    """The moments of some batches, in float64, and as `Moments`."""
    wide = [
        (np.full(FEATURES, n), rng.normal(size=FEATURES), rng.uniform(0, 2, FEATURES))
        for n in sizes
    ]
    return wide, [moments(*w) for w in wide]


def moments(weight, mean, var) -> Moments:
    return Moments(*(jnp.asarray(v, jnp.float32) for v in (weight, mean, var)))


def constant(weight, mean, var) -> Moments:
    return moments(*(np.full(FEATURES, v) for v in (weight, mean, var)))


# The weight of a batch.


@hypothesis.given(
    sizes=st.lists(st.integers(0, 40), min_size=6, max_size=6).filter(any),
    momentum=st.sampled_from([0.5, 0.9, 0.99]),
    reference=st.sampled_from([8, 32.0]),
    debiased=st.booleans(),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=60)
def test_the_decay_is_the_same_however_rows_are_split(
    sizes, momentum, reference, debiased
):
    stats = BatchStats(
        jnp.full(FEATURES, 1.0),
        jnp.full(FEATURES, 3.0),
        jnp.full(FEATURES, 0.25) if debiased else None,
    )
    for n in sizes:
        batch = constant(n, 0, 1)
        stats = update(stats, batch, momentum=momentum, reference_weight=reference)
    keep = momentum ** (sum(sizes) / reference)
    if debiased:
        assert stats.weight is not None
        np.testing.assert_allclose(stats.weight, 0.25 * keep + 1 - keep, rtol=1e-6)
        keep = 0.25 * keep / (0.25 * keep + 1 - keep)
    np.testing.assert_allclose(stats.mean, keep, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.var, 1 + 2 * keep, rtol=1e-6)


def test_without_a_reference_every_batch_counts_alike():
    # What the former is there to avoid: the last batch, of one row, takes a tenth.
    _, stats = jbn.init(FEATURES)
    for n in (31, 1):
        stats = update(stats, constant(n, 1, 1), momentum=0.9)
    np.testing.assert_allclose(stats.mean, np.full(FEATURES, 1 - 0.81), rtol=1e-6)
    _, stats = jbn.init(FEATURES)
    for n in (31, 1):
        batch = constant(n, 1, 1)
        stats = update(stats, batch, momentum=0.9, reference_weight=32)
    np.testing.assert_allclose(stats.mean, np.full(FEATURES, 0.1), rtol=1e-6)


@pytest.mark.parametrize("weight", [None, 0.0, 0.4])
@pytest.mark.parametrize("second_moment", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_a_batch_of_the_reference_is_the_plain_rule(
    rng, momentum, second_moment, weight
):
    stats = plain = make(rng, weight)
    for batch in batches(rng, [16] * 5)[1]:
        options: Any = {"momentum": momentum, "second_moment": second_moment}
        plain = update(plain, batch, **options)
        stats = update(stats, batch, reference_weight=16.0, **options)
    for got, want in zip(jax.tree.leaves(stats), jax.tree.leaves(plain), strict=True):
        # A power and a logarithm are a few roundings, five times.
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


MOMENTA = {
    "number": 0.7,
    "none kept": 0.0,
    "all kept": 1.0,
    "array": np.asarray(0.7, np.float32),
    "per feature": np.asarray([0.9, 0.0, 0.99], np.float32),
    "jax": jnp.asarray([1.0, 0.5, 0.99]),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA.values(), ids=MOMENTA)
def test_any_momentum(rng, momentum, jitted):
    stats = make(rng)
    wide, each = batches(rng, [4, 16, 1, 0, 40])
    mean, var = (np.asarray(v, np.float64) for v in stats[:2])
    step = update if jitted else jbn.update_batch_stats
    for (n, batch_mean, batch_var), batch in zip(wide, each, strict=True):
        stats = step(stats, batch, momentum=momentum, reference_weight=8)
        keep = np.asarray(momentum, np.float64) ** (n / 8)
        mean = keep * mean + (1 - keep) * batch_mean
        var = keep * var + (1 - keep) * batch_var
        # A momentum in float32 is rounded before it is taken to the power of five.
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.var, var, rtol=1e-5, atol=1e-6)


def test_a_momentum_close_to_one_is_not_rounded_away():
    # In float32, 1 - 0.999999 is 5 % off, and 0.999999**0.25 is 1.
    stats = BatchStats(jnp.zeros(1), jnp.ones(1))
    batch = Moments(jnp.full(1, 2.0), jnp.ones(1), jnp.ones(1))
    got = jbn.update_batch_stats(stats, batch, momentum=1 - 1e-6, reference_weight=8)
    np.testing.assert_allclose(got.mean, [2.5e-7], rtol=1e-5)


@pytest.mark.parametrize("weight", [None, 0.0, 0.4])
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_no_weight_changes_nothing(rng, momentum, weight):
    stats = make(rng, weight)
    batch = moments([0, 5, 0], [7, 7, 7], [7, 7, 7])
    got = update(stats, batch, momentum=momentum, reference_weight=4.0)
    for before, after in zip(jax.tree.leaves(stats), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(after[::2], before[::2])


def test_each_feature_by_its_own_weight(rng):
    stats = make(rng)
    batch = moments([1, 4, 16], [1, 1, 1], [1, 1, 1])
    got = update(stats, batch, momentum=0.9, reference_weight=4.0)
    keep = 0.9 ** np.asarray([0.25, 1, 4])
    np.testing.assert_allclose(got.mean, keep * stats.mean + 1 - keep, **CLOSE)


def test_debiased_is_the_mean_weighted_by_rows(rng):
    sizes = [3, 8, 1, 20]
    wide, each = batches(rng, sizes)
    _, stats = jbn.init(FEATURES, track_weight=True)
    for batch in each:
        stats = update(stats, batch, momentum=0.9, reference_weight=8)
    later = np.cumsum(sizes[::-1])[::-1] - sizes
    shares = 0.9 ** (later / 8) * (1 - 0.9 ** (np.asarray(sizes) / 8))
    _, mean, var = (np.average(v, 0, shares) for v in zip(*wide, strict=True))
    np.testing.assert_allclose(stats.mean, mean, **CLOSE)
    np.testing.assert_allclose(stats.var, var, **CLOSE)
    assert stats.weight is not None
    want = np.full(FEATURES, 1 - 0.9 ** (sum(sizes) / 8))
    np.testing.assert_allclose(stats.weight, want, **CLOSE)


def test_unbiased_goes_along_with_it(rng):
    stats = make(rng)
    batch = constant(4, 0, 3)
    got = update(stats, batch, momentum=0.81, reference_weight=8, unbiased=True)
    np.testing.assert_allclose(got.var, 0.9 * stats.var + 0.1 * 4, **CLOSE)


@pytest.mark.parametrize("argument", ["momentum", "reference_weight"])
def test_traced_values_do_not_recompile(rng, argument):
    traces = 0

    @jax.jit
    def step(stats, batch, value):
        nonlocal traces
        traces += 1
        given: Any = {"momentum": 0.9, "reference_weight": 8} | {argument: value}
        return jbn.update_batch_stats(stats, batch, **given)

    stats, (batch,) = make(rng), batches(rng, [4])[1]
    for value in (0.0, 0.5, 1.0) if argument == "momentum" else (1.0, 4.0, 1e6):
        got = step(stats, batch, value)
        momentum, reference = (value, 8) if argument == "momentum" else (0.9, value)
        keep = momentum ** (4 / reference)
        want = keep * stats.mean + (1 - keep) * batch.mean
        np.testing.assert_allclose(got.mean, want, **CLOSE)
    assert traces == 1


@functools.partial(jax.jit, static_argnames="others")
def norm(x, stats, others=(), **options) -> Any:
    given: Any = {"momentum": 0.9, "reference_weight": 8.0} | options | dict(others)
    return jbn.batch_norm(x, None, stats, use_running_average=False, **given)[1]


@pytest.mark.parametrize("kind", ["mask", "weights"])
def test_in_batch_norm_it_is_what_counts_of_the_batch(rng, kind):
    stats = make(rng)
    x = rng.normal(size=(12, FEATURES)).astype("f")
    w = rng.random((12, 1)) < 0.6
    w[0] = True
    if kind == "weights":
        w = (w * rng.uniform(0.5, 2, (12, 1))).astype("f")
    got = norm(x, stats, **{kind: w})
    total, mean, var = oracle.moments(x, w)
    keep = 0.9 ** (total / 8)
    np.testing.assert_allclose(got.mean, keep * stats.mean + (1 - keep) * mean, **CLOSE)
    np.testing.assert_allclose(got.var, keep * stats.var + (1 - keep) * var, **CLOSE)


@pytest.mark.parametrize("kind", mapped_by("vmap", "shard_map"))
def test_on_devices_it_is_what_counts_on_all_of_them(rng, kind):
    stats = make(rng)
    x = rng.normal(size=(4, 3, FEATURES)).astype("f")
    mask = np.arange(3) < np.asarray([3, 1, 0, 2])[:, None]
    f = lambda x, m: norm(x, stats, (("axis_name", "d"),), mask=m[:, None])
    if kind == "vmap":
        got = jax.jit(jax.vmap(f, out_axes=None, axis_name="d"))(x, mask)
    else:
        mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
        mapped = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P())
        got = jax.jit(mapped)(x.reshape(12, -1), mask.ravel())
    _, mean, _ = oracle.moments(x[mask])
    keep = 0.9 ** (6 / 8)
    np.testing.assert_allclose(got.mean, keep * stats.mean + (1 - keep) * mean, **CLOSE)


def test_each_domain_counts_its_own_rows(rng):
    _, stats = jbn.init((3, FEATURES))
    x = rng.normal(size=(12, FEATURES)).astype("f")
    ids = np.asarray([0] * 9 + [1] * 3)
    _, got = jax.jit(
        lambda x: jbn.domain_batch_norm(
            x,
            None,
            stats,
            use_running_average=False,
            domain=ids,
            momentum=0.9,
            reference_weight=8,
        )
    )(x)
    for i, n in enumerate((9, 3, 0)):
        mean = x[ids == i].mean(0) if n else 0
        want = np.broadcast_to((1 - 0.9 ** (n / 8)) * mean, FEATURES)
        np.testing.assert_allclose(got.mean[i], want, **CLOSE)


# The second moment.


@pytest.mark.parametrize("reference", [None, 8.0])
@pytest.mark.parametrize("momentum", [0.7, np.asarray([0.9, 0.5, 0.99], np.float32)])
def test_it_is_the_average_of_the_first_two_powers(rng, momentum, reference):
    stats = make(rng)
    sizes = [4, 8, 1, 20, 8, 3]
    wide, each = batches(rng, sizes)
    mean = np.asarray(stats.mean, np.float64)
    square = np.asarray(stats.var, np.float64) + mean**2
    for (n, batch_mean, batch_var), batch in zip(wide, each, strict=True):
        options: Any = {} if reference is None else {"reference_weight": reference}
        stats = update(stats, batch, momentum=momentum, second_moment=True, **options)
        keep = np.asarray(momentum, np.float64) ** (1 if reference is None else n / 8)
        mean = keep * mean + (1 - keep) * batch_mean
        square = keep * square + (1 - keep) * (batch_var + batch_mean**2)
        np.testing.assert_allclose(stats.mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.var, square - mean**2, rtol=1e-5, atol=1e-6)


def test_debiased_it_is_that_of_the_weighted_batches(rng):
    wide, each = batches(rng, [8] * 6)
    _, stats = jbn.init(FEATURES, track_weight=True)
    for batch in each:
        stats = update(stats, batch, momentum=0.7, second_moment=True)
    shares = 0.7 ** np.arange(6)[::-1]
    powers = [(mean, var + mean**2) for _, mean, var in wide]
    first, second = (np.average(v, 0, shares) for v in zip(*powers, strict=True))
    np.testing.assert_allclose(stats.mean, first, **CLOSE)
    np.testing.assert_allclose(stats.var, second - first**2, rtol=1e-5, atol=1e-5)


def test_far_from_zero_it_does_not_cancel(rng):
    # Powers of numbers near 1e4 have no digits left for a variance of 1.
    _, stats = jbn.init(FEATURES, track_weight=True)
    _, each = batches(rng, [8] * 6)
    _, near = jbn.init(FEATURES, track_weight=True)
    for batch in each:
        far = batch._replace(mean=batch.mean + 1e4)
        stats = update(stats, far, momentum=0.7, second_moment=True)
        near = update(near, batch, momentum=0.7, second_moment=True)
    np.testing.assert_allclose(stats.var, near.var, rtol=3e-3)


@pytest.mark.parametrize("n", [1, 2])
def test_small_batches_average_to_the_variance_of_all_rows(rng, n):
    std, steps, features = 2.0, 6000, 64
    _, start = jbn.init(features, track_weight=True)
    x = (rng.normal(size=(steps, n, features)) * std + 3).astype("f")

    @functools.partial(jax.jit, static_argnames="second_moment")
    def train(x, second_moment):
        def step(stats, x):
            _, stats = jbn.batch_norm(
                x,
                None,
                stats,
                use_running_average=False,
                momentum=0.998,
                second_moment=second_moment,
            )
            return stats, None

        return jax.lax.scan(step, start, x)[0]

    # 64 features, each of some 1000 batches or more: uncertain by 1 %, times n.
    of_rows, of_batches = (train(x, flag).var.mean() / std**2 for flag in (True, False))
    assert abs(of_rows - 1) < 0.02
    assert abs(of_batches - (1 - 1 / n)) < 0.02


def test_the_scatter_of_the_batches_means_belongs_to_it():
    def end(second_moment):
        _, stats = jbn.init(FEATURES)
        for t in range(200):
            batch = constant(8, 3 * (-1) ** t, 1)
            stats = update(stats, batch, momentum=0.9, second_moment=second_moment)
        return stats

    # The mean goes on to swing by 3 * 0.1 / 1.9.
    np.testing.assert_allclose(end(True).var, 1 + 9 - (0.3 / 1.9) ** 2, rtol=1e-4)
    np.testing.assert_allclose(end(False).var, 1, rtol=1e-4)


def test_complex_means_have_a_real_variance(rng):
    stats = BatchStats(jnp.zeros(1, jnp.complex64), jnp.ones(1))
    batch = Moments(jnp.ones(1), jnp.full(1, 3 + 4j, jnp.complex64), jnp.zeros(1))
    got = update(stats, batch, momentum=0.5, second_moment=True)
    np.testing.assert_allclose(got.var, [0.5 + 0.25 * 25], rtol=1e-6)


def test_a_feature_of_no_weight_keeps_its_variance(rng):
    stats = make(rng)
    batch = moments([0, 5, 0], [7, 7, 7], [7, 7, 7])
    got = update(stats, batch, momentum=0.5, second_moment=True)
    for before, after in zip(stats[:2], got[:2], strict=True):
        np.testing.assert_array_equal(after[::2], before[::2])


@pytest.mark.parametrize("second_moment", [False, True])
def test_the_cumulative_rule_has_it_anyway(rng, second_moment):
    rows = [(rng.normal(size=(n, FEATURES)) + n).astype("f") for n in (3, 1, 8)]
    _, stats = jbn.init(FEATURES, track_weight=True)
    for x in rows:
        batch = jbn.moments(x)
        stats = update(stats, batch, momentum=None, second_moment=second_moment)
    _, mean, var = oracle.moments(np.concatenate(rows))
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)


_, SEEN = jbn.init(2, track_weight=True)
X = np.ones((4, 2), "f")
BATCH = jbn.moments(X)
MISTAKES = {
    "unbiased second moments": (
        lambda: jbn.update_batch_stats(SEEN, BATCH, second_moment=True, unbiased=True),
        "would count twice",
        "Drop one of them",
    ),
    "unbiased second moments in batch_norm": (
        lambda: jbn.batch_norm(
            X, None, SEEN, use_running_average=False, second_moment=True, unbiased=True
        ),
        "would count twice",
        "Drop one of them",
    ),
    "a reference for the cumulative rule": (
        lambda: jbn.update_batch_stats(SEEN, BATCH, momentum=None, reference_weight=8),
        "counts every row alike already",
        "Drop it, or give a `momentum`",
    ),
    "a reference of zero": (
        lambda: jbn.update_batch_stats(SEEN, BATCH, reference_weight=0),
        "got 0",
        "must be positive and finite",
    ),
    "a negative reference": (
        lambda: jbn.batch_norm(
            X, None, SEEN, use_running_average=False, reference_weight=-8.0
        ),
        "got -8.0",
        "must be positive and finite",
    ),
    "an infinite reference": (
        lambda: jbn.update_batch_stats(SEEN, BATCH, reference_weight=np.inf),
        "got inf",
        "must be positive and finite",
    ),
    "a reference that is no number": (
        lambda: jbn.update_batch_stats(SEEN, BATCH, reference_weight=np.nan),
        "got nan",
        "must be positive and finite",
    ),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("call", "came", "fix"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, came, fix):
    with pytest.raises(ValueError, match=re.escape(fix)) as raised:
        call()
    assert came in str(raised.value)
