"""What goes wrong in other libraries, and must not here.

Flax itself is run beside, so that each test shows what it guards against. When one of
those assertions fails, Flax has mended its ways: drop it, and keep ours.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn
from jbn import BatchStats


nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")

pytestmark = pytest.mark.usefixtures("standard_promotion")


def flax(x, mask=None, **kwargs):
    """Output and statistics of a training step of Flax's, with momentum 0."""
    peer = nn.BatchNorm(use_running_average=False, momentum=0.0, **kwargs)
    _, stats = jbn.init(x.shape[-1])
    variables = {
        "params": jbn.init(x.shape[-1])[0]._asdict(),
        "batch_stats": {"mean": stats.mean, "var": stats.var},
    }
    y, updates = peer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    return y, updates["batch_stats"]


def ours(x, stats=None, **kwargs) -> Any:
    """Output and statistics of a training step of ours, with momentum 0."""
    if stats is None:
        _, stats = jbn.init(x.shape[-1])
    return jbn.batch_norm(
        x, None, stats, use_running_average=False, momentum=0.0, **kwargs
    )


# https://github.com/patrick-kidger/equinox/issues/955: since then the variance
# starts at 1, and is debiased as if it started at 0: too large by m^t / (1 - m^t).
@pytest.mark.parametrize(("steps", "theirs"), [(1, 99.28), (10, 9.74), (100, 0.857)])
def test_equinox_debiases_a_variance_that_started_at_one(steps, theirs):
    batch = jbn.moments(jnp.asarray([[-1.0], [1.0]]) * np.float32(np.sqrt(0.28)))
    _, stats = jbn.init(1, track_weight=True)
    update = jax.jit(lambda stats: jbn.update_batch_stats(stats, batch, momentum=0.99))
    hidden = 1.0
    for _ in range(steps):
        stats = update(stats)
        hidden = 0.99 * hidden + 0.01 * 0.28
    np.testing.assert_allclose(stats.var, [0.28], rtol=1e-5)
    np.testing.assert_allclose(hidden / (1 - 0.99**steps), theirs, rtol=1e-3)


# flax 0.12.8: an empty batch or mask leaves NaN in the state, forever.
@pytest.mark.parametrize("empty", ["batch", "mask"])
def test_flax_is_poisoned_by_an_empty_batch(rng, empty):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    mask = None
    if empty == "mask":
        mask = np.zeros((4, 1), bool)
    else:
        x = x[:0]
    _, theirs = flax(x, mask)
    assert np.isnan(theirs["mean"]).all()

    stats = BatchStats(jnp.full(3, 2.0), jnp.full(3, 4.0))
    y, same = ours(x, stats, mask=mask)
    np.testing.assert_allclose(y, oracle.normalize(x, stats.mean, stats.var), rtol=1e-6)
    np.testing.assert_array_equal(same.mean, stats.mean)
    np.testing.assert_array_equal(same.var, stats.var)


def sharded(function, x, mask):
    """`function` of shards of `x`, as every device of an axis named "i" sees it."""
    return jax.jit(jax.vmap(function, axis_name="i"))(x, mask)


# flax 0.12.8: one empty shard makes every shard NaN.
def test_flax_is_poisoned_by_one_empty_shard(rng):
    x = rng.normal(size=(4, 5, 3)).astype(np.float32)
    mask = np.arange(5)[None, :, None] < np.asarray([5, 3, 1, 0])[:, None, None]
    y, theirs = sharded(lambda x, m: flax(x, m, axis_name="i"), x, mask)
    assert np.isnan(y).all()
    assert np.isnan(theirs["mean"]).all()

    y, stats = sharded(lambda x, m: ours(x, mask=m, axis_name="i"), x, mask)
    _, mean, var = oracle.moments(x, mask)
    np.testing.assert_allclose(y, oracle.normalize(x, mean, var), rtol=1e-5, atol=1e-5)
    for k in range(4):
        np.testing.assert_allclose(stats.mean[k], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.var[k], var, rtol=1e-5)


# https://github.com/google/flax/issues/2417: the mean of the shards' means.
def test_flax_averages_the_averages_of_uneven_shards():
    count = np.asarray([5, 5, 1, 1])
    mask = np.arange(5)[None, :, None] < count[:, None, None]
    x = np.broadcast_to(np.arange(4.0, dtype=np.float32)[:, None, None], (4, 5, 1))
    true_mean = (count * np.arange(4)).sum() / count.sum()
    _, theirs = sharded(lambda x, m: flax(x, m, axis_name="i"), x, mask)
    np.testing.assert_allclose(theirs["mean"], np.full((4, 1), 1.5))

    true_var = (count * (np.arange(4) - true_mean) ** 2).sum() / count.sum()
    _, stats = sharded(lambda x, m: ours(x, mask=m, axis_name="i"), x, mask)
    np.testing.assert_allclose(stats.mean, np.full((4, 1), true_mean), rtol=1e-6)
    np.testing.assert_allclose(stats.var, np.full((4, 1), true_var), rtol=1e-6)
    merged = jbn.merge(*(jbn.moments(x[k], mask=mask[k]) for k in range(4)))
    np.testing.assert_allclose(merged.mean, [true_mean], rtol=1e-6)
    np.testing.assert_allclose(merged.var, [true_var], rtol=1e-6)


# flax 0.12.8: NaN in padding leaves the statistics clean and makes gradients NaN.
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=str)
def test_flax_lets_padding_into_the_gradient(rng, poison):
    x = rng.normal(size=(6, 3)).astype(np.float32)
    x[4:] = poison
    mask = np.arange(6)[:, None] < 4
    dy = rng.normal(size=(6, 3)).astype(np.float32)
    scale = rng.uniform(0.5, 2, 3).astype(np.float32)

    def their_loss(x, scale):
        peer = nn.BatchNorm(use_running_average=False)
        variables = peer.init(jax.random.key(0), jnp.ones((6, 3)))
        variables["params"]["scale"] = scale
        y, _ = peer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return jnp.where(mask, dy * y, 0).sum()

    dx, dscale = jax.jit(jax.grad(their_loss, argnums=(0, 1)))(x, scale)
    assert np.isnan(dx[:4]).any()
    assert np.isnan(dscale).any()

    def loss(x, scale):
        params, stats = jbn.init(3)
        y, _ = jbn.batch_norm(
            x,
            params._replace(scale=scale),
            stats,
            use_running_average=False,
            mask=mask,
        )
        return jnp.where(mask, dy * y, 0).sum()

    dx, dscale = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, scale)
    expected, expected_dscale, _ = oracle.input_gradient(x[:4], dy[:4], scale)
    np.testing.assert_allclose(dx[:4], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dx[4:], np.zeros((2, 3)))
    np.testing.assert_allclose(dscale, expected_dscale, rtol=1e-5, atol=1e-5)


# flax 0.12.8: a (B, L) mask of (B, L, C) is broadcast to the wrong axis if L == C.
@pytest.mark.usefixtures("untyped")
def test_flax_takes_a_mask_for_the_wrong_axis(rng):
    x = rng.normal(size=(3, 3, 3)).astype(np.float32)
    mask = np.tile([True, True, False], (3, 1))
    _, theirs = flax(x, mask)
    assert np.isnan(theirs["mean"][2])  # no third position, not no third feature
    with pytest.raises(ValueError, match=r"give it the shape \(3, 3, 1\)"):
        ours(x, mask=mask)
    _, stats = ours(x, mask=mask[..., None])
    np.testing.assert_allclose(stats.mean, x[:, :2].mean((0, 1)), rtol=1e-5, atol=1e-6)


# https://github.com/google/flax/commit/3a630ff0: evaluation rounds x, mean and variance
# to `dtype` before it subtracts.
@pytest.mark.parametrize(
    ("x", "dtype", "expected"),
    [(1001.7, jnp.float32, 1.0), (1000.0, jnp.bfloat16, -0.70)],
)
def test_flax_rounds_before_it_subtracts(x, dtype, expected):
    peer = nnx.BatchNorm(
        1, use_running_average=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    assert peer.mean is not None
    peer.mean[...] = jnp.full(1, 1000.7)
    assert float(peer(jnp.full((1, 1), x, dtype))[0, 0]) == 0.0

    stats = BatchStats(jnp.full(1, 1000.7, jnp.float32), jnp.ones(1))
    y, _ = jbn.batch_norm(
        jnp.full((1, 1), x, dtype),
        None,
        stats,
        use_running_average=True,
        dtype=jnp.bfloat16,
    )
    np.testing.assert_allclose(float(y[0, 0]), expected, rtol=2**-8)


# https://github.com/google/flax/issues/1491: E[x**2] - E[x]**2 is negative. Clamped to
# zero, as it is now, it makes an output 320 times too large.
def test_flax_loses_the_variance_to_a_large_mean(rng):
    x = (rng.normal(size=(4096, 1)) + 1e4).astype(np.float32)
    _, mean, var = oracle.moments(x)
    y, theirs = flax(x)
    assert abs(theirs["var"] / var - 1) > 0.5
    assert abs(np.std(y) - 1) > 0.5

    y, stats = ours(x)
    np.testing.assert_allclose(stats.var, var, rtol=1e-5)
    np.testing.assert_allclose(y, oracle.normalize(x, mean, var), atol=2e-3)


# https://github.com/google-deepmind/dm-haiku/issues/396: statistics and state in the
# dtype of the input; in float16 a mean of 600 has the square of infinity.
@pytest.mark.parametrize(
    ("dtype", "mean"), [(jnp.float16, 600.0), (jnp.bfloat16, 3.0), (jnp.float32, 100.3)]
)
def test_haiku_keeps_statistics_in_the_dtype_of_the_input(rng, dtype, mean):
    x = jnp.asarray(rng.normal(size=(1024, 2)) * [1, 0] + mean, dtype)
    _, stats = jbn.init(2)
    y, new = ours(x, stats)
    assert y.dtype == dtype
    assert new.mean.dtype == new.var.dtype == jnp.float32
    seen = np.asarray(x).astype(np.float64)
    _, true_mean, true_var = oracle.moments(seen)
    np.testing.assert_allclose(new.mean, true_mean, rtol=1e-6)
    # The second feature is constant, where one pass gives a negative variance.
    np.testing.assert_allclose(new.var, true_var, rtol=1e-5, atol=1e-9)
    eps = float(jnp.finfo(dtype).eps)
    expected = oracle.normalize(seen, true_mean, true_var)[:, 0]
    y = np.asarray(y).astype(np.float64)[:, 0]
    np.testing.assert_allclose(y, expected, rtol=eps, atol=1e-4)


# keras 3.15.1 fails on a mask where there is one feature, or where features come first;
# before https://github.com/keras-team/keras/issues/19848 it miscounted images.
@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 5, 1), -1), ((4, 3, 5), 1), ((4, 5, 3), -1)], ids=str
)
def test_keras_takes_masks_of_some_shapes_only(rng, shape, axis):
    x = rng.normal(size=shape).astype(np.float32) + 2
    features = shape[axis]
    mask = rng.random([n for a, n in enumerate(shape) if a != axis % 3]) < 0.6
    mask[0] = True
    stats = BatchStats(jnp.full(features, 2.0), jnp.full(features, 4.0))
    y, _ = ours(x, stats, mask=mask, axis=axis)
    full = np.expand_dims(mask, axis)
    _, mean, var = oracle.moments(x, full, axis)
    expected = oracle.normalize(x, mean, var, axis=axis)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    _, same = ours(x, stats, mask=np.zeros_like(mask), axis=axis)
    np.testing.assert_array_equal(same.mean, stats.mean)
    np.testing.assert_array_equal(same.var, stats.var)


# keras 3.15.1: nothing counts as a batch of mean 0 and variance 0.
def test_keras_decays_its_state_on_an_empty_mask(rng, keras):
    x = rng.normal(size=(4, 5, 3)).astype(np.float32)
    peer = keras.layers.BatchNormalization(momentum=0.5)
    peer(x, training=True, mask=np.zeros((4, 5), bool))
    np.testing.assert_allclose(peer.moving_variance.value, np.full(3, 0.5))
    _, stats = ours(x, mask=np.zeros((4, 5, 1), bool))
    np.testing.assert_array_equal(stats.var, np.ones(3))


# https://github.com/pytorch/pytorch/pull/37198: an empty rank of half precision.
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_torch_empty_ranks_send_another_dtype(rng, dtype):
    x = jnp.asarray(rng.normal(size=(2, 4, 3)) + 1, dtype)
    mask = np.asarray([True, False])[:, None, None] & np.ones((2, 4, 1), bool)
    y, stats = sharded(lambda x, m: ours(x, mask=m, axis_name="i"), x, mask)
    assert y.dtype == dtype
    _, mean, var = oracle.moments(np.asarray(x[0]).astype(np.float64))
    for k in range(2):
        np.testing.assert_allclose(stats.mean[k], mean, rtol=1e-6)
        np.testing.assert_allclose(stats.var[k], var, rtol=1e-6)


# torch_geometric's HeteroBatchNorm takes statistics without a gradient.
def test_pyg_has_no_gradient_through_the_statistics(rng):
    x, dy = rng.normal(size=(2, 6, 3)).astype(np.float32)

    def loss(x):
        return (dy * ours(x)[0]).sum()

    expected, _, _ = oracle.input_gradient(x, dy, np.ones(3))
    np.testing.assert_allclose(jax.grad(loss)(x), expected, rtol=1e-5, atol=1e-5)


def saved_bytes(function, *args):
    """Bytes that a backward pass keeps, each buffer counted once."""
    _, backward = jax.vjp(function, *args)
    kept = {
        leaf.unsafe_buffer_pointer(): leaf.nbytes
        for leaf in jax.tree.leaves(backward)
        if isinstance(leaf, jax.Array)
    }
    return sum(kept.values())


# flax 0.12.8 keeps two float32 activations for each bfloat16 one: 4 times the bytes.
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_flax_keeps_float32_activations_for_the_backward_pass(rng, dtype, masked):
    x = jnp.asarray(rng.normal(size=(64, 16, 32)), dtype)
    params, stats = jbn.init(32)
    mask = jnp.asarray(rng.random((64, 16, 1)) < 0.7) if masked else None

    def run(x, params):
        y, _ = jbn.batch_norm(
            x, params, stats, use_running_average=False, mask=mask, epsilon=1e-3
        )
        return y

    peer = nn.BatchNorm(use_running_average=False, dtype=dtype)
    variables = peer.init(jax.random.key(0), x)

    def their_run(x, params):
        variables_ = {**variables, "params": params}
        return peer.apply(variables_, x, mask=mask, mutable=["batch_stats"])[0]

    kept = saved_bytes(run, x, params)
    per_feature = 16 * 4 * 32  # sixteen float32 vectors are plenty
    masks = mask.nbytes if mask is not None else 0
    assert x.nbytes <= kept <= x.nbytes + masks + per_feature
    if dtype == jnp.bfloat16:
        assert saved_bytes(their_run, x, variables["params"]) > 3 * x.nbytes


# Batch norms that are written as a `jax.custom_vjp` have no forward mode.
def test_a_custom_vjp_would_forbid_forward_mode(rng):
    x, dx = rng.normal(size=(2, 6, 3)).astype(np.float32)
    _, dy = jax.jvp(lambda x: ours(x)[0], (x,), (dx,))
    eps = 1e-6
    wide, step = x.astype(np.float64), dx.astype(np.float64)
    expected = (
        oracle.batch_norm(wide + eps * step) - oracle.batch_norm(wide - eps * step)
    ) / (2 * eps)
    np.testing.assert_allclose(dy, expected, rtol=1e-4, atol=1e-5)
