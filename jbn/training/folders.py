"""Data of one's own: folders of class folders, and paired folders."""

import dataclasses
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jbn.training.errors import UsageError
from jbn.training.source import Examples, Source, Target


# Names of splits.
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")
_IMAGES = ("images", "image")
_MASKS = ("masks", "mask", "labels", "annotations")
_LAYOUT = "`train/CLASS/*.png` and `test/CLASS/*.png`, or `CLASS/*.png`"


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files with their labels.

    Attributes:
        images: The files.
        labels: For each the number of its class, or the file with its mask.
    """

    images: Sequence[Path]
    labels: Sequence[int | Path]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {"image": self.images[index], "label": self.labels[index]}

    def where(self, chosen: np.ndarray) -> "Files":
        """Those of a boolean mask."""
        rows = np.flatnonzero(chosen).tolist()
        return Files([self.images[i] for i in rows], [self.labels[i] for i in rows])


def find(name: str) -> Path | None:
    """Tells a data set that is a path from one that is a name in TFDS.

    Args:
        name: The path of a folder or an `.npz` file, or the name.

    Returns:
        The path, or `None` for a name.

    Raises:
        UsageError: If it can only be a path, and there is no such folder or file.
    """
    path = Path(name).expanduser()
    # (A name in TFDS has one slash at most, before its configuration.)
    is_path = name.startswith((".", "~", "/")) or name.count("/") > 1
    if not is_path and path.suffix != ".npz":
        if not path.exists():
            return None
        from jbn.training.prepare import known_names

        if re.split("[/:]", name)[0] in known_names():
            return None
    if path.is_dir() or (path.is_file() and path.suffix == ".npz"):
        return path
    raise UsageError(f"--dataset={name} is neither a folder nor an .npz file.")


def open_folder(
    path: Path,
    target: Target | None,
    *,
    test_fraction: float,
    classes: Sequence[str] | None = None,
) -> Source:
    """Finds the images of a folder.

    Images of classes lie in one folder for each class, `CLASS/*.png`; images with masks
    in two folders with equal names of files, `images/*.jpg` and `masks/*.png`; images
    alone anywhere. All of it lies in `train/` and `test/`, or else a part of the files
    is split off as the test split. Which, depends on their names alone: it is the same
    wherever the folder lies, and changes little where files are added.

    Args:
        path: The folder.
        target: What to learn, as of `load_dataset`.
        test_fraction: The part, of each class, that is the test split if there is no
            folder of it.
        classes: Names of the classes in the order of their numbers. By default the
            sorted names of the folders.

    Returns:
        The splits.

    Raises:
        UsageError: If files or folders are missing.
    """
    train, test = _subfolder(path, TRAIN), _subfolder(path, TEST)
    roots = [root for root in (train, test) if root is not None] or [path]
    if target == "label" and classes is None:
        classes = sorted({folder.name for root in roots for folder in _folders(root)})
        if len(classes) < 2:
            raise UsageError(
                f"--dataset={path} needs at least 2 class folders and has "
                f"{len(classes)}: {_LAYOUT}."
            )
    read = {
        "label": lambda root: _by_class(root, classes or ()),
        "segmentation_mask": _pairs,
        None: _alone,
    }[target]
    splits: dict[str, Callable[[], Examples]] = {}
    if train is None and test is None:
        splits = _split(read(path), path, test_fraction)
    elif train is None or test is not None:
        for name, root in (("train", train), ("test", test)):
            if root is not None:
                splits[name] = lambda root=root: read(root)
    else:
        splits = _split(read(train), path, test_fraction)
    named = tuple(classes or ()) if target == "label" else ()
    return Source(str(path), named, 3, None, splits)


def _subfolder(path: Path, names: Sequence[str]) -> Path | None:
    try:
        folders = {f.name.lower(): f for f in path.iterdir() if f.is_dir()}
    except OSError as error:
        raise UsageError(
            f"--dataset={path} is not a folder that can be read: {error.strerror}."
        ) from error
    return next((folders[name] for name in names if name in folders), None)


def _folders(root: Path) -> list[Path]:
    found = (f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    return sorted(found)


def _pictures(root: Path) -> list[Path]:
    """All image files in a folder and below it, in the order of their names."""
    Image.init()
    found = (
        f
        for f in root.rglob("*")
        if f.suffix.lower() in Image.EXTENSION and not f.name.startswith(".")
    )
    return sorted(f for f in found if f.is_file())


def _by_class(root: Path, classes: Sequence[str]) -> Files:
    images: list[Path] = []
    labels: list[int | Path] = []
    for folder in _folders(root):
        found = _pictures(folder)
        if not found:
            raise UsageError(
                f"The class folder {folder} has no images: add some, or remove the "
                "folder."
            )
        if folder.name not in classes:
            raise UsageError(
                f"{folder} is not of a class that there is: {', '.join(classes)}. "
                "Rename or remove the folder."
            )
        images += found
        labels += [classes.index(folder.name)] * len(found)
    if not images:
        raise UsageError(f"{root} has no class folders with images: {_LAYOUT}.")
    return Files(images, labels)


def _pairs(root: Path) -> Files:
    images, masks = _subfolder(root, _IMAGES), _subfolder(root, _MASKS)
    if images is None or masks is None:
        raise UsageError(
            f"{root} has no folders `images` and `masks`: a segmentation set has an "
            "image and its mask in these two, in files of the same name."
        )
    image_of, mask_of = _by_stem(images), _by_stem(masks)
    for one, other, where in (
        (image_of, mask_of, masks),
        (mask_of, image_of, images),
    ):
        for stem, file in one.items():
            if stem not in other:
                raise UsageError(f"{file} has no counterpart {stem}.* in {where}.")
    if not image_of:
        raise UsageError(f"{images} has no images.")
    stems = sorted(image_of)
    return Files([image_of[s] for s in stems], [mask_of[s] for s in stems])


def _by_stem(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in _pictures(folder):
        stem = str(file.relative_to(folder).with_suffix(""))
        if stem in found:
            raise UsageError(f"{found[stem]} and {file} differ in their suffix alone.")
        found[stem] = file
    return found


def _alone(root: Path) -> Files:
    images = _pictures(root)
    if not images:
        raise UsageError(f"--dataset={root} has no images.")
    return Files(images, [0] * len(images))


def _split(
    files: Files, root: Path, fraction: float
) -> dict[str, Callable[[], Examples]]:
    """Splits off, of each class, the files with the lowest checksums of their names."""
    keys = np.array(
        [zlib.crc32(str(f.relative_to(root).as_posix()).encode()) for f in files.images]
    )
    classes = np.array([k if isinstance(k, int) else 0 for k in files.labels])
    is_test = np.zeros(len(files), bool)
    for k in np.unique(classes):
        rows = np.flatnonzero(classes == k)
        count = round(fraction * len(rows))
        is_test[rows[np.argsort(keys[rows], kind="stable")[:count]]] = True
    if is_test.all() or not is_test.any():
        raise UsageError(
            f"--test-fraction={fraction:g} of the {len(files)} images in {root} leaves "
            f"{is_test.sum()} to test on: add images, or folders `train` and `test`."
        )
    train, test = files.where(~is_test), files.where(is_test)
    return {"train": lambda: train, "test": lambda: test}
