"""The training loop: steps, evaluations and checkpoints, until the run ends."""

import contextlib
import dataclasses
import errno
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jbn.training import hosts
from jbn.training.checkpoint import Checkpoints
from jbn.training.config import (
    Config,
    Period,
    claim_workdir,
    parse_config,
    period_of,
    resume_flags,
)
from jbn.training.devices import describe
from jbn.training.environment import environment
from jbn.training.errors import StorageError
from jbn.training.guard import Guard
from jbn.training.journal import Journal
from jbn.training.metrics import Sums, peak_memory
from jbn.training.report import Profile
from jbn.training.run import find_checkpoint, require_dataset, require_same_data
from jbn.training.setup import Setup, prepare
from jbn.training.state import TrainState
from jbn.training.workdir import reserved


# The exit status after SIGTERM: EX_TEMPFAIL of sysexits.h, for "start it again".
NOT_FINISHED = 75

_NOT_WRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.ENOTDIR, errno.EFBIG),
)

# An evaluation saves a checkpoint if the last one is older than this, in seconds.
_SAVE_SECONDS = 10.0


def main(args: Sequence[str], prog: str = "jbn train") -> int:
    """Runs the command `train`; returns the exit status."""

    def run() -> int:
        config = parse_config(args, prog=prog)
        hosts.connect(config)
        return train(config)

    return hosts.end_at_once(run)


def train(config: Config) -> int:
    """Trains with the given configuration.

    Writes configuration, metrics, curves and checkpoints to the folder of the run.

    Args:
        config: From `parse_config`.

    Returns:
        The exit status.

    Raises:
        UsageError: If the run cannot start.
        NonFiniteLossError: If too many steps in a row were not finite.
    """
    with contextlib.ExitStack() as stack:
        first = hosts.is_first()
        folder = str(stack.enter_context(reserved(config))) if first else ""
        if first and config.resume:
            require_dataset(Path(folder), config)
        setup = prepare(config)
        workdir = Path(hosts.from_first(folder))
        try:
            if first:
                description = setup.dataset.describe()
                if config.resume:
                    require_same_data(workdir, description)
                claim_workdir(dataclasses.replace(config, workdir=workdir))
                description.save(workdir / "dataset.json")
            return _train(setup, workdir)
        except OSError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            raise StorageError(
                f"{error.filename or workdir} cannot be written: {error.strerror}. "
                f"Make room; {resume_flags(config, workdir)} goes on after the last "
                "checkpoint."
            ) from error


def _train(setup: Setup, workdir: Path) -> int:
    """Trains in the run's own folder; returns the exit status."""
    config, first = setup.config, hosts.is_first()
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints",
                higher_is_better=setup.task.metric.higher_is_better,
            )
        )
        state, done, progress = _start(setup, checkpoints, workdir)
        preemption = stack.enter_context(hosts.Preemption())
        journal = stack.enter_context(Journal(setup, workdir, done))
        journal.add_start(environment(setup.executor.devices), done)
        _introduce(journal, setup, state, done)
        folder = workdir / "profile" if config.profile and first else None
        profile = stack.enter_context(Profile(folder))
        loop = Loop(setup, checkpoints, journal, preemption, profile)
        finished = loop.run(state, done, progress)
        best_step = checkpoints.best_step
    if finished:
        _conclude(journal, setup, best_step)
        return 0
    interrupted = preemption.signal == signal.SIGINT
    journal.write(
        f"stopped by {'Ctrl-C' if interrupted else 'SIGTERM'} after step {loop.done}, "
        f"which is saved; {resume_flags(config, workdir)} goes on"
    )
    return 130 if interrupted else NOT_FINISHED


def _start(
    setup: Setup, checkpoints: Checkpoints, workdir: Path
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state to start from, its step, and the sums over its epoch so far."""
    config = setup.config
    if not config.resume or checkpoints.last_step is None:
        return setup.initial_state(), 0, {}
    done = find_checkpoint(checkpoints, workdir, config.checkpoint)
    state, progress = checkpoints.restore(done, setup.state_shapes())
    checkpoints.delete_after(done)
    return state, done, progress


class Due:
    """Tells whether a period is over; the first of several processes decides.

    Args:
        period: The period, or `None` if only `otherwise` of `is_due` applies.
    """

    def __init__(self, period: Period | None):
        self.period = period
        self._step, self._time = 0, -math.inf

    def restart(self, step: int) -> None:
        """Begins another period."""
        self._step, self._time = step, time.monotonic()

    def is_due(self, step: int, otherwise: float | None = None) -> bool:
        """Whether the period is over.

        Args:
            step: The steps so far.
            otherwise: Seconds if there is no period; `None` for never.
        """
        if self.period is not None and self.period.steps is not None:
            return step - self._step >= self.period.steps
        seconds = self.period.seconds if self.period is not None else otherwise
        if seconds is None:
            return False
        return hosts.agree(time.monotonic() - self._time >= seconds)


class Loop:
    """The loop of a run.

    Args:
        setup: What to train.
        checkpoints: Where states are saved.
        journal: Where results go.
        preemption: Tells when to stop early.
        profile: Called after each dispatch.
    """

    def __init__(
        self,
        setup: Setup,
        checkpoints: Checkpoints,
        journal: Journal,
        preemption: hosts.Preemption,
        profile: Profile,
    ):
        self._setup, self._checkpoints, self._journal = setup, checkpoints, journal
        self._preemption, self._profile = preemption, profile
        self._guard = Guard(
            setup.config.max_skipped, setup.steps_per_epoch, checkpoints.describe
        )
        self._state: Any = None
        self._sums = Sums()
        self._seconds, self._steps = 0.0, 0  # Since the last evaluation.
        self._stopping = False
        self._evaluations = Due(period_of(setup.config, "eval_every"))
        self._saves = Due(period_of(setup.config, "save_every"))
        self.done = 0

    def run(self, state: TrainState, done: int, progress: dict[str, Any]) -> bool:
        """Trains to the end of the run.

        Args:
            state: The state to start from.
            done: Steps before.
            progress: Sums over the steps since the last evaluation.

        Returns:
            Whether the end was reached.
        """
        setup = self._setup
        self._state = setup.executor.put(state)
        self.done = done
        self._sums = Sums(progress)
        if done < setup.total_steps:
            self._state = setup.compile(self._state)
        self._evaluations.restart(done)
        self._saves.restart(done)
        self._journal.start_clock(done)
        while self.done < setup.total_steps and not self._settled():
            self._train_until(self._next_stop())
            if self._is_evaluation_due():
                self._evaluate()
            if self._stopping and self.done < setup.total_steps:
                if self._checkpoints.last_step != self.done:
                    self._save()
                return False
        self._checkpoints.flush()
        return True

    def _next_stop(self) -> int:
        """The last step of the current stretch, at most the end of the epoch."""
        per_epoch = self._setup.steps_per_epoch
        epoch_end = (self.done // per_epoch + 1) * per_epoch
        stops = [epoch_end, self._setup.total_steps]
        period = self._evaluations.period
        if period is not None and period.steps is not None:
            stops.append((self.done // period.steps + 1) * period.steps)
        return min(stops)

    def _is_evaluation_due(self) -> bool:
        period, done = self._evaluations.period, self.done
        if done == self._setup.total_steps:
            return True
        if period is None:
            return done % self._setup.steps_per_epoch == 0
        if period.steps is not None:
            return done % period.steps == 0
        return self._evaluations.is_due(done)

    def _settled(self) -> bool:
        """Whether the metric has not improved for `patience` evaluations."""
        patience, metric = self._setup.config.patience, self._setup.task.metric
        if patience is None or not self._journal.history:
            return False
        sign = 1 if metric.higher_is_better else -1
        values = [sign * line[f"test_{metric.name}"] for line in self._journal.history]
        return len(values) - 1 - int(np.argmax(values)) >= patience

    def _train_until(self, stop: int) -> None:
        """Trains to a step of this epoch, or until a save or an evaluation is due."""
        setup = self._setup
        start = time.perf_counter()
        for count, train_steps, batches in setup.batches(self.done, stop):
            self._state, metrics = train_steps(self._state, batches)
            metrics = {k: v[:count] for k, v in setup.executor.get(metrics).items()}
            self._guard.check(metrics, self.done)
            self._sums.add_steps(metrics)
            self.done += count
            self._steps += count
            self._journal.advance(self.done, metrics)
            self._profile.next()
            self._stopping = self._preemption.reached()
            if self._stopping or self._is_evaluation_due():
                break
            if self.done < stop and self._saves.is_due(self.done):
                self._save()
        self._seconds += time.perf_counter() - start

    def _save(self) -> None:
        """Saves the state between two evaluations."""
        state = self._setup.executor.get(self._state)
        self._checkpoints.save(state, progress=self._sums.as_json())
        self._saves.restart(self.done)

    def _evaluate(self) -> None:
        """Evaluates, reports and saves the state."""
        setup, task = self._setup, self._setup.task
        state = setup.executor.get(self._state)
        if state.average or task.recalibrates:
            variables = setup.evaluation.recalibrated(state.variables)
            state = state.with_variables(variables)
            self._state = setup.executor.put(state)
        sums = setup.evaluation(state.variables)
        test = task.summarize(sums)
        self._guard.check_test(test, self.done)
        line = self._line(test)
        # In this order: resuming drops a line without a checkpoint.
        self._journal.append(line)
        self._checkpoints.hold(state, metric=test[task.metric.name])
        is_last = self.done == setup.total_steps
        if is_last or self._stopping or self._saves.is_due(self.done, _SAVE_SECONDS):
            self._checkpoints.flush()
            self._saves.restart(self.done)
        pictures = lambda: task.pictures(state.variables, sums, setup.dataset)
        self._journal.show(line, pictures)
        self._sums, self._seconds, self._steps = Sums(), 0.0, 0
        self._evaluations.restart(self.done)
        self._journal.restart(self.done)

    def _line(self, test: dict[str, Any]) -> dict[str, Any]:
        """The metrics since the last evaluation."""
        setup, steps, seconds = self._setup, self._steps, self._seconds
        train = setup.task.summarize(self._sums.values)
        examples = steps / setup.steps_per_epoch * len(setup.dataset.train)
        return {
            "epoch": _epoch(self.done, setup),
            "step": self.done,
            **{f"train_{name}": value for name, value in train.items()},
            **{f"test_{name}": value for name, value in test.items()},
            "skipped": int(self._sums.values["num_skipped"]),
            "examples_per_second": round(examples / seconds, 1),
            "step_ms": round(1e3 * seconds / steps, 3),
            "learning_rate": setup.learning_rate(self.done - 1),
            "peak_memory_bytes": peak_memory(),
        }


def _introduce(journal: Journal, setup: Setup, state: TrainState, done: int) -> None:
    config, dataset = setup.config, setup.dataset
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    journal.write(
        f"data     {dataset.name}: {len(dataset.train):,} training and "
        f"{len(dataset.test):,} test images"
        + (f" in {len(dataset.classes)} classes" if dataset.classes else "")
        + f"\nmodel    {config.model}: {num_params:,} parameters\n"
        f"devices  {describe(list(setup.executor.devices))}, by {config.parallel}\n"
        f"workdir  {journal.workdir}"
    )
    for note in setup.notes():
        journal.write(f"note     {note}")
    if done:
        epoch = done / setup.steps_per_epoch
        journal.write(f"resuming after step {done}, in epoch {epoch:.4g}")


def _epoch(done: int, setup: Setup) -> float | int:
    """The number of epochs; an integer if it is whole."""
    whole, rest = divmod(done, setup.steps_per_epoch)
    return round(done / setup.steps_per_epoch, 4) if rest else whole


def _conclude(journal: Journal, setup: Setup, best_step: int | None) -> None:
    metric, history = setup.task.metric, journal.history
    final = history[-1]
    best = next((line for line in history if line["step"] == best_step), final)
    name = f"test_{metric.name}"
    if final["step"] < setup.total_steps:
        journal.write(
            f"stopped early: no better test {metric.label} in the last "
            f"{setup.config.patience} evaluations"
        )
    journal.write(
        f"saved in {journal.workdir}: config.json, metrics.jsonl, pictures, events/, "
        f"and checkpoints/ with epoch {final['epoch']} (the last) and epoch "
        f"{best['epoch']} (the best on the test set, {metric.show(best[name])})\n"
        f"final test {metric.label}: {metric.show(final[name])} "
        f"(epoch {final['epoch']})"
    )
