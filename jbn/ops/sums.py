"""Sums over rows, and what they are the transpose of, made fast where this will run."""

import jax
import jax.numpy as jnp

from jbn.ops.cpu import Fold, Merged
from jbn.ops.gpu import Blocks


def total(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums `v` over `axes`, which stay at size 1."""
    blocks = Blocks.of(v.shape, axes)
    if blocks is not None:
        return blocks.total(v)
    whole = Merged.of(axes, v)
    return whole.stat(whole.view(v).sum(whole.axes, keepdims=True))


def repeat(stat: jax.Array, like: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Has `stat`, of size 1 along `axes`, broadcast to `like`.

    The transpose of that is a sum. Where that is taken in a way of its own, `stat` is
    repeated here.
    """
    whole = Merged.of(axes, like)
    view = whole.view(like)
    fold = Fold.of(view.shape, whole.axes)
    blocks = Blocks.of(like.shape, axes)
    if fold is None and blocks is None and view.ndim == like.ndim:
        return stat
    # What is the same on all devices is summed over them when it is transposed: as it
    # is here, not as it is repeated. These zeros vary from device to device as `like`.
    stat = stat + jnp.zeros_like(like, stat.dtype, stat.shape)
    if blocks is not None:
        return blocks.repeat(stat, like.shape)
    stat = whole.view(stat)
    if fold is None:
        repeated = jnp.broadcast_to(stat, view.shape)
    else:
        repeated = fold.repeat(stat, view.shape)
    return repeated.reshape(like.shape)
