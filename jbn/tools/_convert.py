"""Replace the batch norms inside a model, without editing it, with its variables."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict
from flax.core.scope import Scope

import jbn.linen
import jbn.nnx
from jbn.tools.in_place import in_place_of
from jbn.tools.layers import Where, chosen, is_linen, what_matches
from jbn.tools.norms import (
    OWN_STATISTICS,
    Also,
    Norm,
    Norms,
    ours,
    unrecognized,
    warn_of_unknown,
)


Model = TypeVar("Model", nn.Module, nnx.Module)


def convert(
    model: Model,
    to: type | None = None,
    *,
    where: Where = None,
    also: Also = None,
    **options: Any,
) -> Model:
    """Replaces the batch norm layers inside a model, and keeps their variables.

    Layers of Flax's `BatchNorm` and of ours become layers of the class `to`. They keep
    their arguments (momentum, epsilon, axis, ...) except those in `options`. The same
    holds for copies of Flax's class, recognized by their variables and fields, and for
    classes in `also`. The model's code does not change, and its variables keep their
    names, shapes and values, so its checkpoints still load:

        model = convert(model)                                   # Flax's to ours
        model = convert(model, jbn.linen.FrozenBatchNorm, where="backbone/*")
        model = convert(model, jbn.linen.BatchRenorm, r_max=3.0, d_max=5.0)

    Args:
        model: A Linen or NNX model.
        to: A class of `jbn.linen` or `jbn.nnx`, like the model. Its call must not need
            more arguments than the model passes. By default, `BatchNorm` for Flax's
            layers (and for subclasses, whose own code is lost), and the same class for
            layers of ours.
        where: The layers: one or several patterns of paths such as `"encoder/*"`, or a
            function of the path. By default all.
        also: Foreign batch norms that are not built like Flax's: classes, or a dict
            from a class to its names of our fields and variables. A field may also be
            given by its value, or by a function of the layer:

                also={TheirNorm: {
                    "scale": "weight",
                    "mean": "running_mean",
                    "var": "running_var",
                    "epsilon": "eps",
                    "momentum": lambda layer: 1 - layer.momentum,
                }}

            (The layers of a converted NNX model have our names.) Their call arguments
            may mean `mask` or `weights` to ours, by name, or by a function of the dict
            of these arguments: `{"mask": lambda call: call["paddings"] == 0}`. Then
            their other arguments have no meaning for ours; otherwise, unknown ones
            are refused. `None` for nothing.
        **options: Arguments of `to` that override the layer's.

    Returns:
        For Linen, a module that wraps the model and has the same variables. For NNX, a
        copy of the model. The model's code calls the new layers as it called the old
        ones, and takes them for the same class by `isinstance`.

    Raises:
        TypeError: If `model` is not a Flax model, or `to` not a class for it.
        ValueError: If no layer of the model matches, or one has no field `epsilon` or
            `momentum`, or is called with arguments that our layers do not have. (Linen
            layers are only found when the model runs.)

    Warns:
        UserWarning: If layers with statistics are not recognized.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> norm = nn.BatchNorm(use_running_average=False)
        >>> model = nn.Sequential([nn.Dense(3), norm])
        >>> ours = convert(model, momentum=0.5)
        >>> x = jnp.ones((4, 2))
        >>> variables = model.init(jax.random.key(0), x)
        >>> y, _ = ours.apply(variables, x, mutable=["batch_stats"])
        >>> y.shape
        (4, 3)
    """
    if is_linen(model):
        _check_class(to, jbn.linen.BatchNorm)
        # Hashable, for `jax.jit` with a model as a static argument.
        where = tuple(where) if isinstance(where, list) else where
        return Converted(lambda: model, to, where, FrozenDict(options), Norms(also))  # pyright: ignore[reportReturnType, reportArgumentType]
    _check_class(to, jbn.nnx.BatchNorm)
    return convert_nnx(model, to, where, Norms(also), options)


class Converted(nn.Module):
    """A Linen model with other batch norms inside; made by `convert`.

    Attributes:
        model: Returns the model. (A module here would be a child, with its own name in
            the variables.)
        to: Class of the new layers.
        where: The layers to replace.
        options: Arguments of the new layers that override the old ones.
        norms: Finds the batch norms.
    """

    model: Callable[[], nn.Module]
    to: type | None
    where: Where
    options: Mapping[str, Any]
    norms: Norms

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model on the variables of this module."""
        y, paths = self.run(args, kwargs)
        # (A call may skip all norms.)
        if not paths and not self.variables.get("batch_stats"):
            raise ValueError(nothing_found("convert", self.where, {}))
        return y

    def run(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Any, list[str]]:
        """What the call returns, and the paths of the layers that were replaced."""
        model: Any = self.model().clone(parent=self.scope)
        with swapping(
            "convert", self.to, self.where, self.norms, self.options
        ) as paths:
            return model(*args, **kwargs), paths


@contextlib.contextmanager
def converting(
    to: type | None = None, *, where: Where = None, also: Also = None, **options: Any
) -> Iterator[list[str]]:
    """Replaces the batch norms of all Linen models that run in a `with` block.

    Like `convert`, for calls that a wrapper cannot make (methods other than `__call__`,
    functions that apply a model internally).

    Args:
        to: Class of the new layers, as for `convert`.
        where: Which layers, as for `convert`.
        also: Other people's batch norms, as for `convert`.
        **options: Arguments of the new layers that override the old ones.

    Yields:
        The paths of the layers replaced so far, in the order of their first calls.

    Raises:
        ValueError: If batch norms ran, but none of them matches; or if modules were
            initialized without one.

    Warns:
        UserWarning: As `convert` does.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> layer = nn.BatchNorm(use_running_average=False)
        >>> with converting() as paths:
        ...     variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> sorted(variables["batch_stats"])
        ['mean', 'var']
    """
    with swapping("converting", to, where, Norms(also), options) as paths:
        yield paths


@contextlib.contextmanager
def swapping(
    caller: str,
    to: type | None,
    where: Where,
    norms: Norms,
    options: Mapping[str, Any],
    needed: tuple[str, ...] = ("epsilon", "momentum"),
) -> Iterator[list[str]]:
    """`converting`, for the public function named `caller`.

    `needed` are fields that a foreign layer must have unless they are in `options`.
    """
    paths: list[str] = []
    others: dict[str, str] = {}  # batch norms that are not replaced, and why
    busy: list[Any] = []
    fresh = False

    def swap(next_call, args, kwargs, context):
        nonlocal fresh
        layer = context.module
        if context.method_name != "__call__" or busy:
            return next_call(*args, **kwargs)
        scope = layer.scope
        fresh |= layer.is_initializing()
        path = "/".join(scope.path)
        norm = norms.of_class(layer)
        if norm is None and layer.is_initializing():
            # A foreign layer is recognized by its variables, which it creates first.
            y = next_call(*args, **kwargs)
            norm = norms.of(layer)
            if not isinstance(norm, Norm) or not chosen(path, where):
                _note(others, norm, path, layer)
                return y
            next_call = lambda *args, **kwargs: y
        elif norm is None or (norm.is_foreign and not layer.is_initializing()):
            norm = norms.of(layer)
        if not isinstance(norm, Norm) or not chosen(path, where):
            _note(others, norm, path, layer)
            return next_call(*args, **kwargs)
        cls = to or ours(layer)
        if path not in paths:
            paths.append(path)
        busy.append(scope)
        try:
            if norm.is_foreign:
                frozen = issubclass(cls, jbn.linen.FrozenBatchNorm)
                must = {"epsilon"} if frozen else set(needed)
                return _stand_in(
                    layer, norm, cls, options, must, next_call, args, kwargs
                )
            new = cls(**{**norm.arguments(layer, cls), **options}, parent=scope)
            if norm.is_translated:
                x, mode, call = norm.call(layer, args, kwargs)
                return new(x, mode, **call)
            return new(*args, **kwargs)
        finally:
            busy.pop()

    with nn.intercept_methods(swap):
        yield paths
    # (A call may skip all norms.)
    if not paths and (others or fresh):
        raise ValueError(nothing_found(caller, where, others))
    warn_of_unknown(caller, {k: v for k, v in others.items() if k not in paths}, where)


def _note(others: dict[str, str], norm: Norm | str | None, path: str, layer: Any):
    """Records a layer that is not replaced, but is or may be a batch norm."""
    if norm is not None:
        others[path] = unrecognized(layer, norm) if isinstance(norm, str) else ""


def _stand_in(layer, norm: Norm, cls, options, needed, next_call, args, kwargs) -> Any:
    """Calls a layer of `cls` on the variables of a foreign layer, by our names."""
    scope, fresh = layer.scope, layer.is_initializing()
    if fresh:
        next_call(*args, **kwargs)  # makes the variables
    variables = norm.variables(layer)
    given = {**norm.arguments(layer, cls, needed - set(options)), **options}
    x, mode, call = norm.call(layer, args, kwargs)
    of = lambda names: {n: variables[n] for n in names if n in variables}
    own = {k: scope.get_variable("batch_stats", k) for k in OWN_STATISTICS}
    stats = of(("mean", "var")) | {k: v for k, v in own.items() if v is not None}
    inner = Scope(
        # (Existing statistics count as trained.)
        {"params": of(("scale", "bias")), "batch_stats": {} if fresh else stats},
        scope.rngs,
        scope.name,
        mutable=scope.mutable,
        path=scope.path,
        flags=scope.flags,
    )
    y = cls(**given, parent=inner)(x, mode, **call)
    if scope.is_mutable_collection("batch_stats"):
        for name, value in inner.variables()["batch_stats"].items():
            if not (fresh and name in variables):
                scope.put_variable("batch_stats", norm.name(name), value)
    return y


def nothing_found(caller: str, where: Where, others: Mapping[str, str]) -> str:
    """The error that no batch norm matches, with those that exist."""
    unknown = [text for path, text in others.items() if text and chosen(path, where)]
    known = [path or "(the model itself)" for path, why in others.items() if not why]
    text = (
        f"`{caller}` found no batch norm layer that matches; {where=}, and the model"
        f" has {known or 'none'}."
    )
    return " ".join([text, *(unknown or [what_matches(known)])])


def _check_class(to: type | None, base: type) -> None:
    if to is not None and not (isinstance(to, type) and issubclass(to, base)):
        raise TypeError(
            f"`to` must be a batch norm class of `{base.__module__}`, the API of the"
            f" model; got {to!r}."
        )


def convert_nnx(
    model: Any,
    to: type | None,
    where: Where,
    norms: Norms,
    options: Mapping,
    caller: str = "convert",
    needed: tuple[str, ...] = ("epsilon", "momentum"),
) -> Any:
    """`convert` on a copy of an NNX model."""
    model = nnx.clone(model)
    found = norms.in_nnx(model)
    swapped = {
        id(layer): _swapped(layer, norm, to or ours(layer), options, needed)
        for path, (layer, norm) in found.items()
        if chosen(path, where)
    }
    others = norms.unknown_in_nnx(model)
    if not swapped:
        others |= dict.fromkeys(found, "")
        raise ValueError(nothing_found(caller, where, others))
    warn_of_unknown(caller, others, where)
    if id(model) in swapped:
        return swapped[id(model)]
    for _, parent in list(nnx.iter_graph(model)):
        _replace_children(parent, swapped)
    return model


def _swapped(
    layer: Any, norm: Norm, cls: type, options: Mapping[str, Any], needed: Any
) -> Any:
    """A new NNX layer with the variables of `layer`."""
    frozen = issubclass(cls, jbn.nnx.FrozenBatchNorm)
    must = ({"epsilon"} if frozen else set(needed)) - set(options)
    given = {**norm.arguments(layer, cls, must), **options}
    new = in_place_of(layer, norm, cls)(**given, rngs=nnx.Rngs(0))
    norm.copy_mode(layer, new)
    variables = norm.variables(layer)
    shape, wanted = variables["mean"].shape, new.mean.shape
    if shape[len(shape) - len(wanted) :] != wanted:
        raise ValueError(
            f"`{cls.__name__}` needs statistics of shape {wanted}, but the layer has"
            f" {shape}: the variables cannot be kept."
        )
    # Layers in a `scan` or `vmap` are stacked along leading axes.
    front = shape[: len(shape) - len(wanted)]
    if front:
        stack = lambda v: jnp.broadcast_to(v, (*front, *v.shape))
        nnx.update(new, jax.tree.map(stack, nnx.state(new)))
    for name, old in variables.items():
        if getattr(new, name, None) is not None:
            setattr(new, name, old)
    if "weight" not in variables and hasattr(new, "weight"):
        # Trained statistics without a weight count as fully trained. The number of
        # rows, which the cumulative rule needs, is unknown.
        seen = nnx.data(None)
        if new.momentum is not None:
            seen = nnx.BatchStat(jnp.ones_like(new.weight[...]))
        new.weight = seen
    return new


def _replace_children(parent: Any, swapped: Mapping[int, Any]) -> None:
    """Replaces layers in attributes, and in containers in attributes."""

    def replaced(value: Any) -> Any:
        if id(value) in swapped:
            return swapped[id(value)]
        if type(value) in (list, tuple):
            new = [replaced(v) for v in value]
            same = all(a is b for a, b in zip(new, value, strict=True))
            return value if same else type(value)(new)
        if type(value) is dict:
            new = {k: replaced(v) for k, v in value.items()}
            return value if all(new[k] is value[k] for k in value) else new
        return value

    if isinstance(parent, nnx.Module):
        for name, child in list(vars(parent).items()):
            new = replaced(child)
            if new is not child:
                plain = type(new) in (list, tuple, dict)
                setattr(parent, name, nnx.data(new) if plain else new)
