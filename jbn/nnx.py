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
from jbn.typing import (
    ArrayLike,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DType,
    Params,
)


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
    ):
        if isinstance(num_features, bool):
            raise TypeError(
                "`num_features` comes first, the number of features; got"
                f" {num_features!r}. Pass flags by name."
            )
        _, fresh = init(num_features, track_weight=debias or momentum is None)
        self.mean = nnx.BatchStat(fresh.mean)
        self.var = nnx.BatchStat(fresh.var)
        if fresh.weight is not None:
            self.weight = nnx.BatchStat(fresh.weight)
        shape = fresh.mean.shape
        self.scale = nnx.data(None)
        self.bias = nnx.data(None)
        if use_scale:
            value = scale_init(rngs.params(), shape, param_dtype)
            self.scale = nnx.Param(value, **scale_metadata)
        if use_bias:
            value = bias_init(rngs.params(), shape, param_dtype)
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

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        update_stats: bool | None = None,
        mask: ArrayLike | None = None,
        weights: ArrayLike | None = None,
    ) -> jax.Array:
        """Normalizes `x` and, in training, updates `mean` and `var` in place.

        Args:
            x: Input of shape (..., features, ...); integers and booleans are cast.
            use_running_average: Whether to normalize by the running statistics.
            update_stats: Whether to update them; by default in training only.
            mask: Boolean; which elements count. See `jbn.batch_norm`.
            weights: Non-negative weight of each element. See `jbn.batch_norm`.

        Returns:
            The normalized array, of the shape of `x`.
        """
        use_running_average = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg=(
                "`use_running_average` must be given to `BatchNorm`: in the"
                " constructor, in the call, or by `nnx.view`, `model.train()` or"
                " `model.eval()`."
            ),
        )
        if update_stats is None:
            update_stats = self.update_stats
        if update_stats is None:
            update_stats = not use_running_average
        x = axes.as_inexact(x, self.dtype)
        state = {
            name: getattr(self, name)
            for name in BatchStats._fields
            if getattr(self, name, None) is not None
        }
        running = BatchStats(**{name: v[...] for name, v in state.items()})
        params = Params(
            None if self.scale is None else self.scale[...],
            None if self.bias is None else self.bias[...],
        )
        if self.promote_dtype is not dtypes.promote_dtype:
            x, mean, var, scale, bias = self.promote_dtype(
                (x, running.mean, running.var, params.scale, params.bias),
                dtype=self.dtype,
            )
            params = Params(scale, bias)
            if use_running_average and not update_stats:
                running = running._replace(mean=mean, var=var)
        y, batch_stats = batch_norm(
            x,
            params,
            running,
            use_running_average=use_running_average,
            update_stats=update_stats,
            axis=self.axis,
            momentum=self.momentum,
            epsilon=self.epsilon,
            mask=mask,
            weights=weights,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            unbiased=self.unbiased,
            dtype=self.dtype,
        )
        if update_stats:
            for name, variable in state.items():
                variable[...] = getattr(batch_stats, name)
        return y

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
