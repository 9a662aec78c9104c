"""Sums over rows weighted by shares of several domains, as matrix products.

Rows are a matrix `(rows, features)`, and shares a matrix `(rows, domains)`. To avoid a
copy of the rows for each domain, they are processed in blocks that fit into the cache.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact

from jbn.axes import is_static
from jbn.lowering.passes import rematerialized
from jbn.ops import numeric


# Most elements of a block of rows.
_BLOCK_ELEMENTS = 1 << 18


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

    # Few enough blocks for their sums to be small arrays, which are added at the end.
    blocks = _in_blocks((x, shares, weights), x.shape)
    totals = lax.map(rematerialized(block), blocks)
    return tuple(v.sum(0) for v in totals)


def each_block(
    f: Callable[..., jax.Array], x: Inexact[Array, "rows features"], *arrays: Any
) -> Inexact[Array, "rows features"]:
    """`f(x, *arrays)` in blocks of rows; each array has one entry per row."""
    blocks = _in_blocks((x, *arrays), x.shape)
    return lax.map(rematerialized(lambda args: f(*args)), blocks).reshape(x.shape)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The product of real and real or complex matrices, in full precision."""
    return jnp.dot(a.astype(b.dtype), b, precision=lax.Precision.HIGHEST)


def _in_blocks(arrays: Any, shape: tuple[int, ...]) -> Any:
    """The arrays with an axis of blocks in front."""
    rows, count = shape[0], 1
    if is_static(shape) and math.prod(shape) > _BLOCK_ELEMENTS:
        wanted = math.prod(shape) / _BLOCK_ELEMENTS
        divisors = (n for n in range(math.ceil(wanted), rows + 1) if rows % n == 0)
        count = next(divisors, 1)
        # A number of rows without suitable divisors is not split.
        count = count if count <= 4 * wanted + 1 else 1
    return jax.tree.map(lambda v: v.reshape(count, rows // count, *v.shape[1:]), arrays)
