"""Layers of a model by path, and their selection by `where`."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx


# Selects layers: patterns of paths such as "encoder/*", or a function of the path.
Where = str | Sequence[str] | Callable[[str], bool] | None


def chosen(path: str, where: Where) -> bool:
    """Whether `where` selects `path`, such as `encoder/block_1/norm`."""
    if where is None:
        return True
    if callable(where):
        return bool(where(path))
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def is_linen(model: Any) -> bool:
    """Whether `model` is a Linen module, not an NNX module."""
    if isinstance(model, nn.Module):
        return True
    if isinstance(model, nnx.Module):
        return False
    raise TypeError(
        "A model must be a `flax.linen.Module` or a `flax.nnx.Module`; got"
        f" {type(model).__name__}."
    )


def key_name(key: Any) -> str:
    """One step of a path in a tree, by name or number."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
