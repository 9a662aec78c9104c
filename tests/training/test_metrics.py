"""Metrics: means over examples, the file of JSON lines, and the picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jbn.training.metrics import EpochMetrics, MetricsFile, plot_curves


def make(epoch: int) -> EpochMetrics:
    return EpochMetrics(epoch, 10 * epoch, 1 / epoch, 0.5, 1.5 / epoch, 0.4, 1000.0)


def test_means_are_over_examples_not_over_steps():
    train = {
        "loss": np.array([1.0, 3.0], np.float32),
        "correct": np.array([3.0, 1.0], np.float32),
        "weight": np.array([6.0, 2.0], np.float32),
    }
    test = {k: v[:1] for k, v in train.items()}
    metrics = EpochMetrics.summarize(2, 8, train, test, 10.0)
    assert metrics.train_loss == 1.5
    assert (metrics.train_accuracy, metrics.test_accuracy) == (0.5, 0.5)
    assert metrics.test_loss == 1.0
    assert (metrics.epoch, metrics.step) == (2, 8)


def test_file(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    for epoch in (1, 2, 3):
        file.append(make(epoch))
    assert file.read() == [make(1), make(2), make(3)]
    assert len(file.path.read_text().splitlines()) == 3
    file.truncate(2)
    assert file.read() == [make(1), make(2)]
    file.path.write_text(file.path.read_text() + '{"epoch": 3, "st')  # Power cut.
    file.truncate(2)
    assert file.read() == [make(1), make(2)]


@pytest.mark.parametrize("num_epochs", [1, 40])
def test_picture(tmp_path: Path, num_epochs: int):
    path = tmp_path / "curves.png"
    plot_curves([make(epoch + 1) for epoch in range(num_epochs)], path, "title")
    with Image.open(path) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
