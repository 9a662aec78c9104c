"""What a run was started with and on, for its folder."""

import datetime
import importlib.metadata
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from jbn.training.devices import Device, describe


_PACKAGES = ("jbn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_GIT_SECONDS = 2


def environment(devices: Sequence[Device]) -> dict[str, Any]:
    """Describes this process.

    Args:
        devices: Those of the run.

    Returns:
        Time, command line, host, devices, versions, and the git commit of the folder in
        which the process was started, by name; without what is not known.
    """
    return {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "host": socket.gethostname(),
        "devices": describe(list(devices)),
        "python": platform.python_version(),
        **{name: version for name in _PACKAGES if (version := _version(name))},
        **_git(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any]:
    # One process for both: the commit is in a line that starts with "# branch.oid".
    command = "git status --porcelain=v2 --branch --untracked-files=no"
    try:
        found = subprocess.run(
            command.split(),
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):  # No git, or no repository.
        return {}
    headers = [line.split() for line in found if line.startswith("# ")]
    values = {name: rest[0] for _, name, *rest in headers}
    commit = values.get("branch.oid", "(initial)")
    if commit == "(initial)":  # Nothing is committed yet.
        return {}
    return {"git_commit": commit, "git_changed": len(found) > len(headers)}
