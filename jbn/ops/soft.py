"""Sums over rows weighted by shares of several domains, as matrix products.

Rows are a matrix `(rows, features)`, and shares a matrix `(rows, domains)`. To avoid a
copy of the rows for each domain, they are processed in blocks that fit into the cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jbn.axes import is_static
from jbn.lowering.blocks import loop_rows
from jbn.lowering.passes import rematerialized
from jbn.ops import numeric


# Least number of rows of a block for each domain. It limits the memory of the sums of
# all blocks to a fraction of that of the rows.
_ROWS_PER_DOMAIN = 8


def power_sums(
    x: Inexact[Array, "rows features"],
    shares: Float[Array, "rows domains"],
    weights: jax.Array | None,
    shift: Inexact[Array, " features"],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """For each domain the sums of w, w * d, w * abs(d)**2 and w**2.

    Here d = x - shift, and w is the share times the weight of a row. Each is of shape
    (domains, features), or of (domains, 1) where weights are the same for all features.
    """

    def block(arrays):
        x, shares, weights = arrays
        d = numeric.center(x, shift[None], weights)
        one = jnp.ones((x.shape[0], 1), shares.dtype)
        terms = (
            numeric.weigh(one, weights),
            numeric.weigh(d, weights),
            numeric.weigh(numeric.abs_square(d), weights),
        )
        sums = [product(shares.T, term) for term in terms]
        sums.append(product(jnp.square(shares).T, jnp.square(terms[0])))
        return sums

    totals = lax.map(rematerialized(block), _in_blocks(x, shares, weights))
    return tuple(v.sum(0) for v in totals)


def each_block(
    f: Callable[..., jax.Array],
    x: Inexact[Array, "rows features"],
    shares: Float[Array, "rows domains"],
    *arrays: Any,
) -> Inexact[Array, "rows features"]:
    """`f(x, shares, *arrays)` in blocks of rows; each array has one entry per row."""
    blocks = _in_blocks(x, shares, *arrays)
    y = lax.map(rematerialized(lambda args: f(*args)), blocks)
    return y.reshape(-1, x.shape[1])[: x.shape[0]]


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of real and real or complex matrices, in full precision."""
    return jnp.dot(a.astype(b.dtype), b, precision=lax.Precision.HIGHEST)


def _in_blocks(x: jax.Array, shares: jax.Array, *arrays: Any) -> Any:
    """The arrays with an axis of blocks in front; rows without shares are added."""
    (rows, features), domains = x.shape, shares.shape[1]
    count, added = 1, 0
    if is_static(x.shape) and rows:
        block = loop_rows(rows, features, _ROWS_PER_DOMAIN * domains)
        count = -(-rows // block)
        # An equal split needs no copy of the rows.
        splits = (n for n in range(count, 2 * count) if rows % n == 0)
        count = next(splits, count)
        added = -rows % count

    def split(v: jax.Array) -> jax.Array:
        v = jnp.pad(v, ((0, added), (0, 0))) if added else v
        return v.reshape(count, (rows + added) // count, *v.shape[1:])

    return jax.tree.map(split, (x, shares, *arrays))
