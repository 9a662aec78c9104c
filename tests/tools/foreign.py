"""Batch norms as other projects have them, and small networks with them."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx


# --- Linen ---------------------------------------------------------------------------


class Copied(nn.Module):
    """As in flaxmodels and scenic: a copy of Flax's, with its fields."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.7
    epsilon: float = 1e-2
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None
    mean_init: Any = nn.initializers.zeros  # as in older copies

    @nn.compact
    def __call__(self, x, use_running_average=None):
        mode = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        m, v = mean.value, var.value
        if not mode:
            axes = tuple(range(x.ndim - 1))
            m, v = x.mean(axes), x.var(axes)
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
        y = (x - m) / jnp.sqrt(v + self.epsilon)
        if self.use_scale:
            y = y * self.param("scale", nn.initializers.ones, shape)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, shape)
        return y


class Torchlike(nn.Module):
    """As in efficientnet-jax and jraphx: PyTorch's names, and its momentum."""

    momentum: float = 0.3
    eps: float = 1e-2

    @nn.compact
    def __call__(self, x, training: bool):
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "running_mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "running_var", jnp.ones, shape)
        m, v = mean.value, var.value
        if training:
            axes = tuple(range(x.ndim - 1))
            m, v = x.mean(axes), x.var(axes)
            if not self.is_initializing():
                mean.value += self.momentum * (m - mean.value)
                var.value += self.momentum * (v - var.value)
        weight = self.param("weight", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return (x - m) / jnp.sqrt(v + self.eps) * weight + bias


TORCH = {
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
    "epsilon": "eps",
    "momentum": lambda layer: 1 - layer.momentum,
}


class Net(nn.Module):
    norm: Callable[[], nn.Module]
    flag: str = "use_running_average"

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3)(x)
        mode = train if self.flag == "training" else not train
        return nn.Dense(2)(self.norm(name="norm")(x, **{self.flag: mode}))


MODELS = {
    "copied": (Net(Copied), None, ("mean", "var", "scale"), 0.7),
    "torch": (
        Net(Torchlike, "training"),
        {Torchlike: TORCH},
        ("running_mean", "running_var", "weight"),
        0.7,
    ),
}


def started(model, x, *args):
    """Variables of which none is as it was initialized."""
    rng = np.random.default_rng(1)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, *args))
    return jax.tree.map(
        lambda v: jnp.asarray(rng.uniform(0.5, 2.0, v.shape), v.dtype), variables
    )


# --- NNX -----------------------------------------------------------------------------


class NnxCopied(nnx.Module):
    def __init__(self, num_features, *, epsilon=1e-2, momentum=0.7, rngs):
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.var = nnx.BatchStat(jnp.ones(num_features))
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.num_features = num_features
        self.epsilon, self.momentum = epsilon, momentum
        self.use_running_average = False

    def __call__(self, x):
        m, v = self.mean[...], self.var[...]
        if not self.use_running_average:
            m, v = x.mean(0), x.var(0)
            for old, new in ((self.mean, m), (self.var, v)):
                old[...] = self.momentum * old[...] + (1 - self.momentum) * new
        y = (x - m) / jnp.sqrt(v + self.epsilon)
        return y * self.scale[...] + self.bias[...]


class _NnxTorch(nnx.Module):
    """A batch norm with PyTorch's attribute names; subclasses define `__call__`."""

    def __init__(self, size, *, rngs):
        self.running_mean = nnx.BatchStat(jnp.zeros(size))
        self.running_var = nnx.BatchStat(jnp.ones(size))
        self.weight = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.eps, self.momentum = 1e-2, 0.3

    def _normalized(self, x, mean, var):
        y = (x - mean) / jnp.sqrt(var + self.eps)
        return y * self.weight[...] + self.bias[...]

    def _update(self, mean, var):
        for old, new in ((self.running_mean, mean), (self.running_var, var)):
            old[...] += self.momentum * (new - old[...])


class NnxTorchlike(_NnxTorch):
    def __init__(self, size, *, rngs):
        super().__init__(size, rngs=rngs)
        self.use_running_average = False

    def __call__(self, x):
        m, v = self.running_mean[...], self.running_var[...]
        if not self.use_running_average:
            m, v = x.mean(0), x.var(0)
            self._update(m, v)
        return self._normalized(x, m, v)


class NnxNet(nnx.Module):
    def __init__(self, norm, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.norm = norm(3, rngs=rngs)
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


NNX = {
    "copied": (NnxCopied, None, ("mean", "var", "scale")),
    "torch": (
        NnxTorchlike,
        {NnxTorchlike: TORCH},
        ("running_mean", "running_var", "weight"),
    ),
}


def nnx_started(cls, net=NnxNet):
    model = net(cls, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    draw = lambda v: jnp.asarray(rng.uniform(0.5, 2.0, v.shape), v.dtype)
    nnx.update(model, jax.tree.map(draw, nnx.state(model)))
    return model


def nnx_set(model, inference):
    model.norm.use_running_average = inference
    return model


class NnxOwnCall(_NnxTorch):
    """As in jraphx: arguments that Flax's has not, and a mask of rows."""

    def __call__(self, x, graph=None, *, training=False, rows=None):
        m, v = self.running_mean[...], self.running_var[...]
        if training:
            rows = jnp.ones(len(x)) if rows is None else rows
            m = jnp.average(x, 0, rows)
            v = jnp.average((x - m) ** 2, 0, rows)
            self._update(m, v)
        return self._normalized(x, m, v)


class NnxByClass(nnx.Module):
    """Calls its norms by their class, as jraphx and many with Flax's do."""

    def __init__(self, norm, rngs):
        norms = norm(4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
        dense = [nnx.Linear(4, 4, rngs=rngs) for _ in norms]
        self.layers = nnx.List([dense[0], norms[0], dense[1], norms[1]])

    def __call__(self, x, train=False, graph=None, rows=None):
        for layer in self.layers:
            if isinstance(layer, NnxOwnCall):
                x = layer(x, graph, training=train, rows=rows)
            elif isinstance(layer, nnx.BatchNorm):
                x = layer(x, use_running_average=not train)
            else:
                x = layer(x)
        return x


class Padded(nn.Module):
    """As in bobbin: a field and an argument for padding, which becomes zero."""

    use_running_average: bool | None = None
    padded_axis: int = -2
    momentum: float = 0.7
    epsilon: float = 1e-2

    @nn.compact
    def __call__(self, x, paddings):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        m, v, real = mean.value, var.value, 1 - paddings[..., None]
        if not self.use_running_average:
            axes = tuple(range(x.ndim - 1))
            m = (x * real).sum(axes) / real.sum()
            v = ((x - m) ** 2 * real).sum(axes) / real.sum()
            if not self.is_initializing():
                mean.value = self.momentum * mean.value + (1 - self.momentum) * m
                var.value = self.momentum * var.value + (1 - self.momentum) * v
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return (x - m) / jnp.sqrt(v + self.epsilon) * scale * real


class PaddedNet(nn.Module):
    @nn.compact
    def __call__(self, x, paddings, train):
        x = Padded(not train, name="norm")(nn.Dense(3)(x), paddings)
        return nn.Dense(2)(x)


class Turned(nn.BatchNorm):
    """A subclass of Flax's with the opposite flag, in the same place."""

    @nn.compact
    def __call__(self, x, train):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x, use_running_average=not train)


class NnxTurned(nnx.BatchNorm):
    def __call__(self, x, train):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x, use_running_average=not train)
