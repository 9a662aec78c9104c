"""What all models do to their images first."""

import jax
import jax.numpy as jnp

from jbn.typing import ArrayLike


def as_unit(x: ArrayLike) -> jax.Array:
    """Images in 0..1: integers are of 0..255, and any others are taken as they are."""
    y = jnp.asarray(x)
    if jnp.issubdtype(y.dtype, jnp.integer):
        y = y.astype(jnp.float32) / 255.0
    return y


def without_masked(
    y: jax.Array, mask: ArrayLike | None
) -> tuple[jax.Array, jax.Array | None]:
    """Puts zeros in place of what is masked.

    Norms leave masked NaN alone, but the gradient of a kernel does not.

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
