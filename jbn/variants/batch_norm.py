"""Batch norm: `init` makes the state, `batch_norm` threads it."""

import operator
from collections.abc import Sequence
from typing import Unpack

import jax
import jax.numpy as jnp

from jbn import axes
from jbn.call import Stats, prepare, run, thread
from jbn.options import Options, documented
from jbn.typing import ArrayLike, BatchStats, DType, Moments, Params


def init(
    num_features: int | Sequence[int],
    *,
    use_scale: bool = True,
    use_bias: bool = True,
    param_dtype: DType = jnp.float32,
    track_weight: bool = False,
    accumulate: bool = False,
) -> tuple[Params, BatchStats]:
    """Makes the parameters and running statistics of a batch norm.

    Args:
        num_features: How many features; for several feature axes their sizes, in the
            order of the axes in the input.
        use_scale: Whether to learn a scale, at first 1.
        use_bias: Whether to learn a bias, at first 0.
        param_dtype: Dtype of scale and bias. Statistics are always float32. (With
            complex data the mean becomes complex at the first update. To carry it
            through a `scan`, start with
            `batch_stats._replace(mean=batch_stats.mean + 0j)`.)
        track_weight: Whether the running statistics count how much data they have seen,
            as the debiased and cumulative rules need: see `jbn.update_batch_stats`.
        accumulate: Whether training only collects moments, with which `jbn.commit`
            updates the running statistics once per optimizer step.

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
    # A separate array for each: a buffer cannot be donated twice.
    zeros = lambda: jnp.zeros(shape, jnp.float32)
    return (
        Params(
            jnp.ones(shape, param_dtype) if use_scale else None,
            jnp.zeros(shape, param_dtype) if use_bias else None,
        ),
        BatchStats(
            zeros(),
            jnp.ones(shape, jnp.float32),
            zeros() if track_weight else None,
            Moments(zeros(), zeros(), zeros()) if accumulate else None,
        ),
    )


@documented(Options)
def batch_norm(
    x: ArrayLike,
    params: Params | None,
    batch_stats: Stats,
    *,
    use_running_average: bool,
    **options: Unpack[Options],
) -> tuple[jax.Array, Stats]:
    """Normalizes each feature of `x` by the mean and variance of the batch.

    For each feature, over all the other axes,

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    where `mean` and `var` are those of the batch, `var` being biased (divided by the
    number of elements). Each running statistic then moves towards the batch's:

        running = momentum * running + (1 - momentum) * batch

    Two switches select the statistics to normalize by, and whether to update them:

    | `use_running_average` | `update_stats` | for |
    |---|---|---|
    | False | True (default) | training |
    | True | False (default) | inference, a frozen layer |
    | False | False | a second pass over the same data, an inner loop |
    | True | True | adapting the statistics while normalizing by them |

    Statistics and arithmetic are float32 or wider, and the variance has a relative
    error below 1e-5 for means of up to 1e4 standard deviations. In training the
    derivative goes through mean and variance, takes one all-reduce, saves only `x` for
    the backward pass, and can itself be differentiated in any mode.

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype.
        params: Scale and bias, one entry per feature. A field that is `None`, or
            `None` for both, is left out of the formula.
        batch_stats: Running mean and variance, one entry per feature, kept in float32
            or wider. `None` if there are none to keep, in training only.
        use_running_average: Whether to normalize by the running statistics instead of
            the batch's.
        **options: The options of `jbn.options.Options`.

    Returns:
        The normalized array, of the shape of `x`, and the running statistics, updated
        or unchanged. In training, no gradient flows through the running statistics. A
        feature whose elements all have weight zero is normalized by its running
        statistics (by mean 0 and variance 1 if there are none), which keep their
        values.

    Raises:
        TypeError: If `x` is of integers or booleans, a flag is not a boolean, or
            `dtype` cannot hold the output.
        ValueError: If axes, shapes or ranges do not fit, or `batch_stats` is missing.
        NameError: If `axis_name` is not a mapped axis here, and statistics are taken.

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
    call = prepare(
        "batch_norm",
        x,
        params,
        batch_stats,
        use_running_average=use_running_average,
        **options,
    )
    return run(thread, call)
