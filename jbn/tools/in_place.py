"""Classes of NNX layers that take the place of another class in a model's code.

A model may ask for the class of a layer by `isinstance`, and passes the arguments of
this class. Linen's layers need none of this: their calls are intercepted.
"""

import copyreg
import dataclasses
import functools
from typing import Any

from flax import nnx

import jbn.nnx
from jbn.options import CallOptions, options_of
from jbn.tools.norms import Norm, known_names


@dataclasses.dataclass(frozen=True)
class Place:
    """What a class made by `in_place_of` stands for.

    Attributes:
        cls: Its base class, of ours.
        theirs: The class of the layer that was replaced.
        names: From our names of call arguments to theirs.
        norm: What the tools take it for.
    """

    cls: type
    theirs: type
    names: tuple[tuple[str, Any], ...]
    norm: Norm | None


class _InPlace(type(nnx.Module)):
    """The metaclass, by which pickle finds such classes."""

    jbn_place: Place


def _again(cls: _InPlace) -> tuple[Any, ...]:
    return _in_place_of, (cls.jbn_place.cls, cls.jbn_place.theirs, cls.jbn_place.names)


copyreg.pickle(_InPlace, _again)  # pyright: ignore[reportArgumentType]


def in_place_of(layer: Any, norm: Norm, cls: type) -> type:
    """A subclass of `cls` that takes the place of the class of an NNX layer."""
    place = getattr(type(layer), "jbn_place", None)
    if place is not None:
        return _in_place_of(cls, place.theirs, place.names)
    theirs = nnx.BatchNorm if isinstance(layer, jbn.nnx.BatchNorm) else type(layer)
    if issubclass(cls, theirs):
        return cls
    names = {n: v for n, v in norm.names.items() if n in options_of(CallOptions)}
    mode = norm.names.get("use_running_average")
    if isinstance(mode, str):
        names["use_running_average"] = mode
    return _in_place_of(cls, theirs, tuple(names.items()))


@functools.cache
def _in_place_of(cls: Any, theirs: Any, names: tuple[tuple[str, Any], ...]) -> type:
    norm = None
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if issubclass(cls, jbn.nnx.BatchNorm):
        flax = issubclass(theirs, nnx.BatchNorm)
        norm = Norm(dict(names), False, not flax or known_names(theirs).is_translated)
        if norm.is_translated:

            @functools.wraps(theirs.__call__)
            def call(self, *args, **kwargs):
                x, mode, rest = norm.call(self, args, kwargs, theirs)
                return cls.__call__(self, x, mode, **rest)

            body["__call__"] = call
    body["jbn_place"] = Place(cls, theirs, names, norm)
    return _InPlace(cls.__name__, (cls, theirs), body)
