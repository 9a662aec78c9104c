"""The output of a run besides metrics: pictures, events, a trace."""

import functools
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
        workdir: The folder to write to.
        metric: Plotted over the epochs, with the loss.
        title: Title of that plot.
    """

    def __init__(self, workdir: Path, metric: Metric, title: str):
        self._workdir, self._metric, self._title = workdir, metric, title
        self.figures: dict[str, Any] = {}
        self._next = time.monotonic() + _SECONDS

    def is_due(self) -> bool:
        """Whether to draw predictions or samples, which is every half minute."""
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
    """Scalars and pictures for TensorBoard.

    Args:
        folder: Folder of the event files; `None` for none.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._writer = folder, None

    def __enter__(self) -> "Events":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, line: Line, figures: Mapping[str, Any]) -> None:
        """Adds a line of metrics."""
        if self._folder is None:
            return
        tensorboard = _tensorboard()
        summary = tensorboard.summary
        if self._writer is None:
            # Not a `SummaryWriter`: its thread ends if it cannot write, and then the
            # queue of events fills up and the run hangs.
            self._folder.mkdir(parents=True, exist_ok=True)
            path = str(self._folder / "events")
            self._writer = tensorboard.event_file_writer.EventsWriter(path)
        step, now = line["step"], time.time()
        event = tensorboard.proto.event_pb2.Event(step=step, wall_time=now)
        for name, value in line.items():
            if name not in ("epoch", "step"):
                split, _, rest = name.partition("_")
                is_split = split in ("train", "test")
                tag = f"{rest}/{split}" if is_split else f"run/{name}"
                event.summary.MergeFrom(summary.scalar(tag, value))
        for name, figure in figures.items():
            pixels = pictures.render(figure)
            event.summary.MergeFrom(summary.image(name, pixels, dataformats="HWC"))
        self._writer.write_event(event)
        self._writer.flush()


@functools.cache
def _tensorboard() -> Any:
    """The package `tensorboardX`, without PyTorch, which takes seconds to import."""
    missing = "torch" not in sys.modules
    if missing:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tensorboardX
    finally:
        if missing:
            del sys.modules["torch"]
    return tensorboardX


class Profile:
    """A trace of the second dispatch of a run; the first is a warm-up.

    Args:
        folder: Folder of the trace; `None` for none.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._dispatches = folder, 0

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._folder is not None and self._dispatches == 1:
            jax.profiler.stop_trace()

    def next(self) -> None:
        """Call it after each dispatch."""
        if self._folder is None:
            return
        self._dispatches += 1
        if self._dispatches == 1:
            jax.profiler.start_trace(str(self._folder))
        elif self._dispatches == 2:
            jax.profiler.stop_trace()
