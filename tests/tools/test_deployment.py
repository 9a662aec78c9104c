"""Inference of other people's models, folded and not, exported for any batch size."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from foreign import MODELS, NNX, Copied, NnxCopied, nnx_set, nnx_started, started
from jax import export

import jbn.linen
import jbn.nnx
from jbn.tools import convert, fold


# Sizes that are not known are no integers to a type checker.
pytestmark = pytest.mark.usefixtures("standard_promotion", "untyped")


@pytest.fixture(autouse=True)
def flatbuffers():
    pytest.importorskip("flatbuffers")


def serve(f: Callable[..., Any], state: Any, x: Any) -> Callable[..., Any]:
    """`f(state, x)` exported for any batch size, serialized, and loaded."""
    (b,) = export.symbolic_shape("b")
    described = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), state)
    rows = jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(f))(described, rows)
    return export.deserialize(exported.serialize()).call


def assert_served(f, state, x, wanted):
    """Of one row and of all, against the outputs of the project's own model."""
    served = serve(f, state, x)
    # Networks of several layers amplify what folding rounds.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    size = 1e-5 * float(abs(wanted).max())
    close(served(state, x), wanted, atol=size)
    close(served(state, x[:1]), wanted[:1], atol=size)


class Residual(nn.Module):
    """As jax-resnet: blocks that know their mode by what is mutable."""

    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        train = self.is_mutable_collection("batch_stats")
        norm = functools.partial(self.norm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        y = nn.Conv(4, (3, 3), strides=2, feature_group_count=4, use_bias=False)(x)
        y = norm()(nn.Conv(6, (1, 1), use_bias=False)(nn.relu(norm()(y))))
        skip = norm()(nn.Conv(6, (1, 1), strides=2, use_bias=False)(x))
        return nn.Dense(2)(nn.relu(y + skip).mean((1, 2)))


class Generator(nn.Module):
    """As in a DCGAN: rows become images; the last layer pads with zeros."""

    @nn.compact
    def __call__(self, z):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Dense(12, use_bias=False)(z)))
        x = x.reshape(x.shape[0], 2, 2, 3)
        x = nn.ConvTranspose(4, (4, 4), strides=(2, 2), use_bias=False)(x)
        return nn.tanh(nn.ConvTranspose(1, (4, 4), strides=(2, 2))(norm()(x)))


class UNet(nn.Module):
    """As in scenic: a copied norm, features that are concatenated, unpooling."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(Copied, use_running_average=True)
        high = nn.relu(norm()(nn.Conv(3, (3, 3))(x)))
        low = nn.max_pool(high, (2, 2), strides=(2, 2))
        low = nn.relu(norm()(nn.Conv(4, (3, 3))(low)))
        low = jax.image.resize(low, (*high.shape[:-1], 4), "nearest")
        return nn.Conv(2, (1, 1))(norm()(jnp.concatenate([high, low], -1)))


class Scanned(nn.Module):
    """One norm is inside `scan`, and kept; the other is folded."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        block = nn.scan(Block, variable_axes=axes, split_rngs=axes, length=2)
        x, _ = block()(x, None)
        return Copied(use_running_average=True)(nn.Dense(3)(x))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Copied(use_running_average=True)(nn.Dense(3)(x)), None


# A model, the arguments of its call, `also`, the shape of its input, norms folded.
LINEN = {
    **{name: (m, (False,), also, (4, 3), 1) for name, (m, also, *_) in MODELS.items()},
    "residual": (Residual(nn.BatchNorm), (), None, (4, 6, 6, 2), 4),
    "residual, ours": (Residual(jbn.linen.BatchNorm), (), None, (4, 6, 6, 2), 4),
    "generator": (Generator(), (), None, (4, 5), 2),
    "U-Net": (UNet(), (), None, (4, 4, 4, 2), 3),
    "scanned": (Scanned(), (), None, (4, 3), 1),
}


# Most of the time is for compiling.
SLOW = "residual, ours", "scanned", "separable, copied", "separable, ours"


def cases(table):
    marks = lambda name: [pytest.mark.slow] if name in SLOW else []
    params = [pytest.param(name, marks=marks(name)) for name in table]
    return pytest.mark.parametrize("name", params)


@cases(LINEN)
def test_linen(name, rng):
    model, args, also, shape, folds = LINEN[name]
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    variables = started(model, x, *args)
    theirs = lambda v, x: model.apply(v, x, *args)
    wanted = jax.jit(theirs)(variables, x)
    assert_served(theirs, variables, x, wanted)
    new = convert(model, also=also)
    assert_served(lambda v, x: new.apply(v, x, *args), variables, x, wanted)
    folded = fold(model, variables, x, *args, also=also)
    assert sum(text.startswith("folded") for text in folded.report.values()) == folds
    apply = lambda v, x: folded.apply(v, x, *args)
    assert_served(apply, folded.variables, x, wanted)


class Separable(nnx.Module):
    """As in bonsai: a depthwise convolution, norms, and a head."""

    def __init__(self, norm, rngs):
        self.depthwise = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=rngs)
        self.first = norm(4, rngs=rngs)
        self.pointwise = nnx.Conv(4, 6, (1, 1), use_bias=False, rngs=rngs)
        self.last = norm(6, rngs=rngs)
        self.head = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.silu(self.first(self.depthwise(x)))
        x = self.last(self.pointwise(x))
        return self.head(x.mean((1, 2)))


IN_NNX = {
    **{name: (cls, also, 1) for name, (cls, also, _) in NNX.items()},
    "separable": (nnx.BatchNorm, None, 2),
    "separable, ours": (jbn.nnx.BatchNorm, None, 2),
    "separable, copied": (NnxCopied, None, 2),
}


@cases(IN_NNX)
def test_nnx(name, rng):
    cls, also, folds = IN_NNX[name]
    if name in NNX:
        model, shape = nnx_set(nnx_started(cls), True), (4, 3)
    else:
        model, shape = Separable(cls, nnx.Rngs(0)), (4, 6, 6, 4)
        model.first.use_running_average = model.last.use_running_average = True
        draw = lambda v: jnp.asarray(rng.uniform(0.5, 2.0, v.shape), v.dtype)
        nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    x = jnp.asarray(rng.normal(size=shape), jnp.float32)
    wanted = nnx.jit(model)(x)
    folded = fold(model, x, also=also)
    norms = [v for _, v in nnx.iter_graph(folded) if type(v).__name__ == "FoldedNorm"]
    assert len(norms) == folds
    for served in (model, convert(model, also=also), folded):
        graph, state = nnx.split(served)
        arrays, tree = jax.tree.flatten(state)
        call = functools.partial(merged_call, graph, tree)
        assert_served(call, arrays, x, wanted)


def merged_call(graph, tree, arrays, x):
    return nnx.merge(graph, jax.tree.unflatten(tree, arrays))(x)
