"""Several processes as one run, on this machine: the same curve, the same files."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jbn.training import hosts
from jbn.training.config import Config
from jbn.training.metrics import MetricsFile


SCRIPT = Path(__file__).parents[2] / "train.py"
SECONDS = 150  # Far more than any of these takes, on a busy machine too.


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of two epochs on four devices of one process, `one`."""
    home = tmp_path_factory.mktemp("hosts")
    run(home, "--epochs=2", "--workdir=one", "--num-devices=4")
    return home


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(home: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), f"--data-dir={home}/data", *args],
        cwd=home,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(home: Path, *args: str) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    several = ["--num-devices=2", f"--coordinator=127.0.0.1:{free_port()}"]
    several += ["--num-processes=2"]
    return [start(home, *args, *several, f"--process-id={i}") for i in range(2)]


def finish(
    processes: Sequence[subprocess.Popen[str]], seconds: float = SECONDS
) -> list[tuple[int, str, str]]:
    """The status, output and error output of each; none is left behind."""
    found: list[tuple[str, str]] = [("", "")] * len(processes)

    def read(i: int) -> None:
        found[i] = processes[i].communicate()

    # Together: one that waits for another must not wait for its pipe.
    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(processes))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.1, end - time.monotonic()))
    late = [i for i, process in enumerate(processes) if process.poll() is None]
    for process in processes:
        process.kill()
    for thread in threads:
        thread.join()
    assert not late, f"processes {late} did not end: {found}"
    return [
        (process.returncode, *texts)
        for process, texts in zip(processes, found, strict=True)
    ]


def run(home: Path, *args: str) -> str:
    ((status, out, err),) = finish([start(home, *args)])
    assert status == 0, out + err
    return out


def run_two(home: Path, *args: str) -> str:
    """What the first wrote. The other is silent."""
    (status, out, err), (other_status, other_out, other_err) = finish(
        start_two(home, *args)
    )
    assert (status, other_status) == (0, 0), out + err + other_out + other_err
    # (Gloo, which connects CPUs, says so in every process, by threads at once.)
    gloo = re.compile(r"\[Gloo\]|peer ranks|^[\s\d]*$")
    lines = [line for line in other_out.splitlines() if not gloo.search(line)]
    assert lines == []
    return out


def losses(workdir: Path) -> np.ndarray:
    """The training and the test loss of each epoch."""
    history = MetricsFile(workdir / "metrics.jsonl").read()
    return np.array([(m["train_loss"], m["test_loss"]) for m in history])


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, "ended too soon"
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- In this process -----------------------------------------------------------------


def test_alone():
    assert hosts.is_first()
    assert hosts.from_first("runs/one") == "runs/one"
    hosts.connect(Config())  # Nothing to join.
    assert hosts.end_at_once(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        hosts.end_at_once(lambda: 1 // 0)


def test_sigterm_is_noticed_once():
    """A second one ends the process as it would have before."""
    before = signal.getsignal(signal.SIGTERM)
    caught = []
    signal.signal(signal.SIGTERM, lambda *_: caught.append(None))
    ours = signal.getsignal(signal.SIGTERM)
    try:
        with hosts.Preemption() as preemption:
            assert not preemption.reached()
            assert signal.getsignal(signal.SIGTERM) is not ours
            signal.raise_signal(signal.SIGTERM)
            assert preemption.reached()
            assert preemption.reached()
            assert not caught
            signal.raise_signal(signal.SIGTERM)
            assert len(caught) == 1
        assert signal.getsignal(signal.SIGTERM) is ours
        with hosts.Preemption() as preemption:
            assert not preemption.reached()
        assert signal.getsignal(signal.SIGTERM) is ours
    finally:
        signal.signal(signal.SIGTERM, before)


def test_in_another_thread_nothing_is_caught():
    """Only the main thread may say what a signal does."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use() -> None:
        with hosts.Preemption() as preemption:
            seen.append((preemption.reached(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


# ---- In two processes ----------------------------------------------------------------


def both_ways(home: Path, parallel: str) -> None:
    way = f"--parallel={parallel}"
    two = f"two-{parallel}"
    out = run_two(home, "--epochs=2", f"--workdir={two}", way)
    assert f"4 CPU in 2 processes, by {parallel}" in out
    assert re.search(r"^final test accuracy: [\d.]+ % \(epoch 2\)$", out, re.MULTILINE)
    one = losses(home / "one")
    np.testing.assert_allclose(losses(home / two), one, rtol=1e-4)
    assert len(one) == 2
    for name in ("curves.png", "confusion.png", "events", "config.json"):
        assert (home / two / name).exists()

    # On, in one process; and on from there, in two again.
    out = run(home, "--epochs=3", f"--workdir={two}", "--resume", "--num-devices=4")
    assert "resuming after step 46" in out
    out = run_two(home, "--epochs=4", f"--workdir={two}", "--resume", way)
    assert "resuming after step 69" in out
    found = losses(home / two)
    assert len(found) == 4
    np.testing.assert_allclose(found[:2], one, rtol=1e-4)
    assert (np.diff(found[:, 0]) < 0).all()


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one(home: Path):
    """And what either has saved, the other goes on from."""
    both_ways(home, "pmap")


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_by_jit(home: Path):
    both_ways(home, "jit")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_is_killed(home: Path, victim: int):
    """The other ends by itself and says why; and the run can be resumed."""
    folder = home / f"killed-{victim}"
    args = ("--epochs=500", f"--workdir={folder.name}", "--save-every=23")
    processes = start_two(home, *args, "--peer-timeout=10", "--steps-per-dispatch=1")
    try:
        wait_for(folder / "checkpoints" / "23", processes[0])
        processes[victim].kill()
        ended = finish(processes, 60)
    finally:
        for process in processes:
            process.kill()
    assert ended[victim][0] == -signal.SIGKILL
    status, _, err = ended[1 - victim]
    assert status != 0
    assert re.fullmatch(r"error: process \d of 2 ends: .*\n", err)
    assert "ended" in err
    done = len(losses(folder))
    # (A run keeps its flags, and on a busy machine 10 s are short to start in.)
    more = (f"--epochs={done + 1}", "--peer-timeout=100")
    out = run_two(home, *more, args[1], "--resume")
    assert "resuming after step " in out
    found = losses(folder)
    assert len(found) == done + 1
    np.testing.assert_allclose(found[:2], losses(home / "one")[: done + 1], rtol=1e-4)


@pytest.mark.slow
def test_sigterm_to_one_ends_both(home: Path):
    """At the same step, which is saved; the rest is then as if unbroken."""
    args = ("--epochs=500", "--workdir=ended", "--steps-per-dispatch=5")
    processes = start_two(home, *args)
    try:
        wait_for(home / "ended" / "metrics.jsonl", processes[0])
        processes[1].send_signal(signal.SIGTERM)
        (status, out, err), (other, _, other_err) = finish(processes)
    finally:
        for process in processes:
            process.kill()
    assert (status, other) == (75, 75), err + other_err
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", out)[1])  # type: ignore
    epochs = step // 23 + 2
    out = run_two(home, f"--epochs={epochs}", args[1], "--resume")
    assert f"resuming after step {step}, " in out
    found = losses(home / "ended")
    assert len(found) == epochs
    np.testing.assert_allclose(found[:2], losses(home / "one"), rtol=1e-4)


def joined(home: Path, *args: str, limit: int = 8) -> list[tuple[int, str, str]]:
    """What became of processes that were started together."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    always = (address, "--workdir=nothing", f"--peer-timeout={limit}")
    found = finish([start(home, *always, *arg.split()) for arg in args], 100)
    assert not (home / "nothing").exists()
    return found


def test_flags_that_differ_end_both_at_once(home: Path):
    both = "--num-processes=2 --epochs=1"
    found = joined(
        home,
        f"{both} --process-id=0 --batch-size=64",
        f"{both} --process-id=1 --batch-size=32",
        limit=60,
    )
    for status, out, err in found:
        assert (status, out) == (2, "")
        assert err == (
            "error: Process 1 was started with --batch-size=32, process 0 with 64. "
            "Start all processes with the same flags.\n"
        )


@pytest.mark.slow
def test_process_0_is_not_there(home: Path):
    ((status, out, err),) = joined(home, "--num-processes=2 --process-id=1")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: .*process 0 was not found there within 8 s.*\n", err)


@pytest.mark.slow
def test_the_others_are_not_there(home: Path):
    ((status, out, err),) = joined(home, "--num-processes=2 --process-id=0")
    assert status != 0
    assert out == ""
    assert re.fullmatch(
        r"error: process 0 of 2 ends: not all processes have started within 8 s.*\n",
        err,
    )


def test_a_port_in_use(home: Path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        args = ("--num-processes=2", "--process-id=0", "--workdir=nothing")
        process = start(home, f"--coordinator=127.0.0.1:{port}", *args)
        ((status, out, err),) = finish([process])
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: .*port {port} is in use on this machine.*\n", err)


@pytest.mark.slow
def test_an_id_twice(home: Path):
    """All end; and one at least says which."""
    found = joined(
        home,
        "--num-processes=3 --process-id=0",
        "--num-processes=3 --process-id=1",
        "--num-processes=3 --process-id=1",
    )
    for status, out, err in found:
        assert status != 0
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("error: ")
