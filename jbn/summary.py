"""Exact summaries of rows: taken in blocks, and merged across blocks and devices."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from jbn.axes import Rows
from jbn.lowering import inline
from jbn.lowering.blocks import block_counts, num_shards, segment_block_counts
from jbn.lowering.cpu import Merged
from jbn.lowering.late import Target, late
from jbn.ops import numeric, shifted
from jbn.ops.segments import Segments, in_blocks


# How far a guess of the mean may be off, squared, in variances. At this limit, rounding
# errors are twice those of sums about the mean.
_FAR = 1
# Most summaries in one all-reduce. Each has its own slot there, so beyond this number
# two all-reduces of fixed size are cheaper.
_MOST_SLOTS = 32


class Summary(NamedTuple):
    """Weight, mean and variance, with the mean in two parts: `shift + offset`.

    A mean of 1e4 standard deviations, rounded to float32, is off by 1e-3 of one. That
    is harmless in an output, but not in the distance of two means that are merged.

    Within this file `weight` is `None` while all parts have the same weight.
    """

    weight: Float[Array, "..."] | None
    shift: Inexact[Array, "..."]
    offset: Inexact[Array, "..."]
    var: Float[Array, "..."]


class Guess(NamedTuple):
    """An estimate of the mean made before the batch is read, such as a running mean.

    It is near if it is off by at most `sqrt(var + least_var)`; `least_var` is, for
    example, epsilon.
    """

    mean: jax.Array
    least_var: jax.Array


def summarize(
    x: Inexact[Array, "..."],
    weights: jax.Array | None,
    rows: Rows,
    segments: Segments | None = None,
    guess: Guess | None = None,
    tiny: bool = False,
) -> Summary:
    """Summarizes all `rows` of `x`, keeping the reduced axes at size 1.

    Args:
        x: Input.
        weights: Weights that broadcast to `x`, or `None`.
        rows: Axes to reduce, here and over devices.
        segments: Segments to summarize one by one, or `None`.
        guess: A value that may be near the mean. With it, on a TPU, the sums fuse with
            the operation that produces `x`, such as a convolution. Without it they wait
            for that operation.
        tiny: Whether a variance below 1e-30 has to be accurate.
    """
    operands = x, weights, segments, guess
    found = late(_summarize, *operands, axes=rows.axes, tiny=tiny)
    if weights is not None or segments is not None:
        return all_reduce(Summary(*found), rows)
    weight = numeric.total_weight(x, None, rows.axes)
    devices = _devices(rows)
    if devices is None:
        return all_reduce(Summary(weight, *found), rows)
    if devices > 1:  # All have as many rows.
        weight = weight * np.asarray(devices, weight.dtype)
    return all_reduce(Summary(None, *found), rows)._replace(weight=weight)


def _devices(rows: Rows) -> int | None:
    """How many devices share the rows; `None` if groups of them differ in size."""
    if rows.axis_name is None:
        return 1
    if rows.axis_index_groups is None:
        return int(lax.axis_size(rows.axis_name))
    sizes = {len(group) for group in rows.axis_index_groups}
    return sizes.pop() if len(sizes) == 1 else None


def _summarize(
    target: Target,
    x: jax.Array,
    weights: jax.Array | None,
    segments: Segments | None,
    guess: Guess | None,
    *,
    axes: tuple[int, ...],
    tiny: bool,
) -> list[jax.Array]:
    """The summary of the local rows; mapped axes are not reduced.

    It has no weight if `x` has neither weights nor segments.
    """
    whole = functools.partial(
        _summarize_all, target, x, weights, segments, axes=axes, tiny=tiny
    )
    listed = lambda parts: [v for v in parts if v is not None]
    empty = 0 in x.shape
    if guess is None or segments is not None or empty or target.platform != "tpu":
        return listed(whole())
    # One pass about a guess, and a second one if that was far off in any feature. Under
    # `shard_map` and `pmap` each device decides for itself.
    summary = whole(near=guess.mean)
    off = numeric.abs_square((summary.shift - guess.mean) + summary.offset)
    least_var = guess.least_var.astype(summary.var.dtype)
    # Infinity and NaN count as far off.
    near = (off <= _FAR * (summary.var + least_var)) & jnp.isfinite(summary.var)
    shift = inline.broadcast_to(summary.shift, summary.var.shape)
    if summary.weight is not None:
        some = summary.weight > 0
        near = near | ~some
        shift = inline.where(some, shift, 0)  # The mean of no rows, not the guess.
    summary = summary._replace(shift=shift)
    again = functools.partial(_again, summary, whole)
    return listed(lax.cond(jnp.all(near), lambda: summary, again))


def _again(first: Summary, whole: Callable[[], Summary]) -> Summary:
    """The summary, repeated without the guess."""
    return whole()._replace(weight=first.weight)


def _summarize_all(
    target: Target,
    x: jax.Array,
    weights: jax.Array | None,
    segments: Segments | None,
    near: jax.Array | None = None,
    *,
    axes: tuple[int, ...],
    tiny: bool,
) -> Summary:
    """Summarizes rows in blocks, and merges the blocks.

    Blocks keep sums short, and therefore accurate. If the compiler shards `x`, each
    block is on one device, so that no statistic needs a second round of communication.
    With `segments`, each segment has its own summary.
    """
    shards = num_shards(target, x.shape, axes)
    if segments is None:
        merged = Merged.of(target, axes, x, weights)
        x, weights, near = map(merged.view, (x, weights, near))
        counts = block_counts(target, x.shape, merged.axes, shards)
        if all(count == 1 for count in counts.values()):
            parts = shifted.summarize(
                target, x, weights, merged.axes, near=near, tiny=tiny
            )
            return jax.tree.map(merged.stat, Summary(*parts))
        summary = _summarize_blocks(target, x, weights, near, merged, counts, tiny)
    else:
        summary = _summarize_segments(target, x, weights, segments, axes, shards, tiny)
    if shards == 1:
        return merge(summary)
    per_shard = summary.var.shape[0] // shards
    summary = jax.tree.map(
        lambda v: v.reshape(shards, per_shard, *v.shape[1:]), summary
    )
    summary = merge(jax.tree.map(lambda v: jnp.swapaxes(v, 0, 1), summary))
    if 1 < shards <= _MOST_SLOTS:
        # The compiler turns this sum over shards into one all-reduce, and keeps the
        # merge local.
        index = np.arange(shards)
        summary = jax.tree.map(
            lambda v: _place(v[None], index[:, None], index[None]).sum(1), summary
        )
    return merge(summary)


def merge(parts: Summary) -> Summary:
    """Merges summaries stacked along the first axis.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979.
    """
    number = parts.var.shape[0]
    if number > 1:
        total = lambda tree: jax.tree.map(lambda v: inline.total(v, (0,)), tree)
        parts = _merge_over(total, number, parts)
    return jax.tree.map(lambda v: v[0], parts)


def psum(tree: Any, rows: Rows) -> Any:
    """Sums a tree of arrays over the mapped axes of `rows`, in one all-reduce."""
    flat, unpack = _packed(tree)
    return unpack(_psum(flat, rows))


def _psum(v: jax.Array, rows: Rows) -> jax.Array:
    return lax.psum(v, rows.axis_name, axis_index_groups=rows.axis_index_groups)


def _packed(tree: Any) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
    """A tree of arrays as one vector, and the inverse, which keeps leading axes."""
    leaves, treedef = jax.tree.flatten(tree)
    parts = [
        part.ravel()
        for leaf in leaves
        for part in ((leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,))
    ]
    ends = np.cumsum([part.size for part in parts])[:-1]

    def unpack(vector: jax.Array) -> Any:
        pieces = iter(jnp.split(vector, ends, -1))
        found = [
            (
                lax.complex(next(pieces), next(pieces))
                if jnp.iscomplexobj(leaf)
                else next(pieces)
            ).reshape(*vector.shape[:-1], *leaf.shape)
            for leaf in leaves
        ]
        return jax.tree.unflatten(treedef, found)

    return jnp.concatenate(parts), unpack


def _merge_over(total: Callable[[Any], Any], number: int, parts: Summary) -> Summary:
    """Merges `number` summaries; `total` sums over them."""
    weight = None
    if parts.weight is None:
        weigh = lambda v: v * np.asarray(1 / number, v.dtype)
        shift = total(weigh(parts.shift))
    else:
        # Means near the largest float would overflow when multiplied by their weight.
        small = 2.0**-32
        weights = parts.weight * numeric.DOWN
        weight, moment = total((weights, numeric.weigh(parts.shift * small, weights)))
        per_weight = numeric.reciprocal(weight)
        weigh = functools.partial(numeric.weigh, weights=weights * per_weight)
        shift = moment * per_weight.astype(moment.dtype) / small
        weight = numeric.scaled_up(weight)
    # The common shift may be any value near the mean, so it needs no gradient.
    shift = numeric.coarse(lax.stop_gradient(shift))
    offset = (parts.shift - shift) + parts.offset
    square = parts.var + numeric.abs_square(offset)
    offset, square = total((weigh(offset), weigh(square)))
    var = numeric.difference(square, numeric.abs_square(offset))
    return Summary(weight, shift, offset, var)


def all_reduce(summary: Summary, rows: Rows) -> Summary:
    """Merges the summaries of all devices (or of all in the same group)."""
    if rows.axis_name is None:
        return summary
    index = lax.axis_index(rows.axis_name)
    if rows.axis_index_groups is None:
        slots = int(lax.axis_size(rows.axis_name))
        slot = index
    else:
        slots = max(len(group) for group in rows.axis_index_groups)
        slot_of = {i: s for g in rows.axis_index_groups for s, i in enumerate(g)}
        slot = jnp.asarray([slot_of[i] for i in sorted(slot_of)], index.dtype)[index]
    if slots > _MOST_SLOTS:
        return _merge_over(functools.partial(psum, rows=rows), slots, summary)
    every = np.arange(slots, dtype=index.dtype)
    flat, unpack = _packed(summary)
    return merge(unpack(_psum(_place(flat[None], every, slot), rows)))


def _place(v: jax.Array, slots: np.ndarray, slot: jax.Array | np.ndarray) -> jax.Array:
    """`v` where `slots == slot`, along the leading axes, and zero elsewhere."""
    here = jnp.asarray(slots == slot)
    return inline.where(jnp.expand_dims(here, range(here.ndim, v.ndim)), v, 0)


def _summarize_blocks(
    target: Target,
    x: jax.Array,
    weights: jax.Array | None,
    near: jax.Array | None,
    merged: Merged,
    counts: dict[int, int],
    tiny: bool,
) -> Summary:
    """The summaries of blocks of rows, stacked in front.

    Arrays are merged views, whose axes are cut into so many blocks.
    """
    axes = merged.axes
    cut_axes = [a for a in axes if counts[a] > 1]

    def cut(v: Any) -> Any:
        if v is None:
            return None
        shape: list[int] = []
        for a, n in enumerate(v.shape):
            if a not in cut_axes:
                shape.append(n)
            elif n == x.shape[a]:
                shape += [counts[a], n // counts[a]]
            else:  # weights that do not vary along this axis
                shape += [1, 1]
        return v.reshape(shape)

    block_axes = [a + i for i, a in enumerate(cut_axes)]
    within = tuple(a + sum(c <= a for c in cut_axes) for a in axes)
    parts = shifted.summarize(
        target, cut(x), cut(weights), within, near=cut(near), tiny=tiny
    )
    per_axis = [counts[a] for a in cut_axes]

    def stack(stat: jax.Array) -> jax.Array:
        first = range(len(cut_axes))
        stat = jnp.moveaxis(stat, block_axes, first)
        stat = jnp.broadcast_to(stat, (*per_axis, *stat.shape[len(cut_axes) :]))
        stat = stat.reshape(math.prod(per_axis), *stat.shape[len(cut_axes) :])
        return merged.stat(stat, lead=1)

    return jax.tree.map(stack, Summary(*parts))


def _summarize_segments(
    target: Target,
    x: jax.Array,
    weights: jax.Array | None,
    segments: Segments,
    axes: tuple[int, ...],
    shards: int,
    tiny: bool,
) -> Summary:
    """The summaries of blocks of rows, each with all segments, stacked in front."""

    def split(v: jax.Array) -> jax.Array:
        a = axes[0] if axes else 0
        if axes and v.shape[a] == x.shape[a]:
            shape = (*v.shape[:a], shards, v.shape[a] // shards, *v.shape[a + 1 :])
            return jnp.moveaxis(v.reshape(shape), a, 0)
        # The same in every shard.
        return jnp.broadcast_to(v[None], (shards, *v.shape))

    def summarize_shard(x, weights, ids) -> Summary:
        counts = segment_block_counts(x.shape, axes, ids.shape, segments.num)
        blocks = in_blocks(Segments(ids, segments.num), x.shape, counts)
        parts = shifted.summarize(target, x, weights, axes, blocks, tiny=tiny)
        by_segment = lambda v: v.reshape(-1, segments.num, *v.shape[1:])
        return jax.tree.map(by_segment, Summary(*parts))

    parts = jax.vmap(summarize_shard)(
        split(x), None if weights is None else split(weights), split(segments.ids)
    )
    return jax.tree.map(lambda v: v.reshape(-1, *v.shape[2:]), parts)
