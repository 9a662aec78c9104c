"""What a run writes for people beside its metrics: pictures, events, a trace."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from jbn.training import pictures
from jbn.training.metrics import Line, Metric


_SECONDS = 30.0


class Report:
    """The pictures of a run.

    Args:
        workdir: Where they go.
        metric: Drawn over the epochs, with the loss.
        title: Of that picture.
    """

    def __init__(self, workdir: Path, metric: Metric, title: str):
        self._workdir, self._metric, self._title = workdir, metric, title
        self.figures: dict[str, Any] = {}
        self._next = time.monotonic() + _SECONDS

    def is_due(self) -> bool:
        """Whether to draw what a model finds or makes, which is every half minute."""
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + _SECONDS
        return True

    def draw(self, history: Sequence[Line]) -> None:
        """Writes `curves.png`, and `figures` by their names."""
        if not history:
            return
        curves = pictures.curves(history, self._metric, self._title)
        for name, figure in {"curves": curves, **self.figures}.items():
            image = Image.fromarray(pictures.render(figure))
            image.save(self._workdir / f"{name}.png")


class Events:
    """Numbers and pictures for TensorBoard.

    Args:
        folder: Of the event files; `None` for none.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._writer = folder, None

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, line: Line, figures: Mapping[str, Any]) -> None:
        """Adds those of a line of metrics."""
        if self._folder is None:
            return
        if self._writer is None:
            # Only here: it makes a file.
            self._writer = _summary_writer(self._folder)
        step = line["step"]
        for name, value in line.items():
            if name not in ("epoch", "step"):
                split, _, rest = name.partition("_")
                is_split = split in ("train", "test")
                tag = f"{rest}/{split}" if is_split else f"run/{name}"
                self._writer.add_scalar(tag, value, step)
        for name, figure in figures.items():
            pixels = pictures.render(figure)
            self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()


def _summary_writer(folder: Path) -> Any:
    """A `SummaryWriter`, without PyTorch, which it would import for seconds."""
    missing = "torch" not in sys.modules
    if missing:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if missing:
            del sys.modules["torch"]
    return SummaryWriter(str(folder))


class Profile:
    """A trace of the second dispatch of a run; the first one is still warming up.

    Args:
        folder: Of the trace; `None` for none.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._dispatches = folder, 0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._folder is not None and self._dispatches == 1:
            jax.profiler.stop_trace()

    def next(self) -> None:
        """Called after each dispatch."""
        if self._folder is None:
            return
        self._dispatches += 1
        if self._dispatches == 1:
            jax.profiler.start_trace(str(self._folder))
        elif self._dispatches == 2:
            jax.profiler.stop_trace()
