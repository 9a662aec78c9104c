"""Shrinkage: what is known before stands in for rows that a small batch lacks."""

import jax.numpy as jnp

from jbn import axes
from jbn.ops import numeric
from jbn.typing import ArrayLike, BatchStats, Moments


def shrink(
    moments: Moments,
    prior: Moments | BatchStats,
    *,
    tau: float | int | ArrayLike,
    effective_weight: ArrayLike | None = None,
) -> Moments:
    """Draws the moments of a few rows towards `prior`, as `tau` more rows of it would.

    With n the effective weight and a = n / (n + tau),

        mean = (1 - a) * prior.mean + a * moments.mean
        var = (1 - a) * prior.var + a * moments.var
              + a * (1 - a) * abs(moments.mean - prior.mean)**2

    which are the moments of the mixture: `tau` rows of the prior merged with n of the
    batch. (Blends of the variances alone leave out the last term.)

    Args:
        moments: Moments of the rows at hand.
        prior: Mean and variance to draw them to, of the same features.
        tau: Weight of the prior, in rows. 0 leaves the moments as they are, infinity
            gives the prior. May be traced.
        effective_weight: How many rows of equal weight the moments are worth:
            `sum(w)**2 / sum(w**2)` (Kish, 1965). By default `moments.weight`, which is
            that where the weights are all 0 or 1.

    Returns:
        Moments with the weight of `moments`. Where that is 0, the prior. Differentiable
        in all arguments.

    Raises:
        ValueError: If `tau` is known to be negative.

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
    tau = check_tau(tau)
    real = moments.var.dtype
    n = moments.weight if effective_weight is None else jnp.asarray(effective_weight)
    n, tau = n.astype(real), jnp.asarray(tau).astype(real)
    total = n + tau
    some = n > 0
    share = jnp.where(some, n / jnp.where(some, total, 1), 0)
    prior_mean = jnp.asarray(prior.mean).astype(moments.mean.dtype)
    prior_var = jnp.asarray(prior.var).astype(real)
    gap = numeric.abs_square(moments.mean - prior_mean)
    both = share.astype(moments.mean.dtype)
    return Moments(
        moments.weight,
        (1 - both) * prior_mean + both * moments.mean,
        (1 - share) * prior_var + share * moments.var + share * (1 - share) * gap,
    )


def check_tau(tau: float | int | ArrayLike) -> float | int | ArrayLike:
    """Refuses a weight of the prior that is known to be negative."""
    why = "0 is batch norm, infinity the running statistics."
    return axes.check_number(tau, "tau", 0, why)
