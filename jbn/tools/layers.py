"""The batch norm layers of a model, ours and Flax's, found by path."""

import dataclasses
import fnmatch
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from flax import nnx

import jbn.linen
import jbn.nnx


LINEN_NORMS = (jbn.linen.BatchNorm, nn.BatchNorm)
NNX_NORMS = (jbn.nnx.BatchNorm, nnx.BatchNorm)

# Which layers: patterns of paths such as "encoder/*", or a function of the path.
Where = str | Sequence[str] | Callable[[str], bool] | None


def chosen(path: str, where: Where) -> bool:
    """Whether `path`, as `encoder/block_1/norm`, is among those meant by `where`."""
    if where is None:
        return True
    if callable(where):
        return bool(where(path))
    patterns = [where] if isinstance(where, str) else where
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def is_linen(model: Any) -> bool:
    """Whether `model` is a Linen module, as opposed to an NNX one."""
    if isinstance(model, nn.Module):
        return True
    if isinstance(model, nnx.Module):
        return False
    raise TypeError(
        "A model must be a `flax.linen.Module` or a `flax.nnx.Module`; got"
        f" {type(model).__name__}."
    )


def nnx_norms(model: nnx.Module) -> dict[str, Any]:
    """The batch norm layers of an NNX model by path; a shared one only once."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, NNX_NORMS)
    }


def key_name(key: Any) -> str:
    """One step of a path in a tree, by name or number."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def stats_nodes(batch_stats: Mapping) -> dict[tuple[str, ...], Mapping]:
    """The parts of Linen's `batch_stats` that are of one layer each, by path."""
    found: dict[tuple[str, ...], Mapping] = {}

    def walk(tree: Any, path: tuple[str, ...]) -> None:
        if not isinstance(tree, Mapping):
            return
        if {"mean", "var"} <= set(tree) and not isinstance(tree["mean"], Mapping):
            found[path] = tree
            return
        for name, value in tree.items():
            walk(value, (*path, name))

    walk(batch_stats, ())
    return found


def with_nodes(batch_stats: Mapping, nodes: Mapping[tuple[str, ...], Any]) -> dict:
    """`batch_stats` with the given layers in place of those at their paths."""

    def walk(tree: Any, path: tuple[str, ...]) -> Any:
        if path in nodes:
            return nodes[path]
        if not isinstance(tree, Mapping):
            return tree
        return {name: walk(value, (*path, name)) for name, value in tree.items()}

    return walk(batch_stats, ())


def ours(layer: Any) -> type:
    """The class of ours that a layer is of, or that takes its place."""
    if isinstance(layer, jbn.linen.BatchNorm | jbn.nnx.BatchNorm):
        return type(layer)
    return jbn.linen.BatchNorm if isinstance(layer, nn.Module) else jbn.nnx.BatchNorm


def arguments(layer: Any, cls: type) -> dict[str, Any]:
    """What `cls` must be constructed with to be like `layer`, as far as it can."""
    if issubclass(cls, nn.Module):
        names = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    else:
        names = set()
        for base in cls.__mro__[:-1]:
            if "__init__" in vars(base):
                names |= set(inspect.signature(base.__init__).parameters)
        names = {n for n in names if n[0] != "_"} - {"self", "rngs", "options"}
    return {name: getattr(layer, name) for name in names if hasattr(layer, name)}
