"""MNIST and the sets in its file format, prepared without TensorFlow.

TFDS's own builders parse these files with TensorFlow. The ones made here have the same
name, version, features and checksums, so any TFDS can read the sets that they prepare.
"""

import functools
import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jbn.training.png import encode_png


NAMES = ("mnist", "fashion_mnist", "kmnist")
_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


@functools.cache
def builder_class(name: str) -> type[tfds.core.GeneratorBasedBuilder]:
    """Makes the builder class of one of `NAMES`."""
    stock: Any = tfds.builder_cls(name)

    class IdxBuilder(stock, skip_registration=True):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
        """TFDS's builder, with another reader of the files."""

        name = stock.name
        url_infos = stock.url_infos

        def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
            urls = {Path(url).name: url for url in self.url_infos}
            paths = dl_manager.download(urls)
            return {
                split: self._generate_examples(paths[images], paths[labels])
                for split, (images, labels) in _FILES.items()
            }

        def _generate_examples(
            self, images: Any, labels: Any
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            pairs = zip(read_idx(images), read_idx(labels), strict=True)
            for row, (image, label) in enumerate(pairs):
                yield row, {"image": encode_png(image), "label": int(label)}

    return IdxBuilder


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a gzipped file of unsigned bytes in MNIST's format.

    The format: two zero bytes, the type (8: unsigned byte), the rank; each dimension as
    a big-endian 32-bit integer; the values.

    Args:
        path: The file.

    Returns:
        Its values.

    Raises:
        ValueError: If the file has another format.
    """
    with gzip.open(path) as file:
        content = file.read()
    rank = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content, ">u4", count=rank, offset=4) if rank else ()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if not rank or values.size != np.prod(shape):
        raise ValueError(f"{path} is not a gzipped idx file of unsigned bytes.")
    return values.reshape(shape)
