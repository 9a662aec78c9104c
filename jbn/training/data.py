"""Loads any image classification set of TFDS into memory, without TensorFlow."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from jbn.training.errors import UsageError


_READ_AT_ONCE = 1024  # Twice as fast as one by one.


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of shape (n, height, width, channels), uint8, and labels (n,), int32."""

    image: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split."""

    name: str
    num_classes: int
    train: Split
    test: Split


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    manual_dir: Path | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Loads a data set, which is first prepared if it is not yet.

    The test split is the one called `test`, or else `validation`, or else the last
    fifth of `train`, which is then left out of the training split.

    Args:
        name: Its name in TFDS, or `digits`.
        data_dir: Folder of prepared data sets; `None` for TFDS's own default.
        manual_dir: Folder with the original files, for a set that cannot be downloaded.
        image_size: Height and width to resize the images to.

    Returns:
        Both splits, in memory, in the order in which they lie on disk.

    Raises:
        UsageError: If the set is not there and not to be had, or not one of images
            with a label, or of images of different sizes and `image_size` is `None`.
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
        image_key, label_key, num_classes = _keys(builder)
        train, test = _split_names(builder)

        def read(split: str) -> Split:
            return _read(builder, split, image_key, label_key, image_size)

        return Dataset(name, num_classes, read(train), read(test))
    finally:
        absl.logging.set_verbosity(verbosity)


def _keys(builder: Any) -> tuple[str, str, int]:
    """The names of the image and of the label, and the number of classes."""
    import tensorflow_datasets as tfds

    features = dict(builder.info.features.items())
    image, label, *_ = builder.info.supervised_keys or ("image", "label")
    if isinstance(features.get(image), tfds.features.Image) and isinstance(
        features.get(label), tfds.features.ClassLabel
    ):
        return image, label, features[label].num_classes
    raise UsageError(
        f"`{builder.name}` is not an image classification set: it has the features "
        f"{', '.join(features)}, and an image and a class label are needed."
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


def _read(
    builder: Any, split: str, image_key: str, label_key: str, image_size: int | None
) -> Split:
    try:
        source = builder.as_data_source(split)
    except NotImplementedError as error:
        raise UsageError(
            f"{builder.data_dir} is prepared in a format that only TensorFlow reads. "
            "Pass another --data-dir: it will be prepared there as array_record."
        ) from error
    images, labels = [], []
    for start in range(0, len(source), _READ_AT_ONCE):
        rows = range(start, min(start + _READ_AT_ONCE, len(source)))
        for example in source.__getitems__(list(rows)):
            image = example[image_key]
            images.append(image if image_size is None else _resize(image, image_size))
            labels.append(example[label_key])
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise UsageError(
            f"The images of `{builder.name}` differ in size (such as "
            f"{' and '.join(map(str, sorted(shapes)[:2]))}); pass --image-size to "
            "resize them."
        )
    if min(labels) < 0:
        raise UsageError(f"The split `{split}` of `{builder.name}` has no labels.")
    return Split(np.stack(images), np.asarray(labels, np.int32))


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    resized = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    resized = resized.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(size, size, image.shape[-1])
