"""`jax.numpy` functions as primitives.

Many functions of `jax.numpy` are jitted: each use costs a trace, a jaxpr and a private
function. A training step of a deep network has thousands of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def where(condition: Any, x: Any, y: Any) -> jax.Array:
    """`jnp.where` for arrays of one dtype, and Python numbers."""
    dtype = next(v.dtype for v in (x, y) if hasattr(v, "dtype"))
    x, y = (v if hasattr(v, "dtype") else np.asarray(v, dtype) for v in (x, y))
    shape = jnp.broadcast_shapes(condition.shape, x.shape, y.shape)
    return lax.select(*(broadcast_to(v, shape) for v in (condition, x, y)))


def broadcast_to(v: Any, shape: tuple[Any, ...]) -> Any:
    """`jnp.broadcast_to` for an array of the rank of `shape`, or a scalar."""
    if v.shape == shape:
        return v
    return lax.broadcast_in_dim(v, shape, range(v.ndim))


def total(v: jax.Array, axes: Any) -> jax.Array:
    """`v.sum(axes, keepdims=True)`, without a change of the dtype."""
    axes = tuple(a % v.ndim for a in axes)
    return lax.expand_dims(lax.reduce_sum(v, axes), axes) if axes else v
