"""Normalize by a mean and a variance: the formula, and its derivative in every mode."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes
from jbn.moments import nonzero, row_moments_tangent
from jbn.ops import xla
from jbn.ops.cpu import once
from jbn.ops.gpu import in_pairs, worth_pairs
from jbn.ops.passes import apart, output_at_hand, recomputed, rounded, written_out
from jbn.ops.placement import spread_by_compiler
from jbn.ops.segments import spread
from jbn.ops.sums import repeat
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

    Returns:
        The normalized array, of the shape of `x`.

    Raises:
        TypeError: If `x` is of integers or booleans, or `dtype` cannot hold the output.
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
    check_stats(stats, "stats", lay, axis, x.dtype)
    return apply(
        None,
        axes.output_dtype(dtype, x.dtype),
        None,
        x,
        None,
        None,
        expand_stats(stats, lay, x.dtype),
        *affine(params, lay, axis, x.dtype),
        check_epsilon(epsilon),
        None,
    )


def check_stats(
    stats,
    name: str,
    lay: axes.Layout,
    axis: Axes,
    dtype: DType,
    num_domains: int | None = None,
) -> None:
    """Raises unless `stats` has a mean and a variance that fit an input of `dtype`."""
    axes.check_record(stats, name, BatchStats)
    tracked = getattr(stats, "weight", None) is not None
    for field in ("mean", "var", *(["weight"] if tracked else [])):
        stat = getattr(stats, field)
        front = None if num_domains is None else ("domain", num_domains)
        axes.check_features(stat, f"{name}.{field}", lay, axis, front)
        real = field != "mean" or not jnp.issubdtype(dtype, jnp.complexfloating)
        axes.check_real(stat, f"{name}.{field}", real)
    pending = getattr(stats, "pending", None)
    if pending is not None:
        check_stats(pending, f"{name}.pending", lay, axis, dtype, num_domains)


def expand_stats(stats, lay: axes.Layout, dtype: DType) -> Moments:
    """Mean and variance as `apply` takes them, for an input of `dtype`."""
    wide = xla.wide_dtype(dtype)
    mean = lay.expand(jnp.asarray(stats.mean).astype(wide))
    var = lay.expand(jnp.asarray(stats.var).astype(xla.real_dtype(wide)))
    return Moments(jnp.ones_like(var), mean, var)


def affine(
    params: Params | None,
    lay: axes.Layout,
    axis: Axes,
    dtype: DType,
    front: tuple[str, int] | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Scale and bias, checked, as `apply` takes them, for an input of `dtype`.

    With `front`, as `("domain", 3)`, they are shared by all domains, or each one's own.
    """
    if params is not None:
        axes.check_record(params, "params", Params)
    found = []
    for field in Params._fields:
        param = None if params is None else getattr(params, field)
        if param is not None:
            shared = front is not None and param.ndim == len(lay.features)
            own = None if shared else front
            axes.check_features(param, f"params.{field}", lay, axis, own)
            if shared:
                param = jnp.asarray(param)[None]
            real = not jnp.issubdtype(dtype, jnp.complexfloating)
            axes.check_real(param, f"params.{field}", real)
            param = lay.expand(as_statistic(jnp.asarray(param), dtype))
        found.append(param)
    return found[0], found[1]


def as_statistic(v: jax.Array, dtype: DType) -> jax.Array:
    """Casts `v` to the precision of statistics of `dtype`, real if it is real."""
    wide = xla.wide_dtype(dtype)
    return v.astype(wide if jnp.iscomplexobj(v) else xla.real_dtype(wide))


def check_epsilon(epsilon: float | int | ArrayLike) -> jax.Array:
    """Epsilon as an array, refused if it is known to be negative."""
    why = "It is added to the variance inside the square root, 1e-5 by default."
    return axes.check_number(epsilon, "epsilon", 0, why)


def check_activation(activation: Activation | None) -> Activation | None:
    """Refuses what is not a hashable function."""
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


def check_residual(
    residual: ArrayLike | None, lay: axes.Layout, dtype: DType
) -> jax.Array | None:
    """Refuses what does not fit an input of `dtype`."""
    if residual is None:
        return None
    residual = residual if hasattr(residual, "dtype") else np.asarray(residual)
    real = not jnp.issubdtype(dtype, jnp.complexfloating)
    axes.check_real(residual, "residual", real)
    if tuple(residual.shape) != lay.shape:
        raise ValueError(
            "`residual` must have the shape of `x`, to which it is added; got"
            f" {tuple(residual.shape)} for `x` of shape {lay.shape}."
        )
    return jnp.asarray(residual)


def apply(
    rows,
    dtype,
    activation,
    x,
    weights,
    segments,
    stats,
    scale,
    bias,
    epsilon,
    residual,
):
    """`activation(scale * (x - mean) / sqrt(var + epsilon) + bias + residual)`.

    With the project's derivative. If `rows` are given, `stats` must be the moments of
    `x` over them, and the derivative goes through those moments; what comes in as the
    tangent of `stats` is then left out, being counted already. Otherwise `stats` are
    independent of `x`.

    Args:
        rows: Which rows of `x` the `stats` are of; `None` if they are not of `x`.
        dtype: Dtype of the output.
        activation: A function of each element, or `None`.
        x: Input.
        weights: Weights that the moments were taken with, or `None`.
        segments: Which statistics each row is normalized by, or `None`. With them,
            `stats`, `scale` and `bias` have one more axis, in front: of size
            `segments.num`, or of size 1 if they are the same for all.
        stats: `Moments` with the reduced axes at size 1, float32 or wider.
        scale: Scale that broadcasts to `x`, or `None`.
        bias: Bias that broadcasts to `x`, or `None`.
        epsilon: Added to the variance.
        residual: Of the shape of `x`, or `None`.

    Returns:
        An array of the shape of `x`.
    """
    run = functools.partial(_apply, rows, dtype, activation)
    return spread_by_compiler(run, x, x)(
        x, weights, segments, stats, scale, bias, epsilon, residual
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _apply(rows, dtype, activation, *operands):
    return _formula(rows is not None, dtype, activation, operands)


@functools.partial(_apply.defjvp, symbolic_zeros=True)
def _apply_jvp(rows, dtype, activation, primals, tangents):
    read, weights = list(primals), primals[1]
    if activation is None and weights is None:
        read[-1] = None  # The derivative does not depend on the residual.
    # The function itself, not its formula, or second derivatives would miss the rule.
    y = _apply(rows, dtype, activation, *primals)
    # What is cut off is zero in the output.
    by_output = activation is jax.nn.relu and weights is None and output_at_hand()
    by_output = by_output and read[-1] is not None
    if by_output:
        read[-1] = y
    # Recomputed, not saved: of all that the tangent reads, only `x` is large, and the
    # residual.
    run = functools.partial(_tangent, rows, dtype, activation, by_output)
    return y, recomputed(run)(read, jax.tree.map(nonzero, tangents))


def _tangent(rows, dtype, activation, by_output, primals, tangents):
    """The derivative, linear in `tangents`, in which `None` stands for zero.

    If `by_output`, the last of `primals` is the output, in place of the residual.

    With d = x - mean, xh = d * rstd and slope = rstd * scale, before the activation

        dy = slope * (dx - dmean - xh * rstd * dvar / 2) + xh * dscale + dbias

    With the mean's and variance's own derivatives, <dx> and 2 * <d * dx>, this is

        dy = slope * (dx - <dx> - xh * <xh * dx>) + xh * dscale + dbias

    whose operator on dx is self-adjoint: its transpose is the backward pass of Ioffe
    and Szegedy (2015) with its terms collected. All that belongs to a feature is
    collected first, so that the transpose takes two sums over the rows and no more.

    The transpose passes over memory twice: it takes the sums, then makes what belongs
    to `x`. What comes from a feature and what comes from an element is therefore kept
    apart up to the end, and each looks at `x` by itself. Shared, the compiler would
    write out what both compute: `x` in float32, or the slope of the activation. (Not
    on a TPU; on a GPU each of the two sums has to look for itself.)
    """
    x, weights, segments, stats, scale, bias, epsilon, last = primals
    dx, dweights, _, dstats, dscale, dbias, depsilon, dresidual = tangents
    over = ()
    if segments is None:
        over = tuple(a for a, n in enumerate(stats.mean.shape) if n == 1)
        over = over if rows is None else rows.axes
    # Cast once, so that its cotangent is summed in wide arithmetic, and rounded once.
    dx = None if dx is None else xla.wide(dx)
    mean = once(stats.mean, x.shape)
    of_element, of_shift, of_gain = apart((x, mean, last))

    dmean = dvar = None
    if rows is None:
        dmean, dvar = dstats.mean, dstats.var
    elif dx is not None or dweights is not None:
        x, mean, _ = of_element
        dmean, dvar, _ = row_moments_tangent(
            rows, x, weights, segments, stats._replace(mean=mean), dx, dweights
        )
    if depsilon is not None:
        depsilon = jnp.broadcast_to(depsilon.astype(stats.var.dtype), stats.var.shape)
        dvar = depsilon if dvar is None else dvar + depsilon

    wide = stats.mean.dtype
    rstd = once(gain(stats.var, epsilon, None), x.shape).astype(wide)
    slope = once(gain(stats.var, epsilon, scale), x.shape).astype(wide)
    dgain = None if dscale is None else dscale.astype(wide)
    if dvar is not None:
        of_var = -slope * rstd * (dvar / 2).astype(wide)
        dgain = of_var if dgain is None else dgain + of_var
    dshift = dbias = None if dbias is None else dbias.astype(wide)
    if dmean is not None:
        dshift = -slope * dmean if dshift is None else dshift - slope * dmean

    def each_row(stat):
        """Gives each row what belongs to a feature; transposed, a sum over the rows."""
        if segments is None:
            return repeat(stat, x, over)
        return spread(stat, segments)

    def finish(view, tangent, where_ignored):
        """What comes of a tangent before the activation."""
        x, mean, last = view
        ignored = xla.no_part(x, weights)
        if ignored is not None:
            tangent = jnp.where(ignored, where_ignored, tangent)
        if activation is None:
            return tangent
        tangent = jnp.broadcast_to(tangent, x.shape)
        before = last
        if not by_output:
            here = stats._replace(mean=mean)
            before = _before((x, weights, segments, here, scale, bias, epsilon, last))
        if activation is jax.nn.relu:
            # A choice, the same before and after rounding, so that what is made of a
            # cotangent is written out in 16 bits, or a mask is not kept beside it.
            tangent = rounded(tangent, dtype)
            tangent = jnp.where(before > 0, tangent, jnp.zeros_like(tangent))
        else:
            tangent = jax.jvp(activation, (before,), (tangent,))[1]
        return tangent.astype(wide)

    zero = jnp.zeros(x.shape, wide)
    parts = []
    if dx is not None or dresidual is not None:
        scaled = zero if dx is None else spread(slope, segments) * dx
        skipped = zero
        if dresidual is not None:
            residual = None if weights is None else of_element[2]
            skipped = _skipped(dresidual, residual, weights, wide)
            if by_output:
                # Its cotangent is that of the residual, which is written out.
                scaled = written_out(rounded(scaled, dtype)).astype(wide)
        parts.append((of_element, scaled + skipped, skipped))
    if dshift is not None:
        of_bias = zero if dbias is None else each_row(dbias)
        parts.append((of_shift, each_row(dshift), of_bias))
    if dgain is not None:
        x, mean, _ = of_gain
        d = xla.center(x, mean, weights, segments)
        parts.append((of_gain, d * each_row(rstd * dgain), zero))
    joined = []
    for view, *terms in parts:
        if joined and joined[-1][0] is view:
            terms = map(operator.add, joined.pop()[1:], terms)
        joined.append((view, *terms))
    dy = zero
    for part in joined:
        dy += finish(*part)
    return dy.astype(dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _formula(summarized, dtype, activation, operands):
    x, weights, segments, stats, scale, bias, epsilon, residual = operands

    def formula(x, read):
        stats, *others = read
        stats = stats._replace(mean=once(stats.mean, x.shape))
        y = _before((x, weights, segments, stats, *others, residual))
        if activation is None:
            return y
        shape, y = y.shape, activation(y)
        if jnp.shape(y) != shape:
            raise ValueError(
                "`activation` must act on each element; it made an array of shape"
                f" {jnp.shape(y)} of one of shape {shape}."
            )
        return y

    read = stats, scale, bias, epsilon
    # Where a loop over `x` has nothing beside it: it has been summarized, so it is in
    # memory, and behind an activation comes hardly another function of each element.
    plain = weights is None and segments is None and residual is None
    if summarized and activation is not None and plain and worth_pairs(x, dtype):
        return in_pairs(formula, x, read, dtype)
    y = formula(x, read).astype(dtype)
    return y if activation is None or residual is None else written_out(y)


def _before(operands):
    """What the activation is applied to, in wide arithmetic."""
    x, weights, segments, stats, scale, bias, epsilon, residual = operands
    slope = once(gain(stats.var, epsilon, scale), x.shape)
    y = xla.center(x, stats.mean, weights, segments)
    y = y * spread(slope.astype(y.dtype), segments)
    if bias is not None:
        y = y + spread(bias.astype(y.dtype), segments)
    if residual is not None:
        y = y + _skipped(residual, residual, weights, y.dtype)
    return y


def _skipped(v, residual, weights, dtype):
    """`v`, of the residual; zero where that is weightless and not finite."""
    v = xla.wide(v).astype(dtype)
    ignored = None if weights is None else xla.no_part(residual, weights)
    return v if ignored is None else jnp.where(ignored, jnp.zeros_like(v), v)


def gain(var: jax.Array, epsilon: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`scale / sqrt(var + epsilon)`: what an input is multiplied by."""
    total = var + epsilon.astype(var.dtype)
    # A constant feature without epsilon: 0 / 0 is 0. (Two selects, for derivatives.)
    zero = total == 0
    rstd = jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, total)))
    return rstd if scale is None else rstd.astype(scale.dtype) * scale
