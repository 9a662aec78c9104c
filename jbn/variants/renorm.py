"""Batch renormalization (Ioffe, 2017)."""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes
from jbn._moments import as_moments
from jbn._normalize import rstd_of
from jbn.call import Call, Stats, prepare, run, thread
from jbn.ops import numeric
from jbn.options import Options, documented
from jbn.summary import Summary
from jbn.typing import ArrayLike, Params


@documented(Options)
def batch_renorm(
    x: ArrayLike,
    params: Params | None,
    batch_stats: Stats,
    *,
    use_running_average: bool,
    r_max: float | int | ArrayLike = 3.0,
    d_max: float | int | ArrayLike = 5.0,
    warmup_steps: int | ArrayLike = 0,
    step: int | ArrayLike | None = None,
    **options: Unpack[Options],
) -> tuple[jax.Array, Stats]:
    """Normalizes by the batch, corrected towards the running statistics.

    In training, with `sd = sqrt(var + epsilon)` of the batch and `running_sd` likewise,

        r = clip(sd / running_sd, 1 / r_max, r_max)
        d = clip((mean - running_mean) / running_sd, -d_max, d_max)
        y = scale * ((x - mean) / sd * r + d) + bias

    where the running statistics are those before this batch updates them, and no
    gradient passes through r and d. Within the limits, y is the output of inference, so
    it does not depend on the other rows of the batch: for small batches, batches that
    are not drawn at random, and reinforcement learning. (As in batch norm, the part
    that all rows of a batch have in common, such as their class, gets no gradient,
    because the gradient goes through the batch's mean. `jbn.batch_norm` with a large
    `tau` keeps it.) The output of an element of weight zero that is not finite is
    `scale * d + bias`.

    With `r_max=1` and `d_max=0` this is batch norm; with both infinite it normalizes by
    the running statistics. Training starts as batch norm and widens the limits: Ioffe
    increases `r_max` to 3 between steps 5,000 and 40,000, and `d_max` to 5 between
    5,000 and 25,000. Pass values of schedules as arrays, which do not recompile.

    `warmup_steps=n` is batch norm for n steps, then the full limits:

        r_max = 1 if step < n else r_max
        d_max = 0 if step < n else d_max

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype.
        params: Scale and bias, one entry per feature; `None` leaves them out.
        batch_stats: Running mean and variance, one entry per feature.
        use_running_average: `False` in training, `True` at inference.
        r_max: Limit of the ratio of standard deviations, at least 1; may be traced.
        d_max: Limit of the distance of the means, at least 0; may be traced.
        warmup_steps: Number of first training calls that are batch norm; needs `step`.
        step: Number of training calls before this one; may be traced. Inference does
            not read it.
        **options: As for `jbn.batch_norm`, except `tau`.

    Returns:
        The normalized array and the running statistics, as `jbn.batch_norm`.

    Raises:
        ValueError: If `r_max` or `d_max` is known to be out of range, if there are no
            `batch_stats`, if `tau` is given, if training has `warmup_steps` and no
            `step`, or as `jbn.batch_norm` does.
        TypeError: As `jbn.batch_norm` does.
        NameError: As `jbn.batch_norm` does.

    Example:
        >>> import jbn
        >>> x = jnp.array([[1.0], [3.0]])
        >>> _, stats = jbn.init(1)
        >>> y, stats = batch_renorm(
        ...     x, None, stats, use_running_average=False, d_max=0.5, epsilon=0.0
        ... )
        >>> print(y.ravel(), stats.mean.round(3))
        [-0.5  1.5] [0.02]

    References:
        Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
        Batch-Normalized Models", 2017, algorithm 1. https://arxiv.org/abs/1702.03275
    """
    if batch_stats is None:
        raise ValueError(
            "`batch_renorm` corrects towards the running statistics; got"
            " `batch_stats=None`. Make them with `init`."
        )
    tau = axes.known(options.get("tau", 0))
    if tau is None or np.any(tau != 0):
        raise ValueError(
            "`batch_renorm` does not take `tau`, which shrinks the statistics of the"
            " batch towards the running ones: r and d do so already. Drop `tau`, or use"
            " `batch_norm`."
        )
    call = prepare(
        "batch_renorm",
        x,
        params,
        batch_stats,
        use_running_average=use_running_average,
        **options,
    )
    r_max = axes.check_number(
        r_max, "r_max", 1, "1 keeps the batch's standard deviation."
    )
    d_max = axes.check_number(d_max, "d_max", 0, "0 keeps the batch's mean.")
    warmup_steps = axes.check_number(warmup_steps, "warmup_steps", 0, "0 is without.")
    if call.use_running_average:
        return run(thread, call)
    if step is not None:
        warm = jnp.asarray(step) >= warmup_steps
        r_max, d_max = jnp.where(warm, r_max, 1), jnp.where(warm, d_max, 0)
    elif axes.known(warmup_steps) != 0:
        raise ValueError(
            "`batch_renorm` with `warmup_steps` needs `step`, the number of training"
            " calls so far."
        )
    return run(_renormalized, call, r_max, d_max)


def _renormalized(call: Call, r_max: float | ArrayLike, d_max: float | ArrayLike):
    """The body of batch renormalization in training."""
    batch = call.summarize()
    y = _corrected(call, batch, r_max, d_max).by_batch(batch)
    return y, call.updated(as_moments(batch))


def next_step(step: jax.Array) -> jax.Array:
    """The next step, for schedules; it stays at the largest integer."""
    return jnp.where(step < jnp.iinfo(step.dtype).max, step + 1, step)


def _corrected(
    call: Call, batch: Summary, r_max: float | ArrayLike, d_max: float | ArrayLike
) -> Call:
    """The call with r and d in its scale and bias."""
    moments, running, epsilon = lax.stop_gradient(
        (call.enough(as_moments(batch)), call.running, call.epsilon)
    )
    real = running.var.dtype
    some = moments.weight > 0
    running_rstd = rstd_of(running.var, epsilon)
    r = jnp.sqrt(moments.var + epsilon.astype(real)) * running_rstd
    r_max, d_max = jnp.asarray(r_max, real), jnp.asarray(d_max, real)
    # A feature of weight zero is normalized by the running statistics, without r and d.
    r = jnp.where(some, jnp.clip(r, 1 / r_max, r_max), 1)
    d = (moments.mean - running.mean) * running_rstd.astype(running.mean.dtype)
    d = jnp.where(some, _clip(d, d_max), 0)
    scale, bias = r, d
    if call.scale is not None:
        scale = call.scale * r.astype(call.scale.dtype)
        bias = call.scale.astype(d.dtype) * d
    if call.bias is not None:
        bias = bias + call.bias.astype(d.dtype)
    return dataclasses.replace(call, scale=scale, bias=bias)


def _clip(d: jax.Array, limit: jax.Array) -> jax.Array:
    """Clips the absolute value of `d` to `limit`."""
    if not jnp.iscomplexobj(d):
        return jnp.clip(d, -limit, limit)
    size = jnp.sqrt(numeric.abs_square(d))
    return d * jnp.minimum(1, limit * numeric.reciprocal(size)).astype(d.dtype)
