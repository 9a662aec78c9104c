"""Saves the state with Orbax, in the background, and keeps the last and the best."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from jbn.training.errors import UsageError
from jbn.training.state import TrainState


class Checkpoints:
    """The checkpoints of a run, named by the number of steps they have behind them.

    They hold NumPy arrays, and so do not depend on the devices of the run. Two are
    kept: the last, and that of the best metric. One that has not been finished when the
    process ends is not there; the one before it is.

    Args:
        folder: Where they are, or are to be.
        higher_is_better: Of the metric.
        read_only: Whether to leave the folder as it is.
    """

    def __init__(
        self, folder: Path, *, higher_is_better: bool = True, read_only: bool = False
    ):
        self._folder = folder
        sign = 1 if higher_is_better else -1
        # (In the middle of an epoch there is no metric.)
        value = lambda metrics: sign * (metrics or {}).get("value", -sign * np.inf)
        # Orbax reports each step of each save; errors still come through.
        absl.logging.set_verbosity(absl.logging.ERROR)
        policies = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(
                    get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._manager = ocp.CheckpointManager(
            folder.resolve(),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "progress": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=None if read_only else policies,
                best_fn=value,
                enable_async_checkpointing=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
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
    def steps(self) -> list[int]:
        """Those that are there."""
        return sorted(self._manager.all_steps())

    @property
    def last_step(self) -> int | None:
        """The last checkpoint, or `None` if there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """That of the best metric, or `None`. The later one of two."""
        return self._manager.best_step()

    def describe(self) -> str:
        """Says what can be loaded."""
        self._manager.wait_until_finished()
        if self.last_step is None:
            return "There is no checkpoint yet."
        return (
            f"The last checkpoint, after step {self.last_step}, can still be loaded: "
            f"{self._folder / str(self.last_step)}."
        )

    def save(
        self,
        state: TrainState,
        *,
        metric: float | None = None,
        progress: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a state, in the background.

        Args:
            state: Of NumPy arrays.
            metric: By which the best is chosen; `None` in the middle of an epoch.
            progress: Sums over the epoch so far.
        """
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_as_dict(state)),  # pyright: ignore[reportCallIssue]
                progress=ocp.args.JsonSave(dict(progress or {})),  # pyright: ignore[reportCallIssue]
            ),
            metrics=None if metric is None else {"value": metric},
            force=True,
        )

    def wait(self) -> None:
        """Waits until what has been saved is on disk."""
        self._manager.wait_until_finished()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """Loads a checkpoint.

        Args:
            step: One of `steps`.
            like: A state of the same structure, whose values do not matter.

        Returns:
            The state, in NumPy arrays, and its `progress`.

        Raises:
            UsageError: If it is of another model, or cannot be read.
        """
        path = self._folder / str(step)
        zeros = lambda x: np.zeros(x.shape, x.dtype)
        target = jax.tree.map(zeros, _as_dict(like))
        try:
            metadata: Any = self._manager.item_metadata(step)
            check_alike(metadata["state"], target, path)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),  # pyright: ignore[reportCallIssue]
                    progress=ocp.args.JsonRestore(),
                ),
            )
        except UsageError:
            raise
        except Exception as error:  # Orbax raises anything here.
            line = (str(error).strip().splitlines() or [""])[0]
            raise UsageError(
                f"{path} cannot be read ({type(error).__name__}: {line})."
            ) from error
        return TrainState(**restored["state"]), restored["progress"]


def check_alike(found: Any, expected: Any, path: Path) -> None:
    """Compares names and shapes of a checkpoint with those of the model of the run.

    Args:
        found: Metadata of the checkpoint.
        expected: A tree of arrays.
        path: Of the checkpoint, for the message.

    Raises:
        UsageError: With the first path that differs.
    """

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        # The optimizer's state is lists there and tuples here; it follows the others.
        tree = {name: part for name, part in tree.items() if name != "opt_state"}
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(key, simple=True, separator="/"): tuple(leaf.shape)
            for key, leaf in leaves
        }

    there, wanted = shapes(getattr(found, "tree", found)), shapes(expected)
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there:
            raise UsageError(f"{path} is of another model: it has no {name}.")
        if name not in wanted:
            raise UsageError(
                f"{path} is of another model: it has {name}, which that of the run's "
                "config.json has not."
            )
        if there[name] != wanted[name]:
            raise UsageError(
                f"{path} is of another model: its {name} has shape {there[name]}, and "
                f"that of the run's config.json {wanted[name]}."
            )


def _as_dict(state: TrainState) -> dict:
    """A plain dict, so that a checkpoint can be read without this package."""
    return {
        "step": state.step,
        "params": state.params,
        "batch_stats": state.batch_stats,
        "opt_state": state.opt_state,
        "average": state.average,
    }
