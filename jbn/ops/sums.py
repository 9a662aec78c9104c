"""Sums over rows, and what they are the transpose of, made fast where this will run."""

import jax
import jax.numpy as jnp

from jbn.ops.cpu import Fold, Merged


def total(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums `v` over `axes`, which stay at size 1."""
    whole = Merged.of(axes, v)
    return whole.stat(whole.view(v).sum(whole.axes, keepdims=True))


def repeat(stat: jax.Array, like: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Has `stat`, of size 1 along `axes`, broadcast to `like`.

    The transpose of that is a sum. Where it can be merged and folded, `stat` is
    repeated here.
    """
    whole = Merged.of(axes, like)
    view = whole.view(like)
    fold = Fold.of(view.shape, whole.axes)
    if fold is None and view.ndim == like.ndim:
        return stat
    # What is the same on all devices is summed over them when it is transposed: as it
    # is here, not as it is repeated. These zeros vary from device to device as `like`.
    stat = whole.view(stat)
    stat = stat + jnp.zeros_like(like, stat.dtype, stat.shape)
    if fold is None:
        repeated = jnp.broadcast_to(stat, view.shape)
    else:
        repeated = fold.repeat(stat, view.shape)
    return repeated.reshape(like.shape)
