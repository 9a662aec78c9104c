"""Trains a network with batch normalization: `python train.py --help`."""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from jbn.linen import BatchNorm
from jbn.models import MLP
from jbn.training.batches import Plan, chunks, permutation, plan_epoch
from jbn.training.checkpoint import Checkpoints
from jbn.training.config import Config, claim_workdir, parse_config
from jbn.training.data import load_dataset
from jbn.training.devices import describe, select_devices
from jbn.training.errors import NonFiniteLossError, UsageError
from jbn.training.executor import Executor, Run
from jbn.training.metrics import EpochMetrics, MetricsFile, plot_curves
from jbn.training.state import TrainState, create_state
from jbn.training.step import make_eval_step, make_train_step


EVAL_BATCH_SIZE = 1024


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line, or `args` in its place; returns the exit status."""
    try:
        train(parse_config(args))
    except (UsageError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("interrupted; --resume and --workdir=FOLDER go on", file=sys.stderr)
        return 130
    return 0


def train(config: Config) -> list[EpochMetrics]:
    """Trains as `config` says.

    Writes configuration, metrics, curves and checkpoints to the folder of the run.

    Args:
        config: From `parse_config`.

    Returns:
        The metrics of each epoch, those before a resumption included.
    """
    # ---- Devices and data ------------------------------------------------------------

    devices = select_devices(config.accelerator, config.num_devices)
    executor = Executor(devices, config.parallel)
    dataset = load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        manual_dir=config.manual_dir,
        image_size=config.image_size,
    )
    num_train, num_test = len(dataset.train), len(dataset.test)

    # ---- Model, optimizer, steps -----------------------------------------------------

    norm: Callable[..., Any] = functools.partial(
        BatchNorm, momentum=config.momentum, axis_name=executor.axis_name
    )
    model = MLP(num_classes=dataset.num_classes, norm=norm)
    # A hidden unit that is active for every example of a batch has a bias that the norm
    # takes away again: its gradient is zero, or 1e-8 after rounding. The usual epsilon,
    # 1e-8, makes a step of nearly full size of that noise, and after three epochs one
    # and four devices differ by 1e-2 in the loss of a step. With this one, by 1e-6.
    optimizer = optax.adam(config.learning_rate, eps=1e-5)
    state = create_state(model, optimizer, dataset.train.image.shape[1:], config.seed)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))

    train_step = make_train_step(model, optimizer, axis_name=executor.axis_name)
    eval_step = make_eval_step(model, axis_name=executor.axis_name)
    train_steps = executor.compile(train_step, donate=True)
    eval_steps = executor.compile(eval_step, donate=False)

    # ---- Where the results go --------------------------------------------------------

    workdir = claim_workdir(config)
    metrics_file = MetricsFile(workdir / "metrics.jsonl")
    print(
        f"data     {dataset.name}: {num_train:,} training and {num_test:,} test images "
        f"in {dataset.num_classes} classes\n"
        f"model    mlp: {num_params:,} parameters\n"
        f"devices  {describe(devices)}, by {config.parallel}\n"
        f"workdir  {workdir}",
        flush=True,
    )

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        done = checkpoints.last_epoch or 0
        if done:
            state = checkpoints.restore(done, state)
            print(f"resuming after epoch {done}", flush=True)
        metrics_file.truncate(done)
        history = metrics_file.read()

        # ---- Data and state to the devices, and compilation --------------------------

        def plan(epoch: int) -> Plan:
            order = permutation(config.seed, epoch, num_train)
            return plan_epoch(order, config.batch_size, multiple=len(devices))

        test_plan = plan_epoch(
            np.arange(num_test), EVAL_BATCH_SIZE, multiple=len(devices)
        )
        train_data = executor.put_split(dataset.train)
        test_data = executor.put_split(dataset.test)
        step = int(state.step)
        state = executor.put(state)
        if done < config.epochs:
            # Steps of weight zero change nothing; this only compiles the program.
            chunk = next(chunks(plan(1), config.steps_per_dispatch))
            state, _ = train_steps(state, train_data, chunk.without_weight())

        # ---- Train -------------------------------------------------------------------

        bar = tqdm(
            total=config.epochs * plan(1).num_steps,
            initial=step,
            unit=" steps",
            leave=False,
            disable=None,  # Where there is no terminal.
        )
        try:
            for epoch in range(done + 1, config.epochs + 1):
                bar.set_description(f"epoch {epoch}")
                start = time.perf_counter()
                state, train_metrics = train_epoch(
                    train_steps, state, train_data, plan(epoch), config, bar
                )
                seconds = time.perf_counter() - start
                check_finite("loss", train_metrics, step, epoch, checkpoints)
                step += len(train_metrics["loss"])
                _, test_metrics = eval_steps(state, test_data, test_plan)
                check_finite("test loss", test_metrics, step, epoch, checkpoints)

                metrics = EpochMetrics.summarize(
                    epoch, step, train_metrics, test_metrics, num_train / seconds
                )
                # In this order: on resuming, a line without a checkpoint is dropped.
                metrics_file.append(metrics)
                checkpoints.save(epoch, state, metrics.test_accuracy)
                history.append(metrics)
                width = len(str(config.epochs))
                bar.write(f"epoch {epoch:{width}}/{config.epochs}  {metrics}")
        finally:
            bar.close()
            if history:
                title = f"mlp on {dataset.name}"
                plot_curves(history, workdir / "curves.png", title)

        # ---- Report ------------------------------------------------------------------

        final = history[-1]
        best = max(history, key=lambda m: (m.test_accuracy, m.epoch))
    print(
        f"saved in {workdir}: config.json, metrics.jsonl, curves.png, and checkpoints/ "
        f"with epoch {final.epoch} (the last) and epoch {best.epoch} (the best on the "
        f"test set, {100 * best.test_accuracy:.2f} %)\n"
        f"final test accuracy: {100 * final.test_accuracy:.2f} % (epoch {final.epoch})"
    )
    return history


def train_epoch(
    train_steps: Run,
    state: TrainState,
    data: Any,
    plan: Plan,
    config: Config,
    bar: tqdm,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """Runs the steps of one epoch, or as far as the first loss that is not finite.

    Args:
        train_steps: The compiled training steps.
        state: The state before, which is used up.
        data: The training split, on the devices.
        plan: Which rows make up each batch.
        config: For the number of steps in a dispatch.
        bar: Moved on with each dispatch.

    Returns:
        The state after, and the metrics of each step.
    """
    parts = []
    for chunk in chunks(plan, config.steps_per_dispatch):
        state, metrics = train_steps(state, data, chunk)
        parts.append({k: v[: chunk.num_steps] for k, v in metrics.items()})
        bar.update(chunk.num_steps)
        if not np.isfinite(parts[-1]["loss"]).all():
            break
    return state, {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def check_finite(
    name: str,
    metrics: dict[str, np.ndarray],
    step: int,
    epoch: int,
    checkpoints: Checkpoints,
) -> None:
    """Stops the run if a loss is infinite or not a number.

    Args:
        name: What to call the loss.
        metrics: With the losses, one for each step after `step`; or those of an
            evaluation after `step`.
        step: The steps taken before.
        epoch: The current epoch.
        checkpoints: What can be loaded.

    Raises:
        NonFiniteLossError: Naming the step.
    """
    wrong = np.flatnonzero(~np.isfinite(metrics["loss"]))
    if not wrong.size:
        return
    value = metrics["loss"][wrong[0]]
    where = f"at step {step + 1 + wrong[0]}" if name == "loss" else f"after step {step}"
    raise NonFiniteLossError(
        f"The {name} is {value} {where}, in epoch {epoch}. {checkpoints.describe()} "
        "Try a lower --learning-rate."
    )


if __name__ == "__main__":
    sys.exit(main())
