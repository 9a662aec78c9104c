"""The commands `eval` and `predict`, on a checkpoint of a run."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro

from jbn.training import pictures
from jbn.training.data import read_images
from jbn.training.errors import UsageError
from jbn.training.run import OpenRun, open_run
from jbn.training.tasks import GAN, Supervised


_Run = Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]
_Files = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE ...")]
_Which = Annotated[str, tyro.conf.arg(metavar="best|last|STEP")]
_Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="")]
_Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]

_AT_ONCE = 64  # Images per batch; a segmentation model needs the memory.


def evaluate(
    run: _Run,
    /,
    checkpoint: _Which = "last",
    pictures: _Folder = None,
    per_class: bool = False,
    model: _Text = None,
    dataset: _Text = None,
    data_dir: _Folder = None,
) -> int:
    """Evaluates a checkpoint on the test split. Prints metrics as JSON.

    Args:
        run: Folder of a run, or one of its checkpoints.
        checkpoint: The best on the test set, the last, or a number of steps.
        pictures: Draw the confusion matrix, overlays or samples in this folder.
        per_class: Add the recall, precision and intersection over union of each class.
        model: The run's `module:Class`, if it has one. This imports the module.
        dataset: Another data set with the same names of classes, such as a moved
            folder. By default that of the run.
        data_dir: Folder of prepared data sets. By default that of the run.
    """
    opened = open_run(run, checkpoint, model=model, dataset=dataset, data_dir=data_dir)
    if pictures is not None:
        _make_folder(pictures)
    sums = opened.test_sums(opened.variables)
    metrics: dict[str, Any] = {"step": opened.step, **opened.task.summarize(sums)}
    if per_class:
        classes = opened.dataset.classes
        metrics["classes"] = opened.supervised.by_class(sums, classes)
    print(json.dumps(metrics))
    if pictures is not None:
        figures = opened.task.pictures(opened.variables, sums, opened.dataset)
        for name, figure in figures.items():
            figure.savefig(pictures / f"{name}.png")
            # Not mixed with the JSON.
            print(f"saved in {pictures / name}.png", file=sys.stderr)
    return 0


def predict(
    run: _Run,
    files: _Files = (),
    /,
    out: _Folder = None,
    checkpoint: _Which = "last",
    samples: int = 64,
    seed: int = 0,
    top: int = 1,
    json: bool = False,
    model: _Text = None,
    data_dir: _Folder = None,
) -> int:
    """Applies a checkpoint to image files, or generates images.

    Images are prepared as in evaluation. A classifier prints the class of each image
    and its probability. A segmentation model prints the share of pixels of each class,
    and writes two PNGs to --out: the classes as gray values, and in color over the
    image. A GAN takes no files, and writes samples.png and samples.npy to --out.

    Args:
        run: Folder of a run, or one of its checkpoints.
        files: Image files.
        out: Folder for the files. By default the current folder.
        checkpoint: The best on the test set, the last, or a number of steps.
        samples: Number of images to generate.
        seed: Seed of the generated images.
        top: Print this number of most probable classes of each image.
        json: Print each line as JSON.
        model: The run's `module:Class`, if it has one. This imports the module.
        data_dir: Folder of prepared data sets; only needed for runs of version 0.2 and
            before.
    """
    opened = open_run(run, checkpoint, model=model, data_dir=data_dir)
    folder = Path() if out is None else out
    if isinstance(opened.task, GAN):
        if files:
            raise UsageError(
                "A GAN generates images, and takes none: leave the files out."
            )
        if samples < 1:
            raise UsageError(f"--samples={samples} is out of range: at least 1.")
        if not 0 <= seed < 2**32:
            raise UsageError(f"--seed={seed} is out of range: from 0 to 2^32 - 1.")
        _make_folder(folder)
        _save_samples(opened.task, opened, folder, samples, seed, json)
        return 0
    task = opened.supervised
    if not 1 <= top <= task.num_classes:
        raise UsageError(f"--top={top} is out of range: 1 to {task.num_classes}.")
    if not files:
        raise UsageError("Name the image files to predict, after the checkpoint.")
    data = opened.dataset
    images = read_images(files, data.image_shape, data.part)
    if task.kind == "segmentation":
        _make_folder(folder)
    network: Any = task.model
    apply = jax.jit(lambda v, x: jax.nn.softmax(network.apply(v, x, train=False)))
    parts = [images[i : i + _AT_ONCE] for i in range(0, len(images), _AT_ONCE)]
    probabilities = np.concatenate([apply(opened.variables, x) for x in parts])
    if task.kind == "classification":
        _print_classes(files, probabilities, data.classes, top, json)
    else:
        _save_masks(task, opened, files, images, probabilities, folder, json)
    return 0


def _print_classes(
    files: Sequence[Path],
    probabilities: np.ndarray,
    classes: Sequence[str],
    top: int,
    as_json: bool,
) -> None:
    width = max(len(str(file)) for file in files)
    for file, row in zip(files, probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:top]
        found = [(classes[k], float(row[k])) for k in best]
        if as_json:
            top_k = [{"class": name, "probability": p} for name, p in found]
            print(json.dumps({"file": str(file), **top_k[0], "top": top_k}))
        else:
            text = "  ".join(f"{name}  {p:.4f}" for name, p in found)
            print(f"{file!s:{width}}  {text}")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be a folder: {error}") from error


def _save_samples(
    task: GAN, run: OpenRun, folder: Path, number: int, seed: int, as_json: bool
) -> None:
    from PIL import Image

    images = task.sample(run.variables, number, seed)
    columns = max(1, round(number**0.5))
    sheet = pictures.tiles(pictures.as_rgb(images), columns)
    Image.fromarray(sheet).save(folder / "samples.png")
    np.save(folder / "samples.npy", images)
    if as_json:
        paths = {"picture": "samples.png", "array": "samples.npy"}
        print(json.dumps({name: str(folder / file) for name, file in paths.items()}))
    else:
        print(f"saved {number} images in {folder / 'samples.png'} and samples.npy")


def _save_masks(
    task: Supervised,
    run: OpenRun,
    files: Sequence[Path],
    images: np.ndarray,
    probabilities: np.ndarray,
    folder: Path,
    as_json: bool,
) -> None:
    from PIL import Image

    classes, found = run.dataset.classes, probabilities.argmax(-1)
    colored = pictures.color_labels(images, found, len(classes))
    for i, (file, mask, over) in enumerate(zip(files, found, colored, strict=True)):
        shares = np.bincount(mask.ravel(), minlength=task.num_classes) / mask.size
        share_of = dict(zip(classes, map(float, shares), strict=True))
        # Files in different folders may have the same name.
        name = f"{i:04d}-{file.stem}"
        path, overlay = folder / f"{name}-mask.png", folder / f"{name}-overlay.png"
        Image.fromarray(mask.astype(np.uint8)).save(path)
        Image.fromarray(over).save(overlay)
        if as_json:
            saved = {"mask": str(path), "overlay": str(overlay)}
            print(json.dumps({"file": str(file), "shares": share_of, **saved}))
        else:
            text = "  ".join(f"{k}: {100 * v:.1f} %" for k, v in share_of.items())
            print(f"{file}  {text}  {path}")


COMMANDS = {"eval": evaluate, "predict": predict}
