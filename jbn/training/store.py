"""A folder of numbered checkpoints: the only file that calls Orbax.

It uses Orbax's v1 API, the only one from Orbax 1.0 on.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import absl.logging
import jax
import numpy as np
import orbax.checkpoint


# (A name of its own until version 1.0.)
_orbax: Any = getattr(orbax.checkpoint, "v1", orbax.checkpoint)

_STATE = "state"


class Store:
    """Checkpoints by step, each a tree of NumPy arrays and named JSON documents.

    Saves in the background. A save that the process does not finish leaves no
    checkpoint. Two are kept: the last, and the one with the highest value.

    All methods raise whatever Orbax raises.

    Args:
        folder: The folder of the checkpoints.
        documents: Names of the JSON documents.
        value: The value of a checkpoint's metrics.
        read_only: Whether to leave the folder unchanged.
    """

    def __init__(
        self,
        folder: Path,
        documents: Iterable[str],
        value: Callable[[Any], float],
        *,
        read_only: bool = False,
    ):
        # Orbax logs each save, and each error with its traceback in every thread. It
        # also raises the errors.
        absl.logging.set_verbosity(absl.logging.FATAL)
        context = _orbax.Context()
        registry = _orbax.handlers.local_registry()
        for name in documents:  # By default a dict of numbers is saved as arrays.
            registry.add(_orbax.handlers.JsonHandler, checkpointable_name=name)
        context.checkpointables.registry = registry
        policies = _orbax.training.preservation_policies
        kept = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(
                    get_metric_fn=value, n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        self._checkpointer = _orbax.training.Checkpointer(
            folder.resolve(),
            context=context,
            preservation_policy=None if read_only else kept,
            cleanup_tmp_directories=not read_only,
        )

    @property
    def metrics(self) -> dict[int, Any]:
        """The metrics of each checkpoint or `None`, by step, in order."""
        return {found.step: found.metrics for found in self._checkpointer.checkpoints}

    def save(
        self,
        step: int,
        state: Any,
        documents: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Saves a checkpoint, in the background, after the save before it."""
        self._checkpointer.save_checkpointables_async(
            step,
            {_STATE: jax.tree.map(np.asarray, state), **documents},
            metrics=metrics,
            force=True,
        )

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits for all saves, and releases resources."""
        self._checkpointer.close()

    def delete(self, step: int) -> None:
        """Deletes a checkpoint."""
        self._checkpointer.delete(step)

    def shapes(self, step: int) -> Any:
        """The tree of a checkpoint; its leaves have shapes and no values.

        Tuples and lists are lists, and named tuples dicts.
        """
        return self._checkpointer.checkpointables_metadata(step).metadata[_STATE]

    def load(
        self, step: int, like: Any, documents: Iterable[str]
    ) -> tuple[Any, dict[str, Any]]:
        """Loads a checkpoint.

        Args:
            step: Its step.
            like: A tree of arrays of the same structure; `None` if it is unknown.
            documents: Names of JSON documents to load.

        Returns:
            The tree, of NumPy arrays, and the documents by name.
        """
        wanted = {_STATE: like, **dict.fromkeys(documents)}
        found = dict(self._checkpointer.load_checkpointables(step, wanted))
        return found.pop(_STATE), found
