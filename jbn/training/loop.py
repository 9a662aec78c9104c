"""The training loop: steps, evaluations and checkpoints, until the run ends."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jbn.training import hosts
from jbn.training.checkpoint import Checkpoints
from jbn.training.config import Config, claim_workdir, parse_config
from jbn.training.devices import describe
from jbn.training.guard import Guard
from jbn.training.journal import Journal
from jbn.training.metrics import Sums, peak_memory
from jbn.training.report import Profile
from jbn.training.setup import Setup, prepare
from jbn.training.state import TrainState


def main(args: Sequence[str], prog: str = "jbn train") -> int:
    """Runs the command `train`; returns the exit status."""

    def run() -> int:
        config = parse_config(args, prog=prog)
        hosts.connect(config)
        return train(config)

    return hosts.end_at_once(run)


def train(config: Config) -> int:
    """Trains as `config` says.

    Writes configuration, metrics, curves and checkpoints to the folder of the run.

    Args:
        config: From `parse_config`.

    Returns:
        The exit status.

    Raises:
        UsageError: If the run cannot start as asked.
        NonFiniteLossError: If too many steps in a row were not finite.
    """
    setup = prepare(config)
    first = hosts.is_first()
    workdir = Path(hosts.from_first(str(claim_workdir(config)) if first else ""))
    if first:
        setup.dataset.describe().save(workdir / "dataset.json")
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints",
                higher_is_better=setup.task.metric.higher_is_better,
            )
        )
        preemption = stack.enter_context(hosts.Preemption())
        done, progress = checkpoints.last_step or 0, {}
        journal = stack.enter_context(Journal(setup, workdir, done))
        if done:
            state, progress = checkpoints.restore(done, setup.state_shapes())
        else:
            state = setup.initial_state()
        _introduce(journal, setup, state, done)
        folder = workdir / "profile" if config.profile and first else None
        profile = stack.enter_context(Profile(folder))
        loop = Loop(setup, checkpoints, journal, preemption, profile)
        finished = loop.run(state, done, progress)
        best_step = checkpoints.best_step
    if finished:
        _conclude(journal, setup, best_step)
    else:
        journal.write(
            f"stopped by SIGTERM after step {loop.done}, which is saved; "
            f"--resume --workdir={workdir} goes on"
        )
    return 0


class Loop:
    """The loop of a run.

    Args:
        setup: What to train.
        checkpoints: Where states are saved.
        journal: Where results go.
        preemption: Says when to stop before the end.
        profile: Is told of each dispatch.
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
        self._saved, self._stopping = 0, False
        self.done = 0

    def run(self, state: TrainState, done: int, progress: dict[str, float]) -> bool:
        """Trains to the end.

        Args:
            state: Where to start.
            done: Steps before.
            progress: Sums over the steps since the last evaluation.

        Returns:
            Whether the end was reached.
        """
        setup = self._setup
        self._state = setup.executor.put(state)
        self.done = self._saved = done
        self._sums = Sums(progress)
        if done < setup.total_steps:
            self._state = setup.compile(self._state)
        while self.done < setup.total_steps:
            stop = (self.done // setup.steps_per_epoch + 1) * setup.steps_per_epoch
            if not self._train_until(stop):
                return False
            self._evaluate()
            if self._stopping and self.done < setup.total_steps:
                return False
        return True

    def _train_until(self, stop: int) -> bool:
        """Trains to a step of this epoch; returns whether it got there."""
        setup, config = self._setup, self._setup.config
        self._journal.start_epoch(self.done // setup.steps_per_epoch + 1)
        start = time.perf_counter()
        for count, batches in setup.batches(self.done, stop):
            self._state, metrics = setup.train_steps(self._state, batches)
            metrics = {k: v[:count] for k, v in setup.executor.get(metrics).items()}
            self._guard.check(metrics, self.done)
            self._sums.add_steps(metrics)
            self.done += count
            self._steps += count
            self._journal.advance(count)
            self._profile.next()
            self._stopping = self._preemption.reached()
            due = config.save_every and self.done - self._saved >= config.save_every
            if self.done < stop and (due or self._stopping):
                self._save_in_between()
            if self._stopping:
                break
        self._seconds += time.perf_counter() - start
        return self.done == stop

    def _save_in_between(self) -> None:
        state = self._setup.executor.get(self._state)
        self._checkpoints.save(state, progress=self._sums.as_json())
        self._saved = self.done

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
        # In this order: on resuming, a line without a checkpoint is dropped.
        self._journal.append(line)
        self._checkpoints.save(state, metric=test[task.metric.name])
        self._saved = self.done
        pictures = lambda: task.pictures(state.variables, sums, setup.dataset)
        self._journal.show(line, pictures)
        self._sums, self._seconds, self._steps = Sums(), 0.0, 0

    def _line(self, test: dict[str, float]) -> dict[str, Any]:
        """The metrics since the last evaluation."""
        setup, steps, seconds = self._setup, self._steps, self._seconds
        train = setup.task.summarize(self._sums.values)
        examples = steps / setup.steps_per_epoch * len(setup.dataset.train)
        return {
            "epoch": self.done // setup.steps_per_epoch,
            "step": self.done,
            **{f"train_{name}": value for name, value in train.items()},
            **{f"test_{name}": value for name, value in test.items()},
            "skipped": int(self._sums.values["num_skipped"]),
            "examples_per_second": round(examples / seconds, 1),
            "step_ms": round(1e3 * seconds / steps, 3),
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
    if done:
        epoch = done / setup.steps_per_epoch
        journal.write(f"resuming after step {done}, in epoch {epoch:.4g}")


def _conclude(journal: Journal, setup: Setup, best_step: int | None) -> None:
    metric, history = setup.task.metric, journal.history
    final = history[-1]
    best = next(line for line in history if line["step"] == best_step)
    name = f"test_{metric.name}"
    journal.write(
        f"saved in {journal.workdir}: config.json, metrics.jsonl, pictures, events/, "
        f"and checkpoints/ with epoch {final['epoch']} (the last) and epoch "
        f"{best['epoch']} (the best on the test set, {metric.show(best[name])})\n"
        f"final test {metric.label}: {metric.show(final[name])} "
        f"(epoch {final['epoch']})"
    )
