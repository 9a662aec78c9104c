"""Data sets of images by their TFDS name, read without TensorFlow."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from jbn.training.decoded import keep
from jbn.training.errors import UsageError


Target = Literal["label", "segmentation_mask"]

_READ_AT_ONCE = 1024  # Twice as fast as one by one.
_MOST_IN_MEMORY = 4 * 2**30  # Bytes of pixels, of both splits.


@runtime_checkable
class Split(Protocol):
    """The examples of a split, by their number."""

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
    """Examples that are read, decoded and cut out one by one, when they are needed.

    Attributes:
        source: Of TFDS: examples by their number.
        image_key: What the image is called there.
        label_key: What the label is called there; `None` for a set without.
        size: Height and width to make images.
        crop: Whether to cut out a random part, of 8 to 100 % of the area, as for
            training on ImageNet (Szegedy et al., 2015); otherwise the middle part of
            87.5 % of the shorter side.
        seed: Of the parts, with the number of the example and the `epoch`.
    """

    source: Any
    image_key: str
    label_key: str | None
    size: int
    crop: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def row(self, index: int, epoch: int = 0) -> dict[str, np.ndarray]:
        """One example."""
        example = self.source[index]
        image = example[self.image_key]
        height, width = image.shape[:2]
        if self.crop:
            rng = np.random.default_rng([self.seed, epoch, index])
            box = _random_box(rng, height, width)
        else:
            side = max(1, round(0.875 * min(height, width)))
            box = _middle_box(height, width, side)
        label = 0 if self.label_key is None else int(example[self.label_key])
        return {
            "image": _resize(image, self.size, box),
            "label": np.asarray(label, np.int32),
        }

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The examples of these numbers."""
        found = [self.row(int(index)) for index in indices]
        return {name: np.stack([row[name] for row in found]) for name in found[0]}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split.

    Attributes:
        name: Its name in TFDS.
        classes: The names of the classes.
        image_shape: Shape of one image.
        train: The split to train on.
        test: The split to test on.
    """

    name: str
    classes: Sequence[str]
    image_shape: tuple[int, ...]
    train: Split
    test: Split


def load_dataset(
    name: str,
    *,
    target: Target | None = "label",
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    image_size: int | None = None,
    loader: Literal["memory", "grain"] | None = None,
    crop: bool = False,
    seed: int = 0,
) -> Dataset:
    """Finds a data set, which is first prepared if it is not yet.

    The test split is the one called `test`, or else `validation`, or else the last
    fifth of `train`, which is then left out of the training split.

    Args:
        name: Its name in TFDS, or `digits`, or `digit_trimaps`.
        target: What to learn: the `label` of an image, or a `segmentation_mask` with
            one of its pixels; `None` for images alone.
        data_dir: Folder of prepared data sets; `None` for TFDS's own default.
        manual_dir: Folder with the original files, for a set that cannot be downloaded.
        image_size: Height and width to resize the images to.
        loader: `memory` reads everything now; `grain` what is needed, when it is.
            `None` for memory unless that would take more than 4 GiB.
        crop: Whether to cut out random parts of training images (grain alone).
        seed: Of these.

    Returns:
        Both splits, in the order in which they lie on disk.

    Raises:
        UsageError: If the set is not there and not to be had, or has no such target, or
            images of different sizes and `image_size` is `None`.
    """
    import absl.logging

    # TFDS reports each step, and that Pillow is in use; errors still come through.
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        from jbn.training.prepare import is_prepared, make_builder, prepare

        builder = make_builder(name, data_dir)
        if not is_prepared(builder):
            prepare(builder, manual_dir)
        image_key, label_key, classes = _keys(builder, target)
        names = _split_names(builder)
        if loader is None:
            size = _bytes_in_memory(builder, image_key, image_size)
            loader = "grain" if size > _MOST_IN_MEMORY else "memory"
        if loader == "grain":
            train, test = (
                _on_disk(builder, split, image_key, label_key, image_size, target)
                for split in names
            )
            train = dataclasses.replace(train, crop=crop, seed=seed)
            shape = train.row(0)["image"].shape
        else:
            if crop:
                raise UsageError(
                    "--crop is for sets that are read with --loader=grain."
                )
            train, test = (
                _in_memory(builder, split, image_key, label_key, image_size)
                for split in names
            )
            shape = train.image.shape[1:]
            if target == "segmentation_mask":
                train, test, classes = _from_zero(train, test)
        return Dataset(name, classes, shape, train, test)
    finally:
        absl.logging.set_verbosity(verbosity)


def _keys(builder: Any, target: Target | None) -> tuple[str, str | None, Sequence[str]]:
    """The names of the image and of the target, and of the classes."""
    import tensorflow_datasets as tfds

    features: dict[str, Any] = dict(builder.info.features.items())
    images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
    image, label, *_ = builder.info.supervised_keys or ("image", "label")
    if image not in images:
        image = "image"
    if image in images:
        if target is None:
            return image, None, ()
        if target == "segmentation_mask" and target in images:
            return image, target, ()
        if isinstance(features.get(label), tfds.features.ClassLabel):
            if target == "label":
                return image, label, features[label].names
    needed = {
        "label": ("an image classification set", "an image and a class label are"),
        "segmentation_mask": (
            "a segmentation set",
            "an `image` and a `segmentation_mask` are",
        ),
        None: ("a set of images", "an `image` is"),
    }[target]
    raise UsageError(
        f"`{builder.name}` is not {needed[0]}: it has the features "
        f"{', '.join(features)}, and {needed[1]} needed."
    )


def _split_names(builder: Any) -> tuple[str, str]:
    """The names of the split to train on and of the one to test on."""
    splits = builder.info.splits
    if "train" not in splits:
        raise UsageError(
            f"`{builder.name}` has no split called `train`, only {', '.join(splits)}."
        )
    for test in ("test", "validation"):
        if test in splits:
            return "train", test
    return "train[:80%]", "train[80%:]"


def _source(builder: Any, split: str) -> Any:
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise UsageError(
            f"{builder.data_dir} is prepared in a format that only TensorFlow reads. "
            "Pass another --data-dir: it will be prepared there as array_record."
        ) from error


def _bytes_in_memory(builder: Any, image_key: str, size: int | None) -> int:
    """How much the pixels of all splits would take; 0 where their sizes are unknown."""
    shape = builder.info.features[image_key].shape
    sides = shape[:2] if size is None else (size, size)
    if None in sides or shape[-1] is None:
        return 0
    count = sum(split.num_examples for split in builder.info.splits.values())
    return count * sides[0] * sides[1] * shape[-1]


def _on_disk(
    builder: Any,
    split: str,
    image_key: str,
    label_key: str | None,
    size: int | None,
    target: Target | None,
) -> OnDisk:
    if size is None:
        raise UsageError(
            f"`{builder.name}` is read from disk, image by image: pass --image-size, "
            "the height and width to make them."
        )
    if target == "segmentation_mask":
        raise UsageError(
            f"`{builder.name}` has labels of pixels, and such sets are read into "
            "memory: pass --loader=memory, and an --image-size with which it fits."
        )
    return OnDisk(_source(builder, split), image_key, label_key, size)


def _in_memory(
    builder: Any, split: str, image_key: str, label_key: str | None, size: int | None
) -> InMemory:
    # In the folder of the prepared set, and so gone when that is prepared anew.
    what = "-".join(map(str, (split, image_key, label_key, size or "whole")))
    path = Path(builder.data_dir) / f"decoded-{re.sub('[^-0-9A-Za-z_]', '_', what)}.npz"
    return InMemory(
        **keep(path, lambda: _decode(builder, split, image_key, label_key, size))
    )


def _decode(
    builder: Any, split: str, image_key: str, label_key: str | None, size: int | None
) -> dict[str, np.ndarray]:
    source = _source(builder, split)
    images, labels = [], []
    for start in range(0, len(source), _READ_AT_ONCE):
        rows = range(start, min(start + _READ_AT_ONCE, len(source)))
        for example in source.__getitems__(list(rows)):
            image = example[image_key]
            label: Any = 0 if label_key is None else example[label_key]
            if size is not None:
                image = _resize(image, size)
                if np.ndim(label):
                    label = _resize(label, size, nearest=True)
            images.append(image)
            labels.append(label[..., 0] if np.ndim(label) else label)
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise UsageError(
            f"The images of `{builder.name}` differ in size (such as "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}); pass --image-size to "
            "resize them."
        )
    label = np.asarray(labels).astype(np.int32)
    if label.min() < 0:
        raise UsageError(f"The split `{split}` of `{builder.name}` has no labels.")
    return {"image": np.stack(images), "label": label}


_VOID = 255  # Of pixels without a label, as in Pascal VOC.


def _from_zero(
    train: InMemory, test: InMemory
) -> tuple[InMemory, InMemory, Sequence[str]]:
    """Labels of pixels counted from 0 (trimaps count from 1), or -1 for void ones."""
    labels = np.unique(train.label)
    labels = labels[labels != _VOID]
    first, last = labels[0], labels[-1]

    def shifted(split: InMemory) -> InMemory:
        known = (split.label >= first) & (split.label <= last)
        return InMemory(split.image, np.where(known, split.label - first, -1))

    names = [str(label) for label in range(first, last + 1)]
    return shifted(train), shifted(test), names


def _random_box(
    rng: np.random.Generator, height: int, width: int
) -> tuple[int, int, int, int]:
    """A part of 8 to 100 % of the area, of an aspect ratio from 3/4 to 4/3."""
    for _ in range(10):
        area = height * width * rng.uniform(0.08, 1.0)
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return int(left), int(top), int(left + w), int(top + h)
    return _middle_box(height, width, min(height, width))


def _middle_box(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _resize(
    image: np.ndarray,
    size: int,
    box: tuple[int, int, int, int] | None = None,
    *,
    nearest: bool = False,
) -> np.ndarray:
    from PIL import Image

    how = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    resized = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    resized = resized.resize((size, size), how, box)
    return np.asarray(resized).reshape(size, size, image.shape[-1])


def read_images(paths: Sequence[Path], shape: tuple[int, ...]) -> np.ndarray:
    """Reads image files as the trainer's models take them.

    Args:
        paths: The files, of any format that Pillow reads.
        shape: Height, width and channels (1 or 3) to make them.

    Returns:
        uint8 of shape (n, height, width, channels).

    Raises:
        UsageError: If a file is not an image.
    """
    from PIL import Image

    height, width, channels = shape
    images = []
    for path in paths:
        try:
            with Image.open(path) as file:
                image = file.convert("L" if channels == 1 else "RGB")
        except OSError as error:
            raise UsageError(
                f"{path} is not an image that can be read: {error}"
            ) from error
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        images.append(np.asarray(image).reshape(shape))
    return np.stack(images)
