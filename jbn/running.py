"""How the moments of a batch fold into the running statistics."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes
from jbn.ops import xla
from jbn.typing import ArrayLike, BatchStats, Moments


def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | int | ArrayLike | None = 0.99,
    unbiased: bool = False,
) -> BatchStats:
    """Folds the moments of a batch into the running statistics.

    The rule follows from `momentum` and from whether `batch_stats` has a `weight`
    (see `jbn.init`, `track_weight`):

    | `momentum` | `weight` | rule |
    |---|---|---|
    | a number | `None` | exponential: `new = momentum * old + (1 - momentum) * batch` |
    | a number | tracked | debiased exponential: the same, divided by its total weight |
    | `None` | tracked | cumulative: the moments of all rows seen so far, exactly |

    A plain exponential average starts at mean 0 and variance 1 and takes some
    `3 / (1 - momentum)` steps to forget them. A debiased one has never heard of them:
    after one step it equals the batch, after many it equals the plain one. `weight` is
    then `1 - momentum**steps`, and the statistics are always ready to be used.

    Where the moments have no weight the statistics keep their values. No gradient
    passes.

    Args:
        batch_stats: The running statistics.
        moments: The moments of a batch, for the same features.
        momentum: Weight of the *old* statistics, from 0 to 1, as in Flax and Keras
            (PyTorch's is one minus this); a traced value does not recompile, and is
            rounded to float32, which a Python number near 1 is only after it was
            subtracted from 1. `None` is the cumulative rule (as in PyTorch, but
            weighted by rows, not batches).
        unbiased: Fold in the unbiased variance, `var * n / (n - 1)` with `n` the
            weight of the moments, as PyTorch does. Where `n` is not above 1 there is
            none, and the running variance stays as it was.

    Returns:
        The new running statistics, each of at least the precision it had, and float32.

    Raises:
        ValueError: If `momentum` is known to be outside [0, 1], if it is `None` and
            there is no `weight`, or if the features differ.

    Example:
        >>> batch = Moments(jnp.array([4.0]), jnp.array([8.0]), jnp.array([3.0]))
        >>> old = BatchStats(jnp.array([0.0]), jnp.array([1.0]))
        >>> new = update_batch_stats(old, batch, momentum=0.5)
        >>> print(new.mean, new.var)
        [4.] [2.]
        >>> new = update_batch_stats(old, batch, momentum=0.5, unbiased=True)
        >>> print(new.mean, new.var)
        [4.] [2.5]
    """
    if tuple(batch_stats.mean.shape) != tuple(moments.mean.shape):
        raise ValueError(
            "`batch_stats` and `moments` must be of the same features; got shapes"
            f" {tuple(batch_stats.mean.shape)} and {tuple(moments.mean.shape)}."
        )
    check_momentum(momentum, batch_stats)
    batch_stats, moments = lax.stop_gradient((batch_stats, moments))
    mean = _state(batch_stats.mean, moments.mean)
    var = _state(batch_stats.var, moments.var)
    seen = moments.weight.astype(var.dtype)
    batch_mean = moments.mean.astype(mean.dtype)
    batch_var = moments.var.astype(var.dtype)
    has_var = some = seen > 0
    if unbiased:
        has_var = seen > 1
        batch_var = batch_var * seen / jnp.where(has_var, seen - 1, 1)

    weight = batch_stats.weight
    if weight is not None:
        weight = _state(weight, moments.weight)
    if momentum is None:
        assert weight is not None  # by check_momentum
        kept, added = weight, seen
    else:
        # One minus the number as it came: in float32, 1 - 0.99 is 1e-6 off.
        added = jnp.asarray(1 - momentum, var.dtype)
        kept = jnp.asarray(momentum, var.dtype)
        if weight is not None:
            # A weight above 1, of the cumulative rule, is all the weight there can be.
            kept *= jnp.minimum(weight, 1)
    if weight is None:
        keep, add = kept, added
    else:
        total = kept + added
        weight = jnp.where(some, total, weight)
        keep, add = (part * xla.reciprocal(total) for part in (kept, added))
    new_mean = keep.astype(mean.dtype) * mean + add.astype(mean.dtype) * batch_mean
    new_var = keep * var + add * batch_var
    if momentum is None:
        # Pooling rows, not averaging variances: the means' own scatter belongs to it.
        new_var += keep * add * xla.abs_square(batch_mean - mean)
    return BatchStats(
        jnp.where(some, new_mean, mean), jnp.where(has_var, new_var, var), weight
    )


def check_momentum(
    momentum: float | int | ArrayLike | None, batch_stats: BatchStats
) -> None:
    """Refuses a momentum known to be outside [0, 1], or that lacks its state."""
    if momentum is None:
        if batch_stats.weight is None:
            raise ValueError(
                "`momentum=None`, the cumulative rule, needs to know how many rows the"
                " statistics have seen; got `batch_stats.weight=None`. Make them with"
                " `init(..., track_weight=True)`."
            )
        return
    if np.shape(momentum) not in ((), batch_stats.mean.shape):
        raise ValueError(
            "`momentum` must be one number, or one for each feature; got an array of"
            f" shape {np.shape(momentum)} for {tuple(batch_stats.mean.shape)} features."
        )
    value = axes.known(momentum)
    if value is not None and not ((value >= 0) & (value <= 1)).all():
        raise ValueError(
            "`momentum` is the weight of the old statistics and must be from 0 to 1;"
            f" got {value}. PyTorch's `momentum` is one minus this."
        )


def _state(old: jax.Array, batch: jax.Array) -> jax.Array:
    """The old statistic in the dtype of the new one, which scans can carry.

    It keeps its own, unless that is of 16 bits, or real while the batch is complex.
    """
    old = xla.wide(jnp.asarray(old))
    if jnp.iscomplexobj(batch) and not jnp.iscomplexobj(old):
        return lax.complex(old, jnp.zeros_like(old))
    return old
