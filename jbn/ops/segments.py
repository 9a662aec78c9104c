"""Sums and statistics by segment: rows that share an id share a mean.

A statistic of segments has the rank of the input plus one leading axis, with one entry
per segment; reduced axes have size 1.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Integer

from jbn.lowering import sums
from jbn.lowering.inline import where


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """The segment that each row belongs to.

    `ids` are int32, from 0 to `num - 1`, or `num` for a row of no segment. They have
    the rank of the input, with size 1 along the feature axes and where they do not
    vary.
    """

    ids: Any  # an array, or a placeholder of JAX in a tree
    num: int = dataclasses.field(metadata={"static": True})


def segments_of(ids: Integer[Array, "..."], num: int) -> Segments:
    """Segments by ids of any integer dtype, which need not be in range."""
    if ids.dtype.itemsize < 4:
        ids = ids.astype(jnp.int32)  # `num` may not fit into fewer bits.
    there = (ids >= 0) & (ids < num)
    return Segments(jnp.where(there, ids, num).astype(jnp.int32), num)


def members(weights: jax.Array | None, segments: Segments) -> jax.Array:
    """The weights, with zero for rows that belong to no segment."""
    there = inside(segments)
    if weights is None:
        return there
    return where(there, weights, False if weights.dtype == bool else 0)


def total(
    v: jax.Array, axes: tuple[int, ...], segments: Segments | None = None
) -> jax.Array:
    """Sums `v` over `axes`, which stay at size 1; with `segments`, within each."""
    if segments is None:
        return sums.total(v, axes)
    ids = segments.ids
    # Sum densely along axes that share an id first: pixels of an image, then domains.
    v = v.sum([a for a in axes if ids.shape[a] == 1], keepdims=True)
    v = jnp.broadcast_to(v, jnp.broadcast_shapes(v.shape, ids.shape))
    # Split each axis into that of the ids and that of the statistic.
    sizes = zip(v.shape, ids.shape, strict=True)
    pairs = [(1, n) if varies == 1 else (n, 1) for n, varies in sizes]
    v = v.reshape([n for pair in pairs for n in pair])
    v = v.transpose([*range(0, v.ndim, 2), *range(1, v.ndim, 2)])
    v = v.reshape(ids.size, *v.shape[ids.ndim :])
    return jax.ops.segment_sum(v, ids.ravel(), segments.num)


def spread(stat: jax.Array, segments: Segments | None = None) -> jax.Array:
    """Gives each row the statistic of its segment, so that it broadcasts to the input.

    A row of no segment gets that of the last one. A statistic with a leading axis of
    size 1 is shared by all segments.
    """
    if segments is None:
        return stat
    if stat.shape[0] == 1:
        return stat[0]
    ids = segments.ids
    v = jnp.take(stat, ids, axis=0, mode="clip")
    pairs = list(zip(ids.shape, stat.shape[1:], strict=True))
    v = v.transpose([a for i in range(ids.ndim) for a in (i, ids.ndim + i)])
    return v.reshape([math.prod(pair) for pair in pairs])


def inside(segments: Segments) -> Bool[Array, "..."]:
    """Whether a row belongs to a segment; of the shape of the ids."""
    return segments.ids < segments.num


def in_blocks(
    segments: Segments, shape: tuple[int, ...], counts: dict[int, int]
) -> Segments:
    """The segments split into blocks: `counts[a]` along each axis `a` of `shape`.

    The parts of the first block come first. Blocks need not divide the axes.
    """
    ids, num = segments.ids, segments.num
    block = jnp.zeros((1,) * ids.ndim, ids.dtype)
    for a, count in counts.items():
        along = [shape[a] if b == a else 1 for b in range(ids.ndim)]
        if count == 1:
            continue
        length = max(1, -(-shape[a] // count))
        block = block * count + lax.broadcasted_iota(ids.dtype, along, a) // length
    total_num = math.prod(counts.values()) * num
    return Segments(jnp.where(ids < num, ids + num * block, total_num), total_num)
