"""ResNets: sizes, names, masks, and that any norm will do."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import images, make, shapes_of, train

import jbn.linen
from jbn.models import (
    ResNet,
    resnet8,
    resnet18,
    resnet20,
    resnet50,
    torchvision_name,
)
from jbn.models.resnet import BasicBlock, BottleneckBlock


pytestmark = pytest.mark.sweep


SMALL = {"stage_sizes": (1, 1), "widths": (4, 8), "num_classes": 5, "stem": "small"}
BLOCKS = {"basic": BasicBlock, "bottleneck": BottleneckBlock}


@pytest.mark.parametrize(
    ("new", "count"), [(resnet18, 11_689_512), (resnet50, 25_557_032)]
)
def test_as_many_parameters_as_torchvision(new, count):
    shapes = shapes_of(new(), 1, 64, 64, 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize(("new", "blocks"), [(resnet8, 1), (resnet20, 3)])
def test_small_resnets_are_those_of_section_4_2(new, blocks):
    """A table of He et al.: 32x32, 16x16 and 8x8; shortcuts are convolutions here."""
    count = 3 * 9 * 16 + 2 * 16 + 64 * 10 + 10
    for width, before in ((16, 16), (32, 16), (64, 32)):
        count += (
            9 * before * width
            + (2 * blocks - 1) * 9 * width**2
            + 2 * blocks * 2 * width
        )
        count += (before + 2) * width if width > before else 0
    shapes = shapes_of(new(), 1, 32, 32, 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count
    assert f"stage3_block{blocks}" in shapes["params"]
    assert f"stage3_block{blocks + 1}" not in shapes["params"]
    wide = shapes_of(new(widths=(8, 8, 8), num_classes=3), 1, 8, 8, 1)["params"]
    assert wide["head"]["kernel"].shape == (8, 3)


@pytest.mark.parametrize(
    ("stem", "sizes"),
    [("imagenet", [16, 8, 4, 2]), ("small", [64, 32, 16, 8])],
)
def test_each_stage_but_the_first_halves_the_image(stem, sizes):
    model = resnet18(widths=(4, 8, 8, 16), num_classes=3, stem=stem)
    x = jnp.zeros((2, 64, 64, 3))

    def run():
        variables = model.init(jax.random.key(0), x, train=False)
        return model.apply(variables, x, train=False, capture_intermediates=True)

    logits, found = jax.eval_shape(run)
    found = found["intermediates"]
    outputs = [found[f"stage{i}_block2"]["__call__"][0] for i in (1, 2, 3, 4)]
    widths = (4, 8, 8, 16)
    assert [y.shape for y in outputs] == [
        (2, size, size, width) for size, width in zip(sizes, widths, strict=True)
    ]
    assert logits.shape == (2, 3)
    assert logits.dtype == jnp.float32


def test_names():
    model = ResNet((2, 1), BottleneckBlock, widths=(4, 8), num_classes=2)
    params = shapes_of(model)["params"]
    convs = {f"{kind}{i}" for kind in ("conv", "norm") for i in (1, 2, 3)}
    shortcut = {"shortcut_conv", "shortcut_norm"}
    assert {name: set(params[name]) for name in params if name.startswith("stage")} == {
        "stage1_block1": convs | shortcut,
        "stage1_block2": convs,
        "stage2_block1": convs | shortcut,
    }
    assert params.keys() >= {"stem_conv", "stem_norm", "head"}
    assert params["stem_conv"]["kernel"].shape == (7, 7, 3, 4)
    assert params["stage2_block1"]["conv2"]["kernel"].shape == (3, 3, 8, 8)
    assert params["stage2_block1"]["conv3"]["kernel"].shape == (1, 1, 8, 32)
    assert torchvision_name("stage3_block12/norm2") == "layer3.11.bn2"
    assert torchvision_name("stage1_block1/shortcut_norm") == "layer1.0.downsample.1"
    assert torchvision_name("stem_norm") == "bn1"
    assert torchvision_name("head") == "fc"


def test_parameters_do_not_depend_on_the_size_of_images():
    model = ResNet(**SMALL)
    shapes = [shapes_of(model, 1, n, n, 3) for n in (1, 2, 16)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_block_starts_as_its_shortcut(rng, block):
    x = images(rng)
    width = 3 if block is BasicBlock else 1
    layer = block(width, strides=1, norm=jbn.linen.BatchNorm)
    x = x if block is BasicBlock else jnp.concatenate([x, x[..., :1]], -1)
    variables = layer.init(jax.random.key(0), x, train=True)
    y, _ = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, nn.relu(x))


def test_initial_weights():
    model = ResNet((1,), BasicBlock, widths=(32,), num_classes=500)
    x = jnp.zeros((1, 8, 8, 3))
    params = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)["params"]
    # He et al.: a variance of 2 / (out * 3 * 3). Of 9216 numbers, to 5 %.
    kernel = params["stage1_block1"]["conv2"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (32 * 9)) ** 0.5, rtol=0.05)
    stem = params["stem_conv"]["kernel"]
    np.testing.assert_allclose(stem.std(), (2 / (32 * 49)) ** 0.5, rtol=0.05)
    np.testing.assert_allclose(params["head"]["kernel"].std(), 0.01, rtol=0.05)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_masked_images_take_no_part(rng, block):
    # A bottleneck has a shortcut of its own in the first stage already.
    sizes = {"stage_sizes": (1,), "widths": (4,)} if block is BottleneckBlock else {}
    model = ResNet(block=block, **{**SMALL, **sizes})
    x = images(rng, 6, 8, 8, 3)
    variables = make(rng, model)
    mask = jnp.asarray([True, True, False, True, False, True])
    dirty = x.at[2].set(jnp.nan).at[4].set(jnp.inf)

    def loss(params, x, mask):
        logits, updated = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mask=mask,
            mutable=["batch_stats"],
        )
        weights = jnp.asarray(np.linspace(1, 2, logits.shape[1]), jnp.float32)
        each = (logits**2 * weights[None]).sum(1)
        kept = each if mask is None else jnp.where(mask, each, 0)
        return kept.sum(), (logits, updated)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (logits, stats)), grads = step(variables["params"], dirty, mask)
    kept = x[np.asarray(mask)]
    (_, (kept_logits, kept_stats)), kept_grads = step(variables["params"], kept, None)
    np.testing.assert_allclose(
        logits[np.asarray(mask)], kept_logits, rtol=1e-4, atol=1e-4
    )
    assert np.isfinite(logits).all()
    # Sums of another order, over all layers.
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, stats, kept_stats)

    def alike(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())

    jax.tree.map(alike, grads, kept_grads)


NORMS = {
    "batch": partial(jbn.linen.BatchNorm, momentum=0.9),
    "renorm": jbn.linen.BatchRenorm,
    "ghost": partial(jbn.linen.GhostBatchNorm, num_groups=2),
    "frozen": jbn.linen.FrozenBatchNorm,
    "flax": nn.BatchNorm,
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_any_norm_will_do(rng, norm):
    model = ResNet(norm=norm, **SMALL)
    x = images(rng)
    variables = make(rng, model)
    mask = jnp.asarray([True, True, True, False])
    logits, updated = train(model, variables, x, mask)
    assert logits.shape == (4, 5)
    assert np.isfinite(logits).all()
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert jax.tree.structure(before) == jax.tree.structure(after)
    moved = [
        bool((a != b).any())
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    ]
    assert set(moved) == {norm is not NORMS["frozen"]}
    # The norm's class is all that differs: names and shapes are Flax's.
    flax = ResNet(norm=nn.BatchNorm, **SMALL)
    assert shapes_of(model) == shapes_of(flax)


def test_same_outputs_with_flax(rng):
    x = images(rng)
    model = ResNet(norm=jbn.linen.BatchNorm, **SMALL)
    flax = ResNet(norm=nn.BatchNorm, **SMALL)
    variables = make(rng, model)
    # Rounding, through seven normalized layers.
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, train(model, variables, x), train(flax, variables, x))


def test_inference_uses_running_statistics(rng):
    x = images(rng)
    model = ResNet(**SMALL)
    variables = make(rng, model)
    infer = jax.jit(partial(model.apply, train=False))
    whole = infer(variables, x)
    others = x.at[1:].set(7)
    np.testing.assert_array_equal(infer(variables, others)[0], whole[0])
    _, updated = train(model, variables, x)
    assert np.abs(infer({**variables, **updated}, x) - whole).max() > 1e-3


def test_integer_images_are_scaled(rng):
    x = rng.integers(0, 256, (2, 8, 8, 3))
    model = ResNet(**SMALL)
    small = jnp.asarray(x, jnp.uint8)
    variables = make(rng, model)
    scaled = jnp.asarray(x / 255, jnp.float32)
    infer = jax.jit(partial(model.apply, train=False))
    np.testing.assert_allclose(
        infer(variables, small), infer(variables, scaled), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_bfloat16_keeps_parameters_and_statistics_in_float32(rng, block):
    x = images(rng)
    model = ResNet(block=block, dtype=jnp.bfloat16, **SMALL)
    variables = make(rng, model)
    logits, updated = train(model, variables, x)
    trees = (shapes_of(model), updated, logits)
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(jnp.float32)}
    infer = partial(model.apply, train=False, capture_intermediates=True)
    _, found = jax.eval_shape(infer, variables, x)
    for name in ("stem_conv", "stem_norm", "stage1_block1", "stage2_block1"):
        assert found["intermediates"][name]["__call__"][0].dtype == jnp.bfloat16
    wide: Any
    wide, _ = train(ResNet(block=block, **SMALL), variables, x)
    # Eight bits, through some ten layers.
    np.testing.assert_allclose(logits, wide, atol=0.05 * np.abs(wide).max())


def test_gradients_are_finite_and_reach_every_parameter(rng):
    model = ResNet(**{**SMALL, "stem": "imagenet"})
    x = images(rng)
    variables = make(rng, model)

    @jax.jit
    def gradient(params, cotangent):
        def loss(params):
            logits, _ = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return (logits * cotangent).sum()

        return jax.grad(loss)(params)

    cotangent = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    for leaf in jax.tree.leaves(gradient(variables["params"], cotangent)):
        assert np.isfinite(leaf).all()
        assert (leaf != 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4,)}, "one entry per stage; got 1 for 2"),
        ({"stem": "large"}, "'imagenet' or 'small'; got 'large'"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_errors(options, message):
    model = ResNet(**{**SMALL, **options})
    with pytest.raises(ValueError, match=message):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
