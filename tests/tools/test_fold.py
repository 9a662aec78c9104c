"""Folded models do what they did, and batch norms that cannot be folded are kept."""

import functools
import pickle
import re
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differentiation import QUICKLY
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from peers import load_peer

import jbn.linen
import jbn.nnx
from jbn.models.resnet import BasicBlock, ResNet
from jbn.tools import (
    Folded,
    FoldedNorm,
    convert,
    fold,
    fold_into_next,
    fold_into_previous,
    foldable,
)
from jbn.typing import BatchStats, Params


pytestmark = pytest.mark.sweep


# Of the size of the output: what the issue asks for. Float32 rounds to 6e-8, and sums
# of some hundred terms to a few times that.
TOLERANCE = 1e-5

Linen = functools.partial(jbn.linen.BatchNorm, use_running_average=True)
LinenOfFlax = functools.partial(nn.BatchNorm, use_running_average=True)
RNGS = nnx.Rngs(0)


def some(cases: Any, *quick: Any) -> list[Any]:
    """Cases as parameters, slow but for a few of them."""
    mark = lambda case: () if case in quick else pytest.mark.slow
    return [pytest.param(case, marks=mark(case)) for case in cases]


def nnx_norm(features: int, cls: Any = jbn.nnx.BatchNorm, **options: Any) -> Any:
    return cls(features, use_running_average=True, rngs=RNGS, **options)


def values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Variables in which everything matters: variances from tiny to large."""
    if name == "kernel":
        return rng.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
    if name == "var":
        return 10 ** rng.uniform(-3, 3, shape)
    if name == "scale":
        # Also negative, and one that is zero.
        scale = rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)
        scale.flat[0] = 0
        return scale
    return rng.normal(size=shape)


def randomized(rng: np.random.Generator, model: Any, *inputs: Any, **kwargs) -> Any:
    """Variables of a Linen model, or an NNX model itself, of random values."""
    if isinstance(model, nnx.Module):
        for path, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.Variable):
                new = values(rng, str(path[-1]), variable.shape)
                variable[...] = jnp.asarray(new, variable.dtype)
        return model

    def fill(path, leaf):
        name = [key.key for key in path if hasattr(key, "key")][-1]  # without boxes
        new = values(rng, name, leaf.shape)
        return jnp.asarray(new, leaf.dtype)

    init = functools.partial(model.init, **kwargs)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)
    return jax.tree.map_with_path(fill, shapes)


def jitted(function: Any) -> Any:
    """Compiled quickly, to be run once."""
    return jax.jit(function, compiler_options=QUICKLY)


def run_nnx(model: Any, *args: Any) -> Any:
    graph, state = nnx.split(model)
    return jitted(lambda state, *args: nnx.merge(graph, state)(*args))(state, *args)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def assert_near(new: Any, old: Any, tolerance: float = TOLERANCE) -> None:
    assert (new.shape, new.dtype) == (old.shape, old.dtype)
    new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
    np.testing.assert_allclose(new, old, rtol=0, atol=tolerance * np.abs(old).max())


def folded_linen(rng, model: nn.Module, x: Any, **kwargs: Any) -> Folded:
    """Folds a model with random variables, and compares the outputs, jitted."""
    variables = randomized(rng, model, x, **kwargs)
    folded = fold(model, variables, x, **kwargs)
    old = jitted(functools.partial(model.apply, **kwargs))(variables, x)
    new = jitted(functools.partial(folded.apply, **kwargs))(folded.variables, x)
    assert_near(new, old)
    return folded


def folded_nnx(rng, model: Any, x: Any) -> tuple[Any, dict[str, str]]:
    randomized(rng, model)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    report = foldable(model, x)
    folded = fold(model, x)
    assert_near(run_nnx(folded, x), run_nnx(model, x))
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    return folded, report


# The pieces.


def norm_in_numpy(y, params: Params, stats: BatchStats, epsilon: float, axis: int):
    """Batch norm at inference, feature by feature, in float64."""
    y = np.moveaxis(np.asarray(y, np.float64), axis, 0).copy()
    for i in range(len(y)):
        y[i] = (y[i] - float(stats.mean[i])) / np.sqrt(float(stats.var[i]) + epsilon)
        if params.scale is not None:
            y[i] *= float(params.scale[i])
        if params.bias is not None:
            y[i] += float(params.bias[i])
    return np.moveaxis(y, 0, axis)


def random_norm(rng, features: int, use_scale=True, use_bias=True):
    make = lambda name: jnp.asarray(values(rng, name, (features,)))
    params = Params(
        make("scale") if use_scale else None, make("bias") if use_bias else None
    )
    return params, BatchStats(make("mean"), make("var"))


CONVOLUTIONS = {
    "1d": ((9, 4), (3, 4, 6), {}),
    "2d": ((9, 8, 4), (3, 2, 4, 6), {}),
    "3d": ((5, 4, 6, 2), (2, 3, 2, 2, 4), {}),
    "strided": ((9, 8, 4), (3, 3, 4, 6), {"window_strides": (2, 3)}),
    "dilated": ((9, 8, 4), (3, 3, 4, 6), {"rhs_dilation": (2, 1)}),
    "grouped": ((9, 8, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": ((9, 8, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
}


def convolve(x, kernel, padding: Any, options) -> np.ndarray:
    letters = "DHW"[-(kernel.ndim - 2) :]
    return np.asarray(
        jax.lax.conv_general_dilated(
            x,
            kernel,
            padding=padding,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            **{"window_strides": (1,) * len(letters)} | options,
        )
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("padding", some(["SAME", "VALID", "explicit"], "explicit"))
def test_into_previous_convolution(case, padding, rng):
    in_shape, shape, options = CONVOLUTIONS[case]
    if padding == "explicit":
        padding = [(2, 1)] * (len(shape) - 2)
    x, kernel = rng.normal(size=(2, *in_shape)), rng.normal(size=shape)
    params, stats = random_norm(rng, shape[-1])
    want = norm_in_numpy(
        convolve(x, kernel, padding, options), params, stats, 1e-2, axis=-1
    )
    new, bias = fold_into_previous(kernel, None, params, stats, epsilon=1e-2)
    got = convolve(x, new, padding, options) + np.asarray(bias)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_into_next_convolution(case, rng):
    in_shape, shape, options = CONVOLUTIONS[case]
    x, kernel = rng.normal(size=(2, *in_shape)), rng.normal(size=shape)
    bias = rng.normal(size=shape[-1])
    params, stats = random_norm(rng, in_shape[-1])
    middle = norm_in_numpy(x, params, stats, 1e-2, axis=-1)
    want = convolve(middle, kernel, "VALID", options) + bias
    new, new_bias = fold_into_next(
        kernel,
        bias,
        params,
        stats,
        epsilon=1e-2,
        feature_group_count=options.get("feature_group_count", 1),
    )
    got = convolve(x, new, "VALID", options) + np.asarray(new_bias)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12 * np.abs(want).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("layer_bias", [True, False])
def test_dense_with_and_without_bias_and_affine(use_scale, use_bias, layer_bias, rng):
    x, kernel = rng.normal(size=(5, 3)), rng.normal(size=(3, 4))
    bias = rng.normal(size=4) if layer_bias else None

    def linear(x, kernel, bias=None):
        y = np.asarray(x) @ np.asarray(kernel)
        return y if bias is None else y + np.asarray(bias)

    params, stats = random_norm(rng, 4, use_scale, use_bias)
    want = norm_in_numpy(linear(x, kernel, bias), params, stats, 1e-5, -1)
    new = fold_into_previous(kernel, bias, params, stats)
    np.testing.assert_allclose(linear(x, *new), want, rtol=1e-10, atol=1e-10)

    params, stats = random_norm(rng, 3, use_scale, use_bias)
    want = linear(norm_in_numpy(x, params, stats, 1e-5, -1), kernel, bias)
    new = fold_into_next(kernel, bias, params, stats)
    np.testing.assert_allclose(linear(x, *new), want, rtol=1e-10, atol=1e-10)


def test_the_record_of_parameters_may_be_missing():
    kernel = np.ones((1, 1), np.float32)
    stats = BatchStats(jnp.asarray([1.0]), jnp.asarray([4.0]))
    for function in (fold_into_previous, fold_into_next):
        new, bias = function(kernel, None, None, stats, epsilon=0.0)
        assert (float(new[0, 0]), float(bias[0])) == (0.5, -0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rounds_once(dtype, rng):
    kernel = jnp.asarray(rng.normal(size=(7, 5)), dtype)
    bias = jnp.asarray(rng.normal(size=5), jnp.float32)
    make = lambda name: jnp.asarray(values(rng, name, (5,)), jnp.float32)
    params, stats = (
        Params(make("scale"), make("bias")),
        BatchStats(make("mean"), make("var")),
    )
    wide = lambda v: np.asarray(v).astype(np.float64)
    gain = wide(params.scale) / np.sqrt(wide(stats.var) + 1e-5)
    new, new_bias = fold_into_previous(kernel, bias, params, stats)
    np.testing.assert_array_equal(new, (wide(kernel) * gain).astype(kernel.dtype))
    want = (wide(bias) - wide(stats.mean)) * gain + wide(params.bias)
    np.testing.assert_allclose(new_bias, want.astype(np.float32), rtol=1.2e-7)
    assert new_bias.dtype == np.float32
    # Without a bias there is only the kernel's dtype.
    assert fold_into_previous(kernel, None, params, stats)[1].dtype == kernel.dtype


def test_constant_feature_without_epsilon_becomes_the_bias():
    stats = BatchStats(jnp.asarray([3.0]), jnp.asarray([0.0]))
    params = Params(jnp.asarray([2.0]), jnp.asarray([7.0]))
    kernel = jnp.ones((2, 1))
    new, bias = fold_into_previous(kernel, None, params, stats, epsilon=0.0)
    assert not np.any(new)
    assert bias[0] == 7


@pytest.mark.usefixtures("x64")
def test_several_axes_of_features(rng):
    """Of dense layers to and from several axes, in any order."""
    x, kernel = rng.normal(size=(6, 3)), rng.normal(size=(3, 4, 5))
    make = lambda name, *shape: jnp.asarray(values(rng, name, shape))
    params = Params(make("scale", 4, 5), make("bias", 4, 5))
    stats = BatchStats(make("mean", 4, 5), make("var", 4, 5))
    rstd = 1 / np.sqrt(np.asarray(stats.var) + 1e-5)
    mean, scale, shift = map(np.asarray, (stats.mean, params.scale, params.bias))
    norm = lambda y: (y - mean) * rstd * scale + shift
    new, bias = fold_into_previous(
        kernel, None, params, stats, output_axis=(1, 2), input_axis=0
    )
    want = norm(np.einsum("ni,iab->nab", x, kernel))
    np.testing.assert_allclose(
        np.einsum("ni,iab->nab", x, new) + np.asarray(bias), want, rtol=1e-9
    )
    # The kernel has the two the other way round.
    new, bias = fold_into_previous(
        kernel.swapaxes(1, 2), None, params, stats, output_axis=(2, 1), input_axis=0
    )
    np.testing.assert_allclose(
        np.einsum("ni,iba->nab", x, new) + np.asarray(bias), want, rtol=1e-9
    )

    y, kernel = rng.normal(size=(6, 4, 5)), rng.normal(size=(5, 2, 4, 3))
    want = np.einsum("nab,bkal->nlk", norm(y), kernel)
    new, bias = fold_into_next(
        kernel, None, params, stats, output_axis=(3, 1), input_axis=(2, 0)
    )
    got = np.einsum("nab,bkal->nlk", y, new) + np.asarray(bias)
    np.testing.assert_allclose(got, want, rtol=1e-9)


# The pieces, and PyTorch.


def torch_norm(torch, rng, features: int, kind: str = "2d", **options: Any):
    norm = getattr(torch.nn, f"BatchNorm{kind}")(features, **options).double().eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        ours = {"weight": "scale", "running_var": "var"}.get(name, name)
        if getattr(norm, name) is not None:
            new = torch.from_numpy(values(rng, ours, (features,)))
            getattr(norm, name).data.copy_(new)
    numbers = lambda v: None if v is None else jnp.asarray(v.detach().numpy())
    params = Params(numbers(norm.weight), numbers(norm.bias))
    stats = BatchStats(numbers(norm.running_mean), numbers(norm.running_var))  # pyright: ignore[reportArgumentType]
    return norm, (params, stats), {"epsilon": norm.eps}


@pytest.mark.peers("torch")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "grouped", "transposed", "linear"])
def test_is_what_pytorch_fuses(kind, bias, affine, rng):
    torch = load_peer("torch")
    fusion = load_peer("torch.nn.utils.fusion")
    options: Any = {"bias": bias}
    axis: dict[str, Any] = {"output_axis": 0, "input_axis": 1}
    fuse = fusion.fuse_conv_bn_eval
    if kind == "linear":
        layer, fuse = torch.nn.Linear(3, 4, **options), fusion.fuse_linear_bn_eval
        affine = True  # PyTorch's cannot do without
    elif kind == "transposed":
        layer = torch.nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, **options)
        axis = {"output_axis": 1, "input_axis": 0}
        fuse = functools.partial(fuse, transpose=True)
    else:
        groups = 2 if kind == "grouped" else 1
        layer = torch.nn.Conv2d(6, 4, 3, padding=1, groups=groups, **options)
        axis["feature_group_count"] = groups
    layer = layer.double().eval()
    norm, ours, epsilon = torch_norm(
        torch, rng, 4, "1d" if kind == "linear" else "2d", affine=affine, eps=1e-3
    )
    fused = fuse(layer, norm)
    numbers: Any = lambda v: None if v is None else v.detach().numpy()
    kernel, new_bias = fold_into_previous(
        numbers(layer.weight), numbers(layer.bias), *ours, **epsilon, **axis
    )
    np.testing.assert_allclose(kernel, numbers(fused.weight), rtol=1e-12)
    np.testing.assert_allclose(new_bias, numbers(fused.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.peers("torch")
@pytest.mark.usefixtures("x64")
def test_grouped_transposed_convolution_of_pytorch(rng):
    """Which PyTorch itself does not fuse: its kernel has the features of a group."""
    torch = load_peer("torch")
    layer = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2).double()
    norm, ours, epsilon = torch_norm(torch, rng, 6)
    x = torch.from_numpy(rng.normal(size=(2, 4, 5, 5)))
    want = norm(layer(x)).detach().numpy()
    kernel, bias = fold_into_previous(
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy(),
        *ours,
        **epsilon,
        output_axis=1,
        input_axis=0,
        feature_group_count=2,
    )
    layer.weight.data = torch.from_numpy(np.array(kernel))
    layer.bias.data = torch.from_numpy(np.array(bias))
    np.testing.assert_allclose(layer(x).detach().numpy(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.peers("torch")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_into_the_next_convolution_of_pytorch(groups, rng):
    torch = load_peer("torch")
    layer = torch.nn.Conv2d(4, 8, 3, groups=groups).double()
    norm, ours, epsilon = torch_norm(torch, rng, 4)
    x = torch.from_numpy(rng.normal(size=(2, 4, 5, 5)))
    want = layer(norm(x)).detach().numpy()
    kernel, bias = fold_into_next(
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy(),
        *ours,
        **epsilon,
        output_axis=0,
        input_axis=1,
        feature_group_count=groups,
    )
    layer.weight.data = torch.from_numpy(np.array(kernel))
    layer.bias.data = torch.from_numpy(np.array(bias))
    np.testing.assert_allclose(layer(x).detach().numpy(), want, rtol=1e-9, atol=1e-9)


# Every layer of Flax, in both of its APIs: (arguments, shape of the input).

LAYERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "dense": ("Dense", {}, (3, 4)),
    "dense of images": ("Dense", {}, (2, 5, 3, 4)),
    "conv 1d": ("Conv", {"kernel_size": (3,)}, (2, 9, 4)),
    "conv 2d": ("Conv", {"kernel_size": (3, 2)}, (2, 9, 8, 4)),
    "conv 3d": ("Conv", {"kernel_size": (2, 3, 2)}, (2, 4, 5, 3, 4)),
    "strided, VALID": (
        "Conv",
        {"kernel_size": (3, 3), "strides": 2, "padding": "VALID"},
        (2, 9, 8, 4),
    ),
    "dilated, explicit": (
        "Conv",
        {"kernel_size": (3, 3), "kernel_dilation": 2, "padding": ((2, 1), (0, 3))},
        (2, 9, 8, 4),
    ),
    "grouped, circular": (
        "Conv",
        {"kernel_size": (3, 3), "feature_group_count": 2, "padding": "CIRCULAR"},
        (2, 9, 8, 4),
    ),
    "depthwise": (
        "Conv",
        {"kernel_size": (3, 3), "feature_group_count": 4, "out": 8},
        (2, 9, 8, 4),
    ),
    "causal": ("Conv", {"kernel_size": (3,), "padding": "CAUSAL"}, (2, 9, 4)),
    "dilated input": (
        "Conv",
        {"kernel_size": (3, 3), "input_dilation": 2, "padding": ((1, 1), (2, 1))},
        (2, 4, 4, 4),
    ),
    "masked": (
        "Conv",
        {
            "kernel_size": (3,),
            "mask": np.tril(np.ones((3, 4, 6), np.float32)),
        },
        (2, 9, 4),
    ),
    "no batch": ("Conv", {"kernel_size": (3, 3)}, (9, 8, 4)),
    "many batch axes": ("Conv", {"kernel_size": (3,)}, (2, 3, 9, 4)),
    "transposed": (
        "ConvTranspose",
        {"kernel_size": (3, 3), "strides": (2, 2)},
        (2, 5, 4, 4),
    ),
    "transposed, other kernel": (
        "ConvTranspose",
        {"kernel_size": (4,), "strides": (2,), "transpose_kernel": True},
        (2, 5, 4),
    ),
    "transposed, circular": (
        "ConvTranspose",
        {"kernel_size": (3,), "strides": (2,), "padding": "CIRCULAR"},
        (2, 6, 4),
    ),
    "general": ("General", {"axis": (1, -1), "out": 6}, (2, 3, 5, 4)),
}


def linen_layer(case: str, **options: Any) -> nn.Module:
    kind, arguments, _ = LAYERS[case]
    arguments = arguments | options
    features = arguments.pop("out", 6)
    return getattr(nn, {"General": "DenseGeneral"}.get(kind, kind))(
        features, **arguments
    )


def nnx_layer(case: str, **options: Any) -> Any:
    kind, arguments, shape = LAYERS[case]
    arguments = arguments | options
    features = arguments.pop("out", 6)
    name = {"General": "LinearGeneral", "Dense": "Linear"}.get(kind, kind)
    axis = arguments.get("axis", -1)
    inputs = tuple(shape[a] for a in axis) if name == "LinearGeneral" else shape[axis]
    return getattr(nnx, name)(inputs, features, rngs=RNGS, **arguments)


# Every second with Flax's batch norm and without a bias.


@pytest.mark.parametrize(
    "case",
    some(
        LAYERS, "dense", "conv 2d", "grouped, circular", "causal", "masked", "general"
    ),
)
def test_linen_layers(case, rng):
    use_bias = list(LAYERS).index(case) % 2 == 0
    norm = Linen if use_bias else LinenOfFlax
    x = normal(rng, *LAYERS[case][2])
    model = nn.Sequential([linen_layer(case, use_bias=use_bias), norm(epsilon=1e-2)])
    folded = folded_linen(rng, model, x)
    assert folded.report == {"layers_1": "folded into layers_0"}
    assert sorted(folded.variables) == ["params"]
    shapes = jax.tree.map(jnp.shape, folded.variables["params"])
    assert sorted(shapes) == ["layers_0"]
    assert sorted(shapes["layers_0"]) == ["bias", "kernel"]
    assert folded.biased == (frozenset() if use_bias else {"layers_0"})


@pytest.mark.parametrize(
    "case", some(LAYERS, "dense", "depthwise", "transposed, other kernel")
)
def test_nnx_layers(case, rng):
    use_bias = list(LAYERS).index(case) % 2 == 1
    norm = nnx.BatchNorm if use_bias else jbn.nnx.BatchNorm
    x = normal(rng, *LAYERS[case][2])
    layer = nnx_layer(case, use_bias=use_bias)
    features = LAYERS[case][1].get("out", 6)
    model = nnx.Sequential(layer, nnx_norm(features, norm, epsilon=1e-2))
    folded, report = folded_nnx(rng, model, x)
    assert report == {"layers/1": "folded into layers/0"}
    assert isinstance(folded.layers[1], FoldedNorm)
    assert isinstance(model.layers[1], norm)
    names = {path[-1] for path, v in nnx.iter_graph(folded) if isinstance(v, nnx.Param)}
    assert names == {"kernel", "bias"}
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    assert folded.layers[0].use_bias


@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("use_bias", [True, False])
def test_models_without_scale_or_bias(use_scale, use_bias, rng):
    options = {"use_scale": use_scale, "use_bias": use_bias}
    x = normal(rng, 3, 4)
    model = nn.Sequential([nn.Dense(5), Linen(**options)])
    folded_linen(rng, model, x)
    linear = nnx.Linear(4, 5, rngs=RNGS)
    folded_nnx(rng, nnx.Sequential(linear, nnx_norm(5, **options)), x)


@pytest.mark.parametrize(
    "options",
    [{}, {"freeze_mode": False}, {"num_groups": 2}, {"r_max": 2.0}],
    ids=str,
)
def test_our_classes_that_are_the_same_at_inference(options, rng):
    name = {"num_groups": "GhostBatchNorm", "r_max": "BatchRenorm"}
    name = name.get(next(iter(options), ""), "FrozenBatchNorm")
    x = normal(rng, 4, 3)
    norm = getattr(jbn.linen, name)(use_running_average=True, momentum=None, **options)
    folded = folded_linen(rng, nn.Sequential([nn.Dense(5), norm]), x)
    assert "batch_stats" not in folded.variables
    norm = nnx_norm(5, getattr(jbn.nnx, name), momentum=None, **options)
    folded, _ = folded_nnx(rng, nnx.Sequential(nnx.Linear(3, 5, rngs=RNGS), norm), x)
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))


def test_frozen_layers_in_a_model_told_to_train(rng):
    """Which normalize by the running statistics in any case, folded as well."""
    model = nn.Sequential([nn.Dense(5), jbn.linen.FrozenBatchNorm()])
    variables = randomized(rng, model, normal(rng, 4, 3))
    x = normal(rng, 4, 3)
    folded = fold(model, variables, x)
    want = model.apply(variables, x)
    assert_near(folded.apply(folded.variables, x), want)
    norm = jbn.nnx.FrozenBatchNorm(5, use_running_average=False, rngs=RNGS)
    model = randomized(rng, nnx.Sequential(nnx.Linear(3, 5, rngs=RNGS), norm))
    assert_near(fold(model, x)(x), model(x))


# Around the layers: what is between, where features are, what is behind.


class Chain(nn.Module):
    """Calls functions of a tensor, with layers among them that are fields' names."""

    function: Any

    @nn.compact
    def __call__(self, x: jax.Array, **kwargs: Any) -> Any:
        return self.function(x, **kwargs)


def channels_first(x):
    y = nn.Conv(6, (3, 3), name="conv")(x)
    y = Linen(axis=1, name="norm")(jnp.moveaxis(y, -1, 1))
    return nn.relu(y)


def flat_rows(x):
    y = nn.Conv(6, (3, 3), name="conv")(x)
    return Linen(name="norm")(y.reshape(-1, 6)).reshape(y.shape)


def extra_axes(x):
    y = nn.Dense(6, name="conv")(x)[:, None, ..., None]
    return Linen(axis=-2, name="norm")(y.astype(jnp.float32)).squeeze(1)


def jitted_inside(x):
    conv = nn.jit(nn.Conv)(6, (3, 3), name="conv")
    return nn.remat(jbn.linen.BatchNorm)(use_running_average=True, name="norm")(conv(x))


def two_norms(x):
    y = Linen(name="norm2")(Linen(name="norm")(nn.Conv(6, (3, 3), name="conv")(x)))
    return nn.Dense(4, name="dense")(nn.relu(y))


def norms_between(x):
    """The first goes behind, so that the second, too, has a layer before it."""
    y = Linen(name="first")(nn.relu(x))
    y = nn.Conv(6, (3, 3), padding="VALID", use_bias=False, name="conv")(y)
    return nn.relu(Linen(name="norm")(y))


def norms_in_front(x):
    y = Linen(name="norm2")(Linen(name="norm")(x))
    return nn.Conv(6, (3, 3), padding="VALID", name="conv")(y)


@pytest.mark.parametrize(
    "function",
    [
        channels_first,
        flat_rows,
        extra_axes,
        jitted_inside,
        two_norms,
        norms_between,
        norms_in_front,
    ],
    ids=lambda function: function.__name__,
)
def test_what_is_seen_through(function, rng):
    folded = folded_linen(rng, Chain(function), normal(rng, 2, 6, 7, 6))
    assert set(folded.report.values()) == {"folded into conv"}
    assert "batch_stats" not in folded.variables


BEHIND: dict[str, tuple[dict[str, Any], bool]] = {
    "VALID": ({"padding": "VALID"}, True),
    "SAME": ({"padding": "SAME"}, False),
    "SAME, 1x1": ({"kernel_size": (1, 1), "padding": "SAME", "strides": 2}, True),
    "explicit": ({"padding": ((0, 0), (0, 1))}, False),
    "explicit, none": ({"padding": 0}, True),
    "explicit, cropped": ({"padding": ((0, -1), (-1, 0))}, True),
    "circular": ({"padding": "CIRCULAR"}, True),
    "reflected": ({"padding": "REFLECT"}, True),
    "grouped": ({"padding": "VALID", "feature_group_count": 2}, True),
    "depthwise": ({"padding": "VALID", "feature_group_count": 4, "out": 8}, True),
    "dilated": ({"padding": "VALID", "kernel_dilation": 2}, True),
    "dilated input": ({"padding": 0, "input_dilation": 2}, False),
    "masked": (
        {
            "padding": "VALID",
            "mask": np.tril(np.ones((3, 3, 4, 6), np.float32)),
        },
        True,
    ),
}


@pytest.mark.parametrize("case", some(BEHIND, "SAME", "depthwise", "masked"))
def test_before_a_convolution(case, rng):
    """The order of pre-activation networks, less the activation."""
    given, exact = BEHIND[case]
    options: dict[str, Any] = {"kernel_size": (3, 3)} | given
    features = options.pop("out", 6)
    x = normal(rng, 2, 8, 9, 4)
    model = nn.Sequential(
        [Linen(), nn.Conv(features, **options), nn.relu, Linen(), nn.Dense(3)]
    )
    folded = folded_linen(rng, model, x)
    assert folded.report["layers_3"] == "folded into layers_4"
    conv = nnx.Conv(4, features, rngs=RNGS, use_bias=False, **options)
    head = (nnx_norm(features), nnx.Linear(features, 3, rngs=RNGS))
    new, report = folded_nnx(
        rng, nnx.Sequential(nnx_norm(4), conv, jax.nn.relu, *head), x
    )
    if exact:
        assert folded.report["layers_0"] == "folded into layers_1"
        assert report["layers/0"] == "folded into layers/1"
        assert isinstance(new.layers[0], FoldedNorm)
    else:
        assert folded.report["layers_0"].startswith("kept: no layer comes before it; ")
        for kept in (folded.report["layers_0"], report["layers/0"]):
            assert re.search("'layers.1' .*zeros", kept)
        assert isinstance(new.layers[0], jbn.nnx.BatchNorm)


def test_same_padding_that_is_none_for_this_size_is_refused(rng):
    """With an input of another size it would pad."""
    model = nn.Sequential([Linen(), nn.Conv(3, (2, 2), strides=2, padding="SAME")])
    x = jnp.ones((1, 4, 4, 2))
    variables = randomized(rng, model, x)
    assert "pads its input" in foldable(model, variables, x)["layers_0"]


def test_before_other_layers(rng):
    x = normal(rng, 2, 3, 5, 4)
    norm = Linen(axis=(1, 3))
    folded = folded_linen(
        rng, nn.Sequential([norm, nn.DenseGeneral((6, 2), axis=(-1, 1))]), x
    )
    assert folded.report == {"layers_0": "folded into layers_1"}
    folded = folded_linen(
        rng, nn.Sequential([Linen(), nn.DenseGeneral((6, 2), axis=(-1, 1))]), x
    )
    assert folded.report == {"layers_0": "folded into layers_1"}
    # From layers to several axes, along all of them, in another order, or along one.
    for axis in ((-1, -2), -1, -2):
        folded = folded_linen(
            rng, nn.Sequential([nn.DenseGeneral((6, 2)), Linen(axis=axis)]), x
        )
        assert folded.report == {"layers_1": "folded into layers_0"}
    transposed = nn.ConvTranspose(3, (1,), padding="VALID")
    model = nn.Sequential([Linen(), transposed])
    variables = randomized(rng, model, x)
    assert "inserts zeros" in foldable(model, variables, x)["layers_0"]


class Shared(nn.Module):
    def setup(self):
        self.conv = nn.Conv(4, (3, 3))
        self.norm1 = Linen()
        self.norm2 = Linen()

    def __call__(self, x):
        return self.norm2(nn.relu(self.conv(nn.relu(self.norm1(self.conv(x))))))


class Standardized(nn.Conv):
    """Of a kernel that does not change if it is scaled."""

    @nn.compact
    def __call__(self, inputs):
        shape = (3, 3, inputs.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        mean, std = (f((0, 1, 2), keepdims=True) for f in (kernel.mean, kernel.std))
        kernel = (kernel - mean) / std
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            inputs, kernel, (1, 1), "SAME", dimension_numbers=numbers
        )


def residual(x):
    y = nn.Conv(4, (3, 3), name="conv")(x)
    return y + Linen(name="norm")(y)


def returned(x):
    y = nn.Conv(4, (3, 3), name="conv")(x)
    return Linen(name="norm")(y), y


def regularized(x):
    conv = nn.Conv(4, (3, 3), name="conv")
    y = Linen(name="norm")(conv(x))
    return y, jnp.square(conv.variables["params"]["kernel"]).sum()


def normalized_kernel(x):
    return Linen(name="norm")(nn.WeightNorm(nn.Conv(4, (3, 3), name="conv"))(x))


def scanned(x):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Linen(name="norm")(nn.Conv(4, (3, 3))(x)), None

    axes: Any = {"params": 0, "batch_stats": 0}
    scan = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
    return scan(name="block")(x, None)[0]


def mapped(x):
    axes: Any = {"params": 0, "batch_stats": 0}
    layer = functools.partial(
        nn.vmap, variable_axes=axes, split_rngs={"params": True}, axis_size=2
    )
    y = layer(nn.Dense)(4, name="dense")(x)
    return layer(jbn.linen.BatchNorm)(use_running_average=True, name="norm")(y)


def mapped_examples(x):
    layer = functools.partial(
        nn.vmap,
        variable_axes={"params": None, "batch_stats": None},
        split_rngs={"params": False},
    )
    y = layer(nn.Dense)(4, name="dense")(x)
    return layer(jbn.linen.BatchNorm)(use_running_average=True, name="norm")(y)


def chosen_branch(x):
    y = nn.Conv(4, (3, 3), name="conv")(x)
    norm = Linen(name="norm")
    return nn.cond(x.sum() > 0, lambda m, y: m(y), lambda m, y: -m(y), norm, y)


KEPT: dict[str, tuple[Any, str, str]] = {
    "activation": (
        lambda x: Linen(name="norm")(nn.relu(nn.Conv(4, (3, 3))(x))),
        "norm",
        "the operation before it is `max`; its output is that of the model",
    ),
    "pooling": (
        lambda x: nn.relu(
            Linen(name="norm")(nn.max_pool(nn.Conv(4, (3, 3))(x), (2, 2)))
        ),
        "norm",
        "it is `reduce_window_max`; the operation after it is `max`",
    ),
    "residual": (
        residual,
        "norm",
        "the output of 'conv' is also used elsewhere; the operation after it is `add`",
    ),
    "returned": (
        returned,
        "norm",
        "the output of 'conv' is also used elsewhere; its output is that of the model",
    ),
    "output used twice": (
        lambda x: (lambda y: nn.Dense(3)(y) + nn.Dense(3)(y))(Linen(name="norm")(x)),
        "norm",
        "no layer comes before it; its output is used 2 times",
    ),
    "shared layer": (
        lambda x: Shared(name="shared")(x),
        "shared/norm1",
        "'shared/conv' is called 2 times",
    ),
    "shared norm": (
        lambda x: (lambda norm: norm(nn.Dense(4)(norm(nn.Dense(4)(x)))))(
            Linen(name="norm")
        ),
        "norm",
        "it is called 2 times",
    ),
    "another norm": (
        lambda x: Linen(name="norm")(nn.LayerNorm()(nn.Dense(4)(x))),
        "norm",
        "the operation before it is `add`",
    ),
    "other class": (
        lambda x: Linen(name="norm")(Standardized(4, (3, 3), name="conv")(x)),
        "norm",
        "'conv' is of a class that `fold` does not know, `Standardized`",
    ),
    "local": (
        lambda x: Linen(name="norm")(nn.ConvLocal(4, (3, 3))(x)),
        "norm",
        "the operation before it is `add`",
    ),
    "quantized": (
        lambda x: Linen(name="norm")(
            nn.Dense(
                4,
                dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k),
                name="dense",
            )(x)
        ),
        "norm",
        "'dense' has a custom `dot_general`",
    ),
    "kernel used": (
        regularized,
        "norm",
        "'conv' has a `kernel` that is also used elsewhere",
    ),
    "kernel computed": (
        normalized_kernel,
        "norm",
        "'conv' has a `kernel` that is computed from other variables",
    ),
    "scanned": (scanned, "block/norm", "it runs inside `scan`"),
    "mapped": (mapped, "norm", "it has a `mean` with an axis for `vmap`"),
    "mapped examples": (mapped_examples, "norm", "it runs inside `vmap`"),
    "branch": (chosen_branch, "norm", "it runs inside `cond`"),
    "other axis": (
        lambda x: Linen(axis=1, name="norm")(nn.Dense(4, name="dense")(x)),
        "norm",
        "'dense' has its output features along axis 3, but the batch norm along axis 1",
    ),
    "several axes": (
        lambda x: Linen(axis=(1, -1), name="norm")(nn.Dense(4, name="dense")(x)),
        "norm",
        "'dense' has its output features along axis 3, but the batch norm along axes"
        " 1, 3",
    ),
    "flattened": (
        lambda x: Linen(name="norm")(nn.Dense(4)(x).reshape(len(x), -1)),
        "norm",
        "a `reshape` before it mixes its features with other axes",
    ),
    "batched kernel": (
        lambda x: Linen(name="norm")(
            nn.DenseGeneral(4, axis=-1, batch_dims=(0,), name="dense")(x)
        ),
        "norm",
        "'dense' has a different kernel for each index of a batch axis",
    ),
    "mask": (
        lambda x: Linen(name="norm")(nn.Dense(4)(x), mask=jnp.ones((2, 1, 1, 1), bool)),
        "norm",
        "it is called with a mask or weights",
    ),
    "domains": (
        lambda x: jbn.linen.DomainBatchNorm(2, True, name="norm")(
            nn.Dense(4)(x), domain=0
        ),
        "norm",
        "it is of a class that `fold` does not know, `DomainBatchNorm`",
    ),
    "conditional": (
        lambda x: jbn.linen.ConditionalBatchNorm(2, True, name="norm")(
            nn.Dense(4)(x), labels=0
        ),
        "norm",
        "it is of a class that `fold` does not know, `ConditionalBatchNorm`",
    ),
    "behind a norm that is kept": (
        lambda x: Linen(name="norm")(Linen(name="first")(nn.relu(x))),
        "norm",
        "the layer before it, 'first', is kept",
    ),
    "no unit of variance": (
        lambda x: LinenOfFlax(epsilon=-1.0, name="norm")(nn.Dense(4)(x)),
        "norm",
        "its variance is not positive",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_is_kept_with_the_reason(case, rng):
    function, path, reason = KEPT[case]
    model, x = Chain(function), normal(rng, 2, 6, 6, 4)
    variables = randomized(rng, model, x)
    report = foldable(model, variables, x)
    assert report[path].startswith("kept: ")
    assert reason in report[path]
    with pytest.raises(ValueError, match="cannot fold any") as error:
        fold(model, variables, x)
    assert all(f"{path}: {text}" in str(error.value) for path, text in report.items())


# Where Flax's own output is not NaN.
@pytest.mark.parametrize(
    "case",
    some([c for c in KEPT if c != "no unit of variance"], "residual", "shared layer"),
)
def test_beside_one_that_is_kept_another_is_folded(case, rng):
    """And the model does what it did, wherever the reason was."""
    function, path, _ = KEPT[case]
    first = lambda x: Linen(name="norm_in")(nn.Dense(4, name="dense_in")(x))
    model = Chain(lambda x: function(jnp.tanh(first(x))))
    x = normal(rng, 2, 6, 6, 4)
    variables = randomized(rng, model, x)
    variables = jax.tree.map(
        lambda v: v + 0.1 * jnp.abs(normal(rng, *v.shape)), variables
    )
    folded = fold(model, variables, x)
    assert folded.report["norm_in"] == "folded into dense_in"
    assert folded.report[path].startswith("kept: ")
    new = jitted(folded.apply)(folded.variables, x)
    old = jitted(model.apply)(variables, x)
    jax.tree.map(assert_near, new, old)


def test_variables_that_are_not_finite_are_kept(rng):
    model = nn.Sequential([nn.Dense(2), Linen()])
    x = jnp.ones((1, 2))
    variables = randomized(rng, model, x)
    variables["params"]["layers_1"]["scale"] = jnp.asarray([1.0, np.nan])
    reason = "kept: its variables are not finite"
    assert foldable(model, variables, x) == {"layers_1": reason}


def test_kernels_that_would_overflow_are_kept(rng):
    x = jnp.ones((1, 2), jnp.float16)
    model = nn.Sequential([nn.Dense(2, dtype=jnp.float16), Linen(epsilon=0.0)])
    variables = randomized(rng, model, x)
    variables["batch_stats"]["layers_1"]["var"] = jnp.asarray([1.0, 1e-12])
    reason = foldable(model, variables, x)["layers_1"]
    assert "the kernel or bias of 'layers_0' would overflow in float16" in reason


def test_quantized_kernels_are_kept():
    class Int8(nn.Dense):
        kernel_init: Any = nn.initializers.zeros

    dense = Int8(2, param_dtype=jnp.int8, dtype=jnp.float32)
    model = nn.Sequential([dense, Linen()])
    kernel, bias = np.ones((2, 2), np.int8), np.ones(2, np.int8)
    features = np.ones(2, np.float32)
    variables = {
        "params": {
            "layers_0": {"kernel": kernel, "bias": bias},
            "layers_1": {"scale": features, "bias": features},
        },
        "batch_stats": {"layers_1": {"mean": features, "var": features}},
    }
    report = foldable(model, variables, jnp.ones((1, 2)))
    assert "'layers_0' has variables of dtype int8" in report["layers_1"]


class Doubled(nn.Dense):
    """Calls its base, and is not it."""

    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class Normed(nn.Dense):
    """Has a batch norm inside."""

    @nn.compact
    def __call__(self, inputs):
        return Linen(name="norm")(inputs) ** 2


def test_layers_inside_of_layers(rng):
    x = normal(rng, 3, 4)
    for cls, path, reason in (
        (Doubled, "norm", "the operation before it is `mul`"),
        (Normed, "layer/norm", "it is inside 'layer'"),
    ):
        model = Chain(lambda x, cls=cls: Linen(name="norm")(cls(4, name="layer")(x)))
        variables = randomized(rng, model, x)
        assert reason in foldable(model, variables, x)[path]


@pytest.mark.usefixtures("standard_promotion")
def test_converted_models(rng):
    """Whose batch norms stand where others are defined."""
    x = normal(rng, 3, 4)
    model = nn.Sequential([nn.Dense(5, dtype=jnp.bfloat16), nn.BatchNorm(False)])
    variables = randomized(rng, model, x)
    frozen = convert(model, jbn.linen.FrozenBatchNorm)
    folded = fold(frozen, variables, x)
    assert folded.report == {"layers_1": "folded into layers_0"}
    want: Any = frozen.apply(variables, x)
    got = folded.apply(folded.variables, x)
    assert got.dtype == want.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float32(got), np.float32(want), atol=0.03 * float(jnp.abs(want).max())
    )
    with pytest.raises(ValueError, match="'layers_1' normalizes by the batch"):
        fold(convert(model), variables, x)


class Tied(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(4, 4, rngs=RNGS)
        self.b = nnx.Linear(4, 4, rngs=RNGS)
        self.b.kernel = self.a.kernel
        self.norm = nnx_norm(4)
        self.other = nnx_norm(4)

    def __call__(self, x):
        return self.norm(self.b(jnp.tanh(self.a(x))))


class Twice(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=RNGS)
        self.norm = nnx_norm(4)
        self.norms = nnx.List([nnx_norm(4), self.norm])

    def __call__(self, x):
        x = jnp.tanh(self.norms[0](self.linear(x)))
        return self.norm(self.linear(x))


class Residual(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=RNGS)
        self.norm = nnx_norm(4)

    def __call__(self, x):
        y = self.linear(x)
        return y + self.norm(y)


class Jitted(nnx.Module):
    """Whose jitted function is traced once for both blocks, but for their paths."""

    def __init__(self):
        make = lambda: nnx.Sequential(nnx.Linear(4, 4, rngs=RNGS), nnx_norm(4))
        self.a, self.b = make(), make()

    def __call__(self, x):
        run = lambda block, x: jnp.tanh(block(x))
        return nnx.remat(run)(self.b, nnx.jit(call_block)(self.a, x))


def call_block(block, x):
    return jnp.tanh(block(x))


class Masked(nnx.Module):
    def __init__(self, norm: Any):
        self.norm = norm
        self.linear = nnx.Linear(4, 4, rngs=RNGS)

    def __call__(self, x, mask):
        return self.linear(self.norm(x, mask=mask))


def test_nnx_layers_that_are_kept(rng):
    x = normal(rng, 3, 4)
    assert foldable(Tied(), x) == {
        "norm": "kept: 'b' has a `kernel` that is also used elsewhere; its output is"
        " that of the model",
        "other": "kept: it is not called",
    }
    shared = "kept: 'linear' is called 2 times; "
    report = foldable(Twice(), x)
    assert report == {
        "norm": shared + "its output is that of the model",
        "norms/0": shared + "the operation after it is `tanh`",
    }
    assert (
        "the output of 'linear' is also used elsewhere"
        in foldable(Residual(), x)["norm"]
    )
    mask = jnp.ones((3, 1), bool)
    reason = "kept: it is called with a mask or weights"
    assert foldable(Masked(nnx_norm(4)), x, mask=mask) == {"norm": reason}
    # Flax's does not look at the mask at inference.
    model = Masked(nnx_norm(4, nnx.BatchNorm))
    assert foldable(model, x, mask=mask) == {"norm": "folded into linear"}
    assert_near(fold(model, x, mask=mask)(x, mask=mask), model(x, mask=mask))


def test_nnx_layers_behind_jit_and_remat(rng):
    for _ in range(2):  # the second time, what is jitted is known
        _, report = folded_nnx(rng, Jitted(), normal(rng, 3, 4))
        assert report == {
            "a/layers/1": "folded into a/layers/0",
            "b/layers/1": "folded into b/layers/0",
        }


def test_nnx_layers_that_are_held_twice_and_in_tuples(rng):
    class Model(nnx.Module):
        def __init__(self):
            self.pair = nnx.data((nnx.Linear(4, 5, rngs=RNGS), nnx_norm(5)))
            self.again = self.pair[1]

        def __call__(self, x):
            return self.again(self.pair[0](x))

    folded, _ = folded_nnx(rng, Model(), normal(rng, 3, 4))
    assert isinstance(folded.again, FoldedNorm)
    assert folded.pair[1] is folded.again


# Whole networks.


class CNN(nn.Module):
    """Convolutions of several kinds, norms behind and before, a residual sum."""

    norm: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(self.norm, use_running_average=not train)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        x = nn.relu(norm(name="norm1")(conv(16, (3, 3), name="conv1")(x)))
        y = norm(name="norm2")(
            conv(16, (3, 3), feature_group_count=16, name="conv2")(x)
        )
        y = nn.relu(norm(name="norm3")(conv(16, (1, 1), name="conv3")(y)))
        x = nn.max_pool(x + y, (2, 2), (2, 2))
        x = norm(name="norm4")(x)
        x = conv(24, (3, 3), padding="VALID", name="conv4")(x)
        x = nn.relu(norm(name="norm5")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.ConvTranspose(8, (2, 2), (2, 2), use_bias=False, name="conv5")(x)
        x = nn.relu(norm(name="norm6")(x)).reshape(len(x), -1)
        x = nn.relu(norm(name="norm7")(nn.Dense(32, name="dense1")(x)))
        return nn.Dense(10, name="dense2")(x)


def trained(model: Any, x: jax.Array, y: jax.Array, steps: int = 8) -> Any:
    """Variables after some steps of gradient descent."""
    init = jitted(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), x)

    @jitted
    def step(variables, key):
        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            chosen = jnp.take_along_axis(nn.log_softmax(logits), y[:, None], 1)
            return -chosen.mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], grads)
        return {"params": params, **new}

    for key in jax.random.split(jax.random.key(1), steps):
        variables = step(variables, key)
    return variables


def measured(function: Any, *args: Any, **options: Any) -> tuple[Any, dict[str, float]]:
    """The output, what the compiler says of the cost, and the time (not asserted)."""
    compiled = jax.jit(function, compiler_options=options).lower(*args).compile()
    output = jax.block_until_ready(compiled(*args))
    analysis: Any = compiled.cost_analysis()
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    found = {name: analysis[name] for name in ("flops", "bytes accessed")}
    return output, found | {"milliseconds": 1e3 * float(np.median(times))}


def compare(name: Any, before: tuple, after: tuple, **options: Any) -> None:
    """The same, to rounding, and not at more cost."""
    want, old = measured(*before, **options)
    got, new = measured(*after, **options)
    difference = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    print(f"{name}: {old=}, {new=}, relative {difference=:.1e}")
    assert_near(got, want)
    assert new["bytes accessed"] <= old["bytes accessed"]
    assert new["flops"] <= old["flops"]


@pytest.mark.parametrize(
    "norm", some([jbn.linen.BatchNorm, nn.BatchNorm], jbn.linen.BatchNorm)
)
def test_a_trained_linen_network(norm, rng):
    model: Any = CNN(functools.partial(norm, momentum=0.9))
    x, y = normal(rng, 16, 16, 16, 3), jnp.asarray(rng.integers(10, size=16))
    variables = trained(model, x, y)
    folded = fold(model, variables, x, train=False)
    assert folded.report == {
        "norm1": "folded into conv1",
        "norm2": "folded into conv2",
        "norm3": "folded into conv3",
        "norm4": "folded into conv4",
        "norm5": "folded into conv4",
        "norm6": "folded into conv5",
        "norm7": "folded into dense1",
    }
    before = functools.partial(model.apply, train=False)
    after = functools.partial(folded.apply, train=False)
    compare(norm.__module__, (before, variables, x), (after, folded.variables, x))
    one = lambda x: after(folded.variables, x[None])[0]
    assert_near(jitted(jax.vmap(one))(x), jitted(before)(variables, x))
    # Of another number of images.
    x = x[:3]
    assert_near(jitted(after)(folded.variables, x), jitted(before)(variables, x))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert count(folded.variables) < count(variables)


def test_a_model_folded_with_fresh_variables_takes_a_checkpoint(rng):
    model: Any = CNN(jbn.linen.BatchNorm)
    x = normal(rng, 2, 16, 16, 3)
    variables = randomized(rng, model, x, train=False)
    folded = fold(model, variables, x, train=False)
    saved = pickle.dumps(jax.tree.map(np.asarray, folded.variables))
    init = jitted(functools.partial(model.init, train=False))
    fresh = fold(model, init(jax.random.key(3), x), x, train=False)
    loaded = pickle.loads(saved)
    assert jax.tree.structure(loaded) == jax.tree.structure(fresh.variables)
    want = jitted(functools.partial(folded.apply, train=False))(folded.variables, x)
    got = jitted(functools.partial(fresh.apply, train=False))(loaded, x)
    np.testing.assert_array_equal(got, want)


class NNXNet(nnx.Module):
    def __init__(self, norm: Any, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1 = conv(3, 16, (3, 3))
        self.norm1 = norm(16, momentum=0.9, rngs=rngs)
        self.blocks = nnx.List(
            [
                nnx.Sequential(
                    conv(16, 16, (3, 3)),
                    norm(16, momentum=0.9, rngs=rngs),
                    jax.nn.relu,
                    conv(16, 16, (3, 3)),
                    norm(16, momentum=0.9, rngs=rngs),
                )
                for _ in range(2)
            ]
        )
        self.norm2 = norm(16, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        for block in self.blocks:
            x = jax.nn.relu(x + block(x))
        return self.head(self.dropout(self.norm2(x.mean((1, 2)))))


@pytest.mark.slow
def test_a_trained_nnx_network(rng):
    model = NNXNet(jbn.nnx.BatchNorm, nnx.Rngs(0))
    x, y = normal(rng, 16, 12, 12, 3), jnp.asarray(rng.integers(10, size=16))

    @nnx.jit
    def step(model, x):
        def loss(model):
            chosen = jnp.take_along_axis(nnx.log_softmax(model(x)), y[:, None], 1)
            return -chosen.mean()

        grads = nnx.grad(loss)(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads))

    model.train()
    for _ in range(4):
        step(model, x)
    with pytest.raises(ValueError, match=re.escape("`model.eval()` for NNX")):
        fold(model, x)
    model.eval()
    report = foldable(model, x)
    assert report == {
        "blocks/0/layers/1": "folded into blocks/0/layers/0",
        "blocks/0/layers/4": "folded into blocks/0/layers/3",
        "blocks/1/layers/1": "folded into blocks/1/layers/0",
        "blocks/1/layers/4": "folded into blocks/1/layers/3",
        "norm1": "folded into conv1",
        "norm2": "folded into head",
    }
    folded = fold(model, x)
    want = run_nnx(model, x)
    assert_near(nnx.jit(lambda model, x: model(x))(folded, x), want)
    one = lambda x: folded(x[None])[0]
    assert_near(jitted(jax.vmap(one))(x), want)
    # As a state, restored into a model that is folded likewise.
    fresh = NNXNet(jbn.nnx.BatchNorm, nnx.Rngs(5))
    fresh.eval()
    fresh = fold(fresh, x)
    nnx.update(fresh, nnx.state(folded))
    np.testing.assert_array_equal(run_nnx(fresh, x), run_nnx(folded, x))

    def parts(model):
        graph, state = nnx.split(model)
        return (lambda state, x: nnx.merge(graph, state)(x)), state, x

    compare("jbn.nnx", parts(model), parts(folded))


@pytest.mark.slow
def test_resnet18(rng):
    model = ResNet((2, 2, 2, 2), BasicBlock, 10, (8, 16, 16, 32), "small")
    x = normal(rng, 8, 16, 16, 3)
    variables = jitted(functools.partial(model.init, train=False))(jax.random.key(0), x)
    # The last scale of each block starts at zero: without this much would not matter.
    shake = lambda v: v + 0.2 * jnp.abs(normal(rng, *v.shape))
    variables = jax.tree.map(shake, variables)
    folded = fold(model, variables, x, train=False)
    assert len(folded.report) == 20
    for norm, text in folded.report.items():
        place = norm.replace("shortcut_norm", "shortcut_conv").replace("norm", "conv")
        assert text == f"folded into {place}"
    assert "batch_stats" not in folded.variables
    before = functools.partial(model.apply, train=False)
    after = functools.partial(folded.apply, train=False)
    calls = (before, variables, x), (after, folded.variables, x)
    compare("ResNet-18, hardly optimized", *calls, **QUICKLY)


# Precision.


@pytest.mark.parametrize("var", [1e-4, 1e4])
def test_tiny_and_large_variances(var, rng):
    x = normal(rng, 64, 12)
    model = nn.Sequential([nn.Dense(8), Linen(), nn.Dense(4)])
    variables = randomized(rng, model, x)
    stats = variables["batch_stats"]["layers_1"]
    stats["var"] = stats["var"] * var / stats["var"].mean()
    folded = fold(model, variables, x)
    want = model.apply(variables, x)
    assert_near(folded.apply(folded.variables, x), want)
    # Both are as near to what float64 gives.
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: np.asarray(v, np.float64), (variables, x))
        exact = nn.Sequential([nn.Dense(8), Linen(), nn.Dense(4)]).apply(*wide)
    assert_near(folded.apply(folded.variables, x).astype(np.float32), np.float32(exact))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("source", ["bias", "input"])
def test_means_far_above_the_standard_deviation(source, rng):
    """Where float32 itself is far from exact, the folded model is as near or nearer."""
    model = nn.Sequential([nn.Dense(8), Linen()])
    x = normal(rng, 256, 16) + (5000.0 if source == "input" else 0.0)
    variables = randomized(rng, model, x)
    layer = variables["params"]["layers_0"]
    if source == "bias":
        layer["bias"] = layer["bias"] + 5000.0
    wide = lambda v: np.asarray(v, np.float64)
    y = wide(x) @ wide(layer["kernel"]) + wide(layer["bias"])
    mean, var = (jnp.asarray(v, jnp.float32) for v in (y.mean(0), y.var(0)))
    variables["batch_stats"]["layers_1"] = {"mean": mean, "var": var}
    params = Params(**variables["params"]["layers_1"])
    exact = norm_in_numpy(y, params, BatchStats(mean, var), 1e-5, -1)
    folded = fold(model, variables, x)
    error = lambda y: np.abs(np.asarray(y) - exact).max() / np.abs(exact).max()
    old = error(model.apply(variables, x))
    new = error(folded.apply(folded.variables, x))
    print(f"{source}: {old=:.1e}, {new=:.1e}")
    assert old > 1e-5
    assert new < 2 * old


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("norm", [jbn.linen.BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("norm_dtype", [None, jnp.bfloat16, jnp.float32])
def test_sixteen_bits(norm, norm_dtype, rng):
    """Dtypes stay, and errors are those that the computation has anyway."""
    make = lambda dtype, norm_dtype: nn.Sequential(
        [
            nn.Conv(32, (3, 3), dtype=dtype, use_bias=False),
            norm(use_running_average=True, dtype=norm_dtype),
        ]
    )
    model, x = make(jnp.bfloat16, norm_dtype), normal(rng, 4, 8, 8, 16)
    variables = randomized(rng, model, x)
    variables["batch_stats"]["layers_1"]["var"] = jnp.full(32, 0.5)
    folded = fold(model, variables, x)
    assert folded.report == {"layers_1": "folded into layers_0"}
    # In float32, like the parameters that they were; rounded in the computation.
    assert folded.variables["params"]["layers_0"]["kernel"].dtype == np.float32
    assert folded.variables["params"]["layers_0"]["bias"].dtype == np.float32
    old, new = model.apply(variables, x), folded.apply(folded.variables, x)
    assert new.dtype == old.dtype  # pyright: ignore[reportAttributeAccessIssue]
    exact = np.asarray(make(None, None).apply(variables, x), np.float64)
    error = lambda y: np.sqrt(np.mean((np.asarray(y, np.float64) - exact) ** 2))
    print(f"{norm.__module__} {norm_dtype}: {error(old)=:.2e}, {error(new)=:.2e}")
    assert error(new) < 2 * error(old)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("norm_dtype", some([None, jnp.bfloat16, jnp.float32], None))
@pytest.mark.parametrize("affine", some([True, False], True))
def test_dtypes_stay(dtype, norm_dtype, affine, rng):
    x = normal(rng, 2, 4).astype(dtype)
    options: Any = {"use_scale": affine, "use_bias": affine, "dtype": norm_dtype}
    for cls in (jbn.linen.BatchNorm, nn.BatchNorm):
        norm = cls(use_running_average=True, **options)
        model = nn.Sequential([nn.Dense(4, dtype=dtype), norm])
        variables = randomized(rng, model, x)
        folded = fold(model, variables, x)
        for given in (x, x.astype(jnp.float32), jnp.ones((2, 4), jnp.int32)):
            want = jax.eval_shape(model.apply, variables, given)
            got = jax.eval_shape(folded.apply, folded.variables, given)
            assert got == want
    for cls in (jbn.nnx.BatchNorm, nnx.BatchNorm):
        linear = nnx.Linear(4, 4, dtype=dtype, rngs=RNGS)
        model = nnx.Sequential(linear, nnx_norm(4, cls, **options))
        folded = fold(model, x)
        assert folded(x).dtype == model(x).dtype


def test_a_norm_of_integers_is_folded_behind(rng):
    x = jnp.asarray(rng.integers(255, size=(2, 5)), jnp.uint8)
    model = nn.Sequential([Linen(), nn.Dense(3)])
    folded = folded_linen(rng, model, x)
    assert folded.report == {"layers_0": "folded into layers_1"}


@pytest.mark.usefixtures("x64")
def test_float64_and_complex_numbers(rng):
    x = rng.normal(size=(5, 3))
    model = nn.Sequential([nn.Dense(4, param_dtype=jnp.float64), Linen()])
    variables = randomized(rng, model, x)
    folded = fold(model, variables, x)
    want: Any = model.apply(variables, x)
    np.testing.assert_allclose(folded.apply(folded.variables, x), want, rtol=1e-9)

    x = jnp.asarray(x + 1j * rng.normal(size=(5, 3)))
    model = nn.Sequential(
        [nn.Dense(4, param_dtype=jnp.complex128), Linen(param_dtype=jnp.complex128)]
    )
    variables = randomized(rng, model, x)
    mean = variables["batch_stats"]["layers_1"]["mean"]
    variables["batch_stats"]["layers_1"]["mean"] = np.asarray(mean) * (1 + 2j)
    folded = fold(model, variables, x)
    want: Any = model.apply(variables, x)
    np.testing.assert_allclose(folded.apply(folded.variables, x), want, rtol=1e-9)


# How it is called.


def small(rng) -> tuple[Any, Any, jax.Array]:
    x = normal(rng, 3, 4)
    first, second = Linen(name="norm"), Linen(name="other")
    model = nn.Sequential([nn.Dense(5), first, nn.relu, nn.Dense(4), second])
    return model, randomized(rng, model, x), x


def test_where(rng):
    model, variables, x = small(rng)
    for where in ("*1", ["*_1", "none"], lambda path: path.endswith("1")):
        folded = fold(model, variables, x, where=where)
        assert folded.report == {"layers_1": "folded into layers_0"}
        assert list(folded.variables["batch_stats"]) == ["layers_4"]
        assert_near(folded.apply(folded.variables, x), model.apply(variables, x))
    with pytest.raises(ValueError, match="no batch norm that the model calls"):
        fold(model, variables, x, where="nothing")


def test_norms_that_are_not_meant_may_adapt(rng):
    """Others than those meant may normalize by the batch."""
    adaptive = jbn.linen.BatchNorm(use_running_average=False, update_stats=False)
    model = nn.Sequential([nn.Dense(5), Linen(), nn.relu, nn.Dense(4), adaptive])
    x = normal(rng, 6, 4)
    variables = randomized(rng, model, x)
    folded = fold(model, variables, x, where="*_1")
    assert_near(folded.apply(folded.variables, x), model.apply(variables, x))
    with pytest.raises(ValueError, match="'layers_4' normalizes by the batch"):
        fold(model, variables, x)


def test_shapes_are_enough(rng):
    model, variables, x = small(rng)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert foldable(model, variables, shape) == foldable(model, variables, x)


def test_variables_are_not_changed_and_may_be_frozen(rng):
    from flax.core import freeze

    model, variables, x = small(rng)
    before = jax.tree.map(np.array, variables)
    folded = fold(model, variables, x)
    jax.tree.map(np.testing.assert_array_equal, before, variables)
    frozen = fold(model, freeze(variables), x)
    jax.tree.map(np.testing.assert_array_equal, frozen.variables, folded.variables)
    assert type(frozen.variables) is type(frozen.variables["params"]) is dict


def test_variables_that_are_not_read_do_not_count(rng):
    """Of a layer that was given a bias, or a norm that had one, once."""
    x = normal(rng, 3, 4)
    make = lambda use: nn.Sequential(
        [nn.Dense(5, use_bias=use), Linen(use_bias=use, use_scale=use)]
    )
    variables = randomized(rng, make(True), x)
    folded = fold(make(False), variables, x)
    assert_near(folded.apply(folded.variables, x), make(False).apply(variables, x))


def test_other_arguments_of_apply(rng):
    class Model(nn.Module):
        def setup(self):
            self.dense, self.norm = nn.Dense(4, use_bias=False), jbn.linen.BatchNorm()
            self.dropout = nn.Dropout(0.5)

        def encode(self, x, *, train: bool):
            y = self.norm(inputs_of(self.dense, x), use_running_average=not train)
            self.sow("intermediates", "y", y)
            return self.dropout(y, deterministic=False)

        def __call__(self, x):
            return self.encode(x, train=False)

    def inputs_of(layer, x):
        return layer(inputs=x)

    model, x = Model(), normal(rng, 3, 4)
    key = jax.random.key(0)
    variables = model.init({"params": key, "dropout": key}, x)
    call: dict[str, Any] = {
        "method": "encode",
        "train": np.bool_(False),
        "rngs": {"dropout": key},
        "mutable": ["intermediates", "batch_stats"],
    }
    folded = fold(model, variables, x, **call)
    assert folded.report == {"norm": "folded into dense"}
    new, state = folded.apply(folded.variables, x, **call)
    old, old_state = model.apply(variables, x, **call)
    assert_near(new, old)
    assert_near(state["intermediates"]["y"][0], old_state["intermediates"]["y"][0])


def test_what_is_sown_is_used(rng):
    def sowing(x):
        dense = nn.Dense(4, name="dense")
        y, parent = dense(x), dense.parent
        assert isinstance(parent, nn.Module)
        parent.sow("intermediates", "y", y)
        return Linen(name="norm")(y)

    model, x = Chain(sowing), normal(rng, 3, 4)
    variables = {"params": model.init(jax.random.key(0), x)["params"]}
    variables["batch_stats"] = model.init(jax.random.key(0), x)["batch_stats"]
    assert foldable(model, variables, x) == {"norm": "folded into dense"}
    report = foldable(model, variables, x, mutable=["intermediates"])
    assert "'dense' is also used elsewhere" in report["norm"]


def partitioned(rng):
    """A model whose kernel has metadata, its variables and an input."""
    boxed = lambda: nn.with_partitioning(nn.initializers.lecun_normal(), (None, "f"))
    model = nn.Sequential([nn.Dense(8, kernel_init=boxed(), use_bias=False), Linen()])
    x = normal(rng, 3, 4)
    return model, randomized(rng, model, x), x


def test_metadata_is_kept(rng):
    model, variables, x = partitioned(rng)
    folded = fold(model, variables, x)
    kernel: Any = folded.variables["params"]["layers_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == (None, "f")
    assert_near(folded.apply(folded.variables, x), model.apply(variables, x))


@pytest.mark.devices
def test_places_are_kept(rng):
    model, variables, x = partitioned(rng)
    mesh = jax.make_mesh((4,), ("f",), devices=jax.devices()[:4])
    variables = nn.meta.unbox(variables)
    sharding = NamedSharding(mesh, P(None, "f"))
    kernel = jax.device_put(variables["params"]["layers_0"]["kernel"], sharding)
    variables = jax.device_put(variables, NamedSharding(mesh, P()))
    variables["params"]["layers_0"]["kernel"] = kernel
    folded = fold(model, variables, x)
    new = folded.variables["params"]["layers_0"]
    assert new["kernel"].sharding == sharding
    assert new["bias"].sharding.is_fully_replicated
    assert new["bias"].sharding.device_set == sharding.device_set
    # What is on no device in particular stays so.
    free = jax.tree.map(lambda v: jnp.asarray(np.asarray(v)), variables)
    new = fold(model, free, x).variables
    assert not any(v.committed for v in jax.tree.leaves(new))


@pytest.mark.devices
def test_nnx_places_are_kept(rng):
    mesh = jax.make_mesh((4,), ("f",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P(None, "f"))
    linear: Any = nnx.Linear(4, 8, use_bias=False, rngs=RNGS)
    linear.kernel.set_value(jax.device_put(linear.kernel[...], sharding))
    folded: Any = fold(nnx.Sequential(linear, nnx_norm(8)), jnp.ones((2, 4)))
    assert folded.layers[0].kernel[...].sharding == sharding
    assert folded.layers[0].bias[...].sharding.device_set == sharding.device_set


# What folded models refuse.


def test_a_folded_linen_model_is_for_inference(rng):
    model: Any = CNN(jbn.linen.BatchNorm)
    x = normal(rng, 2, 16, 16, 3)
    variables = randomized(rng, model, x, train=False)
    folded = fold(model, variables, x, train=False)
    with pytest.raises(ValueError, match="'norm1' is folded, for inference"):
        folded.apply(folded.variables, x, train=True)
    with pytest.raises(ValueError, match="not those of the folded model: 'conv1'"):
        folded.apply(variables, x, train=False)


def test_a_folded_nnx_model_is_for_inference(rng):
    model = nnx.Sequential(nnx.Linear(4, 5, rngs=RNGS), nnx_norm(5))
    x = normal(rng, 3, 4)
    folded = fold(model, x)
    assert_near(nnx.view(folded, use_running_average=True)(x), model(x))
    for other in (nnx.view(folded, use_running_average=False), nnx.clone(folded)):
        other.train()
        with pytest.raises(ValueError, match="'layers/1' is folded, for inference"):
            other(x)
    norm = folded.layers[1]
    with pytest.raises(ValueError, match="folded, for inference"):
        norm(x, False)
    with pytest.raises(ValueError, match="for calls without `mask`"):
        norm(x, mask=jnp.ones((3, 1), bool))
    folded.eval()
    assert_near(folded(x), model(x))


def test_a_folded_linen_norm_refuses_a_mask(rng):
    model = Chain(lambda x, mask=None: Linen()(nn.Dense(3)(x), mask=mask))
    x, mask = normal(rng, 2, 4), jnp.ones((2, 1), bool)
    variables = randomized(rng, model, x)
    folded = fold(model, variables, x)
    with pytest.raises(ValueError, match="the same arguments as the model"):
        folded.apply(folded.variables, x, mask=mask)


# Mistakes, as users see them.

DENSE = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
X = np.ones((2, 4), np.float32)
KERNEL = np.ones((4, 3), np.float32)
PARAMS = Params(jnp.ones(3), jnp.ones(3))
STATS = BatchStats(jnp.ones(3), jnp.ones(3))


def dense() -> Any:
    return DENSE.init(jax.random.key(0), X)


def fold_any(*args: Any, **kwargs: Any) -> Any:
    return fold(*args, **kwargs)


def previous(
    kernel: Any = KERNEL,
    bias: Any = None,
    params: Any = PARAMS,
    stats: Any = STATS,
    **kwargs: Any,
):
    return fold_into_previous(kernel, bias, params, stats, **kwargs)


def following(kernel: Any = KERNEL.T, bias: Any = None, **kwargs: Any):
    return fold_into_next(kernel, bias, PARAMS, STATS, **kwargs)


MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "not a model": (lambda: fold_any(lambda x: x, X), TypeError, "must be a `flax.lin"),
    "no variables": (lambda: fold_any(DENSE, X), TypeError, "needs its variables"),
    "nothing": (lambda: fold_any(DENSE), TypeError, "needs its variables"),
    "traced variables": (
        lambda: jax.jit(lambda v: fold_any(DENSE, v, X))(dense()),
        TypeError,
        "Fold once, outside of `jit`",
    ),
    "shapes of variables": (
        lambda: fold_any(DENSE, jax.eval_shape(dense), X),
        TypeError,
        "`variables` must be known; got only its shape",
    ),
    "no batch norm": (
        lambda: fold_any(nn.Dense(3), {"params": dense()["params"]["layers_0"]}, X),
        ValueError,
        "found no batch norm that the model calls",
    ),
    "training": (
        lambda: fold_any(
            nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)]),
            dense(),
            X,
        ),
        ValueError,
        "'layers_1' normalizes by the batch. Call the model as at inference",
    ),
    "updating": (
        lambda: fold_any(
            nn.Sequential([nn.Dense(3), Linen(update_stats=True)]), dense(), X
        ),
        ValueError,
        "'layers_1' updates its statistics",
    ),
    "frozen, updating": (
        lambda: fold_any(
            nn.Sequential(
                [
                    nn.Dense(3),
                    jbn.linen.FrozenBatchNorm(
                        freeze_stats=False, use_running_average=False
                    ),
                ]
            ),
            dense(),
            X,
        ),
        ValueError,
        "'layers_1' updates its statistics",
    ),
    "traced kernel": (
        lambda: jax.jit(previous)(jnp.ones((4, 3))),
        TypeError,
        "`kernel` must be known; got a traced array",
    ),
    "integers": (
        lambda: previous(np.ones((4, 3), int)),
        TypeError,
        "`kernel` must be of a floating dtype; got int64",
    ),
    "features": (
        lambda: previous(np.ones((3, 4), np.float32)),
        ValueError,
        "one entry per feature along `output_axis`; got shape (3, 4), with (4,) along"
        " it, for a batch norm of features of shape (3,)",
    ),
    "features of groups": (
        lambda: following(np.ones((3, 2, 4), np.float32), feature_group_count=2),
        ValueError,
        "along `input_axis`; got shape (3, 2, 4), with (2,) along it in 2 groups",
    ),
    "not one group": (
        lambda: following(np.ones((3, 3, 6), np.float32), feature_group_count=3),
        ValueError,
        "hold the input features of one group along `input_axis`",
    ),
    "bias": (
        lambda: previous(bias=np.ones(4, np.float32)),
        ValueError,
        "`bias` must have one entry per output feature; got shape (4,)",
    ),
    "bias of the next": (
        lambda: following(bias=np.ones(3, np.float32)),
        ValueError,
        "`bias` must have one entry per output feature; got shape (3,)",
    ),
    "axis": (
        lambda: previous(output_axis=2),
        ValueError,
        "`output_axis` must name axes of `kernel`, which has shape (4, 3); got 2",
    ),
    "no axis": (lambda: following(input_axis=()), ValueError, "must name axes of"),
    "axis twice": (
        lambda: following(output_axis=(1, 1)),
        ValueError,
        "must name axes of",
    ),
    "one axis for both": (
        lambda: following(KERNEL, input_axis=1),
        ValueError,
        "must name different axes of `kernel`; got 1 and -1",
    ),
    "statistics": (
        lambda: previous(stats=BatchStats(jnp.ones(4), jnp.ones(3))),
        ValueError,
        "`batch_stats.mean` must have one entry per feature; got shape (4,)",
    ),
    "a dict": (
        lambda: previous(stats={"mean": 0, "var": 1}),
        TypeError,
        "`batch_stats` must be a `jbn.BatchStats`; got dict",
    ),
    "a dict of parameters": (
        lambda: previous(params={"scale": 0}),
        TypeError,
        "`params` must be a `jbn.Params`; got dict",
    ),
    "epsilon": (lambda: previous(epsilon=-1.0), ValueError, "epsilon"),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    function, kind, text = MISTAKES[case]
    with pytest.raises(kind) as error:
        function()
    assert text in str(error.value)


class Fused(nn.Module):
    """Norms with an activation and a residual, between and behind linear layers."""

    @nn.compact
    def __call__(self, x):
        relu = functools.partial(Linen, activation=nn.relu)
        side = nn.Conv(4, (1, 1), name="side")(x)
        y = relu(name="first")(x)
        y = nn.Conv(4, (1, 1), name="conv1")(y)
        z = relu(name="behind")(y)
        z = nn.Conv(4, (1, 1), name="conv2")(z)
        z = relu(name="joined")(z, residual=side)
        z = Linen(name="between")(z)
        return nn.Conv(3, (1, 1), name="conv3")(z)


def test_an_activation_and_a_residual_stay(rng):
    """They are applied to what the layer before makes, and hide the one behind."""
    folded = folded_linen(rng, Fused(), normal(rng, 2, 3, 3, 5))
    assert folded.report["behind"] == "folded into conv1"
    assert folded.report["joined"] == "folded into conv2"
    # Not through "joined", which is folded, and still does something.
    assert folded.report["between"] == "folded into conv3"
    assert "it applies an activation or residual" in folded.report["first"]


def test_an_activation_of_nnx_stays(rng):
    model = nnx.Sequential(
        nnx.Linear(5, 4, rngs=RNGS),
        nnx_norm(4, activation=nnx.silu),
        nnx.Linear(4, 3, rngs=RNGS),
    )
    _, report = folded_nnx(rng, model, normal(rng, 6, 5))
    assert list(report.values()) == ["folded into layers/0"]
