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
    def ask(*args: str) -> str:
        return subprocess.run(
            ["git", *args],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_SECONDS,
        ).stdout.strip()

    try:
        return {
            "git_commit": ask("rev-parse", "HEAD"),
            "git_changed": ask("status", "--porcelain", "--untracked-files=no") != "",
        }
    except (OSError, subprocess.SubprocessError):  # No git, or no repository.
        return {}
