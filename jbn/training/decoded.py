"""Caches decoded images for later runs."""

import contextlib
import secrets
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


Arrays = Mapping[str, np.ndarray]

_MOST_BYTES = 2**30


def keep(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Reads arrays from a file, or makes them and writes it.

    A file that cannot be read is replaced. If the file cannot be written, or would be
    larger than 1 GiB, it is skipped, and the next run makes the arrays again.

    Args:
        path: A `.npz` file. Its name must encode everything that the arrays depend on.
        make: Makes the arrays.

    Returns:
        The arrays, by name.
    """
    # (The error of a truncated file depends on where it ends.)
    with contextlib.suppress(
        OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error
    ):
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return dict(archive)
    arrays = make()
    if sum(x.nbytes for x in arrays.values()) <= _MOST_BYTES:
        with contextlib.suppress(OSError):
            _write(path, arrays)
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    # Atomically: other runs may read or write it as well.
    new = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.npz")
    try:
        np.savez(new, **arrays)  # type: ignore[arg-type]
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
