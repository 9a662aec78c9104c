"""Functions under an `Explicit` mesh, inside of which XLA propagates shardings."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes


def sharded_by_compiler(
    f: Callable[..., Any], x: Any, out: Any = None
) -> Callable[..., Any]:
    """`f`, with the explicit axes of the mesh of `x` made automatic.

    Args:
        f: A function of pytrees of arrays.
        x: An array on the mesh.
        out: A pytree of arrays, or of partition specs, with the sharding of the
            results.
    """
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
    if not explicit:
        return f

    def sharding(like: Any) -> NamedSharding:
        spec = like if isinstance(like, PartitionSpec) else spec_of(like)
        return NamedSharding(mesh, spec)

    is_spec = lambda v: isinstance(v, PartitionSpec)
    out = jax.tree.map(sharding, out, is_leaf=is_spec)
    return auto_axes(f, axes=explicit, out_sharding=out)


def spec_of(v: Any) -> PartitionSpec:
    """The sharding of an array over the explicit axes of its mesh."""
    return jax.typeof(v).sharding.spec


def features_spec(x: Any, feature_axes: tuple[int, ...]) -> PartitionSpec:
    """The sharding of a statistic of `x` with one entry per feature."""
    spec = spec_of(x)
    return PartitionSpec(*(spec[a] if a < len(spec) else None for a in feature_axes))
