"""Graph norm (Cai et al., 2021): each graph by itself, with a learned mean share."""

from typing import Unpack

import jax
import jax.numpy as jnp

from jbn import axes
from jbn._moments import as_moments
from jbn._normalize import as_statistic
from jbn.call import Call, prepare, run
from jbn.ops import numeric
from jbn.options import RowOptions, completed, documented
from jbn.typing import ArrayLike, Params


@documented(RowOptions)
def graph_norm(
    x: ArrayLike,
    params: Params | None = None,
    *,
    segment_ids: ArrayLike,
    num_segments: int,
    mean_scale: ArrayLike | None = None,
    **options: Unpack[RowOptions],
) -> jax.Array:
    """Normalizes the nodes of each graph by their own mean and standard deviation.

    For each graph and feature, with `mean` and `var` over the graph's nodes,

        d = x - mean_scale * mean
        y = scale * d / sqrt(mean of d**2 + epsilon) + bias
        mean of d**2 = var + (1 - mean_scale)**2 * mean**2

    The mean of a graph carries information about its structure (such as its degree), so
    the learned `mean_scale` leaves part of the mean in the output. Without it (a share
    of 1) this is instance norm of packed rows, such as the samples of a ragged batch or
    the objects of a scene. There are no running statistics.

    Args:
        x: Input of shape (..., features, ...) and any floating or complex dtype, the
            nodes of all graphs one after the other.
        params: Scale and bias, one entry per feature, or per graph and feature; `None`
            leaves them out.
        segment_ids: The graph of each node (or entry of the leading axes): integers, in
            any order. A node whose id is not from 0 to `num_segments - 1` is padding:
            it does not count, and is normalized by the last graph's statistics. See
            `jbn.segment_ids`.
        num_segments: Number of graphs; static. Graphs may be empty.
        mean_scale: The share of the mean to remove, one entry per feature.
        **options: As for `jbn.batch_norm`, except those of running statistics. With
            `axis_name` a graph may be spread over several devices, and ids name the
            same graphs on all of them.

    Returns:
        The normalized array, of the shape of `x`. The nodes of a graph of weight zero
        are normalized by mean 0 and variance 1.

    Raises:
        TypeError: If `segment_ids` are not of integers, or as `jbn.batch_norm` does.
        ValueError: If shapes do not fit, `num_segments` is below 1, or as
            `jbn.batch_norm` does.
        NameError: As `jbn.batch_norm` does.

    Example:
        >>> x = jnp.array([[1.0], [3.0], [2.0], [6.0]])
        >>> ids = jnp.array([0, 0, 1, 1])
        >>> y = graph_norm(x, segment_ids=ids, num_segments=2, epsilon=0.0)
        >>> print(y.ravel().round(3))
        [-1.  1. -1.  1.]
        >>> share = jnp.array([0.0])
        >>> y = graph_norm(x, segment_ids=ids, num_segments=2, mean_scale=share)
        >>> [round(float(v), 2) for v in y.ravel()]
        [0.45, 1.34, 0.45, 1.34]

    References:
        Cai et al., "GraphNorm: A Principled Approach to Accelerating Graph Neural
        Network Training", 2021, equation 6. https://arxiv.org/abs/2009.03294
    """
    completed(RowOptions, options, "graph_norm")
    call = prepare(
        "graph_norm",
        x,
        params,
        None,
        use_running_average=False,
        segment_ids=segment_ids,
        num_segments=axes.size(num_segments, "num_segments"),
        **options,
    )
    if mean_scale is not None:
        share = axes.as_array(mean_scale, "mean_scale")
        axes.check_features(share, "mean_scale", call.lay, options.get("axis", -1))
        is_complex = jnp.issubdtype(call.x.dtype, jnp.complexfloating)
        axes.check_real(share, "mean_scale", not is_complex)
    return run(_graphs, call, mean_scale)[0]


def _graphs(call: Call, mean_scale: jax.Array | None):
    """The body of graph norm."""
    stats = call.settled(as_moments(call.summarize()))
    if mean_scale is not None:
        share = call.lay.expand(as_statistic(jnp.asarray(mean_scale), call.x.dtype))
        left = (1 - share[None]) * stats.mean
        second = stats.var + numeric.abs_square(left)
        stats = stats._replace(mean=stats.mean - left, var=second)
    return call.by_stats(stats), None
