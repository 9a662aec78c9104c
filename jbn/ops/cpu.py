"""What XLA on CPU compiles to fast code, and would not find by itself."""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.ops.placement import one_cpu, platform


@dataclasses.dataclass(frozen=True)
class Merged:
    """A view of arrays of one rank in which neighboring axes are one, on one CPU.

    XLA on CPU sums over one axis up to ten times as fast as over three. Of two axes
    that are both cut it cannot make one without gathering them, and on a TPU, whose
    arrays are in tiles, hardly any without copying.

    It is for sums alone. Where the last operation on an array is a reshape, XLA makes
    the array anew in each loop that reads it, and keeps all that it is made of.
    """

    runs: tuple[tuple[int, ...], ...]  # the axes that each axis of the view is made of
    axes: tuple[int, ...]  # those of the view that are summed over

    @classmethod
    def of(cls, axes: tuple[int, ...], *arrays: Any) -> "Merged":
        """Merges `axes` that are next to each other, if all `arrays` are alike there.

        Alike is to have size 1 along both, or along neither.
        """
        merge = one_cpu()
        shapes = [v.shape for v in arrays if v is not None]
        runs: list[tuple[int, ...]] = []
        for a in range(len(shapes[0])):
            if (
                merge
                and a in axes
                and a - 1 in axes
                and all((shape[a] == 1) == (shape[a - 1] == 1) for shape in shapes)
            ):
                runs[-1] += (a,)
            else:
                runs.append((a,))
        summed = tuple(i for i, run in enumerate(runs) if run[0] in axes)
        return cls(tuple(runs), summed)

    def view(self, v: Any) -> Any:
        """An array in the view; `None` is `None`."""
        if v is None:
            return None
        return v.reshape([math.prod(v.shape[a] for a in run) for run in self.runs])

    def stat(self, v: jax.Array, lead: int = 0) -> jax.Array:
        """A statistic of the view, with `lead` more axes in front, at the full rank."""
        sizes = zip(self.runs, v.shape[lead:], strict=True)
        shape = [n for run, size in sizes for n in (size, *[1] * (len(run) - 1))]
        return v.reshape((*v.shape[:lead], *shape))


# Into how many parts rows are folded. (XLA takes no more than 15 copies of the terms
# into a loop, which is two of seven, and with fewer than four not much is gained.)
_WIDTHS = 7, 8, 6, 5, 4
# Only what is longer than this XLA sums by its fast kernel.
_SHORT = 32
# Elements of an array that is worth the many operations, and of its last axis: what is
# read in one go.
_LEAST_ELEMENTS, _LEAST_RUN = 1 << 15, 16


@dataclasses.dataclass(frozen=True)
class Fold:
    """Sums over rows that are folded first: a few of them are added by one expression.

    XLA on CPU writes out what it sums, unless it was an array before, and adds that up
    by another kernel. What is added as any arrays are, is added in the loop that
    computes it, and a fraction of it is written out. Rows that are added are far from
    each other, so that a processor reads a few long streams.

    Not for what JAX differentiates: the transpose would put the rows together again,
    one by one.
    """

    axis: int  # that is folded
    width: int  # into how many parts
    axes: tuple[int, ...]  # all that are summed over

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: tuple[int, ...]) -> "Fold | None":
        """How to sum an array over `axes`, if it is worth it; if not, `None`."""
        if math.prod(shape) < _LEAST_ELEMENTS or not shape or shape[-1] < _LEAST_RUN:
            return None
        if not one_cpu():
            return None
        rows = math.prod(shape[a] for a in axes)
        for a in axes:
            # What is left of the last axis is to fill a processor's vectors.
            left = shape[a] if a == len(shape) - 1 else rows
            for width in _WIDTHS:
                if shape[a] % width == 0 and left // width > _SHORT:
                    return cls(a, width, axes)
        return None

    def view(self, v: Any) -> Any:
        """An array with the parts on an axis of their own; `None` is `None`.

        In front of the last axis is one more, of size 1, for terms of each element
        that are summed in one loop: there, what they read is still in cache.
        """
        if v is None:
            return None
        parts = (1, 1) if v.shape[self.axis] == 1 else (self.width, -1)
        v = v.reshape((*v.shape[: self.axis], *parts, *v.shape[self.axis + 1 :]))
        return jnp.expand_dims(v, -2)

    def total(self, terms: jax.Array) -> jax.Array:
        """Sums over an array in the view; the summed axes of the original stay."""
        width = range(self.width)
        parts = (lax.index_in_dim(terms, i, self.axis, False) for i in width)
        terms = functools.reduce(operator.add, parts)
        last = terms.ndim - 2  # of the original; it is one further now
        return terms.sum([a + (a == last) for a in self.axes], keepdims=True)

    def repeat(self, stat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Repeats `stat`, of size 1 along the summed axes, to `shape`.

        Its transpose is such a sum.
        """
        part = list(shape)
        part[self.axis] //= self.width
        parts = [jnp.broadcast_to(stat, part)] * self.width
        return jnp.concatenate(parts, self.axis)


def once(stat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Has what belongs to a feature computed before the loop over `shape`.

    XLA on CPU would compute it anew for each element. It never puts a sum into a loop
    that reads it, so this is one, of the value and a zero.
    """
    if math.prod(shape) < _LEAST_ELEMENTS or platform() != "cpu":
        return stat
    first = np.arange(2).reshape(2, *[1] * stat.ndim) == 0
    return jnp.where(first, stat[None], jnp.zeros_like(stat)[None]).sum(0)
