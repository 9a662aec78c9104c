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
    """Makes the ids of the segment (sample, sequence, graph) of each packed row.

    Rows after the last segment are padding. They get the next id, so that
    `segment_ids(...) < num_segments` is the mask of the rows that count. A batch norm
    over packed rows is

        ids = segment_ids(lengths, num_rows=x.shape[0])
        y, batch_stats = batch_norm(
            x, params, batch_stats, use_running_average=False, mask=ids < len(lengths)
        )

    To let each segment count once, however long it is, pass
    `weights=group_weights(ids, len(lengths))` instead. To normalize each segment by its
    own statistics (instance norm on packed data) call `graph_norm` with
    `segment_ids=ids` and `num_segments=len(lengths)`.

    Args:
        lengths: Number of rows of each segment, of shape (num_segments,) and an integer
            dtype; 0 is allowed. `n_node` of a jraph graph is such an array. (There,
            padding consists of graphs, too: mask with `jraph.get_node_padding_mask`.)
        row_splits: Instead of `lengths`: the first row of each segment, and the end of
            the last, of shape (num_segments + 1,), as in TensorFlow's ragged tensors.
        num_rows: Number of packed rows, including padding; static.

    Returns:
        Array of shape (num_rows,), int32.

    Raises:
        TypeError: If both or none of `lengths` and `row_splits` are given, or they are
            not of integers.
        ValueError: If they do not have one axis, or are known not to fit `num_rows`.

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
            f"`num_rows` must be a static integer; got {num_rows!r}. It is the size"
            " that rows are padded to."
        ) from None
    name = "row_splits" if lengths is None else "lengths"
    given = row_splits if lengths is None else lengths
    given = given if isinstance(given, jax.Array) else np.asarray(given)
    if not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"`{name}` must be of integers; got {given.dtype}.")
    if given.ndim != 1 or (lengths is None and not given.size):
        raise ValueError(
            f"`{name}` must have one axis, with one entry per segment"
            f"{' and one more' if lengths is None else ''}; got shape {given.shape}."
        )
    values = axes.known(given)
    if values is not None:
        _check_fit(name, values.astype(np.int64), num_rows)
    given = jnp.asarray(given).astype(jnp.int32)
    ends = given[1:] if lengths is None else jnp.cumsum(given)
    # The id of a row is the number of segments that end at or before it.
    ending = jnp.zeros(num_rows, jnp.int32).at[ends].add(1, mode="drop")
    return jnp.cumsum(ending, dtype=jnp.int32)


def _check_fit(name: str, values: np.ndarray, num_rows: int) -> None:
    """Raises if segments with known `values` do not fit into `num_rows` rows."""
    lengths, rule = values, "not be negative"
    if name == "row_splits":
        lengths, rule = np.diff(values), "start with 0 and not decrease"
    if (lengths < 0).any() or (name == "row_splits" and values[0] != 0):
        raise ValueError(f"`{name}` must {rule}; got {values}.")
    if lengths.sum() > num_rows:
        raise ValueError(
            f"`{name}` must fit into `num_rows`: {lengths.sum()} rows into {num_rows}."
            " Pad `x` to a larger static size."
        )
