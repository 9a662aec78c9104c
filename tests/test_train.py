"""Runs `train.py` as a user would."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbn.training.checkpoint import Checkpoints
from jbn.training.metrics import MetricsFile


SCRIPT = Path(__file__).parents[1] / "train.py"
MNIST_FILES = SCRIPT.parents[1] / "shared" / "data" / "mnist"
STEPS = 23  # Steps in an epoch of the digits: 1,437 images in batches of 64.


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


def run(*args: object, data_dir: Path, cwd: Path, rc: int = 0) -> tuple[str, str]:
    """What a new process wrote to its output and to its error output."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"--data-dir={data_dir}", *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout, done.stderr


def losses(workdir: Path) -> np.ndarray:
    """The training and the test loss of each epoch."""
    history = MetricsFile(workdir / "metrics.jsonl").read()
    return np.array([(m.train_loss, m.test_loss) for m in history])


@pytest.fixture(scope="module")
def six_epochs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six epochs on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "six"
    run("--epochs=6", f"--workdir={workdir}", data_dir=data_dir, cwd=workdir.parent)
    return workdir


def test_without_flags(data_dir: Path, tmp_path: Path):
    """The first command of the README, and all that it promises."""
    out, err = run(data_dir=data_dir, cwd=tmp_path)
    assert err == ""
    assert "warning" not in out.lower()
    lines = out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 60
    for word in ("loss", "train", "test", "examples/s"):
        assert all(word in line for line in epochs)
    final = re.fullmatch(r"final test accuracy: ([\d.]+) % \(epoch 60\)", lines[-1])
    assert final is not None
    assert float(final[1]) >= 97

    (workdir,) = (tmp_path / "runs").iterdir()
    history = MetricsFile(workdir / "metrics.jsonl").read()
    assert [m.epoch for m in history] == list(range(1, 61))
    assert [m.step for m in history] == [STEPS * m.epoch for m in history]
    assert f"{100 * history[-1].test_accuracy:.2f}" == final[1]
    config = json.loads((workdir / "config.json").read_text())
    assert (config["dataset"], config["seed"]) == ("digits", 0)
    assert (workdir / "curves.png").stat().st_size > 10_000
    best = max(history, key=lambda m: (m.test_accuracy, m.epoch)).epoch
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {"60", str(best)}


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_four_devices_give_the_curve_of_one(
    data_dir: Path, tmp_path: Path, six_epochs: Path, parallel: str
):
    out, _ = run(
        *("--epochs=6", f"--parallel={parallel}", "--num-devices=4", "--workdir=four"),
        data_dir=data_dir,
        cwd=tmp_path,
    )
    assert f"4 CPU, by {parallel}" in out
    one, four = losses(six_epochs), losses(tmp_path / "four")
    np.testing.assert_allclose(four[0], one[0], rtol=1e-5)
    # Later on, rounding puts a hidden unit on the other side of zero sooner or later,
    # as it does between pmap and jit on one device; in float64 there is no such thing.
    np.testing.assert_allclose(four, one, rtol=2e-2)


def test_resumed_run_is_the_unbroken_one_bit_for_bit(
    data_dir: Path, tmp_path: Path, six_epochs: Path
):
    """Which also says that a run can be repeated."""
    run("--epochs=4", "--workdir=run", data_dir=data_dir, cwd=tmp_path)
    # As if stopped between the line and the checkpoint of the fifth epoch.
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        lines = (six_epochs / "metrics.jsonl").read_text().splitlines(keepends=True)
        file.write(lines[4].replace("0.", "7."))
    args = ("--epochs=6", "--workdir=run", "--resume")
    out, err = run(*args, data_dir=data_dir, cwd=tmp_path)
    assert "resuming after epoch 4" in out
    assert err == ""
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(six_epochs))
    # Nothing is left to do, and nothing is lost.
    again, _ = run(*args, data_dir=data_dir, cwd=tmp_path)
    assert again.splitlines()[-1] == out.splitlines()[-1]
    _, err = run(*args[:2], data_dir=data_dir, cwd=tmp_path, rc=2)
    assert "is not empty" in err
    np.testing.assert_array_equal(losses(tmp_path / "run"), losses(six_epochs))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--accelerator=tpu"], r"--accelerator=tpu, but JAX found .*pip install"),
        (["--dataset=nonesuch"], "TFDS knows no data set called"),
        (["--epochs=0"], "out of range"),
    ],
)
def test_usage_errors(data_dir: Path, tmp_path: Path, args: list[str], match: str):
    out, err = run(*args, data_dir=data_dir, cwd=tmp_path, rc=2)
    assert out == ""
    assert re.match(f"error: .*{match}", err)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, standard_promotion: None) -> Any:
    """`train.py` as a module; strict promotion is not for Optax's Adam."""
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("bad_step", "message", "last_epoch"),
    [
        (STEPS + 7, f"The loss is nan at step {STEPS + 8}, in epoch 2. The last", 1),
        (STEPS, f"The test loss is nan after step {STEPS}, in epoch 1. There", None),
    ],
)
def test_not_finite(
    data_dir: Path,
    tmp_path: Path,
    train: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bad_step: int,
    message: str,
    last_epoch: int | None,
):
    """After a step that spoils the parameters. What was saved before is not."""
    adam = optax.adam

    def spoiled(learning_rate: float, **kwargs: Any) -> Any:
        optimizer = adam(learning_rate, **kwargs)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            updates, state = optimizer.update(updates, state, params)
            factor = jnp.where(state[0].count == bad_step, jnp.nan, 1)
            return jax.tree.map(lambda x: factor * x, updates), state

        return optax.GradientTransformation(optimizer.init, update)

    args = [f"--data-dir={data_dir}", f"--workdir={tmp_path}/run", "--epochs=3"]
    with monkeypatch.context() as patch:
        patch.setattr(optax, "adam", spoiled)
        assert train.main([*args, "--steps-per-dispatch=5"]) == 1
    assert message in capsys.readouterr().err
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.last_epoch == last_epoch
    assert train.main([*args, "--resume"]) == 0
    assert "(epoch 3)" in capsys.readouterr().out
    assert np.isfinite(losses(tmp_path / "run")).all()
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_accuracy_of_other_seeds(data_dir: Path, tmp_path: Path, seed: int):
    out, _ = run(f"--seed={seed}", data_dir=data_dir, cwd=tmp_path)
    assert float(out.splitlines()[-1].split()[3]) >= 97


@pytest.mark.slow
@pytest.mark.skipif(not MNIST_FILES.exists(), reason="needs the files of MNIST")
def test_accuracy_on_mnist(data_dir: Path, tmp_path: Path):
    accuracies = []
    for seed in (0, 1, 2):
        args = ("--dataset=mnist", f"--manual-dir={MNIST_FILES}", "--epochs=5")
        out, err = run(*args, f"--seed={seed}", data_dir=data_dir, cwd=tmp_path)
        assert err == ""
        accuracies.append(float(out.splitlines()[-1].split()[3]))
    assert min(accuracies) >= 96.5
    assert np.mean(accuracies) >= 97.0
