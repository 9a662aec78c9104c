"""Weights from and to Keras 3: layers, and models that it has trained."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.tools import from_keras, keras_options, to_keras


pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("standard_promotion")]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
# Of our layers in the models below, in Keras' models.
NAMES = {"block/norm": "block/bn", "norm": "bn"}


def norm_layer(keras, rng, features=3, **options):
    """A layer that has seen some batches, with other than initial parameters."""
    layer = keras.layers.BatchNormalization(**options)
    xs = (rng.normal(size=(4, 8, features)) * 2 + 1).astype(np.float32)
    for x in xs[:3]:
        layer(x, training=True)
    learned = [rng.normal(size=w.shape) for w in layer.trainable_weights]
    layer.set_weights([*learned, *layer.get_weights()[len(learned) :]])
    return layer, xs[3]


@pytest.mark.parametrize("options", [{}, {"momentum": 0.7, "epsilon": 0.1}], ids=str)
def test_layer(rng, keras, options):
    peer, x = norm_layer(keras, rng, **options)
    options = keras_options(peer)
    target = jbn.init(3)
    params, stats = from_keras(peer, target, norm=options)
    for given in (peer.get_weights(), tuple(peer.get_weights())):
        same = from_keras(given, target)
        jax.tree.map(np.testing.assert_array_equal, same, (params, stats))

    infer = partial(jbn.batch_norm, use_running_average=True, **options)
    expected = peer(x, training=False)
    np.testing.assert_allclose(infer(x, params, stats)[0], expected, **CLOSE)
    weights = peer.get_weights()
    for a, b in zip(to_keras((params, stats), peer), weights, strict=True):
        np.testing.assert_array_equal(a, b)

    # One more step, here and there.
    y, new = jbn.batch_norm(x, params, stats, use_running_average=False, **options)
    np.testing.assert_allclose(y, peer(x, training=True), **CLOSE)
    np.testing.assert_allclose(new.mean, peer.moving_mean.numpy(), **CLOSE)
    np.testing.assert_allclose(new.var, peer.moving_variance.numpy(), **CLOSE)
    np.testing.assert_array_equal(stats.mean, weights[2])

    module = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    ported = from_keras(peer, module)
    np.testing.assert_array_equal(module.mean[...], 0)
    y = ported(x, use_running_average=True)
    np.testing.assert_allclose(y, peer(x, training=False), **CLOSE)
    fresh = keras.layers.BatchNormalization()
    fresh.build((None, 3))
    fresh.set_weights(to_keras(from_keras(peer, target), fresh))
    for a, b in zip(fresh.get_weights(), peer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_layer_without_scale_or_center(rng, keras, scale, center):
    peer, x = norm_layer(keras, rng, scale=scale, center=center)
    layer = jbn.linen.BatchNorm(
        use_running_average=True,
        use_scale=scale,
        use_bias=center,
        **keras_options(peer),
    )
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x))
    expected = peer(x, training=False)
    for source in (peer, peer.get_weights()):
        variables = from_keras(source, shapes, norm=layer)
        np.testing.assert_allclose(layer.apply(variables, x), expected, **CLOSE)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for target in (peer, peer.get_weights()):
            back = to_keras(variables, target, norm=layer)
            for a, b in zip(back, peer.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)
    other = jbn.init(3, use_scale=not scale, use_bias=center)
    with pytest.raises(ValueError, match="Not there" if not scale else "Not used"):
        from_keras(peer, other)
    with pytest.raises(ValueError, match=r"takes a list of weights for those of one"):
        from_keras(peer.get_weights(), other)


def test_a_debiased_average_goes_on_as_a_plain_one(rng, keras):
    peer, x = norm_layer(keras, rng)
    params, stats = from_keras(peer, jbn.init(3, track_weight=True))
    options = keras_options(peer)
    _, stats = jbn.batch_norm(x, params, stats, use_running_average=False, **options)
    peer(x, training=True)
    np.testing.assert_allclose(stats.mean, peer.moving_mean.numpy(), **CLOSE)
    np.testing.assert_allclose(stats.var, peer.moving_variance.numpy(), **CLOSE)


class Block(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        kernel = (3, 3)
        conv = nn.Conv(6, kernel, strides=2, feature_group_count=2, name="conv")
        return nn.relu(self.norm(name="norm")(conv(x), use_running_average=not train))


class Model(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        x = nn.relu(self.norm(name="norm")(x, use_running_average=not train))
        x = Block(self.norm, name="block")(x, train)
        x = nn.ConvTranspose(
            3, (3, 2), strides=(2, 2), transpose_kernel=True, name="up"
        )(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


def keras_model(keras, kind):
    """The same model, as a functional one with one inside, or as classes."""
    layers = keras.layers
    conv = lambda: layers.Conv2D(4, 3, padding="same", name="conv")
    grouped = lambda: layers.Conv2D(
        6, 3, strides=2, padding="same", groups=2, name="conv"
    )
    norm = lambda: layers.BatchNormalization(momentum=0.8, name="bn")
    up = lambda: layers.Conv2DTranspose(3, (3, 2), strides=2, padding="same", name="up")
    pool, head = layers.GlobalAveragePooling2D, lambda: layers.Dense(5, name="head")
    relu = lambda: layers.Activation("relu")
    if kind == "functional":
        inner = keras.Sequential([grouped(), norm(), relu()], name="block")
        x = inputs = keras.Input((8, 8, 3))
        for layer in (conv(), norm(), relu(), inner, up(), pool(), head()):
            x = layer(x)
        return keras.Model(inputs, x)

    class Block(layers.Layer):
        def __init__(self, name):
            super().__init__(name=name)
            self.parts = [grouped(), norm()]

        def call(self, x, training=False):
            conv, norm = self.parts
            return keras.ops.relu(norm(conv(x), training=training))

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.block = conv(), norm(), Block("block")
            self.up, self.pool, self.head = up(), pool(), head()

        def call(self, x, training=False):
            x = keras.ops.relu(self.norm(self.conv(x), training=training))
            x = self.up(self.block(x, training=training))
            return self.head(self.pool(x))

    return Model()


@pytest.fixture(params=["functional", "classes"])
def peer(request, keras, rng):
    """A trained model."""
    keras.utils.set_random_seed(0)
    model = keras_model(keras, request.param)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    for _ in range(3):
        x = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
        model.train_on_batch(x, rng.normal(size=(8, 5)).astype(np.float32))
    return model


def test_model(rng, peer):
    x = rng.normal(size=(8, 8, 8, 3)).astype(np.float32)
    (bn, *_) = (v for v in peer._flatten_layers() if hasattr(v, "moving_mean"))
    norm = partial(jbn.linen.BatchNorm, **keras_options(bn))
    model = Model(norm)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables = from_keras(peer, shapes, names=NAMES, norm=norm)
    infer = jax.jit(partial(model.apply, train=False))
    np.testing.assert_allclose(infer(variables, x), peer(x, training=False), **CLOSE)

    kept = peer.get_weights()
    back = to_keras(variables, peer, names=NAMES, norm=norm)
    for a, b in zip(back, kept, strict=True):
        np.testing.assert_array_equal(a, b)
    peer.set_weights([w * 2 for w in kept])
    peer.set_weights(back)
    np.testing.assert_allclose(infer(variables, x), peer(x, training=False), **CLOSE)

    expected = peer(x, training=True)
    step = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    logits, updated = step(variables, x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    theirs = from_keras(peer, shapes, names=NAMES)["batch_stats"]
    close = partial(np.testing.assert_allclose, **CLOSE)
    jax.tree.map(close, updated["batch_stats"], theirs)

    with pytest.warns(UserWarning, match=r"'block/bn' and 1 more needs `momentum=0\.8"):
        from_keras(peer, shapes, names=NAMES, norm=jbn.linen.BatchNorm)


class Net(nnx.Module):
    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        self.embedding = nnx.Embed(7, 4, rngs=rngs)
        self.bn = jbn.nnx.BatchNorm(4, rngs=rngs, **options)
        self.dense = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, ids):
        return self.dense(self.bn(self.embedding(ids)))


def test_nnx_model(rng, keras):
    layers = keras.layers
    peer = keras.Sequential(
        [
            layers.Embedding(7, 4, name="embedding"),
            layers.BatchNormalization(name="bn"),
            layers.Dense(2, name="dense"),
        ]
    )
    ids = jnp.asarray(rng.integers(0, 7, 9))
    peer(ids, training=True)
    model = Net(epsilon=1e-3)
    ported = from_keras(peer, model)
    np.testing.assert_array_equal(model.bn.mean[...], 0)
    ported.eval()
    np.testing.assert_allclose(ported(ids), peer(ids, training=False), **CLOSE)
    for a, b in zip(to_keras(ported, peer), peer.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.warns(UserWarning, match=r"'bn' needs `epsilon=0\.001`"):
        from_keras(peer, Net())


def test_other_conventions_warn(rng, keras):
    peer, _ = norm_layer(keras, rng)
    target = jbn.init(3)
    with pytest.warns(UserWarning, match=r"outputs will differ.*`epsilon=0\.001`"):
        from_keras(peer, target, norm=jbn.linen.BatchNorm)
    with pytest.warns(UserWarning, match=r"outputs will differ.*`epsilon=0\.001`"):
        to_keras(target, peer, norm=jbn.linen.BatchNorm())
    for name, value in (("momentum", 0.9), ("unbiased", True)):
        norm = {**keras_options(peer), name: value}
        with pytest.warns(UserWarning, match=f"the layer needs.*has `{name}="):
            from_keras(peer, target, norm=norm)


def test_errors_name_what_is_wrong_and_change_nothing(rng, keras):
    peer, _ = norm_layer(keras, rng)
    kept = peer.get_weights()
    wide = jbn.init(4)
    message = r"'gamma' has \(3,\), and our 'scale' has \(4,\), 'beta' has"
    for call in (partial(from_keras, peer, wide), partial(to_keras, wide, peer)):
        with pytest.raises(ValueError, match=message):
            call()
    missing = r"Not there: 'x/gamma' or 'x/scale' \(our 'scale'\).*Not used: 'gamma'"
    for call in (
        partial(from_keras, peer, jbn.init(3), names={"": "x"}),
        partial(to_keras, jbn.init(3), peer, names={"": "x"}),
    ):
        with pytest.raises(ValueError, match=missing):
            call()
    for a, b in zip(peer.get_weights(), kept, strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(np.testing.assert_array_equal, wide, jbn.init(4))

    twins = [keras.layers.Dense(2, name="same") for _ in range(2)]

    class Twins(keras.layers.Layer):
        def __init__(self):
            super().__init__(name="twins")
            self.twins = twins

        def call(self, x):
            return self.twins[1](self.twins[0](x))

    layer = Twins()
    layer(np.zeros((1, 2), np.float32))
    with pytest.raises(ValueError, match="several have the path 'same/bias'"):
        from_keras(layer, {"params": {}})


def test_skip(rng, keras):
    peer, _ = norm_layer(keras, rng)
    params, stats = from_keras(peer, jbn.init(3), skip=("mean", "var"))
    np.testing.assert_array_equal(stats.mean, 0)
    np.testing.assert_array_equal(params.scale, peer.get_weights()[0])
    back = to_keras((params, stats), peer, skip=lambda path: path == "scale")
    np.testing.assert_array_equal(back[0], peer.get_weights()[0])
    np.testing.assert_array_equal(back[2], 0)


@pytest.mark.usefixtures("untyped")
def test_wrong_types(keras):
    with pytest.raises(TypeError, match="a model, a layer, or the list of weights"):
        from_keras(3, jbn.init(3))
    with pytest.raises(TypeError, match="takes a `BatchNormalization` of Keras"):
        keras_options(keras.layers.Dense(2))
