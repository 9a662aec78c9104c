"""Controls which passes over memory XLA may fuse, and what it materializes."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn.lowering.cpu import fuses_sums, hoisted
from jbn.lowering.inline import where
from jbn.lowering.late import Target, expected_platform, linear


def separate(arrays: Any, views: int = 1) -> list[Any]:
    """Views of arrays, such that XLA does not fuse readers of different views.

    Without them, XLA materializes values that two passes over the same array compute,
    or keeps those of the forward pass. A TPU does not need this, and fuses passes with
    the surrounding convolutions: there, all views are the arrays themselves. On a CPU
    all views but the first are the same.
    """
    leaves, tree = jax.tree.flatten(arrays)
    found = linear(_Separate(views, len(leaves)), *leaves)
    parts = [found[i : i + len(leaves)] for i in range(0, len(found), len(leaves))]
    return [jax.tree.unflatten(tree, part) for part in parts]


def add_up(terms: list[jax.Array], dtype: np.dtype) -> jax.Array:
    """The sum of `terms`, which have one shape and dtype, rounded to `dtype`.

    Where XLA fuses sums over rows with what they sum, the transpose gives each term a
    view of the cotangent, or the cast of it would be materialized.
    """
    return linear(_AddUp(terms[0].dtype, jnp.dtype(dtype)), *terms)[0]


def rematerialized(f: Callable[..., Any]) -> Callable[..., Any]:
    """Rematerializes `f` in the backward pass: only its arguments are saved.

    `f` has to read large arguments through `separate`, or XLA reuses the values of the
    forward pass, and keeps them in memory.
    """
    return jax.checkpoint(f, prevent_cse=False)


def saves_output() -> bool:
    """Whether a backward pass should read an output instead of an operand.

    A reader of the output, such as a convolution, most likely saves it anyway. On a TPU
    XLA recomputes it instead. Tracing decides what is saved, so this is the only choice
    that cannot wait for the lowering.
    """
    return expected_platform() != "tpu"


def hoist(stat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Hoists a per-feature value out of the elementwise loop over `shape`."""
    return linear(_Hoist(tuple(shape)), stat)[0]


def materialize(v: jax.Array, dtype: np.dtype) -> jax.Array:
    """`v`, with a cotangent that is materialized on GPU.

    There, XLA would recompute the cotangent from all its operands. It also drops a cast
    to 16 bits before a 32-bit operation, and saves the wide values. The cotangent has
    to be exact in `dtype`.
    """
    return linear(_Materialize(jnp.dtype(dtype)), v)[0]


def gate(chosen: jax.Array, v: jax.Array, dtype: np.dtype) -> jax.Array:
    """`v` where `chosen`, else 0.

    The cotangent has to be exact in `dtype`. It is cast to `dtype` before the
    selection: then XLA materializes it in 16 bits, and saves no mask.
    """
    return linear(_Gate(jnp.dtype(dtype)), chosen, v)[0]


def _behind_barriers(arrays: Any, views: int) -> list[Any]:
    """Views whose readers XLA does not fuse with each other.

    XLA decides what to compute in the loop of a sum before it fuses sums over the same
    arrays, and materializes values that both read. Barriers around the same arrays
    would be merged, so each barrier is around the previous one.
    """
    found = []
    for _ in range(views):
        arrays = lax.optimization_barrier(arrays)
        found.append(arrays)
    return found


@dataclasses.dataclass(frozen=True)
class _Separate:
    views: int
    leaves: int
    constants = 0

    def avals_out(self, *avals: Any) -> list[Any]:
        return [*avals] * self.views

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        if target.platform not in ("cpu", "gpu"):
            return [*arrays] * self.views
        if target.platform == "cpu" and not fuses_sums(target):
            first, other = (lax.optimization_barrier(arrays) for _ in range(2))
            return [*first, *other * (self.views - 1)]
        return [v for view in _behind_barriers(arrays, self.views) for v in view]

    def transpose(self, operands: list[Any], results: int) -> "_Together":
        return _Together(self.views, self.leaves)


@dataclasses.dataclass(frozen=True)
class _Together:
    """The transpose of `_Separate`: the sum of the cotangents of all views."""

    views: int
    leaves: int
    constants = 0

    def avals_out(self, *avals: Any) -> list[Any]:
        return [*avals[: self.leaves]]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        views = [arrays[i :: self.leaves] for i in range(self.leaves)]
        return [functools.reduce(operator.add, view) for view in views]

    def transpose(self, operands: list[Any], results: int) -> _Separate:
        return _Separate(self.views, self.leaves)


@dataclasses.dataclass(frozen=True)
class _AddUp:
    wide: np.dtype
    dtype: np.dtype
    constants = 0

    def avals_out(self, *avals: Any) -> list[Any]:
        return [avals[0].update(dtype=self.dtype)]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        return [functools.reduce(operator.add, arrays).astype(self.dtype)]

    def transpose(self, operands: list[Any], results: int) -> "_Spread":
        return _Spread(len(operands), self.wide, self.dtype)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """The transpose of `_AddUp`."""

    views: int
    wide: np.dtype
    dtype: np.dtype
    constants = 0

    def avals_out(self, *avals: Any) -> list[Any]:
        return [avals[0].update(dtype=self.wide)] * self.views

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        (ct,) = arrays
        if not fuses_sums(target):
            return [ct.astype(self.wide)] * self.views
        return [v.astype(self.wide) for v in _behind_barriers(ct, self.views)]

    def transpose(self, operands: list[Any], results: int) -> _AddUp:
        return _AddUp(self.wide, self.dtype)


@dataclasses.dataclass(frozen=True)
class _Hoist:
    shape: tuple[int, ...]
    constants = 0

    def avals_out(self, *avals: Any) -> list[Any]:
        return [avals[-1]]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        if target.platform == "cpu":
            return [hoisted(arrays[0], self.shape)]
        return [arrays[0]]

    def transpose(self, operands: list[Any], results: int) -> "_Hoist":
        return _Hoist(())


@dataclasses.dataclass(frozen=True)
class _Materialize:
    dtype: np.dtype
    backward: bool = False
    constants = 0

    def avals_out(self, *avals: Any) -> list[Any]:
        return [avals[-1]]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        (v,) = arrays
        if not self.backward or target.platform != "gpu":
            return [v]
        return [lax.optimization_barrier(v.astype(self.dtype)).astype(v.dtype)]

    def transpose(self, operands: list[Any], results: int) -> "_Materialize":
        return dataclasses.replace(self, backward=not self.backward)


@dataclasses.dataclass(frozen=True)
class _Gate:
    dtype: np.dtype
    backward: bool = False
    constants = 1

    def avals_out(self, *avals: Any) -> list[Any]:
        return [avals[-1]]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        chosen, v = arrays
        wide, v = v.dtype, v.astype(self.dtype) if self.backward else v
        return [where(chosen, v, 0).astype(wide)]

    def transpose(self, operands: list[Any], results: int) -> "_Gate":
        return dataclasses.replace(self, backward=not self.backward)
