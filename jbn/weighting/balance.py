"""Weights that let every sample, or every group, count the same.

The results are for the argument `weights`. They are applied before sums over devices,
so an element counts by its weight on any device.
"""

import jax
import jax.numpy as jnp

from jbn import axes, summary
from jbn.ops import numeric
from jbn.ops.segments import segments_of
from jbn.typing import ArrayLike, AxisIndexGroups, AxisName


def sample_weights(weights: ArrayLike, *, axis: int | tuple[int, ...] = 0) -> jax.Array:
    """Makes weights that let each sample count once, however long it is.

    By default every element counts the same, so a sequence of a thousand steps counts a
    hundred times as much as one of ten. Here each sample has a total weight of 1:

        weights / sum of the sample's weights

    A sample of weight zero keeps weight zero.

    Args:
        weights: Mask or non-negative weights of the elements, such as an array of shape
            (batch, length).
        axis: Axis or axes of the samples; the total of each sample is over all other
            axes. If the mask also varies by feature, include the feature axis:
            `axis=(0, -1)` for (batch, length, features).

    Returns:
        Weights of the same shape, float32 or wider. (They may be computed for each
        shard of the batch, since no sample's weights depend on another sample.)

    Raises:
        TypeError: If `weights` are complex.
        ValueError: If `axis` is not one of `weights`.

    Example:
        >>> mask = jnp.array([[True, True, True, True], [True, False, False, False]])
        >>> print(sample_weights(mask))
        [[0.25 0.25 0.25 0.25]
         [1.   0.   0.   0.  ]]
    """
    w = _real(weights, "weights")
    kept = axes.layout(w, axis).feature_axes
    others = tuple(a for a in range(w.ndim) if a not in kept)
    scaled = w * numeric.DOWN
    return scaled * numeric.reciprocal(scaled.sum(others, keepdims=True))


def group_weights(
    ids: ArrayLike,
    num_groups: int,
    *,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
) -> jax.Array:
    """Makes weights that let each group of rows count once, however large it is.

        weights / sum of the weights of all rows with the same id

    A group is all rows with the same id: the packed rows of one sequence or graph (see
    `segment_ids`), a class, a client, a site of a clinical study. A row whose id is not
    from 0 to `num_groups - 1` is padding, and has weight zero.

    Args:
        ids: The group of each row: integers.
        num_groups: Number of groups; static.
        weights: Mask or weights of the rows within their groups, of the shape of `ids`;
            by default 1.
        axis_name: Mapped axis or axes over which a group may be spread. Leave it unset
            if each group is on one device, as packed sequences are.
        axis_index_groups: Groups of indices of `axis_name` to sum within.

    Returns:
        Weights of the shape of `ids`, float32 or wider.

    Raises:
        TypeError: If `ids` are not integers, or `weights` are complex.
        ValueError: If the shapes differ.
        NameError: If `axis_name` is not a mapped axis here.

    Example:
        >>> print(group_weights(jnp.array([0, 0, 0, 0, 1, 2]), 2))
        [0.25 0.25 0.25 0.25 1.   0.  ]
    """
    ids = jnp.asarray(axes.as_array(ids, "ids"))
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"`ids` must be of integers; got {ids.dtype}.")
    w = jnp.ones(ids.shape) if weights is None else _real(weights, "weights")
    if w.shape != ids.shape:
        raise ValueError(
            f"`weights` must have the shape of `ids`; got {w.shape} and {ids.shape}."
        )
    ids = segments_of(ids, num_groups).ids
    w = jnp.where(ids < num_groups, w * numeric.DOWN, 0)
    totals = jax.ops.segment_sum(w.ravel(), ids.ravel(), num_groups)
    rows = axes.rows(axes.Layout(w.shape, ()), axis_name, axis_index_groups)
    if axis_name is not None:
        totals = summary.psum(totals, rows)
    return w * jnp.take(numeric.reciprocal(totals), ids, mode="clip")


def _real(weights: ArrayLike, name: str) -> jax.Array:
    """Mask or weights as real numbers, float32 or wider."""
    w = jnp.asarray(axes.as_array(weights, name))
    if jnp.iscomplexobj(w):
        raise TypeError(f"`{name}` must be real; got {w.dtype}.")
    w = w if jnp.issubdtype(w.dtype, jnp.inexact) else w.astype(jnp.float32)
    return numeric.wide(w)
