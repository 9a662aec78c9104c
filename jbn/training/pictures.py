"""Pictures of runs and of what models find or make; figures of Matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jbn.training.metrics import Metric


_TRAIN, _TEST = "#5b7db1", "#d1495b"


def curves(history: Sequence[dict[str, Any]], metric: Metric, title: str) -> Any:
    """Draws the loss and the metric over the epochs.

    Args:
        history: The metrics of each epoch.
        metric: Which.
        title: Put above the picture.

    Returns:
        The figure.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [line["epoch"] for line in history]
    figure = new_figure(9.0, 3.6)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    loss, right = figure.subplots(1, 2)
    for split, color in (("train", _TRAIN), ("test", _TEST)):
        for axes, name in ((loss, "loss"), (right, metric.name)):
            values = [line.get(f"{split}_{name}") for line in history]
            if None not in values:
                axes.plot(epochs, values, color=color, label=split)
    if len(loss.lines) > 1:
        loss.legend(frameon=False)
    loss.set_title("Loss", fontsize=10, loc="left")
    right.set_title(metric.label[0].upper() + metric.label[1:], fontsize=10, loc="left")
    if metric.percent:
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        loss.set_yscale("log")
    else:
        right.set_yscale("log")
    final = history[-1]
    value = final[f"test_{metric.name}"]
    right.annotate(
        metric.show(value),
        (final["epoch"], value),
        xytext=(0, -14 if metric.higher_is_better else 8),
        textcoords="offset points",
        ha="right",
        color=_TEST,
        fontsize=10,
        fontweight="bold",
    )
    for axes in (loss, right):
        axes.set_xlabel("epoch", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Any:
    """Draws how often which class was taken for which.

    Args:
        counts: Examples by label and prediction.
        classes: Their names.

    Returns:
        The figure.
    """
    size = len(counts)
    side = min(max(3.2, 0.42 * size + 1.2), 14.0)
    figure = new_figure(side, side)
    axes = figure.subplots()
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The root shows the few mistakes beside the many right answers.
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("found", fontsize=10)
    axes.set_ylabel("label", fontsize=10)
    if size <= 32:
        ticks = range(size)
        rotation = 90 if max(map(len, classes)) > 2 else 0
        axes.set_xticks(ticks, classes, fontsize=8, rotation=rotation)
        axes.set_yticks(ticks, classes, fontsize=8)
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "white" if share[i, j] > 0.3 else "black"
            text = f"{counts[i, j]:,}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    return figure


def overlays(
    images: np.ndarray, labels: np.ndarray, found: np.ndarray, classes: Sequence[str]
) -> Any:
    """Draws images, what is labelled in them, and what was found.

    Args:
        images: uint8 of shape (n, height, width, channels).
        labels: Of shape (n, height, width).
        found: The same.
        classes: Names of the classes.

    Returns:
        The figure.
    """
    count = len(images)
    figure = new_figure(1.5 * count, 4.8)
    rows = figure.subplots(3, count, squeeze=False)
    shown = [as_rgb(images)] + [
        color_labels(as_rgb(images), x, len(classes)) for x in (labels, found)
    ]
    for axes, pictures, name in zip(
        rows, shown, ("image", "label", "found"), strict=True
    ):
        for one, picture in zip(axes, pictures, strict=True):
            one.imshow(picture, interpolation="nearest")
            one.set_xticks([])
            one.set_yticks([])
        axes[0].set_ylabel(name, fontsize=10)
    return figure


def samples(generated: np.ndarray, real: np.ndarray) -> Any:
    """Draws generated images, and real ones beside them.

    Args:
        generated: uint8 of shape (n, height, width, channels).
        real: The same.

    Returns:
        The figure.
    """
    figure = new_figure(9.0, 5.0)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for axes, images, columns, name in (
        (left, generated, 8, "generated"),
        (right, real, 4, "real"),
    ):
        axes.imshow(tiles(as_rgb(images), columns), interpolation="nearest")
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_axis_off()
    return figure


def tiles(images: np.ndarray, columns: int) -> np.ndarray:
    """Lays images out in rows of `columns`, with a line of white between them."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.full(
        (rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        sheet[top : top + height, left : left + width] = image
    return sheet


def color_labels(images: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Images with the color of each pixel's label over them."""
    from matplotlib import colormaps

    colors = colormaps["tab10"](np.arange(max(classes, 1)) % 10)[:, :3] * 255
    over = np.where(labels[..., None] >= 0, colors[np.maximum(labels, 0)], images)
    return np.rint(0.4 * images + 0.6 * over).astype(np.uint8)


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Images of three channels."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def new_figure(width: float | int, height: float | int) -> Any:
    """A figure that needs no screen, which pyplot would look for."""
    # Only here: it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Any) -> np.ndarray:
    """The pixels of a figure from `new_figure`: uint8 of (height, width, 3).

    They are drawn once, as that takes longer than all else about a picture.
    """
    if figure.stale:
        figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
