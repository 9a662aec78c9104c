"""Preparation of images, common to all models."""

import jax
import jax.numpy as jnp

from jbn.typing import ArrayLike


def as_unit(x: ArrayLike) -> jax.Array:
    """Scales integer images from 0..255 to 0..1; others are unchanged."""
    y = jnp.asarray(x)
    if jnp.issubdtype(y.dtype, jnp.integer):
        y = y.astype(jnp.float32) / 255.0
    return y


def without_masked(
    y: jax.Array, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    """Replaces masked rows by zeros.

    Norms ignore masked NaN, but the gradient of a kernel does not.

    Args:
        y: Of shape `(batch, ...)`.
        mask: Of shape `(batch,)`, or `None`.

    Returns:
        The new array, and the mask at its rank: of shape `(batch, 1, ...)`, or `None`.
    """
    if mask is None:
        return y, None
    rows = jnp.expand_dims(jnp.asarray(mask), range(1, y.ndim))
    return jnp.where(rows, y, jnp.zeros((), y.dtype)), rows


def dropped(y: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Sets a fraction of the units to zero (dropout).

    The units depend only on the key of each row, so the result does not depend on how
    rows are distributed over devices.

    Args:
        y: Of shape `(batch, ...)`.
        rate: The fraction; other units are scaled by `1 / (1 - rate)`.
        keys: One for each row; `None` drops nothing.

    Returns:
        The new array.
    """
    if keys is None or not rate:
        return y
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, y.shape[1:]))(keys)
    return jnp.where(keep, y / (1 - rate), jnp.zeros((), y.dtype))


def key_of_layer(keys: jax.Array | None, layer: int) -> jax.Array | None:
    """The keys for one of several layers."""
    if keys is None:
        return None
    return jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys)
