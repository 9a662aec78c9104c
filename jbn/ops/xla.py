"""The passes over memory, in plain JAX: what every kernel has to reproduce.

Everything here is local to a device and keeps reduced axes with size 1, so that
results broadcast against the input.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.ops.cpu import Fold, once
from jbn.ops.segments import Segments, spread, total


# Rows that the shift is taken from, at most: enough for its distance from the mean to
# be a fraction of a standard deviation, few enough to cost nothing.
_SAMPLE_ROWS = 64


def wide(x: jax.Array) -> jax.Array:
    """Casts to the dtype of statistics: 16-bit floats to float32, others kept."""
    return x.astype(wide_dtype(x.dtype))


def wide_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype that statistics of `dtype` are computed in."""
    # Not `promote_types`, which raises under strict dtype promotion.
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def real_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the absolute value of `dtype`."""
    return jnp.dtype(jnp.finfo(dtype).dtype)


def abs_square(x: jax.Array) -> jax.Array:
    """`abs(x)**2`, without the root."""
    if jnp.iscomplexobj(x):
        return jnp.square(x.real) + jnp.square(x.imag)
    return jnp.square(x)


def real_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """The real part of `conj(x) * y`: the inner product of the plane."""
    if jnp.iscomplexobj(x):
        return x.real * y.real + x.imag * y.imag
    return x * y


def weigh(v: jax.Array, weights: jax.Array | None) -> jax.Array:
    """`weights * v`, and zero where the weight is, even if `v` is not finite there."""
    if weights is None:
        return v
    if weights.dtype == bool:
        return jnp.where(weights, v, jnp.zeros_like(v))
    weighted = weights.astype(real_dtype(v.dtype)).astype(v.dtype) * v
    return jnp.where(weights > 0, weighted, jnp.zeros_like(v))


def total_weight(
    x: jax.Array | jax.ShapeDtypeStruct,
    weights: jax.Array | None,
    axes: tuple[int, ...],
    segments: Segments | None = None,
) -> jax.Array:
    """The sum of the weights of the rows of `x`."""
    dtype = real_dtype(wide_dtype(x.dtype))
    if weights is None and segments is None:
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return jnp.full(shape, math.prod(x.shape[a] for a in axes), dtype)
    if weights is None:
        weights = jnp.ones((1,) * x.ndim, bool)
    # Booleans are counted in integers: float32 stops counting at 2**24.
    counted = weights.astype(jnp.int32) if weights.dtype == bool else wide(weights)
    if segments is not None:
        shape = jnp.broadcast_shapes(counted.shape, segments.ids.shape)
        counted = jnp.broadcast_to(counted, shape)
    # Along an axis where the weights do not vary each stands for all of its rows.
    repeats = math.prod(x.shape[a] for a in axes if counted.shape[a] != x.shape[a])
    return total(counted, axes, segments).astype(dtype) * repeats


def center(
    x: jax.Array,
    mean: jax.Array,
    weights: jax.Array | None,
    segments: Segments | None = None,
) -> jax.Array:
    """`x - mean` in wide arithmetic; zero where a weightless `x` is not finite."""
    d = wide(x) - spread(mean, segments)
    ignored = no_part(x, weights)
    return d if ignored is None else jnp.where(ignored, jnp.zeros_like(d), d)


def no_part(x: jax.Array, weights: jax.Array | None) -> jax.Array | None:
    """The elements that take no part at all: weightless and not finite."""
    if weights is None:
        return None
    weightless = ~weights if weights.dtype == bool else weights == 0
    return weightless & ~jnp.isfinite(x)


def reciprocal(total: jax.Array) -> jax.Array:
    """`1 / total`, and 0 for a total of 0: averages over nothing are zero."""
    some = total > 0
    return jnp.where(some, 1 / jnp.where(some, total, jnp.ones_like(total)), 0)


def difference(square: jax.Array, of_mean: jax.Array) -> jax.Array:
    """The variance `square - of_mean`: not negative, and not NaN if it overflows."""
    var = jnp.maximum(square - of_mean, 0)
    return jnp.where(jnp.isinf(square), square, var)


def summarize(
    x: jax.Array,
    weights: jax.Array | None,
    axes: tuple[int, ...],
    segments: Segments | None = None,
    near: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Takes `(weight, shift, offset, var)` of `x` over `axes`; mean = shift + offset.

    One pass about a shift: `offset = <x - shift>` and
    `var = <abs(x - shift)**2> - abs(offset)**2`, which loses nothing as long as the
    shift is within a few standard deviations of the mean (Chan, Golub and LeVeque,
    "Algorithms for computing the sample variance", 1983). The mean is returned in two
    parts because its float32 rounding, squared, is what would spoil a later merge.

    The shift is `near`, which must then be so, or else from `x`.
    """
    weight = total_weight(x, weights, axes, segments)
    per_weight = spread(reciprocal(weight), segments)
    fold = Fold.of(x.shape, axes) if segments is None else None

    def mean(v: jax.Array) -> jax.Array:
        if fold is None:
            return total(_share(v, weights, per_weight), axes, segments)
        return fold.total(_share(*map(fold.view, (v, weights, per_weight))))[..., 0, :]

    if near is not None:
        shape = [1 if a in axes else n for a, n in enumerate(x.shape)]
        # Under `shard_map` it varies as `x` does: from device to device.
        shift = coarse(near + jnp.zeros_like(x, near.dtype, shape))
    elif weights is None and segments is None:
        shift = coarse(_sample_mean(x, axes))
    else:
        # Of all rows, since any few could be padding.
        shift = coarse(mean(wide(x)))
    around = spread(once(shift, x.shape), segments)
    if fold is None or jnp.iscomplexobj(x):
        # Written out twice: XLA on CPU only fuses a sum with a prologue of its own.
        offset = mean(wide(x) - around)
        square = mean(abs_square(wide(x) - around))
    else:
        offset, square = _mean_and_square(fold, wide(x) - around, weights, per_weight)
    var = difference(square, abs_square(offset))
    return weight, shift, offset, var


def _mean_and_square(
    fold: Fold, d: jax.Array, weights: jax.Array | None, per_weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The means of `d` and of its square, in one loop: `d` times 1, and times `d`."""
    # These constants belong to the data, or JAX would take them out of a `scan`, with
    # what they are broadcast to.
    first, one = np.array([[True], [False]]), np.ones((), d.dtype)
    d, first, one = lax.optimization_barrier((d, first, one))
    d, weights, per_weight = map(fold.view, (d, weights, per_weight))
    factor = jnp.where(jnp.expand_dims(first, range(d.ndim - 2)), one, d)
    both = fold.total(_share(d * factor, weights, per_weight))
    return both[..., 0, :], both[..., 1, :]


def _sample_mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A cheap value near the mean: that of some rows, spread over `x`."""
    index = [slice(None)] * x.ndim
    rows = math.prod(x.shape[a] for a in axes)
    wanted = min(_SAMPLE_ROWS, max(_SAMPLE_ROWS // 8, rows // 8))
    for a in axes:
        taken = max(1, min(wanted, x.shape[a]))
        step = max(1, x.shape[a] // taken)
        index[a] = slice(step // 2, None, step)
        wanted //= taken
    x = x[tuple(index)]
    per_weight = reciprocal(total_weight(x, None, axes))
    return total(_share(wide(x), None, per_weight), axes)


def _share(v: jax.Array, weights: jax.Array | None, per_weight: jax.Array) -> jax.Array:
    """What each element adds to the mean: divided first, so that no sum overflows."""
    return weigh(v, weights) * per_weight.astype(v.dtype)


def coarse(shift: jax.Array) -> jax.Array:
    """Drops the last bits of a shift, so that every use of it is the same number.

    XLA copies the arithmetic that makes the shift into each loop that reads it, and
    LLVM may contract it there to a fused multiply-add, which rounds differently. At a
    mean of 1e4 standard deviations such a difference costs a relative 3e-4 of the
    variance. Rounding in between cannot be contracted.
    """
    if jnp.iscomplexobj(shift):
        return lax.complex(coarse(shift.real), coarse(shift.imag))
    info = jnp.finfo(shift.dtype)
    return lax.reduce_precision(
        shift, exponent_bits=info.nexp, mantissa_bits=info.nmant - 3
    )
