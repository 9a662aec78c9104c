"""Where the results of a run go: terminal, metrics, TensorBoard, pictures."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jbn.training import hosts
from jbn.training.metrics import Line, MetricsFile, show
from jbn.training.report import Events, Report
from jbn.training.setup import Setup


class Journal:
    """Reports a run. Only the first of several processes writes.

    Args:
        setup: The run.
        workdir: Its folder.
        done: Steps before; lines of later ones are dropped.
    """

    def __init__(self, setup: Setup, workdir: Path, done: int):
        config, metric = setup.config, setup.task.metric
        self.workdir = workdir
        self._setup, self._metric, self._first = setup, metric, hosts.is_first()
        self._file = MetricsFile(workdir / "metrics.jsonl")
        if self._first:
            self._file.truncate(done)
        self.history = self._file.read()
        title = f"{config.model} on {setup.dataset.name}"
        self._report = Report(workdir, metric, title)
        self._events = Events(workdir / "events" if self._first else None)
        self._bar = tqdm(
            total=setup.total_steps,
            initial=done,
            unit=" steps",
            leave=False,
            disable=None if self._first else True,  # None: if there is no terminal.
        )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Journal":
        if self._first:
            self._stack.callback(self._report.draw, self.history)
        self._stack.enter_context(self._events)
        self._stack.enter_context(self._bar)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def write(self, text: str) -> None:
        """Prints lines, above the bar."""
        if self._first:
            tqdm.write(text)

    def start_epoch(self, epoch: int) -> None:
        """Names the epoch in the bar."""
        self._bar.set_description(f"epoch {epoch}")

    def advance(self, steps: int) -> None:
        """Moves the bar."""
        self._bar.update(steps)

    def append(self, line: Line) -> None:
        """Adds an epoch to the metrics. To be called before it is saved."""
        self.history.append(line)
        if self._first:
            self._file.append(line)

    def show(self, line: Line, figures: Callable[[], Mapping[str, Any]]) -> None:
        """Shows an epoch to people, with pictures every half minute and at the end."""
        if not self._first:
            return
        drawn: Mapping[str, Any] = {}
        if line["step"] == self._setup.total_steps or self._report.is_due():
            drawn = figures()
        self._report.figures |= drawn
        self._events.write(line, drawn)
        total = self._setup.config.epochs
        epoch = f"{line['epoch']:{len(str(total))}}/{total}"
        self.write(f"epoch {epoch}  {show(line, self._metric)}")
