"""Batch norm of sparse arrays with implicit zeros, without dense copies."""

import dataclasses
import math
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Inexact

from jbn import summary
from jbn._moments import merge, row_moments
from jbn._normalize import gain_of
from jbn.axes import Rows
from jbn.call import Call, Stats, prepare, run
from jbn.ops import numeric
from jbn.ops.segments import Segments, segments_of, spread
from jbn.options import Options, documented
from jbn.typing import Moments, Params


class SparseOutput(NamedTuple):
    """A dense array, as the sum of a sparse one and a value per feature.

    `values.todense() + background` is the dense array; `background` is the output for a
    zero. (If features are not last, reshape `background` so that it broadcasts.) A
    linear layer needs no dense array either: `values @ w + background @ w`.
    """

    values: BCOO
    background: Inexact[Array, "*features"]


@documented(Options)
def sparse_batch_norm(
    x: BCOO,
    params: Params | None,
    batch_stats: Stats,
    *,
    use_running_average: bool,
    **options: Unpack[Options],
) -> tuple[SparseOutput, Stats]:
    """Normalizes each feature of a sparse array, over stored and implicit elements.

    The result equals that of `jbn.batch_norm` on `x.todense()`, including statistics
    and gradients, but memory and time are proportional to the stored elements. For a
    feature with T sites and n stored elements v,

        mean = sum(v) / T
        var = (sum((v - mean)**2) + (T - n) * mean**2) / T

    which merges the moments of the stored elements with those of T - n zeros. (To leave
    the zeros out, as norms of point clouds and sparse convolutions do, call
    `jbn.batch_norm` on `x.data`.)

    Args:
        x: `jax.experimental.sparse.BCOO` of shape (..., features, ...), with any
            floating dtype and any combination of sparse and dense axes. Elements stored
            more than once are added up first, unless `x.unique_indices` is true.
        params: Scale and bias, one entry per feature; `None` leaves them out.
        batch_stats: Running mean and variance, one entry per feature, or `None`.
        use_running_average: `False` in training, `True` at inference.
        **options: As for `jbn.batch_norm`, except `trim`, `activation`, `residual` and
            `masked_output`. `mask` and `weights` are per site: of the shape of `x` with
            size 1 for the features, or without the feature axes.

    Returns:
        `SparseOutput(values, background)` with the indices of `x`, and the running
        statistics.

    Raises:
        TypeError: If `x` is not a `BCOO`, or as `jbn.batch_norm` does.
        ValueError: If `trim` is given, if weights vary between features, or as
            `jbn.batch_norm` does.
        NameError: As `jbn.batch_norm` does.

    Example:
        >>> import jbn
        >>> x = BCOO.fromdense(jnp.array([[0.0, 4.0], [0.0, 0.0], [3.0, 0.0]]))
        >>> y, _ = sparse_batch_norm(x, None, None, use_running_average=False)
        >>> print((y.values.todense() + y.background[None]).round(3))
        [[-0.707  1.414]
         [-0.707 -0.707]
         [ 1.414 -0.707]]
    """
    if not isinstance(x, BCOO):
        raise TypeError(
            "`sparse_batch_norm` takes a `jax.experimental.sparse.BCOO`; got"
            f" {type(x).__name__}. For a dense array use `batch_norm`."
        )
    if options.get("trim") is not None:
        raise ValueError(
            "`sparse_batch_norm` does not take `trim`: implicit zeros that are outliers"
            " would have to be stored. Trim `x.data` by `trimmed_weights`."
        )
    for name in ("activation", "residual"):
        if options.get(name) is not None:
            raise ValueError(
                f"`sparse_batch_norm` does not take `{name}`: its output has two parts,"
                " and only their sum could be passed to a function. Make it"
                " dense first."
            )
    if options.get("masked_output", "normalized") != "normalized":
        raise ValueError(
            "`sparse_batch_norm` does not take `masked_output`: a site that is not"
            " stored has no output of its own to replace. Use `jnp.where` on the dense"
            " output."
        )
    if x.n_batch:
        x = x.update_layout(n_batch=0)
    if not x.unique_indices:
        x = x.sum_duplicates(nse=x.nse, remove_zeros=False)
    call = prepare(
        "sparse_batch_norm",
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        params,
        batch_stats,
        use_running_average=use_running_average,
        **options,
    )
    weights = call.weights
    if weights is not None and any(weights.shape[a] > 1 for a in call.lay.feature_axes):
        raise ValueError(
            "`mask` and `weights` of a sparse array are per site, the same for"
            f" all features; got shape {weights.shape} for features along"
            f" {call.lay.feature_axes}."
        )
    return run(_sparse, dataclasses.replace(call, x=x))


def _sparse(call: Call):
    """The body of sparse batch norm."""
    x = call.x
    stored = _stored(x, call)
    stats = batch = call.running
    if call.summarizes:
        batch = jax.tree.map(call.lay.expand, _moments(stored, call))
    if not call.use_running_average:
        stats = call.settled(batch)
    slope = gain_of(stats.var, call.epsilon, call.scale).astype(stats.mean.dtype)
    background = -slope * stats.mean
    if call.bias is not None:
        background = background + call.bias.astype(background.dtype)
    # Minus the background, so that elements that are not stored are zero.
    values = numeric.wide(stored.x)
    # The output of an ignored element is the bias.
    part = numeric.takes_part(stored.x, stored.weights)
    assert part is not None
    values = jnp.where(part, values, stored.spread(call.lay.squeeze(stats.mean)))
    values = values * stored.spread(call.lay.squeeze(slope))
    y = BCOO(
        (values.astype(call.dtype), x.indices),
        shape=x.shape,
        indices_sorted=x.indices_sorted,
        unique_indices=x.unique_indices,
    )
    background = call.lay.squeeze(background).astype(call.dtype)
    return SparseOutput(y, background), call.updated(batch)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """The stored elements: a dense array whose first axis is reduced."""

    x: jax.Array
    rows: Rows
    weights: jax.Array
    segments: Segments | None
    kept: tuple[int, ...]  # shape of a statistic of `x`, with reduced axes of size 1

    def spread(self, stat: jax.Array) -> jax.Array:
        """Gives each stored element the statistic of its feature."""
        return spread(stat.reshape(self.kept), self.segments)


def _stored(x: BCOO, call: Call) -> _Stored:
    """The feature and the weight of each stored element."""
    features = call.lay.feature_axes
    indices = x.indices.astype(jnp.int32)
    sparse_features = [a for a in features if a < x.n_sparse]
    dense = range(x.n_sparse, x.ndim)
    rank_of_data = (1,) * (x.data.ndim - 1)
    sizes = [x.shape[a] for a in sparse_features]
    kept = (1, *(x.shape[a] if a in features else 1 for a in dense))
    segments = None
    if sparse_features:
        ids = jnp.zeros(x.nse, jnp.int32)
        for a, size in zip(sparse_features, sizes, strict=True):
            ids = ids * size + indices[:, a]
        segments = segments_of(ids.reshape(-1, *rank_of_data), math.prod(sizes))
        kept = (segments.num, *kept)
    # BCOO pads with elements whose indices are out of bounds.
    bounds = jnp.asarray(x.shape[: x.n_sparse], jnp.int32)
    there = (indices < bounds[None]).all(-1)
    weights = there.reshape(-1, *rank_of_data)
    if call.weights is not None:
        index = tuple(
            indices[:, a] if call.weights.shape[a] > 1 else 0 for a in range(x.n_sparse)
        )
        counted = jnp.broadcast_to(
            call.weights[index], (x.nse, *call.weights.shape[x.n_sparse :])
        )
        weights = jnp.where(weights, counted, jnp.zeros_like(counted))
    reduced = (0, *(1 + a - x.n_sparse for a in dense if a not in features))
    rows = dataclasses.replace(call.rows, axes=reduced)
    return _Stored(x.data, rows, weights, segments, kept)


def _moments(stored: _Stored, call: Call) -> Moments:
    """The moments of all sites: stored elements and implicit zeros."""
    moments = row_moments(stored.rows, stored.x, stored.weights, stored.segments)
    weight = jnp.broadcast_to(moments.weight, moments.var.shape)
    moments = jax.tree.map(
        lambda v: v.reshape(call.lay.features), moments._replace(weight=weight)
    )
    sites = numeric.total_weight(call.described, call.weights, call.rows.axes)
    if call.rows.axis_name is not None:
        sites = summary.psum(sites, call.rows)
    # Rounding may make it slightly negative.
    zeros = jnp.maximum(call.lay.squeeze(sites) - moments.weight, 0)
    none = jnp.zeros_like(moments.mean)
    return merge(moments, Moments(zeros, none, jnp.zeros_like(zeros)))
