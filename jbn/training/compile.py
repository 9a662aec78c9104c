"""The command `compile`: compiles the training step for any devices."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jbn.training.ahead import compile_ahead, topology_devices
from jbn.training.build import make_task, open_dataset
from jbn.training.config import Config, model_in, preset
from jbn.training.data import Dataset, InMemory
from jbn.training.devices import describe, select_devices
from jbn.training.errors import UsageError
from jbn.training.executor import Executor
from jbn.training.step import create_state, make_train_step


_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
_Shape = Annotated[
    tuple[int, int, int] | None,
    tyro.conf.arg(metavar="HEIGHT WIDTH CHANNELS", help_behavior_hint=""),
]
_Level = Annotated[
    Literal["O0", "O1", "O2", "O3"] | None,
    tyro.conf.arg(metavar="{O0,O1,O2,O3}", help_behavior_hint=""),
]


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compiles the training step, without running it.

    Prints the memory that a device needs and has, the work of a step, and the
    communication between devices.

    Attributes:
        config: The flags of training. --batch-size is the total over all devices.
        topology: Devices to compile for. For TPUs, the generation and the shape of the
            slice, such as `v5e:2x2`; for GPUs, a file that describes one, the number of
            hosts, and the GPUs of each, such as `h100.txt:1x8`. By default the local
            devices.
        shape: Shape of images, instead of a data set.
        num_classes: Number of classes, together with --shape.
        level: The compiler's effort, by default full. `O0` takes seconds instead of
            minutes, and reports about the same memory.
        json: Write the numbers to this file.
    """

    config: tyro.conf.OmitArgPrefixes[Config]
    topology: _Text = None
    shape: _Shape = None
    num_classes: int = 1000
    level: _Level = None
    json: _File = None


def main(args: Sequence[str], prog: str = "jbn compile") -> int:
    """Runs the command; returns the exit status."""
    default = Compile(config=preset(model_in(args)))
    annotated = Annotated[Compile, tyro.conf.FlagCreatePairsOff]
    command = tyro.cli(annotated, args=args, default=default, prog=prog)
    config, topology = command.config, command.topology
    if topology is None:
        devices = select_devices(config.accelerator, config.num_devices)
    elif config.accelerator in ("tpu", "gpu"):
        devices = topology_devices(config.accelerator, topology)
    else:
        raise UsageError("--topology needs --accelerator=tpu or gpu.")
    print(f"devices  {describe(devices)}, by {config.parallel}", flush=True)
    if config.batch_size % (len(devices) * config.microbatches):
        raise UsageError(
            f"--batch-size={config.batch_size} is not a multiple of {len(devices)} "
            f"devices times {config.microbatches} microbatches. It would be padded."
        )
    lowered = lower(config, _dataset(command), Executor(devices, config.parallel))
    report = compile_ahead(lowered, level=command.level)
    print(report)
    if command.json is not None:
        command.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return 0


def lower(config: Config, dataset: Dataset, executor: Executor) -> Any:
    """Lowers the step that `train.py` runs.

    Args:
        config: Of the run.
        dataset: The data, of which only shapes are used.
        executor: With the devices.

    Returns:
        A `jax.stages.Lowered`.
    """
    task = make_task(config, dataset, executor, steps_per_epoch=1000)
    averaged = config.ema_decay is not None
    state = jax.eval_shape(lambda: create_state(task, config.seed, averaged=averaged))
    rows = config.batch_size
    label = (rows, *dataset.image_shape[:2]) if config.model == "unet" else (rows,)
    batch = {
        "image": jax.ShapeDtypeStruct((rows, *dataset.image_shape), jnp.uint8),
        "label": jax.ShapeDtypeStruct(label, jnp.int32),
        "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "weight": jax.ShapeDtypeStruct((rows,), jnp.float32),
    }
    step = make_train_step(task, seed=config.seed, ema_decay=config.ema_decay)
    return executor.lower(step, state, batch)


def _dataset(command: Compile) -> Dataset:
    config = command.config
    if command.shape is None:
        # (Cropping does not change the shape of the images.)
        return open_dataset(dataclasses.replace(config, crop=False))
    nothing = InMemory(np.zeros((0, *command.shape), np.uint8), np.zeros(0, np.int32))
    classes = [str(i) for i in range(command.num_classes)]
    return Dataset("images", classes, command.shape, nothing, nothing)
