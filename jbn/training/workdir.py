"""Locks the folder of a run for one process at a time."""

import contextlib
import datetime
import re
from collections.abc import Iterator
from pathlib import Path

import filelock

from jbn.training.config import LOCK, Config
from jbn.training.errors import UsageError


@contextlib.contextmanager
def reserved(config: Config) -> Iterator[Path]:
    """Locks the folder of a run, so that no other process trains in it.

    The folder is created if it is missing, and removed again if nothing was written to
    it.

    Args:
        config: The configuration. Without `workdir`, a new folder in `runs/` is used.

    Yields:
        The folder.

    Raises:
        UsageError: If another process has locked it, or it cannot be written.
    """
    made: list[Path] = []
    try:
        folder = _make(config, made)
        lock = filelock.FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise UsageError(
            f"Another process trains in {config.workdir}. Wait until it has ended, or "
            "choose another --workdir."
        ) from error
    except (OSError, NotImplementedError) as error:
        _remove(made)
        raise UsageError(
            f"--workdir={config.workdir or 'runs'} cannot be written: "
            f"{getattr(error, 'strerror', None) or error}. Choose another."
        ) from error
    try:
        yield folder
    finally:
        lock.release()
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
        _remove(made)


def _make(config: Config, made: list[Path]) -> Path:
    """Makes the folder and its parents, and records which were missing."""
    if config.workdir is not None:
        _make_parents(config.workdir, made)
        return config.workdir
    name = config.dataset
    data = Path(name).stem if Path(name).is_absolute() else name
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    title = re.sub("[/:]", "-", f"{data}-{config.model}-seed{config.seed}-{now}")
    first = Path("runs") / title
    _make_parents(first.parent, made)
    folder, count = first, 1
    while True:
        try:
            folder.mkdir()
            made.append(folder)
            return folder
        except FileExistsError:  # Another run was started in the same second.
            count += 1
            folder = first.with_name(f"{first.name}-{count}")


def _make_parents(folder: Path, made: list[Path]) -> None:
    missing = []
    for path in (folder, *folder.parents):
        if path.exists():
            break
        missing.append(path)
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        made.append(path)
    if not folder.is_dir():
        raise NotADirectoryError(20, "it is not a folder")


def _remove(made: list[Path]) -> None:
    for path in reversed(made):
        with contextlib.suppress(OSError):  # It is not empty.
            path.rmdir()
