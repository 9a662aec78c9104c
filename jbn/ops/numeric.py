"""Arithmetic in the dtype of statistics, with weights, without causing NaN."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact

from jbn.lowering.inline import broadcast_to, where
from jbn.ops.segments import Segments, spread, total


def wide(x: Inexact[Array, "..."]) -> Inexact[Array, "..."]:
    """Casts to the dtype of statistics: 16-bit floats to float32, others unchanged."""
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that statistics of `dtype` are computed in."""
    # Not `promote_types`, which raises under strict dtype promotion.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def real_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the absolute value of `dtype`."""
    return jnp.dtype(jnp.finfo(dtype).dtype)


def abs_square(x: jax.Array) -> jax.Array:
    """`abs(x)**2`, without computing the root."""
    if jnp.iscomplexobj(x):
        return x.real * x.real + x.imag * x.imag
    return x * x


def real_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The real part of `conj(x) * y`: the inner product of the plane."""
    if jnp.iscomplexobj(x):
        return x.real * y.real + x.imag * y.imag
    return x * y


def weigh(v: jax.Array, weights: jax.Array | None) -> jax.Array:
    """`weights * v`; zero where the weight is zero, even if `v` is not finite."""
    if weights is None:
        return v
    if weights.dtype == bool:
        return where(weights, v, 0)
    weighted = weights.astype(real_dtype(v.dtype)).astype(v.dtype) * v
    return where(weights > 0, weighted, 0)


def total_weight(
    x: jax.Array | jax.ShapeDtypeStruct,
    weights: jax.Array | None,
    axes: tuple[int, ...],
    segments: Segments | None = None,
) -> Float[Array, "..."]:
    """The sum of the weights of the rows of `x`, with the reduced axes at size 1."""
    dtype = real_dtype(wide_dtype(x.dtype))
    if weights is None and segments is None:
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return broadcast_to(count(x.shape, axes, dtype), shape)
    if weights is None:
        weights = jnp.ones((1,) * x.ndim, bool)
    # Count booleans in integers: float32 stops counting at 2**24.
    counted = weights.astype(jnp.int32) if weights.dtype == bool else wide(weights)
    if segments is not None:
        shape = jnp.broadcast_shapes(counted.shape, segments.ids.shape)
        counted = jnp.broadcast_to(counted, shape)
    # Along an axis of size 1, a weight stands for all rows of that axis.
    repeated = tuple(a for a in axes if counted.shape[a] != x.shape[a])
    found = total(counted, axes, segments).astype(dtype)
    return found * count(x.shape, repeated, dtype) if repeated else found


def count(shape: tuple[Any, ...], axes: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """The number of elements along `axes`, which may be symbolic."""
    number = math.prod(shape[a] for a in axes)
    if isinstance(number, int):
        return jnp.asarray(number, dtype)
    return jnp.asarray(number).astype(dtype)


def center(
    x: jax.Array,
    mean: jax.Array,
    weights: jax.Array | None,
    segments: Segments | None = None,
) -> jax.Array:
    """`x - mean` in wide arithmetic; 0 where a weightless `x` is not finite."""
    d = wide(x) - spread(mean, segments)
    part = takes_part(x, weights)
    return d if part is None else where(part, d, 0)


def takes_part(x: jax.Array, weights: jax.Array | None) -> Bool[Array, "..."] | None:
    """Whether an element has a weight or is finite; others are ignored entirely."""
    if weights is None:
        return None
    return (weights if weights.dtype == bool else weights != 0) | jnp.isfinite(x)


# Sums of weights near the largest float overflow, and their reciprocals underflow.
# Scaled by this, they do not. A power of two does not round.
DOWN = 2.0**-24


def scaled_down(weights: jax.Array | None) -> tuple[jax.Array | None, float]:
    """Scaled weights, whose sums are finite, and the inverse of the scale factor."""
    if weights is None or weights.dtype == bool:
        return weights, 1.0
    weights = wide(weights)
    return weights * np.asarray(DOWN, weights.dtype), DOWN


def scaled_up(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Undoes the scaling of a sum of weights; at most the largest float."""
    most = np.finfo(total.dtype).max
    return lax.min(total / DOWN, lax.full_like(total, most))


def reciprocal(total: jax.Array) -> jax.Array:
    """`1 / total`, and 0 for a total of 0: averages over nothing are zero."""
    some = total > 0
    return some.astype(total.dtype) / where(some, total, 1)


def difference(square: jax.Array, of_mean: jax.Array) -> jax.Array:
    """The variance `square - of_mean`: not negative, and not NaN if it overflows."""
    most = lax.full_like(of_mean, np.finfo(of_mean.dtype).max)
    return lax.max(square - lax.min(of_mean, most), lax.full_like(square, 0))


def coarse(shift: jax.Array) -> jax.Array:
    """Drops the last bits of a shift, so that every use of it is the same number.

    XLA copies the arithmetic of the shift into each loop that reads it, and LLVM may
    contract it there to a fused multiply-add, which rounds differently. At a mean of
    1e4 standard deviations the relative error of the variance would be 3e-4. A rounding
    in between prevents the contraction.
    """
    if jnp.iscomplexobj(shift):
        return lax.complex(coarse(shift.real), coarse(shift.imag))
    info = jnp.finfo(shift.dtype)
    return lax.reduce_precision(
        shift, exponent_bits=info.nexp, mantissa_bits=info.nmant - 3
    )
