"""The interface of a task for the trainer."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from jbn.training.data import Dataset
from jbn.training.metrics import Metric
from jbn.training.state import TrainState
from jbn.training.step import Batch, Metrics


@runtime_checkable
class Task(Protocol):
    """Something to train a model for.

    Attributes:
        axis_name: The mapped axis over the devices, if there is one.
        metric: The metric that compares models.
        loss: The name of the metric that is minimized.
        recalibrates: Whether to recalibrate the model before each evaluation, even if
            parameters are not averaged.
    """

    @property
    def axis_name(self) -> str | None:
        """See above."""
        ...

    @property
    def metric(self) -> Metric:
        """See above."""
        ...

    @property
    def recalibrates(self) -> bool:
        """See above."""
        ...

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes `params`, `batch_stats` and `opt_state`."""
        ...

    def update(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Updates them with a batch; metrics are sums over the rows of all devices."""
        ...

    def evaluate(self, variables: Mapping[str, Any], batch: Batch) -> Metrics:
        """Sums over a batch, with the running statistics."""
        ...

    def apply(self, variables: Mapping[str, Any], batch: Batch) -> Any:
        """Applies the model as in training, for `jbn.tools.recalibrate`."""
        ...

    def summarize(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Metrics by name, from sums over batches of training or evaluation."""
        ...

    def pictures(
        self,
        variables: Mapping[str, Any],
        sums: Mapping[str, np.ndarray],
        dataset: Dataset,
    ) -> dict[str, Any]:
        """Figures by name, from a model and its sums over the test split."""
        ...
