"""Packed data: rows of many samples one after the other, padded to a static size."""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from jbn import axes
from jbn.typing import ArrayLike


def segment_ids(
    lengths: ArrayLike | None = None,
    *,
    row_splits: ArrayLike | None = None,
    num_rows: int,
) -> jax.Array:
    """Says which segment (sample, sequence, graph) each packed row belongs to.

    Rows beyond the last segment are padding. They get an id of their own, one more
    than the last, so that `segment_ids(...) < num_segments` is the mask of the rows
    that count, and a batch norm over packed rows is

        ids = segment_ids(lengths, num_rows=x.shape[0])
        y, batch_stats = batch_norm(
            x, params, batch_stats, use_running_average=False, mask=ids < len(lengths)
        )

    To let each segment count once, however long it is, pass
    `weights=group_weights(ids, len(lengths))` instead. To give each its own statistics
    (instance norm on packed data) call `domain_batch_norm` with `domain=ids` and
    `num_domains=len(lengths) + 1`: the padding is one more domain.

    Args:
        lengths: Number of rows of each segment, of shape (num_segments,) and an integer
            dtype; 0 is allowed. `n_node` of a jraph graph is such an array. (There,
            padding is a graph as well: mask with `jraph.get_node_padding_mask`.)
        row_splits: In place of `lengths`: where each segment begins, and the last one
            ends, of shape (num_segments + 1,), as in TensorFlow's ragged tensors.
        num_rows: Number of packed rows with their padding; static.

    Returns:
        Array of shape (num_rows,), int32.

    Raises:
        TypeError: If both or none of `lengths` and `row_splits` are given, or they are
            not of integers.
        ValueError: If they are not of one axis, or known not to fit `num_rows`.

    Example:
        >>> print(segment_ids(jnp.array([2, 0, 3]), num_rows=6))
        [0 0 2 2 2 3]
    """
    if (lengths is None) == (row_splits is None):
        raise TypeError(
            "`segment_ids` takes either `lengths` or `row_splits`; got"
            f" {'none' if lengths is None else 'both'}."
        )
    try:
        num_rows = operator.index(num_rows)
    except TypeError:
        raise TypeError(
            f"`num_rows` must be an integer that is known; got {num_rows!r}. It is the"
            " static size that rows are padded to."
        ) from None
    name = "row_splits" if lengths is None else "lengths"
    given = row_splits if lengths is None else lengths
    given = given if isinstance(given, jax.Array) else np.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be of integers; got {given.dtype}.")
    if given.ndim != 1 or (lengths is None and not given.size):
        raise ValueError(
            f"`{name}` must have one axis, of one entry for each segment"
            f"{' and one more' if lengths is None else ''}; got shape {given.shape}."
        )
    values = axes.known(given)
    if values is not None:
        _check_fit(name, values.astype(np.int64), num_rows)
    given = jnp.asarray(given).astype(jnp.int32)
    ends = given[1:] if lengths is None else jnp.cumsum(given)
    # A row's segment is the number of segments that end at or before it.
    ending = jnp.zeros(num_rows, jnp.int32).at[ends].add(1, mode="drop")
    return jnp.cumsum(ending, dtype=jnp.int32)


def _check_fit(name: str, values: np.ndarray, num_rows: int) -> None:
    """Raises if segments known by `values` do not fit into `num_rows` rows."""
    lengths, rule = values, "not be negative"
    if name == "row_splits":
        lengths, rule = np.diff(values), "begin with 0 and not fall"
    if (lengths < 0).any() or (name == "row_splits" and values[0] != 0):
        raise ValueError(f"`{name}` must {rule}; got {values}.")
    if lengths.sum() > num_rows:
        raise ValueError(
            f"`{name}` must fit into `num_rows`: {lengths.sum()} rows into {num_rows}."
            " Pad `x` to a larger static size."
        )
