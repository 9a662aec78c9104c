"""Normalize by a mean and a variance: the formula, and its derivative in every mode."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Inexact

from jbn import axes
from jbn._moments import nonzero, row_moments_tangent
from jbn.axes import Rows
from jbn.lowering.formula import compiled_formula
from jbn.lowering.inline import broadcast_to, where
from jbn.lowering.mesh import sharded_by_compiler
from jbn.lowering.passes import (
    add_up,
    gate,
    hoist,
    materialize,
    rematerialized,
    saves_output,
    separate,
)
from jbn.lowering.sums import repeat
from jbn.ops import numeric
from jbn.ops.segments import Segments, members, segments_of, spread
from jbn.typing import (
    Activation,
    ArrayLike,
    Axes,
    BatchStats,
    DType,
    Moments,
    Params,
)


def normalize(
    x: ArrayLike,
    stats: Moments | BatchStats,
    params: Params | None = None,
    *,
    axis: Axes = -1,
    epsilon: float | int | ArrayLike = 1e-5,
    dtype: DType | None = None,
    segment_ids: ArrayLike | None = None,
) -> jax.Array:
    """Normalizes each feature of `x` by a given mean and variance.

    For each feature

        y = scale * (x - mean) / sqrt(var + epsilon) + bias

    in float32 or wider, rounded once. Differentiable in every argument: with
    `normalize(x, moments(x), params)` gradients pass through the moments as well.

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype.
        stats: Anything with the fields `mean` and `var`, one entry per feature.
        params: Scale and bias, one entry per feature; `None` leaves them out.
        axis: Feature axis or axes.
        epsilon: Added to the variance, inside the square root.
        dtype: Dtype of the output; that of `x` by default.
        segment_ids: The segment that each row (or entry of the leading axes) belongs
            to: integers. `stats` then have one entry per segment and feature, and
            `params` may. A row of no segment is normalized by the last one; its output
            is `bias` if it is not finite.

    Returns:
        The normalized array, of the shape of `x`.

    Raises:
        TypeError: If `x` is of integers or booleans, `dtype` cannot hold the output, or
            `segment_ids` are not of integers.
        ValueError: If axes or shapes do not fit, or `epsilon` is known to be negative.

    Example:
        >>> import jbn
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> print(jbn.normalize(x, jbn.moments(x), epsilon=0.0))
        [[-1. -1.]
         [ 1.  1.]]
    """
    x = axes.check_inexact(x)
    lay = axes.layout(x, axis)
    ids = front = None
    if segment_ids is not None:
        ids = axes.row_ids(segment_ids, "segment_ids", lay)
        axes.check_record(stats, "stats", BatchStats)
        front = "segment", (*jnp.shape(stats.mean), 0)[0]
    check_stats(stats, "stats", lay, axis, x.dtype, front)
    check_affine(params, lay, axis, x.dtype, front)
    least = check_epsilon(epsilon)
    stats = Moments(stats.var, stats.mean, stats.var)
    dtype = axes.output_dtype(dtype, x.dtype)
    form = Form(None, dtype, None, guarded=least.may_be_below(TINY))
    return _normalize(lay, form, x, stats, params, least, ids)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _normalize(lay, form, x, stats, params, epsilon, ids):
    def run(x, stats, params, epsilon, ids):
        segments = weights = None
        if ids is not None:
            segments = segments_of(ids.array(), stats.mean.shape[0])
            weights = members(None, segments)
        scale, bias = expand_affine(params, lay, x.dtype, segments is not None)
        stats = expand_stats(stats, lay, x.dtype)
        epsilon = epsilon.array(stats.var.dtype)
        operands = Operands(x, weights, segments, stats, scale, bias, epsilon)
        return apply(form, operands)

    return sharded_by_compiler(run, x, x)(x, stats, params, epsilon, ids)


def check_stats(
    stats,
    name: str,
    lay: axes.Layout,
    axis: Axes,
    dtype: DType,
    front: tuple[str, int] | None = None,
) -> None:
    """Raises unless `stats` has a mean and a variance that fit an input of `dtype`.

    With `front`, as `("domain", 3)`, each domain has its own.
    """
    axes.check_record(stats, name, BatchStats)
    tracked = getattr(stats, "weight", None) is not None
    for field in ("mean", "var", *(["weight"] if tracked else [])):
        stat = getattr(stats, field)
        axes.check_features(stat, f"{name}.{field}", lay, axis, front)
        real = field != "mean" or not jnp.issubdtype(dtype, jnp.complexfloating)
        axes.check_real(stat, f"{name}.{field}", real)
    pending = getattr(stats, "pending", None)
    if pending is not None:
        check_stats(pending, f"{name}.pending", lay, axis, dtype, front)


def expand_stats(stats, lay: axes.Layout, dtype: DType) -> Moments:
    """Mean and variance as `apply` takes them, for an input of `dtype`."""
    wide = numeric.wide_dtype(dtype)
    mean = lay.expand(jnp.asarray(stats.mean).astype(wide))
    var = lay.expand(jnp.asarray(stats.var).astype(numeric.real_dtype(wide)))
    return Moments(var, mean, var)  # The weight is not used.


def check_affine(
    params: Params | None,
    lay: axes.Layout,
    axis: Axes,
    dtype: DType,
    front: tuple[str, int] | None = None,
) -> None:
    """Raises unless scale and bias fit an input of `dtype`.

    With `front`, as `("domain", 3)`, all domains share them, or each has its own.
    """
    if params is None:
        return
    axes.check_record(params, "params", Params)
    for field in Params._fields:
        param = getattr(params, field)
        if param is not None:
            shared = front is not None and param.ndim == len(lay.features)
            own = None if shared else front
            axes.check_features(param, f"params.{field}", lay, axis, own)
            real = not jnp.issubdtype(dtype, jnp.complexfloating)
            axes.check_real(param, f"params.{field}", real)


def expand_affine(
    params: Params | None, lay: axes.Layout, dtype: DType, fronted: bool = False
) -> tuple[jax.Array | None, jax.Array | None]:
    """Scale and bias as `apply` takes them, for an input of `dtype`.

    If `fronted`, they get an axis of domains in front where they have none.
    """
    found = []
    for param in params or Params():
        if param is not None:
            param = as_statistic(jnp.asarray(param), dtype)
            if fronted and param.ndim == len(lay.features):
                param = param[None]
            param = lay.expand(param)
        found.append(param)
    return found[0], found[1]


def as_statistic(v: jax.Array, dtype: DType) -> jax.Array:
    """Casts `v` to the precision of statistics of `dtype`, real if it is real."""
    wide = numeric.wide_dtype(dtype)
    return v.astype(wide if jnp.iscomplexobj(v) else numeric.real_dtype(wide))


def check_epsilon(epsilon: float | int | ArrayLike) -> axes.Number:
    """Refuses an epsilon that is not a number, or known to be negative."""
    why = "It is added to the variance inside the square root, 1e-5 by default."
    return axes.Number.of(axes.check_number(epsilon, "epsilon", 0, why))


def check_activation(activation: Activation | None) -> Activation | None:
    """Refuses an activation that is not a hashable function."""
    if activation is None:
        return None
    if not callable(activation):
        raise TypeError(
            "`activation` must be a function of one array, such as `jax.nn.relu`; got"
            f" {activation!r}."
        )
    try:
        hash(activation)
    except TypeError:
        raise TypeError(
            "`activation` must be hashable, as functions are; got"
            f" {type(activation).__name__}, which is not. If it holds arrays, apply it"
            " to the output instead."
        ) from None
    return activation


def closes_over_tracers(activation: Activation | None) -> bool:
    """Whether an activation closes over values of an enclosing trace."""
    if activation is None or getattr(activation, "__module__", "").startswith("jax."):
        return False
    number = jax.ShapeDtypeStruct((), jnp.float32)
    try:
        consts = jax.make_jaxpr(activation)(number).consts
    except (TypeError, ValueError):
        return False  # It fails later, when it is called.
    return any(isinstance(v, Tracer) for v in consts)


def check_residual(
    residual: ArrayLike | None, lay: axes.Layout, dtype: DType
) -> jax.Array | None:
    """Refuses a residual that does not fit an input of `dtype`."""
    if residual is None:
        return None
    given = axes.as_array(residual, "residual")
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    axes.check_real(given, "residual", real)
    if tuple(given.shape) != lay.shape:
        raise ValueError(
            "`residual` must have the shape of `x`, to which it is added; got"
            f" {tuple(given.shape)} for `x` of shape {lay.shape}."
        )
    return jnp.asarray(given)


# An epsilon below this may leave a variance of zero, or one whose square underflows.
TINY = 1e-25


class Operands(NamedTuple):
    """The arrays of the formula, at the rank of `x` (with segments: one more).

    Attributes:
        x: Input.
        weights: Weights that the moments were taken with, or `None`.
        segments: Which statistics each row is normalized by, or `None`. With them,
            `stats`, `scale` and `bias` have one more axis, in front: of size
            `segments.num`, or of size 1 if they are the same for all.
        stats: Mean and variance with the reduced axes at size 1, float32 or wider.
        scale: Scale that broadcasts to `x`, or `None`.
        bias: Bias that broadcasts to `x`, or `None`.
        epsilon: Added to the variance.
        residual: Added to the output, of the shape of `x`, or `None`.
    """

    x: Inexact[Array, "..."]
    weights: jax.Array | None
    segments: Segments | None
    stats: Moments
    scale: Inexact[Array, "..."] | None
    bias: Inexact[Array, "..."] | None
    epsilon: Float[Array, ""]
    residual: Inexact[Array, "..."] | None = None


class Form(NamedTuple):
    """The static part of the formula.

    Attributes:
        rows: The rows of `x` that the statistics come from; `None` if they do not.
        dtype: Dtype of the output.
        activation: An elementwise function, or `None`.
        guarded: Whether `var + epsilon` may be 0.
    """

    rows: Rows | None
    dtype: DType
    activation: Activation | None
    guarded: bool


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def apply(form: Form, operands: Operands) -> Inexact[Array, "..."]:
    """`activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)`.

    With a custom derivative. If the form has rows, `stats` must be the moments of `x`
    over them, and the derivative goes through these moments, so the tangent of `stats`
    is ignored. Otherwise `stats` are independent of `x`.

    Args:
        form: The static part.
        operands: The arrays.

    Returns:
        An array of the shape of `x`.
    """
    if form.rows is None or closes_over_tracers(form.activation):
        return _formula(form, operands)
    return compiled_formula(_formula, form, operands)


@functools.partial(apply.defjvp, symbolic_zeros=True)
def _apply_jvp(form, primals, tangents):
    (read,), (tangents,) = primals, tangents
    # Calls the function, not its formula, so that second derivatives use the rule.
    y = apply(form, read)
    # Without weights and activation, the derivative does not depend on the residual.
    # A ReLU's slope depends only on the sign of the output, or of its argument.
    by_output = False
    if read.residual is not None and read.weights is None:
        by_output = form.activation is jax.nn.relu and saves_output()
        if by_output or form.activation is None:
            read = read._replace(residual=y if by_output else None)
    run = functools.partial(_tangent, form, by_output)
    # Only `x`, the weights and the residual are large among the saved arguments.
    return y, rematerialized(run)(read, jax.tree.map(nonzero, tangents))


def _tangent(
    form: Form, by_output: bool, primals: Operands, tangents: Operands
) -> Inexact[Array, "..."]:
    """The derivative, linear in `tangents`, where `None` is zero.

    With d = x - mean, xh = d * rstd and slope = rstd * scale, before the activation

        dy = slope * (dx - dmean - xh * rstd * dvar / 2) + xh * dscale + dbias

    With the derivatives of mean and variance, <dx> and 2 * <d * dx>, this is

        dy = slope * (dx - <dx> - xh * <xh * dx>) + xh * dscale + dbias

    The operator on dx is self-adjoint, and its transpose is the backward pass of Ioffe
    and Szegedy (2015) with terms collected. Per-feature terms are collected first, so
    that the transpose only needs two sums over the rows.

    The backward pass reads memory twice: for the sums, and for the cotangent of `x`. So
    the terms stay separate up to the end, and each reads its own view of `x`.

    If `by_output`, the residual of `primals` is the output.
    """
    x, _, _, stats, *_, last = primals
    if tangents.x is not None:
        # Cast once, so that its cotangent is summed in wide arithmetic and rounded
        # once.
        tangents = tangents._replace(x=numeric.wide(tangents.x))
    large = (x, hoist(stats.mean, x.shape), last)
    of_element, of_shift, of_gain = (
        primals._replace(x=x, stats=stats._replace(mean=mean), residual=last)
        for x, mean, last in separate(large, views=3)
    )
    factor = rstd_of(stats.var, primals.epsilon, form.guarded).astype(stats.mean.dtype)
    slope = rstd = hoist(factor, x.shape)
    if primals.scale is not None:
        slope = hoist(factor * primals.scale.astype(factor.dtype), x.shape)
    shift, gain = _row_terms(form, of_element, of_gain, tangents, rstd, slope)
    element, skipped = _element_terms(
        of_element, tangents, slope, by_output, form.dtype
    )
    dbias = None if tangents.bias is None else _each_row(tangents.bias, primals)
    finish = functools.partial(_finish, form, by_output)
    dy = [
        finish(view, term, where_ignored)
        for view, term, where_ignored in (
            (of_element, element, skipped),
            (of_shift, shift, dbias),
            (of_gain, gain, None),
        )
        if term is not None
    ]
    return add_up(dy, form.dtype) if dy else jnp.zeros(x.shape, form.dtype)


def _row_terms(
    form: Form,
    of_element: Operands,
    of_gain: Operands,
    tangents: Operands,
    rstd: jax.Array,
    slope: jax.Array,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The per-feature terms of the derivative, broadcast to the rows.

    shift = dbias - slope * dmean
    gain = d * rstd * (dscale - slope * rstd * dvar / 2)
    """
    x, weights, segments, stats, scale, bias, *_ = of_element
    wide = stats.mean.dtype
    dmean, half_dvar = _stats_tangent(form.rows, of_element, tangents)
    # Multiply small values before they are broadcast to the rows, unless scale or bias
    # has an entry for each element.
    by_element = segments is None and any(
        v is not None and v.shape == x.shape for v in (scale, bias)
    )
    each_row = functools.partial(_each_row, operands=of_element)
    early, late = (each_row, lambda v: v) if by_element else (lambda v: v, each_row)
    dshift = dgain = None
    if tangents.bias is not None:
        dshift = early(tangents.bias.astype(wide))
    if dmean is not None:
        moved = slope * early(dmean)
        dshift = -moved if dshift is None else dshift - moved
    if tangents.scale is not None:
        dgain = early(tangents.scale.astype(wide))
    if half_dvar is not None:
        stretched = slope * early(rstd * half_dvar.astype(wide))
        dgain = -stretched if dgain is None else dgain - stretched
    if dshift is not None:
        dshift = late(dshift)
    if dgain is not None:
        d = numeric.center(of_gain.x, of_gain.stats.mean, weights, segments)
        dgain = d * late(rstd * dgain)
    return dshift, dgain


def _stats_tangent(
    rows: Rows | None, operands: Operands, tangents: Operands
) -> tuple[jax.Array | None, jax.Array | None]:
    """Computes `dmean` and `(dvar + depsilon) / 2`."""
    x, weights, segments, stats, *_ = operands
    dmean = half_dvar = None
    if rows is None:
        dmean, dvar = tangents.stats.mean, tangents.stats.var
        half_dvar = None if dvar is None else dvar / 2
    elif tangents.x is not None or tangents.weights is not None:
        dx, dweights = tangents.x, tangents.weights
        dmean, half_dvar, _ = row_moments_tangent(
            rows, x, weights, segments, stats, dx, dweights
        )
    depsilon = tangents.epsilon
    if depsilon is not None:
        half = jnp.broadcast_to(depsilon.astype(stats.var.dtype) / 2, stats.var.shape)
        half_dvar = half if half_dvar is None else half_dvar + half
    return dmean, half_dvar


def _element_terms(
    operands: Operands,
    tangents: Operands,
    slope: jax.Array,
    by_output: bool,
    dtype: DType,
) -> tuple[jax.Array | None, jax.Array | None]:
    """The elementwise terms, `slope * dx + dresidual`, and `dresidual`."""
    _, weights, segments, stats, *_ = operands
    scaled = skipped = None
    wide = stats.mean.dtype
    if tangents.x is not None:
        scaled = spread(slope, segments) * tangents.x
    if tangents.residual is not None:
        residual = None if weights is None else operands.residual
        skipped = _skipped(tangents.residual, residual, weights, wide)
        if by_output and scaled is not None:
            # Its cotangent is that of the residual, which is materialized anyway.
            scaled = materialize(scaled, dtype)
    if scaled is None or skipped is None:
        return scaled if skipped is None else skipped, skipped
    return scaled + skipped, skipped


def _finish(
    form: Form,
    by_output: bool,
    operands: Operands,
    tangent: jax.Array,
    where_ignored: jax.Array | None,
) -> Inexact[Array, "..."]:
    """The tangent of the output, given that of the activation's argument."""
    x, wide = operands.x, operands.stats.mean.dtype
    tangent = broadcast_to(tangent, x.shape)
    part = numeric.takes_part(x, operands.weights)
    if part is not None:
        zero = jnp.zeros((), tangent.dtype)
        other = zero if where_ignored is None else where_ignored
        tangent = where(part, tangent, other)
    if form.activation is None:
        return tangent
    if by_output:
        assert operands.residual is not None
        return gate(operands.residual > 0, tangent, form.dtype)
    before = _before(form, operands, hoist)
    if form.activation is jax.nn.relu:
        return gate(before > 0, tangent, form.dtype)
    return jax.jvp(form.activation, (before,), (tangent,))[1].astype(wide)


def _each_row(stat: jax.Array, operands: Operands) -> Inexact[Array, "..."]:
    """Broadcasts a per-feature value to the rows; its transpose sums over the rows."""
    stat = stat.astype(operands.stats.mean.dtype)
    if operands.segments is not None:
        return spread(stat, operands.segments)
    x = operands.x
    return repeat(stat, x, tuple(a for a, n in enumerate(stat.shape) if n == 1))


def _as_is(stat: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return stat


def _formula(
    form: Form, operands: Operands, hoist: Callable[..., jax.Array] = _as_is
) -> Inexact[Array, "..."]:
    y = _before(form, operands, hoist)
    if form.activation is None:
        return y.astype(form.dtype)
    shape, y = y.shape, form.activation(y)
    if jnp.shape(y) != shape:
        raise ValueError(
            "`activation` must act on each element; it made an array of shape"
            f" {jnp.shape(y)} of one of shape {shape}."
        )
    return y.astype(form.dtype)


def _before(
    form: Form, operands: Operands, hoist: Callable[..., jax.Array]
) -> Inexact[Array, "..."]:
    """The value before the activation, in wide arithmetic."""
    x, weights, segments, stats, scale, bias, epsilon, residual = operands
    y = numeric.center(x, stats.mean, weights, segments)
    gain = hoist(gain_of(stats.var, epsilon, scale, form.guarded), x.shape)
    y = y * spread(gain.astype(y.dtype), segments)
    if bias is not None:
        y = y + spread(bias.astype(y.dtype), segments)
    if residual is not None:
        y = y + _skipped(residual, residual, weights, y.dtype)
    return y


def _skipped(v, residual, weights, dtype):
    """`v`, but zero where the residual has no weight and is not finite."""
    v = numeric.wide(v).astype(dtype)
    part = None if weights is None else numeric.takes_part(residual, weights)
    return v if part is None else where(part, v, 0)


def rstd_of(
    var: Float[Array, "..."], epsilon: jax.Array, guarded: bool = True
) -> Float[Array, "..."]:
    """`1 / sqrt(var + epsilon)`; if `guarded`, 0 where that divides by zero."""
    total = var + epsilon.astype(var.dtype)
    if not guarded:
        return lax.rsqrt(total)
    # For a constant feature without epsilon, 0 / 0 is 0. Derivatives need both
    # selections.
    zero = total == 0
    return where(zero, 0, lax.rsqrt(where(zero, 1, total)))


def gain_of(
    var: Float[Array, "..."],
    epsilon: jax.Array,
    scale: jax.Array | None,
    guarded: bool = True,
) -> Inexact[Array, "..."]:
    """`scale / sqrt(var + epsilon)`: the factor of the input."""
    rstd = rstd_of(var, epsilon, guarded)
    return rstd if scale is None else rstd.astype(scale.dtype) * scale
