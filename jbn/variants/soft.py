"""Soft domains: rows that belong to several domains by shares."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jbn import summary
from jbn._moments import as_moments
from jbn._normalize import gain_of
from jbn.axes import AtRank, Rows, is_static
from jbn.call import Call
from jbn.ops import numeric, soft
from jbn.typing import Moments


# If means are at most this far from a common shift, in standard deviations, the
# relative error of variances is below 1e-5. Otherwise domains are summarized one by
# one.
_FAR = 4
# Number of rows, spread over the batch, that the shift is computed from.
_SAMPLE_ROWS = 256


def mixed(call: Call, domain: AtRank, *, mix: str):
    """The body of domain batch norm with shares instead of ids."""
    table = _Table(call)
    shares = table.shares(domain.array())
    weights = shares.sum(1, keepdims=True) > 0  # A row without any share is padding.
    if call.weights is not None:
        counted = table.rows_of(call.weights)
        weights = jnp.where(weights, counted, jnp.zeros_like(counted))
    x = table.rows_of(call.x)
    shift = lax.stop_gradient(_shift(call, x, shares, weights))
    stats = batch = call.running
    if call.summarizes:
        moments, effective = _moments(call, x, shares, weights, shift)
        batch = jax.tree.map(table.stat, moments)
        if not call.use_running_average:
            stats = call.settled(batch, table.stat(effective))
    scale, bias = (
        None if v is None else table.flat(v) for v in (call.scale, call.bias)
    )
    mean, var = table.each(stats.mean), table.each(stats.var)
    rows = x, shares, weights
    y = table.back(_FORMULAS[mix](call, rows, mean, var, scale, bias, shift))
    if call.residual is not None:
        residual = numeric.wide(call.residual).astype(y.dtype)
        part = numeric.takes_part(call.residual, call.weights)
        y = y + (residual if part is None else jnp.where(part, residual, 0))
    if call.activation is not None:
        y = call.activation(y)
    return y.astype(call.dtype), call.updated(batch)


class _Table:
    """Converts the arrays of a call to matrices of rows and features, and back."""

    def __init__(self, call: Call):
        lay = call.lay
        self.order = (*lay.reduction_axes, *lay.feature_axes)
        self.lay, self.num = lay, call.num_segments
        self.rank = len(lay.reduction_axes)

    def rows_of(self, v: jax.Array) -> jax.Array:
        """An array that broadcasts to the input, as a matrix of rows."""
        kept = [v.shape[a] for a in self.lay.feature_axes]
        features = self.lay.features if any(n > 1 for n in kept) else [1] * len(kept)
        v = jnp.transpose(v, self.order)
        v = jnp.broadcast_to(v, (*self.lay.rows, *features))
        return v.reshape(math.prod(self.lay.rows), math.prod(features))

    def shares(self, v: jax.Array) -> jax.Array:
        """Shares, with an axis for domains after those of the input, as a matrix."""
        v = lax.squeeze(v, self.lay.feature_axes)
        v = jnp.broadcast_to(v, (*self.lay.rows, v.shape[-1]))
        return numeric.wide(v).reshape(-1, v.shape[-1])

    def back(self, y: jax.Array) -> jax.Array:
        """A matrix in the shape of the input."""
        y = y.reshape(*self.lay.rows, *self.lay.features)
        order = sorted(range(len(self.order)), key=self.order.__getitem__)
        return y.transpose(order)

    def stat(self, v: jax.Array) -> jax.Array:
        """A statistic per domain, at the rank of the input, domains in front."""
        v = jnp.broadcast_to(v, (v.shape[0], math.prod(self.lay.features)))
        return self.lay.expand(v.reshape(-1, *self.lay.features))

    def flat(self, v: jax.Array) -> jax.Array:
        """The inverse of `stat`; one row if all domains share the value."""
        return v.reshape(v.shape[0], -1)

    def each(self, v: jax.Array) -> jax.Array:
        """The same, with a row for each domain."""
        return self.flat(jnp.broadcast_to(v, (self.num, *v.shape[1:])))


def _by_output(call, rows, mean, var, scale, bias, shift):
    """The sum over domains of the domain's output times the share.

    sum_k w_k * (gain_k * (x - mean_k) + bias_k)
    """
    gain = gain_of(var, call.epsilon.reshape(()), scale)
    moved = -gain * (mean - shift[None])
    plain = jnp.zeros_like(moved)
    if bias is not None:
        plain = plain + bias.astype(moved.dtype)
        moved = moved + plain

    def block(x, shares, weights):
        d = numeric.center(x, shift[None], weights)
        y = d * soft.product(shares, gain.astype(d.dtype))
        y = y + soft.product(shares, moved.astype(d.dtype))
        part = numeric.takes_part(x, weights)
        assert part is not None
        if call.weights is None:  # Ignored elements have no shares.
            return jnp.where(part, y, 0)
        return jnp.where(part, y, soft.product(shares, plain))

    return soft.each_block(block, *rows)


def _by_stats(call, rows, mean, var, scale, bias, shift):
    """The output normalized by the mean and variance of the mixture of domains.

    mean = sum_k p_k * mean_k,   var = sum_k p_k * (var_k + abs(mean_k - mean)**2)
    """
    offset = mean - shift[None]
    square = lambda v: numeric.abs_square(v).astype(var.dtype)

    def multiplied_out(p, center):
        return _variance(soft.product(p, var + square(offset)), square(center))

    def term_by_term(p, center):
        gaps = (
            p[:, k, None] * square(offset[k, None] - center) for k in range(len(var))
        )
        return sum(gaps, soft.product(p, var))

    def mixture(p, v):
        return v.astype(mean.dtype) if len(v) == 1 else soft.product(p, v)

    def block(variance, x, shares, weights):
        total = shares.sum(1, keepdims=True)
        some = total > 0
        p = jnp.where(some, shares / jnp.where(some, total, 1), 1 / len(var))
        center = soft.product(p, offset)
        gain = gain_of(variance(p, center), call.epsilon.reshape(()), None)
        d = numeric.center(x, shift[None], weights) - center
        part = numeric.takes_part(x, weights)
        d = d if part is None else jnp.where(part, d, 0)
        y = d * gain.astype(d.dtype)
        y = y if scale is None else y * mixture(p, scale)
        return y if bias is None else y + mixture(p, bias)

    each = lambda variance: soft.each_block(functools.partial(block, variance), *rows)
    return lax.cond(
        _near(mean, var, shift),
        lambda: each(multiplied_out),
        lambda: each(term_by_term),
    )


_FORMULAS = {"output": _by_output, "stats": _by_stats}


def _shift(call: Call, x, shares, weights) -> jax.Array:
    """A value near the mean of all rows, the same on all devices."""
    step = max(1, x.shape[0] // _SAMPLE_ROWS) if is_static(x.shape) else 1
    x, shares, weights = x[::step], shares[::step], weights[::step]
    w = numeric.weigh(jnp.ones((x.shape[0], 1), shares.dtype), weights)
    w = w * shares.sum(1, keepdims=True)
    d = numeric.center(x, jnp.zeros((), numeric.wide_dtype(x.dtype)), weights)
    d = jnp.broadcast_to(d, x.shape)
    sums = [(w.astype(d.dtype) * d).sum(0), jnp.broadcast_to(w, x.shape).sum(0)]
    if call.rows.axis_name is not None:
        sums = summary.psum(sums, call.rows)
    return numeric.coarse(sums[0] * numeric.reciprocal(sums[1]).astype(d.dtype))


def _moments(call: Call, x, shares, weights, shift) -> tuple[Moments, jax.Array]:
    """The moments of each domain, and its effective number of rows."""
    rows = Rows((0,), call.rows.axis_name, call.rows.axis_index_groups)
    moments, squares = _plain(rows, x, shares, weights, shift)
    moments = _refined(rows, call.tiny, moments, x, shares, weights, shift)
    weight = moments.weight
    effective = weight * weight * numeric.reciprocal(squares)
    return moments, effective


def _plain(rows: Rows, x, shares, weights, shift) -> tuple[Moments, jax.Array]:
    """The moments about one shift."""
    sums = soft.power_sums(x, shares, weights, shift)
    if rows.axis_name is not None:
        sums = summary.psum(sums, rows)
    weight, first, second, squares = sums
    per_weight = numeric.reciprocal(weight)
    offset = first * per_weight.astype(first.dtype)
    var = _variance(second * per_weight, numeric.abs_square(offset))
    mean = jnp.where(weight > 0, shift[None] + offset, 0)
    return Moments(weight, mean, var), squares


def _near(mean, var, shift, some: Any = True) -> jax.Array:
    """Whether all means are so near the shift that squares can be multiplied out."""
    off = numeric.abs_square(mean - shift[None])
    return jnp.all((off <= _FAR**2 * var) | jnp.logical_not(some))


@jax.custom_jvp
def _variance(square: jax.Array, of_mean: jax.Array) -> jax.Array:
    """`square - of_mean`, not negative.

    Its derivative does not depend on the sign of the difference. Where one row is all
    of a domain, that is the sign of a rounding error, and two loops of one program may
    round differently.
    """
    return numeric.difference(square, of_mean)


@_variance.defjvp
def _variance_jvp(primals, tangents):
    return _variance(*primals), tangents[0] - tangents[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _refined(rows: Rows, tiny: bool, moments: Moments, *arrays) -> Moments:
    """The moments, taken again where the means are many standard deviations apart.

    This changes them by rounding errors only, so their derivative stays as it is.
    """
    x, shares, weights, shift = arrays
    near = _near(moments.mean, moments.var, shift, moments.weight > 0)

    def one_by_one() -> tuple[jax.Array, jax.Array]:
        def one(share):
            shape = jnp.broadcast_shapes((len(share), 1), weights.shape)
            w = numeric.weigh(jnp.broadcast_to(share[:, None], shape), weights)
            return as_moments(summary.summarize(x, w, rows, None, None, tiny))

        each = lax.map(one, shares.T)
        return each.mean[:, 0], each.var[:, 0]

    mean, var = lax.cond(near, lambda: (moments.mean, moments.var), one_by_one)
    return moments._replace(mean=mean, var=var)


@_refined.defjvp
def _refined_jvp(rows, tiny, primals, tangents):
    return _refined(rows, tiny, *primals), tangents[0]
