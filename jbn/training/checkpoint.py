"""Saves the state of a run in the background, keeping the last and the best.

Each checkpoint has a CRC-32 of every array, which is verified on every read: by
default, Orbax does not detect a changed byte.
"""

import contextlib
import json
import os
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jbn.training.errors import StorageError, UsageError
from jbn.training.state import TrainState
from jbn.training.store import Store


# JSON documents in each checkpoint.
_PROGRESS, _CHECKSUMS = "progress", "checksums"


class Checkpoints:
    """The checkpoints of a run, named by the number of steps.

    They hold NumPy arrays, so they do not depend on the devices of the run. Two are
    kept: the last, and the one with the best metric. If the process ends before one is
    finished, the previous one remains.

    Args:
        folder: The folder of the checkpoints.
        higher_is_better: Of the metric.
        read_only: Whether to leave the folder unchanged.
    """

    def __init__(
        self, folder: Path, *, higher_is_better: bool = True, read_only: bool = False
    ):
        self._folder = folder
        self._sign = 1 if higher_is_better else -1
        # Not saved yet: the last state, and the best one if different.
        self._held: dict[str, tuple[TrainState, float]] = {}
        try:
            self._store = Store(
                folder, (_PROGRESS, _CHECKSUMS), self._value, read_only=read_only
            )
            values = map(self._value, self._store.metrics.values())
            self._best_value = max(values, default=-np.inf)
        except Exception as error:  # Orbax raises anything here.
            raise UsageError(f"{folder} cannot be read ({_brief(error)}).") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if not isinstance(error, StorageError):
                self.flush()
                self.wait()
        finally:
            with contextlib.suppress(Exception):  # Of a save that was reported.
                self._store.close()

    @property
    def steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return list(self._store.metrics)

    @property
    def last_step(self) -> int | None:
        """The step of the last checkpoint, or `None`."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step with the best metric, or `None`; of equal ones the later."""
        rated = [(self._value(m), step) for step, m in self._store.metrics.items() if m]
        return max(rated)[1] if rated else None

    def _value(self, metrics: Mapping[str, float] | None) -> float:
        """The metric, higher if better; in the middle of an epoch there is none."""
        return self._sign * metrics["value"] if metrics else -np.inf

    def describe(self) -> str:
        """A sentence about the checkpoints that can be loaded."""
        self.flush()
        self.wait()
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
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a state, in the background.

        Args:
            state: Of NumPy arrays.
            metric: Selects the best; `None` in the middle of an epoch.
            progress: Sums over the epoch so far.
        """
        if "best" in self._held:
            best, value = self._held.pop("best")
            if best.step < state.step:
                self._save(best, value, {})
        self._held.clear()
        self._save(state, metric, dict(progress or {}))

    def hold(self, state: TrainState, *, metric: float) -> None:
        """Holds a state in memory, for `flush` to save if it is the last or the best.

        Args:
            state: Of NumPy arrays.
            metric: By which the best is chosen.
        """
        if self._sign * metric >= self._best_value:
            self._held["best"], self._best_value = (state, metric), self._sign * metric
        self._held["last"] = state, metric

    def flush(self) -> None:
        """Saves the states held in memory."""
        if "last" in self._held:
            state, metric = self._held["last"]
            self.save(state, metric=metric)

    def _save(
        self, state: TrainState, metric: float | None, sums: dict[str, Any]
    ) -> None:
        tree = _as_dict(state)
        if metric is not None:
            self._best_value = max(self._best_value, self._sign * metric)
        try:
            self._store.save(
                int(state.step),
                tree,
                {_PROGRESS: sums, _CHECKSUMS: _checksums(tree, sums)},
                None if metric is None else {"value": metric},
            )
        except Exception as error:  # Of this save, or of the previous one.
            raise self._not_saved(error) from error

    def wait(self) -> None:
        """Waits until all saves are on disk."""
        try:
            self._store.wait()
        except Exception as error:
            raise self._not_saved(error) from error

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        self.wait()
        for later in self.steps:
            if later > step:
                self._store.delete(later)

    def _not_saved(self, error: Exception) -> StorageError:
        steps = self.steps
        left = f"the last one is {self._folder / str(steps[-1])}" if steps else ""
        return StorageError(
            f"A checkpoint cannot be written to {self._folder} ({_brief(error)}); "
            f"{left or 'there is none yet'}. Mend this, and start with --resume."
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """Loads a checkpoint.

        Args:
            step: One of `steps`.
            like: A state of the same structure, with any values.

        Returns:
            The state, in NumPy arrays, and its `progress`.

        Raises:
            UsageError: If it is of another model, damaged, or cannot be read. The
                message names another checkpoint that is intact.
        """
        zeros = lambda x: np.zeros(x.shape, x.dtype)
        state, progress = self._intact(step, jax.tree.map(zeros, _as_dict(like)))
        return TrainState(**state), progress

    def restore_variables(self, step: int) -> dict[str, Any]:
        """Loads the variables of an unknown model.

        Args:
            step: One of `steps`.

        Returns:
            `params` and `batch_stats`, averaged if the run has an average.

        Raises:
            UsageError: As for `restore`.
        """
        state, _ = self._intact(step, None)
        return state["average"] or {k: state[k] for k in ("params", "batch_stats")}

    def _intact(self, step: int, target: Any) -> tuple[dict[str, Any], dict]:
        try:
            return self._read(step, target)
        except _DamagedError as error:
            path = self._folder / str(step)
            hint = self._intact_instead_of(step, target)
            raise UsageError(f"{path} {error}. {hint}") from error

    def _read(self, step: int, target: Any) -> tuple[dict[str, Any], dict]:
        path = self._folder / str(step)
        # (Version 0.2.0 saved none.)
        has_checksums = (path / _CHECKSUMS).exists()
        names = (_PROGRESS, _CHECKSUMS) if has_checksums else (_PROGRESS,)
        try:
            if target is not None:
                check_alike(self._store.shapes(step), target, path)
            state, documents = self._store.load(step, target, names)
        except UsageError:
            raise
        except Exception as error:  # Orbax raises anything here.
            raise _DamagedError(f"cannot be read ({_brief(error)})") from error
        progress = documents[_PROGRESS]
        if has_checksums:
            found = _checksums(state, progress)
            if target is None:
                # In this case the structure of the optimizer's state is unknown.
                found.pop("opt_state")
            _compare(found, documents[_CHECKSUMS])
        return state, progress

    def _intact_instead_of(self, step: int, target: Any) -> str:
        """A sentence with the last other checkpoint that can be read."""
        for other in reversed(self.steps):
            if other == step:
                continue
            try:
                self._read(other, target)
            except (UsageError, _DamagedError):
                continue
            name = "best" if other == self.best_step else str(other)
            return (
                f"The checkpoint after step {other} is intact: use it with "
                f"--checkpoint={name}."
            )
        return "There is no other intact checkpoint."


class _DamagedError(Exception):
    """The files of a checkpoint have changed."""


def check_alike(found: Any, expected: Any, path: Path) -> None:
    """Compares names and shapes of a checkpoint with those of the run's model.

    Args:
        found: Metadata of the checkpoint.
        expected: A tree of arrays.
        path: The path of the checkpoint, for the message.

    Raises:
        UsageError: With the first path that differs.
    """

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        # The optimizer's state has lists there and tuples here; it follows the others.
        tree = {name: part for name, part in tree.items() if name != "opt_state"}
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {
            jax.tree_util.keystr(key, simple=True, separator="/"): tuple(leaf.shape)
            for key, leaf in leaves
        }

    there, wanted = shapes(found), shapes(expected)
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


def _checksums(
    tree: Mapping[str, Any], progress: Mapping[str, Any]
) -> dict[str, dict[str, int]]:
    """By part, CRC-32s of each array with its shape and dtype, and of these sums."""
    sums = json.dumps(dict(progress), sort_keys=True).encode()
    found = {"progress": {"": zlib.crc32(sums)}}
    for part, values in tree.items():
        leaves = jax.tree_util.tree_leaves_with_path(values)
        found[part] = {}
        for i, (key, leaf) in enumerate(leaves):
            x = np.asarray(leaf)
            # (The names in the optimizer's state are Optax's and may change.)
            path = jax.tree_util.keystr(key, simple=True, separator="/")
            header = f"{x.dtype.name}{x.shape}".encode()
            data: Any = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
            name = str(i) if part == "opt_state" else path
            found[part][name] = zlib.crc32(data, zlib.crc32(header))
    return found


def _compare(found: Mapping[str, Any], saved: Any) -> None:
    """Raises a `_DamagedError` with the name of the first array that differs."""
    for part, values in found.items():
        expected = saved.get(part, {})
        for name in sorted(values.keys() | expected.keys()):
            if values.get(name) != expected.get(name):
                path = f"{part}/{name}".rstrip("/")
                raise _DamagedError(f"is damaged: the checksum of {path} differs")


def _brief(error: Exception) -> str:
    # TensorStore names the error of the system at the end of a long text.
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"
