"""Flax Linen modules. They create, read and write variables, and call one function."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn import axes
from jbn.functional import batch_norm, init
from jbn.typing import (
    ArrayLike,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DType,
    Params,
)


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

    def __post_init__(self):
        if axes.is_count(self.use_running_average):
            raise TypeError(
                "`BatchNorm` takes `use_running_average`, True or False, first; got"
                f" {self.use_running_average!r}. A Linen module finds the number of"
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
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `batch_stats`.

        Args:
            x: Input of shape (..., features, ...); integers and booleans are cast.
            use_running_average: Whether to normalize by the running statistics.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count. See `jbn.batch_norm`.
            weights: Non-negative weight of each element. See `jbn.batch_norm`.

        Returns:
            The normalized array, of the shape of `x`.
        """
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        if update_stats is None:
            update_stats = self.update_stats
        if update_stats is None:
            update_stats = not use_running_average
        x = axes.as_inexact(x, self.dtype)
        features = axes.layout(x, self.axis).features
        tracked = self.debias or self.momentum is None

        def fresh(name: str) -> jax.Array:
            return getattr(init(features, track_weight=True)[1], name)

        variables = {
            name: self.variable("batch_stats", name, fresh, name)
            for name in ("mean", "var", *(["weight"] if tracked else []))
        }
        params = Params(
            self.param("scale", self.scale_init, features, self.param_dtype)
            if self.use_scale
            else None,
            self.param("bias", self.bias_init, features, self.param_dtype)
            if self.use_bias
            else None,
        )
        initializing = self.is_initializing()
        y, batch_stats = batch_norm(
            x,
            params,
            BatchStats(**{name: v.value for name, v in variables.items()}),
            use_running_average=use_running_average,
            update_stats=update_stats and not initializing,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            weights=weights,
            # Flax initializes outside of the mapped axes, too.
            axis_name=None if initializing else self.axis_name,
            axis_index_groups=None if initializing else self.axis_index_groups,
            unbiased=self.unbiased,
            dtype=self.dtype,
        )
        if update_stats and not initializing:
            for name, variable in variables.items():
                variable.value = getattr(batch_stats, name)
        return y
