"""Opens the folder of a run, without changing it."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np

from jbn.training.batches import permutation, plan_epoch
from jbn.training.build import make_task, open_dataset, row_multiple
from jbn.training.checkpoint import Checkpoints
from jbn.training.config import Config, claim_workdir, confirm_model, load_config
from jbn.training.data import Dataset, Description
from jbn.training.devices import select_devices
from jbn.training.errors import UsageError
from jbn.training.evaluation import Evaluation
from jbn.training.executor import Executor
from jbn.training.loader import load
from jbn.training.metrics import MetricsFile
from jbn.training.state import TrainState
from jbn.training.step import create_state
from jbn.training.tasks import Supervised, Task


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run, opened at one checkpoint, on one device.

    Attributes:
        folder: The folder of the run.
        config: Its configuration.
        step: The step of the checkpoint.
        steps_per_epoch: Steps per epoch of its training.
        dataset: Its data.
        task: Its task.
        state: The state of the checkpoint.
        progress: Sums over an unfinished epoch, or `{}`.
    """

    folder: Path
    config: Config
    step: int
    steps_per_epoch: int
    dataset: Dataset
    task: Task
    state: TrainState
    progress: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the model; averaged if the run has an average."""
        return self.state.variables

    @property
    def supervised(self) -> Supervised:
        """The task, if it has one model.

        Raises:
            UsageError: If it has two.
        """
        if isinstance(self.task, Supervised):
            return self.task
        raise UsageError(
            f"{self.folder} has --model={self.config.model}, which is two networks; "
            "this is for one."
        )

    def describe(self) -> str:
        """Names the checkpoint."""
        epoch = self.step / self.steps_per_epoch
        return f"{self.folder}, after step {self.step} (epoch {epoch:.4g})"

    def batches(
        self, split: str = "train", *, most: int | None = None
    ) -> Iterator[dict[str, jax.Array]]:
        """Batches as in training, but in another order.

        Args:
            split: `"train"` or `"test"`.
            most: Most batches.

        Yields:
            The batches. Rows that pad the last one have weight zero.
        """
        rows = getattr(self.dataset, split)
        # Epochs count from 1: an order that the training has not had.
        order = permutation(self.config.seed, 0, len(rows))
        if most is not None:
            order = order[: most * self.config.batch_size]
        multiple = row_multiple(self.config, 1)
        plan = plan_epoch(order, self.config.batch_size, multiple=multiple)
        for _, batches in load(rows, plan, 1):
            yield {name: jnp.asarray(x[0]) for name, x in batches.items()}

    def evaluate(
        self, variables: Mapping[str, Any], model: Any = None
    ) -> dict[str, float]:
        """Metrics on the test split, with the running statistics.

        Args:
            variables: Of the model.
            model: Used instead of the run's model.

        Returns:
            The metrics by name.
        """
        sums = self.test_sums(variables, model)
        return self.task.summarize(sums)

    def test_sums(
        self, variables: Mapping[str, Any], model: Any = None
    ) -> dict[str, np.ndarray]:
        """The sums for `evaluate`."""
        task = self.task
        if model is not None:
            task = dataclasses.replace(self.supervised, model=model)
        executor = Executor(jax.devices()[:1], "jit")
        evaluation = Evaluation(
            task,
            executor,
            self.dataset,
            batch_size=self.config.batch_size,
            most_steps=self.config.steps_per_dispatch,
        )
        return evaluation(variables)


def open_run(
    path: Path,
    checkpoint: str = "last",
    *,
    model: str | None = None,
    dataset: str | None = None,
    data_dir: Path | None = None,
) -> OpenRun:
    """Opens a run, without writing to its folder.

    Its data set is only opened when an example is needed.

    Args:
        path: The folder that `train.py` wrote, or one of its `checkpoints`.
        checkpoint: `last`, `best`, or a number of steps.
        model: The run's `module:Class`, which is imported; unneeded for other models.
        dataset: Another data set with the same classes, instead of the run's.
        data_dir: Folder of prepared data sets, instead of the run's.

    Returns:
        The run.

    Raises:
        UsageError: If there is no run or no such checkpoint, if the checkpoint belongs
            to another model, or if `model` is needed or another one.
    """
    path, checkpoint = _split(path, checkpoint)
    config = read_config(path)
    confirm_model(config.model, model, path / "config.json")
    # On one device, a CPU or JAX's default.
    select_devices(None, None)
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        _require_checkpoints(path)
        data, num_train = _data(path, config, dataset, data_dir)
        count = -(-num_train // config.batch_size)
        task = make_task(config, data, steps_per_epoch=count)
        better = task.metric.higher_is_better
        with _checkpoints_of(path, better) as found:
            step = find_checkpoint(found, path, checkpoint)
            averaged = config.ema_decay is not None
            make = lambda: create_state(task, config.seed, averaged=averaged)
            state, progress = found.restore(step, jax.eval_shape(make))
    finally:
        absl.logging.set_verbosity(verbosity)
    return OpenRun(path, config, step, count, data, task, state, progress)


def _data(
    folder: Path, config: Config, dataset: str | None, data_dir: Path | None
) -> tuple[Dataset, int]:
    """The data set of a run, and the number of its training examples."""
    where: dict[str, Any] = {"dataset": dataset, "data_dir": data_dir}
    elsewhere = {name: value for name, value in where.items() if value is not None}
    config = dataclasses.replace(config, **elsewhere)
    path = folder / "dataset.json"
    if not path.exists():  # For runs of version 0.2 and before.
        opened = open_dataset(config)
        return opened, len(opened.train)
    described = Description.load(path)

    def find() -> Dataset:
        if dataset is None:
            require_dataset(folder, config)
        return open_dataset(config, like=described)

    return described.dataset(find), described.num_train


def require_dataset(folder: Path, config: Config) -> None:
    """Raises a `UsageError` if the data set of a run has been moved or deleted.

    Args:
        folder: Of the run.
        config: Its configuration.
    """
    place = Path(config.dataset)
    if place.is_absolute() and not place.exists():
        raise UsageError(
            f"The data set of {folder} is not in {place}. Say where it is with "
            "--dataset."
        )


def require_same_data(folder: Path, dataset: Description) -> None:
    """Raises a `UsageError` if a data set is not the one that a run was trained on.

    Args:
        folder: Of the run.
        dataset: The description of the data set to go on with.
    """
    path = folder / "dataset.json"
    if not path.exists():  # For runs of version 0.2 and before.
        return
    difference = Description.load(path).difference(dataset)
    if difference is not None:
        raise UsageError(
            f"--dataset={dataset.name} is not the data set that the run in {folder} "
            f"was trained on: {difference}. Resume with that one, or start a new run "
            f"on this one with --init-from={folder}."
        )


def read_variables(path: Path, checkpoint: str = "last") -> dict[str, Any]:
    """Reads the variables of a checkpoint, without the data of its run.

    Args:
        path: The folder of a run, or one of its `checkpoints`.
        checkpoint: `last`, `best`, or a number of steps.

    Returns:
        `params` and `batch_stats` as NumPy arrays, averaged if the run has an average.

    Raises:
        UsageError: If there is no such checkpoint, or it is damaged.
    """
    path, checkpoint = _split(path, checkpoint)
    # (The metric is an accuracy, or for a GAN a distance.)
    higher_is_better = read_config(path).model != "dcgan"
    with _checkpoints_of(path, higher_is_better) as found:
        return found.restore_variables(find_checkpoint(found, path, checkpoint))


def read_config(folder: Path) -> Config:
    """The configuration of a run.

    Raises:
        UsageError: If there is none.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder. Pass the folder of a run.")
    if not path.is_file():
        raise UsageError(
            f"{folder} is not a run: it has no config.json. Pass a folder that train.py"
            " wrote."
        )
    return load_config(path)


def save_run(
    run: OpenRun,
    folder: Path,
    state: TrainState,
    test: Mapping[str, float],
    progress: Mapping[str, float] | None = None,
) -> None:
    """Writes a copy of a run with another state.

    It has one checkpoint, and can be resumed.

    Args:
        run: The other.
        folder: The new folder; must not exist.
        state: The state.
        test: The test metrics of this state.
        progress: Sums over an unfinished epoch.

    Raises:
        UsageError: If `folder` exists.
    """
    refuse_existing(folder)
    claim_workdir(dataclasses.replace(run.config, workdir=folder, resume=False))
    if (run.folder / "dataset.json").exists():
        shutil.copy(run.folder / "dataset.json", folder / "dataset.json")
    history = MetricsFile(run.folder / "metrics.jsonl").read()
    file = MetricsFile(folder / "metrics.jsonl")
    for line in history:
        if line["step"] == run.step:
            line = line | {f"test_{name}": value for name, value in test.items()}
        if line["step"] <= run.step:
            file.append(line)
    metric = run.task.metric
    better = metric.higher_is_better
    with Checkpoints(folder / "checkpoints", higher_is_better=better) as checkpoints:
        # (As in training, one in the middle of an epoch is never the best.)
        whole = run.step % run.steps_per_epoch == 0
        checkpoints.save(
            jax.device_get(state),
            metric=test[metric.name] if whole else None,
            progress=progress,
        )


def refuse_existing(path: Path) -> None:
    """Raises a `UsageError` if `path` exists, or its parent folder does not."""
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"{path} already exists, and is not overwritten. Choose another."
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(
            f"{path} cannot be written: there is no folder {path.absolute().parent}."
        )


def _split(path: Path, checkpoint: str) -> tuple[Path, str]:
    """The folder of a run and a checkpoint; `path` may be that of a checkpoint."""
    if path.parent.name == "checkpoints" and path.name.isdecimal():
        return path.parent.parent, path.name
    return path, checkpoint


def _require_checkpoints(run: Path) -> Path:
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise UsageError(f"{run} has no checkpoints yet.")
    return folder


def _checkpoints_of(run: Path, higher_is_better: bool) -> Checkpoints:
    folder = _require_checkpoints(run)
    return Checkpoints(folder, higher_is_better=higher_is_better, read_only=True)


def find_checkpoint(checkpoints: Checkpoints, folder: Path, checkpoint: str) -> int:
    """Finds the number of steps of a checkpoint.

    Args:
        checkpoints: Of the run.
        folder: Of the run, for messages.
        checkpoint: `last`, `best`, or a number of steps.

    Returns:
        The number of steps.

    Raises:
        UsageError: If there is no such checkpoint.
    """
    steps = checkpoints.steps
    if not steps:
        raise UsageError(f"{folder} has no checkpoints yet.")
    if checkpoint == "last":
        return steps[-1]
    if checkpoint == "best":
        best = checkpoints.best_step
        return steps[-1] if best is None else best
    if not checkpoint.isdecimal():
        raise UsageError(
            f"--checkpoint={checkpoint} must be last, best or a number of steps."
        )
    if int(checkpoint) not in steps:
        kept = ", ".join(map(str, steps))
        raise UsageError(
            f"{folder} has no checkpoint {checkpoint}: there are steps {kept}."
        )
    return int(checkpoint)
