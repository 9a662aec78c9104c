"""Sums and elementwise passes that XLA on GPU compiles to fast kernels.

Measured on an H200 (`benchmarks/gpu.py`, `docs/benchmarks.md`): blocked sums take two
thirds of the time of plain sums, and pairs of 16-bit elements four fifths.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from jbn.axes import is_static
from jbn.lowering.late import Target


# Rows of a block. XLA materializes the terms of longer sums; shorter ones leave threads
# idle.
_MOST_ROWS, _LEAST_ROWS = 4096, 32
# Features that a group of threads sums together, and the least number of groups: with
# fewer, XLA's cost model considers the sum slow, and materializes its terms.
_FEATURES, _LEAST_TEAMS = 128, 512
# Smallest array that is worth a second step.
_LEAST_ELEMENTS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sums over neighboring axes in two steps: within blocks of rows, then over blocks.

    With blocks of a few thousand rows, XLA on GPU sums as fast as it reads memory. By
    default it uses as many blocks as each block has rows, and takes up to a third
    longer.
    """

    first: int  # of the summed axes
    last: int
    num: int  # blocks

    @classmethod
    def of(
        cls, target: Target, shape: tuple[int, ...], axes: tuple[int, ...]
    ) -> "Blocks | None":
        """The blocks for a sum of an array over `axes`; `None` if they gain nothing."""
        if target.platform != "gpu" or not is_static(shape):
            return None
        if math.prod(shape) < _LEAST_ELEMENTS:
            return None
        summed = [a for a in axes if shape[a] > 1]
        if not summed:
            return None
        first, last = summed[0], summed[-1]
        between = [a for a in range(first, last) if shape[a] > 1]
        features = math.prod(shape[last + 1 :])
        if len(between) + 1 != len(summed) or features == 1:
            return None
        # Each block is on one device.
        before = math.prod(shape[:first])
        shards = math.gcd(shape[first], target.shards) if before == 1 else 1
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
        parts = _opaque(v.sum(self.first + 1))
        return parts.sum(self.first).reshape(kept)


def _opaque(v: jax.Array) -> jax.Array:
    """`v` times a 1 that XLA cannot see, so that it does not merge the two sums."""
    return v * lax.optimization_barrier(np.ones((), v.dtype))


def in_pairs(
    f: Callable[..., jax.Array], x: jax.Array, operands: Any, dtype: np.dtype
) -> jax.Array:
    """`f(x, operands)` for an elementwise `f`, two elements at a time.

    In XLA on GPU, each thread reads four elements of any size. With 16 bits that is too
    few bytes in flight to keep memory busy: a copy takes 1.25 times as long as a 32-bit
    copy of the same bytes. Here two elements are read as one 32-bit number. No reader
    of the output can be fused into the same loop.

    Args:
        f: Returns an array of the shape of its first argument.
        x: Array of a 16-bit dtype, with an even last axis.
        operands: A pytree of arrays that broadcast to `x`.
        dtype: Dtype of the output, of 16 bits as well.
    """
    half = x.shape[-1] // 2
    words = lax.bitcast_convert_type(
        x.reshape((*x.shape[:-1], half, 2)), np.dtype(np.uint32)
    )

    def part(i: int) -> jax.Array:
        """The output of the even or odd elements, in their half of the 32 bits."""
        bits = lax.shift_right_logical(words, np.uint32(16 * i)).astype(np.uint16)
        mine = jax.tree.map(
            lambda v: v[..., i::2] if v.shape and v.shape[-1] > 1 else v, operands
        )
        y = f(lax.bitcast_convert_type(bits, x.dtype), mine).astype(dtype)
        bits = lax.bitcast_convert_type(y, np.dtype(np.uint16)).astype(np.uint32)
        return lax.shift_left(bits, np.uint32(16 * i))

    y = lax.bitcast_convert_type(part(0) | part(1), dtype)
    return y.reshape(x.shape)


def worth_pairs(target: Target, x: jax.Array, dtype: np.dtype) -> bool:
    """Whether `in_pairs` is possible and likely to gain."""
    return (
        target.platform == "gpu"
        and is_static(x.shape)
        and x.dtype.itemsize == np.dtype(dtype).itemsize == 2
        and x.ndim > 0
        and x.shape[-1] % 2 == 0
        and math.prod(x.shape) >= _LEAST_ELEMENTS
    )
