"""The trimaps of digits: features, splits, the same pixels everywhere, sane masks."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jbn.training.digits import trimaps
from jbn.training.digits.trimaps import DigitTrimaps


def new(folder: Path) -> Any:
    builder: Any = DigitTrimaps
    return builder(data_dir=str(folder))


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    builder = new(tmp_path_factory.mktemp("tfds"))
    assert builder.name == "digit_trimaps"
    tfds.disable_progress_bar()
    builder.download_and_prepare(file_format="array_record")
    sources = {split: builder.as_data_source(split) for split in ("train", "test")}
    return {
        split: source.__getitems__(list(range(len(source))))
        for split, source in sources.items()
    }


def stack(examples: list[Any], name: str) -> np.ndarray:
    return np.stack([example[name] for example in examples])


def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    path = Path(trimaps.__file__).with_name("digits.npz")
    with np.load(path) as archive:
        rows = archive["test"] == (split == "test")
        return archive["images"][rows], archive["labels"][rows]


@pytest.mark.slow
def test_features_are_those_of_oxford_iiit_pet(splits: dict[str, list[Any]]):
    assert {split: len(examples) for split, examples in splits.items()} == {
        "train": 2874,
        "test": 360,
    }
    for split, count in (("train", 2), ("test", 1)):
        image, mask, label = (
            stack(splits[split], name)
            for name in ("image", "segmentation_mask", "label")
        )
        assert image.dtype == mask.dtype == np.uint8
        assert image.shape[1:] == (32, 32, 3)
        assert mask.shape[1:] == (32, 32, 1)
        np.testing.assert_array_equal(
            np.bincount(label), count * np.bincount(digits(split)[1])
        )
        # Each image has each of the three.
        for value in (1, 2, 3):
            assert (mask == value).any((1, 2, 3)).all()
        assert set(np.unique(mask)) == {1, 2, 3}


def test_the_same_pixels_on_every_machine(splits: dict[str, list[Any]]):
    """Not of the files: TFDS shuffles, and versions of zlib compress differently."""
    rows = sorted(
        example["image"].tobytes() + example["segmentation_mask"].tobytes()
        for split in splits.values()
        for example in split
    )
    assert len(set(rows)) == len(rows)
    digest = hashlib.sha256(b"".join(rows)).hexdigest()
    assert digest == "c3d6b4be56d76486e85ea99ef63b51417a39fbf58e02019c9a1065a036cbf2f2"


def test_digits_stay_in_their_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trimaps, "_compose", lambda digit, bits: (digit, digit))
    builder = new(tmp_path)
    for split, examples in builder._split_generators(None).items():
        examples = [example for _, example in examples]
        drawn = [Image.open(io.BytesIO(example["image"])) for example in examples]
        images, labels = digits(split)
        each = len(examples) // len(images)
        np.testing.assert_array_equal(
            np.stack([*map(np.asarray, drawn)]), images.repeat(each, 0)
        )
        assert [example["label"] for example in examples] == list(labels.repeat(each))


def fit(shape: np.ndarray) -> np.ndarray:
    """Cropped to what is there, and resized to 8x8."""
    rows, columns = np.nonzero(shape)
    crop = shape[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    image = Image.fromarray(np.uint8(crop * 255)).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(image, float).ravel() / 255


def test_masks_have_the_shape_of_the_label_s_digit(splits: dict[str, list[Any]]):
    images, labels = digits("train")
    known = np.stack([fit(image > 6) for image in images])
    mask = stack(splits["test"], "segmentation_mask")[..., 0] != 2
    shapes = np.stack([fit(each) for each in mask])
    distances = (known**2).sum(1)[None] - 2 * shapes @ known.T
    nearest = labels[distances.argmin(1)]
    # Two of three, though they are turned; chance has one of ten.
    assert (nearest == stack(splits["test"], "label")).mean() > 0.55


def test_the_border_separates(splits: dict[str, list[Any]]):
    """No pixel of a digit touches the background, but at most corners of strokes."""
    mask = stack(splits["test"], "segmentation_mask")[..., 0]
    for a, b in ((mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])):
        touching = ((a == 1) & (b == 2)) | ((a == 2) & (b == 1))
        assert touching.mean() < 0.03


def test_colors_tell_digit_and_background_apart(splits: dict[str, list[Any]]):
    image = stack(splits["test"], "image").astype(float)
    mask = stack(splits["test"], "segmentation_mask")

    def mean(value: int) -> np.ndarray:
        rows = mask == value
        return (image * rows).sum((1, 2)) / rows.sum((1, 2))

    difference = np.abs(mean(1) - mean(2)).max(1)
    # 97 before clouds; some are cut off at black and at white.
    assert (difference > 60).mean() > 0.99
    # Nor is a digit known by its color: brighter in about half of the images.
    brighter = (mean(1).sum(1) > mean(2).sum(1)).mean()
    assert 0.4 < brighter < 0.6
