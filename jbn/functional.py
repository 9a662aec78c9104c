"""Batch norm: `init` makes the state, `batch_norm` threads it."""

import operator
from collections.abc import Sequence
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes
from jbn.moments import row_moments
from jbn.normalize import affine, apply, check_epsilon, check_stats, expand_stats
from jbn.running import check_momentum, update_batch_stats
from jbn.typing import (
    ArrayLike,
    Axes,
    AxisIndexGroups,
    AxisName,
    BatchStats,
    DType,
    Moments,
    Params,
)


# Statistics come out where they came in, and only there.
_Stats = TypeVar("_Stats", bound=BatchStats | None)


def init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: DType = jnp.float32,
    track_weight: bool = False,
) -> tuple[Params, BatchStats]:
    """Makes the parameters and running statistics of a batch norm.

    Args:
        num_features: How many features; for several feature axes their sizes, in the
            order of the axes in the input.
        use_scale: Whether to learn a scale, at first 1.
        use_bias: Whether to learn a bias, at first 0.
        param_dtype: Dtype of scale and bias. Statistics are always float32. (Complex
            data make the mean complex at the first update. A `scan` has to carry it so
            from the start: `batch_stats._replace(mean=batch_stats.mean + 0j)`.)
        track_weight: Whether the running statistics know how much they have seen,
            which the debiased and cumulative rules need: see `jbn.update_batch_stats`.

    Returns:
        `Params` and `BatchStats`: mean 0 and variance 1.

    Raises:
        TypeError: If `num_features` is not one or several integers, or `param_dtype`
            is not a floating or complex dtype.
        ValueError: If `num_features` is negative.

    Example:
        >>> params, batch_stats = init(3)
        >>> print(params.scale, params.bias, batch_stats.mean, batch_stats.var)
        [1. 1. 1.] [0. 0. 0.] [0. 0. 0.] [1. 1. 1.]
    """
    try:
        shape = tuple(
            operator.index(n)
            for n in (
                num_features if isinstance(num_features, Sequence) else (num_features,)
            )
        )
    except TypeError:
        raise TypeError(
            "`num_features` must be an integer, or a sequence of them for several"
            f" feature axes; got {num_features!r}."
        ) from None
    axes.output_dtype(param_dtype, jnp.dtype(jnp.float32), "param_dtype")
    if any(n < 0 for n in shape):
        raise ValueError(f"`num_features` must not be negative; got {num_features!r}.")
    return (
        Params(
            jnp.ones(shape, param_dtype) if use_scale else None,
            jnp.zeros(shape, param_dtype) if use_bias else None,
        ),
        BatchStats(
            jnp.zeros(shape, jnp.float32),
            jnp.ones(shape, jnp.float32),
            jnp.zeros(shape, jnp.float32) if track_weight else None,
        ),
    )


def batch_norm(
    x: ArrayLike,
    params: Params | None,
    batch_stats: _Stats,
    *,
    use_running_average: bool,
    update_stats: bool | None = None,
    axis: Axes = -1,
    momentum: float | int | ArrayLike | None = 0.99,
    epsilon: float | int | ArrayLike = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: AxisIndexGroups | None = None,
    unbiased: bool = False,
    dtype: DType | None = None,
) -> tuple[jax.Array, _Stats]:
    """Normalizes each feature of `x` by the mean and variance of the batch.

    For each feature, over all the other axes,

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    where `mean` and `var` are those of the batch, `var` being biased (divided by the
    number of elements). Each running statistic then moves towards the batch's:

        running = momentum * running + (1 - momentum) * batch

    What to normalize by and whether to update are two switches:

    | `use_running_average` | `update_stats` | for |
    |---|---|---|
    | False | True (default) | training |
    | True | False (default) | inference, a frozen layer |
    | False | False | a second pass over the same data, an inner loop |
    | True | True | adapting the statistics while normalizing by them |

    Statistics and arithmetic are float32 or wider, and the variance is right to a
    relative 1e-5 even where the mean is 1e4 standard deviations. In training the
    derivative goes through mean and variance, takes one all-reduce, keeps `x` alone
    for the backward pass, and can itself be differentiated, in any mode.

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype.
        params: Scale and bias, one entry per feature. A field that is `None`, or
            `None` for both, is left out of the formula.
        batch_stats: Running mean and variance, one entry per feature, kept in float32
            or wider. `None` if there are none to keep, in training only.
        use_running_average: Whether to normalize by the running statistics instead of
            the batch's.
        update_stats: Whether to fold the batch into the running statistics. By default
            in training, which is `not use_running_average`.
        axis: Feature axis or axes. Statistics are taken over all the others.
        momentum: Weight of the *old* running statistic, as in Flax and Keras; one
            minus PyTorch's. `None` and other rules: see `jbn.update_batch_stats`.
        epsilon: Added to the variance, inside the square root.
        mask: Boolean; which elements count. Either of the rank of `x`, with size 1
            along axes where it does not vary, or one entry a row (the shape of `x`
            without its features). Elements left out do not affect the others, even if
            they are NaN. They are still normalized, and one that is not finite comes
            out as `bias`.
        weights: Non-negative real weight of each element, shaped like a mask; an
            integer weight is the same as repeating the row. Excludes `mask`.
        axis_name: Mapped axis or axes (of `shard_map`, `pmap` or `vmap`) to take the
            statistics over. Each element counts alike wherever it is, so shards may
            be uneven, or empty. Under plain `jit` leave this unset: the statistics of
            a sharded `x` are already those of the whole batch.
        axis_index_groups: Partition of the indices of `axis_name` into groups that
            each take their own statistics.
        unbiased: Fold the unbiased variance into the running one, as PyTorch does.
        dtype: Dtype of the output; that of `x` by default.

    Returns:
        The normalized array, of the shape of `x`, and the running statistics, new or
        as they came. No gradient flows into or out of the statistics of training. A
        feature whose elements all have weight zero is normalized by its running
        statistics (by mean 0 and variance 1 if there are none), which keep their
        values.

    Raises:
        TypeError: If `x` is of integers or booleans, a flag is not a boolean, or
            `dtype` cannot hold the output.
        ValueError: If axes, shapes or ranges do not fit, or `batch_stats` is missing.
        NameError: If `axis_name` is not a mapped axis here.

    Example:
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> params, batch_stats = init(2)
        >>> y, batch_stats = batch_norm(
        ...     x, params, batch_stats, use_running_average=False, momentum=0.5
        ... )
        >>> print(y.round(3))
        [[-1. -1.]
         [ 1.  1.]]
        >>> print(batch_stats.mean, batch_stats.var)
        [ 1. 10.] [ 1.  50.5]

    References:
        Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by
        Reducing Internal Covariate Shift", 2015. https://arxiv.org/abs/1502.03167
    """
    use_running_average = _flag(use_running_average, "use_running_average")
    if update_stats is None:
        update_stats = batch_stats is not None and not use_running_average
    update_stats = _flag(update_stats, "update_stats")
    x = axes.check_inexact(x)
    lay = axes.layout(x, axis)
    if batch_stats is None:
        if use_running_average or update_stats:
            raise ValueError(
                "`batch_stats` must be given to normalize by the running statistics or"
                " to update them; got None. Make them with `init`, or pass"
                " `use_running_average=False` and `update_stats=False`."
            )
        _, running = init(lay.features)
    else:
        running = batch_stats
        check_stats(running, "batch_stats", lay, axis, x.dtype)
        check_momentum(momentum, running)
    scale, bias = affine(params, lay, axis, x.dtype)
    epsilon = check_epsilon(epsilon)
    out = axes.output_dtype(dtype, x.dtype)
    w = axes.element_weights(mask, weights, lay)
    rows = axes.rows(lay, axis_name, axis_index_groups)

    def normalize_by(stats: Moments, of_rows: axes.Rows | None) -> jax.Array:
        return apply(of_rows, out, x, w, None, stats, scale, bias, epsilon)

    if use_running_average and not update_stats:
        return normalize_by(expand_stats(running, lay, x.dtype), None), batch_stats
    batch = row_moments(rows, x, w)
    if use_running_average:
        y = normalize_by(expand_stats(running, lay, x.dtype), None)
    else:
        y = normalize_by(_or_running(batch, running, lay, x.dtype), rows)
    if not update_stats:
        return y, batch_stats
    updated = update_batch_stats(
        running, jax.tree.map(lay.squeeze, batch), momentum=momentum, unbiased=unbiased
    )
    return y, cast(_Stats, updated)


def _or_running(
    batch: Moments, running: BatchStats, lay: axes.Layout, dtype: DType
) -> Moments:
    """The moments of the batch, and the running statistics where it has no weight."""
    instead = lax.stop_gradient(expand_stats(running, lay, dtype))
    some = batch.weight > 0
    return Moments(
        batch.weight,
        jnp.where(some, batch.mean, instead.mean),
        jnp.where(some, batch.var, instead.var),
    )


def _flag(value: bool, name: str) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{name}` must be True or False when the function is traced; got"
            f" {value!r}. Make it a static argument of `jit`."
        )
    return bool(value)
