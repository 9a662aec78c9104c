"""Runs `train.py` as a user would; in a process of its own where that is the point."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import compilation_cache

from jbn.training import setup
from jbn.training.config import parse_config
from jbn.training.guard import Guard
from jbn.training.loop import NOT_FINISHED
from jbn.training.metrics import MetricsFile
from jbn.training.report import Report
from jbn.training.run import OpenRun, open_run
from jbn.training.tasks import Supervised


SCRIPT = Path(__file__).parents[1] / "train.py"
MNIST_FILES = SCRIPT.parents[1] / "shared" / "data" / "mnist"
STEPS = 23  # Steps in an epoch of the digits: 1,437 images in batches of 64.
SECONDS = 200  # Far more than any process here takes, on a busy machine too.

Train = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="module")
def devices() -> Any:
    """In use before a run in this process may say how many there are."""
    return jax.devices()


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs in this process compile each program once, which takes them longest."""
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


def start(*args: object, data_dir: Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), f"--data-dir={data_dir}", *map(str, args)],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The status of a process, and what it wrote; it does not outlive this."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


def run(*args: object, data_dir: Path, cwd: Path) -> tuple[str, str]:
    """What a new process wrote to its output and to its error output."""
    status, out, err = finish(start(*args, data_dir=data_dir, cwd=cwd))
    assert status == 0, out + err
    return out, err


def history(workdir: Path) -> list[dict[str, Any]]:
    return MetricsFile(workdir / "metrics.jsonl").read()


def losses(workdir: Path) -> np.ndarray:
    """The training and the test loss of each epoch."""
    return np.array([(m["train_loss"], m["test_loss"]) for m in history(workdir)])


def steps_kept(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def readme(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Output, error output and folder of the first command of the README."""
    cwd = tmp_path_factory.mktemp("readme")
    out, err = run(data_dir=data_dir, cwd=cwd)
    (workdir,) = (cwd / "runs").iterdir()
    return out, err, workdir


@pytest.fixture(scope="module")
def unbroken(readme: Any) -> np.ndarray:
    """The losses of a run that nothing has disturbed, of 60 epochs."""
    return losses(readme[2])


@pytest.fixture
def module(standard_promotion: None) -> Any:
    """`train.py` as a module; strict promotion is not for Optax's Adam."""
    spec = importlib.util.spec_from_file_location("train", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def train(
    module: Any,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Train:
    """Runs `train.py` in this process, in `tmp_path`: status, output, error output.

    It draws no pictures: see `test_without_flags`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Supervised, "pictures", lambda *args: {})
    monkeypatch.setattr(Report, "draw", lambda *args: None)

    def train(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = module.main([f"--data-dir={data_dir}", *args])
        out, err = capsys.readouterr()
        return status, out, err

    return train


@pytest.fixture
def opened(standard_promotion: None) -> Callable[..., OpenRun]:
    return lambda folder, which="last": open_run(folder, which)


# ---- The first command ---------------------------------------------------------------


def test_without_flags(readme: Any):
    """The first command of the README, and all that it promises."""
    out, err, workdir = readme
    assert err == ""
    assert "warning" not in out.lower()
    lines = out.splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert len(epochs) == 60
    for word in ("loss", "train", "test", "examples/s"):
        assert all(word in line for line in epochs)
    final = re.fullmatch(r"final test accuracy: (\d+\.\d\d) % \(epoch 60\)", lines[-1])
    assert final is not None
    assert float(final[1]) >= 97

    found = history(workdir)
    assert [m["epoch"] for m in found] == list(range(1, 61))
    assert [m["step"] for m in found] == [STEPS * m["epoch"] for m in found]
    assert f"{100 * found[-1]['test_accuracy']:.2f}" == final[1]
    for m in found:
        assert m["skipped"] == 0
        assert m["examples_per_second"] > 0
        assert m["step_ms"] > 0
        assert m["peak_memory_bytes"] > 1e7
    config = json.loads((workdir / "config.json").read_text())
    assert (config["dataset"], config["seed"]) == ("digits", 0)
    for name in ("curves.png", "confusion.png"):
        assert (workdir / name).stat().st_size > 10_000
    (events,) = (workdir / "events").iterdir()
    assert events.stat().st_size > 10_000
    best = max(found, key=lambda m: (m["test_accuracy"], m["epoch"]))["step"]
    assert steps_kept(workdir) == {str(60 * STEPS), str(best)}


def test_the_checkpoint_is_what_was_reported(
    readme: Any, opened: Callable[..., OpenRun]
):
    *_, workdir = readme
    for which in ("last", "best"):
        found = opened(workdir, which)
        metrics = found.evaluate(found.variables)
        (line,) = [m for m in history(workdir) if m["step"] == found.step]
        for name in ("loss", "accuracy"):
            assert metrics[name] == pytest.approx(line[f"test_{name}"], rel=1e-5)


@pytest.mark.devices
@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_four_devices_give_the_curve_of_one(
    train: Train, tmp_path: Path, unbroken: np.ndarray, parallel: str
):
    args = (f"--parallel={parallel}", "--num-devices=4", "--workdir=four")
    status, out, _ = train("--epochs=6", *args)
    assert status == 0
    assert f"4 CPU, by {parallel}" in out
    one, four = unbroken[:6], losses(tmp_path / "four")
    np.testing.assert_allclose(four[0], one[0], rtol=1e-5)
    # Later on, rounding puts a hidden unit on the other side of zero sooner or later,
    # as it does between pmap and jit on one device; in float64 there is no such thing.
    np.testing.assert_allclose(four, one, rtol=2e-2)


# ---- Stopped and resumed -------------------------------------------------------------


def test_resumed_run_is_the_unbroken_one_bit_for_bit(
    train: Train, tmp_path: Path, unbroken: np.ndarray
):
    """Which also says that a run can be repeated, in this process or in another."""
    workdir = tmp_path / "run"
    assert train("--epochs=2", "--workdir=run")[0] == 0
    np.testing.assert_array_equal(losses(workdir), unbroken[:2])
    # As if stopped between the line and the checkpoint of the third epoch.
    with (workdir / "metrics.jsonl").open("a") as file:
        line = history(workdir)[-1] | {"epoch": 3, "step": 3 * STEPS, "test_loss": 7.0}
        file.write(json.dumps(line) + "\n")
    args = ("--epochs=4", "--workdir=run", "--resume")
    status, out, err = train(*args)
    assert (status, err) == (0, "")
    assert "resuming after step 46, in epoch 2\n" in out
    np.testing.assert_array_equal(losses(workdir), unbroken[:4])
    # Nothing is left to do, and nothing is lost.
    status, again, _ = train(*args)
    assert status == 0
    assert again.splitlines()[-1] == out.splitlines()[-1]
    status, _, err = train(*args[:2])
    assert status == 2
    assert "is not empty" in err
    np.testing.assert_array_equal(losses(workdir), unbroken[:4])


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets this process get a signal at the first dispatch that ends at a step."""

    def stop_after(step: int, number: int = signal.SIGTERM) -> None:
        check = Guard.check

        def checked(self: Guard, metrics: Any, done: int) -> None:
            check(self, metrics, done)
            if done < step <= done + len(metrics["skipped"]):
                signal.raise_signal(number)

        monkeypatch.setattr(Guard, "check", checked)

    return stop_after


@pytest.mark.parametrize(
    ("steps", "extra", "saved"),
    [
        # (Dispatches end after step 5, 10, 15, 20, 23, 28, 33 and so on.)
        ([7, 36], (), [10, 38]),
        pytest.param([36, 45], ("--save-every=4",), [38, 46], marks=pytest.mark.slow),
        pytest.param(
            [36, 40],
            ("--num-devices=4", "--ema-decay=0.9"),
            [38, 43],
            marks=[pytest.mark.slow, pytest.mark.devices],
        ),
    ],
)
def test_stopped_in_the_middle_of_an_epoch(
    train: Train,
    stop_after: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    unbroken: np.ndarray,
    steps: list[int],
    extra: tuple[str, ...],
    saved: list[int],
):
    """It ends well, and goes on from there to the bits of the unbroken run."""
    args = ("--epochs=3", "--steps-per-dispatch=5", *extra)
    before = signal.getsignal(signal.SIGTERM)
    expected = unbroken[:3]
    if "--num-devices=4" in extra:
        assert train(*args, "--workdir=whole")[0] == 0
        expected = losses(tmp_path / "whole")
        assert np.abs(expected / unbroken[:3] - 1).max() > 1e-3  # The average.
    resume = ()
    for step, found in zip(steps, saved, strict=True):
        with monkeypatch.context():
            stop_after(step)
            status, out, err = train(*args, "--workdir=run", *resume)
        assert (status, err) == (NOT_FINISHED, "")
        assert f"stopped by SIGTERM after step {found}, which is saved" in out
        assert "--resume --workdir=run goes on" in out
        assert str(found) in steps_kept(tmp_path / "run")
        assert signal.getsignal(signal.SIGTERM) == before
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        resume = ("--resume",)
    assert len(losses(tmp_path / "run")) == saved[-1] // STEPS
    status, out, _ = train(*args, "--workdir=run", "--resume")
    assert status == 0
    assert f"resuming after step {saved[-1]}" in out
    np.testing.assert_array_equal(losses(tmp_path / "run"), expected)
    assert {m["epoch"] for m in history(tmp_path / "run")} == {1, 2, 3}
    kept = {int(name) for name in steps_kept(tmp_path / "run")}
    assert 3 * STEPS in kept
    assert len(kept) <= 2


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm(data_dir: Path, tmp_path: Path, train: Train, unbroken: np.ndarray):
    """From outside; a run of 60 epochs would last much longer than it is let."""
    workdir = tmp_path / "run"
    args = ("--steps-per-dispatch=1", "--workdir=run")
    process = start(*args, data_dir=data_dir, cwd=tmp_path)
    try:
        wait_until((workdir / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGTERM)
        status, out, err = finish(process)
    finally:
        process.kill()
    assert (status, err) == (NOT_FINISHED, "")
    said = re.search(r"stopped by SIGTERM after step (\d+), which is saved", out)
    assert said is not None
    step = int(said[1])
    assert 0 < step < 60 * STEPS
    assert said[1] in steps_kept(workdir)
    epochs = step // STEPS + 1
    status, out, _ = train("--resume", "--workdir=run", f"--epochs={epochs}")
    assert status == 0
    assert f"resuming after step {step}, in epoch {step / STEPS:.4g}" in out
    np.testing.assert_array_equal(losses(workdir), unbroken[:epochs])


def test_ctrl_c(train: Train, stop_after: Any, tmp_path: Path, unbroken: np.ndarray):
    """Saves, says where and how to go on, and a second one ends at once."""
    args = ("--epochs=2", "--steps-per-dispatch=5")
    before = signal.getsignal(signal.SIGINT)
    stop_after(30, signal.SIGINT)
    status, out, err = train(*args)
    assert status == 130
    assert "Ctrl-C again ends at once" in err
    (workdir,) = (tmp_path / "runs").iterdir()
    assert "stopped by Ctrl-C after step 33, which is saved; " in out
    assert f"--resume --workdir=runs/{workdir.name} goes on" in out
    assert signal.getsignal(signal.SIGINT) == before
    assert train("--resume", f"--workdir={workdir}")[0] == 0
    np.testing.assert_array_equal(losses(workdir), unbroken[:2])


def test_two_processes_on_one_run(readme: Any, train: Train):
    """The second ends with a sentence, and leaves everything as it is."""
    *_, workdir = readme
    with filelock.FileLock(workdir / ".lock"):
        status, out, err = train("--resume", f"--workdir={workdir}", "--epochs=61")
    assert (status, out) == (2, "")
    assert re.fullmatch("error: Another process trains in .*\n", err)
    assert len(losses(workdir)) == 60


def test_full_batches_have_a_program_without_masks(
    train: Train,
    tmp_path: Path,
    unbroken: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
):
    """All but the last of an epoch, and the losses are those with masks."""
    monkeypatch.setattr(setup, "_WORTH_COMPILING", STEPS)
    used: list[bool] = []
    batches = setup.Setup.batches

    def recorded(self: setup.Setup, *span: int) -> Iterator[Any]:
        for count, steps, found in batches(self, *span):
            used.append(steps is self.full_steps)
            assert used[-1] == bool(np.all(found["weight"] == 1))
            yield count, steps, found

    monkeypatch.setattr(setup.Setup, "batches", recorded)
    args = ("--steps-per-dispatch=1", "--epochs=2", "--workdir=run")
    assert train(*args)[0] == 0
    assert used == [*[True] * (STEPS - 1), False] * 2
    np.testing.assert_allclose(losses(tmp_path / "run"), unbroken[:2], rtol=1e-4)


def test_a_run_whose_data_were_moved(train: Train, tmp_path: Path):
    """It goes on where they are now, and on no others."""
    arrays = {
        "images": np.arange(24 * 16).reshape(24, 4, 4).astype(np.uint8),
        "labels": np.arange(24) % 3,
    }
    np.savez(tmp_path / "a.npz", allow_pickle=False, **arrays)
    args = ("--workdir=run", "--epochs=1", "--dataset=a.npz")
    assert train(*args)[0] == 0
    (tmp_path / "a.npz").rename(tmp_path / "b.npz")
    np.savez(
        tmp_path / "c.npz",
        allow_pickle=False,
        **arrays | {"images": 255 - arrays["images"]},
    )
    config = (tmp_path / "run" / "config.json").read_bytes()
    resume = ("--resume", "--workdir=run", "--epochs=2")
    for flags, match in (
        ((), r"The data set of run is not in \S*a.npz. Say where it is with --dataset"),
        (("--dataset=c.npz",), "not the data set that the run in run was trained on"),
    ):
        status, out, err = train(*resume, *flags)
        assert (status, out) == (2, "")
        assert re.fullmatch(f"error: .*{match}.*\n", err), err
        assert (tmp_path / "run" / "config.json").read_bytes() == config
    assert train(*resume, "--dataset=b.npz")[0] == 0
    assert [line["epoch"] for line in history(tmp_path / "run")] == [1, 2]
    assert train("--resume", "--workdir=run", "--epochs=3")[0] == 0


def killed_again_and_again(
    rng: np.random.Generator,
    data_dir: Path,
    cwd: Path,
    *,
    kills: int,
    args: tuple[str, ...],
) -> int:
    """Kills a run and resumes it; returns the number of steps of the last one."""
    checkpoints, step = cwd / "run" / "checkpoints", 0

    def newest() -> int:
        if not checkpoints.exists():
            return 0
        names = [path.name for path in checkpoints.iterdir()]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    for kill in range(kills):
        resume = ["--resume"] if kill else []
        process = start(*args, "--workdir=run", *resume, data_dir=data_dir, cwd=cwd)
        try:
            before = step
            wait_until(lambda before=before: newest() > before, process)
            # Saving takes nearly all the time: some of these moments are in a save.
            time.sleep(rng.uniform(0, 1))
            process.kill()
            status, out, err = finish(process)
        finally:
            process.kill()
        assert status == -signal.SIGKILL, out + err
        step = newest()
        assert step > before
    return step


def test_checkpoints_that_cannot_be_written(
    readme: Any, data_dir: Path, tmp_path: Path
):
    """One line, and no traceback of any thread. A limit stands for a full disk."""
    command = [sys.executable, str(SCRIPT), f"--data-dir={data_dir}"]
    command += ["--workdir=run", "--epochs=2"]
    found = subprocess.run(
        ["bash", "-c", 'ulimit -f 40 && exec "$@"', "bash", *command],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert found.returncode == 1
    (error,) = found.stderr.splitlines()
    assert error == (
        "error: A checkpoint cannot be written to run/checkpoints (File too large); "
        "there is none yet. Mend this, and start with --resume."
    )
    run("--resume", "--workdir=run", "--epochs=2", data_dir=data_dir, cwd=tmp_path)
    assert steps_kept(tmp_path / "run") == {str(2 * STEPS)}


@pytest.mark.parametrize(
    "kills", [3, pytest.param(12, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.slow
def test_sigkill(
    rng: np.random.Generator,
    data_dir: Path,
    tmp_path: Path,
    train: Train,
    unbroken: np.ndarray,
    kills: int,
):
    """At any time, in a save too: the run goes on to the bits of the unbroken one."""
    args = ("--save-every=1", "--steps-per-dispatch=1", "--epochs=60")
    step = killed_again_and_again(rng, data_dir, tmp_path, kills=kills, args=args)
    epochs = step // STEPS + 1
    status, out, err = train(
        *args[:2], f"--epochs={epochs}", "--workdir=run", "--resume"
    )
    assert (status, err) == (0, "")
    assert f"resuming after step {step}, " in out
    np.testing.assert_array_equal(losses(tmp_path / "run"), unbroken[:epochs])
    # Nothing of what was killed is left behind.
    kept = steps_kept(tmp_path / "run")
    assert all(name.isdecimal() for name in kept)
    assert len(kept) <= 2
    assert str(epochs * STEPS) in kept


# ---- What is not finite --------------------------------------------------------------


class Spoiled(Supervised):
    """Some steps, counted from 0, have a loss or parameters that are not finite."""

    steps: tuple[int, ...] = ()
    what: str = "loss"

    def update(self, state: Any, batch: Any, key: Any) -> Any:
        new, metrics = super().update(state, batch, key)
        bad = jnp.isin(state.step, jnp.array(self.steps))
        spoil = lambda x: jnp.where(bad, jnp.nan, x)
        if self.what == "loss":
            return new, {**metrics, "loss": spoil(metrics["loss"])}
        params = jax.tree.map(spoil, new.params)
        return dataclasses.replace(new, params=params), metrics


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    make_task = setup.make_task

    def spoil(steps: range, what: str) -> None:
        def make_spoiled(*args: Any, **kwargs: Any) -> Any:
            task: Any = make_task(*args, **kwargs)
            fields = [f.name for f in dataclasses.fields(task) if f.init]
            spoiled = Spoiled(**{name: getattr(task, name) for name in fields})
            object.__setattr__(spoiled, "steps", tuple(steps))
            object.__setattr__(spoiled, "what", what)
            return spoiled

        monkeypatch.setattr(setup, "make_task", make_spoiled)

    return spoil


@pytest.mark.parametrize(
    "what", ["loss", pytest.param("parameters", marks=pytest.mark.slow)]
)
def test_steps_that_are_not_finite_are_skipped(
    train: Train, spoil: Callable[..., None], tmp_path: Path, what: str
):
    """As many in a row as --max-skipped allows; and metrics are those of the rest."""
    spoil(range(5, 8), what)
    args = ("--max-skipped=3", "--steps-per-dispatch=4", "--epochs=2", "--workdir=run")
    status, out, err = train(*args)
    assert (status, err) == (0, "")
    first, second = history(tmp_path / "run")
    assert (first["skipped"], second["skipped"]) == (3, 0)
    assert (first["step"], second["step"]) == (STEPS, 2 * STEPS)
    assert out.count("3 steps skipped") == 1
    assert np.isfinite(losses(tmp_path / "run")).all()
    assert second["train_loss"] < first["train_loss"] < 3


@pytest.mark.parametrize(
    ("bad", "what", "message", "last_step"),
    [
        (
            range(STEPS + 7, 99),
            "loss",
            f"4 steps in a row were skipped, up to step {STEPS + 11}, in epoch 2: in "
            "the last, the loss was not finite.",
            STEPS,
        ),
        pytest.param(
            range(0, 99),
            "parameters",
            "4 steps in a row were skipped, up to step 4, in epoch 1: in the last, a "
            "parameter, a statistic or the optimizer's state would not have been",
            None,
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.slow
def test_too_many_that_are_not_finite(
    train: Train,
    spoil: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    unbroken: np.ndarray,
    bad: range,
    what: str,
    message: str,
    last_step: int | None,
):
    """The run ends with a reason, and what was saved before can be resumed."""
    args = ("--epochs=2", "--workdir=run", "--max-skipped=3")
    healthy = setup.make_task
    spoil(bad, what)
    status, _, err = train(*args, "--steps-per-dispatch=5")
    assert status == 1
    assert err.startswith(f"error: {message}")
    where = (
        "There is no checkpoint yet."
        if last_step is None
        else f"The last checkpoint, after step {last_step}, can still be loaded"
    )
    assert where in err
    assert "Traceback" not in err
    monkeypatch.setattr(setup, "make_task", healthy)
    status, out, _ = train(*args, "--resume")
    assert status == 0
    assert "(epoch 2)" in out
    np.testing.assert_array_equal(losses(tmp_path / "run"), unbroken[:2])


# ---- Flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--accelerator=tpu"], r"--accelerator=tpu, but JAX found .*pip install"),
        (["--dataset=nonesuch"], "TFDS knows no data set called"),
        (["--epochs=0"], "out of range"),
        (["--num-devices=9"], "--num-devices=9, but JAX found 1 CPU"),
        pytest.param(
            ["--num-devices=4", "--bn-group-size=3"],
            "--bn-group-size=3 must divide the number of devices, 4",
            marks=pytest.mark.devices,
        ),
        (["--bn-group-size=2"], "--bn-group-size=2 must divide .*, 1"),
        (["--crop", "--image-size=8"], "--crop needs a set that is read with"),
        (["--model=unet", "--dataset=digits"], "is not a segmentation set"),
        (["--model=dcgan", "--image-size=12"], "makes square images of 8, 16, 32"),
    ],
)
def test_usage_errors(train: Train, tmp_path: Path, args: list[str], match: str):
    """Said in a line, before anything is written."""
    status, out, err = train(*args)
    assert (status, out) == (2, "")
    assert re.match(f"error: .*{match}", err)
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_usage_errors_in_a_new_process(data_dir: Path, tmp_path: Path):
    process = start("--accelerator=tpu", data_dir=data_dir, cwd=tmp_path)
    status, out, err = finish(process)
    assert (status, out) == (2, "")
    # (Some libtpu complains above that.)
    match = r"^error: --accelerator=tpu, but JAX found .*pip install"
    assert re.search(match, err, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def moments_of_first_layer(found: OpenRun, params: Any) -> tuple[Any, Any]:
    """Mean and variance of what the MLP's first norm sees of all the training data."""
    images = found.dataset.train.rows(np.arange(len(found.dataset.train)))["image"]
    dense = jax.tree.map(np.float64, params["Dense_0"])
    x = images.reshape(len(images), -1) / 255.0
    hidden = np.maximum(x @ dense["kernel"] + dense["bias"], 0)
    return hidden.mean(0), hidden.var(0)


@pytest.mark.slow
def test_the_average_is_evaluated(
    train: Train, tmp_path: Path, opened: Callable[..., OpenRun]
):
    """With statistics of its own, which are those of the data."""
    args = ("--ema-decay=0.95", "--epochs=2", "--workdir=run")
    assert train(*args)[0] == 0
    found = opened(tmp_path / "run")
    average, params = found.state.average["params"], found.state.params
    apart = jax.tree.map(lambda x, y: np.abs(x - y).max(), average, params)
    assert max(jax.tree.leaves(apart)) > 1e-3
    stats = found.state.average["batch_stats"]["BatchNorm_0"]
    mean, var = moments_of_first_layer(found, average)
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4, atol=1e-6)
    # Those that it is trained with are others, and go on as they were.
    trained = found.state.batch_stats["BatchNorm_0"]["mean"]
    assert np.abs(trained - mean).max() > 1e-4
    metrics = found.evaluate({"params": average, "batch_stats": stats_of(found)})
    line = history(tmp_path / "run")[-1]
    assert line["test_loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    assert line["test_accuracy"] == pytest.approx(metrics["accuracy"])


def stats_of(found: OpenRun) -> Any:
    return found.state.average["batch_stats"]


def test_bf16(
    train: Train,
    tmp_path: Path,
    unbroken: np.ndarray,
    opened: Callable[..., OpenRun],
):
    """It trains, as well as float32; parameters and statistics are float32."""
    assert train("--precision=bf16", "--epochs=2", "--workdir=run")[0] == 0
    found = losses(tmp_path / "run")
    np.testing.assert_allclose(found, unbroken[:2], rtol=0.1)
    assert np.abs(found / unbroken[:2] - 1).max() > 1e-5
    state = opened(tmp_path / "run").state
    for leaf in jax.tree.leaves((state.params, state.batch_stats, state.opt_state)):
        assert leaf.dtype in (np.float32, np.int32)


@pytest.mark.slow
def test_profile(train: Train, tmp_path: Path):
    args = ("--profile", "--epochs=1", "--steps-per-dispatch=8", "--workdir=run")
    assert train(*args)[0] == 0
    (trace,) = (tmp_path / "run" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.devices
def test_groups_of_devices(train: Train, tmp_path: Path, unbroken: np.ndarray):
    """Of four devices, each normalizes its own rows, or two do together."""

    def curve(name: str, *args: str) -> np.ndarray:
        args = ("--num-devices=4", "--epochs=1", *args)
        status, _, err = train(*args, f"--workdir={name}")
        assert status == 0, err
        return losses(tmp_path / name)[0]

    alone = curve("pmap1", "--bn-group-size=1")
    by_jit = curve("jit1", "--bn-group-size=1", "--parallel=jit")
    np.testing.assert_allclose(alone, by_jit, rtol=1e-4)
    pairs = curve("jit2", "--bn-group-size=2", "--parallel=jit")
    together = curve("jit4", "--bn-group-size=4", "--parallel=jit")
    np.testing.assert_allclose(together, unbroken[0], rtol=1e-5)
    different = [alone, pairs, together]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert np.abs(one / other - 1).max() > 1e-3
            np.testing.assert_allclose(one, other, rtol=0.3)


# ---- How long, how often -------------------------------------------------------------


def test_evaluations_and_checkpoints_by_steps(
    train: Train, tmp_path: Path, unbroken: np.ndarray
):
    """Training is the same whatever is looked at in between, resumed or not."""
    args = ("--steps=50", "--eval-every=20", "--log-every=0.0001", "--workdir=run")
    status, out, _ = train(*args, "--steps-per-dispatch=4")
    assert status == 0
    lines = history(tmp_path / "run")
    assert [line["step"] for line in lines] == [20, 40, 50]
    assert [line["epoch"] for line in lines] == [0.8696, 1.7391, 2.1739]
    assert "step 40/50  loss " in out
    assert "final test accuracy" in out
    # Steps since the last evaluation: their mean is that of whole epochs.
    progress = MetricsFile(tmp_path / "run" / "progress.jsonl").read()
    assert {"loss", "learning_rate", "examples_per_second", "seconds_left"} < set(
        progress[0]
    )
    assert [line["step"] for line in progress][:3] == [4, 8, 12]
    assert out.count(" left\n") == len(progress)

    assert train("--steps=46", "--workdir=other", "--save-every=7")[0] == 0
    assert [line["step"] for line in history(tmp_path / "other")] == [23, 46]
    np.testing.assert_array_equal(losses(tmp_path / "other"), unbroken[:2])


def test_by_minutes(train: Train, tmp_path: Path):
    """Each dispatch is later than a billionth of a minute."""
    every = "1e-9m"
    args = (f"--eval-every={every}", f"--save-every={every}", "--steps=12")
    assert train(*args, "--steps-per-dispatch=4", "--workdir=run")[0] == 0
    assert [line["step"] for line in history(tmp_path / "run")] == [4, 8, 12]


@pytest.mark.slow
def test_patience(train: Train, tmp_path: Path):
    """With a vanishing learning rate nothing becomes better, also when resumed."""
    args = ("--learning-rate=1e-30", "--momentum=1", "--patience=2", "--workdir=run")
    status, out, _ = train(*args)
    assert status == 0
    assert "stopped early: no better test accuracy in the last 2 evaluations" in out
    assert len(history(tmp_path / "run")) == 3
    status, out, _ = train("--resume", "--workdir=run")
    assert status == 0
    assert len(history(tmp_path / "run")) == 3


def test_what_a_run_was_started_with(readme: Any):
    *_, workdir = readme
    (start,) = MetricsFile(workdir / "starts.jsonl").read()
    assert start["step"] == 0
    assert start["jax"] == jax.__version__
    assert start["devices"] == "1 CPU"
    assert {"time", "command", "host", "python"} < set(start)


def test_weights_of_another_run(readme: Any, train: Train, tmp_path: Path, opened: Any):
    *_, workdir = readme
    args = ("--epochs=1", "--schedule=cosine", "--learning-rate=1e-9", "--momentum=1")
    args = (*args, "--warmup-epochs=3")
    status, out, err = train(*args, f"--init-from={workdir}", "--workdir=new")
    assert (status, err) == (0, "")
    note = "the warm-up of 3 epochs is longer than the run of 1, and is cut to 22 steps"
    assert out.count(f"note     {note}\n") == 1
    old, new = opened(workdir), opened(tmp_path / "new")
    for one, other in zip(
        *map(jax.tree.leaves, (old.variables, new.variables)), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)
    (line,) = history(tmp_path / "new")
    assert line["test_accuracy"] == history(workdir)[-1]["test_accuracy"]
    status, _, err = train(*args, "--init-from=nothing", "--workdir=other")
    assert status == 2
    assert "--init-from=nothing does not exist" in err


@pytest.mark.parametrize(
    ("args", "least"),
    [
        (["--batch-size=8", "--microbatches=8"], 16),
        (["--batch-size=9", "--norm=ghost", "--norm.num-groups=8"], 16),
    ],
)
def test_single_rows_for_a_batch_norm(
    train: Train, tmp_path: Path, args: list[str], least: int
):
    """Their normalized values are zero, whatever they are."""
    status, out, err = train(*args)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {args[0]} ")
    assert f"Use --batch-size={least} or more, or --norm.tau=8" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ["--batch-size=16", "--microbatches=8"],
        ["--batch-size=1", "--norm.tau=8"],
        ["--batch-size=1", "--norm.min-weight=1"],
        ["--batch-size=1", "--norm=renorm"],
        ["--batch-size=1", "--norm=layer"],
        ["--batch-size=1", "--model=resnet8"],
    ],
)
def test_single_rows_that_are_not_turned_into_constants(
    standard_promotion: None, data_dir: Path, args: list[str]
):
    """The running statistics come in, or there are several rows in an image."""
    config = parse_config([f"--data-dir={data_dir}", *args])
    assert setup.prepare(config).notes() == []


def test_a_batch_of_one_row_gets_a_note(standard_promotion: None, data_dir: Path):
    config = parse_config([f"--data-dir={data_dir}", "--batch-size=1"])
    (note,) = setup.prepare(config).notes()
    assert "the model cannot learn. Use --batch-size=2 or more" in note


# ---- Slow ----------------------------------------------------------------------------


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
