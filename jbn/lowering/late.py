"""Operations that are lowered by platform and number of devices, and traced once.

JAX knows the platform and the devices when it lowers a program, not when it traces it:
`jax.export` traces on one machine for others. A *program* here is a function
`program(target, *arrays)` that gets both during lowering. A trace shows it as one
opaque equation.
"""

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.api_util import debug_info
from jax.core import ShapedArray
from jax.extend import linear_util
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval


# Switches this package off. The tests also run with `_JBN_LOWERING=0`.
ENABLED = os.environ.get("_JBN_LOWERING", "1") != "0"

Platform = Literal["cpu", "gpu", "tpu", "shapes"]


class Target(NamedTuple):
    """The platform and devices that a program is lowered for.

    Attributes:
        platform: `None` for the plain form.
        shards: Number of devices that the compiler may shard an array over, which the
            program sees as a whole. Devices of manual mesh axes do not count.
    """

    platform: Platform | None
    shards: int

    @property
    def one_cpu(self) -> bool:
        """Whether the platform is a CPU, and arrays are not sharded by the compiler."""
        return self.platform == "cpu" and self.shards == 1


PLAIN = Target(None, 1)
# For abstract evaluation, which only needs shapes and dtypes.
SHAPES = Target("shapes", 1)


@runtime_checkable
class Program(Protocol):
    """A hashable function from a target and arrays to a list of arrays."""

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        """Computes the program for a target."""
        ...


@runtime_checkable
class Linear(Program, Protocol):
    """A program that is linear in all operands after the first `constants`."""

    constants: int

    def transpose(self, operands: list[Any], results: int) -> "Linear":
        """The program from constants and cotangents to the operands' cotangents.

        `operands` have the shapes of the linear operands.
        """
        ...


def late(f: Callable[..., Any], *operands: Any, **static: Any) -> list[jax.Array]:
    """Calls `f(target, *operands, **static)` with the target it will be lowered for.

    It has no derivative: call it within a custom derivative rule.

    Args:
        f: A module-level function that returns a list of arrays. Their shapes and
            dtypes must not depend on the target.
        *operands: Pytrees of arrays.
        **static: Hashable arguments.
    """
    leaves, tree = jax.tree.flatten(operands)
    return late_p.bind(*leaves, program=_Call(f, tree, tuple(static.items())))


def linear(program: Linear, *operands: jax.Array) -> list[jax.Array]:
    """Calls a linear program; differentiable to any order."""
    return late_p.bind(*operands, program=program)


def expected_platform() -> Platform | str:
    """The platform this trace is probably for: that of the mesh, or the default.

    Only for the choice that tracing has to make: what to save for the backward pass.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return jax.default_backend()
    # JAX 0.10.0 has no platform here; it calls the kind of a CPU "cpu".
    return getattr(device, "platform", device.device_kind)


def target_of(platform: Platform | None, axis_context: Any) -> Target:
    """The target of a lowering, from the devices that JAX lowers for."""
    if hasattr(axis_context, "manual_axes"):
        sizes = axis_context.mesh.shape.items()
        manual = axis_context.manual_axes
        shards = math.prod(size for name, size in sizes if name not in manual)
    else:
        shards = getattr(axis_context, "num_devices", 1)
    return Target(platform if ENABLED else None, shards)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A function with its static arguments, of pytrees."""

    f: Callable[..., Any]
    tree: Any
    static: tuple[tuple[str, Any], ...]

    def __call__(self, target: Target, *leaves: jax.Array) -> list[jax.Array]:
        operands = jax.tree.unflatten(self.tree, leaves)
        return self.f(target, *operands, **dict(self.static))


@dataclasses.dataclass(frozen=True)
class _Vmapped:
    """A program with a batch axis in front of each result."""

    program: Any
    axes: tuple[int | None, ...]

    def __call__(self, target: Target, *arrays: jax.Array) -> list[jax.Array]:
        one = functools.partial(self.program, target)
        return jax.vmap(one, in_axes=self.axes)(*arrays)

    @property
    def constants(self) -> int:
        return self.program.constants

    def transpose(self, operands: list[Any], results: int) -> "_Vmapped":
        one = [jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for v in operands]
        axes = (*self.axes[: self.constants], *[0] * results)
        return _Vmapped(self.program.transpose(one, results), axes)


late_p = Primitive("jbn_late")
late_p.multiple_results = True


@late_p.def_abstract_eval
def _abstract_eval(*avals, program):
    if hasattr(program, "avals_out"):
        return program.avals_out(*avals)
    if all(aval == ShapedArray(aval.shape, aval.dtype) for aval in avals):
        # Outside of meshes: the lowering will most likely use the same jaxpr.
        platform: Any = expected_platform() if ENABLED else None
        jaxpr, _ = _jaxpr(program, Target(platform, 1), avals, _x64())
        return [v.aval for v in jaxpr.outvars]
    # JAX's own rules handle meshes and varying axes.
    return jax.make_jaxpr(functools.partial(program, SHAPES))(*avals).out_avals


@functools.lru_cache(1024)
def _jaxpr(program, target, avals, enable_x64):
    """The jaxpr of a program and its constants, outside of all meshes."""

    def flat(*arrays: jax.Array) -> list[jax.Array]:
        return program(target, *arrays)

    # `jax.make_jaxpr` takes a millisecond longer, which for ResNet-50 on JAX 0.12 is a
    # third of the time to lower it.
    traced = linear_util.wrap_init(flat, debug_info=debug_info("jbn", flat, avals, {}))
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        jaxpr, _, constants = partial_eval.trace_to_jaxpr_dynamic(traced, avals)
    return jaxpr, constants


def _x64() -> bool:
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


@late_p.def_impl
def _impl(*arrays, program):
    # Also under `jax.disable_jit()`: this is one primitive operation.
    with jax.disable_jit(False):
        return _jitted(program)(*arrays)


@functools.lru_cache
def _jitted(program):
    return jax.jit(functools.partial(late_p.bind, program=program))


# JAX 0.10 and later require this argument; earlier versions do not know it.
_SUBCOMP = inspect.signature(mlir.jaxpr_subcomp).parameters
_NO_TRACEBACK = {"outer_traceback": None} if "outer_traceback" in _SUBCOMP else {}


def _lower(platform, ctx, *values, program):
    target = target_of(platform, ctx.module_context.axis_context)
    # The program is local: meshes were handled when it was traced.
    avals = tuple(ShapedArray(a.shape, a.dtype) for a in ctx.avals_in)
    jaxpr, constants = _jaxpr(program, target, avals, _x64())
    captured = [mlir.ir_constant(value) for value in constants]
    if not jaxpr.constvars:  # On JAX 0.12 they are the first arguments.
        values, captured = (*captured, *values), []
    # `mlir.lower_fun` would retrace the jaxpr, a fifth of the lowering time.
    results, _ = mlir.jaxpr_subcomp(
        ctx.module_context,
        jaxpr,
        ctx.name_stack,
        ctx.tokens_in,
        captured,
        *values,
        dim_var_values=ctx.dim_var_values,
        const_lowering=ctx.const_lowering,
        **_NO_TRACEBACK,
    )
    return results


mlir.register_lowering(late_p, functools.partial(_lower, None))
for _name in ("cpu", "cuda", "rocm", "tpu"):
    _platform = "gpu" if _name in ("cuda", "rocm") else _name
    mlir.register_lowering(late_p, functools.partial(_lower, _platform), _name)


def _batch(arrays, axes, *, program):
    axes = [a if isinstance(a, int) else None for a in axes]
    size = next(v.shape[a] for v, a in zip(arrays, axes, strict=True) if a is not None)
    # Move the axis of all linear operands to the front, where cotangents have it.
    arrays = list(arrays)
    for i in range(getattr(program, "constants", len(arrays)), len(arrays)):
        if axes[i] is None:
            arrays[i] = lax.broadcast(arrays[i], (size,))
        else:
            arrays[i] = jnp.moveaxis(arrays[i], cast(int, axes[i]), 0)
        axes[i] = 0
    results = late_p.bind(*arrays, program=_Vmapped(program, tuple(axes)))
    return results, [0] * len(results)


batching.primitive_batchers[late_p] = _batch


def _jvp(primals, tangents, *, program):
    results = late_p.bind(*primals, program=program)
    tangents = tangents[program.constants :]
    if all(type(t) is ad.Zero for t in tangents):
        return results, [ad.Zero(jax.typeof(v).to_tangent_aval()) for v in results]
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    constants = primals[: program.constants]
    return results, late_p.bind(*constants, *tangents, program=program)


ad.primitive_jvps[late_p] = _jvp


def _transpose(cotangents, *operands, program):
    constants = operands[: program.constants]
    avals = [v.aval for v in operands[program.constants :]]
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    transposed = program.transpose(avals, len(cotangents))
    results = late_p.bind(*constants, *cotangents, program=transposed)
    return [*[None] * len(constants), *results]


ad.primitive_transposes[late_p] = _transpose
