"""Weight, mean and variance of rows, by one pass about a shift."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from jbn.axes import is_static
from jbn.lowering import inline
from jbn.lowering.late import Target
from jbn.lowering.passes import hoist
from jbn.lowering.sums import apart, power_sums, sum_rows
from jbn.ops import numeric
from jbn.ops.segments import Segments, spread, total


# Most rows that the shift is computed from: enough for it to be a fraction of a
# standard deviation from the mean, few enough to cost almost nothing.
_SAMPLE_ROWS = 64
# Deviations below this are multiplied by its reciprocal before they are squared, since
# the squares would underflow in float32.
_TINY = 2.0**-32


def summarize(
    target: Target,
    x: Inexact[Array, "..."],
    weights: jax.Array | None,
    axes: tuple[int, ...],
    segments: Segments | None = None,
    near: jax.Array | None = None,
    tiny: bool = False,
) -> tuple[
    Float[Array, "..."] | None,
    Inexact[Array, "..."],
    Inexact[Array, "..."],
    Float[Array, "..."],
]:
    """Computes `(weight, shift, offset, var)` of `x` over `axes`, kept at size 1.

    The weight is `None` if there are neither weights nor segments.

    With <v> = sum(w * v) / sum(w), and a shift near the mean,

        offset = <x - shift>
        mean = shift + offset
        var = <abs(x - shift)**2> - abs(offset)**2

    which loses nothing as long as the shift is within a few standard deviations of the
    mean (Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
    1983). The mean is returned in two parts because its float32 rounding, squared,
    would spoil a later merge.

    Args:
        target: The target of the lowering.
        x: Input.
        weights: Boolean or real weights that broadcast to `x`, or `None`.
        axes: Axes to reduce.
        segments: Segments to summarize one by one, or `None`.
        near: A shift; by default one is computed from `x`.
        tiny: Whether a variance below 1e-30 has to be accurate.
    """
    weights, down = numeric.scaled_down(weights)
    weight = numeric.total_weight(x, weights, axes, segments)
    even = weights is None and segments is None
    if even and is_static(x.shape):
        rows = math.prod(x.shape[a] for a in axes)
        per_weight = np.asarray(1 / max(rows, 1), weight.dtype)
    else:
        per_weight = spread(numeric.reciprocal(weight), segments)

    def mean(v: jax.Array, weights: jax.Array | None) -> jax.Array:
        terms = _share(numeric.wide(v), weights, per_weight)
        if segments is not None:
            return total(terms, axes, segments)
        return sum_rows(target, terms, axes)

    if near is not None:
        shift = numeric.coarse(near)
    elif even and is_static(x.shape):
        shift = numeric.coarse(_sample_mean(x, axes))
    else:
        # Use all rows, since any sample could be padding.
        shift = numeric.coarse(mean(*apart(target, (x, weights))))
    center = hoist(shift, x.shape)
    lift = None
    if tiny:
        of = apart(target, (x, center))
        far = _deviation(of[0], of[1], None, segments)
        lift = _lift(far, weights, axes).astype(far.dtype)
    if segments is None:
        of, operands = (x, center, lift), (weights, per_weight)
        offset, square = power_sums(target, _deviation, of, _share, operands, axes)
    else:
        offset, square = _means_by_segment(
            _deviation(x, center, lift, segments), weights, per_weight, axes, segments
        )
    var = numeric.difference(square, numeric.abs_square(offset))
    if lift is not None:
        lift = lift if segments is None else lift[None]
        offset, var = offset / lift, var / lift.real / lift.real
    weight = weight if down == 1 else numeric.scaled_up(weight)
    return None if even else weight, shift, offset, var


def _deviation(
    x: jax.Array,
    center: jax.Array,
    lift: jax.Array | None,
    segments: Segments | None = None,
) -> jax.Array:
    d = numeric.wide(x) - spread(center, segments)
    return d if lift is None else d * lift


def _share(v: jax.Array, weights: jax.Array | None, per_weight: Any) -> jax.Array:
    """Each element's part of the mean: divided first, so that no sum overflows."""
    return numeric.weigh(v, weights) * per_weight.astype(v.dtype)


def _means_by_segment(
    d: jax.Array,
    weights: jax.Array | None,
    per_weight: Any,
    axes: tuple[int, ...],
    segments: Segments,
) -> tuple[jax.Array, jax.Array]:
    """The means of `d` and of `abs(d)**2`, by one sum over the ids."""
    both = jnp.stack([d, numeric.abs_square(d).astype(d.dtype)])
    front = lambda v: None if v is None else v[None]
    terms = _share(both, front(weights), front(per_weight))
    segments = Segments(segments.ids[None], segments.num)
    means = total(terms, tuple(a + 1 for a in axes), segments)
    return means[:, 0], means[:, 1].real


def _sample(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A sample of rows, spread over `v`."""
    start, stride = [0] * v.ndim, [1] * v.ndim
    rows = math.prod(v.shape[a] for a in axes)
    wanted = min(_SAMPLE_ROWS, max(_SAMPLE_ROWS // 8, rows // 8))
    for a in axes:
        taken = max(1, min(wanted, v.shape[a]))
        stride[a] = max(1, v.shape[a] // taken)
        start[a] = min(stride[a] // 2, v.shape[a])
        wanted //= taken
    return lax.slice(v, start, v.shape, stride)


def _sample_mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """A cheap value near the mean."""
    x = numeric.wide(_sample(x, axes))
    rows = math.prod(x.shape[a] for a in axes)
    terms = x * np.asarray(1 / max(rows, 1), x.dtype)
    return inline.total(terms, axes)


def _lift(
    d: jax.Array, weights: jax.Array | None, axes: tuple[int, ...]
) -> Float[Array, "..."]:
    """A power of two for each feature that brings tiny deviations near 1."""
    size = jnp.abs(d)
    if weights is not None:
        counts = weights if weights.dtype == bool else weights > 0
        size = inline.where(counts, size, 0)
    if is_static(d.shape):
        size = _sample(size, axes)
    most = size.max(axes, keepdims=True, initial=0)
    lift = jnp.asarray(1 / _TINY, most.dtype)
    return lax.stop_gradient(inline.where((most > 0) & (most < _TINY), lift, 1))
