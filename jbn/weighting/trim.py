"""Robust statistics: outliers by the running statistics do not count."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jbn import axes, summary
from jbn._normalize import check_epsilon, check_stats, expand_stats
from jbn.axes import Rows
from jbn.lowering.mesh import sharded_by_compiler
from jbn.ops import numeric
from jbn.ops.segments import Segments, spread
from jbn.typing import (
    ArrayLike,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    Moments,
)


def trimmed_weights(
    x: ArrayLike,
    stats: BatchStats | Moments,
    *,
    trim: float | int | ArrayLike,
    axis: Axes = -1,
    epsilon: float | int | ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> jax.Array:
    """Makes weights that are zero for outliers: elements far from `stats`.

        abs(x - mean) > trim * sqrt(var + epsilon)   has weight zero, as has NaN

    unless that would be more than half of the weight of a feature. In that case `stats`
    do not describe the batch (they are new, or the data has changed), and all elements
    count. So a single outlier never moves the statistics, and a change of the data
    always does. A batch of one row is never trimmed. If half of the weight is outliers,
    trimming cannot help.

    Args:
        x: Input of shape (..., features, ...).
        stats: What to judge by: running statistics, or robust ones of your own.
        trim: How many standard deviations are too far. A normal feature has one element
            in 16,000 beyond 4, so 4 to 6 lose nothing.
        axis: Feature axis or axes.
        epsilon: Added to the variance.
        mask: As for `jbn.batch_norm`.
        weights: As for `jbn.batch_norm`.
        axis_name: Mapped axis or axes over which to take the half: one more all-reduce.
        axis_index_groups: Groups of indices of `axis_name` to do so within.

    Returns:
        Weights of the shape of `x` to pass to `jbn.batch_norm`: boolean where
        `weights` are not given. No gradient passes.

    Raises:
        TypeError: If `x` is of integers or booleans.
        ValueError: If shapes do not fit, or `trim` is known to be negative.
        NameError: If `axis_name` is not a mapped axis here.

    Example:
        >>> stats = BatchStats(jnp.array([1.0]), jnp.array([1.0]))
        >>> x = jnp.array([[0.0], [1.0], [2.0], [1e6]])
        >>> print(trimmed_weights(x, stats, trim=4).ravel())
        [ True  True  True False]
    """
    x = axes.check_inexact(x)
    lay = axes.layout(x, axis)
    check_stats(stats, "stats", lay, axis, x.dtype)
    rows = axes.rows(lay, axis_name, axis_index_groups)
    checked = axes.element_weights(mask, weights, lay)
    stats = Moments(stats.var, stats.mean, stats.var)
    trim, least = check_trim(trim), check_epsilon(epsilon)
    return _trimmed(lay, rows, x, checked, stats, trim, least)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trimmed(lay, rows, x, weights, stats, trim, epsilon):
    def run(x, weights, stats, trim, epsilon):
        expanded = expand_stats(stats, lay, x.dtype)
        return trimmed(
            rows,
            x,
            None if weights is None else weights.array(),
            None,
            expanded,
            jnp.asarray(trim),
            epsilon.array(expanded.var.dtype),
        )

    return sharded_by_compiler(run, x, x)(x, weights, stats, trim, epsilon)


def trimmed(
    rows: Rows,
    x: jax.Array,
    weights: jax.Array | None,
    segments: Segments | None,
    stats: Moments,
    trim: jax.Array,
    epsilon: jax.Array,
) -> jax.Array:
    """The weights less those of outliers, for arrays at the rank of `x`."""
    x, stats = lax.stop_gradient((x, stats))
    real = stats.var.dtype
    limit = jnp.square(trim.astype(real)) * (stats.var + epsilon.astype(real))
    d = numeric.wide(x) - spread(stats.mean, segments)
    near = numeric.abs_square(d) <= spread(limit, segments)
    everything = jnp.ones_like(near) if weights is None else weights
    kept = jnp.where(near, everything, jnp.zeros_like(everything))
    sums = [
        numeric.total_weight(x, kept, rows.axes, segments),
        numeric.total_weight(x, weights, rows.axes, segments),
    ]
    sums = [jnp.broadcast_to(s, sums[0].shape) for s in sums]
    if rows.axis_name is not None:
        sums = summary.psum(sums, rows)
    describes = spread(2 * sums[0] >= sums[1], segments)
    return jnp.where(describes, kept, everything)


def check_trim(trim: float | int | ArrayLike) -> float | int | ArrayLike:
    """Refuses a limit that is known to be negative."""
    why = "It is in standard deviations: 4 to 6 leave normal data alone."
    return axes.check_number(trim, "trim", 0, why)
