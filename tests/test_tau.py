"""`tau` for each feature, by schedule and learned; which paper is which `tau`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn import BatchStats


ROWS, FEATURES = 6, 4
TRAIN: Any = {"use_running_average": False, "epsilon": 1e-3}
EACH = np.asarray([0.0, 2.5, np.inf, 10.0])


@pytest.fixture
def problem(rng) -> Any:
    x = rng.normal(size=(ROWS, FEATURES)) * [1, 2, 3, 4] + [0, 1, -2, 5]
    stats = rng.normal(size=FEATURES), rng.uniform(0.5, 2, FEATURES)
    mean, var = map(jnp.asarray, stats)
    return x, BatchStats(mean, var)


def by_formula(x, stats, share, scatter=True):
    """Normalized by a blend that gives the batch a share, in NumPy."""
    mean, var = x.mean(0), x.var(0)
    gap = (mean - np.asarray(stats.mean)) ** 2 if scatter else 0
    mean = share * mean + (1 - share) * np.asarray(stats.mean)
    var = share * var + (1 - share) * np.asarray(stats.var) + share * (1 - share) * gap
    return (x - mean) / np.sqrt(var + TRAIN["epsilon"])


def assert_close(got, want, tolerance=1e-10):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


METHODS: dict[str, Any] = {
    "batch norm": lambda x, stats, tau: jbn.batch_norm(
        x, None, stats, tau=tau, **TRAIN
    ),
    "one group": lambda x, stats, tau: jbn.ghost_batch_norm(
        x, None, stats, num_groups=1, tau=tau, **TRAIN
    ),
    "one domain": lambda x, stats, tau: jbn.domain_batch_norm(
        x,
        None,
        BatchStats(stats.mean[None], stats.var[None]),
        domain=np.zeros(ROWS, np.int32),
        tau=tau,
        **TRAIN,
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("method", METHODS)
def test_each_feature_has_its_own(problem, method):
    x, stats = problem
    got = jax.jit(METHODS[method])(x, stats, EACH)[0]
    assert_close(got, by_formula(x, stats, ROWS / (ROWS + EACH)))


@pytest.mark.usefixtures("x64")
def test_each_domain_and_feature_has_its_own(problem):
    x, stats = problem
    two = BatchStats(jnp.stack([stats.mean, -stats.mean]), jnp.stack([stats.var] * 2))
    ids, tau = np.asarray([0, 1, 0, 0, 1, 0], np.int32), np.stack([EACH, EACH[::-1]])
    got, _ = jbn.domain_batch_norm(x, None, two, domain=ids, tau=tau, **TRAIN)
    for k in range(2):
        own = BatchStats(two.mean[k], two.var[k])
        n = (ids == k).sum()
        assert_close(got[ids == k], by_formula(x[ids == k], own, n / (n + tau[k])))


@pytest.mark.usefixtures("x64")
def test_on_other_axes_and_in_a_shrink(problem):
    x, stats = problem
    got, _ = jbn.batch_norm(x.T, None, stats, axis=0, tau=EACH, **TRAIN)
    assert_close(got.T, by_formula(x, stats, ROWS / (ROWS + EACH)))
    mixed = jbn.shrink(jbn.moments(x), stats, tau=EACH)
    got = jbn.normalize(x, mixed, epsilon=TRAIN["epsilon"])
    assert_close(got, by_formula(x, stats, ROWS / (ROWS + EACH)))


# --- Papers ------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_fixbn_is_batch_norm_and_then_the_running_statistics(problem):
    # Zhong et al., 2023: normal training, then statistics that are fixed.
    x, stats = problem

    @jax.jit
    def step(stats, t):
        later = t >= 2
        tau, momentum = jnp.where(later, jnp.inf, 0.0), jnp.where(later, 1.0, 0.5)
        return jbn.batch_norm(x, None, stats, tau=tau, momentum=momentum, **TRAIN)

    mean, var = map(np.asarray, stats[:2])
    for t in range(4):
        y, stats = step(stats, t)
        if t < 2:
            assert_close(y, by_formula(x, stats, 1.0))
            mean, var = 0.5 * (mean + x.mean(0)), 0.5 * (var + x.var(0))
        else:
            assert_close(y, (x - mean) / np.sqrt(var + TRAIN["epsilon"]))
    assert step._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("alpha", [0.1, 0.9])
def test_alpha_bn_blends_the_variances_alone(problem, alpha):
    # You, Li and Zhao, 2021: alpha is the share of the source.
    x, stats = problem
    tau = ROWS * alpha / (1 - alpha)
    mixed = jbn.shrink(jbn.moments(x), stats, tau=tau, scatter=False)
    got = jbn.normalize(x, mixed, epsilon=TRAIN["epsilon"])
    assert_close(got, by_formula(x, stats, 1 - alpha, scatter=False))


@pytest.mark.usefixtures("x64")
def test_ttn_and_hbn_learn_a_share_for_each_channel(problem):
    # Lim et al., 2023, equation 2; Chen et al., 2025: a learned share of the batch.
    x, stats = problem
    ct = np.cos(np.arange(x.size)).reshape(x.shape)

    def ours(share):
        tau = ROWS * (1 - share) / share
        return (jbn.batch_norm(x, None, stats, tau=tau, **TRAIN)[0] * ct).sum()

    share, step = np.asarray([0.2, 0.5, 0.9, 0.7]), 1e-6
    theirs = lambda share: (by_formula(x, stats, share) * ct).sum()
    value, grad = jax.value_and_grad(ours)(jnp.asarray(share))
    assert_close(value, theirs(share))
    steps = step * np.eye(FEATURES)
    want = [(theirs(share + s) - theirs(share - s)) / (2 * step) for s in steps]
    assert_close(grad, want, 1e-6)


@pytest.mark.usefixtures("x64")
def test_james_stein_shrinks_the_means_by_their_noise(problem):
    x, stats = problem
    m = jbn.moments(x)
    mean, prior = x.mean(0), np.asarray(stats.mean)
    noise = (x.var(0) / ROWS).mean()
    share = 1 - (FEATURES - 2) * noise / ((mean - prior) ** 2).sum()
    assert 0 < share < 1
    got = jbn.shrink(m, stats, tau=ROWS * (1 - share) / share)
    assert_close(got.mean, prior + share * (mean - prior))


# --- Layers ------------------------------------------------------------------------


def ramp(step):
    return jnp.where(step < 1, 0.0, jnp.where(step < 2, 4.0, jnp.inf))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_schedule_counts_training_calls(problem, kind):
    x, _ = problem
    x = x.astype("f")
    _, running = jbn.init(FEATURES)
    graph: Any = None
    if kind == "linen":
        layer: Any = jbn.linen.BatchNorm(tau=ramp, epsilon=1e-3)
        variables: Any = layer.init(jax.random.key(0), x, False)
        assert int(variables["batch_stats"]["step"]) == 0

        @jax.jit
        def train(variables):
            y, new = layer.apply(variables, x, False, mutable=["batch_stats"])
            return y, {**variables, **new}

        state = variables
    else:
        layer = jbn.nnx.BatchNorm(FEATURES, tau=ramp, epsilon=1e-3, rngs=nnx.Rngs(0))
        graph, state = nnx.split(layer)

        @jax.jit
        def train(state):
            layer = nnx.merge(graph, state)
            return layer(x), nnx.split(layer)[1]

    for step in range(4):
        y, state = train(state)
        want, running = jbn.batch_norm(x, None, running, tau=ramp(step), **TRAIN)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    assert train._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]
    if kind == "linen":
        # Inference changes nothing, and needs no step.
        del state["batch_stats"]["step"]
        y = layer.apply(state, x, True)
    else:
        layer = nnx.merge(graph, state)
        y = layer(x, use_running_average=True)
        assert int(layer.step[...]) == 4
    want = jbn.normalize(x, running, epsilon=1e-3)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_call_may_give_it_and_learn_it(problem, kind):
    x, _ = problem
    x = x.astype("f")
    if kind == "linen":
        layer = jbn.linen.BatchNorm(use_running_average=False, tau=7.0)
        variables = layer.init(jax.random.key(0), x)
        f = lambda tau: layer.apply(variables, x, tau=tau, mutable=["batch_stats"])[0]
    else:
        layer = jbn.nnx.BatchNorm(FEATURES, tau=7.0, rngs=nnx.Rngs(0))
        f = lambda tau: nnx.clone(layer)(x, tau=tau)

    def want(tau):
        _, stats = jbn.init(FEATURES)
        return jbn.batch_norm(x, None, stats, use_running_average=False, tau=tau)[0]

    tau = jnp.asarray([0.5, 1.0, 2.0, 4.0])
    np.testing.assert_allclose(f(tau), want(tau), rtol=1e-5, atol=1e-5)
    got, grad = (jax.grad(lambda t, g=g: (g(t) ** 2).sum())(tau) for g in (f, want))
    np.testing.assert_allclose(got, grad, rtol=1e-5, atol=1e-6)
    assert abs(np.asarray(got)).min() > 1e-4
    np.testing.assert_allclose(f(None), want(7.0), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_errors(problem):
    x, _ = problem
    x, two = x.astype("f"), jbn.init(FEATURES)[1]
    for bad, error in (
        (np.ones(3), r"`tau` must be one number, or have one entry .* got .*\(3,\)"),
        (np.asarray([1.0, 2.0, -1.0, 0.0]), "`tau` must be at least 0"),
    ):
        with pytest.raises(ValueError, match=error):
            jbn.batch_norm(x, None, two, tau=bad, **TRAIN)
        with pytest.raises(ValueError, match=error):
            jbn.shrink(jbn.moments(x), two, tau=bad)
    with pytest.raises(TypeError, match="`tau` must be a number; got function"):
        jbn.batch_norm(x, None, two, tau=ramp, **TRAIN)
