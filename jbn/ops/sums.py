"""Sums over rows, in the forms that XLA on CPU compiles best; elsewhere plain ones."""

import dataclasses
import math
from typing import Any

import jax

from jbn.ops.placement import one_cpu


@dataclasses.dataclass(frozen=True)
class Merged:
    """A view of arrays of one rank in which neighboring axes are one, on one CPU.

    XLA on CPU sums over one axis up to ten times as fast as over three. Of two axes
    that are both cut it cannot make one without gathering them, and on a TPU, whose
    arrays are in tiles, hardly any without copying.
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
