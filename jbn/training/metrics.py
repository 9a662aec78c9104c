"""Metrics of a run: sums over steps, and JSON lines."""

import dataclasses
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbn.training.errors import UsageError


Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Metric:
    """The name, format and order of a metric.

    Attributes:
        name: Name in the files of metrics, after `train_` or `test_`.
        label: Name for people.
        percent: Whether to show it as a percentage.
        higher_is_better: Which of two values is better.
    """

    name: str
    label: str
    percent: bool = False
    higher_is_better: bool = True

    def show(self, value: float) -> str:
        """The value as text."""
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4g}"


class Sums:
    """Sums over the steps of an epoch, in float64.

    Args:
        start: Sums over its first steps, from an earlier process.
    """

    def __init__(self, start: Mapping[str, float] | None = None):
        self.values: dict[str, Any] = dict(start or {})

    def add(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Adds the sums over further steps."""
        for name, value in metrics.items():
            total = self.values.get(name, 0) + _wide(value)
            self.values[name] = np.asarray(total)

    def add_steps(self, metrics: Mapping[str, np.ndarray]) -> None:
        """Adds further steps, given one by one."""
        each = {**metrics, "num_skipped": metrics["skipped"] > 0}
        self.add({k: np.asarray(np.sum(_wide(v), axis=0)) for k, v in each.items()})

    def as_json(self) -> dict[str, float]:
        """The sums as plain numbers."""
        return {name: value.item() for name, value in self.values.items()}


class MetricsFile:
    """A file of JSON lines, each with its `step`.

    Args:
        path: The path of the file.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, line: Line) -> None:
        """Adds a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[Line]:
        """Reads all lines, except an incomplete last one.

        Raises:
            UsageError: If any other line is damaged.
        """
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")
        return [self._parse(i, line) for i, line in enumerate(lines, 1)]

    def _parse(self, number: int, text: bytes) -> Line:
        try:
            line = json.loads(text)
            if isinstance(line["step"], int):
                return line
        except (ValueError, KeyError, TypeError):  # UnicodeDecodeError is a ValueError.
            pass
        raise UsageError(
            f"{self.path} is damaged: line {number} is not one that a run wrote. "
            "Delete the line to continue without it."
        )

    def truncate(self, step: int) -> None:
        """Drops the lines after `step`, written by a run that ended before a save."""
        kept = [line for line in self.read() if line["step"] <= step]
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        new.replace(self.path)


def peak_memory() -> int:
    """The peak memory of a device, in bytes; on a CPU, of the whole process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return int(max(peaks))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def show(line: Line, metric: Metric) -> str:
    """An epoch as a line of text."""
    losses = [name for name in line if name.startswith("train_") and "loss" in name]
    parts = [
        f"{name.removeprefix('train_').replace('_', ' ')} {line[name]:.4f}"
        for name in losses
    ]
    for split in ("train", "test"):
        value = line.get(f"{split}_{metric.name}")
        if value is not None:
            name = split if metric.name == "accuracy" else f"{split} {metric.name}"
            shown = f"{100 * value:6.2f} %" if metric.percent else f"{value:8.4f}"
            parts.append(f"{name} {shown}")
    if line.get("skipped"):
        parts.append(f"{line['skipped']} steps skipped")
    parts.append(f"{line['examples_per_second']:,.0f} examples/s")
    return "  ".join(parts)


def _wide(value: Any) -> np.ndarray:
    value = np.asarray(value)
    whole = np.issubdtype(value.dtype, np.integer) or value.dtype == bool
    return value.astype(np.int64 if whole else np.float64)
