"""How the moments of a batch fold into the running statistics."""

import math
from collections.abc import Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes
from jbn.moments import merge
from jbn.ops import xla
from jbn.typing import ArrayLike, BatchStats, Moments


_Tree = TypeVar("_Tree")


def update_batch_stats(
    batch_stats: BatchStats,
    moments: Moments,
    *,
    momentum: float | int | ArrayLike | None = 0.99,
    unbiased: bool = False,
    reference_weight: float | int | ArrayLike | None = None,
    second_moment: bool = False,
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

    Where the moments have no weight the statistics keep their values. Where
    `batch_stats` has `pending` moments these take up the new ones, and wait for
    `jbn.commit`. No gradient passes.

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
        reference_weight: The weight of a batch that `momentum` is meant for. One of
            another weight counts by it, as if it had come in so many parts of the
            reference: the old statistics keep `momentum**(weight / reference_weight)`.
            By default every batch counts alike, however little it holds.
        second_moment: Average the second moment instead of the variance, so that the
            running variance is that of all rows, with the scatter of the batches'
            means: `keep * var + add * batch_var + keep * add * (batch_mean - mean)**2`
            for `keep = momentum` and `add = 1 - momentum`. An average of variances
            misses it, and is 0 for batches of one row. (The cumulative rule has it
            anyway.)

    Returns:
        The new running statistics, each of at least the precision it had, and float32.

    Raises:
        ValueError: If `momentum` is known to be outside [0, 1], if it is `None` and
            there is no `weight` or there is a `reference_weight`, if the features
            differ, or if `second_moment` and `unbiased` are both asked for.

    Example:
        >>> batch = Moments(jnp.array([4.0]), jnp.array([8.0]), jnp.array([3.0]))
        >>> old = BatchStats(jnp.array([0.0]), jnp.array([1.0]))
        >>> new = update_batch_stats(old, batch, momentum=0.5)
        >>> print(new.mean, new.var)
        [4.] [2.]
        >>> new = update_batch_stats(old, batch, momentum=0.5, unbiased=True)
        >>> print(new.mean, new.var)
        [4.] [2.5]
        >>> new = update_batch_stats(old, batch, momentum=0.25, reference_weight=8)
        >>> print(new.mean, new.var)
        [4.] [2.]
        >>> new = update_batch_stats(old, batch, momentum=0.5, second_moment=True)
        >>> print(new.mean, new.var)
        [4.] [18.]
    """
    if tuple(batch_stats.mean.shape) != tuple(moments.mean.shape):
        raise ValueError(
            "`batch_stats` and `moments` must be of the same features; got shapes"
            f" {tuple(batch_stats.mean.shape)} and {tuple(moments.mean.shape)}."
        )
    check_rule(batch_stats, momentum, unbiased, reference_weight, second_moment)
    batch_stats, moments = lax.stop_gradient((batch_stats, moments))
    if batch_stats.pending is not None:
        return batch_stats._replace(pending=_take_up(batch_stats.pending, moments))
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
        kept, added = _shares(momentum, reference_weight, seen)
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
    if momentum is None or second_moment:
        # Pooling rows, not averaging variances: the means' own scatter belongs to it.
        new_var += keep * add * xla.abs_square(batch_mean - mean)
    return BatchStats(
        jnp.where(some, new_mean, mean), jnp.where(has_var, new_var, var), weight
    )


def commit(
    batch_stats: _Tree,
    *,
    momentum: float | int | ArrayLike | None = 0.99,
    unbiased: bool = False,
    reference_weight: float | int | ArrayLike | None = None,
    second_moment: bool = False,
) -> _Tree:
    """Folds the pending moments into the running statistics, and empties them.

    For gradient accumulation. Statistics made by `jbn.init(..., accumulate=True)`, or
    by modules with `accumulate=True`, only gather the moments of the microbatches in
    training. Committed once per optimizer step, they move as if the microbatches had
    come as one batch: the moments are merged, so this is exact, and uneven or masked
    microbatches count by their rows.

    That is the statistics. The output of each microbatch is normalized by its own
    moments, so that outputs and gradients are those of `jbn.ghost_batch_norm` on the
    whole batch with the microbatches as its groups, exactly, and not those of batch
    norm on the whole batch. No method can have these without another pass: what the
    first microbatch's output depends on has not been seen when it is computed. Where
    the running statistics normalize (`use_running_average=True`, a frozen layer, or
    `jbn.batch_renorm` with open limits) accumulation equals the whole batch in every
    respect.

    Args:
        batch_stats: `BatchStats`, or a tree of dicts as Linen's `batch_stats`
            collection, in which all that is pending is committed.
        momentum: As for `update_batch_stats`, like the rest.
        unbiased: Fold in the unbiased variance.
        reference_weight: The weight of a batch that `momentum` is meant for.
        second_moment: Average the second moment instead of the variance.

    Returns:
        The same, with new running statistics, and nothing pending.

    Raises:
        TypeError: If `batch_stats` is neither.
        ValueError: If nothing in it has pending moments, or an option does not fit.

    Example:
        >>> import jbn
        >>> params, stats = jbn.init(1, accumulate=True)
        >>> for x in (jnp.array([[0.0], [0.0]]), jnp.array([[3.0]])):
        ...     _, stats = jbn.batch_norm(x, params, stats, use_running_average=False)
        >>> print(stats.mean, stats.var)
        [0.] [1.]
        >>> stats = commit(stats, momentum=0.5)
        >>> print(stats.mean, stats.var)
        [0.5] [1.5]
    """
    options = {
        "momentum": momentum,
        "unbiased": unbiased,
        "reference_weight": reference_weight,
        "second_moment": second_moment,
    }
    if isinstance(batch_stats, BatchStats):
        return _commit(batch_stats, options)
    if not isinstance(batch_stats, Mapping):
        raise TypeError(
            "`commit` takes a `jbn.BatchStats`, or a dict of the statistics of layers;"
            f" got {type(batch_stats).__name__}."
        )
    found = []

    def walk(tree):
        if not isinstance(tree, Mapping):
            return tree
        if not {"pending", "mean", "var"} <= set(tree):
            return {name: walk(value) for name, value in tree.items()}
        found.append(tree)
        new = _commit(as_batch_stats(tree), options)
        return {**tree, **batch_stats_dict(new)}

    committed = walk(batch_stats)
    if not found:
        raise ValueError(
            "`commit` found no pending moments. Make the layers with `accumulate=True`."
        )
    return committed  # pyright: ignore[reportReturnType]


def as_batch_stats(variables: Mapping) -> BatchStats:
    """The statistics that are among the variables of a Flax layer."""
    pending = variables.get("pending")
    return BatchStats(
        variables["mean"],
        variables["var"],
        variables.get("weight"),
        None if pending is None else Moments(**pending),
    )


def batch_stats_dict(batch_stats: BatchStats) -> dict:
    """The statistics as the variables of a Flax layer: dicts of arrays alone."""
    fields = {k: v for k, v in batch_stats._asdict().items() if v is not None}
    if batch_stats.pending is not None:
        fields["pending"] = batch_stats.pending._asdict()
    return fields


def _commit(batch_stats: BatchStats, options: dict) -> BatchStats:
    pending = batch_stats.pending
    if pending is None:
        raise ValueError(
            "`commit` found no pending moments. Make the statistics with"
            " `init(..., accumulate=True)`."
        )
    new = update_batch_stats(batch_stats._replace(pending=None), pending, **options)
    return new._replace(pending=jax.tree.map(jnp.zeros_like, pending))


def _take_up(pending: Moments, moments: Moments) -> Moments:
    """What is pending with new moments, in dtypes that scans can carry."""
    pending = Moments(*map(_state, pending, moments))
    return Moments(
        *(
            new.astype(old.dtype)
            for new, old in zip(merge(pending, moments), pending, strict=True)
        )
    )


def _shares(
    momentum: float | int | ArrayLike,
    reference_weight: float | int | ArrayLike | None,
    seen: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """How much of the old statistics is kept, and how much of the batch added."""
    if reference_weight is None:
        # One minus the number as it came: in float32, 1 - 0.99 is 1e-6 off.
        return jnp.asarray(momentum, seen.dtype), jnp.asarray(1 - momentum, seen.dtype)
    batches = seen / jnp.asarray(reference_weight, seen.dtype)
    value = axes.known(momentum)
    if value is not None and not value.ndim:
        log = jnp.asarray(math.log(value) if value > 0 else -math.inf, seen.dtype)
    else:
        log = jnp.log(jnp.asarray(momentum, seen.dtype))
    # Nothing seen, times minus infinity, is no number; and it is not used.
    change = log * jnp.where(seen > 0, batches, 1)
    return jnp.exp(change), -jnp.expm1(change)


def check_rule(
    batch_stats: BatchStats,
    momentum: float | int | ArrayLike | None,
    unbiased: bool,
    reference_weight: float | int | ArrayLike | None,
    second_moment: bool,
) -> None:
    """Refuses what is known not to make a running rule, or lacks its state."""
    if second_moment and unbiased:
        raise ValueError(
            "`second_moment=True` averages second moments, which are unbiased as they"
            " are; with `unbiased=True` the scatter of the batches' means would count"
            " twice. Drop one of them."
        )
    if reference_weight is not None:
        if momentum is None:
            raise ValueError(
                "`momentum=None`, the cumulative rule, counts every row alike already;"
                " got `reference_weight` as well. Drop it, or give a `momentum`."
            )
        value = axes.known(reference_weight)
        if value is not None and not ((value > 0) & (value < np.inf)).all():
            raise ValueError(
                "`reference_weight` is the weight of the batch that `momentum` is"
                f" meant for and must be positive and finite; got {value}."
            )
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
