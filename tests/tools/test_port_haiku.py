"""Weights from and to Haiku: a layer, and a model that it has trained."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from peers import needs

import jbn
import jbn.linen
import jbn.nnx
from jbn.tools import from_haiku, to_haiku


hk: Any = pytest.importorskip("haiku", reason=needs("haiku"))
pytestmark = [
    pytest.mark.sweep,
    pytest.mark.peers("haiku"),
    pytest.mark.usefixtures("standard_promotion"),
]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
OPTIONS: dict[str, Any] = {"momentum": 0.8, "debias": True}
NAMES = {"": "batch_norm"}


def layer(**options):
    """Haiku's batch norm; applied to `(params, state, x, is_training)`."""
    options = {"create_scale": True, "create_offset": True, **options}
    return hk.without_apply_rng(
        hk.transform_with_state(
            lambda x, is_training: hk.BatchNorm(decay_rate=0.8, **options)(
                x, is_training
            )
        )
    )


def trained_layer(rng, steps=3, shape=(8, 3), **options):
    """A layer, parameters and state after some steps, and one more batch."""
    peer = layer(**options)
    xs = (rng.normal(size=(steps + 1, *shape)) * 2 + 1).astype(np.float32)
    params, state = peer.init(jax.random.key(0), xs[0], True)
    params = jax.tree.map(lambda v: jnp.asarray(rng.normal(size=v.shape), "f4"), params)
    apply = jax.jit(peer.apply, static_argnums=3)
    for x in xs[:steps]:
        _, state = apply(params, state, x, True)
    return apply, params, state, xs[steps]


def average(state, name):
    return state[f"batch_norm/~/{name}_ema"]["average"].ravel()


@pytest.mark.parametrize("shape", [(8, 3), (4, 5, 5, 3), (8, 1)], ids=str)
def test_layer(rng, shape):
    apply, params, state, x = trained_layer(rng, shape=shape)
    target = jbn.init(shape[-1], track_weight=True)
    options = {"decay_rate": 0.8, "names": NAMES}
    ours, stats = from_haiku((params, state), target, norm=OPTIONS, **options)
    np.testing.assert_allclose(stats.weight, 1 - 0.8**3, rtol=1e-6)
    np.testing.assert_array_equal(stats.mean, average(state, "mean"))
    y, _ = jbn.batch_norm(x, ours, stats, use_running_average=True)
    np.testing.assert_allclose(y, apply(params, state, x, False)[0], **CLOSE)

    # Back: the same, and the same one step later. Theirs, from ours.
    back = to_haiku((ours, stats), (params, state), norm=OPTIONS, **options)
    assert jax.tree.structure(back) == jax.tree.structure((params, state))

    def close(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-6)

    jax.tree.map(close, back, (params, state))
    step = jbn.batch_norm(x, ours, stats, use_running_average=False, momentum=0.8)
    expected, later = apply(params, state, x, True)
    _, from_ours = apply(*back, x, True)
    np.testing.assert_allclose(step[0], expected, **CLOSE)
    for name in ("mean", "var"):
        new = getattr(step[1], name)
        np.testing.assert_allclose(new, average(later, name), **CLOSE)
        np.testing.assert_allclose(new, average(from_ours, name), **CLOSE)


@pytest.mark.parametrize("steps", [0, 1, 30, 300])
def test_any_number_of_updates(rng, steps):
    _, params, state, _ = trained_layer(rng, steps=steps)
    if steps == 0:
        # Not yet called: Haiku's `init` counts no update.
        np.testing.assert_array_equal(state["batch_norm/~/mean_ema"]["counter"], 0)
    target = jbn.init(3, track_weight=True)
    call: dict[str, Any] = {"decay_rate": 0.8, "names": NAMES}
    params, stats = from_haiku((params, state), target, **call)
    np.testing.assert_allclose(stats.weight, 1 - 0.8**steps, rtol=1e-6)
    zeros = layer().init(jax.random.key(0), np.zeros((8, 3), np.float32), True)
    _, back = to_haiku((params, stats), zeros, **call)
    for name in ("mean_ema", "var_ema"):
        ours, theirs = (s[f"batch_norm/~/{name}"] for s in (back, state))
        np.testing.assert_allclose(ours["hidden"], theirs["hidden"], rtol=1e-6)
        np.testing.assert_array_equal(ours["average"], theirs["average"])
        # From where 1 - 0.8**n is 1 in float32, n is as good as any.
        n = int(ours["counter"])
        assert n == steps if steps <= 30 else n >= 75


def test_a_plain_average_arrives_as_one_that_has_settled(rng):
    _, params, state, x = trained_layer(rng)
    call: dict[str, Any] = {"decay_rate": 0.8, "names": NAMES}
    ours, stats = from_haiku((params, state), jbn.init(3), **call)
    _, stats = jbn.batch_norm(x, ours, stats, use_running_average=False, momentum=0.8)
    params, state = to_haiku((ours, stats), (params, state), **call)
    _, later = jax.jit(layer().apply, static_argnums=3)(params, state, x, True)
    _, stats = jbn.batch_norm(x, ours, stats, use_running_average=False, momentum=0.8)
    np.testing.assert_allclose(stats.mean, average(later, "mean"), **CLOSE)
    np.testing.assert_allclose(stats.var, average(later, "var"), **CLOSE)


@pytest.mark.parametrize("decay_rate", [0.0, 0.5])
def test_extreme_weights(decay_rate):
    zeros = layer().init(jax.random.key(0), np.zeros((8, 3), np.float32), True)
    call: dict[str, Any] = {"decay_rate": decay_rate, "names": NAMES}
    params, stats = jbn.init(3, track_weight=True)
    stats = stats._replace(mean=stats.mean + 5)
    for weight, hidden in ((0.0, 0.0), (1.0, 5.0)):
        stats = stats._replace(weight=jnp.full(3, weight))
        _, state = to_haiku((params, stats), zeros, **call)
        ema = state["batch_norm/~/mean_ema"]
        np.testing.assert_allclose(ema["hidden"], np.full((1, 3), hidden), rtol=1e-6)
        assert (ema["counter"] > 0) == (weight > 0)


class Block(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(
            6, (3, 3), strides=2, feature_group_count=2, use_bias=False, name="conv"
        )(x)
        return nn.relu(self.norm(name="norm")(x, use_running_average=not train))


class Model(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        norm = self.norm(name="norm", use_scale=False)
        x = nn.relu(norm(x, use_running_average=not train))
        x = Block(self.norm, name="block")(x, train).mean((1, 2))
        return nn.Dense(5, name="head")(nn.LayerNorm(name="ln")(x))


class HaikuBlock(hk.Module):
    def __call__(self, x, train):
        x = hk.Conv2D(6, 3, stride=2, with_bias=False, feature_group_count=2)(x)
        return jax.nn.relu(hk.BatchNorm(True, True, 0.8)(x, train))


def haiku_model(x, train):
    x = hk.Conv2D(4, 3, name="conv")(x)
    x = jax.nn.relu(hk.BatchNorm(False, True, 0.8, name="norm")(x, train))
    x = HaikuBlock(name="block")(x, train).mean((1, 2))
    return hk.Linear(5, name="head")(
        hk.LayerNorm(-1, True, True, eps=1e-6, name="ln")(x)
    )


def test_model(rng):
    xs = rng.normal(size=(4, 8, 8, 8, 3)).astype(np.float32)
    peer = hk.without_apply_rng(hk.transform_with_state(haiku_model))
    params, state = peer.init(jax.random.key(0), xs[0], True)

    @jax.jit
    def train(params, state, x):
        def loss(params):
            y, new = peer.apply(params, state, x, True)
            return jnp.square(y - 1).mean(), new

        grads, state_ = jax.grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state_

    for x in xs[:3]:
        params, state = train(params, state, x)

    norm = partial(jbn.linen.BatchNorm, **OPTIONS)
    model = Model(norm)
    x = xs[3]
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    names = {"block/conv": "block/conv2_d", "block/norm": "block/batch_norm"}
    call: dict[str, Any] = {"decay_rate": 0.8, "names": names, "norm": norm}
    variables = from_haiku((params, state), shapes, **call)
    infer = jax.jit(partial(model.apply, train=False))
    apply = jax.jit(peer.apply, static_argnums=3)
    np.testing.assert_allclose(
        infer(variables, x), apply(params, state, x, False)[0], **CLOSE
    )
    step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    y, updated = step(variables, x)
    expected, later = apply(params, state, x, True)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    theirs = from_haiku((params, later), shapes, **call)["batch_stats"]
    close = partial(np.testing.assert_allclose, **CLOSE)
    jax.tree.map(close, updated["batch_stats"], theirs)

    fresh = peer.init(jax.random.key(1), x, True)
    back = to_haiku(variables, fresh, **call)
    jax.tree.map(close, back, (params, state))

    call["norm"] = partial(jbn.linen.BatchNorm, momentum=0.8)
    with pytest.warns(UserWarning, match="'block/batch_norm' and 1 more needs `deb"):
        from_haiku((params, state), shapes, **call)


def test_nnx(rng):
    _, params, state, _ = trained_layer(rng)
    call: dict[str, Any] = {"decay_rate": 0.8, "names": NAMES}
    module = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **OPTIONS)
    ported = from_haiku((params, state), module, **call)
    np.testing.assert_array_equal(module.weight[...], 0)
    np.testing.assert_allclose(ported.weight[...], 1 - 0.8**3, rtol=1e-6)
    np.testing.assert_array_equal(ported.mean[...], average(state, "mean"))
    back = to_haiku(ported, (params, state), **call)
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, back, (params, state))
    with pytest.warns(UserWarning, match="needs `momentum=0.8, debias=True`"):
        from_haiku((params, state), jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), **call)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("offset", [False, True])
def test_layer_without_affine(rng, scale, offset):
    made = {"create_scale": scale, "create_offset": offset}
    apply, params, state, x = trained_layer(rng, **made)
    target = jbn.init(3, use_scale=scale, use_bias=offset)
    call: dict[str, Any] = {"decay_rate": 0.8, "names": NAMES}
    ours, stats = from_haiku((params, state), target, **call)
    y, _ = jbn.batch_norm(x, ours, stats, use_running_average=True)
    np.testing.assert_allclose(y, apply(params, state, x, False)[0], **CLOSE)
    back, _ = to_haiku((ours, stats), (params, state), **call)
    jax.tree.map(np.testing.assert_array_equal, back, dict(params))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"momentum": 0.9}, "statistics will differ"),
        ({"debias": False}, "needs `debias=True`"),
        ({"unbiased": True}, "needs `unbiased=False`"),
        ({"epsilon": 1e-3}, "outputs will differ"),
    ],
    ids=str,
)
def test_other_conventions_warn(rng, change, found):
    _, params, state, _ = trained_layer(rng)
    norm = {**OPTIONS, **change}
    call: dict[str, Any] = {"decay_rate": 0.8, "names": NAMES, "norm": norm}
    target = jbn.init(3, track_weight=True)
    with pytest.warns(UserWarning, match=found):
        from_haiku((params, state), target, **call)
    with pytest.warns(UserWarning, match=found):
        to_haiku(target, (params, state), **call)
    # Their eps is not in their state.
    if "epsilon" in change:
        from_haiku((params, state), target, epsilon=1e-3, **call)


def test_errors_name_what_is_wrong_and_change_nothing(rng):
    _, params, state, _ = trained_layer(rng)
    kept = jax.tree.map(np.array, (params, state))
    call: dict[str, Any] = {"decay_rate": 0.8, "names": NAMES}
    wide = jbn.init(4)
    shapes = r"'batch_norm/scale' has \(1, 3\), and our 'scale' has \(4,\)"
    missing = r"Not there: 'x/~/mean_ema/average' \(our 'mean'\).*Not used: 'batch_norm"
    nothing = {"batch_stats": {"mean": np.zeros(3), "var": np.ones(3)}}
    for target, names, message in (
        (wide, NAMES, shapes),
        (nothing, {"": "x"}, missing),
    ):
        call["names"] = names
        with pytest.raises(ValueError, match=message):
            from_haiku((params, state), target, **call)
        with pytest.raises(ValueError, match=message):
            to_haiku(target, (params, state), **call)
    jax.tree.map(np.testing.assert_array_equal, (dict(params), dict(state)), kept)
    jax.tree.map(np.testing.assert_array_equal, wide, jbn.init(4))


@pytest.mark.usefixtures("untyped")
def test_wrong_types():
    with pytest.raises(TypeError, match="tuple of parameters and state"):
        from_haiku({}, jbn.init(3), decay_rate=0.9)  # pyright: ignore[reportArgumentType]
