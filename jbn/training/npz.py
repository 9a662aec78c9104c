"""Data of one's own: arrays in an `.npz` file."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jbn.training.errors import UsageError
from jbn.training.folders import TEST, TRAIN


_BLOCK_BYTES = 2**20
_CHANNELS = (1, 3, 4)  # The usual numbers of channels.

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
        if "test" in splits:
            rows = {split: np.ones(shape[0], bool)}
        else:
            rows = _draw(shape[0], test_fraction)
        label = dict.fromkeys(rows)
        if names.label is not None:
            _check_labels(archive, names, shape)
            to_int32 = lambda block: block.astype(np.int32)
            label = _rows(archive, names.label, to_int32, rows)
        image = _rows(
            archive, names.image, lambda block: convert(_with_channels(block)), rows
        )
        for part in rows:
            found[part] = image[part], _without_unit_axis(label[part])
    return found


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images if images.ndim == 4 else images[..., None]


def _without_unit_axis(label: np.ndarray | None) -> np.ndarray | None:
    if label is not None and _has_unit_axis(label.shape):
        return label[..., 0]
    return label


def _has_unit_axis(shape: tuple[int, ...]) -> bool:
    return len(shape) in (2, 4) and shape[-1] == 1


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
    if shape[1] in _CHANNELS and shape[3] > max(_CHANNELS):
        raise UsageError(
            f"{names.what} have shape {shape}, which looks like (n, channels, height, "
            "width); (n, height, width, channels) is needed: "
            "images.transpose(0, 2, 3, 1)."
        )
    return shape


def _check_labels(archive: Any, names: _Names, shape: tuple[int, ...]) -> None:
    """Refuses labels that are no numbers of classes, one for each image or pixel."""
    with _open(archive, str(names.label)) as file:
        found, _, dtype = _header(file)
    fits = (found[:-1] if _has_unit_axis(found) else found) in (shape[:1], shape[:3])
    if dtype.kind in "iub" and fits:
        return
    hint = ""
    if dtype.kind in "OSU":
        hint = (
            " For names, save `classes, labels = np.unique(names, return_inverse=True)`"
            " as `classes` and `labels`."
        )
    elif len(found) == 2 and found[0] == shape[0]:
        hint = " For one-hot labels, save labels.argmax(1)."
    elif dtype.kind == "f" and fits:
        hint = " For whole numbers, save labels.astype(int)."
    raise UsageError(
        f"{names.what} have shape {shape} and labels {dtype} of shape {found}; "
        f"integers of shape {shape[:1]}, or for each pixel of shape {shape[:3]}, are "
        f"needed.{hint}"
    )


def _rows(
    archive: Any, name: str, convert: Convert, rows: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Converted rows of an array, those of each split in an array of their own."""
    found: dict[str, np.ndarray] = {}
    count = dict.fromkeys(rows, 0)
    start = 0
    for block in _blocks(archive, name):
        block = convert(block)
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
