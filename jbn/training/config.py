"""The configuration of a run: one dataclass, from the command line or from a file."""

import dataclasses
import difflib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typeguard
import tyro

from jbn.training import folders, norms
from jbn.training.devices import Accelerator
from jbn.training.errors import UsageError
from jbn.training.flags import parse


# Without "{None}|" and "(default: None)": the texts describe the default.
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
_Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
_Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
_Period = Annotated[
    int | str | None, tyro.conf.arg(metavar="STEPS|MINUTESm", help_behavior_hint="")
]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]

Model = Literal["mlp", "resnet8", "resnet18", "resnet50", "unet", "dcgan"]
_ModelName = Annotated[
    str, tyro.conf.arg(metavar=f"{{{','.join(get_args(Model))}}}|MODULE:CLASS")
]


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a network with batch normalization on images.

    Without flags: a perceptron with two hidden layers, on the handwritten digits that
    come with the package. This takes a few seconds and no network access. Defaults
    depend on --model: see --model=NAME --help.

    Attributes:
        model: `mlp`, `resnet8`, `resnet18` and `resnet50` classify images; `unet` their
            pixels; `dcgan` generates images. `module:Class` is your own: a Linen module
            (or a function that makes one) that takes `num_classes` and `norm`, and is
            called with images, `train` and `mask`. Needed again with --resume, as this
            imports the module.
        width: Width of the first layer; deeper ones are wider in proportion. By default
            64 (`mlp`, `resnet18`, `resnet50`), 16 (`resnet8`, `unet`), or what suits
            the images (`dcgan`).
        depth: Hidden layers of `mlp` (2), sizes of `unet` (3), and all layers of a
            ResNet: 8, 14, 20, ... for `resnet8`, 18 or 34 for `resnet18`, and 50, 101
            or 152 for `resnet50`.
        dropout: Fraction of the units that are set to zero in training: after each
            hidden layer of `mlp`, at the smallest size of `unet`, before the last layer
            of a ResNet.
        norm: The norm layers: batch normalization, batch renormalization, ghost batch
            normalization (by groups of a batch), group or layer normalization of each
            image, or none (only a scale and bias).
        norm_options: Options of the norm layers.
        dataset: The data: `digits` or `digit_trimaps`, which come with the package; the
            TensorFlow Datasets name of a set of images with labels (`mnist`, `cifar10`,
            `imagenet2012`, ...), with segmentation masks for `unet`
            (`oxford_iiit_pet`), or of any images for `dcgan`; the path of a folder with
            one folder of images per class, or for `unet` the folders `images` and
            `masks`, optionally inside `train` and `test`; or an .npz file with
            `train_images`, `train_labels`, `test_images` and `test_labels`.
        data_dir: Folder of prepared data sets. By default that of TensorFlow Datasets,
            which is $TFDS_DATA_DIR or ~/tensorflow_datasets.
        manual_dir: Folder with the original files of the set, downloaded by hand. Only
            needed once, to prepare a set without network access.
        test_fraction: Fraction of the images to test on, if a set has no test split.
        image_size: Height and width to resize the images to. Needed if they differ in
            size.
        loader: `memory` reads the set into memory, `grain` reads images from disk as
            needed. By default grain for sets of more than 4 GiB of pixels.
        shift: Move training images at random by up to this number of pixels.
        flip: Mirror training images at random.
        mixup: Mix each training image and its label with another one of the batch, with
            shares from Beta(mixup, mixup); 0.2 is usual, 0 is off.
        crop: Take random crops of training images, as for ImageNet, and the central
            part of others (grain only).
        workdir: Folder for configuration, metrics, curves and checkpoints. By default a
            new folder in runs/, named after the data, the seed and the time. A folder
            that is not empty is refused, except with --resume.
        resume: Continue the run in --workdir from its last checkpoint, with its
            original flags. Pass more --epochs to train beyond its end, and --dataset if
            its data set has been moved.
        checkpoint: Resume from this checkpoint, or start --init-from it: `best` on the
            test set, `last`, or a number of steps. Resuming from an earlier checkpoint
            deletes the later ones.
        config: Start from the flags of this `config.json`, such as that of another run.
            Flags on the command line take precedence.
        init_from: Start a new run from the weights and statistics of another: the
            folder of a run, or a .npz or .msgpack file from `jbn fold`. The optimizer
            and the schedule start from zero.
        init_skip: Do not initialize layers that match this pattern by --init-from:
            `head/*` for a set with other classes.
        epochs: Passes over the training data.
        steps: Number of training steps, instead of --epochs.
        patience: Stop after this number of evaluations in a row without a better
            metric.
        batch_size: Examples in each step, over all devices. None is dropped: the last
            batch of an epoch is smaller.
        microbatches: Split a batch into this number of parts, processed one after the
            other to save memory. Each part is normalized separately; the running
            statistics are those of the whole batch.
        optimizer: `adam` (with --weight-decay AdamW), or `sgd` with momentum.
        learning_rate: Largest learning rate. For dcgan that of the generator; the
            discriminator's is a fifth of it.
        beta1: Adam's beta1, or the momentum of SGD.
        schedule: `cosine` decays the learning rate to zero.
        warmup_epochs: Epochs over which the learning rate rises from zero.
        weight_decay: Weight decay of kernels; biases and norms are not decayed.
        clip_norm: Clip the norm of the gradients to this value. By default not at all.
        label_smoothing: Share of the probability that is spread evenly over all
            classes.
        ema_decay: Evaluate an exponential moving average of the parameters with this
            decay. Its statistics are recalibrated on the training data.
        precision: `bf16` computes in bfloat16; parameters and statistics stay float32.
        momentum: Weight of the old running statistics in batch normalization.
            Evaluation uses these, so they must follow the model. On the digits, with
            0.99 their values from one epoch ago still have a weight of 79 %, and the
            test accuracy of a short run is far below the training accuracy. With 0.9
            the weight is 9 %.
        fix_after: Epochs after which training normalizes by the running statistics, as
            evaluation does (FixBN). By default never.
        bn_group_size: Number of devices that share the statistics of a batch: 1 is
            per-device batch normalization. By default all. Running statistics are
            always those of all devices.
        seed: Sets the initial parameters and the order of the examples. On one device,
            runs with equal seeds are bitwise identical.
        parallel: How several devices share a batch: `pmap` maps the step over them,
            with synchronized batch normalization; `jit` lets the compiler shard it. The
            results are the same.
        accelerator: The kind of device. By default whatever JAX finds; a missing one is
            an error.
        num_devices: Number of devices of each process. By default all, or one CPU. CPU
            devices are virtual, so any number is available.
        steps_per_dispatch: Most steps in one dispatch. With more, a small model waits
            less for Python.
        eval_every: Evaluate every so many steps (`500`) or minutes (`10m`). By default
            after each epoch.
        save_every: Save a checkpoint every so many steps (`500`) or minutes (`10m`),
            also within an epoch. By default after each evaluation, unless the last
            checkpoint is less than 10 seconds old. The end of a run is always saved.
        log_every: Seconds between reports within an epoch: loss, learning rate,
            examples per second and time left, in `progress.jsonl` and TensorBoard, and
            as lines if there is no terminal.
        max_skipped: Number of non-finite steps in a row that may be skipped before the
            run stops.
        profile: Write a trace of a few steps to the folder of the run, for TensorBoard
            or Perfetto.
        distributed: Run as one of several processes, on one or several machines, that
            find each other automatically: under Slurm, Open MPI, Kubernetes, or on
            Cloud TPU. Elsewhere, pass the next three flags.
        coordinator: Address and port of process 0, such as `10.0.0.1:1234`.
        num_processes: Number of processes.
        process_id: Index of this process, from 0.
        peer_timeout: Seconds without a heartbeat of another process after which this
            one ends.
    """

    model: _ModelName = "mlp"
    width: _Count = None
    depth: _Count = None
    dropout: float = 0.0
    norm: norms.Norm = "batch"
    norm_options: Annotated[norms.NormOptions, tyro.conf.arg(name="norm")] = (  # pyright: ignore[reportInvalidTypeForm]
        dataclasses.field(default_factory=norms.NormOptions)
    )
    dataset: str = "digits"
    data_dir: _Folder = None
    manual_dir: _Folder = None
    test_fraction: float = 0.2
    image_size: _Count = None
    loader: Annotated[
        Literal["memory", "grain"] | None,
        tyro.conf.arg(metavar="{memory,grain}", help_behavior_hint=""),
    ] = None
    shift: int = 0
    flip: bool = False
    mixup: float = 0.0
    crop: bool = False
    workdir: _Folder = None
    resume: bool = False
    checkpoint: Annotated[
        str, tyro.conf.arg(metavar="best|last|STEP", help_behavior_hint="")
    ] = "last"
    config: _File = None
    init_from: Annotated[
        Path | None, tyro.conf.arg(metavar="RUN|FILE", help_behavior_hint="")
    ] = None
    init_skip: Annotated[
        str | None, tyro.conf.arg(metavar="PATTERN", help_behavior_hint="")
    ] = None
    epochs: int = 60
    steps: _Count = None
    patience: _Count = None
    batch_size: int = 64
    microbatches: int = 1
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0.0
    weight_decay: float = 0.0
    clip_norm: _Number = None
    label_smoothing: float = 0.0
    ema_decay: _Number = None
    precision: Literal["f32", "bf16"] = "f32"
    momentum: float = 0.9
    fix_after: _Count = None
    bn_group_size: _Count = None
    seed: int = 0
    parallel: Literal["pmap", "jit"] = "pmap"
    accelerator: Annotated[
        Accelerator | None,
        tyro.conf.arg(metavar="{cpu,gpu,tpu}", help_behavior_hint=""),
    ] = None
    num_devices: _Count = None
    steps_per_dispatch: int = 256
    eval_every: _Period = None
    save_every: _Period = None
    log_every: float = 10.0
    max_skipped: int = 10
    profile: bool = False
    distributed: bool = False
    coordinator: _Text = None
    num_processes: _Count = None
    process_id: _Count = None
    peer_timeout: int = 100

    def __post_init__(self) -> None:
        """Checks the values."""
        at_least = {
            1: (
                *("epochs", "batch_size", "steps_per_dispatch", "num_devices"),
                *("image_size", "microbatches", "bn_group_size", "steps", "patience"),
                *("num_processes", "peer_timeout", "fix_after", "width", "depth"),
            ),
            0: (
                *("shift", "warmup_epochs", "weight_decay", "max_skipped"),
                *("process_id", "mixup"),
            ),
        }
        for least, names in at_least.items():
            for name in names:
                value = getattr(self, name)
                fits = value is None or value >= least
                _check(self, name, fits, f"at least {least}")
        _check(self, "learning_rate", self.learning_rate > 0, "above 0")
        if self.fix_after is not None and self.norm not in ("batch", "ghost"):
            raise UsageError("--fix-after is only for --norm=batch and --norm=ghost.")
        _check(self, "log_every", self.log_every > 0, "above 0")
        for name in ("eval_every", "save_every"):
            period_of(self, name)
        _check(self, "momentum", 0 <= self.momentum <= 1, "from 0 to 1")
        for name in ("beta1", "label_smoothing", "ema_decay", "dropout"):
            value = getattr(self, name)
            _check(self, name, value is None or 0 <= value < 1, "from 0 to below 1")
        fraction = self.test_fraction
        _check(self, "test_fraction", 0 < fraction < 1, "above 0 and below 1")
        clip = self.clip_norm
        _check(self, "clip_norm", clip is None or clip > 0, "above 0")
        _check(self, "seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1")
        if self.resume and self.workdir is None:
            raise UsageError("--resume needs --workdir: the folder of the run.")
        if not (self.checkpoint in ("best", "last") or self.checkpoint.isdecimal()):
            raise UsageError(
                f"--checkpoint={self.checkpoint} must be last, best or a number of "
                "steps."
            )
        self._check_together()

    def _check_together(self) -> None:
        """Refuses flags that do not work together."""
        if self.model not in PRESETS and not is_class(self.model):
            close = difflib.get_close_matches(self.model, PRESETS, 1)
            hint = f"Did you mean `{close[0]}`? " if close else ""
            raise UsageError(
                f"--model={self.model} is not known. {hint}There are "
                f"{', '.join(PRESETS)}, and module:Class for your own."
            )
        if self.mixup and self.model in ("unet", "dcgan"):
            raise UsageError(f"--mixup is not for --model={self.model}.")
        norms.check(self.norm, self.norm_options)
        if self.bn_group_size is not None and self.norm != "batch":
            raise UsageError("--bn-group-size is only for --norm=batch.")
        if self.crop and self.image_size is None:
            raise UsageError("--crop needs --image-size: the size of the crops.")
        if self.model == "dcgan":
            for name in (
                *("microbatches", "bn_group_size", "label_smoothing", "dropout"),
                "depth",
            ):
                if getattr(self, name) != getattr(Config, name):
                    raise UsageError(f"{flag(name)} is not for --model=dcgan.")
        if self.init_skip is not None and self.init_from is None:
            raise UsageError("--init-skip needs --init-from: the source.")
        several = ("coordinator", "num_processes", "process_id")
        given = [name for name in several if getattr(self, name) is not None]
        if given and len(given) < len(several):
            missing = next(name for name in several if name not in given)
            raise UsageError(f"{flag(given[0])} also needs {flag(missing)}.")
        if given and self.process_id >= self.num_processes:  # type: ignore[operator]
            raise UsageError(
                f"--process-id={self.process_id} is out of range: it counts from 0 to "
                f"--num-processes={self.num_processes} minus 1."
            )


# The groups of flags in the help.
GROUPS: Mapping[str, Sequence[str]] = {
    "model": ("model", "width", "depth", "dropout", "precision", "microbatches"),
    "normalization": ("norm", "norm_options", "momentum", "fix_after", "bn_group_size"),
    "data": (
        *("dataset", "test_fraction", "data_dir", "manual_dir", "image_size", "loader"),
        *("shift", "flip", "crop", "mixup"),
    ),
    "run": (
        *("workdir", "resume", "checkpoint", "config", "init_from", "init_skip"),
        "seed",
    ),
    "length": ("epochs", "steps", "batch_size", "patience", "max_skipped"),
    "optimizer": (
        *("optimizer", "learning_rate", "beta1", "schedule", "warmup_epochs"),
        *("weight_decay", "clip_norm", "label_smoothing", "ema_decay"),
    ),
    "report": ("eval_every", "save_every", "log_every", "profile"),
    "device": ("accelerator", "num_devices", "parallel", "steps_per_dispatch"),
    "process": (
        *("distributed", "coordinator", "num_processes", "process_id"),
        "peer_timeout",
    ),
}


# Defaults of each model, for its default data.
# (One step per dispatch: on a CPU, convolutions are slow inside a loop.)
_RESNET = {
    "epochs": 20,
    "shift": 1,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "schedule": "cosine",
    "warmup_epochs": 2.0,
    "weight_decay": 5e-4,
    "steps_per_dispatch": 1,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "mlp": {},
    "resnet8": _RESNET,
    "resnet18": _RESNET,
    "resnet50": _RESNET,
    "unet": {
        "dataset": "digit_trimaps",
        "epochs": 5,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "weight_decay": 1e-4,
        "steps_per_dispatch": 1,
    },
    "dcgan": {
        "image_size": 16,
        "epochs": 80,
        "learning_rate": 1e-3,
        "beta1": 0.5,
        "steps_per_dispatch": 1,
    },
}


# The lock file in a run's folder, held by the process that trains there.
LOCK = ".lock"

# A run cannot be resumed with other values of these.
_FIXED = (
    "model",
    "width",
    "depth",
    "dropout",
    "norm",
    "norm_options",
    "test_fraction",
    "image_size",
    "shift",
    "flip",
    "mixup",
    "crop",
    "batch_size",
    "microbatches",
    "optimizer",
    "learning_rate",
    "beta1",
    "schedule",
    "warmup_epochs",
    "weight_decay",
    "clip_norm",
    "label_smoothing",
    "ema_decay",
    "precision",
    "momentum",
    "bn_group_size",
    "init_from",
    "init_skip",
    "seed",
)
# Flags of a single process, which the folder of a run does not record.
_OF_A_PROCESS = (
    *("resume", "config", "distributed", "coordinator"),
    *("num_processes", "process_id"),
)

# The flags of version 0.2.0, all of which are in its `config.json`.
_IN_0_2_0 = frozenset(
    """model dataset data_dir manual_dir image_size loader shift flip crop workdir
    resume epochs batch_size microbatches optimizer learning_rate beta1 schedule
    warmup_epochs weight_decay clip_norm label_smoothing ema_decay precision momentum
    bn_group_size seed parallel accelerator num_devices steps_per_dispatch save_every
    max_skipped
    profile distributed coordinator num_processes process_id peer_timeout""".split()
)


def parse_config(
    args: Sequence[str] | None = None, *, prog: str | None = None
) -> Config:
    """Reads the command line, with defaults from the model or from a saved run.

    Args:
        args: Flags, by default those of the command line.
        prog: The name of the program, for help.

    Returns:
        The configuration. `workdir` may still be `None`.

    Raises:
        UsageError: If a value is out of range, if `workdir` already has a run, if there
            is nothing to resume, or if a fixed flag would change on resuming.
    """
    args = list(sys.argv[1:] if args is None else args)
    config = _absolute(parse(_defaults(args), GROUPS, args, prog=prog))
    named = _value_of("--model", args)
    if config.config is not None:
        confirm_model(config.model, named, config.config)
    if config.workdir is None:
        return config
    path = config.workdir / "config.json"
    if config.resume:
        if not path.exists():
            raise UsageError(f"--resume: there is no run in {config.workdir}.")
        saved = load_config(path)
        saved_here = dataclasses.replace(
            saved, workdir=config.workdir, checkpoint="last"
        )
        if config.config is not None:
            raise UsageError("--config is for a new run: leave it out with --resume.")
        config = _absolute(parse(saved_here, GROUPS, args, prog=prog))
        # A schedule over all epochs changes with their number.
        length = () if saved.schedule == "constant" else ("epochs", "steps")
        # The data may lie elsewhere now, if it can be compared with this description.
        data = () if path.with_name("dataset.json").exists() else ("dataset",)
        fixed = (*_FIXED, *data, *length)
        for name in fixed:
            old, new = getattr(saved, name), getattr(config, name)
            if old != new:
                shown = flag(name)
                if name == "norm_options":
                    shown, old, new = norms.first_difference(old, new)
                raise UsageError(
                    f"The run in {config.workdir} was made with {shown}={old}. "
                    f"It cannot be resumed with {new}: leave the flag out, or start "
                    "another run in another --workdir."
                )
        confirm_model(saved.model, named, path)
    elif not _is_unused(config.workdir):
        raise UsageError(
            f"--workdir={config.workdir} is not empty. Choose another, or continue the "
            "run in it with --resume."
        )
    return config


def is_class(model: str) -> bool:
    """Whether `--model` is the `module:Class` of a user."""
    module, colon, name = model.partition(":")
    return bool(colon) and all(x.isidentifier() for x in (*module.split("."), name))


def confirm_model(saved: str, given: str | None, path: Path) -> None:
    """Refuses a class of a user that only a file names, as importing it runs code.

    Args:
        saved: The model in the file.
        given: The value of `--model`, or `None`.
        path: The `config.json`.

    Raises:
        UsageError: If `saved` is a class and `given` is `None`, or if they differ.
    """
    if given is None and is_class(saved):
        module = saved.partition(":")[0]
        raise UsageError(
            f"{path} names a class outside jbn, and importing {module} runs its code. "
            f"If you trust it, add --model={saved}."
        )
    if given is not None and given != saved:
        raise UsageError(f"{path} has --model={saved}, not {given}.")


def resume_flags(config: Config, workdir: Path) -> str:
    """The flags that continue a run."""
    model = f" --model={config.model}" if is_class(config.model) else ""
    return f"--resume --workdir={workdir}{model}"


def preset(model: str) -> Config:
    """The defaults of a model; the general ones for an unknown model."""
    return (
        Config(**{"model": model, **PRESETS[model]}) if model in PRESETS else Config()
    )


def claim_workdir(config: Config) -> Path:
    """Makes the folder of a new run, and saves the configuration there.

    Args:
        config: With `workdir`.

    Returns:
        The folder, with `config.json` in it.

    Raises:
        UsageError: If another run has taken it in the meantime, or it is not writable.
    """
    workdir = config.workdir
    if workdir is None:
        raise ValueError("The configuration has no workdir.")
    # The flags of a single process are not part of the run.
    defaults = {name: getattr(Config, name) for name in _OF_A_PROCESS}
    values = dataclasses.asdict(config) | defaults
    text = json.dumps(values, indent=2, default=str) + "\n"
    path = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if config.resume:
            # Atomically: a run that is killed right now can still be resumed.
            new = path.with_suffix(".new")
            new.write_text(text)
            new.replace(path)
        else:
            with path.open("x") as file:
                file.write(text)
    except FileExistsError as error:
        raise UsageError(
            f"--workdir={workdir} has just been taken by another run. Choose another."
        ) from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror}. Choose another --workdir."
        ) from error
    return workdir


def load_config(path: Path) -> Config:
    """Reads a `config.json`.

    Args:
        path: The file written by `claim_workdir`, possibly edited.

    Returns:
        The configuration. Missing flags that were added after version 0.2.0 have their
        defaults.

    Raises:
        UsageError: If it cannot be read, or has an unknown key or an invalid value.
    """
    wrong = lambda text: UsageError(f"{path} is not the configuration of a run: {text}")
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except json.JSONDecodeError as error:
        raise wrong(f"line {error.lineno} is not JSON ({error.msg}).") from error
    except UnicodeDecodeError as error:
        raise wrong(f"it is not text ({error}).") from error
    if not isinstance(values, dict):
        raise wrong("it holds no keys and values.")
    types = get_type_hints(Config)
    for name in values:
        if name not in types:
            close = difflib.get_close_matches(name, types, 1)
            hint = f"Did you mean {close[0]!r}?" if close else "Is it newer than this?"
            raise wrong(f"there is no flag {name!r}. {hint}")
    for name in types:
        if name in _IN_0_2_0 and name not in values:
            raise wrong(f"{name!r} is missing. Its default is {_shown(name)}.")
    for name, kind in types.items():
        if Path in get_args(kind) and isinstance(values.get(name), str):
            values[name] = Path(values[name])
    options = values.get("norm_options", {})
    if not isinstance(options, dict):
        raise wrong(f"{json.dumps(options)} is not a value of 'norm_options'.")
    try:
        values["norm_options"] = norms.NormOptions(**options)
    except TypeError as error:
        raise wrong(f"'norm_options': {error}.") from error
    for name, value in values.items():
        fits = not isinstance(value, bool) or types[name] is bool
        try:
            typeguard.check_type(value, types[name])
        except typeguard.TypeCheckError:
            fits = False
        if not fits:
            what = "a model" if name == "model" else "a value"
            raise wrong(f"{json.dumps(value, default=str)} is not {what} of {name!r}.")
    try:
        return Config(**values)
    except UsageError as error:
        raise wrong(str(error)) from error


def model_in(args: Sequence[str]) -> str:
    """The value of --model, before other flags are read."""
    return _value_of("--model", args) or "mlp"


def _value_of(wanted: str, args: Sequence[str]) -> str | None:
    for arg, value in itertools.pairwise([*args, ""]):
        name, is_given, given = arg.partition("=")
        if name == wanted:
            return given if is_given else value
    return None


def _absolute(config: Config) -> Config:
    """Makes paths to the data absolute, as a run may be used from any folder."""
    paths: dict[str, Any] = {
        name: getattr(config, name).expanduser().absolute()
        for name in ("data_dir", "manual_dir")
        if getattr(config, name) is not None
    }
    name = config.dataset
    if name.startswith(("~", ".")) or (Path(name).exists() and folders.find(name)):
        paths["dataset"] = str(Path(name).expanduser().absolute())
    return dataclasses.replace(config, **paths)


def _defaults(args: Sequence[str]) -> Config:
    """The defaults under the flags: from a file, or of the model."""
    path = _value_of("--config", args)
    if not path:
        return preset(model_in(args))
    # The other run's flags, except where and how it was started.
    return dataclasses.replace(
        load_config(Path(path)),
        workdir=None,
        **{name: getattr(Config, name) for name in _OF_A_PROCESS},
    )


@dataclasses.dataclass(frozen=True)
class Period:
    """An interval, in steps or in seconds."""

    steps: int | None = None
    seconds: float | None = None


def period_of(config: Config, name: str) -> Period | None:
    """Reads `eval_every` or `save_every`.

    Args:
        config: Of the run.
        name: Name of the flag.

    Returns:
        The period, or `None` if the flag is not set.

    Raises:
        UsageError: If it is not a period.
    """
    value = getattr(config, name)
    if value is None:
        return None
    text = str(value)
    minutes = text.endswith("m")
    try:
        number = float(text[:-1]) if minutes else int(text)
    except ValueError:
        number = 0
    _check(config, name, number > 0, "at least 1 step (500), or minutes (10m)")
    return Period(seconds=60 * number) if minutes else Period(steps=int(number))


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """The number of steps in a run."""
    return config.steps or config.epochs * steps_per_epoch


def _check(config: Config, name: str, valid: bool, range_text: str) -> None:
    if not valid:
        value = getattr(config, name)
        raise UsageError(f"{flag(name)}={value} is out of range: {range_text}.")


def flag(name: str) -> str:
    """The command-line form of a field of the configuration."""
    return "--" + name.replace("_", "-")


def _shown(name: str) -> str:
    return json.dumps(getattr(Config, name), default=str)


def _is_unused(folder: Path) -> bool:
    """Whether a folder is missing, empty, or only has a lock file."""
    try:
        return {path.name for path in folder.iterdir()} <= {LOCK}
    except FileNotFoundError:
        return True
    except OSError as error:
        raise UsageError(
            f"--workdir={folder} cannot be written: {error.strerror}. Choose another."
        ) from error
