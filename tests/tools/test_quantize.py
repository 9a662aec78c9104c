"""Kernels quantized as they are after folding: against NumPy, PyTorch and `fold`."""

# pyright: reportArgumentType=false, reportCallIssue=false

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from foreign import MODELS, Copied, started
from jax import lax
from peers import load_peer

import jbn.linen
from jbn.linen import BatchNorm, FrozenBatchNorm
from jbn.models import ResNet
from jbn.tools import convert, fold, quantizer


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def int8(kernel):
    """The nearest multiples of a step for each output feature; straight through."""
    axes = tuple(range(kernel.ndim - 1))
    step = abs(kernel).max(axes, keepdims=True) / 127
    step = jnp.where(step == 0, 1, step)
    rounded = jnp.round(kernel / step) * step
    return kernel + lax.stop_gradient(rounded - kernel)


def int8_in_numpy(kernel):
    """The same of (inputs, outputs), in a loop."""
    new = np.zeros_like(kernel)
    for j in range(kernel.shape[-1]):
        step = abs(kernel[:, j]).max() / 127
        if step:
            new[:, j] = np.rint(kernel[:, j] / step) * step
    return new


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5, use_bias=False)(x)
        return BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)


def trained(model, variables, x):
    return model.apply(variables, x, True, mutable=["batch_stats"])


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(8, 3)) * 2 + 1, jnp.float32)


@pytest.fixture
def variables(x):
    """Of `Dense`; one scale is zero."""
    found = started(Dense(), x, False)
    scale = jnp.asarray([1.5, -0.7, 0.0, 2.0, 0.3])
    found["params"]["norm"]["scale"] = scale
    return found


def test_forward_and_gradients_are_those_of_the_formula(x, variables, rng):
    """In float64: the kernel is `int8(kernel * gain) / gain`, or as it is."""
    prepare = quantizer(Dense(), variables, x, False, quantize=int8)
    assert prepare.report == {"Dense_0": "quantized with norm"}
    ct = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grads(params):
        y, new = trained(Dense(), prepare({**variables, "params": params}), x)
        return (y * ct).sum(), (y, new["batch_stats"]["norm"])

    found, (y, stats) = grads(variables["params"])
    wide = jax.tree.map(lambda v: np.asarray(v, float), variables)
    kernel, old = wide["params"]["Dense_0"]["kernel"], wide["batch_stats"]["norm"]
    scale, bias = (wide["params"]["norm"][name] for name in ("scale", "bias"))
    gain = scale / np.sqrt(old["var"] + 1e-5)
    new = kernel.copy()
    some = gain != 0
    new[:, some] = int8_in_numpy((kernel * gain)[:, some]) / gain[some]
    assert abs(new - kernel).max() > 1e-4
    h = np.asarray(x, float) @ new
    rstd = 1 / np.sqrt(h.var(0) + 1e-5)
    xh = (h - h.mean(0)) * rstd
    close(y, xh * scale + bias, atol=1e-4)
    close(stats["mean"], 0.5 * old["mean"] + 0.5 * h.mean(0))
    close(stats["var"], 0.5 * old["var"] + 0.5 * h.var(0))
    dy = np.asarray(ct, float)
    dh = scale * rstd * (dy - dy.mean(0) - xh * (dy * xh).mean(0))
    close(found["norm"]["scale"], (dy * xh).sum(0), atol=1e-4)
    close(found["norm"]["bias"], dy.sum(0), atol=1e-4)
    close(found["Dense_0"]["kernel"], np.asarray(x, float).T @ dh, atol=2e-4)
    assert abs(found["norm"]["scale"][2]) > 0.1


@pytest.mark.peers("torch")
def test_training_is_that_of_torch_but_for_a_scale_of_zero(rng):
    torch = load_peer("torch")
    qat = pytest.importorskip("torch.ao.nn.intrinsic.qat")
    ao = pytest.importorskip("torch.ao.quantization")
    weight = ao.FakeQuantize.with_args(
        observer=ao.PerChannelMinMaxObserver,
        quant_min=-127,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    config = ao.QConfig(activation=torch.nn.Identity, weight=weight)
    theirs = qat.ConvBn2d(3, 4, 3, bias=False, qconfig=config)

    class Conv(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Conv(4, (3, 3), padding="VALID", use_bias=False, name="conv")(x)
            norm = BatchNorm(momentum=0.9, unbiased=True, name="norm")
            return norm(x, use_running_average=not train)

    x = np.float32(rng.normal(size=(2, 5, 5, 3)))
    variables = started(Conv(), x, False)
    variables["params"]["conv"]["kernel"] -= 1.2
    prepare = quantizer(Conv(), variables, x, False, quantize=int8)

    def run(scale):
        variables["params"]["norm"]["scale"] = jnp.asarray(scale, jnp.float32)
        values = {
            "weight": variables["params"]["conv"]["kernel"].transpose(3, 2, 0, 1),
            "bn.weight": variables["params"]["norm"]["scale"],
            "bn.bias": variables["params"]["norm"]["bias"],
            "bn.running_mean": variables["batch_stats"]["norm"]["mean"],
            "bn.running_var": variables["batch_stats"]["norm"]["var"],
        }
        values = {k: torch.tensor(np.asarray(v)) for k, v in values.items()}
        theirs.load_state_dict(theirs.state_dict() | values)
        y = theirs(torch.tensor(x.transpose(0, 3, 1, 2))).detach()
        ours, new = jax.jit(lambda v: trained(Conv(), prepare(v), x))(variables)
        return y.numpy().transpose(0, 2, 3, 1), ours, new["batch_stats"]["norm"]

    want, y, stats = run([1.5, -0.7, 2.0, 0.3])
    close(y, want, atol=1e-4)
    close(stats["mean"], theirs.bn.running_mean.numpy())
    close(stats["var"], theirs.bn.running_var.numpy())
    want, y, stats = run([1.5, 0.0, 2.0, 0.3])
    assert np.isnan(want[..., 1]).all()
    close(
        y[..., 1], np.full(want[..., 1].shape, variables["params"]["norm"]["bias"][1])
    )
    assert all(np.isfinite(v).all() for v in stats.values())


def kernels(variables):
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    found = {jax.tree_util.keystr(k): v for k, v in leaves}
    return {k: v for k, v in found.items() if "kernel" in k}


def assert_deployed(model, variables, prepare, x, *args):
    """The network that is trained is the folded one, which has quantized kernels."""
    prepared = prepare(variables)
    assert jax.tree.structure(prepared) == jax.tree.structure(variables)
    folded = fold(model, prepared, x, *args)
    wanted = jax.jit(lambda v: model.apply(v, x, *args))(prepared)
    y = jax.jit(lambda v: folded.apply(v, x, *args))(folded.variables)
    close(y, wanted, atol=1e-5 * float(abs(wanted).max()))
    for kernel in kernels(folded.variables).values():
        close(int8(kernel), kernel, atol=1e-6 * float(abs(kernel).max()))
    assert any(
        abs(new - old).max() > 1e-3
        for new, old in zip(
            kernels(prepared).values(), kernels(variables).values(), strict=True
        )
    )


@pytest.mark.slow
def test_a_residual_network_is_the_folded_one(rng):
    network = ResNet(stage_sizes=(1, 1), widths=(4, 6), num_classes=3, stem="small")
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 2)), jnp.float32)
    model = Inference(network)
    variables = started(model, x)
    prepare = quantizer(model, variables, x, quantize=int8)
    assert prepare.report["network/head"] == "quantized"
    block = "network/stage2_block1"
    want = f"quantized with {block}/shortcut_norm"
    assert prepare.report[f"{block}/shortcut_conv"] == want
    assert len(prepare.report) == 7
    assert_deployed(model, variables, prepare, x)


class Inference(nn.Module):
    network: nn.Module

    def __call__(self, x):
        return self.network(x, train=False)


class Grouped(nn.Module):
    """A norm before a dense layer, groups, a transposed kernel, and a foreign norm."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(Copied, use_running_average=True)
        x = nn.Conv(4, (3, 3), feature_group_count=2)(x)
        x = nn.relu(norm()(x))
        x = nn.relu(norm()(nn.ConvTranspose(3, (2, 2), strides=(2, 2))(x)))
        x = x.mean((1, 2))
        return nn.Dense(2)(norm()(nn.relu(x)))


@pytest.mark.usefixtures("standard_promotion")
def test_other_layers_and_norms(rng):
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 4)), jnp.float32)
    variables = started(Grouped(), x)
    prepare = quantizer(Grouped(), variables, x, quantize=int8)
    assert prepare.report == {
        "Conv_0": "quantized with Copied_0",
        "ConvTranspose_0": "quantized with Copied_1",
        "Dense_0": "quantized with Copied_2",
    }
    assert_deployed(Grouped(), variables, prepare, x)
    model, also, *_ = MODELS["torch"]
    rows = x[:, 0, 0, :3]
    variables = started(model, rows, False)
    prepare = quantizer(
        model, variables, rows, False, quantize=int8, also=also, where="Dense_0"
    )
    assert prepare.report == {"Dense_0": "quantized with norm"}
    kernel = variables["params"]["Dense_0"]["kernel"]
    stats, params = variables["batch_stats"]["norm"], variables["params"]["norm"]
    gain = np.asarray(params["weight"], float) / np.sqrt(stats["running_var"] + 1e-2)
    want = int8_in_numpy(np.asarray(kernel, float) * gain) / gain
    close(prepare(variables)["params"]["Dense_0"]["kernel"], want)


def test_statistics_are_frozen_later(x, variables):
    prepare = quantizer(Dense(), variables, x, False, quantize=int8)
    frozen = convert(Dense(), FrozenBatchNorm, freeze_affine=False)
    y, new = trained(frozen, prepare(variables), x)
    folded = fold(Dense(), prepare(variables), x, False)
    close(y, folded.apply(folded.variables, x, False))
    jax.tree.map(close, new["batch_stats"], variables["batch_stats"])


def test_what_is_kept_is_reported(x):
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            layer = nn.Dense(3)
            norm = jbn.linen.BatchNorm(use_running_average=not train, name="norm")
            return nn.Dense(2)(norm(layer(layer(x))))

    variables = started(Shared(), x, False)
    prepare = quantizer(Shared(), variables, x, False, quantize=int8)
    assert prepare.report["Dense_0"].startswith("kept: it is called 2 times")
    new = prepare(variables)["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(new, variables["params"]["Dense_0"]["kernel"])


@pytest.mark.usefixtures("untyped")
def test_refusals(x, variables):
    make = functools.partial(quantizer, Dense(), variables, x, quantize=int8)
    with pytest.raises(ValueError, match="'norm' normalizes by the batch"):
        make(True)
    with pytest.raises(ValueError, match=re.escape("where='dense', the model has ['D")):
        make(False, where="dense")
    with pytest.raises(TypeError, match="must be known; got a traced array"):
        jax.jit(lambda v: quantizer(Dense(), v, x, False, quantize=int8))(variables)
    with pytest.raises(TypeError, match="takes a Linen model; got the NNX model"):
        quantizer(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {}, x, quantize=int8)
    model = nn.Dense(2)
    variables = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="`quantizer` found no batch norm"):
        quantizer(model, variables, x, quantize=int8)
