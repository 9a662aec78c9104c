"""Metrics: sums, the file of JSON lines; and what is drawn and written of them."""

import importlib
import io
import json
import resource
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from jbn.training import pictures, report
from jbn.training.metrics import (
    Metric,
    MetricsFile,
    Sums,
    peak_memory,
    show,
)
from jbn.training.report import Events, Profile, Report


ACCURACY = Metric("accuracy", "accuracy", percent=True)
DISTANCE = Metric("frechet", "Fréchet distance", higher_is_better=False)


def make(epoch: int, **values: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train_loss": 1 / epoch,
        "train_accuracy": 0.5,
        "test_loss": 1.5 / epoch,
        "test_accuracy": 0.4,
        "skipped": 0,
        "examples_per_second": 1234.5,
        **values,
    }


# ---- Sums ----------------------------------------------------------------------------


def steps(*values: float, skipped: int = 0) -> dict[str, np.ndarray]:
    loss = np.array(values, np.float32)
    count = np.arange(len(loss)) < skipped
    return {"loss": loss, "skipped": np.where(count, 2, 0).astype(np.int32)}


def test_sums_over_steps():
    """Skipped steps are counted, whatever the reason."""
    sums = Sums()
    sums.add_steps(steps(1, 2, 3, skipped=2))
    sums.add_steps(steps(4, 5, skipped=1))
    assert sums.values["loss"] == 15
    assert sums.values["num_skipped"] == 3


def test_sums_are_wide():
    """In float32 the small ones would vanish beside the large, and integers wrap."""
    sums = Sums()
    for _ in range(10):
        sums.add(
            {"loss": np.array([2**24, 1], "f"), "n": np.array([2**30, 1], np.int32)}
        )
    assert sums.values["loss"].tolist() == [10 * 2**24, 10]
    assert sums.values["loss"].dtype == np.float64
    assert sums.values["n"].tolist() == [10 * 2**30, 10]
    sums = Sums()
    sums.add_steps(steps(2**24, 1, 1, 1))
    assert sums.values["loss"] == 2**24 + 3


def test_sums_go_on_from_those_of_another_process():
    """To the last bit, by way of a file."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=30)
    whole, first = Sums(), Sums()
    for part in np.split(values, 6):
        whole.add_steps(steps(*part, skipped=1))
    for part in np.split(values, 6)[:2]:
        first.add_steps(steps(*part, skipped=1))
    second = Sums(json.loads(json.dumps(first.as_json())))
    for part in np.split(values, 6)[2:]:
        second.add_steps(steps(*part, skipped=1))
    assert second.as_json() == whole.as_json()
    assert whole.as_json()["num_skipped"] == 6
    assert all(isinstance(v, int | float) for v in whole.as_json().values())


# ---- Lines ---------------------------------------------------------------------------


def test_file(tmp_path: Path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    assert file.read() == []
    file.truncate(0)
    assert file.read() == []
    for epoch in (1, 2, 3):
        file.append(make(epoch, more=0.1 + 0.2))
    assert file.read() == [make(epoch, more=0.1 + 0.2) for epoch in (1, 2, 3)]
    assert len(file.path.read_text().splitlines()) == 3
    file.truncate(29)
    assert [line["epoch"] for line in file.read()] == [1, 2]
    file.path.write_text(file.path.read_text() + '{"epoch": 3, "st')  # Power cut.
    assert [line["epoch"] for line in file.read()] == [1, 2]
    file.truncate(20)
    file.append(make(3))
    assert [line["epoch"] for line in file.read()] == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_metric_in_words():
    assert ACCURACY.show(0.98765) == "98.77 %"
    assert DISTANCE.show(0.123456) == "0.1235"


def test_show():
    assert show(make(2), ACCURACY) == (
        "loss 0.5000  train  50.00 %  test  40.00 %  1,234 examples/s"
    )
    miou = Metric("miou", "mean intersection over union", percent=True)
    text = show(make(2, test_miou=0.25, skipped=3), miou)
    assert "test miou  25.00 %  3 steps skipped  1,234" in text
    assert "train miou" not in text
    assert "test frechet   0.1235" in show(make(1, test_frechet=0.12346), DISTANCE)


def test_peak_memory():
    before = peak_memory()
    assert before > 10e6
    block = np.ones(30_000_000)
    assert peak_memory() > block.nbytes
    assert peak_memory() >= before


# ---- Pictures ------------------------------------------------------------------------


def pixels(figure: Figure, path: Path) -> np.ndarray:
    figure.savefig(path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("num_epochs", [1, 40])
@pytest.mark.parametrize("metric", [ACCURACY, DISTANCE])
def test_curves(tmp_path: Path, num_epochs: int, metric: Metric):
    history = [make(epoch + 1, test_frechet=2.0) for epoch in range(num_epochs)]
    figure = pictures.curves(history, metric, "title")
    image = pixels(figure, tmp_path / "curves.png")
    assert image.shape[1] > 1000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    loss, right = figure.axes
    assert len(loss.lines) == 2
    np.testing.assert_array_equal(
        loss.lines[0].get_ydata(), [line["train_loss"] for line in history]
    )
    assert right.get_title("left").startswith(metric.label[0].upper())
    assert len(right.lines) == (2 if metric is ACCURACY else 1)
    shown = "40.00 %" if metric is ACCURACY else "2"
    assert shown in [text.get_text() for text in right.texts]
    figure.canvas.draw()
    low, high = loss.get_xlim()
    ticks = [tick for tick in loss.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)
    # A single point is no line.
    assert (loss.lines[0].get_marker() == "o") == (num_epochs == 1)


def test_curves_of_a_gan_are_named():
    line = {
        "epoch": 1,
        "train_generator_loss": 1.0,
        "train_discriminator_loss": 0.7,
        "test_frechet": 2.0,
    }
    figure = pictures.curves([line], DISTANCE, "title")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["generator", "discriminator"]
    text = show({**line, "examples_per_second": 5.0}, DISTANCE)
    assert text.startswith("generator loss 1.0000  discriminator loss 0.7000  test fr")


@pytest.mark.parametrize("size", [2, 10, 40])
@pytest.mark.slow
def test_confusion(tmp_path: Path, size: int):
    counts = np.diag(np.arange(size) + 1)
    counts[0, 1] = 1234
    figure = pictures.confusion(counts, [f"class {i}" for i in range(size)])
    (axes,) = figure.axes
    texts = {text.get_text() for text in axes.texts}
    assert texts == (
        set(map(str, range(1, size + 1))) | {"1,234"} if size < 33 else set()
    )
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(np.asarray(shown) ** 2, counts / counts.sum(1)[:, None])
    assert len(np.unique(pixels(figure, tmp_path / "c.png").reshape(-1, 3), axis=0)) > 3


def test_confusion_with_any_names():
    """Whether Matplotlib takes them for formulas, or its font does not have them."""
    figure = pictures.confusion(np.eye(3, dtype=int), ["$x_{$", "Ü & co", "猫"])
    pictures.render(figure)  # Warnings are errors.
    (axes,) = figure.axes
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == [r"\$x_{\$", "Ü & co", "class 2"]


def test_confusion_of_a_class_that_is_not_there():
    figure = pictures.confusion(np.array([[3, 1], [0, 0]]), ["a", "b"])
    assert np.isfinite(np.asarray(figure.axes[0].images[0].get_array())).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_overlays(tmp_path: Path, rng: np.random.Generator, channels: int):
    images = rng.integers(0, 256, (4, 8, 8, channels), np.uint8)
    labels = rng.integers(-1, 3, (4, 8, 8), np.int32)
    figure = pictures.overlays(images, labels, np.maximum(labels, 0), "abc")
    assert len(figure.axes) == 12
    assert [axes.get_ylabel() for axes in figure.axes[::4]] == [
        "image",
        "label",
        "predicted",
    ]
    assert pixels(figure, tmp_path / "o.png").size > 10_000
    # Only pixels with a label are in color.
    shown = np.asarray(figure.axes[4].images[0].get_array()).astype(int)
    void = labels[0] < 0
    assert (np.ptp(shown[void], axis=-1) == 0).all()
    assert np.ptp(shown[~void], axis=-1).min() > 50
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    colors = pictures.class_colors(3)
    for k, patch in enumerate(legend.get_patches()):
        np.testing.assert_allclose(255 * np.array(patch.get_facecolor()[:3]), colors[k])


@pytest.mark.parametrize("count", [1, 8, 9, 40])
def test_colors_of_classes_differ_and_are_not_gray(count: int):
    colors = pictures.class_colors(count)
    assert len(np.unique(np.rint(colors), axis=0)) == count
    assert np.ptp(colors, axis=-1).min() > 80


@pytest.mark.parametrize("channels", [1, 3])
def test_samples(tmp_path: Path, rng: np.random.Generator, channels: int):
    images = rng.integers(0, 255, (9, 8, 8, channels), np.uint8)
    figure = pictures.samples(images, images[:3])
    assert [axes.get_title("left") for axes in figure.axes] == ["generated", "real"]
    assert pixels(figure, tmp_path / "s.png").size > 10_000


def test_tiles():
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones(
        (3, 2, 2, 1), np.uint8
    )
    expected = [
        [0, 0, 255, 1, 1],
        [0, 0, 255, 1, 1],
        [255, 255, 255, 255, 255],
        [2, 2, 255, 255, 255],
        [2, 2, 255, 255, 255],
    ]
    np.testing.assert_array_equal(pictures.tiles(images, 2)[..., 0], expected)


# ---- Report --------------------------------------------------------------------------


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "_SECONDS", 10.0)
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    made = Report(tmp_path, ACCURACY, "title")
    due = []
    for now[0] in (105.0, 110.5, 111.0, 120.0, 121.0):
        due.append(made.is_due())
    assert due == [False, True, False, False, True]
    made.draw([])
    assert list(tmp_path.iterdir()) == []
    made.figures["confusion"] = pictures.confusion(np.eye(2, dtype=int), "ab")
    made.draw([make(1)])
    assert {path.name for path in tmp_path.iterdir()} == {"curves.png", "confusion.png"}


def test_a_figure_is_drawn_once(monkeypatch: pytest.MonkeyPatch):
    figure = pictures.confusion(np.eye(2, dtype=int), "ab")
    draw, draws = figure.canvas.draw, []
    monkeypatch.setattr(figure.canvas, "draw", lambda: draws.append(draw()))
    first = pictures.render(figure)
    np.testing.assert_array_equal(pictures.render(figure), first)
    assert len(draws) == 1
    width, height = figure.canvas.get_width_height()
    assert first.shape == (height, width, 3)
    assert first.dtype == np.uint8
    file = io.BytesIO()
    figure.savefig(file)
    saved = np.asarray(Image.open(file).convert("RGB"))
    np.testing.assert_array_equal(first, saved)


def read_events(path: Path) -> list[Any]:
    """The records of an event file: length, checksum, bytes, checksum."""
    event_pb2: Any = importlib.import_module("tensorboardX.proto.event_pb2")

    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_events(tmp_path: Path):
    folder = tmp_path / "events"
    with Events(None) as events:
        events.write(make(1), {})
    with Events(folder) as events:
        assert not folder.exists()
        figure = pictures.confusion(np.eye(2, dtype=int), "ab")
        events.write(make(1), {"confusion": figure})
        events.write(make(2), {})
    (path,) = folder.iterdir()
    scalars, images = {}, []
    for event in read_events(path):
        for value in event.summary.value:
            if value.HasField("image"):
                images.append((value.tag, event.step, value.image.width))
            else:
                scalars[value.tag, event.step] = value.simple_value
    assert scalars == pytest.approx(
        {
            (tag, 10 * epoch): make(epoch)[name]
            for epoch in (1, 2)
            for tag, name in {
                "loss/train": "train_loss",
                "loss/test": "test_loss",
                "accuracy/train": "train_accuracy",
                "accuracy/test": "test_accuracy",
                "run/skipped": "skipped",
                "run/examples_per_second": "examples_per_second",
            }.items()
        }
    )
    assert [(tag, step) for tag, step, _ in images] == [("confusion", 10)]
    assert images[0][2] > 100


def test_an_event_that_cannot_be_written_is_an_error_at_once(tmp_path: Path):
    """In the run itself, and no thread is left that nobody waits for."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = threading.active_count()
    with Events(tmp_path) as events:
        events.write(make(1), {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                events.write(make(2), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        events.write(make(3), {})
    assert threading.active_count() == before


@pytest.mark.parametrize(("dispatches", "expected"), [(0, ""), (1, "+-"), (5, "+-")])
def test_profile_is_of_the_second_dispatch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dispatches: int,
    expected: str,
):
    """And never goes on behind the end of the run."""
    calls = []
    profiler = report.jax.profiler
    monkeypatch.setattr(profiler, "start_trace", lambda folder: calls.append("+"))
    monkeypatch.setattr(profiler, "stop_trace", lambda: calls.append("-"))
    for folder in (None, tmp_path):
        with Profile(folder) as profile:
            for i in range(dispatches):
                profile.next()
                if folder is not None:
                    assert "".join(calls) == ("+" if i == 0 else "+-")
    assert "".join(calls) == expected
