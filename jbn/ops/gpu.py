"""What XLA on GPU compiles to fast code, and would not find by itself."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.ops.placement import num_shards, platform


# Rows of a block. Of longer ones XLA writes out what it sums; in shorter ones a thread
# has little to do.
_MOST_ROWS, _LEAST_ROWS = 4096, 32
# Features that threads sum together, and how many such teams there should be: of fewer
# XLA believes that they are slow, and writes out what they would have to compute.
_FEATURES, _LEAST_TEAMS = 128, 512
# Elements of an array that is worth a second step.
_LEAST_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sums over neighboring axes in two steps: in blocks of rows, and over these.

    In blocks of a few thousand rows XLA on GPU sums as fast as memory is read. By
    itself it cuts rows into as many blocks as each has rows, and takes up to a third
    longer.
    """

    first: int  # of the axes
    last: int
    num: int  # blocks

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: tuple[int, ...]) -> "Blocks | None":
        """How to sum an array over `axes`, if it is worth it; if not, `None`."""
        if platform() != "gpu" or math.prod(shape) < _LEAST_ELEMENTS:
            return None
        summed = [a for a in axes if shape[a] > 1]
        if not summed:
            return None
        first, last = summed[0], summed[-1]
        between = [a for a in range(first, last) if shape[a] > 1]
        features = math.prod(shape[last + 1 :])
        if len(between) + 1 != len(summed) or features == 1:
            return None
        # A block is of one device.
        before = math.prod(shape[:first])
        shards = math.gcd(shape[first], num_shards()) if before == 1 else 1
        rows = math.prod(shape[first : last + 1]) // shards
        teams = -(-features // _FEATURES)
        for length in range(min(rows // 2, _MOST_ROWS), _LEAST_ROWS - 1, -1):
            if rows % length == 0 and rows // length * teams >= _LEAST_TEAMS:
                return cls(first, last, shards * (rows // length))
        return None

    def total(self, v: jax.Array) -> jax.Array:
        """The sum, with the summed axes at size 1."""
        after = v.shape[self.last + 1 :]
        kept = (*v.shape[: self.first], *[1] * (self.last + 1 - self.first), *after)
        v = v.reshape((*v.shape[: self.first], self.num, -1, *after))
        parts = _as_is(v.sum(self.first + 1))
        return parts.sum(self.first).reshape(kept)

    def repeat(self, stat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Repeats `stat`, of size 1 along the summed axes, to `shape`.

        Its transpose is such a sum.
        """
        before, after = shape[: self.first], shape[self.last + 1 :]
        rows = math.prod(shape[self.first : self.last + 1])
        stat = stat.reshape(
            (*stat.shape[: self.first], 1, *stat.shape[self.last + 1 :])
        )
        each = jnp.broadcast_to(stat, (*before, self.num, *after))
        each = jnp.expand_dims(_as_is(each), self.first + 1)
        blocks = (*before, self.num, rows // self.num, *after)
        return jnp.broadcast_to(each, blocks).reshape(shape)


def _as_is(v: jax.Array) -> jax.Array:
    """`v` times 1, which XLA cannot know: it would make one sum of two.

    A barrier would be one in the transpose, too, and have written out what stands there
    as often as there are blocks.
    """
    return v * lax.optimization_barrier(np.ones((), v.dtype))


def in_pairs(
    f: Callable[..., jax.Array], x: jax.Array, operands: Any, dtype: np.dtype
) -> jax.Array:
    """`f(x, operands)`, a function of each element, of two elements at a time.

    XLA on GPU has a thread read four elements, whatever their size, and of 16 bits
    that is too few bytes under way to keep memory busy: a copy takes 1.25 times as
    long as one in 32 bits of as many bytes. Two elements are one number of 32 bits
    here. Nothing that reads the output can be computed in the same loop.

    Args:
        f: Gives an array of the shape of its first argument.
        x: Of a 16-bit dtype, and an even last axis.
        operands: A pytree of arrays that broadcast to `x`.
        dtype: Of the output, of 16 bits as well.
    """
    half = x.shape[-1] // 2
    words = lax.bitcast_convert_type(
        x.reshape((*x.shape[:-1], half, 2)), np.dtype(np.uint32)
    )

    def part(i: int) -> jax.Array:
        """The output of the elements at odd or even places, in bits of their own."""
        bits = lax.shift_right_logical(words, np.uint32(16 * i)).astype(np.uint16)
        mine = jax.tree.map(
            lambda v: v[..., i::2] if v.shape and v.shape[-1] > 1 else v, operands
        )
        y = f(lax.bitcast_convert_type(bits, x.dtype), mine).astype(dtype)
        bits = lax.bitcast_convert_type(y, np.dtype(np.uint16)).astype(np.uint32)
        return lax.shift_left(bits, np.uint32(16 * i))

    y = lax.bitcast_convert_type(part(0) | part(1), dtype)
    return y.reshape(x.shape)


def worth_pairs(x: jax.Array, dtype: np.dtype) -> bool:
    """Whether `in_pairs` may be used, and is likely to gain."""
    return (
        platform() == "gpu"
        and x.dtype.itemsize == np.dtype(dtype).itemsize == 2
        and x.ndim > 0
        and x.shape[-1] % 2 == 0
        and x.size >= _LEAST_ELEMENTS
    )
