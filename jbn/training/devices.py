"""Chooses the devices to run on, before JAX has touched any."""

from typing import Any, Literal

import jax

from jbn.training.errors import UsageError


Device = Any  # `jax.Device` is no type to a type checker.
Accelerator = Literal["cpu", "gpu", "tpu"]

_INSTALL = {
    "gpu": 'For an NVIDIA GPU: pip install -U "jax[cuda13]" (and a driver).',
    "tpu": 'On a machine with a TPU: pip install -U "jax[tpu]".',
    "cpu": "JAX always has a CPU, unless JAX_PLATFORMS hides it: unset that.",
}


def select_devices(
    accelerator: Accelerator | None, num_devices: int | None
) -> list[Device]:
    """Finds the devices asked for. To be called before any use of a device.

    Args:
        accelerator: The kind; `None` for whatever JAX takes by itself.
        num_devices: How many, of each process. CPU devices are virtual, and there are
            as many as asked for. `None` for all, or one CPU.

    Returns:
        The devices, of all processes, those of a process in a row.

    Raises:
        UsageError: If there are none of that kind, or not enough.
    """
    try:
        # With no effect on other platforms, where the number is what it is.
        jax.config.update("jax_num_cpu_devices", num_devices or 1)
    except RuntimeError:
        pass  # JAX is in use already: see below whether there are enough.
    if accelerator is not None:
        _require(accelerator)
    local = jax.local_devices()
    count = num_devices
    if count is None:
        count = 1 if local[0].platform == "cpu" else len(local)
    if count > len(local):
        raise UsageError(
            f"--num-devices={num_devices}, but JAX found {describe(local)}. "
            "Ask for no more than that, or for virtual ones with --accelerator=cpu."
        )
    by_process: dict[int, list[Device]] = {}
    for device in sorted(jax.devices(), key=lambda d: (d.process_index, d.id)):
        by_process.setdefault(device.process_index, []).append(device)
    return [d for devices in by_process.values() for d in devices[:count]]


def _require(accelerator: Accelerator) -> None:
    """Makes JAX use nothing but `accelerator`, or raises a message that helps."""
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    platform = "cuda" if accelerator == "gpu" else accelerator
    try:
        jax.config.update("jax_platforms", platform)
        if jax.default_backend() == accelerator:
            return
    except Exception:  # JAX raises anything here, an empty AssertionError included.
        pass
    jax.config.update("jax_platforms", before)
    try:
        found = f"found only {describe(jax.devices())}"
    except Exception:
        found = "found no device at all"
    raise UsageError(
        f"--accelerator={accelerator}, but JAX {found}. {_INSTALL[accelerator]} "
        "Without --accelerator, whatever JAX finds is used."
    )


def describe(devices: list[Device]) -> str:
    """Says how many devices there are, and of which kind."""
    platform, kind = devices[0].platform.upper(), devices[0].device_kind
    name = platform if kind.upper() == platform else f"{platform} ({kind})"
    processes = len({device.process_index for device in devices})
    where = f" in {processes} processes" if processes > 1 else ""
    return f"{len(devices)} {name}{where}"
