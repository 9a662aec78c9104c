"""Flax NNX modules. They create, read and write variables, and call one function."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

import jax
import jax.numpy as jnp


try:
    from flax import nnx
    from flax.nnx.nn import dtypes
except ModuleNotFoundError as error:
    text = 'jbn.nnx needs Flax, which is not installed: pip install "jbn[flax]"'
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
    completed,
    described,
    documented,
    options_of,
)
from jbn.running import as_batch_stats, batch_stats_dict, commit as commit_stats
from jbn.typing import ArrayLike, BatchStats, Params
from jbn.variants.batch_norm import batch_norm, init
from jbn.variants.conditional import conditional_batch_norm
from jbn.variants.domain import domain_batch_norm
from jbn.variants.frozen import frozen_batch_norm
from jbn.variants.ghost import ghost_batch_norm
from jbn.variants.graph import graph_norm
from jbn.variants.renorm import batch_renorm, next_step


# Options of a layer that may be schedules.
_SCHEDULED = "tau", "r_max", "d_max"


class _NNXOptions(LayerOptions, total=False):
    """The settings of NNX modules, besides those that each spells out."""

    use_running_average: Annotated[
        bool | None,
        Option(
            False,
            "Whether to normalize by the running statistics; the call argument goes"
            " before it.",
        ),
    ]
    promote_dtype: Annotated[
        Callable[..., Any],
        Option(
            dtypes.promote_dtype,
            "Function that casts `(x, mean, var, scale, bias)`, given the keyword"
            " `dtype`, before the computation. Flax's own, the default, is not called,"
            " because it would round statistics and parameters to `dtype`.",
        ),
    ]
    bias_metadata: Annotated[
        Mapping[str, Any],
        Option(MappingProxyType({}), "Metadata of the variable `bias`."),
    ]
    scale_metadata: Annotated[
        Mapping[str, Any],
        Option(MappingProxyType({}), "Metadata of the variable `scale`."),
    ]


@described(_NNXOptions)
class BatchNorm(nnx.BatchNorm):
    """Normalizes each feature by the batch: `jbn.batch_norm` as an NNX module.

    Replaces `flax.nnx.BatchNorm`: it has the same keyword arguments, the same variables
    (`scale` and `bias` are `nnx.Param`, `mean` and `var` are `nnx.BatchStat`), and the
    same modes (`train()`, `eval()`, `nnx.view`). It is a subclass only for code that
    asks `isinstance(layer, nnx.BatchNorm)`. The differences: the output has the
    dtype of `x` unless `dtype` is given (float32 for integers), only the output is
    rounded to 16 bits, statistics are float32 or wider after an update, devices are
    weighted by the number of elements that count on each, and a mask never causes a
    NaN.

    Args:
        num_features: How many features; for several feature axes their sizes.
        rngs: Random number generators; `params` makes scale and bias.
        **settings: Replaced by one entry per option.
    """

    if TYPE_CHECKING:
        # Flax's may be `None`, which would have to be ruled out at each use.
        scale: Any
        bias: Any

        def __getattr__(self, name: str) -> Any: ...

    @documented(_NNXOptions)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        **settings: Unpack[_NNXOptions],
    ):
        """Makes the variables; the class explains the arguments."""
        self._make(num_features, rngs, settings)

    def _make(
        self,
        num_features: int | tuple[int, ...],
        rngs: nnx.Rngs,
        settings: Mapping[str, Any],
        stats_front: tuple[int, ...] = (),
        params_front: tuple[int, ...] | None = (),
    ) -> None:
        """Makes the variables.

        Statistics have `stats_front` in front of the features in their shape, and
        parameters `params_front`; `None`: there are no parameters.
        """
        if isinstance(num_features, bool):
            raise TypeError(
                "The first argument is `num_features`, the number of features; got"
                f" {num_features!r}. Pass flags by name."
            )
        given = completed(_NNXOptions, settings, type(self).__name__)
        _, fresh = init(num_features)
        features = fresh.mean.shape
        _, fresh = init(
            (*stats_front, *features),
            track_weight=given["debias"] or given["momentum"] is None,
            accumulate=given["accumulate"],
        )
        self.mean = nnx.BatchStat(fresh.mean)
        self.var = nnx.BatchStat(fresh.var)
        if fresh.weight is not None:
            self.weight = nnx.BatchStat(fresh.weight)
        if fresh.pending is not None:
            pending = fresh.pending._asdict()
            # Before Flax 0.12, a module stored a plain dictionary.
            variables = {k: nnx.BatchStat(v) for k, v in pending.items()}
            self.pending = getattr(nnx, "Dict", dict)(variables)
        for name in ("scale", "bias"):
            value, metadata = None, given.pop(f"{name}_metadata")
            make = given.pop(f"{name}_init")
            if given[f"use_{name}"] and params_front is not None:
                shape = (*params_front, *features)
                value = make(rngs.params(), shape, given["param_dtype"])
                setattr(self, name, nnx.Param(value, **metadata))
            else:
                setattr(self, name, nnx.data(None))
        self.num_features = num_features
        for name, value in given.items():
            setattr(self, name, value)
        self.step = nnx.data(None)
        self._count(callable(given["tau"]))

    def _count(self, needed: bool) -> None:
        """Counts training calls, where a schedule or a warm-up needs it."""
        if needed:
            self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))

    @documented(LayerCallOptions)
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

        Args:
            x: Input of shape (..., features, ...); integers and booleans are cast.
            use_running_average: Whether to normalize by the running statistics.
            **call: Replaced by one entry per option.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(self, batch_norm, x, _mode(self, use_running_average), **call)

    def set_view(
        self,
        use_running_average: bool | None = None,
        update_stats: bool | None = None,
    ):
        """Sets the mode; called by `nnx.view`.

        Args:
          use_running_average: Whether to normalize by the running statistics.
          update_stats: Whether to update them.
        """
        # `nnx.view_info` only finds arguments indented by two spaces.
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.update_stats = update_stats


class BatchRenorm(BatchNorm):
    """Normalizes by the batch, corrected: `jbn.batch_renorm` as an NNX module.

    Args:
        num_features: As for `BatchNorm`.
        r_max: Limit of the ratio of standard deviations, at least 1, or a schedule: a
            function of the number of training calls so far, such as
            `optax.linear_schedule(1.0, 3.0, 35_000, 5_000)`. A schedule adds this
            number as the `nnx.BatchStat` `step`. (With `accumulate` it counts
            microbatches.)
        d_max: Limit of the distance of the means, at least 0, or a schedule.
        warmup_steps: Number of first training calls that are plain batch norm, counted
            in `step`. Equivalent to the schedules
            `lambda step: jnp.where(step < warmup_steps, 1.0, r_max)` and
            `lambda step: jnp.where(step < warmup_steps, 0.0, d_max)`.
        rngs: As for `BatchNorm`.

    All other arguments are those of `BatchNorm`.
    """

    @documented(_NNXOptions)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        r_max: float | Schedule = 3.0,
        d_max: float | Schedule = 5.0,
        *,
        warmup_steps: int = 0,
        rngs: nnx.Rngs,
        **settings: Unpack[_NNXOptions],
    ):
        """Makes the variables; the class explains the arguments."""
        self._make(num_features, rngs, settings)
        self.r_max = r_max
        self.d_max = d_max
        self.warmup_steps = warmup_steps
        self._count(callable(r_max) or callable(d_max) or bool(warmup_steps))

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
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

        Args:
            x: As for `BatchNorm`.
            use_running_average: As for `BatchNorm`.
            r_max: In place of the constructor's, for this call.
            d_max: In place of the constructor's, for this call.
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


class GhostBatchNorm(BatchNorm):
    """Normalizes groups of the batch: `jbn.ghost_batch_norm` as an NNX module.

    Groups are cut along the first axis.

    Args:
        num_features: As for `BatchNorm`.
        num_groups: Number of groups (on each device, with `axis_name`).
        devices_per_group: How many devices of `axis_name` share their groups.
        interleaved: Whether groups are interleaved instead of contiguous.
        rngs: As for `BatchNorm`.

    All other arguments are those of `BatchNorm`.
    """

    @documented(_NNXOptions)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_groups: int,
        *,
        devices_per_group: int = 1,
        interleaved: bool = False,
        rngs: nnx.Rngs,
        **settings: Unpack[_NNXOptions],
    ):
        """Makes the variables; the class explains the arguments."""
        self._make(num_features, rngs, settings)
        self.num_groups = num_groups
        self.devices_per_group = devices_per_group
        self.interleaved = interleaved

    @documented(LayerCallOptions)
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        **call: Unpack[LayerCallOptions],
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

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
            devices_per_group=self.devices_per_group,
            interleaved=self.interleaved,
            **call,
        )


class DomainBatchNorm(BatchNorm):
    """Normalizes each domain separately: `jbn.domain_batch_norm` as an NNX module.

    Statistics have shape (num_domains, *features).

    Args:
        num_features: As for `BatchNorm`.
        num_domains: Number of domains.
        own_affine: Whether each domain has its own scale and bias, of that shape.
        mix: How to mix domains if `domain` holds each row's shares (a floating dtype).
        shrink_to: Where `tau` shrinks to: each domain's running statistics, or the
            pool.
        rngs: As for `BatchNorm`.

    All other arguments are those of `BatchNorm`.
    """

    @documented(_NNXOptions)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_domains: int,
        own_affine: bool = False,
        *,
        mix: Literal["output", "stats"] = "output",
        shrink_to: Literal["running", "pooled"] = "running",
        rngs: nnx.Rngs,
        **settings: Unpack[_NNXOptions],
    ):
        """Makes the variables; the class explains the arguments."""
        front = (num_domains,)
        params_front = front if own_affine else ()
        self._make(num_features, rngs, settings, front, params_front)
        self.num_domains = num_domains
        self.own_affine = own_affine
        self.mix = mix
        self.shrink_to = shrink_to

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
        return _thread(
            self,
            domain_batch_norm,
            x,
            _mode(self, use_running_average),
            domain=domain,
            num_domains=self.num_domains,
            mix=self.mix,
            shrink_to=self.shrink_to,
            **call,
        )


class ConditionalBatchNorm(BatchNorm):
    """Scales by label or by map: `jbn.conditional_batch_norm` as an NNX module.

    Args:
        num_features: As for `BatchNorm`.
        num_classes: Number of labels, each with its own scale and bias, in tables of
            shape (num_classes, *features). `None`: the call gives scale and bias.
        one_plus: Whether tables, or the maps given, hold gamma of `1 + gamma`. Tables
            then start at zero.
        rngs: As for `BatchNorm`.

    All other arguments are those of `BatchNorm`.
    """

    @documented(_NNXOptions)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_classes: int | None = None,
        one_plus: bool = False,
        *,
        rngs: nnx.Rngs,
        **settings: Unpack[_NNXOptions],
    ):
        """Makes the variables; the class explains the arguments."""
        if one_plus:
            settings.setdefault("scale_init", jax.nn.initializers.zeros)
        front = None if num_classes is None else (num_classes,)
        self._make(num_features, rngs, settings, params_front=front)
        self.num_classes = num_classes
        self.one_plus = one_plus

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
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

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
        return _thread(
            self,
            conditional_batch_norm,
            x,
            _mode(self, use_running_average),
            labels=labels,
            scale=scale,
            bias=bias,
            one_plus=self.one_plus,
            **call,
        )


class FrozenBatchNorm(BatchNorm):
    """Normalizes by fixed statistics: `jbn.frozen_batch_norm` as an NNX module.

    Replaces a `BatchNorm`, with the same variables, in a model that is trained.

    Args:
        num_features: As for `BatchNorm`.
        freeze_affine: Whether no gradient reaches scale and bias.
        freeze_stats: Whether the running statistics are never updated.
        freeze_mode: Whether to always normalize by the running statistics.
        rngs: As for `BatchNorm`.

    All other arguments are those of `BatchNorm`.
    """

    @documented(_NNXOptions)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        freeze_affine: bool = True,
        freeze_stats: bool = True,
        freeze_mode: bool = True,
        *,
        rngs: nnx.Rngs,
        **settings: Unpack[_NNXOptions],
    ):
        """Makes the variables; the class explains the arguments."""
        self._make(num_features, rngs, settings)
        self.freeze_affine = freeze_affine
        self.freeze_stats = freeze_stats
        self.freeze_mode = freeze_mode

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
            use_running_average: As for `BatchNorm`; not needed with `freeze_mode`.
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
class GraphNorm(nnx.Module):
    """Normalizes each graph separately: `jbn.graph_norm` as an NNX module.

    Its parameters are `scale`, `bias` and `mean_scale`. It has no running statistics,
    and training and inference are the same.

    Args:
        num_features: How many features; for several feature axes their sizes.
        use_mean_scale: Whether to learn the share of the mean to remove. Without it
            this is instance norm of packed rows.
        mean_scale_init: Initializer of that share.
        rngs: Random number generators; `params` makes the parameters.
        **settings: Replaced by one entry per option.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    @documented(RowLayerOptions)
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_mean_scale: bool = True,
        mean_scale_init: Callable[..., Any] = jax.nn.initializers.ones,
        rngs: nnx.Rngs,
        **settings: Unpack[RowLayerOptions],
    ):
        """Makes the variables; the class explains the arguments."""
        given = completed(RowLayerOptions, settings, type(self).__name__)
        given |= {"use_mean_scale": use_mean_scale, "mean_scale_init": mean_scale_init}
        _, fresh = init(num_features)
        for name in ("scale", "bias", "mean_scale"):
            make = given.pop(f"{name}_init")
            value = nnx.data(None)
            if given[f"use_{name}"]:
                key = rngs.params()
                value = nnx.Param(make(key, fresh.mean.shape, given["param_dtype"]))
            setattr(self, name, value)
        self.num_features = num_features
        for name, value in given.items():
            setattr(self, name, value)

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
        variables = self.scale, self.bias, self.mean_scale
        scale, bias, mean_scale = (None if v is None else v[...] for v in variables)
        settings = {name: getattr(self, name) for name in options_of(RowSettings)}
        return graph_norm(
            axes.as_inexact(x, self.dtype),
            Params(scale, bias),
            segment_ids=segment_ids,
            num_segments=num_segments,
            mean_scale=mean_scale,
            **settings,
            **call,
        )


def commit(model: nnx.Module) -> None:
    """Updates the running statistics of `model` by its pending moments.

    For gradient accumulation, once per optimizer step: `jbn.commit` with the momentum
    of each layer, in place.

    Args:
        model: A module with layers made with `accumulate=True`.

    Raises:
        ValueError: If there are none.
    """
    layers = [m for _, m in nnx.iter_graph(model) if isinstance(m, BatchNorm)]
    layers = [layer for layer in layers if layer.accumulate]
    if not layers:
        raise ValueError(
            "`commit` found no pending moments. Make the layers with `accumulate=True`."
        )
    for layer in layers:
        rule = {
            "momentum": layer.momentum,
            "unbiased": layer.unbiased,
            "reference_weight": layer.reference_weight,
            "second_moment": layer.second_moment,
        }
        _write(layer, commit_stats(_read(layer), **rule))


def _mode(
    layer: BatchNorm, use_running_average: bool | None, needed: bool = True
) -> bool | None:
    if not needed and use_running_average is layer.use_running_average is None:
        return None
    return nnx.module.first_from(
        use_running_average,
        layer.use_running_average,
        error_msg=(
            f"`use_running_average` must be given to `{type(layer).__name__}`: in the"
            " constructor, in the call, or by `nnx.view`, `model.train()` or"
            " `model.eval()`."
        ),
    )


def _variables(layer: BatchNorm) -> dict[str, Any]:
    found = {name: getattr(layer, name, None) for name in BatchStats._fields}
    return {name: v for name, v in found.items() if v is not None}


def _read(layer: BatchNorm) -> BatchStats:
    return as_batch_stats(
        {
            name: {k: v[...] for k, v in variable.items()}
            if name == "pending"
            else variable[...]
            for name, variable in _variables(layer).items()
        }
    )


def _write(layer: BatchNorm, batch_stats: BatchStats) -> None:
    """Sets the statistics, in the dtype that they have."""
    variables = _variables(layer)
    for name, value in batch_stats_dict(batch_stats).items():
        if name == "pending":
            for k, v in value.items():
                _assign(variables[name][k], v)
        else:
            _assign(variables[name], value)


def _assign(variable: nnx.Variable, value: Any) -> None:
    """Sets the value of a variable, and its dtype.

    `variable[...] = value` would cast to the dtype that the variable had, and Flax
    before 0.12.1 has no `set_value`.
    """
    variable.copy_from(variable.replace(value))


def _numbers(layer: BatchNorm, call: dict[str, Any]) -> dict[str, Any]:
    """The options of a call that may be schedules."""
    found = {}
    step: Any = layer.step
    for name in _SCHEDULED:
        setting, value = getattr(layer, name, None), call.get(name)
        if value is None and callable(setting):
            value = setting(step[...])
        if value is not None or setting is not None:
            found[name] = setting if value is None else value
    if warmup_steps := getattr(layer, "warmup_steps", 0):
        found |= {"warmup_steps": warmup_steps, "step": step[...]}
    return found


def _thread(
    layer: BatchNorm,
    function: Callable[..., Any],
    x: ArrayLike,
    use_running_average: bool | None,
    **call: Any,
) -> jax.Array:
    """Reads the variables of `layer`, calls `function`, and writes them back."""
    x = axes.as_inexact(x, layer.dtype)
    running = _read(layer)
    params = None
    if layer.scale is not None or layer.bias is not None:
        params = Params(
            None if layer.scale is None else layer.scale[...],
            None if layer.bias is None else layer.bias[...],
        )
    options = {name: getattr(layer, name) for name in options_of(Settings)}
    options |= call | _numbers(layer, call)
    if options.get("update_stats") is None:
        options["update_stats"] = layer.update_stats
    given = running
    if layer.promote_dtype is not dtypes.promote_dtype:
        scale, bias = params or Params()
        x, mean, var, scale, bias = layer.promote_dtype(
            (x, running.mean, running.var, scale, bias), dtype=layer.dtype
        )
        params = None if params is None else Params(scale, bias)
        if use_running_average and not options["update_stats"]:
            given = running._replace(mean=mean, var=var)
    y, batch_stats = function(
        x, params, given, use_running_average=use_running_average, **options
    )
    # Statistics returned unchanged were not updated.
    if batch_stats is not given:
        _write(layer, batch_stats)
        if layer.step is not None:
            layer.step[...] = next_step(layer.step[...])
    return y
