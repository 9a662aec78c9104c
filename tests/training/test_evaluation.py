"""Evaluation: statistics are those of the data, on any number of devices."""

import functools
from typing import Any, Literal

import jax
import numpy as np
import optax
import pytest
from ways import executors

from jbn.linen import BatchNorm
from jbn.models import MLP
from jbn.training import evaluation as module
from jbn.training.batches import plan_epoch
from jbn.training.data import Dataset, InMemory
from jbn.training.evaluation import Evaluation, steps_per_dispatch
from jbn.training.executor import Executor
from jbn.training.step import create_state
from jbn.training.tasks import Supervised


pytestmark = pytest.mark.sweep


Parallel = Literal["pmap", "jit"]
SHAPE = (4, 4, 1)
WAYS = executors(("pmap", 1), ("pmap", 4), ("jit", 1), ("jit", 8))


def make_split(rng: np.random.Generator, rows: int) -> InMemory:
    label = rng.integers(0, 3, rows, np.int32)
    noise = rng.integers(0, 100, (rows, *SHAPE))
    image = (noise + 60 * label[:, None, None, None]).astype(np.uint8)
    return InMemory(image, label)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Of sizes that no number of devices divides."""
    rng = np.random.default_rng(0)
    return Dataset("set", "abc", SHAPE, make_split(rng, 51), make_split(rng, 37))


def make_task(axis_name: str | None) -> Supervised:
    make = lambda name: MLP(
        features=(8, 5),
        num_classes=3,
        norm=functools.partial(BatchNorm, axis_name=name),
    )
    return Supervised(
        kind="classification",
        model=make(axis_name),
        local_model=make(None),
        image_shape=SHAPE,
        num_classes=3,
        optimizer=optax.sgd(0.1),
        axis_name=axis_name,
    )


def make(parallel: Parallel, num_devices: int, dataset: Dataset) -> Evaluation:
    executor = Executor(jax.devices()[:num_devices], parallel)
    task = make_task(executor.axis_name)
    return Evaluation(task, executor, dataset, batch_size=16)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    return jax.device_get(create_state(make_task(None), seed=0).variables)


def first_layer(images: np.ndarray, params: Any) -> np.ndarray:
    """What the first norm sees, in float64."""
    kernel, bias = (np.float64(params["Dense_0"][name]) for name in ("kernel", "bias"))
    x = images.reshape(len(images), -1) / 255.0
    return np.maximum(x @ kernel + bias, 0)


@pytest.mark.parametrize(("parallel", "num_devices"), WAYS)
def test_statistics_are_those_of_the_data(
    dataset: Dataset,
    variables: dict[str, Any],
    parallel: Parallel,
    num_devices: int,
):
    """All else stays as it was; a second time nothing changes, whatever the devices."""
    evaluation = make(parallel, num_devices, dataset)
    found = evaluation.recalibrated(variables)
    hidden = first_layer(
        dataset.train.rows(np.arange(51))["image"], variables["params"]
    )
    stats = found["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], hidden.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], hidden.var(0), rtol=1e-4, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found["params"], variables["params"])
    one = make("jit", 1, dataset).recalibrated(variables)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found["batch_stats"], one["batch_stats"])
    again = evaluation.recalibrated(found)
    jax.tree.map(close, again["batch_stats"], found["batch_stats"])
    # Called again, with other parameters: nothing of the first is left.
    params = jax.tree.map(lambda x: 2 * x, variables["params"])
    twice = evaluation.recalibrated({**variables, "params": params})
    stats = twice["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], 2 * hidden.mean(0), rtol=1e-5, atol=1e-6)


def test_statistics_of_some_examples_of_many(
    dataset: Dataset, variables: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Taken at random, once each."""
    monkeypatch.setattr(module, "_CALIBRATION_ROWS", 20)
    seen = []
    rows = InMemory.rows
    monkeypatch.setattr(
        InMemory,
        "rows",
        lambda self, indices: seen.append(np.array(indices)) or rows(self, indices),
    )
    found = make("jit", 1, dataset).recalibrated(variables)
    # (Filling has number zero.)
    used = np.concatenate([indices.ravel() for indices in seen])[:20]
    assert len(set(used)) == 20
    assert (np.diff(used) < 0).any()
    hidden = first_layer(dataset.train.rows(used)["image"], variables["params"])
    mean = found["batch_stats"]["BatchNorm_0"]["mean"]
    np.testing.assert_allclose(mean, hidden.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("parallel", "num_devices"), WAYS)
def test_sums_over_the_test_split(
    dataset: Dataset,
    variables: dict[str, Any],
    parallel: Parallel,
    num_devices: int,
):
    """With the running statistics, every example once."""
    rng = np.random.default_rng(1)
    stats = jax.tree.map(
        lambda x: rng.uniform(0.5, 1, x.shape).astype("f"), variables["batch_stats"]
    )
    evaluation = make(parallel, num_devices, dataset)
    sums = evaluation({**variables, "batch_stats": stats})
    images = dataset.test.rows(np.arange(37))
    y = images["image"].reshape(37, -1) / 255.0
    params = jax.tree.map(np.float64, variables["params"])
    for i in range(3):
        y = y @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
        if i < 2:
            norm, running = params[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"]
            y = (np.maximum(y, 0) - running["mean"]) / np.sqrt(running["var"] + 1e-5)
            y = y * norm["scale"] + norm["bias"]
    log_p = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    label, best = images["label"], y.argmax(axis=1)
    expected = -log_p[np.arange(37), label].sum()
    assert sums["weight"] == 37
    assert sums["correct"] == (best == label).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (label, best), 1)
    np.testing.assert_array_equal(sums["confusion"], confusion)


def test_steps_per_dispatch():
    """As many as fit into 64 MiB, cut evenly."""
    image = np.zeros((100, 256, 256, 4), np.uint8)  # A quarter of a MiB each.
    split = InMemory(image, np.zeros(100, np.int32))
    plan = plan_epoch(np.arange(100), 8, multiple=1)  # 13 batches of 2 MiB, and labels.
    assert steps_per_dispatch(split, plan, 256) == 13
    assert steps_per_dispatch(split, plan, 12) == 7
    assert steps_per_dispatch(split, plan, 1) == 1
    large = plan_epoch(np.arange(100), 50, multiple=1)  # 2 of 12.5 MiB.
    assert steps_per_dispatch(split, large, 256) == 2
    many = plan_epoch(np.tile(np.arange(100), 4), 32, multiple=1)  # 13 of 8 MiB.
    assert steps_per_dispatch(split, many, 256) == 7  # Seven fit, eight do not.
    whole = plan_epoch(np.tile(np.arange(100), 8), 400, multiple=1)
    assert steps_per_dispatch(split, whole, 256) == 1
