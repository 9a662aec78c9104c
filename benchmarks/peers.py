"""Norm layers of all libraries on JAX, to be timed and weighed alike.

Each is made of a number of features and the dtype of the input: a function of
`(params, state, x, train)` that gives the output and the new state, and its `params`
and `state`.
"""

import functools

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jbn
import jbn.nnx


OURS, FLAX = "jbn", "flax.linen"


def jbn_linen(features, dtype):
    """The Linen module, as a function of variables and input."""
    layer = jbn.BatchNorm()
    return of_linen(layer, features, dtype)


def flax_linen(features, dtype, fast=True):
    """Likewise."""
    layer = nn.BatchNorm(dtype=dtype, use_fast_variance=fast)
    return of_linen(layer, features, dtype)


def of_linen(layer, features, dtype):
    """A function of (params, state, x, train), and its params and state."""
    rows = jnp.zeros((2, features), dtype)
    variables = layer.init(jax.random.key(0), rows, use_running_average=True)

    def apply(params, state, x, train):
        variables = {"params": params, "batch_stats": state}
        y, updated = layer.apply(
            variables, x, use_running_average=not train, mutable=["batch_stats"]
        )
        return y, updated["batch_stats"]

    return apply, variables["params"], variables["batch_stats"]


def of_nnx(cls, features, dtype):
    """Likewise, of an NNX module taken apart."""
    layer = cls(features, dtype=dtype, rngs=nnx.Rngs(0))
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def apply(params, state, x, train):
        layer = nnx.merge(graph, params, state, copy=True)
        y = layer(x, use_running_average=not train)
        return y, nnx.split(layer, nnx.Param, ...)[2]

    return apply, params, state


def function(features, dtype):
    """The function itself."""
    params, stats = jbn.init(features)

    def apply(params, stats, x, train):
        return jbn.batch_norm(x, params, stats, use_running_average=not train)

    return apply, params, stats


def of_evidence(make, features, dtype):
    """Norms that the other scripts have: parameters of the dtype of the input."""
    norm = make(0.99)
    params, state = norm.init(features, dtype)

    def apply(params, state, x, train):
        return norm.apply(params, state, x, train=train)

    return apply, params, state


NORMS = {
    OURS: function,
    "jbn.linen": jbn_linen,
    "jbn.nnx": functools.partial(of_nnx, jbn.nnx.BatchNorm),
    FLAX: flax_linen,
    "flax.linen, two passes": functools.partial(flax_linen, fast=False),
    "flax.nnx": functools.partial(of_nnx, nnx.BatchNorm),
    "Haiku": functools.partial(of_evidence, evidence.Haiku),
    "Equinox": functools.partial(of_evidence, evidence.Equinox),
    "Keras": functools.partial(of_evidence, evidence.Keras),
}
