"""Which rows make up each batch: a pure function of seed, epoch and sizes."""

import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """Row numbers and weights of a number of batches, both of shape (steps, rows).

    Rows that pad a batch have weight zero and row number zero, and so have all rows of
    the steps that pad the last chunk.
    """

    indices: np.ndarray
    weights: np.ndarray

    @property
    def num_steps(self) -> int:
        """Number of steps without padding steps."""
        return int((self.weights.sum(axis=1) > 0).sum())

    @property
    def num_rows(self) -> int:
        """Number of rows of a batch."""
        return self.indices.shape[1]

    def part(self, start: int, stop: int) -> "Plan":
        """Some of the steps."""
        return Plan(self.indices[start:stop], self.weights[start:stop])

    def columns(self, which: slice) -> "Plan":
        """Some of the rows of each batch."""
        return Plan(self.indices[:, which], self.weights[:, which])


def plan_epoch(order: np.ndarray, batch_size: int, *, multiple: int) -> Plan:
    """Splits `order` into batches, without dropping a row.

    Args:
        order: Row numbers, in the order in which to visit them.
        batch_size: Rows in each batch; the last one may have fewer.
        multiple: The length of each batch is padded to a multiple of this: the number
            of devices times that of microbatches.

    Returns:
        The plan, in which all batches are padded to the same length.
    """
    batch_size = min(batch_size, len(order))
    steps = -(-len(order) // batch_size)
    rows = -(-batch_size // multiple) * multiple
    indices = np.zeros((steps, rows), np.int32)
    weights = np.zeros((steps, rows), np.float32)
    for step in range(steps):
        batch = order[step * batch_size : (step + 1) * batch_size]
        indices[step, : len(batch)] = batch
        weights[step, : len(batch)] = 1
    return Plan(indices, weights)


def permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """The order of an epoch, which only depends on the arguments."""
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def chunk_length(num_steps: int, max_steps: int) -> int:
    """The length of chunks of equal length, of at most `max_steps` steps."""
    count = -(-num_steps // max_steps)
    return -(-num_steps // count)


def chunks(plan: Plan, length: int) -> Iterator[Plan]:
    """Splits a plan into chunks of `length` steps, padding the last one."""
    steps = len(plan.indices)
    fill = ((0, -steps % length), (0, 0))
    indices, weights = np.pad(plan.indices, fill), np.pad(plan.weights, fill)
    for start in range(0, len(indices), length):
        yield Plan(indices[start : start + length], weights[start : start + length])
