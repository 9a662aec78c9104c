"""Normalize by a mean and a variance: the formula, and its derivative in every mode."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jbn import axes
from jbn.moments import nonzero, row_moments_tangent
from jbn.ops import xla
from jbn.ops.segments import spread
from jbn.typing import ArrayLike, Axes, BatchStats, DType, Moments, Params


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
        x,
        None,
        None,
        expand_stats(stats, lay, x.dtype),
        *affine(params, lay, axis, x.dtype),
        check_epsilon(epsilon),
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def apply(rows, dtype, x, weights, segments, stats, scale, bias, epsilon):
    """`scale * (x - mean) / sqrt(var + epsilon) + bias`, with the project's derivative.

    If `rows` are given, `stats` must be the moments of `x` over them, and the
    derivative goes through those moments; what comes in as the tangent of `stats` is
    then left out, being counted already. Otherwise `stats` are independent of `x`.

    Args:
        rows: Which rows of `x` the `stats` are of; `None` if they are not of `x`.
        dtype: Dtype of the output.
        x: Input.
        weights: Weights that the moments were taken with, or `None`.
        segments: Which statistics each row is normalized by, or `None`. With them,
            `stats`, `scale` and `bias` have one more axis, in front: of size
            `segments.num`, or of size 1 if they are the same for all.
        stats: `Moments` with the reduced axes at size 1, float32 or wider.
        scale: Scale that broadcasts to `x`, or `None`.
        bias: Bias that broadcasts to `x`, or `None`.
        epsilon: Added to the variance.

    Returns:
        The normalized array, of the shape of `x`.
    """
    del rows
    return _formula(dtype, x, weights, segments, stats, scale, bias, epsilon)


@functools.partial(apply.defjvp, symbolic_zeros=True)
def _apply_jvp(rows, dtype, primals, tangents):
    x, weights, segments, stats, scale, _, epsilon = primals
    # Recomputed, not saved: of all that the tangent reads, only `x` is large.
    tangent = jax.checkpoint(functools.partial(_tangent, rows, dtype))
    dy = tangent(
        (x, weights, segments, stats, scale, epsilon), jax.tree.map(nonzero, tangents)
    )
    # The function itself, not its formula, or second derivatives would miss the rule.
    return apply(rows, dtype, *primals), dy


def _tangent(rows, dtype, primals, tangents):
    """The derivative, linear in `tangents`, in which `None` stands for zero.

    With d = x - mean, xh = d * rstd and slope = rstd * scale,

        dy = slope * (dx - dmean - xh * rstd * dvar / 2) + xh * dscale + dbias

    With the mean's and variance's own derivatives, <dx> and 2 * <d * dx>, this is

        dy = slope * (dx - <dx> - xh * <xh * dx>) + xh * dscale + dbias

    whose operator on dx is self-adjoint: its transpose is the backward pass of Ioffe
    and Szegedy (2015) with its terms collected. All that belongs to a feature is
    collected first, so that the transpose takes two sums over the rows and no more.
    """
    x, weights, segments, stats, scale, epsilon = primals
    dx, dweights, _, dstats, dscale, dbias, depsilon = tangents
    # Cast once, so that its cotangent is summed in wide arithmetic, and rounded once.
    dx = None if dx is None else xla.wide(dx)
    dmean = dvar = None
    if rows is None:
        dmean, dvar = dstats.mean, dstats.var
    elif dx is not None or dweights is not None:
        dmean, dvar, _ = row_moments_tangent(
            rows, x, weights, segments, stats, dx, dweights
        )
    if depsilon is not None:
        depsilon = jnp.broadcast_to(depsilon.astype(stats.var.dtype), stats.var.shape)
        dvar = depsilon if dvar is None else dvar + depsilon

    xh = xla.center(x, stats.mean, weights, segments)
    rstd = gain(stats.var, epsilon, None).astype(xh.dtype)
    slope = gain(stats.var, epsilon, scale).astype(xh.dtype)
    xh = xh * spread(rstd, segments)
    dgain = None if dscale is None else dscale.astype(xh.dtype)
    if dvar is not None:
        of_var = -slope * rstd * (dvar / 2).astype(xh.dtype)
        dgain = of_var if dgain is None else dgain + of_var
    dshift = dbias = None if dbias is None else dbias.astype(xh.dtype)
    if dmean is not None:
        dshift = -slope * dmean if dshift is None else dshift - slope * dmean

    dy = jnp.zeros_like(xh)
    if dx is not None:
        dy += spread(slope, segments) * dx
    if dgain is not None:
        dy += xh * spread(dgain, segments)
    if dshift is not None:
        dy += spread(dshift, segments)
    ignored = xla.no_part(x, weights)
    if ignored is not None:
        dy = jnp.where(ignored, 0 if dbias is None else spread(dbias, segments), dy)
    return dy.astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def _formula(dtype, x, weights, segments, stats, scale, bias, epsilon):
    y = xla.center(x, stats.mean, weights, segments)
    y = y * spread(gain(stats.var, epsilon, scale).astype(y.dtype), segments)
    if bias is not None:
        y = y + spread(bias.astype(y.dtype), segments)
    return y.astype(dtype)


def gain(var: jax.Array, epsilon: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`scale / sqrt(var + epsilon)`: what an input is multiplied by."""
    total = var + epsilon.astype(var.dtype)
    # A constant feature without epsilon: 0 / 0 is 0. (Two selects, for derivatives.)
    zero = total == 0
    rstd = jnp.where(zero, 0, lax.rsqrt(jnp.where(zero, 1, total)))
    return rstd if scale is None else rstd.astype(scale.dtype) * scale
