"""Numbers at the ends of float32, and what is not a number, against float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from differentiation import QUICKLY

import jbn


LARGEST = float(np.finfo(np.float32).max)


def train(function, x, stats=None, **options) -> Any:
    options = {"use_running_average": False, "epsilon": 0.0} | options
    return function(x, None, stats, **options)


# --- Small deviations ------------------------------------------------------------
#
# A variance of 1e-36 is a normal number in float32, and a row's share of it is not.


def rows(shape=(64, 4)):
    return np.random.default_rng(0).standard_normal(shape)


MASK = np.arange(64) % 3 > 0
WEIGHTS = 0.5 + np.arange(64) % 4
DOMAIN = np.arange(64) // 32


def by_group(x, ids):
    y = np.empty_like(x)
    for i in np.unique(ids):
        y[ids == i] = oracle.batch_norm(x[ids == i], epsilon=0)
    return y


TINY = {
    "plain": (
        lambda x: train(jbn.batch_norm, x),
        lambda x: oracle.batch_norm(x, epsilon=0),
    ),
    "mask": (
        lambda x: train(jbn.batch_norm, x, mask=MASK),
        lambda x: oracle.batch_norm(x, weights=MASK[:, None], epsilon=0),
    ),
    "weights": (
        lambda x: train(jbn.batch_norm, x, weights=WEIGHTS),
        lambda x: oracle.batch_norm(x, weights=WEIGHTS[:, None], epsilon=0),
    ),
    "domain": (
        lambda x: train(jbn.domain_batch_norm, x, domain=DOMAIN, num_domains=2),
        lambda x: by_group(x, DOMAIN),
    ),
    "ghost": (
        lambda x: train(jbn.ghost_batch_norm, x, num_groups=2),
        lambda x: by_group(x, DOMAIN),
    ),
    "features first": (
        lambda x: train(jbn.batch_norm, x.T.reshape(4, 8, 8), axis=0),
        lambda x: oracle.batch_norm(x, epsilon=0).T.reshape(4, 8, 8),
    ),
    "labels": (
        lambda x: jbn.conditional_batch_norm(
            x,
            jbn.Params(jnp.ones((2, 4)), jnp.zeros((2, 4))),
            None,
            use_running_average=False,
            labels=DOMAIN,
            epsilon=0.0,
        ),
        lambda x: oracle.batch_norm(x, epsilon=0),
    ),
}


# The others are much like the first.
QUICK = "plain", "mask", "weights", "domain", "ghost"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in TINY
    ],
)
@pytest.mark.parametrize("std", [1e-18, 1e-17, 1e-16])
def test_tiny_deviations_without_epsilon(name, std):
    x = (std * rows()).astype(np.float32)
    y, _ = compiled(name)(x)
    want = TINY[name][1](x.astype(float))
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-3)


@functools.cache
def compiled(name):
    return jax.jit(TINY[name][0])


@pytest.mark.parametrize("std", [1e-18, 1e-17, 1e-16])
def test_tiny_deviations_of_many_rows(std):
    x = (std * rows((16_384, 16))).astype(np.float32)
    y, moments = of_many_rows(x)
    wide = x.astype(float)
    np.testing.assert_allclose(moments.var, wide.var(0), rtol=1e-3)
    want = (wide - wide.mean(0)) / wide.std(0)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-3)


@jax.jit
def of_many_rows(x):
    return train(jbn.batch_norm, x)[0], jbn.moments(x)


# --- Large weights ---------------------------------------------------------------

X = np.asarray([[1e3, 1], [3e3, -2], [5e3, 7], [4e3, 4]], np.float32)
FIT = {
    "one is all": [3e38, 1, 1, 0],
    "their sum is near the largest": [1e38, 1e38, 1e38, 0],
    "the largest": [LARGEST, 0, 0, 0],
}
OVERFLOW = {
    "all alike": [3e38, 3e38, 3e38, 3e38],
    "the largest, twice": [0, LARGEST, LARGEST, 0],
    "large and small": [3e38, 2e38, 1e30, 1],
}


def all_of(x, w):
    """Everything that weighs, with and without the statistics of before."""
    _, stats = jbn.init(2)
    y, new = train(jbn.batch_norm, x, stats, weights=w, epsilon=1e-5, momentum=0.0)
    _, by_rows = jbn.init(2, track_weight=True)
    _, by_rows = train(jbn.batch_norm, x, by_rows, weights=w, momentum=None)
    found = (new, by_rows, jbn.moments(x, weights=w))
    return y, [m.mean for m in found], [m.var for m in found]


def in_two_parts(x, w):
    """Merged, and by the cumulative rule."""
    parts = [jbn.moments(x[i : i + 2], weights=w[i : i + 2, None]) for i in (0, 2)]
    _, stats = jbn.init(2, track_weight=True)
    for part in parts:
        stats = jbn.update_batch_stats(stats, part, momentum=None)
    merged = jbn.merge(*parts)
    y = jbn.normalize(x, merged)
    return y, [merged.mean, stats.mean], [merged.var, stats.var]


def by_domain(x, w):
    _, stats = jbn.init((2, 2))
    y, new = train(
        jbn.domain_batch_norm,
        x,
        stats,
        weights=w,
        domain=np.zeros(4, int),
        epsilon=1e-5,
        momentum=0.0,
    )
    return y, [new.mean[0]], [new.var[0]]


def by_group_of_rows(x, w):
    _, stats = jbn.init(2)
    y, new = train(
        jbn.ghost_batch_norm,
        x,
        stats,
        weights=w,
        num_groups=1,
        epsilon=1e-5,
        momentum=0.0,
    )
    return y, [new.mean], [new.var]


every_run = pytest.mark.parametrize(
    "run",
    [
        all_of,
        by_domain,
        pytest.param(by_group_of_rows, marks=pytest.mark.slow),
        in_two_parts,
    ],
)


@every_run
@pytest.mark.parametrize("weights", FIT.values(), ids=FIT)
def test_large_weights(run, weights):
    w = np.asarray(weights, np.float32)
    if run is in_two_parts and (w > 1).sum() > 1:
        pytest.skip("XLA moves the factor that keeps this sum finite out of it")
    y, means, variances = fast(run)(X, w)
    # In proportion, as their products overflow even in the reference's sums.
    _, mean, var = oracle.moments(X, w[:, None].astype(float) / LARGEST)
    for got in means:
        np.testing.assert_allclose(got, mean, rtol=1e-5)
    for got in variances:
        np.testing.assert_allclose(got, var, rtol=1e-5, atol=1e-30)
    counted = w > 0
    want = (X - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y[counted], want[counted], rtol=1e-4, atol=1e-4)


@every_run
@pytest.mark.parametrize("weights", OVERFLOW.values(), ids=OVERFLOW)
def test_weights_whose_sum_is_no_number(run, weights):
    """Are right, or refused in words."""
    w = np.asarray(weights, np.float32)
    try:
        _, means, variances = run(X, w)
    except ValueError as error:
        assert "`weights`" in str(error)  # noqa: PT017
        return
    _, mean, var = oracle.moments(X, w[:, None].astype(float) / LARGEST)
    for got in means:
        np.testing.assert_allclose(got, mean, rtol=1e-5)
    for got in variances:
        np.testing.assert_allclose(got, var, rtol=1e-5)


@every_run
@pytest.mark.parametrize("weights", OVERFLOW.values(), ids=OVERFLOW)
def test_traced_weights_whose_sum_is_no_number_make_none(run, weights):
    """They cannot be refused."""
    for v in jax.tree.leaves(fast(run)(X, np.float32(weights))):
        assert not np.isnan(v).any()


@functools.cache
def fast(run):
    return jax.jit(run, compiler_options=QUICKLY)


def test_samples_of_large_weights():
    """Each counts once, or they are refused."""
    try:
        got = jbn.sample_weights(np.asarray([[3e38, 3e38], [1, 3]], np.float32))
    except ValueError as error:
        assert "`weights`" in str(error)  # noqa: PT017
        return
    np.testing.assert_allclose(got, [[0.5, 0.5], [0.25, 0.75]], rtol=1e-5)


# --- The ends of momentum --------------------------------------------------------

BAD = np.asarray([np.nan, np.inf, -np.inf, 1e30], np.float32)
BATCH = np.asarray([[1, 10, 2, 4], [3, 30, 2, 5]], np.float32)
MEAN, VAR = BATCH.mean(0), BATCH.var(0)
RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "second moment": {"second_moment": True},
    "unbiased": {"unbiased": True},
    "reference": {"reference_weight": 2.0},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
ways = pytest.mark.parametrize("way", ["known", "by feature"])


def no_number():
    return jbn.BatchStats(jnp.asarray(BAD), jnp.asarray(abs(BAD)))


def update(x, stats, momentum, way, **options):
    """A training step with a momentum that is given in one of the ways."""

    def run(stats, momentum):
        return train(
            jbn.batch_norm, x, stats, momentum=momentum, epsilon=1e-5, **options
        )

    if way == "known":
        return run(stats, momentum)
    if way == "by feature":
        return run(stats, np.full(4, momentum, np.float32))
    return jax.jit(run, compiler_options=QUICKLY)(stats, jnp.float32(momentum))


@ways
@every_rule
def test_a_momentum_of_zero_replaces_what_is_no_number(rule, way):
    y, new = update(BATCH, no_number(), 0.0, way, **rule)
    np.testing.assert_allclose(new.mean, MEAN, rtol=1e-6)
    factor = 2 if "unbiased" in rule else 1
    np.testing.assert_allclose(new.var, factor * VAR, rtol=1e-6)
    np.testing.assert_allclose(y, oracle.batch_norm(BATCH), rtol=1e-4, atol=1e-6)


@ways
@every_rule
def test_a_momentum_of_one_keeps_what_is_there(rule, way):
    stats = jbn.BatchStats(jnp.arange(4.0), jnp.arange(1.0, 5.0))
    _, new = update(np.stack([BATCH[0], BAD]), stats, 1.0, way, **rule)
    np.testing.assert_array_equal(new.mean, stats.mean)
    np.testing.assert_array_equal(new.var, stats.var)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"second_moment": True},
        pytest.param({"unbiased": True}, marks=pytest.mark.slow),
        pytest.param({"reference_weight": 2.0}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_so_do_those_that_are_traced(rule, momentum):
    bad = np.stack([BATCH[0], BAD])
    stats = no_number() if momentum == 0 else jbn.BatchStats(*jnp.ones((2, 4)))
    x = BATCH if momentum == 0 else bad
    _, new = update(x, stats, momentum, "traced", **rule)
    factor = 2 if "unbiased" in rule else 1
    want = (MEAN, factor * VAR) if momentum == 0 else stats[:2]
    np.testing.assert_allclose(new.mean, want[0], rtol=1e-6)
    np.testing.assert_allclose(new.var, want[1], rtol=1e-6)


@pytest.mark.parametrize("traced", [False, True])
def test_ends_that_differ_by_feature(traced):
    momentum = np.asarray([0, 1, 0, 1], np.float32)
    mean = jnp.where(momentum == 0, BAD, 7)
    x = np.stack([BATCH[0], np.where(momentum == 1, BAD, BATCH[1])])
    run = lambda m: train(
        jbn.batch_norm, x, jbn.BatchStats(mean, abs(mean)), momentum=m
    )
    _, new = (jax.jit(run) if traced else run)(momentum)
    np.testing.assert_allclose(new.mean, np.where(momentum == 0, MEAN, 7), rtol=1e-6)
    np.testing.assert_allclose(new.var, np.where(momentum == 0, VAR, 7), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, None])
def test_tracked_statistics_that_do_not_count_are_replaced(momentum):
    """By a momentum of zero, or because they have no weight yet."""
    weight = jnp.full(4, 0.0 if momentum is None else 1.0)
    stats = no_number()._replace(weight=weight)
    _, new = train(jbn.batch_norm, BATCH, stats, momentum=momentum)
    np.testing.assert_allclose(new.mean, MEAN, rtol=1e-6)
    np.testing.assert_allclose(new.var, VAR, rtol=1e-6)


def test_commit_replaces_what_is_no_number():
    _, stats = jbn.init(4, accumulate=True)
    _, stats = train(jbn.batch_norm, BATCH, stats)
    stats = no_number()._replace(pending=stats.pending)
    new = jbn.commit(stats, momentum=0.0)
    np.testing.assert_allclose(new.mean, MEAN, rtol=1e-6)
    np.testing.assert_allclose(new.var, VAR, rtol=1e-6)


# --- Many rows -------------------------------------------------------------------


def after_one_row_batches(number):
    """The cumulative mean of 2**24 zeros and then `number` ones, one by one."""
    one = jbn.Moments(jnp.ones(1), jnp.ones(1), jnp.zeros(1))
    seen = jbn.BatchStats(jnp.zeros(1), jnp.zeros(1), jnp.full(1, 2.0**24))
    step = lambda _, stats: jbn.update_batch_stats(stats, one, momentum=None)
    return jax.jit(lambda: jax.lax.fori_loop(0, number, step, seen))()


def test_rows_are_counted_beyond_2_to_the_24():
    """Each, in a float32; or that they are not is said where the rule is explained."""
    stats = after_one_row_batches(64)
    np.testing.assert_allclose(stats.mean, [64 / (2**24 + 64)], rtol=1e-5)
    stats = after_one_row_batches(1024)
    if stats.weight[0] == 2**24:
        text = jbn.update_batch_stats.__doc__ or ""
        assert "2**24" in text or "16,777,216" in text
    else:
        np.testing.assert_allclose(stats.weight - 2**24, [1024], rtol=0.1)
        np.testing.assert_allclose(stats.mean, [1024 / (2**24 + 1024)], rtol=1e-5)
