"""DCGAN: against PyTorch layer by layer, sizes, masks, statistics of each kind."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers import load_peer

import jbn.linen
from jbn.models import Discriminator, Generator


pytestmark = pytest.mark.sweep


PLAIN = partial(jbn.linen.BatchNorm, momentum=0.9)


def shapes_of(model, x, **call):
    """Of the variables; nothing is compiled."""
    init = partial(model.init, train=False, **call)
    return jax.eval_shape(init, jax.random.key(0), x)


def make(rng, model, x, **call):
    """Variables without the zeros and ones that hide what they multiply."""

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        fan_in = np.prod(leaf.shape[:-1], initial=2)
        value = rng.normal(size=leaf.shape) / fan_in**0.5
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes_of(model, x, **call))


def train(model, variables, x, **call) -> Any:
    step = partial(model.apply, train=True, mutable=["batch_stats"])
    return jax.jit(lambda v, x, call: step(v, x, **call))(variables, x, call)


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def tensor(array):
    torch = load_peer("torch")
    return torch.tensor(np.asarray(array, np.float64))


def torch_norm(y, layer):
    functional = load_peer("torch.nn.functional")
    scale, bias = tensor(layer["scale"]), tensor(layer["bias"])
    return functional.batch_norm(y, None, None, scale, bias, training=True)


def torch_generator(params, latents):
    """The generator on PyTorch, float64, with PyTorch's padding of 1."""
    functional = load_peer("torch.nn.functional")
    y = tensor(latents) @ tensor(params["project"]["kernel"])
    y = y.reshape(len(y), 4, 4, -1).permute(0, 3, 1, 2)
    count = len([name for name in params if name.startswith("conv")])
    for i in range(1, count + 1):
        y = torch_norm(y, params[f"norm{i}"]).relu()
        layer = params[f"conv{i}"]
        # Flax applies the kernel of a transposed convolution unflipped.
        kernel = tensor(layer["kernel"]).permute(2, 3, 0, 1).flip(2, 3)
        bias = tensor(layer["bias"]) if "bias" in layer else None
        y = functional.conv_transpose2d(y, kernel, bias, stride=2, padding=1)
    return y.tanh().permute(0, 2, 3, 1).numpy()


def torch_discriminator(params, x):
    """The discriminator on PyTorch, float64, with PyTorch's padding of 1."""
    functional = load_peer("torch.nn.functional")
    y = tensor(x).permute(0, 3, 1, 2)
    count = len([name for name in params if name.startswith("conv")])
    for i in range(1, count + 1):
        layer = params[f"conv{i}"]
        kernel = tensor(layer["kernel"]).permute(3, 2, 0, 1)
        bias = tensor(layer["bias"]) if "bias" in layer else None
        y = functional.conv2d(y, kernel, bias, stride=2, padding=1)
        if i > 1:
            y = torch_norm(y, params[f"norm{i}"])
        y = functional.leaky_relu(y, 0.2)
    y = y.permute(0, 2, 3, 1).reshape(len(y), -1)
    head = params["head"]
    return (y @ tensor(head["kernel"]) + tensor(head["bias"]))[:, 0].numpy()


@pytest.mark.peers("torch")
def test_generator_has_the_images_of_pytorch(rng):
    model = Generator(image_size=16, channels=2, width=3)
    latents = normal(rng, 4, 5)
    variables = make(rng, model, latents)
    images, _ = train(model, variables, latents)
    assert images.shape == (4, 16, 16, 2)
    expected = torch_generator(variables["params"], latents)
    np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(images).max() > 0.5


@pytest.mark.peers("torch")
def test_discriminator_has_the_logits_of_pytorch(rng):
    model = Discriminator(width=3)
    real, fake = normal(rng, 4, 16, 16, 2), normal(rng, 3, 16, 16, 2) * 3 + 1
    variables = make(rng, model, real, domain=0)
    both = jnp.concatenate([real, fake])
    domain = jnp.asarray([0] * 4 + [1] * 3)
    logits, _ = train(model, variables, both, domain=domain)
    # Each kind by itself: as two batches.
    expected = [torch_discriminator(variables["params"], x) for x in (real, fake)]
    np.testing.assert_allclose(logits, np.concatenate(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.peers("torch")
def test_discriminator_with_a_plain_norm(rng):
    model = Discriminator(width=3, norm=PLAIN)
    x = normal(rng, 4, 16, 16, 2)
    variables = make(rng, model, x)
    logits, _ = train(model, variables, x)
    expected = torch_discriminator(variables["params"], x)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("domain", [0, 1])
def test_statistics_of_the_other_kind_are_untouched(rng, domain):
    model = Discriminator(width=3)
    x = normal(rng, 4, 16, 16, 2)
    variables = make(rng, model, x, domain=0)
    _, updated = train(model, variables, x, domain=domain)
    before, after = variables["batch_stats"], updated["batch_stats"]
    for name in ("mean", "var"):
        moved = before["norm2"][name] != after["norm2"][name]
        assert moved[domain].all()
        assert not moved[1 - domain].any()


def test_as_many_parameters_as_pytorch_s_example():
    # https://github.com/pytorch/examples/tree/main/dcgan has 3,576,704 and 2,765,568,
    # and no biases where no norm follows.
    generator = shapes_of(Generator(), jnp.zeros((1, 100)))
    discriminator = shapes_of(Discriminator(), jnp.zeros((1, 64, 64, 3)), domain=0)
    counts = [
        sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        for shapes in (generator, discriminator)
    ]
    assert counts == [3_576_704 + 3, 2_765_568 + 64 + 1]


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_sizes(size):
    generator = Generator(image_size=size, channels=1, width=1)
    latents = jnp.zeros((2, 3))

    def run():
        key = jax.random.key(0)
        images, _ = generator.init_with_output(key, latents, train=False)
        return images, Discriminator(width=1).init_with_output(
            key, images, train=False, domain=1
        )

    images, (logits, variables) = jax.eval_shape(run)
    assert images.shape == (2, size, size, 1)
    assert logits.shape == (2,)
    assert f"conv{size.bit_length() - 3}" in variables["params"]
    assert f"conv{size.bit_length() - 2}" not in variables["params"]


def test_initial_weights():
    model = Generator(image_size=8, channels=4, width=256)
    init = jax.jit(partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 8)))["params"]
    for name in ("project", "conv1"):
        kernel = params[name]["kernel"]
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
        np.testing.assert_allclose(kernel.mean(), 0, atol=0.001)
    # Of 256 numbers: to four standard deviations of theirs.
    scale = params["norm1"]["scale"]
    np.testing.assert_allclose(scale.mean(), 1, atol=0.005)
    np.testing.assert_allclose(scale.std(), 0.02, rtol=0.18)
    assert not params["norm1"]["bias"].any()


DOMAIN = np.asarray([0, 0, 1, 0, 1, 1, 0])
MODELS = {
    "generator": (Generator(image_size=8, channels=1, width=3), (5,), {}),
    "discriminator": (Discriminator(width=3), (16, 16, 1), {"domain": DOMAIN}),
    "plain": (Discriminator(width=3, norm=PLAIN), (16, 16, 1), {}),
}


@pytest.mark.parametrize(("model", "shape", "call"), MODELS.values(), ids=MODELS)
def test_masked_rows_take_no_part(rng, model, shape, call):
    x = normal(rng, 7, *shape)
    mask = np.asarray([True, True, False, True, True, True, False])
    kept_call = {name: value[mask] for name, value in call.items()}
    variables = make(rng, model, x, **call)
    dirty = x.at[2].set(jnp.nan).at[6].set(jnp.inf)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(params, x, call):
        y, updated = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            **call,
        )
        each = (y**2).reshape(len(y), -1).sum(1)
        kept = jnp.where(call["mask"], each, 0) if "mask" in call else each
        return kept.sum(), (y, updated)

    params = variables["params"]
    (_, (y, stats)), grads = step(params, dirty, {**call, "mask": mask})
    (_, kept), kept_grads = step(params, x[mask], kept_call)
    assert np.isfinite(y).all()
    # Sums of another order, over all layers.
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, (y[mask], stats), kept)

    def alike(a, b):
        assert a.any()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())

    jax.tree.map(alike, grads, kept_grads)


@pytest.mark.parametrize("norm", [jbn.linen.FrozenBatchNorm, nn.BatchNorm])
def test_any_norm_will_do(rng, norm):
    generator = Generator(image_size=8, channels=1, width=3, norm=norm)
    discriminator = Discriminator(width=3, norm=norm)
    for model, x in (
        (generator, normal(rng, 4, 5)),
        (discriminator, normal(rng, 4, 16, 16, 1)),
    ):
        variables = make(rng, model, x)
        mask = jnp.asarray([True, True, True, False])
        y, updated = train(model, variables, x, mask=mask)
        assert np.isfinite(y).all()
        before, after = variables["batch_stats"], updated["batch_stats"]
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert set(jax.tree.leaves(moved)) == {norm is nn.BatchNorm}


def test_integer_and_numpy_images(rng):
    model = Discriminator(width=3)
    x = rng.integers(0, 256, (3, 8, 8, 1), np.uint8)
    variables = make(rng, model, x, domain=0)
    scaled = jnp.asarray(x / 127.5 - 1, jnp.float32)
    infer: Any = partial(model.apply, variables, train=False)
    domain = np.asarray([0, 1, 0])
    np.testing.assert_allclose(
        infer(x, domain=domain), infer(scaled, domain=domain), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("model", [Generator, Discriminator])
def test_bfloat16_keeps_parameters_and_statistics_in_float32(rng, model):
    generator = model is Generator
    sizes = {"image_size": 8, "channels": 1} if generator else {}
    x = normal(rng, 6, 5) if generator else normal(rng, 6, 16, 16, 1)
    call = {} if generator else {"domain": 1}
    half, whole = (model(width=3, dtype=d, **sizes) for d in (jnp.bfloat16, None))
    variables = make(rng, half, x, **call)
    y, updated = train(half, variables, x, **call)
    trees = (shapes_of(half, x, **call), updated, y)
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(jnp.float32)}
    infer = partial(half.apply, train=False, capture_intermediates=True, **call)
    _, found = jax.eval_shape(infer, variables, x)
    for name in ("conv1", "norm1" if generator else "norm2"):
        assert found["intermediates"][name]["__call__"][0].dtype == jnp.bfloat16
    wide, _ = train(whole, variables, x, **call)
    np.testing.assert_allclose(y, wide, atol=0.05 * np.abs(wide).max())


@pytest.mark.parametrize("size", [4, 12, 65, 0])
@pytest.mark.usefixtures("untyped")
def test_sizes_that_are_refused(size):
    model = Generator(image_size=size)
    with pytest.raises(ValueError, match=f"power of two from there; got {size}"):
        model.init(jax.random.key(0), jnp.zeros((1, 8)), train=False)
    x = jnp.zeros((1, size, size, 1))
    with pytest.raises(ValueError, match=f"must be square, .*; got {size}x{size}"):
        Discriminator().init(jax.random.key(0), x, train=False, domain=0)


@pytest.mark.usefixtures("untyped")
def test_images_must_be_square():
    with pytest.raises(ValueError, match=r"must be square, .*; got 8x16"):
        Discriminator().init(
            jax.random.key(0), jnp.zeros((1, 8, 16, 1)), train=False, domain=0
        )
