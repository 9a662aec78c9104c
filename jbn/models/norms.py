"""A norm layer and what follows it: the residual and the activation."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jbn.linen import BatchNorm
from jbn.typing import Activation


def activated(
    norm: Callable[..., Any], activation: Activation, **options: Any
) -> Callable[..., jax.Array]:
    """Makes a norm layer with an activation, which takes a `residual`.

    If the layer is one of ours, the activation is applied in it, which saves memory;
    otherwise after it.

    Args:
        norm: Makes the layer: a class, a partial of one, or any function.
        activation: A function of each element.
        **options: Arguments of `norm`.

    Returns:
        A function that is called like the layer, optionally with `residual`.
    """
    cls = norm
    while isinstance(cls, functools.partial):
        cls = cls.func
    if isinstance(cls, type) and issubclass(cls, BatchNorm):
        return norm(activation=activation, **options)
    layer = norm(**options)

    def apply(
        x: jax.Array, *, residual: jax.Array | None = None, **call: Any
    ) -> jax.Array:
        y = layer(x, **call)
        return activation(y if residual is None else y + residual)

    return apply
