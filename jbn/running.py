"""How the moments of a batch update the running statistics."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jbn import axes
from jbn._moments import merge
from jbn.lowering.inline import where
from jbn.ops import numeric
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
    """Updates the running statistics by the moments of a batch.

    The rule follows from `momentum` and from whether `batch_stats` has a `weight`
    (see `jbn.init`, `track_weight`):

    | `momentum` | `weight` | rule |
    |---|---|---|
    | a number | `None` | exponential: `new = momentum * old + (1 - momentum) * batch` |
    | a number | tracked | debiased exponential: the same, divided by its total weight |
    | `None` | tracked | cumulative: the moments of all rows seen so far, exactly |

    A plain exponential average starts at mean 0 and variance 1 and takes about
    `3 / (1 - momentum)` steps to forget them. A debiased average does not contain them:
    after one step it equals the batch, after many steps the plain average, and it can
    be used at any time. Its `weight` is `1 - momentum**steps`. Statistics without a
    weight count as fully trained.

    The cumulative rule counts in float32, which cannot count single rows beyond a
    weight of 2**24. From there on, batches of one row update the statistics as an
    exponential average over the last 2**24 rows.

    Where the moments have weight zero, the statistics keep their values. If
    `batch_stats` has `pending` moments, the new ones are only merged into these, until
    `jbn.commit`. No gradient passes.

    Args:
        batch_stats: The running statistics.
        moments: The moments of a batch, for the same features.
        momentum: Weight of the *old* statistics, from 0 to 1, as in Flax and Keras
            (PyTorch's is one minus this). A traced value does not recompile, but is
            rounded to float32 before it is subtracted from 1; a Python number is
            rounded after that. `None` is the cumulative rule (as in PyTorch, but
            weighted by rows, not batches).
        unbiased: Use the unbiased variance, `var * n / (n - 1)` with `n` the weight of
            the moments, as PyTorch does. Where `n` is at most 1, the running variance
            is not updated.
        reference_weight: The batch weight that `momentum` is meant for. A batch of
            another weight counts as `weight / reference_weight` such batches: the old
            statistics keep `momentum**(weight / reference_weight)`. By default every
            batch counts the same, however small.
        second_moment: Average the second moment instead of the variance, so that the
            running variance is that of all rows, including the scatter of the batches'
            means: `keep * var + add * batch_var + keep * add * (batch_mean - mean)**2`
            for `keep = momentum` and `add = 1 - momentum`. An average of variances
            misses the scatter, and is 0 for batches of one row. (The cumulative rule
            always includes it.)

    Returns:
        The new running statistics, in float32 or wider, and no narrower than before.

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
    rule = make_rule(
        batch_stats.mean.shape,
        momentum,
        unbiased,
        reference_weight,
        second_moment,
        tracked=batch_stats.weight is not None,
    )
    return _update(batch_stats, moments, rule)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """How the moments of a batch enter the running statistics, checked.

    Attributes:
        momentum: Weight of the old statistics, or `None` for the cumulative rule.
        complement: One minus the momentum, computed in float64: in float32, 1 - 0.99 is
            off by 1e-6. `None` if the momentum is traced.
        log: The logarithm of the momentum, likewise.
        reference_weight: The weight of a batch that `momentum` is meant for, or `None`.
        unbiased: Whether the running variance averages unbiased ones.
        second_moment: Whether it includes the scatter of the batches' means.
        inside: Whether the momentum is known to be neither 0 nor 1.
    """

    momentum: Any
    complement: Any
    log: Any
    reference_weight: Any
    unbiased: bool = dataclasses.field(metadata={"static": True})
    second_moment: bool = dataclasses.field(metadata={"static": True})
    inside: bool = dataclasses.field(metadata={"static": True})

    def shares(self, seen: Float[Array, "..."]) -> tuple[jax.Array, jax.Array]:
        """The share of the old statistics that stays, and the share of the batch."""
        dtype = seen.dtype
        momentum = jnp.asarray(self.momentum, dtype)
        if self.reference_weight is None:
            complement = self.complement
            complement = 1 - momentum if complement is None else complement
            return momentum, jnp.asarray(complement, dtype)
        log = jnp.log(momentum) if self.log is None else jnp.asarray(self.log, dtype)
        batches = seen / jnp.asarray(self.reference_weight, dtype)
        # 0 * -inf is NaN, but that share is not used.
        change = log * where(seen > 0, batches, 1)
        return jnp.exp(change), -jnp.expm1(change)


def update(
    batch_stats: BatchStats, moments: Moments, rule: Rule, always_some: bool = False
) -> BatchStats:
    """`update_batch_stats` of checked arguments.

    With `always_some`, every feature of the moments has a positive weight.
    """
    batch_stats, moments = lax.stop_gradient((batch_stats, moments))
    if batch_stats.pending is not None:
        return batch_stats._replace(pending=_take_up(batch_stats.pending, moments))
    mean = widened(batch_stats.mean, moments.mean)
    var = widened(batch_stats.var, moments.var)
    seen = moments.weight.astype(var.dtype)
    batch_mean = moments.mean.astype(mean.dtype)
    batch_var = moments.var.astype(var.dtype)
    has_var = some = seen > 0
    if rule.unbiased:
        has_var = seen > 1
        batch_var = batch_var * seen / where(has_var, seen - 1, 1)

    weight = batch_stats.weight
    if weight is not None:
        weight = widened(weight, moments.weight)
    if rule.momentum is None:
        assert weight is not None  # by make_rule
        kept, added = weight, seen
    else:
        kept, added = rule.shares(seen)
        if weight is not None:
            # A weight above 1 comes from the cumulative rule, and counts as 1.
            kept *= jnp.minimum(weight, 1)
    keep, add = kept, added
    if weight is not None:
        kept, added = kept * numeric.DOWN, added * numeric.DOWN
        total = kept + added
        weight = where(some, numeric.scaled_up(total), weight)
        keep, add = (part * numeric.reciprocal(total) for part in (kept, added))
    if rule.momentum is None:
        # Not `keep * old + add * new`: where a float cannot count single rows any more,
        # `keep` rounds to 1, and the two shares would exceed 1.
        first = kept == 0
        new_mean = mean + add.astype(mean.dtype) * (batch_mean - mean)
        new_mean = where(first, batch_mean, new_mean)
        new_var = where(first, batch_var, var + add * (batch_var - var))
    elif rule.inside and weight is None and rule.reference_weight is None:
        keep, add = keep.astype(var.dtype), add.astype(var.dtype)
        new_mean = keep.astype(mean.dtype) * mean + add.astype(mean.dtype) * batch_mean
        new_var = keep * var + add * batch_var
    else:
        # A share of zero removes the statistics, even if they are not finite.
        new_mean = numeric.weigh(mean, keep) + numeric.weigh(batch_mean, add)
        new_var = numeric.weigh(var, keep) + numeric.weigh(batch_var, add)
    if rule.momentum is None or rule.second_moment:
        # The variance of pooled rows includes the scatter of the means.
        scatter = numeric.abs_square(batch_mean - mean)
        new_var += numeric.weigh(scatter, keep * add)
    if not always_some:
        new_mean = where(some, new_mean, mean)
    if not always_some or rule.unbiased:
        new_var = where(has_var, new_var, var)
    return BatchStats(new_mean, new_var, weight)


_update = jax.jit(update)


def commit(
    batch_stats: _Tree,
    *,
    momentum: float | int | ArrayLike | None = 0.99,
    unbiased: bool = False,
    reference_weight: float | int | ArrayLike | None = None,
    second_moment: bool = False,
) -> _Tree:
    """Updates the running statistics by the pending moments, and clears these.

    For gradient accumulation. Statistics made by `jbn.init(..., accumulate=True)`, or
    by modules with `accumulate=True`, only collect the moments of the microbatches in
    training. Commit once per optimizer step: the update is then exactly that of the
    whole batch, because the moments are merged, and uneven or masked microbatches count
    by their rows.

    Only the running statistics are those of the whole batch. Each microbatch is
    normalized by its own moments, so outputs and gradients are exactly those of
    `jbn.ghost_batch_norm` on the whole batch, with the microbatches as groups. No
    method can do better in one pass: the output of the first microbatch is computed
    before the others are read. If the running statistics normalize
    (`use_running_average=True`, a frozen layer, or `jbn.batch_renorm` with infinite
    limits), accumulation is equivalent to the whole batch in every respect.

    Args:
        batch_stats: `BatchStats`, or a tree of dicts such as Linen's `batch_stats`
            collection, in which all pending moments are committed.
        momentum: As for `update_batch_stats`, like the other options.
        unbiased: Use the unbiased variance.
        reference_weight: The batch weight that `momentum` is meant for.
        second_moment: Average the second moment instead of the variance.

    Returns:
        The same structure, with new running statistics and nothing pending.

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
    """The statistics from the variables of a Flax layer."""
    pending = variables.get("pending")
    return BatchStats(
        variables["mean"],
        variables["var"],
        variables.get("weight"),
        None if pending is None else Moments(**pending),
    )


def batch_stats_dict(batch_stats: BatchStats) -> dict:
    """The statistics as variables of a Flax layer: dicts of arrays."""
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
    """Merges new moments into the pending ones, in dtypes that `scan` can carry."""
    pending = Moments(*map(widened, pending, moments))
    return Moments(
        *(
            new.astype(old.dtype)
            for new, old in zip(merge(pending, moments), pending, strict=True)
        )
    )


def make_rule(
    features: tuple[int, ...],
    momentum: float | int | ArrayLike | None,
    unbiased: bool,
    reference_weight: float | int | ArrayLike | None,
    second_moment: bool,
    *,
    tracked: bool,
) -> Rule:
    """Checks an update rule for statistics that have a weight if `tracked`."""
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
        reference_weight = axes.as_number(reference_weight, "reference_weight")
        value = axes.known(reference_weight)
        if value is not None and not ((value > 0) & (value < np.inf)).all():
            raise ValueError(
                "`reference_weight` is the weight of the batch that `momentum` is"
                f" meant for and must be positive and finite; got {value}."
            )
    if momentum is None:
        if not tracked:
            raise ValueError(
                "`momentum=None`, the cumulative rule, needs to know how many rows the"
                " statistics have seen; got `batch_stats.weight=None`. Make them with"
                " `init(..., track_weight=True)`, or give those of a trained network"
                " their weight: `batch_stats._replace(weight=...)`."
            )
        return Rule(None, None, None, None, unbiased, second_moment, False)
    momentum = axes.as_number(momentum, "momentum")
    if np.shape(cast(Any, momentum)) not in ((), tuple(features)):
        raise ValueError(
            "`momentum` must be one number, or one for each feature; got an array of"
            f" shape {np.shape(cast(Any, momentum))} for {tuple(features)} features."
        )
    value = axes.known(momentum)
    if value is not None and not ((value >= 0) & (value <= 1)).all():
        raise ValueError(
            "`momentum` is the weight of the old statistics and must be from 0 to 1;"
            f" got {value}. PyTorch's `momentum` is one minus this."
        )
    complement = log = None
    if value is not None:
        complement = 1 - cast(Any, momentum)
        if reference_weight is not None and not value.ndim:
            log = math.log(value) if value > 0 else -math.inf
    inside = value is not None and bool(np.all((value > 0) & (value < 1)))
    return Rule(
        momentum, complement, log, reference_weight, unbiased, second_moment, inside
    )


def widened(old: jax.Array, batch: jax.Array) -> jax.Array:
    """The old statistic in the dtype of the new one, so that `scan` can carry it.

    It keeps its dtype, unless that has 16 bits, or is real while the batch is complex.
    """
    old = numeric.wide(jnp.asarray(old))
    if jnp.iscomplexobj(batch) and not jnp.iscomplexobj(old):
        return lax.complex(old, jnp.zeros_like(old))
    return old
