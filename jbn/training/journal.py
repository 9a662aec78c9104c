"""Writes the results of a run: terminal, metrics, TensorBoard, pictures."""

import contextlib
import datetime
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jbn.training import hosts
from jbn.training.metrics import Line, MetricsFile, Sums, peak_memory, show
from jbn.training.report import Events, Report
from jbn.training.setup import Setup


class Journal:
    """Reports a run. Only the first of several processes writes.

    Args:
        setup: The run.
        workdir: Its folder.
        done: Steps so far; lines of later steps are dropped.
    """

    def __init__(self, setup: Setup, workdir: Path, done: int):
        config, metric = setup.config, setup.task.metric
        self.workdir = workdir
        self._setup, self._metric, self._first = setup, metric, hosts.is_first()
        self._metrics = MetricsFile(workdir / "metrics.jsonl")
        self._progress = MetricsFile(workdir / "progress.jsonl")
        if self._first:
            self._metrics.truncate(done)
            self._progress.truncate(done)
        self.history = [x for x in self._metrics.read() if x["step"] <= done]
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
        self._start, self._done = time.monotonic(), done
        self._last = self._start, done

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

    def start_clock(self, done: int) -> None:
        """Starts to measure the speed of the run, after compilation."""
        self._start, self._done = time.monotonic(), done
        self.restart(done)

    def restart(self, done: int) -> None:
        """Starts to measure the speed of training, after an evaluation."""
        self._last = time.monotonic(), done

    def advance(self, done: int, metrics: Mapping[str, Any]) -> None:
        """Reports a dispatch in the bar, and every `log_every` seconds elsewhere.

        Args:
            done: Steps, including it.
            metrics: Of its steps.
        """
        if not self._first:
            return
        self._bar.update(done - self._bar.n)
        now = time.monotonic()
        seconds = now - self._last[0]
        is_due = seconds >= self._setup.config.log_every
        if self._bar.disable and not is_due:
            return
        line = self._line(done, metrics, now)
        self._bar.set_description(f"epoch {self._epoch(done):.4g}", refresh=False)
        self._bar.set_postfix_str(_brief(line), refresh=False)
        if not is_due:
            return
        self._last = now, done
        self._progress.append(line)
        self._events.write(line, {})
        if self._bar.disable:
            left = datetime.timedelta(seconds=round(line["seconds_left"]))
            total = self._setup.total_steps
            self.write(f"step {done}/{total}  {_brief(line)}  {left} left")

    def append(self, line: Line) -> None:
        """Adds an evaluation to the metrics. Call it before the checkpoint is saved."""
        self.history.append(line)
        if self._first:
            self._metrics.append(line)

    def show(self, line: Line, figures: Callable[[], Mapping[str, Any]]) -> None:
        """Reports an evaluation, with pictures every half minute and at the end."""
        if not self._first:
            return
        drawn: Mapping[str, Any] = {}
        if line["step"] == self._setup.total_steps or self._report.is_due():
            drawn = figures()
        self._report.figures |= drawn
        self._events.write(line, drawn)
        self.write(f"{self._title(line)}  {show(line, self._metric)}")

    def add_start(self, environment: Mapping[str, Any], done: int) -> None:
        """Records that a process has started to train, in `starts.jsonl`."""
        if self._first:
            starts = MetricsFile(self.workdir / "starts.jsonl")
            starts.append({"step": done, **environment})

    def _title(self, line: Line) -> str:
        config = self._setup.config
        if config.steps is None and config.eval_every is None:
            total = config.epochs
            return f"epoch {line['epoch']:{len(str(total))}}/{total}"
        total = self._setup.total_steps
        return f"step {line['step']:{len(str(total))}}/{total}"

    def _line(self, done: int, metrics: Mapping[str, Any], now: float) -> Line:
        setup = self._setup
        sums = Sums()
        sums.add_steps(metrics)
        found = setup.task.summarize(sums.values)
        before, start = self._last[1], self._last[0]
        rows = setup.rows_per_step
        pace = (now - self._start) / max(done - self._done, 1)
        return {
            "epoch": round(self._epoch(done), 4),
            "step": done,
            "loss": found[getattr(setup.task, "loss", "loss")],
            "learning_rate": setup.learning_rate(done),
            "examples_per_second": round(rows * (done - before) / (now - start), 1),
            "seconds_left": round(pace * (setup.total_steps - done), 1),
            "peak_memory_bytes": peak_memory(),
        }

    def _epoch(self, done: int) -> float:
        return done / self._setup.steps_per_epoch


def _brief(line: Line) -> str:
    return (
        f"loss {line['loss']:.4f}  lr {line['learning_rate']:.3g}  "
        f"{line['examples_per_second']:,.0f} examples/s"
    )
