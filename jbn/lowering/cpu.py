"""Sums that XLA on CPU compiles to fast loops.

Measured on two x86 cores (`benchmarks/op.py`, `docs/benchmarks.md`): merged axes are
summed up to ten times as fast, split sums save one pass over memory.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jaxlib.version
from jax import lax

from jbn.axes import is_static
from jbn.lowering.inline import total
from jbn.lowering.late import Target


# Since jaxlib 0.10.2, XLA on CPU computes the terms of a sum in the loop that adds
# them, as fast over several axes as over one, if nothing else reads these terms or a
# part of them. Before, it materialized the terms, and `Merged` and `Split` avoid that.
_FUSES_SUMS = jaxlib.version.__version_info__ >= (0, 10, 2)


def fuses_sums(target: Target) -> bool:
    """Whether a sum and its terms share a loop, where nothing else reads the terms."""
    return target.platform == "cpu" and _FUSES_SUMS


@dataclasses.dataclass(frozen=True)
class Merged:
    """A view of arrays of the same rank with neighboring axes merged, on one CPU.

    XLA on CPU sums over one axis up to ten times as fast as over three. It cannot merge
    two axes that are both split over devices without gathering them.

    Use it for sums only. If the last operation on an array is a reshape, XLA recomputes
    the array in each loop that reads it, and keeps all its operands alive.
    """

    runs: tuple[tuple[int, ...], ...]  # the original axes of each axis of the view
    axes: tuple[int, ...]  # axes of the view that are summed over

    @classmethod
    def of(cls, target: Target, axes: tuple[int, ...], *arrays: Any) -> "Merged":
        """Merges neighbors among `axes` where all `arrays` agree.

        Arrays agree if each has size 1 along both neighbors, or along neither.
        """
        shapes = [v.shape for v in arrays if v is not None]
        runs: list[tuple[int, ...]] = []
        for a in range(len(shapes[0])):
            if (
                target.one_cpu
                and not fuses_sums(target)
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
        """The view of an array; `None` stays `None`."""
        if v is None or len(self.runs) == v.ndim:
            return v
        return v.reshape([math.prod(v.shape[a] for a in run) for run in self.runs])

    def stat(self, v: jax.Array, lead: int = 0) -> jax.Array:
        """A statistic of the view, with `lead` leading axes, at the full rank."""
        sizes = zip(self.runs, v.shape[lead:], strict=True)
        shape = [n for run, size in sizes for n in (size, *[1] * (len(run) - 1))]
        return v.reshape((*v.shape[:lead], *shape))


# Number of parts that rows are split into. XLA fuses at most 15 copies of the terms
# into a loop, which is two times seven. Fewer than four parts gain little.
_PARTS = 7, 8, 6, 5, 4
# XLA's fast kernel only sums longer axes.
_SHORT = 32
# Smallest array, and smallest last axis, that are worth the additional operations.
_LEAST_ELEMENTS, _LEAST_RUN = 1 << 15, 16


@dataclasses.dataclass(frozen=True)
class Split:
    """Sums over rows that are split into a few parts, which one expression adds.

    XLA on CPU materializes the terms of a sum, unless they are an array already, and
    adds them in a second kernel. An elementwise sum of parts is computed in the loop
    that computes the terms, so only a fraction is materialized. The added rows are far
    apart, so the processor reads a few long streams.
    """

    axis: int  # the axis that is split
    parts: int
    axes: tuple[int, ...]  # all axes that are summed over

    @classmethod
    def of(
        cls, target: Target, shape: tuple[int, ...], axes: tuple[int, ...]
    ) -> "Split | None":
        """The split of a sum of an array over `axes`; `None` if it gains nothing."""
        if not target.one_cpu or fuses_sums(target):
            return None
        if not shape or not is_static(shape):
            return None
        if math.prod(shape) < _LEAST_ELEMENTS or shape[-1] < _LEAST_RUN:
            return None
        rows = math.prod(shape[a] for a in axes)
        for a in axes:
            # The rest of the last axis has to fill the processor's vector registers.
            left = shape[a] if a == len(shape) - 1 else rows
            for parts in _PARTS:
                if shape[a] % parts == 0 and left // parts > _SHORT:
                    return cls(a, parts, axes)
        return None

    def view(self, v: Any) -> Any:
        """An array with the parts on a separate axis; `None` stays `None`.

        Before the last axis is one of size 1, to stack several terms per element that
        are summed in one loop, while their operands are in cache.
        """
        if v is None or not v.ndim:
            return v
        parts = (1, 1) if v.shape[self.axis] == 1 else (self.parts, -1)
        shape = (*v.shape[: self.axis], *parts, *v.shape[self.axis + 1 :])
        return v.reshape((*shape[:-1], 1, shape[-1]))

    def total(self, terms: jax.Array) -> jax.Array:
        """Sums an array in the view; the summed original axes keep size 1."""
        parts = (
            lax.index_in_dim(terms, i, self.axis, False) for i in range(self.parts)
        )
        terms = functools.reduce(operator.add, parts)
        last = terms.ndim - 2  # of the original; the view has one more axis before it
        return total(terms, [a + (a == last) for a in self.axes])

    def total_of_array(self, v: jax.Array) -> jax.Array:
        """Sums an array that is not in the view, by slices."""
        size = v.shape[self.axis] // self.parts
        parts = (
            lax.slice_in_dim(v, i * size, (i + 1) * size, axis=self.axis)
            for i in range(self.parts)
        )
        return total(functools.reduce(operator.add, parts), self.axes)


def hoisted(stat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A per-feature value, computed before the loop over `shape` instead of in it.

    XLA on CPU would recompute it for each element. A barrier prevents this. Before
    jaxlib 0.10.2 layers in bfloat16 took 10 to 20 % longer with it. There, this sums
    the value and a zero, as XLA never fuses a sum into the loop that reads it.
    """
    if not is_static(shape) or math.prod(shape) < _LEAST_ELEMENTS:
        return stat
    if _FUSES_SUMS:
        return lax.optimization_barrier(stat)
    two = lax.pad(stat[None], stat.dtype.type(0), [(0, 1, 0), *[(0, 0, 0)] * stat.ndim])
    return lax.reduce_sum(two, (0,))
