"""The source of a data set: encoded examples by number."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable


Target = Literal["label", "segmentation_mask"]


@runtime_checkable
class Examples(Protocol):
    """The examples of a split, by their number, each with `image` and `label`.

    An image is an argument of `images.decode`. A label is the number of a class, or a
    mask for `images.decode_labels`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A training and a test split, encoded.

    Attributes:
        name: Name of the data set in messages.
        classes: Names of the classes; `()` for images without labels, and for masks,
            whose classes are found in the pixels.
        channels: Channels of an image.
        size: Height and width of all images, or `None` if unknown.
        splits: `train` and `test`, by name. Each is a function that opens the split.
        decoded: Path prefixes for the cache of decoded images, by split.
    """

    name: str
    classes: Sequence[str]
    channels: int
    size: tuple[int, int] | None
    splits: Mapping[str, Callable[[], Examples]]
    decoded: Mapping[str, Path] = dataclasses.field(default_factory=dict)
