"""Exact summaries of rows: made in blocks, merged, and carried across devices."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.axes import Rows
from jbn.ops import xla
from jbn.ops.cpu import Merged
from jbn.ops.placement import num_shards, one_cpu, platform
from jbn.ops.segments import Segments, in_blocks


# Longest plain sum. XLA on CPU adds rows one by one, and the rounding error of n such
# additions grows like the root of n, or faster.
_BLOCK_ROWS = 2048
# The same where the first of them are added in parallel: folded on a CPU, by the rows
# of a tile on a TPU.
_FOLDED_BLOCK_ROWS = 8 * _BLOCK_ROWS
# Rows of an image that is a block by itself on a TPU. There a sum over some of the
# images, or a part of one, is a pass of its own, and one over each is not.
_LEAST_IMAGE_ROWS, _MOST_IMAGE_ROWS = 128, 1 << 16
# How far a guess of the mean may be off, squared and in variances: with that, rounding
# errors are twice as large as about the mean.
_FAR = 1
# Most summaries that travel in one all-reduce. Each has a slot of its own there, so
# beyond this two all-reduces of fixed size are cheaper.
_MOST_SLOTS = 32


class Summary(NamedTuple):
    """Weight, mean and variance, with the mean in two parts: `shift + offset`.

    A mean of 1e4 standard deviations, rounded to float32, is off by 1e-3 of one. That
    is harmless in an output, but not between the means of two parts that are merged.
    """

    weight: jax.Array
    shift: jax.Array
    offset: jax.Array
    var: jax.Array


class Guess(NamedTuple):
    """What the mean of a batch may be, before it is seen: such as a running mean.

    It is near if it is off by no more than the root of the variance and `least_var`,
    such as epsilon, together.
    """

    mean: jax.Array
    least_var: jax.Array


@functools.partial(jax.jit, static_argnames="rows")
def summarize(
    x: jax.Array,
    weights: jax.Array | None,
    rows: Rows,
    segments: Segments | None = None,
    guess: Guess | None = None,
) -> Summary:
    """Summarizes all `rows` of `x`, keeping the reduced axes at size 1.

    On a TPU by a guess of the mean, if there is one: then the sums ride on what makes
    `x`, such as a convolution, where they would else wait for it.
    """
    if guess is None or segments is not None or platform() != "tpu":
        summary = _summarize_all(x, weights, rows, segments)
    else:
        summary = _summarize_near(guess, x, weights, rows)
    return summary if rows.axis_name is None else all_reduce(summary, rows)


def _summarize_near(
    guess: Guess, x: jax.Array, weights: jax.Array | None, rows: Rows
) -> Summary:
    """One pass about a guess; if that was far off in any feature, all once more.

    Under `shard_map` and `pmap` each device decides for itself.
    """
    summary = _summarize_all(x, weights, rows, near=guess.mean)
    off = xla.abs_square((summary.shift - guess.mean) + summary.offset)
    least_var = guess.least_var.astype(summary.var.dtype)
    # (With infinities and NaN, too, it is far.)
    near = (off <= _FAR * (summary.var + least_var)) & jnp.isfinite(summary.var)
    some = summary.weight > 0
    # Of nothing, the mean is 0 and not the guess.
    summary = summary._replace(shift=jnp.where(some, summary.shift, 0))
    return lax.cond(
        jnp.all(near | ~some),
        lambda: summary,
        lambda: _again(summary, x, weights, rows),
    )


def _again(
    first: Summary, x: jax.Array, weights: jax.Array | None, rows: Rows
) -> Summary:
    """The summary without a guess, which varies from device to device as `first`."""
    new = _summarize_all(x, weights, rows)._replace(weight=first.weight)
    return jax.tree.map(lambda new, old: new + jnp.zeros_like(old), new, first)


def _summarize_all(
    x: jax.Array,
    weights: jax.Array | None,
    rows: Rows,
    segments: Segments | None = None,
    near: jax.Array | None = None,
) -> Summary:
    """Summarizes the rows of all devices but those of a mapped axis.

    The rows are summarized in blocks, which are then merged. Blocks keep sums short,
    and so exact. Where `x` may be sharded by plain `jit`, each block belongs to one
    device, so that no statistic needs a second round of communication. With
    `segments`, the rows of each have a summary of their own.
    """
    first = x.shape[rows.axes[0]] if rows.axes else 1
    shards = math.gcd(first, num_shards()) if first else 1
    if segments is None:
        summary = _summarize_blocks(x, weights, rows, shards, near)
    else:
        summary = _summarize_segments(x, weights, rows.axes, shards, segments)
    per_shard = summary.var.shape[0] // shards
    summary = jax.tree.map(
        lambda v: v.reshape(shards, per_shard, *v.shape[1:]), summary
    )
    summary = merge(Summary(*(jnp.swapaxes(v, 0, 1) for v in summary)))
    if 1 < shards <= _MOST_SLOTS:
        # GSPMD makes this sum over the shards one all-reduce, and the merge local.
        index = np.arange(shards)
        summary = jax.tree.map(
            lambda v: _place(v[None], index[:, None], index[None]).sum(1), summary
        )
    return merge(summary)


def merge(parts: Summary) -> Summary:
    """Merges the summaries that are stacked along the first axis.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979.
    """
    if parts.weight.shape[0] > 1:
        parts = _merge(
            parts, lambda tree: jax.tree.map(lambda v: v.sum(0, keepdims=True), tree)
        )
    return Summary(*(v[0] for v in parts))


def psum(tree: Any, rows: Rows) -> Any:
    """Sums a tree of arrays over the mapped axes of `rows`, in one all-reduce."""
    leaves, treedef = jax.tree.flatten(tree)
    flat = [
        part.ravel()
        for leaf in leaves
        for part in ((leaf.real, leaf.imag) if jnp.iscomplexobj(leaf) else (leaf,))
    ]
    total = lax.psum(
        jnp.concatenate(flat), rows.axis_name, axis_index_groups=rows.axis_index_groups
    )
    pieces = iter(jnp.split(total, np.cumsum([part.size for part in flat])[:-1]))
    summed = [
        (
            lax.complex(next(pieces), next(pieces))
            if jnp.iscomplexobj(leaf)
            else next(pieces)
        ).reshape(leaf.shape)
        for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, summed)


def _merge(parts: Summary, total: Callable[[Any], Any]) -> Summary:
    """Merges the summaries that `total` sums over."""
    # Times their weight, means near the largest float would overflow.
    small = 2.0**-32
    weight, moment = total((parts.weight, xla.weigh(parts.shift * small, parts.weight)))
    per_weight = xla.reciprocal(weight)
    shift = moment * per_weight.astype(moment.dtype) / small
    # Any value near the mean will do for the common shift, so no gradient has to pass.
    shift = xla.coarse(lax.stop_gradient(shift))
    offset = (parts.shift - shift) + parts.offset
    share = parts.weight * per_weight
    offset, square = total(
        (
            xla.weigh(offset, share),
            xla.weigh(parts.var + xla.abs_square(offset), share),
        )
    )
    var = xla.difference(square, xla.abs_square(offset))
    return Summary(weight, shift, offset, var)


def all_reduce(summary: Summary, rows: Rows) -> Summary:
    """Merges the summaries of all devices (or of all in the same group)."""
    index = lax.axis_index(rows.axis_name)
    if rows.axis_index_groups is None:
        slots = int(lax.axis_size(rows.axis_name))
        slot = index
    else:
        slots = max(len(group) for group in rows.axis_index_groups)
        slot_of = {i: s for g in rows.axis_index_groups for s, i in enumerate(g)}
        slot = jnp.asarray([slot_of[i] for i in sorted(slot_of)], index.dtype)[index]
    if slots > _MOST_SLOTS:
        return _merge(summary, lambda tree: psum(tree, rows))
    every = np.arange(slots, dtype=index.dtype)
    slotted = jax.tree.map(lambda v: _place(v[None], every, slot), summary)
    return merge(psum(slotted, rows))


def _place(v: jax.Array, slots: np.ndarray, slot: jax.Array | np.ndarray) -> jax.Array:
    """`v` where `slots == slot`, along the leading axes, and zero elsewhere."""
    here = jnp.asarray(slots == slot)
    return jnp.where(jnp.expand_dims(here, range(here.ndim, v.ndim)), v, 0)


def _summarize_blocks(
    x: jax.Array,
    weights: jax.Array | None,
    rows: Rows,
    shards: int,
    near: jax.Array | None,
) -> Summary:
    """The summaries of blocks of rows, stacked in front."""
    whole = Merged.of(rows.axes, x, weights)
    x, weights, axes = whole.view(x), whole.view(weights), whole.axes
    counts = _block_counts(x.shape, axes, shards)

    def split(v: jax.Array) -> jax.Array:
        shape: list[int] = []
        for a, n in enumerate(v.shape):
            if a not in axes:
                shape.append(n)
            elif n == x.shape[a]:
                shape += [counts[a], n // counts[a]]
            else:  # weights that do not vary along this axis
                shape += [1, 1]
        return v.reshape(shape)

    block_axes = [a + i for i, a in enumerate(axes)]
    parts = xla.summarize(
        split(x),
        None if weights is None else split(weights),
        tuple(a + 1 for a in block_axes),
        near=None if near is None else split(whole.view(near)),
    )
    block_counts = [counts[a] for a in axes]

    def stack(stat: jax.Array) -> jax.Array:
        stat = jnp.moveaxis(stat, block_axes, range(len(axes)))
        stat = jnp.broadcast_to(stat, (*block_counts, *stat.shape[len(axes) :]))
        stat = stat.reshape(math.prod(block_counts), *stat.shape[len(axes) :])
        return whole.stat(stat, lead=1)

    return Summary(*map(stack, parts))


def _summarize_segments(
    x: jax.Array,
    weights: jax.Array | None,
    axes: tuple[int, ...],
    shards: int,
    segments: Segments,
) -> Summary:
    """The summaries of blocks of rows, each of all segments, stacked in front."""

    def split(v: jax.Array) -> jax.Array:
        a = axes[0] if axes else 0
        if axes and v.shape[a] == x.shape[a]:
            shape = (*v.shape[:a], shards, v.shape[a] // shards, *v.shape[a + 1 :])
            return jnp.moveaxis(v.reshape(shape), a, 0)
        # The same in every shard.
        return jnp.broadcast_to(v[None], (shards, *v.shape))

    def summarize_shard(x, weights, ids) -> Summary:
        counts = _segment_block_counts(x.shape, axes, ids.shape, segments.num)
        blocks = in_blocks(Segments(ids, segments.num), x.shape, counts)
        parts = xla.summarize(x, weights, axes, blocks)
        return Summary(*(v.reshape(-1, segments.num, *v.shape[1:]) for v in parts))

    parts = jax.vmap(summarize_shard)(
        split(x), None if weights is None else split(weights), split(segments.ids)
    )
    return Summary(*(v.reshape(-1, *v.shape[2:]) for v in parts))


def _segment_block_counts(
    shape: tuple[int, ...], axes: tuple[int, ...], ids: tuple[int, ...], num: int
) -> dict[int, int]:
    """How many blocks to cut each axis into, for sums by id and sums within one id.

    Each block has all the segments, so there are no more than take up half of what the
    rows do.
    """
    most = max(1, math.prod(shape[a] for a in axes) // (2 * num))
    counts = {}
    for summed, longest in (
        ([a for a in axes if ids[a] != 1], _BLOCK_ROWS),
        # These come first, in one loop, and cutting them makes for more ids.
        ([a for a in axes if ids[a] == 1], 4 * _BLOCK_ROWS),
    ):
        wanted = math.ceil(math.prod(shape[a] for a in summed) / longest)
        for a in sorted(summed, key=lambda a: -shape[a]):
            counts[a] = max(1, min(wanted, shape[a], most))
            wanted, most = -(-wanted // counts[a]), most // counts[a]
    return counts


def _block_counts(
    shape: tuple[int, ...], axes: tuple[int, ...], shards: int
) -> dict[int, int]:
    """How many equal blocks to split each reduced axis into.

    The first one, which is where batches are sharded, gets a multiple of `shards`.
    """
    rows = math.prod(shape[a] for a in axes)
    number = None
    if platform() == "gpu":
        number = shards  # Thousands of threads add: no sum is long.
    elif platform() == "tpu":
        if rows <= _FOLDED_BLOCK_ROWS * shards:
            number = shards
        elif _LEAST_IMAGE_ROWS <= rows // shape[axes[0]] <= _MOST_IMAGE_ROWS:
            number = shape[axes[0]]
    if number is not None:
        return {a: number if a == axes[0] else 1 for a in axes}
    wanted = rows / (_FOLDED_BLOCK_ROWS if one_cpu() else _BLOCK_ROWS)
    counts = {}
    for a in axes:
        base = shards if a == axes[0] else 1
        last = min(shape[a], math.ceil(4 * wanted) * base)
        divisors = [c for c in range(base, last + 1, base) if shape[a] % c == 0]
        divisors = divisors or [base]
        counts[a] = next((c for c in divisors if c >= wanted), divisors[-1])
        wanted /= counts[a]
    return counts
