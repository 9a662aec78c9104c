"""One call of any batch norm: checks its arguments, then runs one program.

Methods differ in the statistics, scale and bias that they apply to each row. `prepare`
checks the arguments, outside of any compiled program. `run` runs the body of a method
as one jitted program, which JAX caches by shapes and static options: a second layer of
the same shape costs nothing to trace or lower. A body is composed of the methods of
`Call`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact

from jbn import axes, summary
from jbn._moments import as_moments, merge_stacked, row_summary
from jbn._normalize import (
    TINY,
    Form,
    Operands,
    apply,
    check_activation,
    check_affine,
    check_epsilon,
    check_residual,
    check_stats,
    closes_over_tracers,
    expand_affine,
    expand_stats,
)
from jbn._shrink import check_tau, shrunk
from jbn.axes import AtRank, Layout, Rows, Weights
from jbn.lowering.inline import where
from jbn.lowering.mesh import sharded_by_compiler
from jbn.lowering.passes import rematerialized
from jbn.ops import numeric
from jbn.ops.segments import Segments, members, segments_of
from jbn.options import Options, completed
from jbn.running import Rule, make_rule, update
from jbn.summary import Guess, Summary
from jbn.typing import (
    Activation,
    ArrayLike,
    BatchStats,
    DType,
    MaskedOutput,
    Moments,
    Params,
)
from jbn.weighting.trim import check_trim, trimmed


# `BatchStats` give `BatchStats`, and `None` gives `None`.
Stats = TypeVar("Stats", bound=BatchStats | None)


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Call:
    """Checked arguments: arrays, and the static options of the program.

    Outside of the program, arrays have the shapes that were given; `expanded` gives
    them the rank of `x`. For sparse input, `x` is only a `ShapeDtypeStruct`.
    """

    x: Any
    weights: Any
    ids: AtRank | None
    params: Params | None
    batch_stats: BatchStats | None
    epsilon: Any
    residual: Any
    tau: Any
    min_weight: Any
    trim: Any
    rule: Rule | None
    lay: Layout = dataclasses.field(metadata=_STATIC)
    rows: Rows = dataclasses.field(metadata=_STATIC)
    num_segments: int | None = dataclasses.field(metadata=_STATIC)
    activation: Activation | None = dataclasses.field(metadata=_STATIC)
    dtype: DType = dataclasses.field(metadata=_STATIC)
    use_running_average: bool = dataclasses.field(metadata=_STATIC)
    update_stats: bool = dataclasses.field(metadata=_STATIC)
    # Whether variances may be close to the smallest float32.
    tiny: bool = dataclasses.field(metadata=_STATIC)
    masked_output: MaskedOutput = dataclasses.field(metadata=_STATIC)
    segments: Segments | None = None
    running: Any = None
    scale: Any = None
    bias: Any = None
    pooled: bool = dataclasses.field(default=False, metadata=_STATIC)

    def expanded(self) -> "Call":
        """The call with arrays at the rank of `x` (with segments: one more)."""
        fronted = self.num_segments is not None
        scale, bias = expand_affine(self.params, self.lay, self.x.dtype, fronted)
        known = self.batch_stats
        if known is None:
            shape = self.lay.features
            shape = (self.num_segments, *shape) if fronted else shape
            known = BatchStats(jnp.zeros(shape), jnp.ones(shape))
        weights = self.weights
        if isinstance(weights, Weights):
            weights = weights.array()
        segments = None
        if self.ids is not None:
            assert self.num_segments is not None
            segments = segments_of(self.ids.array(), self.num_segments)
            weights = members(weights, segments)  # Rows of no segment are ignored.
        running = expand_stats(known, self.lay, self.x.dtype)
        tau = None if self.tau is None else jnp.asarray(self.tau)
        if tau is not None and tau.ndim:
            shared = fronted and tau.ndim == len(self.lay.features)
            tau = self.lay.expand(tau[None] if shared else tau)
        call = dataclasses.replace(
            self,
            weights=weights,
            segments=segments,
            running=running,
            scale=scale,
            bias=bias,
            epsilon=self.epsilon.array(running.var.dtype),
            tau=tau,
        )
        if self.trim is None or not self.summarizes:
            return call
        weights = trimmed(
            self.rows,
            self.x,
            weights,
            segments,
            call.running,
            jnp.asarray(self.trim),
            call.epsilon,
        )
        return dataclasses.replace(call, weights=weights)

    @property
    def described(self) -> jax.ShapeDtypeStruct:
        """The shape and dtype of `x`, which may be sparse."""
        return jax.ShapeDtypeStruct(self.lay.shape, self.x.dtype)

    @property
    def summarizes(self) -> bool:
        """Whether the call needs the batch's statistics: except at inference."""
        return self.update_stats or not self.use_running_average

    @property
    def always_some(self) -> bool:
        """Whether each feature is known to have enough weight to be used."""
        rows = [n for n in self.lay.rows if isinstance(n, int)]  # others are above 0
        return (
            self.weights is None
            and self.num_segments is None
            and self.min_weight is None
            and 0 not in rows
        )

    def summarize(self) -> Summary:
        """The summary of the batch."""
        guess = None
        if self.batch_stats is not None:
            guess = Guess(self.running.mean, self.epsilon)
        return row_summary(
            self.rows, self.tiny, self.x, self.weights, self.segments, guess
        )

    def by_running(self) -> Inexact[Array, "..."]:
        """The output normalized by the running statistics."""
        return self.by_stats(self.running)

    def by_stats(self, stats: Moments) -> Inexact[Array, "..."]:
        """The output normalized by the given statistics."""
        return self._apply(None, stats)

    def by_batch(self, batch: Summary) -> Inexact[Array, "..."]:
        """The output normalized by the batch."""
        # Shrunk statistics depend on `x` in another way, which is left to autodiff.
        rows = self.rows if self.tau is None else None
        return self._apply(rows, self.settled(as_moments(batch)))

    def settled(
        self, moments: Moments, effective_weight: jax.Array | None = None
    ) -> Moments:
        """The statistics to normalize by: the running ones where the weight is zero."""
        if self.always_some and self.tau is None:
            return moments
        running = lax.stop_gradient(self.running)
        moments = self.enough(moments)
        if self.tau is not None:
            n = effective_weight
            if n is None:
                n = self._effective_weight(moments.weight)
            n = where(moments.weight > 0, n, 0)
            prior = self._pooled(moments) if self.pooled else running
            return shrunk(moments, prior, self.tau, n)
        some = moments.weight > 0
        return Moments(
            moments.weight,
            where(some, moments.mean, running.mean),
            where(some, moments.var, running.var),
        )

    def updated(self, moments: Moments) -> BatchStats | None:
        """The new running statistics, or `None` if they are not to be updated."""
        if not self.update_stats:
            return None
        assert self.batch_stats is not None
        assert self.rule is not None
        if self.batch_stats.pending is None:
            # Microbatches may be large enough together, so every row counts.
            moments = self.enough(moments)
        moments = jax.tree.map(self.lay.squeeze, moments)
        return update(self.batch_stats, moments, self.rule, self.always_some)

    def enough(self, moments: Moments) -> Moments:
        """The moments, with weight zero where they have too little weight."""
        if self.min_weight is None:
            return moments
        least = jnp.asarray(self.min_weight).astype(moments.weight.dtype)
        weight = where(moments.weight > least, moments.weight, 0)
        return moments._replace(weight=weight)

    def _apply(self, rows: Rows | None, stats: Moments) -> jax.Array:
        operands = Operands(
            self.x,
            self.weights,
            self.segments,
            stats,
            self.scale,
            self.bias,
            self.epsilon,
            self.residual,
        )
        form = Form(rows, self.dtype, self.activation, guarded=self.tiny)
        return apply(form, operands)

    def _pooled(self, moments: Moments) -> Moments:
        """The moments of all segments together; the running ones where there are none.

        They have one entry in front, for all segments.
        """
        return jax.tree.map(lambda v: v[None], merge_stacked(moments))

    def _effective_weight(self, weight: Float[Array, "..."]) -> Float[Array, "..."]:
        """The effective number of rows, `sum(w)**2 / sum(w**2)`."""
        if self.weights is None or self.weights.dtype == bool:
            return weight
        squares = numeric.abs_square(numeric.wide(self.weights))
        rows = self.rows.axes
        total = numeric.total_weight(self.described, squares, rows, self.segments)
        if self.rows.axis_name is not None:
            # Squares of weights, not of shares, so that this sum needs no other first.
            total = summary.psum(total, self.rows)
        return weight * weight * numeric.reciprocal(total).astype(weight.dtype)


def prepare(
    function: str,
    x: ArrayLike | jax.ShapeDtypeStruct,
    params: Params | None,
    batch_stats: BatchStats | None,
    *,
    use_running_average: bool,
    domain: ArrayLike | int | None = None,
    num_domains: int | None = None,
    segment_ids: ArrayLike | None = None,
    num_segments: int | None = None,
    **options: Any,
) -> Call:
    """Checks the arguments of the batch norm that is called `function`.

    With `num_domains`, statistics have a leading axis of that size, and `domain` gives
    the entry of each row. Segments work the same way, but their ids may be out of
    range.
    """
    given = cast(dict[str, Any], completed(Options, options, function))
    use_running_average = flag(use_running_average, "use_running_average")
    update_stats = given["update_stats"]
    if update_stats is None:
        update_stats = batch_stats is not None and not use_running_average
    update_stats = flag(update_stats, "update_stats")
    summarizes = update_stats or not use_running_average
    x, axis = axes.check_inexact(x), given["axis"]
    lay = axes.layout(x, axis)
    front = ids = rule = None
    if num_domains is not None:
        front = "domain", num_domains
        if domain is not None:
            ids = _domain(domain, lay, num_domains)
    if num_segments is not None:
        front = "segment", num_segments
        ids = axes.row_ids(segment_ids, "segment_ids", lay)
    trim = given["trim"]
    if batch_stats is None:
        if use_running_average or update_stats or trim is not None:
            raise ValueError(
                "`batch_stats` must be given to normalize or trim by the running"
                " statistics, or to update them; got None. Make them with `init`, or"
                " pass `use_running_average=False` and `update_stats=False`."
            )
    else:
        check_stats(batch_stats, "batch_stats", lay, axis, x.dtype, front)
        rule = make_rule(
            batch_stats.mean.shape,
            given["momentum"],
            flag(given["unbiased"], "unbiased"),
            given["reference_weight"],
            flag(given["second_moment"], "second_moment"),
            # Only an update reads it.
            tracked=batch_stats.weight is not None or not update_stats,
        )
    check_affine(params, lay, axis, x.dtype, front)
    masked_output = given["masked_output"]
    axes.check_word(masked_output, "masked_output", get_args(MaskedOutput))
    axis_name, groups = given["axis_name"], given["axis_index_groups"]
    if not summarizes:
        # Inference needs no other device, so it may run outside of the mapped axis.
        axis_name = groups = None
    epsilon = check_epsilon(given["epsilon"])
    each = () if front is None else (front[1],)
    tau = check_tau(given["tau"], lay.features, (*each, *lay.features))
    min_weight = axes.check_number(
        given["min_weight"],
        "min_weight",
        0,
        "A feature with at most this weight is not updated.",
    )
    return Call(
        x=x,
        weights=axes.element_weights(given["mask"], given["weights"], lay),
        ids=ids,
        params=params,
        batch_stats=batch_stats,
        epsilon=epsilon,
        residual=check_residual(given["residual"], lay, x.dtype),
        tau=tau if _may_exceed(tau, 0) else None,
        min_weight=min_weight if _may_exceed(min_weight, 0) else None,
        trim=None if trim is None else check_trim(trim),
        rule=rule if update_stats else None,
        lay=lay,
        rows=axes.rows(lay, axis_name, groups),
        num_segments=None if front is None else front[1],
        activation=check_activation(given["activation"]),
        dtype=axes.output_dtype(given["dtype"], x.dtype),
        use_running_average=use_running_average,
        update_stats=update_stats,
        tiny=epsilon.may_be_below(TINY),
        masked_output="normalized" if given["mask"] is None else masked_output,
    )


def run(
    body: Callable[..., Any], call: Call, *arrays: Any, **static: Any
) -> tuple[Any, Any]:
    """Runs `body(call, *arrays, **static)` as one program.

    Args:
        body: A module-level function. It returns the output, and the new statistics, or
            `None` if they are not updated.
        call: A checked call.
        *arrays: Pytrees of arrays.
        **static: Hashable arguments.
    """
    # Inference is only a few operations, which are inlined.
    program = _training if call.summarizes else _inference
    if closes_over_tracers(call.activation):
        program = _program  # A cached program would leak the tracers.
    y, batch_stats = program(body, tuple(static.items()), call, arrays)
    return y, call.batch_stats if batch_stats is None else batch_stats


def _program(body, static, call, arrays):
    def whole(call, arrays):
        if call.masked_output == "normalized":
            return body(call.expanded(), *arrays, **dict(static))
        mask = call.weights.array()
        call = dataclasses.replace(call, weights=mask)  # One array, saved once.
        y, stats = body(call.expanded(), *arrays, **dict(static))
        return _with_masked(y, mask, call), stats

    stats = call.batch_stats if call.update_stats else None
    if isinstance(call.x, jax.Array):
        whole = sharded_by_compiler(whole, call.x, (call.x, stats))
    return whole(call, arrays)


def _with_masked(y: jax.Array, mask: jax.Array, call: Call) -> jax.Array:
    """The output with zeros or inputs where the mask is false."""
    mask = mask if mask.dtype == bool else mask != 0
    zero = jnp.zeros((), y.dtype)
    other = call.x.astype(y.dtype) if call.masked_output == "input" else zero
    # Differentiated as it stands, a selection saves a mask of the shape of `y`.
    return rematerialized(where)(mask, y, other)


_training = jax.jit(_program, static_argnums=(0, 1))
_inference = jax.jit(_program, static_argnums=(0, 1), inline=True)


def thread(call: Call) -> tuple[Inexact[Array, "..."], BatchStats | None]:
    """The body of `batch_norm`: normalizes and updates as the flags say."""
    if not call.summarizes:
        return call.by_running(), None
    batch = call.summarize()
    y = call.by_running() if call.use_running_average else call.by_batch(batch)
    return y, call.updated(as_moments(batch))


def flag(value: Any, name: str) -> bool:
    """Refuses a flag that is not known when the function is traced."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"`{name}` must be True or False when the function is traced; got"
            f" {value!r}. Make it a static argument of `jit`."
        )
    return bool(value)


def _may_exceed(value: Any, limit: float | int) -> bool:
    """Whether a number is above `limit`, or unknown."""
    number = axes.known(value)
    return number is None or bool(np.any(number > limit))


def _domain(domain: Any, lay: Layout, num_domains: int) -> AtRank:
    ids = axes.row_ids(domain, "domain", lay)
    values = axes.known(ids.value)
    if values is not None and (values >= num_domains).any():
        raise ValueError(
            f"`domain` must be below the number of domains, {num_domains}; those given"
            f" go up to {values.max()}. A row of no domain, as padding, has -1."
        )
    return ids
