"""The commands that apply `jbn.tools` to the folder of a run."""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.serialization
import jax
import numpy as np
import tyro

from jbn import models, tools
from jbn.tools import fold, from_torch, inspect
from jbn.training.errors import UsageError, one_line
from jbn.training.run import OpenRun, open_run, refuse_existing, save_run


_Run = Annotated[Path, tyro.conf.arg(metavar="RUN")]
_File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")]
_Which = Annotated[str, tyro.conf.arg(metavar="best|last|STEP")]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
_Count = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]


def inspect_run(
    run: _Run,
    /,
    checkpoint: _Which = "last",
    batches: _Count = None,
    split: Literal["train", "test"] = "train",
    figure: _File = None,
    json: _File = None,
    strict: bool = False,
    model: _Text = None,
    dataset: _Text = None,
    data_dir: _Folder = None,
) -> int:
    """Reports where evaluation differs from training, layer by layer, with advice.

    Compares the running statistics of each batch norm with the moments of the data.
    Prints a table, and the findings below it. Does not change the run.

    Args:
        run: Folder of a run of train.py.
        checkpoint: The best on the test set, the last, or a number of steps.
        batches: Number of batches to read. By default all.
        split: The data to read.
        figure: Draw the layers to this new file, such as a .png or .pdf.
        json: Write the numbers to this new file.
        strict: Exit with 1 if a finding is worse than a note.
        model: The run's `module:Class`, if it has one. This imports the module.
        dataset: Another data set with the same names of classes. By default that of the
            run.
        data_dir: Folder of prepared data sets. By default that of the run.
    """
    for path in (figure, json):
        if path is not None:
            refuse_existing(path)
    if figure is not None:
        _check_figure(figure)
    opened = _open(run, checkpoint, model, dataset, data_dir, batches)
    report = inspect(
        opened.supervised.apply,
        opened.variables,
        opened.batches(split, most=batches),
    )
    print(f"{opened.describe()}, on {report.num_batches} batches")
    print(report)
    if figure is not None:
        report.figure(figure)
    if json is not None:
        json.write_text(_as_json(report.as_dict()))
    return 1 if strict and not report.healthy else 0


def recalibrate_run(
    run: _Run,
    /,
    out: Annotated[Path, tyro.conf.arg(metavar="NEWRUN")],
    checkpoint: _Which = "last",
    batches: _Count = None,
    model: _Text = None,
    dataset: _Text = None,
    data_dir: _Folder = None,
) -> int:
    """Replaces running averages by the statistics of the training data ("precise BN").

    Prints the test accuracy before and after, and writes a new run, which can be
    inspected, or resumed by train.py. The old run does not change.

    Args:
        run: Folder of a run of train.py.
        out: Folder of the new run; must not exist.
        checkpoint: The best on the test set, the last, or a number of steps.
        batches: Number of batches for the statistics. By default all.
        model: The run's `module:Class`, if it has one. This imports the module.
        dataset: Another data set with the same names of classes. By default that of the
            run.
        data_dir: Folder of prepared data sets. By default that of the run.
    """
    refuse_existing(out)
    opened = _open(run, checkpoint, model, dataset, data_dir, batches)
    before = opened.evaluate(opened.variables)
    variables = tools.recalibrate(
        opened.task.apply, opened.variables, opened.batches(most=batches)
    )
    after = opened.evaluate(variables)
    state = opened.state.with_variables(variables)
    save_run(opened, out, state, after, opened.progress)
    _print_metrics(opened, before, "recalibrated", after)
    print(f"saved in {out}")
    return 0


def fold_run(
    run: _Run,
    /,
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    checkpoint: _Which = "last",
    model: _Text = None,
    dataset: _Text = None,
    data_dir: _Folder = None,
) -> int:
    """Folds batch norms into the adjacent linear layers, for inference.

    Prints the result for each batch norm, and the test accuracy before and after.
    Writes the remaining variables; a .npz has names like params/Dense_0/kernel.

    Args:
        run: Folder of a run of train.py.
        out: A new .npz file, or .msgpack (flax.serialization).
        checkpoint: The best on the test set, the last, or a number of steps.
        model: The run's `module:Class`, if it has one. This imports the module.
        dataset: Another data set with the same names of classes. By default that of the
            run.
        data_dir: Folder of prepared data sets. By default that of the run.
    """
    if out.suffix not in (".npz", ".msgpack"):
        raise UsageError(f"--out={out} must end in .npz or .msgpack.")
    refuse_existing(out)
    opened = _open(run, checkpoint, model, dataset, data_dir)
    network = opened.supervised.model
    images = opened.dataset.test.rows(np.zeros(1, np.int64))["image"]
    folded = fold(network, opened.variables, images, train=False)
    before = opened.evaluate(opened.variables)
    after = opened.evaluate(folded.variables, folded)
    variables = jax.device_get(folded.variables)
    with out.open("xb") as file:
        if out.suffix == ".npz":
            np.savez(file, allow_pickle=False, **_flat(variables))
        else:
            file.write(flax.serialization.msgpack_serialize(variables))
    for path, what in folded.report.items():
        print(f"{path} {what}")
    _print_metrics(opened, before, "folded", after)
    print(f"saved in {out}")
    return 0


def port_run(
    file: Annotated[Path, tyro.conf.arg(metavar="FILE")],
    /,
    to: Annotated[Path, tyro.conf.arg(metavar="RUN")],
    out: Annotated[Path, tyro.conf.arg(metavar="NEWRUN")],
    names: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="OURS=THEIRS ...", help_behavior_hint=""),
    ] = (),
    skip: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint=""),
    ] = (),
    model: _Text = None,
    dataset: _Text = None,
    data_dir: _Folder = None,
) -> int:
    """Fills the model of a run with the weights and statistics of a PyTorch model.

    Prints the test accuracy and writes a new run, with a new optimizer state. The old
    run does not change. By default, PyTorch's names are ours with dots instead of
    slashes, or for a ResNet those of torchvision; --names maps others. Images are
    channels-last here: for a Dense on a flattened image of several channels, reorder
    its weights first.

    Args:
        file: A state dict: .pt (needs PyTorch), or .npz with arrays.
        to: Folder of a run of train.py, with the same model.
        out: Folder of the new run; must not exist.
        names: Our names of layers and PyTorch's: Dense_0=0 BatchNorm_0=2.
        skip: Layers to leave unchanged: 'head/*' for a head with other classes.
        model: The run's `module:Class`, if it has one. This imports the module.
        dataset: Another data set with the same names of classes. By default that of the
            run.
        data_dir: Folder of prepared data sets. By default that of the run.
    """
    pairs = [name.partition("=") for name in names]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise UsageError(f"--names must be OURS=THEIRS each; got {' '.join(names)}.")
    refuse_existing(out)
    state_dict = _read_state_dict(file)
    opened = _open(to, "last", model, dataset, data_dir)
    network = opened.supervised.model
    renamed = {ours: theirs for ours, _, theirs in pairs}
    is_torchvision = isinstance(network, models.ResNet) and "conv1.weight" in state_dict

    def their_name(path: str) -> str:
        default = models.torchvision_name if is_torchvision else _dotted
        return renamed.get(path) or default(path)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Only modules have options to compare.
            variables = from_torch(
                state_dict, opened.variables, names=their_name, skip=skip
            )
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file} does not fit {to}: {one_line(error)}") from error
    test = opened.evaluate(variables)
    state = dataclasses.replace(
        opened.state,
        **variables,
        opt_state=jax.jit(opened.supervised.optimizer.init)(variables["params"]),
        average=dict(variables) if opened.state.average else {},
    )
    save_run(opened, out, state, test)
    _print_metrics(opened, test)
    print(f"saved in {out}")
    return 0


COMMANDS = {
    "inspect": inspect_run,
    "recalibrate": recalibrate_run,
    "fold": fold_run,
    "port": port_run,
}


def _open(
    run: Path,
    checkpoint: str,
    model: str | None,
    dataset: str | None,
    data_dir: Path | None,
    batches: int | None = None,
) -> OpenRun:
    if batches is not None and batches < 1:
        raise UsageError(f"--batches={batches} is out of range: at least 1.")
    return open_run(run, checkpoint, model=model, dataset=dataset, data_dir=data_dir)


def _dotted(path: str) -> str:
    return path.replace("/", ".")


def _read_state_dict(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path} is not a file.")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            f"{path} needs PyTorch, which is not installed: `pip install torch`, or"
            " save the arrays under the same names as .npz."
        ) from error
    except Exception as error:
        raise UsageError(f"{path} is not an .npz: {one_line(error)}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Torch raises anything here.
        raise UsageError(
            f"{path} is not a state dict that torch.save wrote"
            f" ({type(error).__name__}: {one_line(error)})."
        ) from error
    if not isinstance(state, Mapping) or not all(
        hasattr(v, "shape") for v in state.values()
    ):
        raise UsageError(f"{path} does not hold a state dict: tensors by name.")
    return state


def _flat(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
        for key, leaf in leaves
    }


def _check_figure(path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise UsageError(f"--figure={path} must end in one of .{', .'.join(kinds)}.")


def _as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def _print_metrics(
    run: OpenRun, before: Mapping[str, float], what: str = "", after: Any = None
) -> None:
    metric = run.task.metric
    text = f"test {metric.label}: {metric.show(before[metric.name])}"
    if after is not None:
        text += f", {what}: {metric.show(after[metric.name])}"
    print(text)
