"""TFDS builder of digits to segment, in color: needs no network and no TensorFlow."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jbn.training.digits.builder import CITATION, LICENSE, read_digits
from jbn.training.png import encode_png


_SIZE = 32
_IMAGES_PER_DIGIT = {"train": 2, "test": 1}
# Ink, of 0 to 16, up to which a pixel is background, and from which it is foreground.
_BACKGROUND, _FOREGROUND = 3, 9
_FIXED = 256  # Fractions are integers over this.


class DigitTrimaps(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """32x32 color images of handwritten digits, each with a trimap.

    Features are those of `oxford_iiit_pet` that trainers use: in `segmentation_mask`, 1
    is the object, 2 the background and 3 the border between. Digits are in the split
    that they are in in `digits`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "The 1,797 handwritten digits of 8x8 pixels, in their split, drawn "
                "larger and turned in a random color on a random background: 2,874 "
                "images to train on, 360 to test on. Trimaps have the values 1 for "
                "the digit, 2 for the background and 3 for the border."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(_SIZE, _SIZE, 3)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "segmentation_mask": tfds.features.Image(
                        shape=(_SIZE, _SIZE, 1), use_colormap=True
                    ),
                }
            ),
            supervised_keys=("image", "label"),
            citation=CITATION,
            license=LICENSE,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # Nothing to download.
        images, labels, test = read_digits()
        return {
            "train": self._generate_examples("train", images[~test], labels[~test]),
            "test": self._generate_examples("test", images[test], labels[test]),
        }

    def _generate_examples(
        self, split: str, digits: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        # The raw stream of PCG64 is promised to stay the same; what NumPy's generators
        # make of it is not.
        bits = np.random.PCG64({"train": 1, "test": 2}[split])
        count = _IMAGES_PER_DIGIT[split]
        for row in range(count * len(digits)):
            image, mask = _compose(digits[row // count], bits)
            yield (
                row,
                {
                    "image": encode_png(image),
                    "label": int(labels[row // count]),
                    "segmentation_mask": encode_png(mask),
                },
            )


def _compose(digit: np.ndarray, bits: np.random.PCG64) -> tuple[np.ndarray, np.ndarray]:
    """Draws one digit; returns the image and its trimap."""
    ink = _place(digit, bits)
    low, high = _BACKGROUND * _FIXED, _FOREGROUND * _FIXED
    mask = np.where(ink >= high, 1, np.where(ink <= low, 2, 3))
    cover = np.clip(ink - low, 0, high - low)[..., None]

    ground = _draw(bits, 0, 256, 3)
    paint = _draw(bits, 0, 256, 3)
    # Some channel must tell the two apart, by 97 at least.
    channel = _draw(bits, 0, 3, 1)
    paint[channel] = (ground[channel] + _draw(bits, 97, 160, 1)) % 256
    # Clouds, on both; and grain, on each pixel.
    clouds = _draw(bits, -32, 33, 5, 5, 3)
    grid = np.arange(_SIZE) * (4 * _FIXED) // _SIZE
    clouds = _interpolate(clouds, *np.meshgrid(grid, grid, indexing="ij")) // _FIXED
    grain = _draw(bits, -12, 13, _SIZE, _SIZE, 3)
    image = ground * (high - low - cover) + paint * cover
    image = image // (high - low) + clouds + grain
    return np.clip(image, 0, 255).astype(np.uint8), mask.astype(np.uint8)


def _place(digit: np.ndarray, bits: np.random.PCG64) -> np.ndarray:
    """Ink of each pixel: `digit`, scaled by 2.5 to 3.5, turned by 20 degrees at most.

    Only what every machine rounds alike is computed: no sines, but rational points of
    the circle.
    """
    size = _draw(bits, 20, 29, 1) / 8  # Pixels to one of the digit.
    tangent = _draw(bits, -11, 12, 1) / 64  # Of half the angle.
    cos = (1 - tangent**2) / (1 + tangent**2)
    sin = 2 * tangent / (1 + tangent**2)
    margin = int(_SIZE - 8 * size[0]) // 2
    center = (_SIZE - 1) / 2 + _draw(bits, -margin, margin + 1, 2)
    i, j = np.meshgrid(*(np.arange(_SIZE) - at for at in center), indexing="ij")
    # From the centers of pixels to where they lie in the digit, between its pixels.
    rows = (cos * i - sin * j) / size + 3.5
    columns = (sin * i + cos * j) / size + 3.5
    # One pixel of margin, beyond which all is margin.
    fixed = [
        np.clip(np.rint((at + 1) * _FIXED).astype(np.int64), 0, 9 * _FIXED - 1)
        for at in (rows, columns)
    ]
    return _interpolate(np.pad(digit.astype(np.int64), 1), *fixed)


def _interpolate(
    values: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Bilinear, at fixed-point coordinates, and as fixed-point numbers."""
    top, down = np.divmod(rows, _FIXED)
    left, right = np.divmod(columns, _FIXED)
    if values.ndim == 3:
        down, right = down[..., None], right[..., None]
    upper = values[top, left] * (_FIXED - right) + values[top, left + 1] * right
    lower = values[top + 1, left] * (_FIXED - right) + values[top + 1, left + 1] * right
    return (upper * (_FIXED - down) + lower * down) // _FIXED


def _draw(bits: np.random.PCG64, low: int, high: int, *shape: int) -> np.ndarray:
    """Integers from `low` to `high - 1`."""
    raw = bits.random_raw(int(np.prod(shape))).reshape(shape)
    return (raw % np.uint64(high - low)).astype(np.int64) + low
