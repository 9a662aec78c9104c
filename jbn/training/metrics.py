"""Metrics of a run: one JSON line an epoch, and a picture of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class EpochMetrics:
    """What is written down about one epoch.

    Attributes:
        epoch: Counted from one.
        step: Optimizer steps taken so far.
        train_loss: Mean over the examples, while the model was changing.
        train_accuracy: Likewise, with the statistics of the batch.
        test_loss: Mean over the test split after the epoch, with the running
            statistics.
        test_accuracy: Likewise.
        examples_per_second: Training examples by the time they took; compilation and
            evaluation are not counted.
    """

    epoch: int
    step: int
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    examples_per_second: float

    @classmethod
    def summarize(
        cls,
        epoch: int,
        step: int,
        train: dict[str, np.ndarray],
        test: dict[str, np.ndarray],
        examples_per_second: float,
    ) -> "EpochMetrics":
        """Takes the means over the examples of the metrics of each step."""
        return cls(
            epoch, step, *_means(train), *_means(test), round(examples_per_second, 1)
        )

    def __str__(self) -> str:
        return (
            f"loss {self.train_loss:.4f}  train {100 * self.train_accuracy:6.2f} %  "
            f"test {100 * self.test_accuracy:6.2f} %  "
            f"{self.examples_per_second:,.0f} examples/s"
        )


def _means(metrics: dict[str, np.ndarray]) -> tuple[float, float]:
    """The mean loss and the accuracy over the examples of several steps."""
    weight = metrics["weight"].astype(np.float64)
    loss = np.sum(metrics["loss"] * weight) / np.sum(weight)
    return float(loss), float(np.sum(metrics["correct"]) / np.sum(weight))


class MetricsFile:
    """The file of JSON lines, one line an epoch.

    Args:
        path: Where it is, or is to be.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, metrics: EpochMetrics) -> None:
        """Adds a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(metrics)) + "\n")

    def read(self) -> list[EpochMetrics]:
        """Reads all lines, but for a last one that was not written to its end."""
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_text().split("\n")
        return [EpochMetrics(**json.loads(line)) for line in lines]

    def truncate(self, epoch: int) -> None:
        """Drops the lines after `epoch`, which a run wrote that ended in between."""
        kept = [metrics for metrics in self.read() if metrics.epoch <= epoch]
        self.path.unlink(missing_ok=True)
        for metrics in kept:
            self.append(metrics)


def plot_curves(history: list[EpochMetrics], path: Path, title: str) -> None:
    """Draws loss and accuracy over the epochs.

    Args:
        history: The metrics of each epoch.
        path: The PNG file to write.
        title: Put above the picture.
    """
    # Not pyplot: that would look for a screen. And only here: it takes a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    epochs = [m.epoch for m in history]
    train, test = "#5b7db1", "#d1495b"
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, x=0.01, ha="left", fontweight="bold")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [m.train_loss for m in history], color=train, label="train")
    loss.plot(epochs, [m.test_loss for m in history], color=test, label="test")
    loss.set_yscale("log")
    loss.set_title("Cross-entropy", fontsize=10, loc="left")
    accuracy.plot(epochs, [m.train_accuracy for m in history], color=train)
    accuracy.plot(epochs, [m.test_accuracy for m in history], color=test)
    accuracy.set_title("Accuracy", fontsize=10, loc="left")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    final = history[-1]
    accuracy.annotate(
        f"{100 * final.test_accuracy:.2f} %",
        (final.epoch, final.test_accuracy),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        color=test,
        fontsize=10,
        fontweight="bold",
    )
    for axes in (loss, accuracy):
        for line in axes.lines:
            line.set(linewidth=1.8, marker="o" if len(epochs) < 12 else "", ms=4)
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    figure.savefig(path)
