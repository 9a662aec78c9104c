"""`jbn.update_batch_stats`: each rule, and the trajectories of other libraries."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from peers import load_peer

import jbn
from jbn import BatchStats, Moments


pytestmark = pytest.mark.sweep


update = jax.jit(jbn.update_batch_stats, static_argnames=("unbiased",))
STEPS = 10
# Ten float32 updates, each rounded twice.
CLOSE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}


def assert_stats(actual, mean, var, weight: Any = None, **tolerance: Any):
    tolerance = tolerance or CLOSE
    np.testing.assert_allclose(actual.mean, mean, **tolerance)
    np.testing.assert_allclose(actual.var, var, **tolerance)
    if weight is None:
        assert actual.weight is None
    else:
        np.testing.assert_allclose(actual.weight, weight, **tolerance)


def batches(rng, features=3, sizes=(8,) * STEPS):
    """The moments of some batches, in float64, and as `Moments`."""
    wide = [
        (np.full(features, n), rng.normal(size=features), rng.uniform(0, 2, features))
        for n in sizes
    ]
    return wide, [Moments(*(jnp.asarray(v, jnp.float32) for v in w)) for w in wide]


def make(rng, features=3, weight=None):
    return BatchStats(
        jnp.asarray(rng.normal(size=features), jnp.float32),
        jnp.asarray(rng.uniform(0.5, 2, features), jnp.float32),
        None if weight is None else jnp.full(features, weight, jnp.float32),
    )


MOMENTA = {
    "number": 0.7,
    "none kept": 0.0,
    "all kept": 1.0,
    "array": np.asarray(0.7, np.float32),
    "per feature": np.asarray([0.9, 0.5, 0.99], np.float32),
    "jax": jnp.asarray([0.9, 0.5, 0.99]),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("momentum", MOMENTA.values(), ids=MOMENTA)
def test_exponential_keeps_momentum_of_the_old(rng, momentum, jitted):
    stats = make(rng)
    wide, moments = batches(rng)
    mean, var = (np.asarray(v, np.float64) for v in (stats.mean, stats.var))
    step = update if jitted else jbn.update_batch_stats
    keep = np.asarray(momentum, np.float64)
    for (_, batch_mean, batch_var), batch in zip(wide, moments, strict=True):
        stats = step(stats, batch, momentum=momentum)
        mean = keep * mean + (1 - keep) * batch_mean
        var = keep * var + (1 - keep) * batch_var
        assert_stats(stats, mean, var)


def test_a_momentum_close_to_one_is_not_rounded_away():
    # In float32, 1 - 0.999999 is 5 % off.
    stats = BatchStats(jnp.zeros(1), jnp.ones(1))
    batch = Moments(jnp.ones(1), jnp.ones(1), jnp.ones(1))
    new = jbn.update_batch_stats(stats, batch, momentum=0.999999)
    np.testing.assert_allclose(new.mean, [1e-6], rtol=1e-6)


def test_unbiased_is_the_variance_over_n_minus_one(rng):
    stats = make(rng)
    (wide,), (batch,) = batches(rng, sizes=(8,))
    new = update(stats, batch, momentum=0.7, unbiased=True)
    mean = 0.7 * stats.mean + 0.3 * wide[1]
    assert_stats(new, mean, 0.7 * stats.var + 0.3 * wide[2] * 8 / 7)


@pytest.mark.parametrize("n", [0.5, 1.0])
def test_where_there_is_no_unbiased_variance_the_running_one_stays(rng, n):
    stats = make(rng)
    batch = Moments(jnp.asarray([n, 2, 4]), jnp.ones(3), jnp.ones(3))
    new = update(stats, batch, momentum=0.7, unbiased=True)
    unbiased = np.asarray([np.nan, 2, 4 / 3])
    expected = 0.7 * np.asarray(stats.var) + 0.3 * unbiased
    expected[0] = stats.var[0]
    assert_stats(new, 0.7 * stats.mean + 0.3, expected)
    np.testing.assert_array_equal(new.var[0], stats.var[0])


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize(
    ("momentum", "weight"),
    [(0.0, None), (0.9, None), (0.9, 0.0), (0.9, 0.4), (None, 0.0), (None, 12.0)],
)
def test_no_weight_changes_nothing(rng, momentum, unbiased, weight):
    stats = make(rng, weight=weight)
    # One feature was seen, and its neighbors are none of its business.
    batch = Moments(jnp.asarray([0.0, 5, 0]), jnp.full(3, 7.0), jnp.full(3, 7.0))
    new = update(stats, batch, momentum=momentum, unbiased=unbiased)
    assert new.mean[1] != stats.mean[1]
    assert new.var[1] != stats.var[1]
    for before, after in zip(jax.tree.leaves(stats), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(after[::2], before[::2])
        assert after.dtype == before.dtype


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1 - 1e-6])
def test_debiased_equals_the_batch_after_one_step(rng, momentum):
    # Equinox's mode="batch" starts the variance at 1 and divides it all the same:
    # with momentum 0.99 it is 99 + var after one step.
    _, (batch,) = batches(rng, sizes=(8,))
    _, stats = jbn.init(3, track_weight=True)
    new = update(stats, batch, momentum=momentum)
    # Traced, momentum is a float32, and one minus it is as exact as that.
    assert_stats(new, batch.mean, batch.var, 1 - momentum, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_debiased_is_the_exponentially_weighted_mean_of_the_batches(rng, momentum):
    wide, moments = batches(rng)
    _, stats = jbn.init(3, track_weight=True)
    for t, batch in enumerate(moments, start=1):
        stats = update(stats, batch, momentum=momentum)
        w = momentum ** np.arange(t)[::-1]
        _, mean, var = (np.average(v, 0, w) for v in zip(*wide[:t], strict=True))
        assert_stats(stats, mean, var, 1 - momentum**t)


def test_debiased_equals_plain_in_the_limit(rng):
    _, moments = batches(rng, sizes=(8,) * 40)
    _, debiased = jbn.init(3, track_weight=True)
    _, plain = jbn.init(3)
    for batch in moments:
        debiased = update(debiased, batch, momentum=0.5)
        plain = update(plain, batch, momentum=0.5)
    assert_stats(debiased, plain.mean, plain.var, 1.0)


def test_debiased_skips_what_has_no_weight(rng):
    wide, moments = batches(rng, sizes=(8, 0, 8))
    _, stats = jbn.init(3, track_weight=True)
    for batch in moments:
        stats = update(stats, batch, momentum=0.9)
    (_, *first), _, (_, *last) = wide
    mean, var = ((0.9 * a + b) / 1.9 for a, b in zip(first, last, strict=True))
    assert_stats(stats, mean, var, 1 - 0.9**2)


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(
    "sizes", [(8,) * 5, (98, 2), (2, 98), (1, 1, 1), (5, 0, 3, 11)], ids=str
)
def test_cumulative_equals_the_pooled_rows(rng, sizes, offset):
    rows = [
        (rng.normal(size=(n, 3)) + 3 * t + offset).astype(np.float32)
        for t, n in enumerate(sizes)
    ]
    _, stats = jbn.init(3, track_weight=True)
    for i, x in enumerate(rows, start=1):
        stats = update(stats, jbn.moments(x), momentum=None)
        weight, mean, var = oracle.moments(np.concatenate(rows[:i]))
        # The running mean is rounded to float32 at every step.
        atol = 1e-5 + 2 * np.finfo(np.float32).eps * offset
        assert_stats(stats, mean, var, weight, rtol=1e-5, atol=atol)


def test_cumulative_weighs_rows_and_not_batches():
    # PyTorch's cumulative average says 5: the mean of the batches' means.
    _, stats = jbn.init(1, track_weight=True)
    for x in (np.zeros((98, 1), np.float32), np.full((2, 1), 10, np.float32)):
        stats = update(stats, jbn.moments(x), momentum=None)
    assert_stats(stats, [0.2], [0.2 * (10 - 0.2)], [100], rtol=1e-6)


def test_cumulative_equals_merge(rng):
    _, moments = batches(rng, sizes=(3, 50, 7))
    _, stats = jbn.init(3, track_weight=True)
    for batch in moments:
        stats = update(stats, batch, momentum=None)
    merged = jbn.merge(*moments)
    assert_stats(stats, merged.mean, merged.var, merged.weight)


def test_cumulative_pools_the_unbiased_variances_if_asked(rng):
    wide, moments = batches(rng, sizes=(4, 4))
    _, stats = jbn.init(3, track_weight=True)
    for batch in moments:
        stats = update(stats, batch, momentum=None, unbiased=True)
    (_, mean_0, var_0), (_, mean_1, var_1) = wide
    var = (var_0 + var_1) / 2 * 4 / 3 + (mean_0 - mean_1) ** 2 / 4
    assert_stats(stats, (mean_0 + mean_1) / 2, var, 8)


def test_an_exponential_average_goes_on_from_a_cumulative_one(rng):
    stats = make(rng, weight=100.0)
    (wide,), (batch,) = batches(rng, sizes=(8,))
    new = update(stats, batch, momentum=0.9)
    mean = 0.9 * stats.mean + 0.1 * wide[1]
    assert_stats(new, mean, 0.9 * stats.var + 0.1 * wide[2], 1.0)


def test_batch_norm_follows_the_same_rules(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    for momentum, weight, unbiased in itertools.product(
        [0.9, None], [0.4, 12.0], [False, True]
    ):
        stats = make(rng, weight=weight)
        _, new = jbn.batch_norm(
            x,
            None,
            stats,
            use_running_average=False,
            momentum=momentum,
            unbiased=unbiased,
        )
        expected = jbn.update_batch_stats(
            stats, jbn.moments(x), momentum=momentum, unbiased=unbiased
        )
        # Not bit for bit: compiled as one program, or as two.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        jax.tree.map(close, new, expected)


@pytest.mark.parametrize("weight", [None, 0.4])
def test_a_traced_momentum_does_not_recompile(rng, weight):
    traces = 0

    @jax.jit
    def step(stats, batch, momentum):
        nonlocal traces
        traces += 1
        return jbn.update_batch_stats(stats, batch, momentum=momentum)

    stats = make(rng, weight=weight)
    for t, batch in enumerate(batches(rng)[1]):
        stats = step(stats, batch, 0.9 - t / 20)
    assert traces == 1


@pytest.mark.parametrize("momentum", [0.9, None])
def test_no_gradient_passes(rng, momentum):
    stats = make(rng, weight=0.4)
    _, (batch,) = batches(rng, sizes=(8,))

    def total(stats, batch):
        new = jbn.update_batch_stats(stats, batch, momentum=momentum)
        return sum(v.sum() for v in jax.tree.leaves(new))

    gradients = jax.grad(total, argnums=(0, 1))(stats, batch)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize("momentum", [0.9, None])
def test_dtypes_of_the_state_are_kept_and_at_least_float32(rng, momentum):
    _, (batch,) = batches(rng, sizes=(8,))
    stats = make(rng, weight=0.4)
    new = update(jax.tree.map(lambda v: v.astype(jnp.bfloat16), stats), batch)
    assert {v.dtype for v in jax.tree.leaves(new)} == {jnp.dtype(jnp.float32)}
    with jax.enable_x64(True):
        stats = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), stats)
        new = update(stats, batch, momentum=momentum)
    assert {v.dtype for v in jax.tree.leaves(new)} == {jnp.dtype(jnp.float64)}


# What users of other libraries get: their trajectories over ten steps, to 1e-6.


def inputs(rng, shape=(16, 3)):
    # Uneven statistics, of the size of 1 so that 1e-6 is a few roundings.
    return [
        (rng.normal(size=shape) * 0.8 + rng.normal(size=shape[-1]) / 2).astype("f4")
        for _ in range(STEPS)
    ]


def jbn_step(momentum, **kwargs):
    """One training step of jbn, and the parameters that it starts from."""

    @jax.jit
    def step(x, stats, momentum=momentum):
        params, _ = jbn.init(x.shape[kwargs.get("axis", -1)])
        return jbn.batch_norm(
            x, params, stats, use_running_average=False, momentum=momentum, **kwargs
        )

    return step


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_flax_trajectory(rng, momentum):
    nn = pytest.importorskip("flax.linen")
    peer = nn.BatchNorm(
        use_running_average=False, momentum=momentum, use_fast_variance=False
    )
    xs = inputs(rng)
    variables = peer.init(jax.random.key(0), xs[0])
    peer_step = jax.jit(lambda v, x: peer.apply(v, x, mutable=["batch_stats"]))
    _, stats = jbn.init(3)
    step = jbn_step(momentum)
    for x in xs:
        expected, updates = peer_step(variables, x)
        variables = {**variables, **updates}
        y, stats = step(x, stats)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        theirs = variables["batch_stats"]
        assert_stats(stats, theirs["mean"], theirs["var"])


@pytest.mark.peers("torch")
@pytest.mark.parametrize(
    ("momentum", "shape", "axis"),
    [
        (0.1, (16, 3), -1),
        (0.1, (4, 3, 5, 5), 1),
        (0.3, (16, 3), -1),
        (None, (16, 3), -1),
    ],
    ids=str,
)
def test_torch_trajectory(rng, momentum, shape, axis):
    torch = load_peer("torch")
    kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
    peer = kind(3, momentum=momentum)
    _, stats = jbn.init(3)
    step = jbn_step(
        None if momentum is None else 1 - momentum, unbiased=True, axis=axis
    )
    for t, x in enumerate(inputs(rng, shape), start=1):
        expected = peer(torch.from_numpy(x)).detach().numpy()
        # Their None gives every batch the same weight; ours every row.
        now = {"momentum": (t - 1) / t} if momentum is None else {}
        y, stats = step(x, stats, **now)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert_stats(stats, peer.running_mean.numpy(), peer.running_var.numpy())


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("shape", "axis"), [((16, 3), -1), ((4, 5, 5, 3), -1), ((4, 3, 5), 1)], ids=str
)
def test_keras_trajectory(rng, keras, shape, axis):
    peer = keras.layers.BatchNormalization(axis=axis)
    _, stats = jbn.init(3)
    # Keras' defaults: momentum 0.99 as here, epsilon 1e-3, biased.
    step = jbn_step(0.99, epsilon=1e-3, axis=axis)
    for x in inputs(rng, shape):
        expected = peer(x, training=True)
        y, stats = step(x, stats)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        assert_stats(stats, peer.moving_mean.value, peer.moving_variance.value)
    assert peer.epsilon == 1e-3


class ExponentialMovingAverage:
    """Haiku's, with zero_debias, in float64: its formula, written again."""

    def __init__(self, decay):
        self.decay, self.hidden, self.counter = decay, 0.0, 0

    def __call__(self, value):
        self.counter += 1
        self.hidden = self.hidden * self.decay + value * (1 - self.decay)
        return self.hidden / (1 - self.decay**self.counter)


@pytest.mark.parametrize("decay_rate", [0.9, 0.99])
def test_haiku_trajectory(rng, decay_rate):
    mean_ema, var_ema = (ExponentialMovingAverage(decay_rate) for _ in range(2))
    _, stats = jbn.init(3, track_weight=True)
    step = jbn_step(decay_rate)
    for t, x in enumerate(inputs(rng), start=1):
        _, mean, var = oracle.moments(x)
        _, stats = step(x, stats)
        assert_stats(stats, mean_ema(mean), var_ema(var), 1 - decay_rate**t)


@pytest.mark.peers("haiku")
@pytest.mark.usefixtures("standard_promotion")
def test_haiku_itself(rng):
    hk = load_peer("haiku")
    peer = hk.without_apply_rng(
        hk.transform_with_state(
            lambda x: hk.BatchNorm(True, True, decay_rate=0.9)(x, is_training=True)
        )
    )
    xs = inputs(rng)
    params, state = peer.init(jax.random.key(0), xs[0])
    _, stats = jbn.init(3, track_weight=True)
    step = jbn_step(0.9)
    for x in xs:
        _, state = peer.apply(params, state, x)
        _, stats = step(x, stats)
        mean, var = (
            state[f"batch_norm/~/{name}_ema"]["average"][0] for name in ("mean", "var")
        )
        # Their one-pass variance.
        assert_stats(stats, mean, var, stats.weight, rtol=1e-5, atol=1e-5)
