"""Flax Linen modules. They create, read and write variables, and call one function."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import jax
import jax.numpy as jnp


try:
    import flax.linen as nn
except ModuleNotFoundError as error:
    text = 'jbn.linen needs Flax, which is not installed: pip install "jbn[flax]"'
    raise ModuleNotFoundError(text, name=error.name) from error

from jbn import axes
from jbn.options import (
    LayerCallOptions,
    LayerOptions,
    Option,
    RowCallOptions,
    RowLayerOptions,
    RowSettings,
    Schedule,
    Settings,
    described,
    documented,
    options_of,
)
from jbn.running import as_batch_stats, batch_stats_dict
from jbn.typing import ArrayLike, Params
from jbn.variants.batch_norm import batch_norm, init
from jbn.variants.conditional import conditional_batch_norm
from jbn.variants.domain import domain_batch_norm
from jbn.variants.frozen import frozen_batch_norm
from jbn.variants.ghost import ghost_batch_norm
from jbn.variants.graph import graph_norm
from jbn.variants.renorm import batch_renorm, next_step


# Options of a layer that may be schedules.
_SCHEDULED = "tau", "r_max", "d_max"


class _LinenOptions(LayerOptions, total=False):
    """The settings of Linen modules."""

    force_float32_reductions: Annotated[
        bool,
        Option(
            True,
            "Accepted, and without effect: statistics are always float32 or wider, in"
            " computation and in `batch_stats`.",
        ),
    ]


# The arguments of `flax.linen.BatchNorm` in the same order, then ours.
_ORDER = dict.fromkeys(
    (
        "axis",
        "momentum",
        "epsilon",
        "dtype",
        "param_dtype",
        "use_bias",
        "use_scale",
        "bias_init",
        "scale_init",
        "axis_name",
        "axis_index_groups",
        "use_fast_variance",
        "force_float32_reductions",
        *options_of(_LinenOptions),
    )
)


def _fields(record: type) -> dict[str, Any]:
    """The body of a class with a field for each option of a record."""
    known = options_of(record)
    options = {name: known[name] for name in _ORDER if name in known}
    return {
        "__module__": __name__,
        "__doc__": "Fields of modules.",
        "__annotations__": {name: kind for name, (kind, _) in options.items()},
        **{name: option.default for name, (_, option) in options.items()},
    }


if TYPE_CHECKING:

    class _Fields(nn.Module):
        pass

    class _RowFields(nn.Module):
        pass
else:

    class _Mode(nn.Module):
        use_running_average: bool | None = None

    _Fields = type(nn.Module)("_Fields", (_Mode,), _fields(_LinenOptions))
    _RowFields = type(nn.Module)("_RowFields", (nn.Module,), _fields(RowLayerOptions))


@described(_LinenOptions)
class BatchNorm(_Fields):
    """Normalizes each feature by the batch: `jbn.batch_norm` as a Linen module.

    Replaces `flax.linen.BatchNorm`: it has the same arguments in the same order, the
    same variables (`params/{scale,bias}`, `batch_stats/{mean,var}`, so checkpoints fit
    both), and the same update (none during initialization). The differences: the output
    has the dtype of `x` unless `dtype` is given (float32 for integers), devices are
    weighted by the number of elements that count on each, and a mask never causes a
    NaN.

    Inference only reads `mean` and `var`, so other statistics may be missing from an
    immutable `batch_stats`. In training, statistics without `weight` count as fully
    trained, and a missing `step` starts at 0.

    Attributes:
        use_running_average: Whether to normalize by the running statistics; set it here
            or in the call.
        **settings: Replaced by one entry per option.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            use_running_average: bool | None = None,
            *,
            name: str | None = None,
            parent: Any = None,
            **settings: Unpack[_LinenOptions],
        ) -> None: ...

    def __post_init__(self):
        if axes.is_count(self.use_running_average):
            raise TypeError(
                f"`{type(self).__name__}` takes `use_running_average`, True or False;"
                f" got {self.use_running_average!r}. A Linen module infers the number"
                " of features from its input: leave it out."
            )
        super().__post_init__()

    @nn.compact
    @documented(LayerCallOptions)
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `batch_stats`.

        Args:
            x: Input of shape (..., features, ...); integers and booleans are cast.
            use_running_average: Whether to normalize by the running statistics.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(self, batch_norm, x, _mode(self, use_running_average), **call)


class _RenormFields(nn.Module):
    # Fields of the last base class come first: `BatchRenorm(3.0, 5.0)`.
    r_max: float | Schedule = 3.0
    d_max: float | Schedule = 5.0


class BatchRenorm(BatchNorm, _RenormFields):
    """Normalizes by the batch, corrected: `jbn.batch_renorm` as a Linen module.

    Attributes:
        r_max: Limit of the ratio of standard deviations, at least 1, or a schedule: a
            function of the number of training calls so far, such as
            `optax.linear_schedule(1.0, 3.0, 35_000, 5_000)`. A schedule adds this
            number as `batch_stats/step`. (With `accumulate` it counts microbatches.)
        d_max: Limit of the distance of the means, at least 0, or a schedule.
        warmup_steps: Number of first training calls that are plain batch norm, counted
            in `step`. Equivalent to the schedules
            `lambda step: jnp.where(step < warmup_steps, 1.0, r_max)` and
            `lambda step: jnp.where(step < warmup_steps, 0.0, d_max)`.

    All other attributes are those of `BatchNorm`.
    """

    warmup_steps: int = 0

    if TYPE_CHECKING:

        def __init__(
            self,
            r_max: float | Schedule = 3.0,
            d_max: float | Schedule = 5.0,
            use_running_average: bool | None = None,
            *,
            warmup_steps: int = 0,
            name: str | None = None,
            parent: Any = None,
            **settings: Unpack[_LinenOptions],
        ) -> None: ...

    @nn.compact
    @documented(LayerCallOptions)
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        r_max: float | ArrayLike | None = None,
        d_max: float | ArrayLike | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `batch_stats`.

        Args:
            x: As for `BatchNorm`.
            use_running_average: As for `BatchNorm`.
            r_max: In place of the attribute, for this call.
            d_max: In place of the attribute, for this call.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(
            self,
            batch_renorm,
            x,
            _mode(self, use_running_average),
            r_max=r_max,
            d_max=d_max,
            **call,
        )


class _GhostFields(nn.Module):
    num_groups: int


class GhostBatchNorm(BatchNorm, _GhostFields):
    """Normalizes groups of the batch: `jbn.ghost_batch_norm` as a Linen module.

    Groups are cut along the first axis.

    Attributes:
        num_groups: Number of groups (on each device, with `axis_name`).
        devices_per_group: How many devices of `axis_name` share their groups.
        interleaved: Whether groups are interleaved instead of contiguous.

    All other attributes are those of `BatchNorm`.
    """

    devices_per_group: int = 1
    interleaved: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            num_groups: int,
            use_running_average: bool | None = None,
            *,
            devices_per_group: int = 1,
            interleaved: bool = False,
            name: str | None = None,
            parent: Any = None,
            **settings: Unpack[_LinenOptions],
        ) -> None: ...

    @nn.compact
    @documented(LayerCallOptions)
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `batch_stats`.

        Args:
            x: As for `BatchNorm`.
            use_running_average: As for `BatchNorm`.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(
            self,
            ghost_batch_norm,
            x,
            _mode(self, use_running_average),
            num_groups=self.num_groups,
            devices_per_group=1 if self.is_initializing() else self.devices_per_group,
            interleaved=self.interleaved,
            **call,
        )


class _DomainFields(nn.Module):
    num_domains: int


class DomainBatchNorm(BatchNorm, _DomainFields):
    """Normalizes each domain separately: `jbn.domain_batch_norm` as a Linen module.

    Statistics have shape (num_domains, *features).

    Attributes:
        num_domains: Number of domains.
        own_affine: Whether each domain has its own scale and bias, of that shape.
        mix: How to mix domains if `domain` holds each row's shares (a floating dtype).
        shrink_to: Where `tau` shrinks to: each domain's running statistics, or the
            pool.

    All other attributes are those of `BatchNorm`.
    """

    own_affine: bool = False
    mix: Literal["output", "stats"] = "output"
    shrink_to: Literal["running", "pooled"] = "running"

    if TYPE_CHECKING:

        def __init__(
            self,
            num_domains: int,
            use_running_average: bool | None = None,
            *,
            own_affine: bool = False,
            mix: Literal["output", "stats"] = "output",
            shrink_to: Literal["running", "pooled"] = "running",
            name: str | None = None,
            parent: Any = None,
            **settings: Unpack[_LinenOptions],
        ) -> None: ...

    @nn.compact
    @documented(LayerCallOptions)
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        domain: ArrayLike | int | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates the statistics of its domains.

        Args:
            x: As for `BatchNorm`.
            use_running_average: As for `BatchNorm`.
            domain: The domain of each row, of each image, or of the whole batch; or the
                shares of each row in all domains.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        front = (self.num_domains,)
        return _thread(
            self,
            domain_batch_norm,
            x,
            _mode(self, use_running_average),
            stats_front=front,
            params_front=front if self.own_affine else (),
            domain=domain,
            num_domains=self.num_domains,
            mix=self.mix,
            shrink_to=self.shrink_to,
            **call,
        )


class _ConditionalFields(nn.Module):
    num_classes: int | None = None


class ConditionalBatchNorm(BatchNorm, _ConditionalFields):
    """Scales by label or by map: `jbn.conditional_batch_norm` as a Linen module.

    Attributes:
        num_classes: Number of labels, each with its own scale and bias, in tables of
            shape (num_classes, *features). `None`: the call gives scale and bias.
        one_plus: Whether tables, or the maps given, hold gamma of `1 + gamma`. Tables
            then start at zero.

    All other attributes are those of `BatchNorm`.
    """

    one_plus: bool = False

    if TYPE_CHECKING:

        def __init__(
            self,
            num_classes: int | None = None,
            use_running_average: bool | None = None,
            *,
            one_plus: bool = False,
            name: str | None = None,
            parent: Any = None,
            **settings: Unpack[_LinenOptions],
        ) -> None: ...

    @nn.compact
    @documented(LayerCallOptions)
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        labels: ArrayLike | int | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `batch_stats`.

        Args:
            x: As for `BatchNorm`.
            use_running_average: As for `BatchNorm`.
            labels: The label of each row, of each image, or of the whole batch.
            scale: Without `num_classes`: scale that broadcasts to `x`.
            bias: Without `num_classes`: bias that broadcasts to `x`.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        ones = options_of(_LinenOptions)["scale_init"][1].default
        from_zero = self.one_plus and self.scale_init is ones
        return _thread(
            self,
            conditional_batch_norm,
            x,
            _mode(self, use_running_average),
            params_front=None if self.num_classes is None else (self.num_classes,),
            scale_init=nn.initializers.zeros if from_zero else self.scale_init,
            labels=labels,
            scale=scale,
            bias=bias,
            one_plus=self.one_plus,
            **call,
        )


class FrozenBatchNorm(BatchNorm):
    """Normalizes by fixed statistics: `jbn.frozen_batch_norm` as a Linen module.

    Replaces a `BatchNorm`, with the same variables, in a model that is trained.

    Attributes:
        freeze_affine: Whether no gradient reaches scale and bias.
        freeze_stats: Whether the running statistics are never updated.
        freeze_mode: Whether to always normalize by the running statistics.

    All other attributes are those of `BatchNorm`.
    """

    freeze_affine: bool = True
    freeze_stats: bool = True
    freeze_mode: bool = True

    if TYPE_CHECKING:

        def __init__(
            self,
            use_running_average: bool | None = None,
            *,
            freeze_affine: bool = True,
            freeze_stats: bool = True,
            freeze_mode: bool = True,
            name: str | None = None,
            parent: Any = None,
            **settings: Unpack[_LinenOptions],
        ) -> None: ...

    @nn.compact
    @documented(LayerCallOptions)
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: As for `BatchNorm`.
            use_running_average: As for `BatchNorm`; needed unless `freeze_mode`.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(
            self,
            frozen_batch_norm,
            x,
            _mode(self, use_running_average, needed=not self.freeze_mode),
            freeze_affine=self.freeze_affine,
            freeze_stats=self.freeze_stats,
            freeze_mode=self.freeze_mode,
            **call,
        )


@described(RowLayerOptions)
class GraphNorm(_RowFields):
    """Normalizes each graph separately: `jbn.graph_norm` as a Linen module.

    Its parameters are `scale`, `bias` and `mean_scale`. It has no running statistics,
    and training and inference are the same.

    Attributes:
        **settings: Replaced by one entry per option.
        use_mean_scale: Whether to learn the share of the mean to remove. Without it
            this is instance norm of packed rows.
        mean_scale_init: Initializer of that share.
    """

    use_mean_scale: bool = True
    mean_scale_init: Callable[..., Any] = nn.initializers.ones

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            use_mean_scale: bool = True,
            mean_scale_init: Callable[..., Any] = nn.initializers.ones,
            name: str | None = None,
            parent: Any = None,
            **settings: Unpack[RowLayerOptions],
        ) -> None: ...

    @nn.compact
    @documented(RowCallOptions)
    def __call__(
        self,
        x: ArrayLike,
        segment_ids: ArrayLike,
        num_segments: int,
        **call: Unpack[RowCallOptions],
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: Input of shape (..., features, ...); integers and booleans are cast.
            segment_ids: The graph of each node.
            num_segments: Number of graphs.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        settings: dict[str, Any] = {
            k: getattr(self, k) for k in options_of(RowSettings)
        }
        x = axes.as_inexact(x, settings["dtype"])
        features = axes.layout(x, settings["axis"]).features

        def param(name: str) -> Any:
            if not getattr(self, f"use_{name}"):
                return None
            make, dtype = getattr(self, f"{name}_init"), self.param_dtype
            return self.param(name, make, features, dtype)

        if self.is_initializing():
            # Flax initializes outside of the mapped axes, too.
            settings |= {"axis_name": None, "axis_index_groups": None}
        return graph_norm(
            x,
            Params(param("scale"), param("bias")),
            segment_ids=segment_ids,
            num_segments=num_segments,
            mean_scale=param("mean_scale"),
            **settings,
            **call,
        )


def _mode(
    layer: BatchNorm, use_running_average: bool | None, needed: bool = True
) -> bool | None:
    if not needed and use_running_average is layer.use_running_average is None:
        return None
    return nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )


def _variable(
    layer: BatchNorm, name: str, fresh: Callable[[], Any]
) -> nn.Variable | None:
    """A statistic; `None` if it is missing and cannot be created."""
    there = layer.has_variable("batch_stats", name)
    if there or layer.is_mutable_collection("batch_stats"):
        return layer.variable("batch_stats", name, fresh)
    return None


def _param(
    layer: BatchNorm, name: str, init: Callable[..., Any], shape: tuple[int, ...]
) -> Any:
    """The value of a parameter: an array of JAX or NumPy.

    `layer.param` traces `init` to compare shapes, also where there is a value. That is
    a third of the time of a call without `jit`.
    """
    if layer.has_variable("params", name):
        value = nn.unbox(layer.get_variable("params", name))
        if jnp.shape(value) == shape:
            return value
    return layer.param(name, init, shape, layer.param_dtype)


def _numbers(
    layer: BatchNorm, use_running_average: bool | None, call: dict[str, Any]
) -> tuple[dict[str, Any], nn.Variable | None]:
    """The options of a call that may be schedules, and the step of these."""
    settings = {k: getattr(layer, k) for k in _SCHEDULED if hasattr(layer, k)}
    warmup_steps = getattr(layer, "warmup_steps", 0)
    step = None
    if warmup_steps or any(map(callable, settings.values())):
        step = _variable(layer, "step", lambda: jnp.zeros((), jnp.int32))
    count = jnp.zeros((), jnp.int32) if step is None else step.value

    def number(name: str, setting: Any) -> Any:
        if call.get(name) is not None:
            return call[name]
        if not callable(setting):
            return setting
        if use_running_average:
            return 1.0  # Inference does not read the step.
        return setting(count)

    numbers = {name: number(name, v) for name, v in settings.items()}
    if warmup_steps:
        numbers |= {"warmup_steps": warmup_steps, "step": count}
    return numbers, step


def _thread(
    layer: BatchNorm,
    function: Callable[..., Any],
    x: ArrayLike,
    use_running_average: bool | None,
    *,
    stats_front: tuple[int, ...] = (),
    params_front: tuple[int, ...] | None = (),
    scale_init: Callable[..., Any] | None = None,
    **call: Any,
) -> jax.Array:
    """Creates and reads the variables of `layer`, calls `function`, writes them back.

    Statistics have `stats_front` in front of the features in their shape, and
    parameters `params_front`; `None`: there are no parameters.
    """
    x = axes.as_inexact(x, layer.dtype)
    features = axes.layout(x, layer.axis).features
    trained = layer.has_variable("batch_stats", "mean")

    def fresh(name: str) -> Any:
        shape = (*stats_front, *features)
        _, batch_stats = init(shape, track_weight=True, accumulate=True)
        if name == "weight" and trained and layer.momentum is not None:
            # Statistics of a checkpoint without a weight count as fully trained.
            return jnp.ones(shape)
        return batch_stats_dict(batch_stats)[name]

    variables = {
        name: layer.variable("batch_stats", name, fresh, name)
        for name in ("mean", "var")
    }
    optional = ["weight"] if layer.debias or layer.momentum is None else []
    if layer.momentum is None and trained:
        # Their number of rows is unknown: the function raises.
        there = layer.has_variable("batch_stats", "weight")
        optional = optional if there else []
    optional += ["pending"] if layer.accumulate else []
    for name in optional:
        variable = _variable(layer, name, lambda name=name: fresh(name))
        if variable is not None:
            variables[name] = variable
    params = None
    if params_front is not None:
        shape = (*params_front, *features)
        ones = scale_init or layer.scale_init
        params = Params(
            _param(layer, "scale", ones, shape) if layer.use_scale else None,
            _param(layer, "bias", layer.bias_init, shape) if layer.use_bias else None,
        )
    running = as_batch_stats({name: v.value for name, v in variables.items()})
    numbers, step = _numbers(layer, use_running_average, call)
    given = {name: getattr(layer, name) for name in options_of(Settings)}
    given |= call | numbers
    if given.get("update_stats") is None:
        given["update_stats"] = layer.update_stats
    if layer.is_initializing():
        # Flax initializes outside of the mapped axes, too.
        given |= {"update_stats": False, "axis_name": None, "axis_index_groups": None}
    y, batch_stats = function(
        x, params, running, use_running_average=use_running_average, **given
    )
    # Statistics returned unchanged were not updated, and may be immutable.
    if batch_stats is not running:
        for name, value in batch_stats_dict(batch_stats).items():
            variables[name].value = value
        if step is not None:
            step.value = next_step(step.value)
    return y
