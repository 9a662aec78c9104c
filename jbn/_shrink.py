"""Shrinkage of the moments of a small batch towards known statistics."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from jbn import axes
from jbn.ops import numeric
from jbn.typing import ArrayLike, BatchStats, Moments


def shrink(
    moments: Moments,
    prior: Moments | BatchStats,
    *,
    tau: float | int | ArrayLike,
    effective_weight: ArrayLike | None = None,
    scatter: bool = True,
) -> Moments:
    """Shrinks the moments of a few rows towards `prior`, which counts as `tau` rows.

    With n the effective weight and a = n / (n + tau),

        mean = (1 - a) * prior.mean + a * moments.mean
        var = (1 - a) * prior.var + a * moments.var
              + a * (1 - a) * abs(moments.mean - prior.mean)**2

    which are the moments of `tau` rows of the prior merged with n rows of the batch.
    Many published methods are rules for `tau`: one that gives the batch a share `a` has
    `tau = n * (1 - a) / a`.

    Args:
        moments: Moments of the rows.
        prior: Mean and variance to shrink towards, of the same features.
        tau: Weight of the prior, in rows. 0 leaves the moments as they are, infinity
            gives the prior. One number, or an array that broadcasts to the moments
            without being larger, such as one entry per feature. May be traced.
        effective_weight: How many rows of equal weight the moments are worth:
            `sum(w)**2 / sum(w**2)` (Kish, 1965). By default `moments.weight`, which is
            that where the weights are all 0 or 1.
        scatter: Whether the variance includes the last term. Methods that only blend
            the variances, as alpha-BN does, omit it.

    Returns:
        Moments with the weight of `moments`; the prior where that weight is 0.
        Differentiable in all arguments.

    Raises:
        ValueError: If `tau` is known to be negative, or does not fit the moments.

    Example:
        >>> batch = Moments(jnp.array([2.0]), jnp.array([4.0]), jnp.array([1.0]))
        >>> prior = BatchStats(jnp.array([0.0]), jnp.array([3.0]))
        >>> m = shrink(batch, prior, tau=2)
        >>> print(m.weight, m.mean, m.var)
        [2.] [2.] [6.]

    References:
        Schneider et al., "Improving robustness against common corruptions by covariate
        shift adaptation", 2020, section 3 (the same weights, at inference).
    """
    shape = moments.mean.shape
    tau = check_tau(tau, *(shape[i:] for i in range(len(shape))))
    return shrunk(moments, prior, tau, effective_weight, scatter)


def shrunk(
    moments: Moments,
    prior: Moments | BatchStats,
    tau: float | int | ArrayLike,
    effective_weight: ArrayLike | None = None,
    scatter: bool = True,
) -> Moments:
    """`shrink` with a checked `tau` that broadcasts."""
    real = moments.var.dtype
    n = moments.weight if effective_weight is None else jnp.asarray(effective_weight)
    n, tau = n.astype(real), jnp.asarray(tau).astype(real)
    if 0 < tau.ndim < n.ndim:
        tau = lax.expand_dims(tau, range(n.ndim - tau.ndim))
    total = n + tau
    some = n > 0
    share = jnp.where(some, n / jnp.where(some, total, 1), 0)
    prior_mean = jnp.asarray(prior.mean).astype(moments.mean.dtype)
    prior_var = jnp.asarray(prior.var).astype(real)
    both = share.astype(moments.mean.dtype)
    mean = (1 - both) * prior_mean + both * moments.mean
    var = (1 - share) * prior_var + share * moments.var
    if scatter:
        gap = numeric.abs_square(moments.mean - prior_mean)
        var = var + share * (1 - share) * gap
    return Moments(moments.weight, mean, var)


def check_tau(
    tau: float | int | ArrayLike, *shapes: tuple[int, ...]
) -> float | int | ArrayLike:
    """Refuses a weight of the prior that is known to be negative.

    It is one number, or an array of one of the shapes.
    """
    why = "0 is batch norm, infinity the running statistics."
    shape = np.shape(axes.as_number(tau, "tau"))
    if shape and shape not in shapes:
        raise ValueError(
            "`tau` must be one number, or have one entry per feature; got an array of"
            f" shape {shape}, not {' or '.join(map(str, dict.fromkeys(shapes)))}."
        )
    return axes.check_number(tau, "tau", 0, why, shape)
