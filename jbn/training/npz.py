"""Data of one's own: arrays in an `.npz` file."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jbn.training.errors import UsageError
from jbn.training.folders import TEST, TRAIN


_BLOCK_BYTES = 2**20

Convert = Callable[[np.ndarray], np.ndarray]


def read_npz(
    path: Path,
    test_fraction: float,
    convert: Convert = lambda images: images,
) -> Mapping[str, Any]:
    """Reads arrays of images and labels.

    The file has `train_images`, `train_labels`, `test_images` and `test_labels` (or, as
    of Keras, `x_train`, `y_train`, `x_test` and `y_test`), or `images` and `labels`,
    from which the test split is drawn, always the same; and optionally the names of the
    `classes`.

    Images are converted block by block as they are read, so that no array is in memory
    twice.

    Args:
        path: The `.npz` file, without pickled objects.
        test_fraction: The part that is the test split if there is none.
        convert: Of a block of images, of shape (n, height, width, channels).

    Returns:
        `train` and `test`, each a pair of converted images and labels or `None`; and
        `classes` if they are named.

    Raises:
        UsageError: If the file is damaged, or arrays are missing or do not fit.
    """
    if not path.is_file():
        raise UsageError(f"--dataset={path}: there is no such file.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return _read(archive, path, test_fraction, convert)
    except UsageError:
        raise
    except Exception as error:  # Of a damaged file, anything.
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"--dataset={path} is not an .npz file of arrays that can be read: {text}"
        ) from error


class _Names(NamedTuple):
    """The arrays of a split, and what to call its images in messages."""

    image: str
    label: str | None
    what: str


def _read(
    archive: Any, path: Path, test_fraction: float, convert: Convert
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "classes" in archive:
        found["classes"] = [str(name) for name in archive["classes"].ravel()]
    splits = _find(archive, f"--dataset={path}")
    for split, names in splits.items():
        shape = _shape_of_images(archive, names)
        label = _labels(archive, names, shape)
        if "test" in splits:
            rows = {split: np.ones(shape[0], bool)}
        else:
            rows = _draw(shape[0], test_fraction)
        for part, image in _images(archive, names.image, convert, rows).items():
            found[part] = image, None if label is None else label[rows[part]]
    return found


def _find(archive: Any, where: str) -> dict[str, _Names]:
    """The names of the arrays of each split; `train` alone is the whole set."""

    def first(*names: str) -> Any:
        return next((name for name in names if name in archive), None)

    splits = {}
    for split, prefixes in (("train", TRAIN), ("test", TEST)):
        for prefix in prefixes:
            image = first(f"{prefix}_images", f"x_{prefix}")
            if image is not None and split not in splits:
                label = first(f"{prefix}_labels", f"y_{prefix}")
                splits[split] = _Names(image, label, f"{where}: the {prefix} images")
    image = first("images", "image", "x")
    if "train" not in splits and image is not None:
        label = first("labels", "label", "y")
        splits["train"] = _Names(image, label, f"{where}: the images")
    if not splits:
        raise UsageError(
            f"{where} has the arrays {', '.join(archive) or 'none'}: it needs "
            "train_images, train_labels, test_images and test_labels, or images and "
            "labels."
        )
    return splits


def _draw(size: int, test_fraction: float) -> dict[str, np.ndarray]:
    """Which rows are of which split: not the last ones, as many are sorted by class."""
    count = max(1, round(test_fraction * size))
    order = np.random.default_rng(0).permutation(size)
    test = np.zeros(size, bool)
    test[order[size - count :]] = True
    return {"train": ~test, "test": test}


def _shape_of_images(archive: Any, names: _Names) -> tuple[int, ...]:
    """The shape of the images, with an axis of channels."""
    with _open(archive, names.image) as file:
        shape, *_ = _header(file)
    if len(shape) == 3:
        shape = (*shape, 1)
    if len(shape) != 4 or 0 in shape:
        raise UsageError(
            f"{names.what} have shape {shape}; (n, height, width) or (n, height, "
            "width, channels) is needed, with none of them 0."
        )
    return shape


def _labels(archive: Any, names: _Names, shape: tuple[int, ...]) -> np.ndarray | None:
    """The labels, without an axis of length 1."""
    if names.label is None:
        return None
    label = archive[names.label]
    if label.ndim in (2, 4) and label.shape[-1] == 1:
        label = label[..., 0]
    if label.dtype.kind not in "iub" or label.shape not in (shape[:1], shape[:3]):
        raise UsageError(
            f"{names.what} have shape {shape} and labels {label.dtype} of shape "
            f"{label.shape}; integers of shape {shape[:1]}, or for each pixel of "
            f"shape {shape[:3]}, are needed."
        )
    return label.astype(np.int32)


def _images(
    archive: Any, name: str, convert: Convert, rows: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Converted images, those of each split in an array of their own."""
    found: dict[str, np.ndarray] = {}
    count = dict.fromkeys(rows, 0)
    start = 0
    for block in _blocks(archive, name):
        block = convert(block if block.ndim == 4 else block[..., None])
        for split, mask in rows.items():
            part = block[mask[start : start + len(block)]]
            if start == 0:
                shape = (np.count_nonzero(mask), *block.shape[1:])
                found[split] = np.empty(shape, block.dtype)
            found[split][count[split] : count[split] + len(part)] = part
            count[split] += len(part)
        start += len(block)
    return found


def _blocks(archive: Any, name: str) -> Iterator[np.ndarray]:
    """Rows after rows of an array."""
    with _open(archive, name) as file:
        shape, is_fortran, dtype = _header(file)
        if is_fortran or dtype.hasobject:
            yield archive[name]
            return
        size = dtype.itemsize * int(np.prod(shape[1:]))
        most = max(1, _BLOCK_BYTES // size)
        for start in range(0, shape[0], most):
            count = min(most, shape[0] - start)
            data = np.frombuffer(file.read(count * size), dtype)
            yield data.reshape(count, *shape[1:])


def _open(archive: Any, name: str) -> Any:
    """Opens an array of the archive as a file."""
    member = f"{name}.npy"
    return archive.zip.open(member if member in archive.zip.namelist() else name)


def _header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """The shape of an array, whether its axes are in Fortran's order, and its dtype."""
    form = np.lib.format
    if form.read_magic(file) == (1, 0):
        return form.read_array_header_1_0(file)
    return form.read_array_header_2_0(file)
