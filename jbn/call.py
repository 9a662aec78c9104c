"""One call of any batch norm, checked: what to summarize, normalize by and fold into.

The functions differ in which statistics a row is normalized by, and by which scale and
bias. What they share is here: `prepare` checks the arguments, `thread` runs the plain
course of things, and the methods of `Call` are its steps.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypedDict, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes, summary
from jbn.axes import Layout, Rows
from jbn.moments import as_moments, row_summary
from jbn.normalize import (
    affine,
    apply,
    check_activation,
    check_epsilon,
    check_residual,
    check_stats,
    expand_stats,
)
from jbn.ops import xla
from jbn.ops.placement import spread_by_compiler
from jbn.ops.segments import Segments, inside
from jbn.robust import check_trim, trimmed
from jbn.running import check_rule, update_batch_stats
from jbn.shrink import check_tau, shrink
from jbn.summary import Guess, Summary
from jbn.typing import (
    Activation,
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
Stats = TypeVar("Stats", bound=BatchStats | None)


class Options(TypedDict, total=False):
    """What every batch norm takes besides its mode; explained in `jbn.batch_norm`."""

    update_stats: bool | None
    axis: Axes
    momentum: float | int | ArrayLike | None
    epsilon: float | int | ArrayLike
    mask: ArrayLike | None
    weights: ArrayLike | None
    axis_name: AxisName | None
    axis_index_groups: AxisIndexGroups | None
    unbiased: bool
    reference_weight: float | int | ArrayLike | None
    second_moment: bool
    tau: float | int | ArrayLike
    min_weight: float | int | ArrayLike
    trim: float | int | ArrayLike | None
    residual: ArrayLike | None
    activation: Activation | None
    dtype: DType | None


@dataclasses.dataclass(frozen=True)
class Call:
    """Checked arguments, arrays at the rank of `x` (with segments: one more).

    `x` is only described where the function has elements of its own to look at.
    """

    x: Any
    lay: Layout
    rows: Rows
    weights: jax.Array | None
    segments: Segments | None
    batch_stats: Any
    running: Moments
    scale: jax.Array | None
    bias: jax.Array | None
    epsilon: jax.Array
    residual: jax.Array | None
    activation: Activation | None
    dtype: DType
    use_running_average: bool
    update_stats: bool
    tau: jax.Array
    shrunk: bool  # unless `tau` is known to be 0
    min_weight: jax.Array
    rule: Mapping[str, Any]

    def summarize(self) -> Summary:
        """The batch."""
        guess = None
        if self.batch_stats is not None:
            guess = Guess(self.running.mean, self.epsilon)
        return row_summary(self.rows, self.x, self.weights, self.segments, guess)

    def by_running(self) -> jax.Array:
        """The output normalized by the running statistics."""
        return self._apply(None, self.running)

    def by_batch(self, batch: Summary) -> jax.Array:
        """The output normalized by the batch."""
        # Shrunk statistics vary with `x` in a way of their own: left to autodiff.
        rows = None if self.shrunk else self.rows
        return self._apply(rows, self.settled(as_moments(batch)))

    def settled(self, moments: Moments) -> Moments:
        """What to normalize by: the running statistics where moments have no weight."""
        running = lax.stop_gradient(self.running)
        moments = self.enough(moments)
        if self.shrunk:
            n = self._effective_weight(moments.weight)
            return shrink(moments, running, tau=self.tau, effective_weight=n)
        some = moments.weight > 0
        return Moments(
            moments.weight,
            jnp.where(some, moments.mean, running.mean),
            jnp.where(some, moments.var, running.var),
        )

    def fold(self, moments: Moments) -> Any:
        """The running statistics, updated if they are to be."""
        if not self.update_stats:
            return self.batch_stats
        if self.batch_stats.pending is None:
            # Of microbatches, every row counts: together they may be enough.
            moments = self.enough(moments)
        moments = jax.tree.map(self.lay.squeeze, moments)
        update = functools.partial(update_batch_stats, **self.rule)
        run = spread_by_compiler(update, self.x, self.batch_stats)
        return run(self.batch_stats, moments)

    def enough(self, moments: Moments) -> Moments:
        """Moments without weight where they have too little to be used."""
        least = self.min_weight.astype(moments.weight.dtype)
        weight = jnp.where(moments.weight > least, moments.weight, 0)
        return moments._replace(weight=weight)

    def _apply(self, rows: Rows | None, stats: Moments) -> jax.Array:
        return apply(
            rows,
            self.dtype,
            self.activation,
            self.x,
            self.weights,
            self.segments,
            stats,
            self.scale,
            self.bias,
            self.epsilon,
            self.residual,
        )

    def _effective_weight(self, weight: jax.Array) -> jax.Array:
        """`sum(w)**2 / sum(w**2)`: how many equal rows the weighted ones are worth."""
        if self.weights is None or self.weights.dtype == bool:
            return weight
        squares = jnp.square(xla.wide(self.weights))
        total = xla.total_weight(self.x, squares, self.rows.axes, self.segments)
        if self.rows.axis_name is not None:
            total = summary.psum(total, self.rows)
        return jnp.square(weight) * xla.reciprocal(total).astype(weight.dtype)


def prepare(
    x: ArrayLike | jax.ShapeDtypeStruct,
    params: Params | None,
    batch_stats: BatchStats | None,
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
    reference_weight: float | int | ArrayLike | None = None,
    second_moment: bool = False,
    tau: float | int | ArrayLike = 0.0,
    min_weight: float | int | ArrayLike = 0.0,
    trim: float | int | ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    dtype: DType | None = None,
    domain: ArrayLike | int | None = None,
    num_domains: int | None = None,
) -> Call:
    """Checks the arguments of a batch norm, and gives all arrays the rank of `x`.

    With `num_domains`, statistics have an axis of that size in front, and `domain`
    says which of them each row belongs to.
    """
    use_running_average = flag(use_running_average, "use_running_average")
    if update_stats is None:
        update_stats = batch_stats is not None and not use_running_average
    update_stats = flag(update_stats, "update_stats")
    x = axes.check_inexact(x)
    lay = axes.layout(x, axis)
    rule = {
        "momentum": momentum,
        "unbiased": unbiased,
        "reference_weight": reference_weight,
        "second_moment": second_moment,
    }
    if batch_stats is None:
        if use_running_average or update_stats or trim is not None:
            raise ValueError(
                "`batch_stats` must be given to normalize or trim by the running"
                " statistics, or to update them; got None. Make them with `init`, or"
                " pass `use_running_average=False` and `update_stats=False`."
            )
        shape = lay.features if num_domains is None else (num_domains, *lay.features)
        known = BatchStats(jnp.zeros(shape), jnp.ones(shape))
    else:
        known = batch_stats
        check_stats(known, "batch_stats", lay, axis, x.dtype, num_domains)
        check_rule(known, **rule)
    front = None if num_domains is None else ("domain", num_domains)
    scale, bias = affine(params, lay, axis, x.dtype, front)
    if use_running_average and not update_stats:
        # Inference needs no other device, so it may stand outside of the mapped axis.
        axis_name = axis_index_groups = None
    call = Call(
        x=x,
        lay=lay,
        rows=axes.rows(lay, axis_name, axis_index_groups),
        weights=axes.element_weights(mask, weights, lay),
        segments=None,
        batch_stats=batch_stats,
        # Beside the statistics of a batch, which are the same on all devices.
        running=spread_by_compiler(lambda v: v, x)(expand_stats(known, lay, x.dtype)),
        scale=scale,
        bias=bias,
        epsilon=check_epsilon(epsilon),
        residual=check_residual(residual, lay, x.dtype),
        activation=check_activation(activation),
        dtype=axes.output_dtype(dtype, x.dtype),
        use_running_average=use_running_average,
        update_stats=update_stats,
        tau=check_tau(tau),
        shrunk=bool(axes.known(tau) != 0),
        min_weight=axes.check_number(
            min_weight, "min_weight", 0, "A feature of no more weight is not updated."
        ),
        rule=rule,
    )
    if num_domains is not None and domain is not None:
        call = _divided(call, domain, num_domains)
    if trim is not None and (update_stats or not use_running_average):
        weights = trimmed(
            call.rows,
            call.x,
            call.weights,
            call.segments,
            call.running,
            check_trim(trim),
            call.epsilon,
        )
        call = dataclasses.replace(call, weights=weights)
    return call


def thread(call: Call) -> tuple[jax.Array, Any]:
    """Normalizes and updates as the flags say, and nothing more."""
    if call.use_running_average and not call.update_stats:
        return call.by_running(), call.batch_stats
    batch = call.summarize()
    y = call.by_running() if call.use_running_average else call.by_batch(batch)
    return y, call.fold(as_moments(batch))


def flag(value: bool | None, name: str) -> bool:
    """A flag that is known when the function is traced."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{name}` must be True or False when the function is traced; got"
            f" {value!r}. Make it a static argument of `jit`."
        )
    return bool(value)


def _divided(call: Call, domain: ArrayLike | int, num_domains: int) -> Call:
    """The call by domains, with rows that are of none taking no part."""
    segments = Segments(axes.row_ids(domain, "domain", call.lay), num_domains)
    ids, weights = axes.known(domain), call.weights
    if ids is None or not ((ids >= 0) & (ids < num_domains)).all():
        there = inside(segments)
        counted = there if weights is None else weights
        weights = jnp.where(there, counted, jnp.zeros_like(counted))
    return dataclasses.replace(call, segments=segments, weights=weights)
