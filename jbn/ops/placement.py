"""Where this code will run, as far as can be known while it is traced."""

import math

import jax


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
        if kind != jax.sharding.AxisType.Manual
    )


def one_cpu() -> bool:
    """Whether arrays are as whole as they look, and on a CPU."""
    return platform() == "cpu" and num_shards() == 1
