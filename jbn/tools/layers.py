"""Layers of a model by path, and their selection by `where`."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
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


def what_matches(paths: Sequence[str]) -> str:
    """What a tool takes, for the error that no batch norm among `paths` matches."""
    if paths:
        return 'Pass `where=` these paths, or patterns of them such as "*norm*".'
    return (
        "Batch norms are layers of ours, of Flax's `BatchNorm`, and of classes in"
        " `also=`; layers without running statistics are none."
    )


def few(paths: Sequence[str]) -> str:
    """The first of many paths, for a message."""
    text = ", ".join(map(repr, paths[:4]))
    return (f"{text}, ... ({len(paths)})" if len(paths) > 4 else text) or "none"


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


def check_variables(variables: Any) -> None:
    """Refuses what are neither Linen's variables nor an NNX model."""
    if not isinstance(variables, Mapping | nnx.Module):
        raise TypeError(
            "`variables` must be Linen's variables, a dict with `params` and"
            f" `batch_stats`, or an NNX model; got {type(variables).__name__}."
        )


def key_name(key: Any) -> str:
    """One step of a path in a tree, by name or number."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
