"""Saves the state once an epoch with Orbax, and keeps the last and the best."""

from pathlib import Path
from types import TracebackType

import absl.logging
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jbn.training.state import TrainState


class Checkpoints:
    """The checkpoints of a run, named by the number of epochs they have behind them.

    They hold NumPy arrays, and so do not depend on the devices of the run. Two are
    kept: that of the last epoch, and that of the highest test accuracy.

    Args:
        folder: Where they are, or are to be.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        # Orbax reports each step of each save; errors still come through.
        absl.logging.set_verbosity(absl.logging.ERROR)
        policies = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(get_metric_fn=_test_accuracy, n=1),
            ]
        )
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies,
                best_fn=_test_accuracy,
                enable_async_checkpointing=False,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def last_epoch(self) -> int | None:
        """The epoch of the last checkpoint, or `None` if there is none."""
        return self._manager.latest_step()

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the highest test accuracy, or `None`. The later one of two."""
        return self._manager.best_step()

    def describe(self) -> str:
        """Says what can be loaded."""
        if self.last_epoch is None:
            return "There is no checkpoint yet."
        return (
            f"The last checkpoint, after epoch {self.last_epoch}, can still be loaded: "
            f"{self._folder / str(self.last_epoch)}."
        )

    def save(self, epoch: int, state: TrainState, test_accuracy: float) -> None:
        """Saves the state after `epoch` epochs."""
        # Via NumPy: Orbax does not take the arrays of a pmap of several processes.
        self._manager.save(
            epoch,
            args=ocp.args.StandardSave(_as_dict(jax.device_get(state))),  # pyright: ignore[reportCallIssue]
            metrics={"test_accuracy": test_accuracy},
        )

    def restore(self, epoch: int, like: TrainState) -> TrainState:
        """Loads the state after `epoch` epochs.

        Args:
            epoch: `last_epoch` or `best_epoch`.
            like: A state of the same structure, whose values do not matter.

        Returns:
            The state, in NumPy arrays.
        """
        target = _as_dict(jax.device_get(like))
        restored = self._manager.restore(epoch, args=ocp.args.StandardRestore(target))  # pyright: ignore[reportCallIssue]
        return TrainState(**restored)


def _as_dict(state: TrainState) -> dict:
    """A plain dict, so that a checkpoint can be read without this package."""
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
    }


def _test_accuracy(metrics: dict[str, float]) -> float:
    return metrics["test_accuracy"]
