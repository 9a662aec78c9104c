"""Sums over rows, and their transpose, in the fastest form for each platform."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.lowering import inline
from jbn.lowering.cpu import Merged, Split, fuses_sums
from jbn.lowering.gpu import Blocks
from jbn.lowering.late import Target, linear


def total(v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sums `v` over `axes`, which stay at size 1."""
    if not axes:
        return v
    return linear(_Sum(tuple(axes)), v)[0]


def repeat(stat: jax.Array, like: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Broadcasts `stat` from size 1 to the size of `like` along `axes`.

    The transpose is `total`.
    """
    shape = tuple(n if a in axes else stat.shape[a] for a, n in enumerate(like.shape))
    if not axes or shape == stat.shape:
        return stat
    # The transpose sums a value that is the same on all devices over them. That should
    # happen to the small cotangent, so mark `stat` as varying by device before it is
    # repeated, by adding zeros that vary as `like` does.
    if jax.typeof(stat) != jax.typeof(like).update(shape=stat.shape, dtype=stat.dtype):
        stat = stat + jnp.zeros_like(like, stat.dtype, stat.shape)
    return linear(_Repeat(tuple(axes), shape), stat)[0]


def sum_rows(target: Target, v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`total`, for a known target."""
    blocks = Blocks.of(target, v.shape, axes)
    if blocks is not None:
        return blocks.total(v)
    merged = Merged.of(target, axes, v)
    view = merged.view(v)
    split = Split.of(target, view.shape, merged.axes)
    if split is not None:
        return merged.stat(split.total_of_array(view))
    return merged.stat(inline.total(view, merged.axes))


def power_sums(
    target: Target,
    deviation: Callable[..., jax.Array],
    of: tuple[Any, ...],
    term: Callable[..., jax.Array],
    operands: tuple[Any, ...],
    axes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """The sums of `term(d, *operands)` and `term(abs(d)**2, *operands)` over `axes`.

    Args:
        target: The target of the lowering.
        deviation: An elementwise function: `d = deviation(*of)`, real or complex.
        of: Its arguments: an array, and arrays that broadcast to it, or `None`.
        term: An elementwise function that is linear in its first argument.
        operands: Arrays that broadcast to `d`, or `None`.
        axes: Axes to sum over; they stay at size 1.
    """
    of, operands = apart(target, (of, operands))
    d = deviation(*of)
    split = Split.of(target, d.shape, axes)
    if split is None or jnp.iscomplexobj(d):
        first = sum_rows(target, term(d, *operands), axes)
        if fuses_sums(target):
            of, operands = apart(target, (of, operands))
            d = deviation(*of)
        square = d.real * d.real + d.imag * d.imag if jnp.iscomplexobj(d) else d * d
        return first, sum_rows(target, term(square, *operands), axes)
    # Both in one loop: `d` times 1, and `d` times `d`. The constants depend on the
    # data; otherwise JAX would hoist them out of a `scan`, in their broadcast form.
    first, one = np.array([[True], [False]]), np.ones((), d.dtype)
    d, first, one = lax.optimization_barrier((d, first, one))
    d, operands = split.view(d), tuple(map(split.view, operands))
    factor = inline.where(lax.expand_dims(first, range(d.ndim - 2)), one, d)
    both = split.total(term(d * factor, *operands))
    return both[..., 0, :], both[..., 1, :]


def apart(target: Target, operands: Any) -> Any:
    """The same operands, for a sum over what is computed from them.

    Where XLA fuses sums with their terms, it would materialize what others read, too.
    """
    return lax.optimization_barrier(operands) if fuses_sums(target) else operands


@dataclasses.dataclass(frozen=True)
class _Sum:
    axes: tuple[int, ...]
    constants = 0

    def avals_out(self, v: Any) -> list[Any]:
        kept = tuple(1 if a in self.axes else n for a, n in enumerate(v.shape))
        return [v.update(shape=kept)]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        return [sum_rows(target, arrays[0], self.axes)]

    def transpose(self, operands: list[Any], results: int) -> "_Repeat":
        return _Repeat(self.axes, tuple(operands[0].shape))


@dataclasses.dataclass(frozen=True)
class _Repeat:
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    constants = 0

    def avals_out(self, stat: Any) -> list[Any]:
        return [stat.update(shape=self.shape)]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        return [inline.broadcast_to(arrays[0], self.shape)]

    def transpose(self, operands: list[Any], results: int) -> _Sum:
        return _Sum(self.axes)
