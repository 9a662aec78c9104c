"""`jbn.shrink`, `tau` and `min_weight`: batches too small to speak for themselves."""

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
from jbn import BatchStats, Moments, Params


pytestmark = pytest.mark.sweep


FEATURES = 3
MOMENTUM, EPSILON = 0.7, 1e-3
LESS: Any = {"rtol": 1e-5, "atol": 1e-5}


def state(rng, shape: Any = FEATURES, dtype: Any = np.float32):
    """Parameters and running statistics without a special value."""
    scale, bias, mean = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    var = jnp.asarray(rng.uniform(0.5, 2, shape), dtype)
    return Params(scale, bias), BatchStats(mean, var)


def mixed(n, mean, var, prior, tau):
    """Moments of `n` rows and `tau` others as one: by the sums of their powers."""
    first = (n * mean + tau * prior.mean) / (n + tau)
    second = n * (var + mean**2) + tau * (prior.var + np.asarray(prior.mean) ** 2)
    return first, second / (n + tau) - first**2


@functools.partial(jax.jit, static_argnames="others")
def run(x, params, stats, *, others=(), **options):
    given: Any = {"momentum": MOMENTUM, "epsilon": EPSILON} | options | dict(others)
    return jbn.batch_norm(x, params, stats, use_running_average=False, **given)


def assert_is(got, y, mean, var, stats, keep: Any = MOMENTUM, close=LESS):
    """Raises unless the output is `y`, and the statistics have taken up the batch's."""
    np.testing.assert_allclose(got[0], y, **close)
    np.testing.assert_allclose(
        got[1].mean, keep * stats.mean + (1 - keep) * mean, **close
    )
    np.testing.assert_allclose(got[1].var, keep * stats.var + (1 - keep) * var, **close)


# The function.


@pytest.mark.parametrize("tau", [1, 2, 6])
def test_it_is_the_moments_of_a_mixture(rng, tau):
    batch = rng.normal(size=(4, FEATURES)) * 2 + 1
    prior = rng.normal(size=(50, FEATURES))
    # 200 rows of the four of the batch, and `tau` times as many of the prior.
    sample = np.concatenate([np.tile(batch, (50, 1)), np.tile(prior, (4 * tau, 1))])
    got = jax.jit(jbn.shrink)(
        jbn.moments(batch.astype("f")), jbn.moments(prior.astype("f")), tau=4.0 * tau
    )
    np.testing.assert_allclose(got.mean, sample.mean(0), **LESS)
    np.testing.assert_allclose(got.var, sample.var(0), **LESS)
    np.testing.assert_array_equal(got.weight, np.full(FEATURES, 4))


@hypothesis.given(
    weight=st.floats(0.1, 100),
    tau=st.floats(0, 100),
    effective=st.none() | st.floats(0.1, 100),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=50)
def test_any_weights(weight, tau, effective, seed):
    rng = np.random.default_rng(seed)
    _, prior = state(rng)
    mean, var = rng.normal(size=FEATURES) * 3, rng.uniform(0, 2, FEATURES)
    moments = Moments(*(jnp.asarray(v, "f") for v in (np.full(3, weight), mean, var)))
    given = None if effective is None else jnp.full(FEATURES, effective, "f")
    got = jitted_shrink(moments, prior, tau, given)
    n = weight if effective is None else effective
    want = mixed(n, mean, var, prior, tau)
    np.testing.assert_allclose(got.mean, want[0], **LESS)
    np.testing.assert_allclose(got.var, want[1], rtol=1e-5, atol=2e-5)
    np.testing.assert_array_equal(got.weight, moments.weight)


@jax.jit
def jitted_shrink(moments, prior, tau, effective=None):
    return jbn.shrink(moments, prior, tau=tau, effective_weight=effective)


@pytest.mark.parametrize("effective", [None, 0.0])
def test_no_weight_is_the_prior_and_infinite_tau_too(rng, effective):
    _, prior = state(rng)
    moments = Moments(*(jnp.asarray(v, "f") for v in ([0, 0, 4], [0, 0, 9], [0, 0, 9])))
    given = None if effective is None else jnp.full(FEATURES, effective)
    for tau in (0.0, 3.0, np.inf):
        got = jitted_shrink(moments, prior, tau, given)
        of_prior = slice(3 if np.isinf(tau) or effective == 0 else 2)
        np.testing.assert_array_equal(got.mean[of_prior], prior.mean[of_prior])
        np.testing.assert_array_equal(got.var[of_prior], prior.var[of_prior])
        np.testing.assert_array_equal(got.weight, moments.weight)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tau", [0.0, 2.5, np.inf])
def test_gradients_in_all_arguments(rng, tau):
    _, prior = state(rng, dtype=np.float64)
    moments = Moments(*(jnp.asarray(rng.uniform(0.5, 2, FEATURES)) for _ in range(3)))
    cts = rng.normal(size=(2, FEATURES))

    def loss(moments, prior, tau):
        got = jbn.shrink(moments, prior, tau=tau)
        return (got.mean * cts[0] + got.var * cts[1]).sum()

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(moments, prior, tau)
    flat, tree = jax.tree.flatten((moments, prior, jnp.asarray(tau)))

    def numeric(*leaves):
        (n, mean, var), prior, tau = jax.tree.unflatten(tree, leaves)
        if np.isinf(tau):
            n, tau = 0.0, 1.0
        got = mixed(n, mean, var, prior, tau)
        return (got[0] * cts[0] + got[1] * cts[1]).sum()

    for i, (leaf, grad) in enumerate(zip(flat, jax.tree.leaves(grads), strict=True)):
        assert np.isfinite(grad).all()
        if leaf.ndim == 0 and np.isinf(tau):
            continue  # no difference can be taken there
        want, h = np.zeros(leaf.shape), 1e-6
        for index in np.ndindex(*leaf.shape):
            step = np.zeros(leaf.shape)
            step[index] = h
            up, down = ([*flat[:i], leaf + s, *flat[i + 1 :]] for s in (step, -step))
            want[index] = (numeric(*up) - numeric(*down)) / (2 * h)
        np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-8)


# In batch norm.


def test_tau_0_is_batch_norm_bit_for_bit(rng):
    params, stats = state(rng)
    x = (rng.normal(size=(5, FEATURES)) * 3 + 1).astype("f")
    want = run(x, params, stats)
    got = run(x, params, stats, others=(("tau", 0.0),))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_traced_tau_of_0_is_batch_norm(rng):
    params, stats = state(rng)
    x = (rng.normal(size=(5, FEATURES)) * 3 + 1).astype("f")
    y, new = run(x, params, stats, tau=0.0)
    want, same = run(x, params, stats)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, new, same)


@pytest.mark.parametrize("traced", [False, True])
def test_infinite_tau_is_inference(rng, traced):
    params, stats = state(rng)
    x = (rng.normal(size=(5, FEATURES)) * 3 + 1).astype("f")
    tau: Any = {"tau": np.inf} if traced else {"others": (("tau", np.inf),)}
    y, new = run(x, params, stats, **tau)
    want = jax.jit(
        lambda x: jbn.batch_norm(
            x, params, stats, use_running_average=True, epsilon=EPSILON
        )[0]
    )(x)
    # Two programs: on some processors one of them is contracted to a fused product.
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    # The batch is taken up all the same.
    _, mean, var = oracle.moments(x)
    assert_is((y, new), want, mean, var, stats)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tau", [0.5, 4.0, 100.0])
@pytest.mark.parametrize("kind", [None, "mask", "weights"])
def test_outputs_statistics_and_gradients(rng, kind, tau):
    params, stats = state(rng, dtype=np.float64)
    x, ct = rng.normal(size=(2, 6, FEATURES)) * 2
    w = np.ones((6, 1))
    if kind == "mask":
        w = rng.random((6, 1)) < 0.6
        w[:2] = True
    elif kind == "weights":
        w = rng.uniform(0.1, 3, (6, 1))
    options = {kind: w} if kind else {}
    x_in = np.where(w > 0, x, np.nan)

    @jax.jit
    def all_of_it(x, params):
        def loss(x, params):
            y, new = run(x, params, stats, tau=tau, **options)
            return (jnp.where(w > 0, y, 0) * ct).sum(), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    (dx, dparams), (y, new) = all_of_it(x_in, params)
    w = w.astype(float)
    # How many equal rows these are worth (Kish, 1965).
    n = w.sum() ** 2 / (w**2).sum()
    _, mean, var = oracle.moments(x, w)

    def plain(x, scale, bias):
        _, mean, var = oracle.moments(x, w)
        mean, var = mixed(n, mean, var, stats, tau)
        return oracle.normalize(x, mean, var, scale, bias, epsilon=EPSILON)

    want = plain(x, *params)
    counts = w[:, 0] > 0
    close: Any = {"rtol": 1e-9, "atol": 1e-9}
    assert_is((y[counts], new), want[counts], mean, var, stats, close=close)

    masked_ct = np.where(w > 0, ct, 0)
    flat = [x, *map(np.asarray, params)]
    for i, grad in enumerate((dx, *dparams)):
        numeric, h = np.zeros(flat[i].shape), 1e-5
        for index in np.ndindex(*flat[i].shape):
            step = np.zeros(flat[i].shape)
            step[index] = h
            up, down = ([*flat[:i], flat[i] + s, *flat[i + 1 :]] for s in (step, -step))
            difference = (plain(*up) - plain(*down)) * masked_ct
            numeric[index] = difference.sum() / (2 * h)
        np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-7)


def test_no_gradient_passes_to_the_running_statistics(rng):
    params, stats = state(rng)
    x, ct = rng.normal(size=(2, 6, FEATURES)).astype("f")
    loss = lambda stats: (run(x, params, stats, tau=3.0)[0] * ct).sum()
    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(stats)):
        np.testing.assert_array_equal(gradient, np.zeros(FEATURES))


def test_a_traced_tau_does_not_recompile(rng):
    params, stats = state(rng)
    x = rng.normal(size=(5, FEATURES)).astype("f")
    traces = 0

    @jax.jit
    def norm(x, tau):
        nonlocal traces
        traces += 1
        return jbn.batch_norm(x, params, stats, use_running_average=False, tau=tau)[0]

    for tau in (0.0, 3.0, np.inf):
        _, mean, var = oracle.moments(x)
        by = stats[:2] if np.isinf(tau) else mixed(5, mean, var, stats, tau)
        want = oracle.normalize(x, *by, *params)
        np.testing.assert_allclose(norm(x, tau), want, **LESS)
    assert traces == 1


def test_each_domain_is_drawn_to_its_own(rng):
    params, stats = state(rng, (2, FEATURES))
    x = rng.normal(size=(9, FEATURES)).astype("f")
    ids = np.asarray([0, 0, 0, 0, 0, 0, 1, 1, -1])

    @jax.jit
    def norm(x, ids):
        return jbn.domain_batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            domain=ids,
            tau=3.0,
            momentum=MOMENTUM,
            epsilon=EPSILON,
        )

    y, new = norm(x, ids)
    for i, n in enumerate((6, 2)):
        of_domain = BatchStats(stats.mean[i], stats.var[i])
        _, mean, var = oracle.moments(x[ids == i])
        by = mixed(n, mean, var, of_domain, 3.0)
        scale, bias = (np.asarray(p)[i] for p in params)
        want = oracle.normalize(x[ids == i], *by, scale, bias, epsilon=EPSILON)
        new_stats = BatchStats(new.mean[i], new.var[i])
        assert_is((y[ids == i], new_stats), want, mean, var, of_domain)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_ghost_group_is_drawn_to_the_running_statistics(rng, weighted):
    params, stats = state(rng)
    x = rng.normal(size=(7, FEATURES)).astype("f")  # of which the last group has one
    w = rng.uniform(0.1, 2, (7, 1)).astype("f") if weighted else np.ones((7, 1), "f")
    options: Any = {"weights": w} if weighted else {}

    @jax.jit
    def norm(x):
        return jbn.ghost_batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            num_groups=4,
            tau=3.0,
            momentum=MOMENTUM,
            epsilon=EPSILON,
            **options,
        )

    want = []
    for rows in np.split(np.arange(7), [2, 4, 6]):
        _, mean, var = oracle.moments(x[rows], w[rows])
        u = w[rows].astype(float)
        by = mixed(u.sum() ** 2 / (u**2).sum(), mean, var, stats, 3.0)
        want.append(oracle.normalize(x[rows], *by, *params, epsilon=EPSILON))
    _, mean, var = oracle.moments(x, w)
    assert_is(norm(x), np.concatenate(want), mean, var, stats)


@pytest.mark.parametrize("kind", mapped_by("vmap", "shard_map"))
def test_the_effective_weight_is_that_of_all_devices(rng, kind):
    params, stats = state(rng)
    x = rng.normal(size=(8, FEATURES)).astype("f")
    w = rng.uniform(0.1, 2, (8, 1)).astype("f")
    w[2:4] = 0  # nothing on the second device
    f = lambda x, w: run(x, params, stats, weights=w, tau=3.0, others=AXIS)
    if kind == "vmap":
        mapped = jax.vmap(f, out_axes=(0, None), axis_name="d")
        y, new = jax.jit(mapped)(x.reshape(4, 2, -1), w.reshape(4, 2, 1))
    else:
        mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
        mapped = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P()))
        y, new = jax.jit(mapped)(x, w)
    u = w.astype(float)
    _, mean, var = oracle.moments(x, w)
    by = mixed(u.sum() ** 2 / (u**2).sum(), mean, var, stats, 3.0)
    want = oracle.normalize(x, *by, *params, epsilon=EPSILON)
    assert_is((y.reshape(x.shape), new), want, mean, var, stats)


AXIS = (("axis_name", "d"),)


def test_estimates_are_better_than_those_of_the_batch_alone(rng):
    """Means and variances of small batches from domains that differ somewhat."""
    domains, tau, most = 10_000, 8.0, 16
    # The truth of each domain; the prior is what they have in common.
    means, stds = rng.normal(size=domains) * 0.5, np.exp(rng.normal(size=domains) * 0.3)
    truth = np.stack([means, stds**2])
    of_all = truth.mean(1)
    prior = BatchStats(jnp.full(domains, of_all[0]), jnp.full(domains, of_all[1]))
    x = (rng.normal(size=(most, domains)) * stds + means).astype("f")

    @jax.jit
    def estimate(mask, tau):
        got = jbn.shrink(jbn.moments(x, mask=mask), prior, tau=tau)
        return jnp.stack([got.mean, got.var])

    def errors(tau):
        masks = [np.arange(most)[:, None] < n for n in (1, 2, 4, 8, most)]
        squares = [np.square(estimate(mask, tau) - truth) for mask in masks]
        return np.sqrt(np.mean(squares, -1))

    shrunk, alone, frozen = errors(tau), errors(0.0), errors(np.inf)
    # Better than either of the two that it is made of, mean and variance, at any size.
    assert (shrunk < alone).all()
    assert (shrunk < frozen).all()
    # The more rows, the better, and the less there is to gain: half at a single row.
    assert (np.diff(shrunk, axis=0) < 0).all()
    assert (np.diff(alone / shrunk, axis=0) < 0).all()
    assert (alone[0] / shrunk[0] > 1.8).all()


# Too little to be used at all.


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)])
def test_one_row_is_normalized_by_the_running_statistics(rng, n, shape):
    params, stats = state(rng)
    x = rng.normal(size=(n, *shape[1:], FEATURES)).astype("f")
    got = run(x, params, stats, min_weight=1.0)
    _, mean, var = oracle.moments(x)
    if n == 1:
        want = oracle.normalize(x, *stats[:2], *params, epsilon=EPSILON)
        np.testing.assert_allclose(got[0], want, **LESS)
        jax.tree.map(np.testing.assert_array_equal, got[1], stats)
    else:
        want = oracle.normalize(x, mean, var, *params, epsilon=EPSILON)
        assert_is(got, want, mean, var, stats)
    # Without the policy the output of one row is the bias, and says nothing of it.
    if n == 1:
        y, _ = run(x, params, stats)
        assert params.bias is not None
        np.testing.assert_allclose(y, np.broadcast_to(params.bias, y.shape), **LESS)


def test_min_weight_is_for_each_feature_and_of_its_weight(rng):
    params, stats = state(rng)
    x = rng.normal(size=(4, FEATURES)).astype("f")
    w = np.ones((4, FEATURES), "f")
    w[:, 0], w[:, 2] = 0.5, [3, 0, 0, 0]  # 2 in all, 4, and 3 of one row
    got = run(x, params, stats, weights=w, min_weight=2.0)
    total, mean, var = oracle.moments(x, w)
    few = total <= 2
    np.testing.assert_array_equal(few, [True, False, False])
    by = np.where(few, stats.mean, mean), np.where(few, stats.var, var)
    want = oracle.normalize(x, *by, *params, epsilon=EPSILON)
    assert_is(got, want, mean, var, stats, np.where(few, 1, MOMENTUM))


def test_min_weight_of_domains_and_with_tau(rng):
    _, stats = state(rng, (2, FEATURES))
    x = rng.normal(size=(6, FEATURES)).astype("f")
    ids = np.asarray([0, 0, 0, 0, 0, 1])
    y, new = jax.jit(
        lambda x: jbn.domain_batch_norm(
            x,
            None,
            stats,
            use_running_average=False,
            domain=ids,
            min_weight=1.0,
            tau=2.0,
            epsilon=EPSILON,
        )
    )(x)
    want = oracle.normalize(x[5:], stats.mean[1], stats.var[1], epsilon=EPSILON)
    np.testing.assert_allclose(y[5:], want, **LESS)
    np.testing.assert_array_equal(new.mean[1], stats.mean[1])
    _, mean, var = oracle.moments(x[:5])
    by = mixed(5, mean, var, BatchStats(stats.mean[0], stats.var[0]), 2.0)
    want = oracle.normalize(x[:5], *by, epsilon=EPSILON)
    np.testing.assert_allclose(y[:5], want, **LESS)


@pytest.mark.usefixtures("x64")
def test_gradients_of_what_has_too_little_weight_are_those_of_inference(rng):
    params, stats = state(rng, dtype=np.float64)
    x, ct = rng.normal(size=(2, 1, FEATURES))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(x, params):
        return (run(x, params, stats, min_weight=1.0)[0] * ct).sum()

    dx, dparams = gradient(x, params)
    rstd = 1 / np.sqrt(np.asarray(stats.var) + EPSILON)
    np.testing.assert_allclose(dx, ct * np.asarray(params.scale) * rstd, rtol=1e-12)
    want = (ct * (x - np.asarray(stats.mean)) * rstd)[0]
    np.testing.assert_allclose(dparams.scale, want, rtol=1e-12)
    np.testing.assert_allclose(dparams.bias, ct[0], rtol=1e-12)


X, STATS = np.ones((4, 2), "f"), jbn.init(2)[1]
PLAIN: Any = {"use_running_average": False}
MISTAKES = {
    "a negative tau": (
        lambda: jbn.batch_norm(X, None, STATS, **PLAIN, tau=-1.0),
        "got -1.0",
        "0 is batch norm, infinity the running statistics",
    ),
    "a negative tau in shrink": (
        lambda: jbn.shrink(jbn.moments(X), STATS, tau=-0.5),
        "got -0.5",
        "`tau` must be at least 0",
    ),
    "a tau that is no number": (
        lambda: jbn.shrink(jbn.moments(X), STATS, tau=np.nan),
        "got nan",
        "`tau` must be at least 0",
    ),
    "a tau of another shape": (
        lambda: jbn.shrink(jbn.moments(X), STATS, tau=np.ones(7)),
        "shape (7,)",
        "`tau` must be one number",
    ),
    "a negative min_weight": (
        lambda: jbn.batch_norm(X, None, STATS, **PLAIN, min_weight=-1.0),
        "got -1.0",
        "A feature with at most this weight is not updated",
    ),
    "a min_weight for each feature": (
        lambda: jbn.batch_norm(X, None, STATS, **PLAIN, min_weight=np.ones(2)),
        "shape (2,)",
        "`min_weight` must be one number",
    ),
    "tau for batch_renorm": (
        lambda: jbn.batch_renorm(X, None, STATS, **PLAIN, tau=1.0),
        "does not take `tau`",
        "Drop `tau`, or use `batch_norm`",
    ),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("call", "came", "fix"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, came, fix):
    with pytest.raises(ValueError, match=re.escape(fix)) as raised:
        call()
    assert came in str(raised.value)
