"""Everything that a run computes with: devices, data, task and compiled steps."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from jbn.training.batches import Plan, permutation, plan_epoch
from jbn.training.build import make_task, open_dataset, row_multiple
from jbn.training.config import Config
from jbn.training.data import Dataset
from jbn.training.devices import select_devices
from jbn.training.evaluation import Evaluation, steps_per_dispatch
from jbn.training.executor import Executor
from jbn.training.loader import ahead, empty_chunk, load
from jbn.training.state import TrainState
from jbn.training.step import create_state, initialize, make_train_step
from jbn.training.tasks import Task


@dataclasses.dataclass(frozen=True)
class Setup:
    """The parts of a run, before its first step.

    Attributes:
        config: What it was started with.
        executor: Its devices.
        dataset: Its data.
        task: What is trained.
        evaluation: The evaluation on the test split.
        train_steps: The compiled training step, repeated over batches.
        steps_per_epoch: Batches in an epoch.
        dispatch: Batches that are handed to the devices at once.
    """

    config: Config
    executor: Executor
    dataset: Dataset
    task: Task
    evaluation: Evaluation
    train_steps: Any
    steps_per_epoch: int
    dispatch: int

    @property
    def total_steps(self) -> int:
        """The number of steps at the end of the run."""
        return self.config.epochs * self.steps_per_epoch

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        averaged = self.config.ema_decay is not None
        return initialize(self.task, self.config.seed, averaged=averaged)

    def state_shapes(self) -> TrainState:
        """The shapes and dtypes of a state, without computing one."""
        seed, averaged = self.config.seed, self.config.ema_decay is not None
        return jax.eval_shape(lambda: create_state(self.task, seed, averaged=averaged))

    def compile(self, state: TrainState) -> TrainState:
        """Compiles the training step, by a dispatch that changes nothing."""
        plan = self._plan(1)
        share = self.executor.share(plan.num_rows)
        # Batches of weight zero leave the state as it is.
        nothing = empty_chunk(self.dataset.train, plan, self.dispatch, share=share)
        return self.train_steps(state, self.executor.put_batches(nothing))[0]

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """Brings the batches of some steps to the devices, one dispatch ahead.

        Args:
            start: Steps before them.
            stop: The step after them, in the same epoch.

        Yields:
            The number of steps in a dispatch, and its batches.
        """
        epoch, offset = divmod(start, self.steps_per_epoch)
        plan = self._plan(epoch + 1).part(offset, offset + stop - start)
        share = self.executor.share(plan.num_rows)
        chunks = load(
            self.dataset.train, plan, self.dispatch, share=share, epoch=epoch + 1
        )
        return ahead(chunks, self.executor.put_batches)

    def _plan(self, epoch: int) -> Plan:
        return _plan_epoch(self.config, self.dataset, self.executor, epoch)


def prepare(config: Config) -> Setup:
    """Makes the parts of a run.

    Args:
        config: From `parse_config`.

    Returns:
        The parts. Nothing has been written to the folder of the run.

    Raises:
        UsageError: If devices, data, model and flags do not fit together.
    """
    devices = select_devices(config.accelerator, config.num_devices)
    executor = Executor(devices, config.parallel)
    dataset = open_dataset(config)
    plan = _plan_epoch(config, dataset, executor, 1)  # All are of one shape.
    task = make_task(config, dataset, executor, steps_per_epoch=plan.num_steps)
    step = make_train_step(task, seed=config.seed, ema_decay=config.ema_decay)
    evaluation = Evaluation(
        task,
        executor,
        dataset,
        batch_size=config.batch_size,
        most_steps=config.steps_per_dispatch,
        seed=config.seed,
        multiple=row_multiple(config, len(devices)),
    )
    return Setup(
        config=config,
        executor=executor,
        dataset=dataset,
        task=task,
        evaluation=evaluation,
        train_steps=executor.train(step),
        steps_per_epoch=plan.num_steps,
        dispatch=steps_per_dispatch(dataset.train, plan, config.steps_per_dispatch),
    )


def _plan_epoch(
    config: Config, dataset: Dataset, executor: Executor, epoch: int
) -> Plan:
    order = permutation(config.seed, epoch, len(dataset.train))
    multiple = row_multiple(config, len(executor.devices))
    return plan_epoch(order, config.batch_size, multiple=multiple)
