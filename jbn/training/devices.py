"""Selects the devices to run on, before JAX initializes any."""

from typing import Any, Literal

import jax

from jbn.training.errors import UsageError


Device = Any  # Type checkers do not accept `jax.Device` as a type.
Accelerator = Literal["cpu", "gpu", "tpu"]

_INSTALL = {
    "gpu": 'For an NVIDIA GPU: pip install -U "jax[cuda13]" (and a driver).',
    "tpu": 'On a machine with a TPU: pip install -U "jax[tpu]".',
    "cpu": "JAX always has a CPU, unless JAX_PLATFORMS hides it: unset that.",
}


def select_devices(
    accelerator: Accelerator | None, num_devices: int | None
) -> list[Device]:
    """Finds the requested devices. Call it before any use of a device.

    Args:
        accelerator: The kind; `None` for JAX's default.
        num_devices: Number of devices of each process. CPU devices are virtual, so any
            number is available. `None` for all, or one CPU.

    Returns:
        The devices of all processes, ordered by process.

    Raises:
        UsageError: If there are none of that kind, or not enough.
    """
    try:
        # No effect on other platforms, where the number is fixed.
        jax.config.update("jax_num_cpu_devices", num_devices or 1)
    except RuntimeError:
        pass  # JAX is already initialized: the number is checked below.
    if accelerator is not None:
        _require(accelerator)
    local = jax.local_devices()
    count = num_devices
    if count is None:
        count = 1 if local[0].platform == "cpu" else len(local)
    if count > len(local):
        raise UsageError(
            f"--num-devices={num_devices}, but JAX found {describe(local)}. "
            "Use at most that number, or virtual ones with --accelerator=cpu."
        )
    by_process: dict[int, list[Device]] = {}
    for device in sorted(jax.devices(), key=lambda d: (d.process_index, d.id)):
        by_process.setdefault(device.process_index, []).append(device)
    return [d for devices in by_process.values() for d in devices[:count]]


def _require(accelerator: Accelerator) -> None:
    """Makes JAX only use `accelerator`, or raises an error with the fix."""
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    platform = "cuda" if accelerator == "gpu" else accelerator
    try:
        jax.config.update("jax_platforms", platform)
        if jax.default_backend() == accelerator:
            return
    except Exception:  # JAX may raise anything here, even an empty AssertionError.
        pass
    jax.config.update("jax_platforms", before)
    try:
        found = f"found only {describe(jax.devices())}"
    except Exception:
        found = "found no device at all"
    raise UsageError(
        f"--accelerator={accelerator}, but JAX {found}. {_INSTALL[accelerator]} "
        "Without --accelerator, JAX's default is used."
    )


def describe(devices: list[Device]) -> str:
    """The number and kind of the devices, in words."""
    platform, kind = devices[0].platform.upper(), devices[0].device_kind
    name = platform if kind.upper() == platform else f"{platform} ({kind})"
    processes = len({device.process_index for device in devices})
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{len(devices)} {name}{where}"
