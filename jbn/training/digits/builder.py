"""TFDS builder of the digits: needs no network and no TensorFlow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jbn.training.png import encode_png


CITATION = (
    "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten "
    "Digits, UCI Machine Learning Repository, 1998, CC BY 4.0."
)
LICENSE = "CC BY 4.0"


def read_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of values from 0 to 16, labels, and which are of the test split."""
    with np.load(Path(__file__).with_name("digits.npz")) as archive:
        return archive["images"], archive["labels"], archive["test"]


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """8x8 images of handwritten digits, in a fixed 80/20 split."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="1,797 handwritten digits of 8x8 pixels, split 80/20.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            citation=CITATION,
            license=LICENSE,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        del dl_manager  # Nothing to download.
        images, labels, test = read_digits()
        # 0..16 to 0..255; rounding loses nothing.
        images = np.rint(images * (255 / 16)).astype(np.uint8)
        return {
            "train": self._generate_examples(images[~test], labels[~test]),
            "test": self._generate_examples(images[test], labels[test]),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield row, {"image": encode_png(image), "label": int(label)}
