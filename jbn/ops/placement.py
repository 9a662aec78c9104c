"""Where this code will run, as far as can be known while it is traced."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes


def platform() -> str:
    """What this is compiled for: that of the mesh, or else the default.

    The mesh is that of `jax.set_mesh`, `shard_map` or `pmap`.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None:
        return jax.default_backend()
    # JAX 0.10.0 has no platform there, and calls a CPU's kind "cpu".
    return getattr(device, "platform", device.device_kind)


def num_shards() -> int:
    """How many devices an array may be spread over that looks whole to this code."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    return math.prod(
        size
        for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind != AxisType.Manual
    )


def one_cpu() -> bool:
    """Whether arrays are as whole as they look, and on a CPU."""
    return platform() == "cpu" and num_shards() == 1


def spread_by_compiler(
    f: Callable[..., Any], x: jax.Array | jax.ShapeDtypeStruct, like: Any = None
) -> Callable[..., Any]:
    """`f`, in which the compiler spreads arrays over an `Explicit` mesh, too.

    There, some operations need to be told how to spread what they make.

    Args:
        f: A function of arrays, and of pytrees of such.
        x: One of them, that says which mesh.
        like: What comes out is spread as these arrays are; `None` for the same on all
            devices.
    """
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return f

    def as_is(v: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, jax.typeof(v).sharding.spec)

    everywhere = NamedSharding(mesh, PartitionSpec())
    out = everywhere if like is None else jax.tree.map(as_is, like)
    return auto_axes(f, axes=explicit, out_sharding=out)
