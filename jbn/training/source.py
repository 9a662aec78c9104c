"""What a data set is read from: encoded examples by their number."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable


Target = Literal["label", "segmentation_mask"]


@runtime_checkable
class Examples(Protocol):
    """The examples of a split, by their number, each with `image` and `label`.

    An image is as `images.decode` takes it. A label is the number of a class, or a mask
    as `images.decode_labels` takes it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A training and a test split, encoded.

    Attributes:
        name: Of the data set, in messages.
        classes: Names of the classes; `()` for images alone and for masks, where they
            are found in the pixels.
        channels: Of an image.
        size: Height and width that all images have, or `None` if that is not known.
        splits: `train` and `test`, by name. Each is a function that opens the split.
        decoded: Where decoded images may be saved, by split: the start of a path.
    """

    name: str
    classes: Sequence[str]
    channels: int
    size: tuple[int, int] | None
    splits: Mapping[str, Callable[[], Examples]]
    decoded: Mapping[str, Path] = dataclasses.field(default_factory=dict)
