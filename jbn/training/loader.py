"""Reads the batches of a plan, from memory, or from disk with grain's threads."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jbn.training.batches import Plan, chunks
from jbn.training.data import OnDisk, Split
from jbn.training.errors import UsageError


Batches = dict[str, np.ndarray]

_ALL = slice(None)


def load(
    split: Split,
    plan: Plan,
    length: int,
    *,
    share: slice = _ALL,
    epoch: int = 0,
    threads: int | None = None,
) -> Iterator[tuple[int, Batches]]:
    """Reads chunk after chunk.

    Args:
        split: The examples.
        plan: The rows of each batch.
        length: Steps in each chunk.
        share: The rows of each batch for this process.
        epoch: Seeds the random crops of examples on disk.
        threads: Number of threads that read from disk; by default one per core.

    Yields:
        The number of steps in the chunk without padding steps, and the batches: the
        arrays of the split, with `index` and `weight`, of shape (length, rows, ...).
    """
    whole = list(chunks(plan, length))
    pieces = [piece.columns(share) for piece in whole]
    rows = (
        _from_disk(split, pieces, epoch, threads)
        if isinstance(split, OnDisk)
        else map(lambda piece: split.rows(piece.indices), pieces)
    )
    for chunk, piece, found in zip(whole, pieces, rows, strict=True):
        batches = {**found, "index": piece.indices, "weight": piece.weights}
        yield chunk.num_steps, batches


def ahead(
    chunks: Iterator[tuple[int, Batches]], put: Callable[[Batches], Any]
) -> Iterator[tuple[int, Any]]:
    """Prefetches the next chunk to the devices while the current one is in use.

    Args:
        chunks: From `load`.
        put: Copies batches to the devices.

    Yields:
        The chunks.
    """

    def read() -> tuple[int, Any] | None:
        for count, batches in chunks:
            return count, put(batches)
        return None

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(read)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(read)
            yield chunk


def empty_chunk(
    split: Split, plan: Plan, length: int, *, share: slice = _ALL
) -> Batches:
    """Batches with the shapes of a chunk, in which all rows have weight zero."""
    shape = (length, plan.columns(share).num_rows)
    example = split.rows(np.zeros(1, np.int64))
    batches = {k: np.zeros((*shape, *v.shape[1:]), v.dtype) for k, v in example.items()}
    return {
        **batches,
        "index": np.zeros(shape, plan.indices.dtype),
        "weight": np.zeros(shape, plan.weights.dtype),
    }


def _from_disk(
    split: OnDisk, pieces: list[Plan], epoch: int, threads: int | None
) -> Iterator[dict[str, np.ndarray]]:
    try:
        import grain
    except ImportError as error:
        raise UsageError(
            'Reading examples from disk needs grain: pip install "jbn[grain]".'
        ) from error
    indices = np.stack([piece.indices for piece in pieces])
    flat = indices.reshape(-1)

    def read(position: Any) -> dict[str, np.ndarray]:
        return split.row(int(flat[position]), epoch)

    options = grain.ReadOptions(
        num_threads=threads or os.cpu_count() or 1,
        prefetch_buffer_size=2 * indices.shape[-1],
    )
    examples = grain.MapDataset.range(len(flat)).map(read).to_iter_dataset(options)
    size = indices[0].size
    for batch in examples.batch(size):
        yield {k: v.reshape(*indices.shape[1:], *v.shape[1:]) for k, v in batch.items()}
