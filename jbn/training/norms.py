"""The norms of `--norm`, and their options by name."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro

from jbn.linen import BatchNorm, BatchRenorm, DomainBatchNorm, GhostBatchNorm
from jbn.options import LayerOptions, Number, Schedule, options_of
from jbn.training.errors import UsageError


Norm = Literal["batch", "renorm", "ghost", "group", "layer", "none"]

_TYPES: dict[Any, Any] = {
    Number: float,
    Number | Schedule: float,
    Number | None: float | None,
    bool: bool,
}
# These have their own flags, follow from them, or have no effect.
_LEFT_OUT = ("momentum", "accumulate", "use_fast_variance")
_LAYER = tuple(
    name
    for name, (kind, _) in options_of(LayerOptions).items()
    if kind in _TYPES and name not in _LEFT_OUT
)
_AFFINE = ("use_bias", "use_scale")
_OF: dict[str, tuple[str, ...]] = {
    "batch": _LAYER,
    "renorm": (*_LAYER, "r_max", "d_max"),
    "ghost": (*_LAYER, "num_groups"),
    "group": ("num_groups", "epsilon", *_AFFINE),
    "layer": ("epsilon", *_AFFINE),
    "none": _AFFINE,
}
_CHANNELS = 16  # Per group: the second option of Wu and He, 2018, for any width.


def _flag(name: str, type_: Any, text: str) -> Any:
    optional = type(None) in get_args(type_)
    # Groups of flags omit the group's name, so the prefix is part of the name.
    shown: dict[str, Any] = {"name": f"norm.{name}"}
    if optional:
        shown["metavar"] = "INT" if int in get_args(type_) else "FLOAT"
        shown["help_behavior_hint"] = ""
    return Annotated[type_, tyro.conf.arg(help=text, **shown)]


def _fields() -> list[tuple[str, Any, Any]]:
    """A field for each common option of the layers, and for those of single methods."""
    options = options_of(LayerOptions)
    fields: list[tuple[str, Any, Any]] = [
        (name, _flag(name, _TYPES[kind], option.text), option.default)
        for name, (kind, option) in options.items()
        if name in _LAYER
    ]
    text = "Limit of the {} of `renorm`, at least {}."
    fields += [
        ("r_max", _flag("r_max", float, text.format("scale r", 1)), BatchRenorm.r_max),
        ("d_max", _flag("d_max", float, text.format("shift d", 0)), BatchRenorm.d_max),
        (
            "num_groups",
            _flag(
                "num_groups",
                int | None,
                "Of `ghost`, groups of a batch; of `group`, groups of channels, by"
                " default one for every 16 channels.",
            ),
            None,
        ),
    ]
    return fields


NormOptions: Any = dataclasses.make_dataclass(
    "NormOptions",
    _fields(),
    frozen=True,
    namespace={
        "__module__": __name__,
        "__doc__": "Options of the norm layers, by the names that they have in jbn.",
    },
)


def check(norm: str, options: Any) -> None:
    """Refuses options that the norm does not have.

    Args:
        norm: One of `Norm`.
        options: A `NormOptions`.

    Raises:
        UsageError: If one is given, or one that is needed is not.
    """
    for field in dataclasses.fields(options):
        given = getattr(options, field.name)
        if given != field.default and field.name not in _OF[norm]:
            having = [name for name, names in _OF.items() if field.name in names]
            raise UsageError(
                f"{flag(field.name)} is not for --norm={norm}: only for "
                f"{', '.join(having)}."
            )
    groups = options.num_groups
    if norm == "ghost" and groups is None:
        raise UsageError("--norm=ghost needs --norm.num-groups.")
    if groups is not None and groups < 1:
        raise UsageError(f"--norm.num-groups={groups} is out of range: at least 1.")


def check_values(norm: str, options: Any) -> None:
    """Refuses values that the layer refuses, by calling it; needs JAX to be set up.

    Args:
        norm: One of `Norm`.
        options: A `NormOptions` that `check` has passed.

    Raises:
        UsageError: If a value is out of its range.
    """
    if norm in ("batch", "renorm", "ghost") and options != NormOptions():
        layer, x = make(norm, options)(), jnp.ones((2 * (options.num_groups or 1), 1))
        try:
            layer.init_with_output(jax.random.key(0), x, use_running_average=False)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"--norm={norm}: {' '.join(str(error).split())}"
            ) from error


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--norm.{name.replace('_', '-')}"


def first_difference(old: Any, new: Any) -> tuple[str, Any, Any]:
    """The flag of the first option that differs in two records, and both values."""
    return next(
        (flag(name), value, getattr(new, name))
        for name, value in dataclasses.asdict(old).items()
        if value != getattr(new, name)
    )


def make(
    norm: str, options: Any, *, local_groups: int | None = None, **batch: Any
) -> Callable[..., Any]:
    """Makes a factory of norm layers, for the models of `jbn.models`.

    Args:
        norm: One of `Norm`.
        options: A `NormOptions` that `check` has passed.
        local_groups: Of `ghost`, the number of groups on each device.
        **batch: Further options of norms over the batch, such as `momentum` and
            `axis_name`.

    Returns:
        The factory, which models call with `name`, and optionally `scale_init` and
        `activation`.
    """
    chosen = {name: getattr(options, name) for name in _OF[norm]}
    if norm == "batch":
        return partial(BatchNorm, **(chosen | batch))
    if norm == "renorm":
        return partial(BatchRenorm, **(chosen | batch))
    if norm == "ghost":
        chosen["num_groups"] = local_groups or options.num_groups
        return partial(GhostBatchNorm, **(chosen | batch))
    return {
        "group": partial(_of_examples, _group_norm, **chosen),
        "layer": partial(_of_examples, _layer_norm, **chosen),
        "none": partial(_of_examples, _affine, **chosen),
    }[norm]


def make_of_domains(norm: str, options: Any, **batch: Any) -> Callable[..., Any]:
    """`make`, for the discriminator of a GAN: with two domains."""
    if norm == "batch":
        chosen = {name: getattr(options, name) for name in _OF[norm]}
        return partial(DomainBatchNorm, num_domains=2, **(chosen | batch))
    if norm in ("renorm", "ghost"):
        raise UsageError(
            f"--norm={norm} is not for --model=dcgan, which normalizes two domains."
        )
    return make(norm, options)


def _of_examples(
    make_layer: Callable[..., Any],
    *,
    name: str,
    scale_init: Any = nn.initializers.ones,
    **options: Any,
) -> Callable[..., jax.Array]:
    """A layer that is called like a batch norm, but normalizes single examples."""

    def apply(x: jax.Array, **call: Any) -> jax.Array:
        del call  # The mask, the mode and the domain.
        layer = make_layer(x, name=name, scale_init=scale_init, **options)
        return layer(x)

    return apply


def _group_norm(x: jax.Array, *, num_groups: int | None, **options: Any) -> nn.Module:
    channels = x.shape[-1]
    if num_groups is None:
        num_groups = 1 if channels % _CHANNELS else channels // _CHANNELS
    if channels % num_groups:
        raise UsageError(
            f"--norm.num-groups={num_groups} does not divide {channels} channels."
        )
    return nn.GroupNorm(num_groups=num_groups, dtype=x.dtype, **options)


def _layer_norm(x: jax.Array, **options: Any) -> nn.Module:
    """Layer norm over all axes of an example: group norm with one group."""
    axes = tuple(range(1, x.ndim))
    return nn.LayerNorm(reduction_axes=axes, dtype=x.dtype, **options)


def _affine(x: jax.Array, **options: Any) -> nn.Module:
    del x
    return Affine(**options)


class Affine(nn.Module):
    """The scale and bias of a norm, without the normalization.

    A residual network whose last scales start at zero can be trained with it:
    "SkipInit" (De and Smith, 2020).

    Attributes:
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        scale_init: Initializer of the scale.
    """

    use_bias: bool = True
    use_scale: bool = True
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns `scale * x + bias`, of the shape and dtype of `x`."""
        features, zeros = x.shape[-1:], nn.initializers.zeros
        if self.use_scale:
            scale = self.param("scale", self.scale_init, features, jnp.float32)
            x = x * scale.astype(x.dtype)
        if self.use_bias:
            bias = self.param("bias", zeros, features, jnp.float32)
            x = x + bias.astype(x.dtype)
        return x
