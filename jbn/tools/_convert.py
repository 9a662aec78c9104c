"""Swap the batch norms inside a model, without editing it and keeping its variables."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jbn.linen
import jbn.nnx
from jbn.tools.layers import (
    LINEN_NORMS,
    Where,
    arguments,
    chosen,
    is_linen,
    nnx_norms,
    ours,
)


Model = TypeVar("Model", nn.Module, nnx.Module)


def convert(
    model: Model,
    to: type | None = None,
    *,
    where: Where = None,
    **options: Any,
) -> Model:
    """Replaces batch norm layers inside a model by others, keeping their variables.

    Layers of Flax's `BatchNorm` and of ours become layers of the class `to`, with their
    own arguments (momentum, epsilon, axis, ...) except those in `options`. The model's
    code is not touched, and its variables keep their names, shapes and values, so that
    its checkpoints load:

        model = convert(model)                                   # Flax's to ours
        model = convert(model, jbn.linen.FrozenBatchNorm, where="backbone/*")
        model = convert(model, jbn.linen.BatchRenorm, r_max=3.0, d_max=5.0)

    Args:
        model: A Linen or NNX model.
        to: A class of `jbn.linen` or `jbn.nnx`, whichever the model is of. Its call
            must not need more arguments than the model gives. By default `BatchNorm`
            in place of Flax's (and of classes derived from it, whose own code is then
            lost), and the class they are of for layers of ours.
        where: Which layers: one or several patterns of paths such as `"encoder/*"`, or
            a function of the path. By default all.
        **options: Arguments of `to` in place of the layer's own.

    Returns:
        For Linen a module that wraps the model, with the model's own variables. For NNX
        a copy of the model.

    Raises:
        TypeError: If `model` is not a Flax model, or `to` not a class for it.
        ValueError: If an NNX model has no layer that is meant. (Linen's are only found
            when it runs.)

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
        return Converted(lambda: model, to, where, options)  # pyright: ignore[reportReturnType, reportArgumentType]
    _check_class(to, jbn.nnx.BatchNorm)
    return _convert_nnx(nnx.clone(model), to, where, options)


class Converted(nn.Module):
    """A Linen model with other batch norms inside; made by `convert`.

    Attributes:
        model: Gives the model. (A module here would be a child, with a name of its own
            in the variables.)
        to: Class of the new layers.
        where: Which layers are replaced.
        options: Arguments of the new layers in place of the old ones'.
    """

    model: Callable[[], nn.Module]
    to: type | None
    where: Where
    options: Mapping[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, whose variables are those of this module."""
        model: Any = self.model().clone(parent=self.scope)
        with converting(self.to, where=self.where, **self.options):
            return model(*args, **kwargs)


@contextlib.contextmanager
def converting(
    to: type | None = None, *, where: Where = None, **options: Any
) -> Iterator[list[str]]:
    """Replaces the batch norms of any Linen model that is run within.

    What `convert` does, for calls that a wrapper cannot make (other methods than
    `__call__`, functions that apply a model somewhere inside).

    Args:
        to: Class of the new layers, as for `convert`.
        where: Which layers, as for `convert`.
        **options: Arguments of the new layers in place of the old ones'.

    Yields:
        The paths of the layers replaced so far, in the order of their first calls.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> layer = nn.BatchNorm(use_running_average=False)
        >>> with converting() as paths:
        ...     variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
        >>> sorted(variables["batch_stats"])
        ['mean', 'var']
    """
    paths: list[str] = []
    busy: list[Any] = []

    def swap(next_call, args, kwargs, context):
        layer = context.module
        scope = layer.scope
        if (
            context.method_name != "__call__"
            or not isinstance(layer, LINEN_NORMS)
            or any(scope is other for other in busy)
        ):
            return next_call(*args, **kwargs)
        path = "/".join(scope.path)
        if not chosen(path, where):
            return next_call(*args, **kwargs)
        cls = to or ours(layer)
        if path not in paths:
            paths.append(path)
        new = cls(**{**arguments(layer, cls), **options}, parent=scope)
        busy.append(scope)
        try:
            return new(*args, **kwargs)
        finally:
            busy.pop()

    with nn.intercept_methods(swap):
        yield paths


def _check_class(to: type | None, base: type) -> None:
    if to is not None and not (isinstance(to, type) and issubclass(to, base)):
        raise TypeError(
            f"`to` must be a batch norm class of `{base.__module__}`, the API that the"
            f" model is of; got {to!r}."
        )


def _convert_nnx(model: Any, to: type | None, where: Where, options: Mapping) -> Any:
    norms = nnx_norms(model)
    swapped = {
        id(layer): _swapped(layer, to or ours(layer), options)
        for path, layer in norms.items()
        if chosen(path, where)
    }
    if not swapped:
        raise ValueError(
            f"`convert` found no batch norm layer to replace; {where=}, and the model"
            f" has {list(norms) or 'none'}."
        )
    if id(model) in swapped:
        return swapped[id(model)]
    for _, parent in list(nnx.iter_graph(model)):
        _replace_children(parent, swapped)
    return model


def _swapped(layer: Any, cls: type, options: Mapping[str, Any]) -> Any:
    """A new NNX layer with the variables of `layer`."""
    new = cls(**{**arguments(layer, cls), **options}, rngs=nnx.Rngs(0))
    shape, wanted = layer.mean.shape, new.mean.shape
    if shape[len(shape) - len(wanted) :] != wanted:
        raise ValueError(
            f"`{cls.__name__}` needs statistics of shape {wanted}, and the layer has"
            f" {shape}: the variables cannot be kept."
        )
    # Layers that are scanned or mapped over are stacked along axes in front.
    front = shape[: len(shape) - len(wanted)]
    if front:
        stack = lambda v: jnp.broadcast_to(v, (*front, *v.shape))
        nnx.update(new, jax.tree.map(stack, nnx.state(new)))
    for name in ("scale", "bias", "mean", "var", "weight", "pending", "step"):
        old = getattr(layer, name, None)
        if old is not None and getattr(new, name, None) is not None:
            setattr(new, name, old)
    if getattr(layer, "weight", None) is None and hasattr(new, "weight"):
        # Trained statistics without a weight count as fully trained. How many rows they
        # have seen, which the cumulative rule has to know, is not known.
        seen = nnx.data(None)
        if new.momentum is not None:
            seen = nnx.BatchStat(jnp.ones_like(new.weight[...]))
        new.weight = seen
    return new


def _replace_children(parent: Any, swapped: Mapping[int, Any]) -> None:
    """Puts new layers where old ones are: in attributes, and in containers there."""

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
