"""Data sets by their TFDS name, read without TensorFlow."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jbn.training.errors import UsageError
from jbn.training.prepare import is_prepared, make_builder, prepare
from jbn.training.source import Source, Target


class Prepared:
    """The examples of a split prepared by TFDS, with encoded images.

    Args:
        rows: A data source from TFDS.
        image_key: The feature that is the image.
        label_key: The feature that is the label; `None` for images without labels.
    """

    def __init__(self, rows: Any, image_key: str, label_key: str | None):
        self._rows, self._keys = rows, (image_key, label_key)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._named(self._rows[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        """Reads several at once, which is twice as fast as one by one."""
        return [self._named(row) for row in self._rows.__getitems__(indices)]

    def _named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        image, label = self._keys
        return {"image": row[image], "label": 0 if label is None else row[label]}


def open_prepared(
    name: str,
    target: Target | None,
    *,
    data_dir: Path | None,
    manual_dir: Path | None,
    test_fraction: float,
) -> Source:
    """Finds a data set by its TFDS name, and prepares it if needed.

    Args:
        name: The name.
        target: What to learn, as of `load_dataset`.
        data_dir: Folder of prepared data sets; `None` for TFDS's own default.
        manual_dir: Folder with the original files.
        test_fraction: The fraction of the training split to test on if there is no
            split `test` or `validation`.

    Returns:
        The splits.

    Raises:
        UsageError: If the set is missing and cannot be prepared, or does not have
            images with the target.
    """
    builder = make_builder(name, data_dir)
    if not is_prepared(builder):
        prepare(builder, manual_dir)
    image_key, label_key, classes = _keys(builder, target)
    height, width, channels = builder.info.features[image_key].shape
    if builder.info.features[image_key].np_dtype not in (np.uint8, np.uint16):
        dtype = np.dtype(builder.info.features[image_key].np_dtype)
        raise UsageError(
            f"The images of `{builder.name}` are {dtype}; uint8 or uint16 is needed."
        )
    size = None if None in (height, width) else (height, width)
    parts = _split_names(builder, test_fraction)
    splits = {
        split: functools.partial(_open, builder, part, image_key, label_key)
        for split, part in parts.items()
    }
    # In the folder of the set, so preparing it again removes decoded images. (Files of
    # version 1 were decoded by TFDS.)
    decoded = {
        split: Path(builder.data_dir) / f"decoded2-{re.sub('[^-0-9A-Za-z]', '_', part)}"
        for split, part in parts.items()
    }
    return Source(builder.name, classes, channels or 3, size, splits, decoded)


def _keys(builder: Any, target: Target | None) -> tuple[str, str | None, Sequence[str]]:
    """The names of the image feature, the target feature, and the classes."""
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


def _split_names(builder: Any, test_fraction: float) -> dict[str, str]:
    """TFDS's names of the training and test splits."""
    splits = builder.info.splits
    if "train" not in splits:
        raise UsageError(
            f"`{builder.name}` has no split called `train`, only {', '.join(splits)}."
        )
    for test in ("test", "validation"):
        if test in splits:
            return {"train": "train", "test": test}
    first = round((1 - test_fraction) * splits["train"].num_examples)
    return {"train": f"train[:{first}]", "test": f"train[{first}:]"}


def _open(builder: Any, part: str, image_key: str, label_key: str | None) -> Prepared:
    """Opens a split, without decoding any image."""
    features: dict[str, Any] = dict(builder.info.features.items())
    skip = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    try:
        rows = builder.as_data_source(part, decoders=skip)
    except NotImplementedError as error:
        raise UsageError(
            f"{builder.data_dir} is prepared in a format that only TensorFlow reads. "
            "Pass another --data-dir: it will be prepared there as array_record."
        ) from error
    return Prepared(rows, image_key, label_key)
