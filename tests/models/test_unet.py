"""U-Net: against PyTorch layer by layer, sizes, masks, and that any norm will do."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import images, make, shapes_of, train
from peers import load_peer

import jbn.linen
from jbn.models import UNet


pytestmark = pytest.mark.sweep


SMALL = {"widths": (4, 6), "num_classes": 3}


def torch_unet(params, x):
    """The paper's network on PyTorch, float64: "SAME" padding, norms, odd sizes."""
    torch = load_peer("torch")
    functional = load_peer("torch.nn.functional")

    def tensor(array):
        return torch.tensor(np.asarray(array, np.float64))

    def conv(y, layer):
        # Flax: (height, width, in, out); PyTorch: (out, in, height, width).
        kernel = tensor(layer["kernel"]).permute(3, 2, 0, 1)
        bias = tensor(layer["bias"]) if "bias" in layer else None
        return functional.conv2d(y, kernel, bias, padding="same")

    def level(y, layer):
        for i in (1, 2):
            y = conv(y, layer[f"conv{i}"])
            norm = layer[f"norm{i}"]
            scale, bias = tensor(norm["scale"]), tensor(norm["bias"])
            y = functional.batch_norm(y, None, None, scale, bias, training=True)
            y = y.relu()
        return y

    y = tensor(x).permute(0, 3, 1, 2)
    count = len([name for name in params if name.startswith("encoder")])
    skips = []
    for i in range(1, count):
        y = level(y, params[f"encoder{i}"])
        skips.append(y)
        y = functional.max_pool2d(y, 2, ceil_mode=True)
    y = level(y, params[f"encoder{count}"])
    for i in range(count - 1, 0, -1):
        skip = skips[i - 1]
        up = params[f"up{i}"]
        # Flax applies the kernel of a transposed convolution unflipped.
        kernel = tensor(up["kernel"]).permute(2, 3, 0, 1).flip(2, 3)
        y = functional.conv_transpose2d(y, kernel, tensor(up["bias"]), stride=2)
        y = y[:, :, : skip.shape[2], : skip.shape[3]]
        y = level(torch.cat([skip, y], 1), params[f"decoder{i}"])
    return conv(y, params["head"]).permute(0, 2, 3, 1).numpy()


@pytest.mark.peers("torch")
@pytest.mark.parametrize(("size", "widths"), [((7, 10), (4, 5, 6)), ((5, 1), (4, 5))])
def test_same_logits_as_pytorch(rng, size, widths):
    model = UNet(widths=widths, num_classes=3)
    variables = make(rng, model)
    x = images(rng, 4, *size, 3)
    logits, _ = train(model, variables, x)
    assert logits.shape == (4, *size, 3)
    # Rounding, through up to ten normalized layers.
    expected = torch_unet(variables["params"], x)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_as_many_parameters_as_the_paper_s():
    widths = (64, 128, 256, 512, 1024)
    params = shapes_of(UNet(widths=widths, num_classes=2), 1, 32, 32, 1)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # 31,030,658 with a bias in each of 18 convolutions in place of scale and bias.
    assert count == 31_030_658 + sum(2 * widths) + sum(2 * widths[:-1])


def test_names_and_initial_weights():
    model = UNet()
    params = shapes_of(model)["params"]
    levels = {"encoder1", "encoder2", "encoder3", "decoder1", "decoder2"}
    assert params.keys() == levels | {"up1", "up2", "head"}
    for name in levels:
        assert params[name].keys() == {"conv1", "norm1", "conv2", "norm2"}
        assert params[name]["conv1"].keys() == {"kernel"}
    model = UNet(widths=(64,), norm=lambda **_: lambda y, **_: y)
    init = jax.jit(partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 1, 1, 8)))["params"]
    # A variance of 2 / (in * 3 * 3). Of 4608 numbers, to 5 %.
    kernel = params["encoder1"]["conv1"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (8 * 9)) ** 0.5, rtol=0.05)


def test_parameters_do_not_depend_on_the_size_of_images():
    shapes = [shapes_of(UNet(**SMALL), 1, n, m, 3) for n, m in ((1, 2), (7, 9))]
    assert shapes[0] == shapes[1]


def test_masked_images_take_no_part(rng):
    model = UNet(**SMALL)
    x = images(rng, 6, 8, 8, 3)
    variables = make(rng, model)
    mask = np.asarray([True, True, False, True, False, True])
    dirty = x.at[2].set(jnp.nan).at[4].set(jnp.inf)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(params, x, mask):
        logits, updated = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mask=mask,
            mutable=["batch_stats"],
        )
        each = (logits**2).sum((1, 2, 3))
        kept = each if mask is None else jnp.where(mask, each, 0)
        return kept.sum(), (logits, updated)

    (_, (logits, stats)), grads = step(variables["params"], dirty, mask)
    (_, kept), kept_grads = step(variables["params"], x[mask], None)
    assert np.isfinite(logits).all()
    # Sums of another order, over all layers.
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, (logits[mask], stats), kept)

    def alike(a, b):
        assert a.any()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())

    jax.tree.map(alike, grads, kept_grads)


NORMS = {
    "renorm": jbn.linen.BatchRenorm,
    "ghost": partial(jbn.linen.GhostBatchNorm, num_groups=2),
    "frozen": jbn.linen.FrozenBatchNorm,
    "flax": nn.BatchNorm,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_any_norm_will_do(rng, norm):
    model = UNet(norm=norm, widths=(4, 6))
    variables = make(rng, model)
    mask = jnp.asarray([True, True, True, False])
    logits, updated = train(model, variables, images(rng), mask)
    assert np.isfinite(logits).all()
    before, after = variables["batch_stats"], updated["batch_stats"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert set(jax.tree.leaves(moved)) == {norm is not NORMS["frozen"]}


def test_inference_uses_running_statistics(rng):
    model = UNet(**SMALL)
    variables = make(rng, model)
    x = images(rng)
    infer = jax.jit(partial(model.apply, train=False))
    whole = infer(variables, x)
    np.testing.assert_array_equal(infer(variables, x.at[1:].set(7))[0], whole[0])
    _, updated = train(model, variables, x)
    assert np.abs(infer({**variables, **updated}, x) - whole).max() > 1e-3


def test_integer_and_numpy_images(rng):
    model = UNet(**SMALL)
    variables = make(rng, model)
    x = rng.integers(0, 256, (2, 8, 8, 3), np.uint8)
    infer: Any = partial(model.apply, variables, train=False)
    scaled = infer(jnp.asarray(x / 255, jnp.float32))
    np.testing.assert_allclose(infer(x), scaled, rtol=1e-4, atol=1e-5)


def test_bfloat16_keeps_parameters_and_statistics_in_float32(rng):
    model = UNet(dtype=jnp.bfloat16, **SMALL)
    variables = make(rng, model)
    x = images(rng)
    logits, updated = train(model, variables, x)
    trees = (shapes_of(model), updated, logits)
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(jnp.float32)}
    infer = partial(model.apply, train=False, capture_intermediates=True)
    _, found = jax.eval_shape(infer, variables, x)
    for name in ("encoder1", "encoder2", "up1", "decoder1"):
        assert found["intermediates"][name]["__call__"][0].dtype == jnp.bfloat16
    wide, _ = train(UNet(**SMALL), variables, x)
    # Eight bits, through some ten layers.
    np.testing.assert_allclose(logits, wide, atol=0.1 * np.abs(wide).max())


@pytest.mark.usefixtures("untyped")
def test_errors():
    model = UNet(widths=())
    with pytest.raises(ValueError, match="one entry per level; got none"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
