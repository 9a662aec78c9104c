"""Data sets of images: from a folder, a file of arrays, or TFDS; in memory or not."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from jbn.training import folders
from jbn.training.decoded import keep
from jbn.training.errors import UsageError
from jbn.training.images import (
    Part,
    Preparation,
    as_uint8,
    decode,
    decode_labels,
    random_box,
    resize,
)
from jbn.training.npz import read_npz
from jbn.training.source import Examples, Source, Target


Loader = Literal["memory", "grain"]

_READ_AT_ONCE = 1024
_MOST_IN_MEMORY = 4 * 2**30  # Bytes of pixels, of both splits.
_VOID = 255  # The value of pixels without a label, as in Pascal VOC.

# Data sets are compared by this number of examples of each split. The same files may be
# decoded a little differently elsewhere: JPEGs differ by one of 255 between libraries.
_SAMPLES = 16
_MOST_DIFFERENT_LABEL, _MOST_DIFFERENT_PIXELS = 0.01, 2.0


@runtime_checkable
class Split(Protocol):
    """The examples of a split, by number."""

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of these numbers: `image`, uint8, and `label`, int32."""
        ...


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Arrays with one row per example.

    Attributes:
        image: uint8, of shape (n, height, width, channels).
        label: int32, of shape (n,), or (n, height, width) for labels of pixels, where
            -1 is none.
    """

    image: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of these numbers."""
        return {"image": self.image[indices], "label": self.label[indices]}


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """Examples that are read and decoded one by one, as needed.

    Attributes:
        source: Examples by number, with encoded images.
        preparation: Prepares each image.
        crop: Whether to take a random crop of each image instead, of 8 to 100 % of the
            area.
        seed: Seed of the crops, with the number of the example and the `epoch`.
        name: What to call the split in messages.
    """

    source: Examples
    preparation: Preparation
    crop: bool = False
    seed: int = 0
    name: str = "the data set"

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """One example."""
        example = self.source[index]
        image, name = example["image"], _name(example["image"], index, self.name)
        if self.crop:
            pixels = decode(image, self.preparation.shape[-1], name)
            rng = np.random.default_rng([self.seed, epoch, index])
            box = random_box(rng, *pixels.shape[:2])
            image = resize(pixels, self.preparation.shape[:2], box)
        else:
            image = self.preparation(image, name)
        return {"image": image, "label": np.asarray(example["label"], np.int32)}

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of these numbers."""
        found = [self.row(int(index)) for index in indices]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}


class Dataset:
    """A training and a test split.

    Args:
        name: The name of the data set.
        classes: The names of the classes.
        image_shape: Shape of one image.
        train: The split to train on, or a function that opens it.
        test: The split to test on, or a function that opens it.
        part: Part of each image to use in evaluation (see `Preparation`).
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        image_shape: tuple[int, ...],
        train: Split | Callable[[], Split],
        test: Split | Callable[[], Split],
        part: Part = "whole",
    ):
        self.name, self.classes = name, classes
        self.part: Part = part
        self.image_shape = tuple(image_shape)
        self._train, self._test = train, test

    @functools.cached_property
    def train(self) -> Split:
        """The split to train on."""
        return self._train if isinstance(self._train, Split) else self._train()

    @functools.cached_property
    def test(self) -> Split:
        """The split to test on."""
        return self._test if isinstance(self._test, Split) else self._test()

    def describe(self) -> "Description":
        """The description that a model needs to be used elsewhere."""
        return Description(
            name=self.name,
            classes=tuple(self.classes),
            image_shape=self.image_shape,
            part=self.part,
            num_train=len(self.train),
            num_test=len(self.test),
            samples=(*_samples(self.train), *_samples(self.test)),
        )


def _samples(split: Split) -> Iterator[tuple[float, float]]:
    """The mean of the label and of the pixels, of a few examples."""
    count = min(len(split), _SAMPLES)
    for index in np.linspace(0, len(split) - 1, count).astype(np.int64):
        row = split.rows(index[None])
        label, pixels = (float(np.mean(row[name])) for name in ("label", "image"))
        yield round(label, 3), round(pixels, 3)


@dataclasses.dataclass(frozen=True)
class Description:
    """The description of a data set that a run saves, to be evaluated elsewhere.

    Attributes:
        name: Name of the data set.
        classes: The names of the classes, in the order of their numbers.
        image_shape: Shape of one image, as the model takes it.
        part: Part of each image to use (see `Preparation`).
        num_train: Number of training examples.
        num_test: Number of test examples.
        samples: For some training and test examples, the mean of the label and the mean
            of the pixels, from 0 to 255. Runs of version 0.2 and before have none.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, ...]
    part: Part
    num_train: int
    num_test: int
    samples: tuple[tuple[float, float], ...] = ()

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Description":
        """Reads what `save` wrote.

        Raises:
            UsageError: If the file is not a description.
        """
        try:
            values = json.loads(path.read_text())
            found = cls(
                name=str(values["name"]),
                classes=tuple(map(str, values["classes"])),
                image_shape=tuple(map(int, values["image_shape"])),
                part=values["part"],
                num_train=int(values["num_train"]),
                num_test=int(values["num_test"]),
                samples=tuple(
                    (float(label), float(pixels))
                    for label, pixels in values.get("samples", ())
                ),
            )
            if len(found.image_shape) != 3 or found.part not in ("whole", "middle"):
                raise ValueError("a shape of three sizes and a part are needed")
            if min(*found.image_shape, found.num_train) < 1:
                raise ValueError("sizes must be at least 1")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"{path} does not describe the data set of a run "
                f"({type(error).__name__}: {error})."
            ) from error
        return found

    def difference(self, other: "Description") -> str | None:
        """Tells in words how the examples of another data set differ from these.

        Its name and place may be others: examples are compared by their number, their
        shape and classes, and some of them by their label and mean brightness.

        Args:
            other: The description of the other data set.

        Returns:
            The first difference found; `None` if there is none.
        """
        for name, what in (
            ("num_train", "training images"),
            ("num_test", "test images"),
            ("classes", "as classes"),
            ("image_shape", "as the shape of its images"),
        ):
            there, here = getattr(other, name), getattr(self, name)
            if there != here:
                return f"it has {_listed(there)} {what}, and the run {_listed(here)}"
        if not self.samples:
            return None
        there, here = np.array(other.samples), np.array(self.samples)
        limits = np.array([_MOST_DIFFERENT_LABEL, _MOST_DIFFERENT_PIXELS])
        if there.shape == here.shape and (abs(there - here) <= limits).all():
            return None
        return "its examples, or their order, are others"

    def dataset(self, find: Callable[[], Dataset]) -> Dataset:
        """The data set, which is only opened when its examples are needed.

        Args:
            find: Opens it.

        Returns:
            The data set of this description.
        """
        found = functools.cache(find)
        return Dataset(
            self.name,
            self.classes,
            self.image_shape,
            lambda: found().train,
            lambda: found().test,
            self.part,
        )


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}"


def load_dataset(
    name: str,
    *,
    target: Target | None = "label",
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    image_size: int | None = None,
    loader: Loader | None = None,
    crop: bool = False,
    seed: int = 0,
    test_fraction: float = 0.2,
    like: Description | None = None,
) -> Dataset:
    """Opens a data set, and prepares it first if needed.

    The test split is `test`, or else `validation`, or else a part of `train`, which is
    then excluded from the training split.

    Args:
        name: Its name in TFDS, or `digits`, or `digit_trimaps`; or the path of a folder
            of images (see `folders.open_folder`) or of an `.npz` file of arrays (see
            `npz.read_npz`).
        target: What to learn: the `label` of an image, or a `segmentation_mask` with
            one of its pixels; `None` for images alone.
        data_dir: Folder of prepared data sets; `None` for TFDS's own default.
        manual_dir: Folder with the original files, for a set that cannot be downloaded.
        image_size: Height and width to resize the images to.
        loader: `memory` reads a split when it is first needed; `grain` each example.
            `None` for memory unless that would take more than 4 GiB. The images are the
            same.
        crop: Whether to cut out random parts of training images, and to test on middle
            parts (grain alone).
        seed: Of these.
        test_fraction: The part of `train` to test on if there is no other split.
        like: The data set of a run: images get its shape and labels its numbers. Splits
            are then opened when they are first needed, and one may be missing.

    Returns:
        Both splits, in the order in which they lie on disk.

    Raises:
        UsageError: If the set is missing and cannot be prepared, has no such target, or
            has images of different sizes and `image_size` is `None`.
    """
    with _quiet():
        size = None if image_size is None else (image_size, image_size)
        if like is not None:
            size = like.image_shape[0], like.image_shape[1]
        path = folders.find(name)
        if path is not None and path.suffix == ".npz":
            if loader == "grain" or crop:
                raise UsageError(
                    f"--dataset={path} is read into memory: leave --loader=grain and "
                    "--crop out."
                )
            return _from_npz(path, target, size, test_fraction, like)
        if path is not None:
            classes = None if like is None else like.classes
            source = folders.open_folder(
                path, target, test_fraction=test_fraction, classes=classes
            )
        else:
            from jbn.training.tfds_source import open_prepared

            source = open_prepared(
                name,
                target,
                data_dir=data_dir,
                manual_dir=manual_dir,
                test_fraction=test_fraction,
            )
        dataset = _from_source(source, target, size, loader, crop, seed, like)
        if like is None:
            _ = dataset.train, dataset.test
        return dataset


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences TFDS's reports of each step and about Pillow, but not errors."""
    import absl.logging

    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _from_source(
    source: Source,
    target: Target | None,
    size: tuple[int, int] | None,
    loader: Loader | None,
    crop: bool,
    seed: int,
    like: Description | None,
) -> Dataset:
    if like is None:
        for split in _SPLITS:
            _refuse_missing(source, split)
    channels = source.channels if like is None else like.image_shape[-1]
    size = None if size == source.size else size
    opened = {name: functools.cache(open_) for name, open_ in source.splits.items()}
    known = size or source.size
    if loader is None:
        examples = [open_() for open_ in opened.values()]
        large = _bytes_in_memory(examples, known, channels) > _MOST_IN_MEMORY
        loader = "grain" if large else "memory"
    if loader == "memory" and crop:
        raise UsageError("--crop needs a set that is read with --loader=grain.")
    if loader == "grain" and known is None:
        raise UsageError(
            f"`{source.name}` is read from disk, image by image: pass --image-size, "
            "the height and width to resize to."
        )
    if loader == "grain" and target == "segmentation_mask":
        raise UsageError(
            f"`{source.name}` has labels of pixels, and such sets are read into "
            "memory: pass --loader=memory, and an --image-size with which it fits."
        )
    numbers = None
    if target == "label" and like is not None:
        numbers = _numbers(f"`{source.name}`", source.classes, like.classes)
    part: Part = "middle" if crop else "whole"

    @functools.cache
    def open_split(split: str) -> Split:
        _refuse_missing(source, split)
        name = f"the split `{split}` of `{source.name}`"
        with _quiet():
            examples = opened[split]()
            if numbers is not None:
                examples = _Renumbered(examples, numbers)
            if loader == "grain":
                assert known is not None
                preparation = Preparation((*known, channels), part)
                random = crop and split == "train"
                return OnDisk(examples, preparation, random, seed, name)
            make = lambda: _decode(examples, channels, size, target, name)
            if numbers is not None or split not in source.decoded:
                return InMemory(**make())
            file = source.decoded[split]
            what = "-".join(map(str, (target, *(size or ("whole",)), channels)))
            return InMemory(**keep(file.with_name(f"{file.name}-{what}.npz"), make))

    train, test = (functools.partial(open_split, split) for split in _SPLITS)
    if like is not None:
        shape = like.image_shape
    elif known is not None:
        shape = (*known, channels)
    else:
        shape = train().rows(np.zeros(1, np.int64))["image"].shape[1:]
    if target == "segmentation_mask":
        return _segmentation(source.name, shape, train, test, like)
    classes = source.classes if like is None else like.classes
    return Dataset(source.name, classes, shape, train, test, part)


def _refuse_missing(source: Source, split: str) -> None:
    if split not in source.splits:
        raise UsageError(f"--dataset={source.name} has no folder `{split}`.")


def _segmentation(
    name: str,
    shape: tuple[int, ...],
    train: Callable[[], Split],
    test: Callable[[], Split],
    like: Description | None,
) -> Dataset:
    """A data set with the labels of pixels counted from 0."""
    classes = like.classes if like else _class_values(train().label, test().label)  # type: ignore[attr-defined]
    values = np.array([int(value) for value in classes])
    return Dataset(
        name,
        [str(value) for value in values],
        shape,
        lambda: _from_zero(train(), values, name),
        lambda: _from_zero(test(), values, name),
    )


_SPLITS = ("train", "test")


class _Renumbered:
    """Examples with the class numbers of a run."""

    def __init__(self, examples: Examples, numbers: np.ndarray):
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        example = self._examples[index]
        return {**example, "label": self._numbers[example["label"]]}


def _numbers(
    name: str, classes: Sequence[str], wanted: Sequence[str]
) -> np.ndarray | None:
    """The run's number of each class of a set; `None` if they are the same."""
    if tuple(classes) == tuple(wanted):
        return None
    for unknown in classes:
        if unknown not in wanted:
            raise UsageError(
                f"{name} has the class {unknown}, which the run does not have: its "
                f"classes are {', '.join(wanted)}."
            )
    return np.array([wanted.index(name) for name in classes], np.int32)


def _bytes_in_memory(
    examples: Sequence[Examples], size: tuple[int, int] | None, channels: int
) -> int:
    """The memory for all splits if all images have the size of the first."""
    if size is None:
        image = examples[0][0]["image"]
        first = decode(image, channels, _name(image, 0, "the data set"))
        size = first.shape[0], first.shape[1]
    return sum(map(len, examples)) * size[0] * size[1] * channels


def _decode(
    examples: Examples,
    channels: int,
    size: tuple[int, int] | None,
    target: Target | None,
    name: str,
) -> dict[str, np.ndarray]:
    """All images and labels of a split, in arrays."""
    image: Any = None
    label: Any = None
    for i, example in enumerate(_in_order(examples)):
        where = _name(example["image"], i, name)
        pixels = decode(example["image"], channels, where)
        found: Any = example["label"]
        if target == "segmentation_mask":
            found = decode_labels(found, _name(found, i, f"the masks of {name}"))
            if found.shape != pixels.shape[:2]:
                raise UsageError(
                    f"{where} is {_size(pixels)} and its mask {_size(found)}: they "
                    "must have one size."
                )
        if size is not None:
            pixels = resize(pixels, size)
            if np.ndim(found):
                found = resize(found, size, nearest=True)
        if image is None:
            image = np.empty((len(examples), *pixels.shape), np.uint8)
            label = np.empty((len(examples), *np.shape(found)), np.int32)
        if pixels.shape != image.shape[1:]:
            raise UsageError(
                f"The images of {name} differ in size ({where} is {_size(pixels)}, the "
                f"first {_size(image[0])}): pass --image-size to resize them."
            )
        image[i], label[i] = pixels, found
    if image is None:
        raise UsageError(f"{name[0].upper()}{name[1:]} has no examples.")
    if label.min() < 0:
        raise UsageError(f"{name[0].upper()}{name[1:]} has no labels.")
    return {"image": image, "label": label}


def _resized_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.stack([resize(np.asarray(x), size, nearest=True) for x in labels])


def _in_order(examples: Examples) -> Iterator[Mapping[str, Any]]:
    read = getattr(examples, "__getitems__", None)
    if read is None:
        yield from (examples[i] for i in range(len(examples)))
        return
    for start in range(0, len(examples), _READ_AT_ONCE):
        stop = min(start + _READ_AT_ONCE, len(examples))
        yield from read(list(range(start, stop)))


def _name(image: Any, index: int, split: str) -> str:
    return str(image) if isinstance(image, Path) else f"image {index} of {split}"


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _class_values(*labels: np.ndarray) -> Sequence[int]:
    """The pixel values that are classes, in increasing order."""
    values = np.unique(np.concatenate([np.unique(x) for y in labels for x in y]))
    # If there is only one other value, 255 is the foreground, not void.
    values = values[values >= 0]
    if len(values) > 2 or _VOID not in values:
        values = values[values != _VOID]
    if len(values) < 2:
        raise UsageError(
            f"The masks have no other values than {', '.join(map(str, values))}: at "
            "least two classes are needed."
        )
    return [int(value) for value in values]


def _from_zero(split: Split, values: np.ndarray, name: str) -> InMemory:
    """Labels of pixels counted from 0 (trimaps count from 1), or -1 for void ones.

    They are replaced in place, image by image: a copy would need as much memory again.
    """
    assert isinstance(split, InMemory)
    for i, label in enumerate(split.label):
        found = np.searchsorted(values, label).clip(max=len(values) - 1)
        known = values[found] == label
        unknown = label[~known & (label >= 0) & (label != _VOID)]
        if len(unknown):
            raise UsageError(
                f"Mask {i} of {name} has the value {unknown[0]}, which is no class of "
                f"the run: its classes are {', '.join(map(str, values))}, and "
                f"{_VOID} is none."
            )
        label[...] = np.where(known, found, -1)
    return split


def _from_npz(
    path: Path,
    target: Target | None,
    size: tuple[int, int] | None,
    test_fraction: float,
    like: Description | None,
) -> Dataset:
    name = f"--dataset={path}"

    def convert(images: np.ndarray) -> np.ndarray:
        images = as_uint8(images, name)
        if size is None or images.shape[1:3] == size:
            return images
        return np.stack([resize(x, size) for x in images])

    found = read_npz(path, test_fraction, convert)
    rank = {None: None, "label": 1, "segmentation_mask": 3}[target]

    @functools.cache
    def open_split(split: str) -> InMemory:
        if split not in found:
            raise UsageError(f"{name} has no {split} images.")
        image, label = found[split]
        if rank is None:
            label = np.zeros(len(image), np.int32)
        elif label is None or label.ndim != rank:
            what = "images" if rank == 1 else "pixels"
            raise UsageError(f"{name} has no labels of {what} for its {split} images.")
        if rank == 3 and label.shape[1:] != image.shape[1:3]:
            label = _resized_labels(label, image.shape[1:3])
        if like is not None and image.shape[1:] != like.image_shape:
            raise UsageError(
                f"{name} has images of shape {image.shape[1:]}; the run has "
                f"{like.image_shape}."
            )
        return InMemory(image, label)

    train, test = (functools.partial(open_split, split) for split in _SPLITS)
    if like is None and train().image.shape[1:] != test().image.shape[1:]:
        raise UsageError(
            f"The training and test images of {name} differ in shape: "
            f"{train().image.shape[1:]} and {test().image.shape[1:]}."
        )
    shape = like.image_shape if like else train().image.shape[1:]
    if target == "segmentation_mask":
        return _segmentation(str(path), shape, train, test, like)
    if target is None:
        return Dataset(str(path), (), shape, train, test)
    classes = _named_classes(found, name, like)
    if like is not None:
        numbers = _numbers(name, classes, like.classes)
        if numbers is not None:
            train, test = (
                functools.partial(_renumbered, f, numbers) for f in (train, test)
            )
        classes = like.classes
    return Dataset(str(path), classes, shape, train, test)


def _renumbered(split: Callable[[], InMemory], numbers: np.ndarray) -> InMemory:
    return InMemory(split().image, numbers[split().label])


def _named_classes(
    found: Mapping[str, Any], name: str, like: Description | None
) -> Sequence[str]:
    """The names of the classes of arrays with labels of images."""
    present = [found[s][1] for s in _SPLITS if s in found]
    labels = np.unique(np.concatenate(present))
    count = int(labels[-1]) + 1
    names = found.get("classes")
    if names is None:
        names = like.classes if like else [str(i) for i in range(count)]
    if labels[0] < 0 or count > len(names):
        raise UsageError(
            f"{name} has labels from {labels[0]} to {labels[-1]} and {len(names)} "
            "classes: labels count from 0, and `classes` has a name for each."
        )
    if like is not None:
        return names
    if len(labels) < 2:
        raise UsageError(
            f"{name} has the label {labels[0]} alone: at least two classes are needed."
        )
    if "classes" not in found and count > 2 * len(labels):
        raise UsageError(
            f"{name} has {len(labels)} different labels, from {labels[0]} to "
            f"{labels[-1]}: number the classes from 0 without gaps, by `classes, "
            "labels = np.unique(labels, return_inverse=True)`, or save the names of "
            "all as `classes`."
        )
    return names


def read_images(
    paths: Sequence[Path],
    shape: tuple[int, ...],
    part: Part = "whole",
) -> UInt8[np.ndarray, "n height width channels"]:
    """Reads image files as evaluation reads those of a data set.

    Args:
        paths: The files, of any format that Pillow reads.
        shape: Height, width and channels (1, 3 or 4) of each result.
        part: Of `Preparation`.

    Returns:
        The images.

    Raises:
        UsageError: If a file is not an image that can be read (see `decode`).
    """
    height, width, channels = shape
    prepare = Preparation((height, width, channels), part)
    return np.stack([prepare(path, str(path)) for path in paths])
