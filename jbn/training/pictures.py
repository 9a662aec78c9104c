"""Matplotlib figures of runs, and of predictions or samples."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jbn.training.metrics import Metric


_TRAIN, _TEST, _OTHER = "#5b7db1", "#d1495b", "#66a182"
_MOST_IN_LEGEND = 24
_MARKED = 30  # Up to this number of epochs, each has a marker.


def curves(history: Sequence[dict[str, Any]], metric: Metric, title: str) -> Any:
    """Plots the losses and the metric over the epochs.

    Args:
        history: The metrics of each epoch.
        metric: The metric to plot.
        title: Title of the figure.

    Returns:
        The figure.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [line["epoch"] for line in history]
    figure = new_figure(9.0, 3.6)
    figure.suptitle(
        _drawable(title) or "", fontsize=12, x=0.01, ha="left", fontweight="bold"
    )
    left, right = figure.subplots(1, 2)
    marker = "o" if len(epochs) <= _MARKED else None

    def draw(axes: Any, name: str, label: str, color: str) -> None:
        values = [line.get(name) for line in history]
        if None not in values:
            axes.plot(
                epochs, values, color=color, label=label, marker=marker, markersize=4
            )

    for name, (label, color) in _lines(history[-1]).items():
        draw(left, name, label, color)
    for split, color in (("train", _TRAIN), ("test", _TEST)):
        draw(right, f"{split}_{metric.name}", split, color)
    for axes in (left, right):
        if len(axes.lines) > 1:
            # Beside the title: finding the best place can take seconds, and warns then.
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1, 1),
                borderaxespad=0.2,
                ncols=len(axes.lines),
                frameon=False,
                fontsize=9,
            )
    left.set_title("Loss", fontsize=10, loc="left")
    right.set_title(metric.label[0].upper() + metric.label[1:], fontsize=10, loc="left")
    if metric.percent:
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        left.set_yscale("log" if len(epochs) > 1 else "linear")
    else:
        right.set_yscale("log")
    right.margins(y=0.15)  # Space for the text.
    final = history[-1]
    value = final[f"test_{metric.name}"]
    right.annotate(
        metric.show(value),
        (final["epoch"], value),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        color=_TEST,
        fontsize=10,
        fontweight="bold",
    )
    for axes in (left, right):
        if axes.get_yscale() == "log":
            _write_plain_numbers(axes.yaxis)
        axes.set_xlabel("epoch", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if len(epochs) == 1:
            axes.set_xlim(epochs[0] - 1, epochs[0] + 1)
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _write_plain_numbers(axis: Any) -> None:
    """Labels a logarithmic axis 0.01, 0.1, 1, without Matplotlib's typesetter.

    Powers of ten would take it as long as the rest of the picture.
    """
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            is_labeled = super().__call__(x, pos) != ""
            return f"{x:g}" if is_labeled else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def _lines(line: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The label and color of each loss: by split, or by network of a GAN."""
    if "train_generator_loss" in line:
        return {
            "train_generator_loss": ("generator", _TRAIN),
            "train_discriminator_loss": ("discriminator", _OTHER),
        }
    return {"train_loss": ("train", _TRAIN), "test_loss": ("test", _TEST)}


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Any:
    """Draws a confusion matrix.

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
    # The square root makes the few mistakes visible next to the many right answers.
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted", fontsize=10)
    axes.set_ylabel("label", fontsize=10)
    if size <= 32:
        ticks = range(size)
        names = [_drawable(name) or f"class {i}" for i, name in enumerate(classes)]
        rotation = 90 if max(map(len, names)) > 2 else 0
        axes.set_xticks(ticks, names, fontsize=8, rotation=rotation)
        axes.set_yticks(ticks, names, fontsize=8)
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "white" if share[i, j] > 0.3 else "black"
            text = f"{counts[i, j]:,}"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
    return figure


def overlays(
    images: np.ndarray, labels: np.ndarray, found: np.ndarray, classes: Sequence[str]
) -> Any:
    """Draws images, their labels, and the predicted labels.

    Args:
        images: uint8 of shape (n, height, width, channels).
        labels: Of shape (n, height, width).
        found: The same.
        classes: Names of the classes.

    Returns:
        The figure.
    """
    from matplotlib.patches import Patch

    count = len(images)
    figure = new_figure(1.5 * count, 5.0)
    rows = figure.subplots(3, count, squeeze=False)
    shown = [as_rgb(images)] + [
        color_labels(images, x, len(classes)) for x in (labels, found)
    ]
    for axes, pictures, name in zip(
        rows, shown, ("image", "label", "predicted"), strict=True
    ):
        for one, picture in zip(axes, pictures, strict=True):
            one.imshow(picture, interpolation="nearest")
            one.set_xticks([])
            one.set_yticks([])
        axes[0].set_ylabel(name, fontsize=10)
    present = np.unique([labels, found])
    colors = class_colors(len(classes)) / 255
    patches = [
        Patch(color=tuple(colors[k]), label=classes[k]) for k in present if k >= 0
    ]
    figure.legend(
        handles=patches[:_MOST_IN_LEGEND],
        loc="outside lower center",
        ncols=min(len(patches), 2 * count),
        frameon=False,
        fontsize=9,
        title="class",
    )
    return figure


def samples(generated: np.ndarray, real: np.ndarray) -> Any:
    """Draws generated images next to real ones.

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
    """Arranges images in rows of `columns`, separated by white lines."""
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
    """Colors each pixel by its label, over a gray image.

    No class color is gray, so labels can be told from the image. Pixels without a label
    stay gray.

    Args:
        images: uint8 of shape (n, height, width, channels).
        labels: Of shape (n, height, width); -1 is none.
        classes: How many classes there are.

    Returns:
        uint8 of shape (n, height, width, 3).
    """
    # (The RGB weights of ITU-R 601.)
    rgb = as_rgb(images).astype(np.float32)
    gray = (rgb @ np.array([0.299, 0.587, 0.114], np.float32))[..., None].repeat(
        3, axis=-1
    )
    colors = class_colors(classes)
    over = 0.4 * gray + 0.6 * colors[np.maximum(labels, 0)]
    return np.rint(np.where(labels[..., None] >= 0, over, gray)).astype(np.uint8)


def class_colors(count: int) -> np.ndarray:
    """A color for each class, none of them gray: float, 0 to 255, of shape (n, 3)."""
    from matplotlib import colormaps

    if count < 9:
        colors = np.delete(colormaps["tab10"](np.arange(10)), [5, 7], axis=0)
    else:
        colors = colormaps["hsv"](np.arange(count) / count)
    return 255 * colors[: max(count, 1), :3]


def as_rgb(images: np.ndarray) -> np.ndarray:
    """Converts images with one or at least three channels to RGB (without alpha)."""
    if images.shape[-1] < 3:
        return np.repeat(images[..., :1], 3, axis=-1)
    return images[..., :3]


def _drawable(text: str) -> str | None:
    """A text for Matplotlib; `None` if its font has no glyph for a character of it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    glyphs = get_font(findfont(FontProperties())).get_charmap()
    if any(ord(character) not in glyphs for character in text):
        return None
    return text.replace("$", r"\$")  # Not a formula.


def new_figure(width: float | int, height: float | int) -> Any:
    """A figure without pyplot, which would look for a display."""
    # Imported here, as it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def render(figure: Any) -> np.ndarray:
    """The pixels of a figure from `new_figure`: uint8 of (height, width, 3).

    The figure is only drawn once, which is the slowest part of a picture.
    """
    if figure.stale:
        figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]
