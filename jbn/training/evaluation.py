"""Evaluates a model on the test split, and recalibrates it."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jbn.training.batches import Plan, chunk_length, permutation, plan_epoch
from jbn.training.data import Dataset, Split
from jbn.training.executor import Executor
from jbn.training.loader import Batches, load
from jbn.training.metrics import Sums
from jbn.training.tasks import Task


_MOST_ROWS = 1024
_MOST_BATCH_BYTES = 2**24
_MOST_CHUNK_BYTES = 2**26
# Number of training examples for statistics: a few thousand are enough.
_CALIBRATION_ROWS = 8192


class Evaluation:
    """Evaluates on all the devices of a run.

    Args:
        task: The task.
        executor: Runs the evaluation.
        dataset: Its data.
        batch_size: That of training.
        most_steps: Most batches in one dispatch.
        seed: Seed of the order of examples for statistics.
        multiple: The rows of a batch are padded to a multiple of this; by default the
            number of devices.
    """

    def __init__(
        self,
        task: Task,
        executor: Executor,
        dataset: Dataset,
        *,
        batch_size: int,
        most_steps: int = 64,
        seed: int = 0,
        multiple: int | None = None,
    ):
        self._executor, self._dataset = executor, dataset
        self._batch_size, self._seed = batch_size, seed
        self._multiple = multiple or len(executor.devices)
        rows = _MOST_BATCH_BYTES // int(np.prod(dataset.image_shape))
        size = max(batch_size, min(rows, _MOST_ROWS))
        self._plan = self._plan_of(np.arange(len(dataset.test)), size)
        self._most_steps = most_steps
        self._sums = executor.evaluate(task.evaluate)
        self._task = task

    def __call__(self, variables: Any) -> dict[str, np.ndarray]:
        """The sums of the task over the test split, with the running statistics."""
        variables = self._executor.put(variables)
        sums = Sums()
        for _, batches in self._load(self._dataset.test, self._plan, self._length):
            found = self._sums(variables, self._executor.put_batches(batches))
            sums.add(self._executor.get(found))
        return sums.values

    def recalibrated(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Variables with the statistics of training examples, in NumPy arrays."""

        def batches() -> Iterator[Any]:
            for _, batches in self._load(self._dataset.train, self._calibration, 1):
                yield self._executor.put_rows({k: v[0] for k, v in batches.items()})

        variables = self._executor.put(dict(variables))
        return self._executor.get(self._recalibrate(variables, batches()))

    @functools.cached_property
    def _recalibrate(self) -> Any:
        # Only here: few runs need it, and it takes a third of a second.
        from jbn.tools import recalibrator

        return recalibrator(self._task.apply)

    @functools.cached_property
    def _length(self) -> int:
        return steps_per_dispatch(self._dataset.test, self._plan, self._most_steps)

    @functools.cached_property
    def _calibration(self) -> Plan:
        """The plan of the batches for statistics, the same each time."""
        # Training counts epochs from 1, so this order is a different one.
        order = permutation(self._seed, 0, len(self._dataset.train))
        return self._plan_of(order[:_CALIBRATION_ROWS], self._batch_size)

    def _plan_of(self, order: np.ndarray, batch_size: int) -> Plan:
        return plan_epoch(order, batch_size, multiple=self._multiple)

    def _load(
        self, split: Split, plan: Plan, length: int
    ) -> Iterator[tuple[int, Batches]]:
        share = self._executor.share(plan.num_rows)
        return load(split, plan, length, share=share)


def steps_per_dispatch(split: Split, plan: Plan, most: int) -> int:
    """The number of batches in one dispatch.

    Args:
        split: Where the examples come from.
        plan: The batches of an epoch.
        most: The most.

    Returns:
        The number that fits into 64 MiB, for chunks of equal length.
    """
    example = split.rows(np.zeros(1, np.int64))
    size = plan.num_rows * sum(x.nbytes for x in example.values())
    most = min(most, max(1, _MOST_CHUNK_BYTES // size))
    return chunk_length(len(plan.indices), most)
