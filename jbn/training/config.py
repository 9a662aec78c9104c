"""The configuration of a run: one dataclass, from the command line or from a file."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jbn.training.devices import Accelerator
from jbn.training.errors import UsageError


# Without "{None}|" and "(default: None)": the texts say what the default does.
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
_Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network with batch normalization on images.

    Without flags: a perceptron with two hidden layers, on the handwritten digits that
    come with the package. That takes some seconds and no network.

    Attributes:
        dataset: The data: `digits`, which comes with the package, or the TensorFlow
            Datasets name of any image classification set (`mnist`, `cifar10`, ...).
        data_dir: Folder of prepared data sets. By default that of TensorFlow Datasets,
            which is $TFDS_DATA_DIR or ~/tensorflow_datasets.
        manual_dir: Folder with the original files of the set, downloaded by hand.
            Needed once, to prepare a set without a network.
        image_size: Height and width to resize the images to. Needed where they differ
            in size.
        workdir: Where configuration, metrics, curves and checkpoints go. By default a
            new folder in runs/, named after the data, the seed and the time. A folder
            with anything in it is refused, unless to resume the run in it.
        resume: Continue the run in --workdir from its last checkpoint, with the flags
            that it was started with. Give more --epochs to train on after its end.
        epochs: Passes over the training data. The default suits the digits, where an
            epoch is 23 steps; of mnist, 5 do.
        batch_size: Examples in each step, over all devices together. None is dropped:
            the last batch of an epoch is smaller.
        learning_rate: Step size of the Adam optimizer.
        momentum: Weight of the old running statistics in batch normalization.
            Evaluation uses these, so they must have caught up with the model. On the
            digits, 0.99 keeps 79 % of what they were an epoch ago, and the test
            accuracy of a short run trails far behind the training accuracy. With 0.9
            it is 9 %.
        seed: Sets the initial parameters and the order of the examples. On one device,
            equal seeds give equal runs, to the last bit.
        parallel: How several devices share a batch: `pmap` maps the step over them,
            with synchronized batch normalization; `jit` leaves it to the compiler. The
            results are the same.
        accelerator: What to run on. By default whatever JAX finds; one that is not
            there is an error.
        num_devices: How many devices to run on. By default all, or one CPU. CPU devices
            are virtual: there are as many as asked for.
        steps_per_dispatch: The most steps to hand to the devices at once. More keeps a
            small model from waiting for Python.
    """

    dataset: str = "digits"
    data_dir: _Folder = None
    manual_dir: _Folder = None
    image_size: _Count = None
    workdir: _Folder = None
    resume: bool = False
    epochs: int = 60
    batch_size: int = 64
    learning_rate: float = 1e-3
    momentum: float = 0.9
    seed: int = 0
    parallel: Literal["pmap", "jit"] = "pmap"
    accelerator: Annotated[
        Accelerator | None,
        tyro.conf.arg(metavar="{cpu,gpu,tpu}", help_behavior_hint=""),
    ] = None
    num_devices: _Count = None
    steps_per_dispatch: int = 256

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ("epochs", "batch_size", "steps_per_dispatch"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("num_devices", "image_size"):
            value = getattr(self, name)
            _check(self, name, value is None or value >= 1, "at least 1")
        _check(self, "learning_rate", self.learning_rate > 0, "above 0")
        _check(self, "momentum", 0 <= self.momentum <= 1, "from 0 to 1")
        _check(self, "seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1")
        if self.resume and self.workdir is None:
            raise UsageError("--resume needs --workdir: the folder of the run.")


# Other values of these make another run, not the continuation of one.
_FIXED = (
    "dataset",
    "image_size",
    "batch_size",
    "learning_rate",
    "momentum",
    "seed",
)


def parse_config(args: Sequence[str] | None = None) -> Config:
    """Reads the command line, and for `--resume` the saved configuration beneath it.

    Args:
        args: Instead of the command line.

    Returns:
        The configuration, in which `workdir` may still be `None`.

    Raises:
        UsageError: If a value is out of range, if there is a run in `workdir` already,
            or nothing to resume, or something fixed would change on resuming.
    """
    config = _parse(args, Config())
    if config.workdir is None:
        return config
    path = config.workdir / "config.json"
    if config.resume:
        if not path.exists():
            raise UsageError(f"--resume: there is no run in {config.workdir}.")
        saved = load_config(path)
        config = _parse(args, dataclasses.replace(saved, workdir=config.workdir))
        for name in _FIXED:
            old, new = getattr(saved, name), getattr(config, name)
            if old != new:
                raise UsageError(
                    f"The run in {config.workdir} was made with {_flag(name)}={old}. "
                    f"It cannot be resumed with {new}: leave the flag out, or start "
                    "another run in another --workdir."
                )
    elif config.workdir.exists() and any(config.workdir.iterdir()):
        raise UsageError(
            f"--workdir={config.workdir} is not empty. Choose another, or continue the "
            "run in it with --resume."
        )
    return config


def claim_workdir(config: Config) -> Path:
    """Makes the folder of the run, for it alone, and saves the configuration there.

    Args:
        config: From `parse_config`. Without `workdir`, the folder is a new one.

    Returns:
        The folder, with `config.json` in it.

    Raises:
        UsageError: If another run has been faster to claim it.
    """
    workdir = config.workdir
    if workdir is None:
        workdir = _new_workdir(config)
    workdir.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(config) | {"workdir": workdir, "resume": False}
    text = json.dumps(values, indent=2, default=str) + "\n"
    try:
        with (workdir / "config.json").open("w" if config.resume else "x") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(
            f"--workdir={workdir} has just been taken by another run. Choose another."
        ) from error
    return workdir


def load_config(path: Path) -> Config:
    """Reads what `claim_workdir` wrote."""
    values: dict[str, Any] = json.loads(path.read_text())
    for name in ("data_dir", "manual_dir", "workdir"):
        if values[name] is not None:
            values[name] = Path(values[name])
    return Config(**values)


def _parse(args: Sequence[str] | None, default: Config) -> Config:
    annotated = Annotated[Config, tyro.conf.FlagCreatePairsOff]
    return tyro.cli(annotated, args=args, default=default)


def _new_workdir(config: Config) -> Path:
    name = config.dataset.replace("/", "-").replace(":", "-")
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    first = Path("runs") / f"{name}-mlp-seed{config.seed}-{now}"
    first.parent.mkdir(exist_ok=True)
    path, count = first, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:  # A run that was started in the same second.
            count += 1
            path = first.with_name(f"{first.name}-{count}")


def _check(config: Config, name: str, valid: bool, range_text: str) -> None:
    if not valid:
        value = getattr(config, name)
        raise UsageError(f"{_flag(name)}={value} is out of range: {range_text}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
