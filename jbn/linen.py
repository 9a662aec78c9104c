"""Flax Linen modules. They create, read and write variables, and call one function."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn import axes
from jbn.functional import batch_norm, init
from jbn.running import as_batch_stats, batch_stats_dict
from jbn.typing import (
    Activation,
    ArrayLike,
    Axes,
    AxisIndexGroups,
    AxisName,
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


class BatchNorm(nn.Module):
    """Normalizes each feature by the batch: `jbn.batch_norm` as a Linen module.

    Takes the place of `flax.linen.BatchNorm`: the same arguments in the same order,
    the same variables (`params/{scale,bias}`, `batch_stats/{mean,var}`, so that
    checkpoints go both ways), the same update (none during initialization). What is
    different: the output has the dtype of `x` unless `dtype` is given, devices are
    merged by how many elements count on each, and nothing makes a NaN of a mask.

    Attributes:
        use_running_average: Whether to normalize by the running statistics; either
            here or in the call.
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
        force_float32_reductions: Accepted, and without effect: statistics are always
            float32 or wider, in computation and in `batch_stats`.
        update_stats: Whether to fold the batch into the running statistics; by
            default in training only. Either here or in the call.
        unbiased: Fold the unbiased variance, as PyTorch does.
        debias: Keep running statistics that are not drawn to their initial values.
            Adds `batch_stats/weight`, as `momentum=None` does.
        reference_weight: The weight of a batch that `momentum` is meant for.
        second_moment: Let the running variance include the scatter of batches' means.
        tau: How many rows the running statistics count for beside the batch.
        min_weight: Batches of no more weight are normalized by the running statistics.
        trim: How many standard deviations make an outlier that does not count.
        accumulate: Only gather moments, for `jbn.commit`. Adds `batch_stats/pending`.
        activation: A function of each element, such as `nn.relu`, applied last. Here
            it takes less memory in training than behind the layer.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float | None = 0.99
    epsilon: float = 1e-5
    dtype: DType | None = None
    param_dtype: DType = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = nn.initializers.zeros
    scale_init: Callable[..., Any] = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: AxisIndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    update_stats: bool | None = None
    unbiased: bool = False
    debias: bool = False
    reference_weight: float | None = None
    second_moment: bool = False
    tau: float = 0.0
    min_weight: float = 0.0
    trim: float | None = None
    accumulate: bool = False
    activation: Activation | None = None

    def __post_init__(self):
        if axes.is_count(self.use_running_average):
            raise TypeError(
                f"`{type(self).__name__}` takes `use_running_average`, True or False;"
                f" got {self.use_running_average!r}. A Linen module finds the number of"
                " features in its input: leave it out."
            )
        super().__post_init__()

    @nn.compact
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
        """Normalizes `x` and, in training, updates `batch_stats`.

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


class _RenormFields(nn.Module):
    # Fields of a base that stands last come first: `BatchRenorm(3.0, 5.0)`.
    r_max: Schedule = 3.0
    d_max: Schedule = 5.0


class BatchRenorm(BatchNorm, _RenormFields):
    """Normalizes by the batch, corrected: `jbn.batch_renorm` as a Linen module.

    Attributes:
        r_max: Limit of the ratio of standard deviations, at least 1, or a schedule: a
            function of the number of training calls so far, such as
            `optax.linear_schedule(1.0, 3.0, 35_000, 5_000)`. A schedule adds this
            number as `batch_stats/step`. (With `accumulate` it counts microbatches.)
        d_max: Limit of the distance of the means, at least 0, or a schedule.

    All other attributes are those of `BatchNorm`.
    """

    @nn.compact
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
        """Normalizes `x` and, in training, updates `batch_stats`.

        Args:
            x: As for `BatchNorm`, like all but the last two.
            use_running_average: Whether to normalize by the running statistics.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count.
            weights: Non-negative weight of each element.
            residual: Added to the output, before the activation.
            r_max: In place of the attribute, for this call.
            d_max: In place of the attribute, for this call.

        Returns:
            The normalized array, of the shape of `x`.
        """
        step = None
        if callable(self.r_max) or callable(self.d_max):
            fresh = lambda: jnp.zeros((), jnp.int32)
            step = self.variable("batch_stats", "step", fresh)

        def limit(value, schedule):
            if value is not None:
                return value
            return schedule(step.value) if callable(schedule) and step else schedule

        return _thread(
            self,
            batch_renorm,
            x,
            _mode(self, use_running_average),
            update_stats,
            step=step,
            mask=mask,
            weights=weights,
            residual=residual,
            r_max=limit(r_max, self.r_max),
            d_max=limit(d_max, self.d_max),
        )


class _GhostFields(nn.Module):
    num_groups: int


class GhostBatchNorm(BatchNorm, _GhostFields):
    """Normalizes groups of the batch: `jbn.ghost_batch_norm` as a Linen module.

    Attributes:
        num_groups: Number of groups (on each device, with `axis_name`).
        devices_per_group: How many devices of `axis_name` share their groups.

    All other attributes are those of `BatchNorm`.
    """

    devices_per_group: int = 1

    @nn.compact
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
        """Normalizes `x` and, in training, updates `batch_stats`.

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
            devices_per_group=1 if self.is_initializing() else self.devices_per_group,
        )


class _DomainFields(nn.Module):
    num_domains: int


class DomainBatchNorm(BatchNorm, _DomainFields):
    """Normalizes each domain by itself: `jbn.domain_batch_norm` as a Linen module.

    Statistics have shape (num_domains, *features).

    Attributes:
        num_domains: Number of domains.
        own_affine: Whether each domain has a scale and bias of its own, of that shape.

    All other attributes are those of `BatchNorm`.
    """

    own_affine: bool = False

    @nn.compact
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
        front = (self.num_domains,)
        return _thread(
            self,
            domain_batch_norm,
            x,
            _mode(self, use_running_average),
            update_stats,
            stats_front=front,
            params_front=front if self.own_affine else (),
            mask=mask,
            weights=weights,
            residual=residual,
            domain=domain,
            num_domains=self.num_domains,
        )


class _ConditionalFields(nn.Module):
    num_classes: int | None = None


class ConditionalBatchNorm(BatchNorm, _ConditionalFields):
    """Scales by label or by map: `jbn.conditional_batch_norm` as a Linen module.

    Attributes:
        num_classes: Number of labels, of which each has a scale and bias of its own,
            in tables of shape (num_classes, *features). `None`: the call gives them.
        one_plus: Whether tables, or what is given, hold gamma of `1 + gamma`. Tables
            then start at zero.

    All other attributes are those of `BatchNorm`.
    """

    one_plus: bool = False

    @nn.compact
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
        """Normalizes `x` and, in training, updates `batch_stats`.

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
        from_zero = self.one_plus and self.scale_init is BatchNorm.scale_init
        return _thread(
            self,
            conditional_batch_norm,
            x,
            _mode(self, use_running_average),
            update_stats,
            params_front=None if self.num_classes is None else (self.num_classes,),
            scale_init=nn.initializers.zeros if from_zero else self.scale_init,
            mask=mask,
            weights=weights,
            residual=residual,
            labels=labels,
            scale=scale,
            bias=bias,
            one_plus=self.one_plus,
        )


class FrozenBatchNorm(BatchNorm):
    """Normalizes by what stays as it is: `jbn.frozen_batch_norm` as a Linen module.

    Takes the place of a `BatchNorm`, with its variables, in a model that trains.

    Attributes:
        freeze_affine: Whether no gradient reaches scale and bias.
        freeze_stats: Whether the running statistics are never updated.
        freeze_mode: Whether to normalize by them in any case.

    All other attributes are those of `BatchNorm`.
    """

    freeze_affine: bool = True
    freeze_stats: bool = True
    freeze_mode: bool = True

    @nn.compact
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
            use_running_average: What to normalize by; needed unless `freeze_mode`.
            update_stats: Whether to update the statistics, unless `freeze_stats`.
            mask: Boolean; which elements count.
            weights: Non-negative weight of each element.
            residual: Added to the output, before the activation.

        Returns:
            The normalized array, of the shape of `x`.
        """
        asked = self.use_running_average is not None or use_running_average is not None
        return _thread(
            self,
            frozen_batch_norm,
            x,
            None
            if not asked and self.freeze_mode
            else _mode(self, use_running_average),
            update_stats,
            mask=mask,
            weights=weights,
            residual=residual,
            freeze_affine=self.freeze_affine,
            freeze_stats=self.freeze_stats,
            freeze_mode=self.freeze_mode,
        )


def _mode(
    layer: BatchNorm, use_running_average: bool | None, needed: bool = True
) -> bool | None:
    if not needed and use_running_average is layer.use_running_average is None:
        return None
    return nn.merge_param(
        "use_running_average", layer.use_running_average, use_running_average
    )


def _thread(
    layer: BatchNorm,
    function: Callable[..., Any],
    x: ArrayLike,
    use_running_average: bool | None,
    update_stats: bool | None,
    *,
    stats_front: tuple[int, ...] = (),
    params_front: tuple[int, ...] | None = (),
    scale_init: Callable[..., Any] | None = None,
    step: nn.Variable | None = None,
    **call: Any,
) -> jax.Array:
    """Creates and reads the variables of `layer`, calls `function`, writes them back.

    Statistics have `stats_front` in front of the features in their shape, and
    parameters `params_front`; `None`: there are none.
    """
    x = axes.as_inexact(x, layer.dtype)
    features = axes.layout(x, layer.axis).features

    def fresh(name: str) -> Any:
        shape = (*stats_front, *features)
        _, batch_stats = init(shape, track_weight=True, accumulate=True)
        return batch_stats_dict(batch_stats)[name]

    names = ["mean", "var"]
    names += ["weight"] if layer.debias or layer.momentum is None else []
    names += ["pending"] if layer.accumulate else []
    variables = {
        name: layer.variable("batch_stats", name, fresh, name) for name in names
    }
    params = None
    if params_front is not None:
        shape = (*params_front, *features)
        params = Params(
            layer.param(
                "scale", scale_init or layer.scale_init, shape, layer.param_dtype
            )
            if layer.use_scale
            else None,
            layer.param("bias", layer.bias_init, shape, layer.param_dtype)
            if layer.use_bias
            else None,
        )
    initializing = layer.is_initializing()
    if update_stats is None:
        update_stats = layer.update_stats
    running = as_batch_stats({name: v.value for name, v in variables.items()})
    y, batch_stats = function(
        x,
        params,
        running,
        use_running_average=use_running_average,
        update_stats=False if initializing else update_stats,
        axis=layer.axis,
        momentum=layer.momentum,
        epsilon=layer.epsilon,
        # Flax initializes outside of the mapped axes, too.
        axis_name=None if initializing else layer.axis_name,
        axis_index_groups=None if initializing else layer.axis_index_groups,
        unbiased=layer.unbiased,
        reference_weight=layer.reference_weight,
        second_moment=layer.second_moment,
        tau=layer.tau,
        min_weight=layer.min_weight,
        trim=layer.trim,
        activation=layer.activation,
        dtype=layer.dtype,
        **call,
    )
    # What comes back as it went in has not been updated, and may be immutable.
    if batch_stats is not running:
        for name, value in batch_stats_dict(batch_stats).items():
            variables[name].value = value
        if step is not None:
            step.value = next_step(step.value)
    return y
