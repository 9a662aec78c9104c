"""Everything that a run computes with: devices, data, task and compiled steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn.linen import BatchNorm
from jbn.training.batches import Plan, chunks, permutation, plan_epoch
from jbn.training.build import (
    make_schedule,
    make_task,
    open_dataset,
    row_multiple,
    warmup_steps,
)
from jbn.training.config import Config, total_steps
from jbn.training.data import Dataset
from jbn.training.devices import select_devices
from jbn.training.errors import UsageError
from jbn.training.evaluation import Evaluation, steps_per_dispatch
from jbn.training.executor import Executor
from jbn.training.initial import initialize_from
from jbn.training.loader import ahead, empty_chunk, load
from jbn.training.state import TrainState
from jbn.training.step import (
    create_state,
    initialize,
    make_train_step,
    without_padding,
)
from jbn.training.tasks import Supervised, Task


# Steps of an epoch from which a second program, without masks, is worth compiling.
_WORTH_COMPILING = 100


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
        full_steps: The same for batches without padding; `None` if it would not be
            worth a second compilation.
        steps_per_epoch: Batches in an epoch.
        dispatch: Batches that are handed to the devices at once.
    """

    config: Config
    executor: Executor
    dataset: Dataset
    task: Task
    evaluation: Evaluation
    train_steps: Any
    full_steps: Any
    steps_per_epoch: int
    dispatch: int

    @property
    def total_steps(self) -> int:
        """The number of steps at the end of the run."""
        return total_steps(self.config, self.steps_per_epoch)

    @property
    def rows_per_step(self) -> float:
        """The mean number of examples in a step."""
        return len(self.dataset.train) / self.steps_per_epoch

    def learning_rate(self, done: int) -> float:
        """The learning rate of the step after so many."""
        return float(self._schedule(done))

    @functools.cached_property
    def _schedule(self) -> Callable[[int], Any]:
        return make_schedule(self.config, self.steps_per_epoch)

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        averaged = self.config.ema_decay is not None
        state = initialize(self.task, self.config.seed, averaged=averaged)
        if self.config.init_from is None:
            return state
        return initialize_from(self.config, jax.device_get(state))

    def state_shapes(self) -> TrainState:
        """The shapes and dtypes of a state, without computing one."""
        seed, averaged = self.config.seed, self.config.ema_decay is not None
        return jax.eval_shape(lambda: create_state(self.task, seed, averaged=averaged))

    def notes(self) -> list[str]:
        """What of the flags has no effect, or not the one that it seems to have."""
        found, config = [], self.config
        warmup = warmup_steps(config, self.steps_per_epoch)
        if config.warmup_epochs * self.steps_per_epoch > self.total_steps:
            epochs = self.total_steps / self.steps_per_epoch
            found.append(
                f"the warm-up of {config.warmup_epochs:g} epochs is longer than the "
                f"run of {epochs:.4g}, and is cut to {warmup} steps"
            )
        # Asked for as such, it is allowed: it makes many short steps.
        if config.batch_size == 1:
            why = _single_rows(config, self.executor, self.task)
            found += [why] if why else []
        return found

    def compile(self, state: TrainState) -> TrainState:
        """Compiles the training step, by dispatches that change nothing."""
        plan = self._plan(1)
        share = self.executor.share(plan.num_rows)
        # Batches of weight zero leave the state as it is.
        nothing = empty_chunk(self.dataset.train, plan, self.dispatch, share=share)
        batches = self.executor.put_batches(nothing)
        if self.full_steps is not None:
            self.full_steps(self.executor.put(state), batches)  # Of a copy.
        return self.train_steps(state, batches)[0]

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, Any, Any]]:
        """Brings the batches of some steps to the devices, one dispatch ahead.

        Args:
            start: Steps before them.
            stop: The step after them, in the same epoch.

        Yields:
            The number of steps in a dispatch, the function that runs them, and their
            batches.
        """
        epoch, offset = divmod(start, self.steps_per_epoch)
        plan = self._plan(epoch + 1).part(offset, offset + stop - start)
        share = self.executor.share(plan.num_rows)
        read = load(
            self.dataset.train, plan, self.dispatch, share=share, epoch=epoch + 1
        )
        # (Of all processes, which must run the same program.)
        padded = (not chunk.weights.all() for chunk in chunks(plan, self.dispatch))
        for is_padded, (count, batches) in zip(
            padded, ahead(read, self.executor.put_batches), strict=True
        ):
            is_full = self.full_steps is not None and not is_padded
            yield count, self.full_steps if is_full else self.train_steps, batches

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
    if config.batch_size > 1 and (why := _single_rows(config, executor, task)):
        raise UsageError(why)
    evaluation = Evaluation(
        task,
        executor,
        dataset,
        batch_size=config.batch_size,
        most_steps=config.steps_per_dispatch,
        seed=config.seed,
        multiple=row_multiple(config, len(devices)),
    )
    dispatch = steps_per_dispatch(dataset.train, plan, config.steps_per_dispatch)
    has_full = dispatch == 1 and plan.num_steps >= _WORTH_COMPILING
    return Setup(
        config=config,
        executor=executor,
        dataset=dataset,
        task=task,
        evaluation=evaluation,
        train_steps=executor.train(step),
        full_steps=executor.train(without_padding(step)) if has_full else None,
        steps_per_epoch=plan.num_steps,
        dispatch=dispatch,
    )


def _plan_epoch(
    config: Config, dataset: Dataset, executor: Executor, epoch: int
) -> Plan:
    order = permutation(config.seed, epoch, len(dataset.train))
    multiple = row_multiple(config, len(executor.devices))
    return plan_epoch(order, config.batch_size, multiple=multiple)


def _single_rows(config: Config, executor: Executor, task: Task) -> str | None:
    """A message about batches that a norm layer turns into constants, row by row."""
    options = config.norm_options
    if config.norm not in ("batch", "renorm", "ghost"):
        return None  # There are no statistics of a batch.
    if options.tau > 0 or options.min_weight >= 1:
        return None  # A single row is normalized by the running statistics, too.
    if config.norm == "renorm" and options.d_max > 0:
        return None
    devices = len(executor.devices)
    groups = devices // (config.bn_group_size or devices)
    if config.norm == "ghost":
        groups = options.num_groups
    parts = config.microbatches * groups
    if config.batch_size >= 2 * parts or _rows_of_an_image(task) > 1:
        return None
    flags = {
        "--microbatches": config.microbatches if config.microbatches > 1 else None,
        "--norm.num-groups": options.num_groups,
        "--bn-group-size": config.bn_group_size,
    }
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    return (
        f"--batch-size={config.batch_size} "
        + (f"with {' and '.join(given)} " if given else "")
        + "normalizes single rows: the outputs of the norm layers are constant, and "
        f"the model cannot learn. Use --batch-size={2 * parts} or more, or "
        "--norm.tau=8, which adds the running statistics."
    )


def _rows_of_an_image(task: Task) -> int:
    """The fewest rows that a batch norm of the model has for each image."""
    if not isinstance(task, Supervised):
        return 2
    rows = []

    def record(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ):
        if isinstance(context.module, BatchNorm) and args:
            rows.append(math.prod(args[0].shape[:-1]))
        return call(*args, **kwargs)

    # (In inference: some models have norms that are for training alone.)
    image = jnp.zeros((1, *task.image_shape))
    init = lambda: task.local_model.init(jax.random.key(0), image, train=False)
    with nn.intercept_methods(record):
        jax.eval_shape(init)
    return min(rows, default=2)
