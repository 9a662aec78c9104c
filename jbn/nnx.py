"""Flax NNX modules. They create, read and write variables, and call one function."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jbn import axes
from jbn.functional import batch_norm, init
from jbn.running import as_batch_stats, batch_stats_dict, commit as commit_stats
from jbn.typing import (
    Activation,
    ArrayLike,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DType,
    Params,
)
from jbn.variants.conditional import conditional_batch_norm
from jbn.variants.domain import domain_batch_norm
from jbn.variants.frozen import frozen_batch_norm
from jbn.variants.ghost import ghost_batch_norm
from jbn.variants.renorm import batch_renorm, next_step


# A number, or what gives it for the number of updates so far, as Optax's schedules.
Schedule = float | Callable[[jax.Array], Any]


class BatchNorm(nnx.Module):
    """Normalizes each feature by the batch: `jbn.batch_norm` as an NNX module.

    Takes the place of `flax.nnx.BatchNorm`: the same arguments by the same names, the
    same variables (`scale` and `bias` are `nnx.Param`, `mean` and `var`
    `nnx.BatchStat`), the same modes (`train()`, `eval()`, `nnx.view`). What is
    different: the output has the dtype of `x` unless `dtype` is given, nothing is
    rounded to 16 bits before it, devices are merged by how many elements count on
    each, and nothing makes a NaN of a mask.

    Args:
        num_features: How many features; for several feature axes their sizes.
        use_running_average: Whether to normalize by the running statistics; the call
            argument goes before it.
        axis: Feature axis or axes.
        momentum: Weight of the old running statistic. `None`: cumulative.
        epsilon: Added to the variance, inside the square root.
        dtype: Dtype of the output; by default that of `x` (float32 for integers).
        param_dtype: Dtype of scale and bias.
        use_bias: Whether to learn a bias.
        use_scale: Whether to learn a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        axis_name: Mapped axis or axes to take the statistics over.
        axis_index_groups: Groups of indices of `axis_name` to do so within.
        use_fast_variance: Accepted, and without effect: there is one variance here,
            which costs what Flax's fast one does and is right at any mean.
        promote_dtype: Function from `(x, mean, var, scale, bias)` and the keyword
            `dtype` to the five to compute with. Flax's own, the default, is not
            called: it would round statistics and parameters to `dtype`.
        rngs: Random number generators; `params` makes scale and bias.
        bias_metadata: Metadata of the variable `bias`.
        scale_metadata: Metadata of the variable `scale`.
        update_stats: Whether to fold the batch into the running statistics; by
            default in training only. The call argument goes before it.
        unbiased: Fold the unbiased variance, as PyTorch does.
        debias: Keep running statistics that are not drawn to their initial values.
            Adds the `nnx.BatchStat` `weight`, as `momentum=None` does.
        reference_weight: The weight of a batch that `momentum` is meant for.
        second_moment: Let the running variance include the scatter of batches' means.
        tau: How many rows the running statistics count for beside the batch.
        min_weight: Batches of no more weight are normalized by the running statistics.
        trim: How many standard deviations make an outlier that does not count.
        accumulate: Only gather moments, for `jbn.nnx.commit`. Adds `pending`.
        activation: A function of each element, such as `nnx.relu`, applied last. Here
            it takes less memory in training than behind the layer.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float | None = 0.99,
        epsilon: float = 1e-5,
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Any] = jax.nn.initializers.zeros,
        scale_init: Callable[..., Any] = jax.nn.initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: AxisIndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
        update_stats: bool | None = None,
        unbiased: bool = False,
        debias: bool = False,
        reference_weight: float | None = None,
        second_moment: bool = False,
        tau: float = 0.0,
        min_weight: float = 0.0,
        trim: float | None = None,
        accumulate: bool = False,
        activation: Activation | None = None,
        _stats_front: tuple[int, ...] = (),
        _params_front: tuple[int, ...] | None = (),
    ):
        if isinstance(num_features, bool):
            raise TypeError(
                "`num_features` comes first, the number of features; got"
                f" {num_features!r}. Pass flags by name."
            )
        _, fresh = init(num_features)
        features = fresh.mean.shape
        _, fresh = init(
            (*_stats_front, *features),
            track_weight=debias or momentum is None,
            accumulate=accumulate,
        )
        self.mean = nnx.BatchStat(fresh.mean)
        self.var = nnx.BatchStat(fresh.var)
        if fresh.weight is not None:
            self.weight = nnx.BatchStat(fresh.weight)
        if fresh.pending is not None:
            pending = fresh.pending._asdict()
            self.pending = nnx.Dict({k: nnx.BatchStat(v) for k, v in pending.items()})
        self.scale = nnx.data(None)
        self.bias = nnx.data(None)
        if use_scale and _params_front is not None:
            value = scale_init(rngs.params(), (*_params_front, *features), param_dtype)
            self.scale = nnx.Param(value, **scale_metadata)
        if use_bias and _params_front is not None:
            value = bias_init(rngs.params(), (*_params_front, *features), param_dtype)
            self.bias = nnx.Param(value, **bias_metadata)
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.update_stats = update_stats
        self.unbiased = unbiased
        self.debias = debias
        self.reference_weight = reference_weight
        self.second_moment = second_moment
        self.tau = tau
        self.min_weight = min_weight
        self.trim = trim
        self.accumulate = accumulate
        self.activation = activation

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

        Args:
            x: Input of shape (..., features, ...); integers and booleans are cast.
            use_running_average: Whether to normalize by the running statistics.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count. See `jbn.batch_norm`.
            weights: Non-negative weight of each element. See `jbn.batch_norm`.
            residual: Added to the output, before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        mode = _mode(self, use_running_average)
        return _thread(
            self,
            batch_norm,
            x,
            mode,
            update_stats,
            mask=mask,
            weights=weights,
            residual=residual,
        )

    def set_view(
        self,
        use_running_average: bool | None = None,
        update_stats: bool | None = None,
    ):
        """Sets the mode; called by `nnx.view`.

        Args:
          use_running_average: Whether to normalize by the running statistics.
          update_stats: Whether to fold the batch into them.
        """
        # `nnx.view_info` only finds arguments that are indented by two spaces.
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
        **options: All other arguments of `BatchNorm`.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        r_max: Schedule = 3.0,
        d_max: Schedule = 5.0,
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.r_max = r_max
        self.d_max = d_max
        self.step = nnx.data(None)
        if callable(r_max) or callable(d_max):
            self.step = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        r_max: float | ArrayLike | None = None,
        d_max: float | ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

        Args:
            x: As for `BatchNorm`, like all but the last two.
            use_running_average: Whether to normalize by the running statistics.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count.
            weights: Non-negative weight of each element.
            residual: Added to the output, before the activation.
            r_max: In place of the constructor's, for this call.
            d_max: In place of the constructor's, for this call.

        Returns:
            The normalized array, of the shape of `x`.
        """

        def limit(value, schedule):
            if value is not None:
                return value
            return schedule(self.step[...]) if callable(schedule) else schedule  # pyright: ignore[reportOptionalSubscript]

        return _thread(
            self,
            batch_renorm,
            x,
            _mode(self, use_running_average),
            update_stats,
            mask=mask,
            weights=weights,
            residual=residual,
            r_max=limit(r_max, self.r_max),
            d_max=limit(d_max, self.d_max),
        )


class GhostBatchNorm(BatchNorm):
    """Normalizes groups of the batch: `jbn.ghost_batch_norm` as an NNX module.

    Args:
        num_features: As for `BatchNorm`.
        num_groups: Number of groups (on each device, with `axis_name`).
        devices_per_group: How many devices of `axis_name` share their groups.
        **options: All other arguments of `BatchNorm`.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_groups: int,
        *,
        devices_per_group: int = 1,
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.num_groups = num_groups
        self.devices_per_group = devices_per_group

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

        Args:
            x: As for `BatchNorm`, like the rest; groups are cut along the first axis.
            use_running_average: Whether to normalize by the running statistics.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count.
            weights: Non-negative weight of each element.
            residual: Added to the output, before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(
            self,
            ghost_batch_norm,
            x,
            _mode(self, use_running_average),
            update_stats,
            mask=mask,
            weights=weights,
            residual=residual,
            num_groups=self.num_groups,
            devices_per_group=self.devices_per_group,
        )


class DomainBatchNorm(BatchNorm):
    """Normalizes each domain by itself: `jbn.domain_batch_norm` as an NNX module.

    Statistics have shape (num_domains, *features).

    Args:
        num_features: As for `BatchNorm`.
        num_domains: Number of domains.
        own_affine: Whether each domain has a scale and bias of its own, of that shape.
        **options: All other arguments of `BatchNorm`.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_domains: int,
        own_affine: bool = False,
        **options: Any,
    ):
        front = (num_domains,)
        params_front = front if own_affine else ()
        super().__init__(
            num_features, _stats_front=front, _params_front=params_front, **options
        )
        self.num_domains = num_domains
        self.own_affine = own_affine

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        domain: ArrayLike | int | None = None,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates the statistics of its domains.

        Args:
            x: As for `BatchNorm`, like all but `domain`.
            use_running_average: Whether to normalize by the running statistics.
            domain: Which domain each row, or image, or the whole batch belongs to.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count.
            weights: Non-negative weight of each element.
            residual: Added to the output, before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(
            self,
            domain_batch_norm,
            x,
            _mode(self, use_running_average),
            update_stats,
            mask=mask,
            weights=weights,
            residual=residual,
            domain=domain,
            num_domains=self.num_domains,
        )


class ConditionalBatchNorm(BatchNorm):
    """Scales by label or by map: `jbn.conditional_batch_norm` as an NNX module.

    Args:
        num_features: As for `BatchNorm`.
        num_classes: Number of labels, of which each has a scale and bias of its own,
            in tables of shape (num_classes, *features). `None`: the call gives them.
        one_plus: Whether tables, or what is given, hold gamma of `1 + gamma`. Tables
            then start at zero.
        **options: All other arguments of `BatchNorm`.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        num_classes: int | None = None,
        one_plus: bool = False,
        **options: Any,
    ):
        if one_plus:
            options.setdefault("scale_init", jax.nn.initializers.zeros)
        front = None if num_classes is None else (num_classes,)
        super().__init__(num_features, _params_front=front, **options)
        self.num_classes = num_classes
        self.one_plus = one_plus

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        labels: ArrayLike | int | None = None,
        scale: ArrayLike | None = None,
        bias: ArrayLike | None = None,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

        Args:
            x: As for `BatchNorm`, like all but the next three.
            use_running_average: Whether to normalize by the running statistics.
            labels: The label of each row, or image, or of the whole batch.
            scale: Without `num_classes`: scale that broadcasts to `x`.
            bias: Likewise.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count.
            weights: Non-negative weight of each element.
            residual: Added to the output, before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(
            self,
            conditional_batch_norm,
            x,
            _mode(self, use_running_average),
            update_stats,
            mask=mask,
            weights=weights,
            residual=residual,
            labels=labels,
            scale=scale,
            bias=bias,
            one_plus=self.one_plus,
        )


class FrozenBatchNorm(BatchNorm):
    """Normalizes by what stays as it is: `jbn.frozen_batch_norm` as an NNX module.

    Takes the place of a `BatchNorm`, with its variables, in a model that trains.

    Args:
        num_features: As for `BatchNorm`.
        freeze_affine: Whether no gradient reaches scale and bias.
        freeze_stats: Whether the running statistics are never updated.
        freeze_mode: Whether to normalize by them in any case.
        **options: All other arguments of `BatchNorm`.
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...],
        freeze_affine: bool = True,
        freeze_stats: bool = True,
        freeze_mode: bool = True,
        **options: Any,
    ):
        super().__init__(num_features, **options)
        self.freeze_affine = freeze_affine
        self.freeze_stats = freeze_stats
        self.freeze_mode = freeze_mode

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
            x: As for `BatchNorm`, like the rest.
            use_running_average: What to normalize by, unless `freeze_mode`.
            update_stats: Whether to update the statistics, unless `freeze_stats`.
            mask: Boolean; which elements count.
            weights: Non-negative weight of each element.
            residual: Added to the output, before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        return _thread(
            self,
            frozen_batch_norm,
            x,
            _mode(self, use_running_average, needed=not self.freeze_mode),
            update_stats,
            mask=mask,
            weights=weights,
            residual=residual,
            freeze_affine=self.freeze_affine,
            freeze_stats=self.freeze_stats,
            freeze_mode=self.freeze_mode,
        )


def commit(model: nnx.Module) -> None:
    """Folds what is pending in the layers of `model` into their running statistics.

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
        _write(layer, commit_stats(_read(layer), **_rule(layer)))


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


def _rule(layer: BatchNorm) -> dict[str, Any]:
    return {
        "momentum": layer.momentum,
        "unbiased": layer.unbiased,
        "reference_weight": layer.reference_weight,
        "second_moment": layer.second_moment,
    }


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
    variables = _variables(layer)
    for name, value in batch_stats_dict(batch_stats).items():
        if name == "pending":
            for k, v in value.items():
                variables[name][k][...] = v
        else:
            variables[name][...] = value


def _thread(
    layer: BatchNorm,
    function: Callable[..., Any],
    x: ArrayLike,
    use_running_average: bool | None,
    update_stats: bool | None,
    **call: Any,
) -> jax.Array:
    """Reads the variables of `layer`, calls `function`, and writes them back."""
    if update_stats is None:
        update_stats = layer.update_stats
    x = axes.as_inexact(x, layer.dtype)
    running = _read(layer)
    params = None
    if layer.scale is not None or layer.bias is not None:
        params = Params(
            None if layer.scale is None else layer.scale[...],
            None if layer.bias is None else layer.bias[...],
        )
    given = running
    if layer.promote_dtype is not dtypes.promote_dtype:
        scale, bias = params or Params()
        x, mean, var, scale, bias = layer.promote_dtype(
            (x, running.mean, running.var, scale, bias), dtype=layer.dtype
        )
        params = Params(scale, bias)
        if use_running_average and not update_stats:
            given = running._replace(mean=mean, var=var)
    y, batch_stats = function(
        x,
        params,
        given,
        use_running_average=use_running_average,
        update_stats=update_stats,
        axis=layer.axis,
        epsilon=layer.epsilon,
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
        tau=layer.tau,
        min_weight=layer.min_weight,
        trim=layer.trim,
        activation=layer.activation,
        dtype=layer.dtype,
        **_rule(layer),
        **call,
    )
    # What comes back as it went in has not been updated.
    if batch_stats is not given:
        _write(layer, batch_stats)
        if isinstance(layer, BatchRenorm) and layer.step is not None:
            layer.step[...] = next_step(layer.step[...])
    return y
