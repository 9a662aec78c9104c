"""Trains a network with batch normalization: `python train.py --help`.

`python train.py eval`, `predict` and `compile` have a --help of their own.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from jbn.training import hosts
from jbn.training.batches import Plan, permutation, plan_epoch
from jbn.training.build import make_task, open_dataset
from jbn.training.checkpoint import Checkpoints
from jbn.training.config import Config, claim_workdir, parse_config
from jbn.training.devices import describe, select_devices
from jbn.training.errors import NonFiniteLossError, UsageError
from jbn.training.evaluation import Evaluation, steps_per_dispatch
from jbn.training.executor import Executor
from jbn.training.guard import Guard
from jbn.training.loader import ahead, empty_chunk, load
from jbn.training.metrics import MetricsFile, Sums, peak_memory, show
from jbn.training.report import Events, Profile, Report
from jbn.training.step import initialize, make_train_step
from jbn.training.subcommands import COMMANDS, run_command


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line, or `args` in its place; returns the exit status."""
    args = list(sys.argv[1:] if args is None else args)

    def run() -> int:
        try:
            if args and args[0] in COMMANDS:
                return run_command(args[0], args[1:])
            config = parse_config(args)
            hosts.connect(config)
            return train(config)
        except (UsageError, NonFiniteLossError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
        except KeyboardInterrupt:
            print("interrupted; --resume --workdir=FOLDER goes on", file=sys.stderr)
            return 130

    return hosts.end_at_once(run)


def train(config: Config) -> int:
    """Trains as `config` says.

    Writes configuration, metrics, curves and checkpoints to the folder of the run.

    Args:
        config: From `parse_config`.

    Returns:
        The exit status: 0, also if SIGTERM has ended the run before its end.
    """
    # ---- Devices and data ------------------------------------------------------------

    devices = select_devices(config.accelerator, config.num_devices)
    executor = Executor(devices, config.parallel)
    dataset = open_dataset(config)
    num_train, num_test = len(dataset.train), len(dataset.test)

    def plan(epoch: int) -> Plan:
        order = permutation(config.seed, epoch, num_train)
        multiple = len(devices) * config.microbatches
        return plan_epoch(order, config.batch_size, multiple=multiple)

    first_plan = plan(1)  # All are of one shape.
    steps_per_epoch = first_plan.num_steps
    share = executor.share(first_plan.num_rows)
    length = steps_per_dispatch(dataset.train, first_plan, config.steps_per_dispatch)

    # ---- Model, optimizer, steps -----------------------------------------------------

    task = make_task(config, dataset, executor, steps_per_epoch=steps_per_epoch)
    state = initialize(task, config.seed, averaged=config.ema_decay is not None)
    num_params = sum(x.size for x in jax.tree.leaves(state.params))
    train_steps = executor.train(
        make_train_step(task, seed=config.seed, ema_decay=config.ema_decay)
    )
    evaluation = Evaluation(
        task,
        executor,
        dataset,
        batch_size=config.batch_size,
        most_steps=config.steps_per_dispatch,
        seed=config.seed,
    )

    # ---- Where the results go --------------------------------------------------------

    first = hosts.is_first()
    workdir = Path(hosts.from_first(str(claim_workdir(config)) if first else ""))
    metrics_file = MetricsFile(workdir / "metrics.jsonl")
    write: Callable[..., None] = tqdm.write if first else lambda text: None
    write(
        f"data     {dataset.name}: {num_train:,} training and {num_test:,} test images"
        + (f" in {len(dataset.classes)} classes" if dataset.classes else "")
        + f"\nmodel    {config.model}: {num_params:,} parameters\n"
        f"devices  {describe(devices)}, by {config.parallel}\n"
        f"workdir  {workdir}"
    )

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                workdir / "checkpoints", higher_is_better=task.metric.higher_is_better
            )
        )
        preemption = stack.enter_context(hosts.Preemption())
        done, total = checkpoints.last_step or 0, config.epochs * steps_per_epoch
        progress: dict[str, float] = {}
        if done:
            state, progress = checkpoints.restore(done, state)
            write(f"resuming after step {done}, in epoch {done / steps_per_epoch:.4g}")
        if first:
            metrics_file.truncate(done)
        history = metrics_file.read()
        state = executor.put(state)
        guard = Guard(config.max_skipped, steps_per_epoch, checkpoints.describe)
        profile = stack.enter_context(
            Profile(workdir / "profile" if config.profile and first else None)
        )
        events = stack.enter_context(Events(workdir / "events" if first else None))
        bar = stack.enter_context(
            tqdm(
                total=total,
                initial=done,
                unit=" steps",
                leave=False,
                disable=None if first else True,  # None: where there is no terminal.
            )
        )
        report = Report(workdir, task.metric, f"{config.model} on {dataset.name}")
        if first:
            stack.callback(report.draw, history)
        if done < total:
            # Steps of weight zero change nothing; this only compiles the program.
            nothing = empty_chunk(dataset.train, first_plan, length, share=share)
            state, _ = train_steps(state, executor.put_batches(nothing))

        # ---- Train -------------------------------------------------------------------

        saved, stopped = done, False
        while done < total and not stopped:
            epoch, offset = done // steps_per_epoch + 1, done % steps_per_epoch
            sums = Sums(progress if offset else None)
            bar.set_description(f"epoch {epoch}")
            start = time.perf_counter()
            rest = plan(epoch).after(offset)
            chunks = load(dataset.train, rest, length, share=share, epoch=epoch)
            for count, batches in ahead(chunks, executor.put_batches):
                state, metrics = train_steps(state, batches)
                metrics = {k: v[:count] for k, v in executor.get(metrics).items()}
                guard.check(metrics, done)
                sums.add_steps(metrics)
                done += count
                bar.update(count)
                profile.next()
                stopped = preemption.reached()
                due = config.save_every and done - saved >= config.save_every
                if done % steps_per_epoch and (due or stopped):
                    checkpoints.save(executor.get(state), progress=sums.as_json())
                    saved = done
                if stopped:
                    break
            seconds = time.perf_counter() - start
            if done % steps_per_epoch:
                break  # It goes on from here when it is resumed.

            # ---- Evaluate and save ---------------------------------------------------

            host_state = executor.get(state)
            if host_state.average or task.recalibrates:
                variables = evaluation.recalibrated(host_state.variables)
                host_state = host_state.with_variables(variables)
                state = executor.put(host_state)
            test_sums = evaluation(host_state.variables)
            train_metrics, test = task.summarize(sums.values), task.summarize(test_sums)
            guard.check_test(test, done)
            steps = steps_per_epoch - offset
            num_examples = steps / steps_per_epoch * num_train
            line = {
                "epoch": epoch,
                "step": done,
                **{f"train_{name}": value for name, value in train_metrics.items()},
                **{f"test_{name}": value for name, value in test.items()},
                "skipped": int(sums.values["num_skipped"]),
                "examples_per_second": round(num_examples / seconds, 1),
                "step_ms": round(1e3 * seconds / steps, 3),
                "peak_memory_bytes": peak_memory(),
            }
            history.append(line)
            # In this order: on resuming, a line without a checkpoint is dropped.
            if first:
                metrics_file.append(line)
            checkpoints.save(host_state, metric=test[task.metric.name])
            saved = done
            if first:
                figures = {}
                if done == total or report.is_due():
                    figures = task.pictures(host_state.variables, test_sums, dataset)
                report.figures |= figures
                events.write(line, figures)
            width = len(str(config.epochs))
            write(f"epoch {epoch:{width}}/{config.epochs}  {show(line, task.metric)}")
        best_step = checkpoints.best_step

    # ---- Report ----------------------------------------------------------------------

    if stopped and done < total:
        write(
            f"stopped by SIGTERM after step {done}, which is saved; "
            f"--resume --workdir={workdir} goes on"
        )
        return 0
    final = history[-1]
    best = next(line for line in history if line["step"] == best_step)
    name = f"test_{task.metric.name}"
    write(
        f"saved in {workdir}: config.json, metrics.jsonl, pictures, events/, and "
        f"checkpoints/ with epoch {final['epoch']} (the last) and epoch "
        f"{best['epoch']} (the best on the test set, {task.metric.show(best[name])})\n"
        f"final test {task.metric.label}: {task.metric.show(final[name])} "
        f"(epoch {final['epoch']})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
