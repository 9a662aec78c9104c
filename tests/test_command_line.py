"""Runs `python -m jbn` as a user would, on short runs of `train.py`."""

import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np
import pytest
from caches import compilation_cache
from peers import load_peer

from jbn.models import torchvision_name
from jbn.training import cli
from jbn.training.build import make_task, open_dataset
from jbn.training.checkpoint import Checkpoints
from jbn.training.commands import COMMANDS
from jbn.training.config import claim_workdir, parse_config
from jbn.training.metrics import MetricsFile
from jbn.training.run import open_run
from jbn.training.step import create_state


ROOT = Path(__file__).parents[1]
STEPS = 23  # In an epoch of the digits, in batches of 64.


def python(*args: object, cwd: Path, rc: int = 0) -> tuple[str, str]:
    """What a new process wrote to its output and to its error output."""
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True
    )
    assert done.returncode == rc, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands in this process compile each program once."""
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three epochs, `run`, whose statistics trail behind."""
    home = tmp_path_factory.mktemp("home")
    # (Not relative: tests open the run from where they are.)
    options = ["--epochs=3", "--momentum=0.99", "--seed=3", f"--data-dir={home}/data"]
    with (
        pytest.MonkeyPatch.context() as here,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        here.chdir(home)
        assert cli.main(["train", *options, "--workdir=run"]) == 0
    # (Not trained, nor initialized: that takes long.)
    untrained(home, "gan", "--model=dcgan", "--image-size=8")
    untrained(home, "resnet", "--model=resnet8", "--ema-decay=0.9")
    return home


def untrained(home: Path, name: str, *flags: str) -> None:
    """A run with random numbers for variables, as if after the first epoch."""
    config = parse_config(
        [*flags, f"--data-dir={home}/data", f"--workdir={home / name}"]
    )
    dataset = open_dataset(config)
    task = make_task(config, dataset, steps_per_epoch=STEPS)
    averaged = config.ema_decay is not None
    rng = np.random.default_rng(0)
    state: Any = jax.tree.map(
        lambda x: rng.uniform(0.1, 1, x.shape).astype(x.dtype),
        jax.eval_shape(lambda: create_state(task, 0, averaged=averaged)),
    )
    state = dataclasses.replace(state, step=np.int32(STEPS))
    metric = task.metric
    claim_workdir(config)
    line = {"epoch": 1, "step": STEPS, f"test_{metric.name}": 0.125}
    MetricsFile(home / name / "metrics.jsonl").append(line)
    folder, better = home / name / "checkpoints", metric.higher_is_better
    with Checkpoints(folder, higher_is_better=better) as checkpoints:
        checkpoints.save(state, metric=0.125)


@pytest.fixture
def command(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    standard_promotion: None,
    untyped: None,
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line here, which is quicker; strict promotion is not Optax's."""
    monkeypatch.chdir(home)

    def run(*args: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()  # pyright: ignore[reportReturnType]

    return run


def contents(folder: Path) -> dict[str, str]:
    """Everything below a folder, with a fingerprint of it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in folder.rglob("*")
    }


def everything(split: Any) -> dict[str, np.ndarray]:
    return split.rows(np.arange(len(split)))


def accuracies(out: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) %", out)]


def test_inspect(home: Path, tmp_path: Path):
    before = contents(home)
    files = f"--figure={tmp_path}/layers.png", f"--json={tmp_path}/layers.json"
    args = ("-m", "jbn", "inspect", "run", *files, "--strict")
    out, err = python(*args, cwd=home, rc=1)
    assert err == ""
    assert out.startswith("run, after step 69 (epoch 3), on 23 batches\n")
    for layer in ("BatchNorm_0", "BatchNorm_1"):
        assert re.search(rf"^warning +{layer} +cold$", out, re.MULTILINE)
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    values = json.loads((tmp_path / "layers.json").read_text())
    assert [layer["layer"] for layer in values["layers"]] == [
        "BatchNorm_0",
        "BatchNorm_1",
    ]
    # 23 steps an epoch, found again in what is left of the initial values.
    for layer in values["layers"]:
        assert layer["updates"] == pytest.approx(69, abs=5)
        assert layer["rows"] == pytest.approx(1437 / 23)
    assert contents(home) == before


def test_recalibrate(home: Path, command: Any, tmp_path: Path):
    """The new run is healthy, better, and can be resumed; the old one is as it was."""
    before = contents(home)
    new = tmp_path / "new"
    status, out, err = command("recalibrate", "run", "--out", new, "--checkpoint=last")
    assert (status, err) == (0, "")
    old_accuracy, new_accuracy = accuracies(out)
    assert new_accuracy > old_accuracy + 5
    assert contents(home) == before

    history = MetricsFile(home / "run" / "metrics.jsonl").read()
    assert f"{100 * history[-1]['test_accuracy']:.2f}" == f"{old_accuracy:.2f}"
    changed: list[Any] = MetricsFile(new / "metrics.jsonl").read()
    assert changed[:-1] == history[:-1]
    assert f"{100 * changed[-1]['test_accuracy']:.2f}" == f"{new_accuracy:.2f}"
    configs = [
        json.loads((folder / "config.json").read_text())
        for folder in (home / "run", new)
    ]
    assert configs[1].pop("workdir") == str(new)
    assert configs[0].pop("workdir") == "run"
    assert configs[0] == configs[1]

    status, out, _ = command("inspect", new, "--strict")
    assert status == 0
    assert "warning" not in out
    recalibrated_statistics_are_those_of_the_data(home / "run", new)

    options = (f"--workdir={new}", "--resume", "--epochs=4")
    status, out, _ = command("train", *options)
    assert status == 0
    assert "resuming after step 69, in epoch 3" in out
    with Checkpoints(new / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.last_step == 92


def recalibrated_statistics_are_those_of_the_data(run: Path, changed: Path) -> None:
    old, new = open_run(run), open_run(changed)
    params: Any = new.state.params
    x = everything(old.dataset.train)["image"].reshape(len(old.dataset.train), -1) / 255
    dense = {k: np.asarray(v, np.float64) for k, v in params["Dense_0"].items()}
    hidden = np.maximum(x @ dense["kernel"] + dense["bias"], 0)
    stats = new.state.batch_stats["BatchNorm_0"]
    np.testing.assert_allclose(stats["mean"], hidden.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], hidden.var(0), rtol=1e-4, atol=1e-6)
    kernel = params["Dense_1"]["kernel"]
    np.testing.assert_array_equal(old.state.params["Dense_1"]["kernel"], kernel)
    assert new.state.step == old.state.step == 69
    np.testing.assert_array_equal(
        old.state.opt_state[0].mu["Dense_1"]["kernel"],
        new.state.opt_state[0].mu["Dense_1"]["kernel"],
    )


def test_inspect_options(command: Any):
    status, out, _ = command("inspect", "run", "--batches=5", "--checkpoint=best")
    assert status == 0
    assert "on 5 batches" in out
    status, out, _ = command("inspect", "run/checkpoints/69", "--split=test")
    assert status == 0
    assert out.startswith("run, after step 69 (epoch 3), on 6 batches\n")


@pytest.mark.parametrize("suffix", [".npz", ".msgpack"])
def test_fold(home: Path, command: Any, tmp_path: Path, suffix: str):
    before = contents(home)
    path = tmp_path / f"folded{suffix}"
    status, out, err = command("fold", "run", "--out", path)
    assert (status, err) == (0, "")
    assert "BatchNorm_0 folded into Dense_1\n" in out
    assert "BatchNorm_1 folded into Dense_2\n" in out
    one, two = accuracies(out)
    assert one == two
    assert contents(home) == before

    if suffix == ".npz":
        with np.load(path) as arrays:
            flat = dict(arrays)
    else:
        tree: Any = flax.serialization.msgpack_restore(path.read_bytes())
        assert set(tree) == {"params"}
        flat = {
            f"params/{layer}/{name}": value
            for layer, node in tree["params"].items()
            for name, value in node.items()
        }
    assert set(flat) == {
        f"params/Dense_{k}/{name}" for k in range(3) for name in ("kernel", "bias")
    }
    test = open_run(home / "run").dataset.test
    examples = everything(test)
    x = examples["image"].reshape(len(test), -1) / 255
    for k in range(3):
        x = x @ flat[f"params/Dense_{k}/kernel"] + flat[f"params/Dense_{k}/bias"]
        x = np.maximum(x, 0) if k < 2 else x
    right = (x.argmax(-1) == examples["label"]).mean()
    assert 100 * right == pytest.approx(two, abs=0.3)


def torch_state(home: Path) -> dict[str, np.ndarray]:
    """The recalibrated run, as a `torch.nn.Sequential` would have it."""
    opened = open_run(home / "run")
    state = {}
    for k in range(3):
        node = opened.state.params[f"Dense_{k}"]
        state[f"{3 * k}.weight"] = np.asarray(node["kernel"]).T
        state[f"{3 * k}.bias"] = np.asarray(node["bias"])
    for k in range(2):
        node = opened.state.params[f"BatchNorm_{k}"]
        stats = opened.state.batch_stats[f"BatchNorm_{k}"]
        state[f"{3 * k + 2}.weight"] = np.asarray(node["scale"])
        state[f"{3 * k + 2}.bias"] = np.asarray(node["bias"])
        state[f"{3 * k + 2}.running_mean"] = np.asarray(stats["mean"])
        state[f"{3 * k + 2}.running_var"] = np.asarray(stats["var"])
        state[f"{3 * k + 2}.num_batches_tracked"] = np.asarray(69)
    return state


NAMES = ["Dense_0=0", "BatchNorm_0=2", "Dense_1=3", "BatchNorm_1=5", "Dense_2=6"]


@pytest.mark.parametrize(
    "kind", ["npz", pytest.param("pt", marks=pytest.mark.peers("torch"))]
)
def test_port(home: Path, command: Any, tmp_path: Path, kind: str):
    state = torch_state(home)
    if kind == "npz":
        np.savez(tmp_path / "theirs.npz", allow_pickle=False, **state)
    else:
        torch = load_peer("torch")
        tensors = {name: torch.tensor(value) for name, value in state.items()}
        torch.save(tensors, tmp_path / "theirs.pt")
    before = contents(home)
    new = tmp_path / "new"
    status, out, err = command(
        *("port", tmp_path / f"theirs.{kind}", "--to", "run", "--out", new),
        *("--names", *NAMES),
    )
    assert (status, err) == (0, "")
    assert contents(home) == before
    history = MetricsFile(home / "run" / "metrics.jsonl").read()
    assert accuracies(out)[0] == pytest.approx(
        100 * history[-1]["test_accuracy"], abs=0.01
    )
    old, opened = open_run(home / "run"), open_run(new)
    for layer in ("Dense_1", "BatchNorm_1"):
        for name, value in old.state.params[layer].items():
            np.testing.assert_array_equal(opened.state.params[layer][name], value)
    assert opened.state.opt_state[0].count == 0


def torchvision_state(home: Path) -> tuple[dict[str, np.ndarray], Any]:
    """A state dict in torchvision's layout, and what it is of: running means of 1."""
    variables: Any = jax.tree.map(np.asarray, open_run(home / "resnet").variables)
    variables["batch_stats"] = jax.tree.map(
        lambda x: np.asarray(x + 1), variables["batch_stats"]
    )
    words = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    words |= {"mean": "running_mean", "var": "running_var"}
    state = {}
    for path, value in jax.tree_util.tree_leaves_with_path(variables):
        _, *layers, name = (key.key for key in path)
        if name == "kernel":
            value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
        state[f"{torchvision_name('/'.join(layers))}.{words[name]}"] = value
    return state, variables


def test_port_of_torchvision(
    home: Path, command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its names need no telling; the run's average is what is filled."""
    state, variables = torchvision_state(home)
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "fc.bias"} < set(state)
    # (What the network finds takes long, and is not the question.)
    metrics = {"loss": 1.0, "accuracy": 0.5}
    monkeypatch.setattr("jbn.training.run.OpenRun.evaluate", lambda *args: metrics)
    np.savez(tmp_path / "theirs.npz", allow_pickle=False, **state)
    args = ("port", tmp_path / "theirs.npz", "--to", "resnet")
    status, out, err = command(*args, "--out", tmp_path / "new")
    assert (status, err) == (0, "")
    assert "test accuracy: 50.00 %\n" in out
    new = open_run(tmp_path / "new").state
    for found in (new.average, {"params": new.params, "batch_stats": new.batch_stats}):
        jax.tree.map(np.testing.assert_array_equal, found, variables)

    # A head of other classes, which is said, or is left out.
    state["fc.weight"], state["fc.bias"] = np.zeros((7, 64)), np.zeros(7)
    np.savez(tmp_path / "theirs.npz", allow_pickle=False, **state)
    status, out, err = command(*args, "--out", tmp_path / "other")
    assert (status, out) == (2, "")
    assert re.fullmatch(r"error: .*'fc.weight' has \(7, 64\).*\n", err)
    assert not (tmp_path / "other").exists()
    assert command(*args, "--out", tmp_path / "other", "--skip", "head/*")[0] == 0
    found = open_run(tmp_path / "other").variables
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_recalibrate_of_a_gan(command: Any, tmp_path: Path):
    """Its metric is no percentage."""
    status, out, err = command(
        "recalibrate", "gan", "--out", tmp_path / "new", "--batches=2"
    )
    assert (status, err) == (0, "")
    assert re.match(r"test Fréchet distance: [\d.]+, recalibrated: [\d.]+\n", out)
    old, new = open_run(Path("gan")), open_run(tmp_path / "new")
    stats: Any = old.state.batch_stats, new.state.batch_stats
    for name, changes in (("generator", True), ("discriminator", False)):
        for one, other in zip(*(jax.tree.leaves(s[name]) for s in stats), strict=True):
            assert np.array_equal(one, other) is not changes
    jax.tree.map(np.testing.assert_array_equal, old.state.params, new.state.params)


def test_recalibrate_of_an_average_and_in_the_middle_of_an_epoch(
    home: Path, command: Any, tmp_path: Path
):
    """The average is what is recalibrated, and sums over the epoch are kept."""
    broken(home, "middle", rewritten(ema_decay=0.5))
    shutil.rmtree(home / "middle" / "checkpoints")
    opened = open_run(home / "run")
    sums = {"loss": 3.5, "correct": 2.0, "weight": 64.0, "num_skipped": 0}
    average = jax.tree.map(lambda x: x / 2, opened.variables)
    state = dataclasses.replace(opened.state, step=np.int32(24), average=average)
    with Checkpoints(home / "middle" / "checkpoints") as checkpoints:
        checkpoints.save(state, progress=sums)
    status, _, err = command("recalibrate", "middle", "--out", tmp_path / "new")
    assert (status, err) == (0, "")
    new = open_run(tmp_path / "new")
    assert (new.step, new.progress) == (24, sums)
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, new.state.params, state.params)
    jax.tree.map(equal, new.state.batch_stats, state.batch_stats)
    jax.tree.map(equal, new.state.average["params"], average["params"])
    # Of the first layer's halved weights and biases, half of what it was.
    train = opened.dataset.train
    x = everything(train)["image"].reshape(len(train), -1) / 255
    dense = average["params"]["Dense_0"]
    hidden = np.maximum(x @ dense["kernel"] + dense["bias"], 0)
    found = new.state.average["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(found["mean"], hidden.mean(0), rtol=1e-4, atol=1e-6)
    # Never the best: as in training, there is no metric in the middle.
    with Checkpoints(tmp_path / "new" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best_step in (None, 24)
    lines = MetricsFile(tmp_path / "new" / "metrics.jsonl").read()
    assert [line["epoch"] for line in lines] == [1]


def test_without_what_it_needs(command: Any, monkeypatch: pytest.MonkeyPatch):
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "tyro", None)
    status, out, err = command("eval")
    assert (status, out) == (2, "")
    assert err == 'error: jbn eval needs tyro: pip install "jbn[train]"\n'


# ---- What cannot be done -------------------------------------------------------------


def broken(home: Path, name: str, spoil: Callable[[Path], Any]) -> None:
    """A copy of the run, with something wrong."""
    if not (home / name).exists():
        shutil.copytree(home / "run", home / name)
        spoil(home / name)


def rewritten(**new: Any) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | new))

    return spoil


def other_model(change: Callable[[dict], Any]) -> Callable[[Path], Any]:
    """Puts a checkpoint of another model in place of the run's."""

    def spoil(folder: Path) -> None:
        opened = open_run(folder)
        shutil.rmtree(folder / "checkpoints")
        parts = {
            name: {layer: dict(node) for layer, node in part.items()}
            for name, part in opened.variables.items()
        }
        change(parts)
        with Checkpoints(folder / "checkpoints") as checkpoints:
            checkpoints.save(dataclasses.replace(opened.state, **parts), metric=0.5)

    return spoil


def wider(parts: dict) -> None:
    parts["batch_stats"]["BatchNorm_1"]["var"] = np.ones(65, np.float32)


SPOILED = {
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "json": lambda folder: (folder / "config.json").write_text("{"),
    "strange": lambda folder: (folder / "config.json").write_text('{"lr": 1}'),
    "list": lambda folder: (folder / "config.json").write_text("[]"),
    "range": rewritten(epochs=0),
    "nonesuch": rewritten(dataset="nonesuch"),
    "model": rewritten(model="nonesuch"),
    "unsaved": lambda folder: shutil.rmtree(folder / "checkpoints"),
    "cut": lambda folder: [
        shutil.rmtree(folder / "checkpoints" / "69" / "state" / "d"),
        shutil.rmtree(folder / "checkpoints" / "69" / "state" / "ocdbt.process_0"),
    ],
    "less": other_model(lambda parts: parts["batch_stats"].pop("BatchNorm_1")),
    "more": other_model(
        lambda parts: parts["params"].update(Dense_7=parts["params"]["Dense_1"])
    ),
    "wider": other_model(wider),
}


@pytest.fixture
def spoiled(home: Path, standard_promotion: None) -> None:
    for name, spoil in SPOILED.items():
        broken(home, name, spoil)
    np.savez(home / "some.npz", allow_pickle=False, weight=np.ones(3))
    (home / "text.pt").write_text("no tensors")
    (home / "text.npz").write_text("no arrays")


BAD = [
    ("inspect nowhere", "nowhere is not a folder"),
    ("inspect empty", "empty is not a run: it has no config.json"),
    ("inspect json", r"json/config\.json is not the configuration of a run"),
    ("inspect strange", r"strange/config\.json is not the configuration of a run"),
    ("inspect list", r"list/config\.json is not the configuration of a run"),
    ("inspect range", "--epochs=0 is out of range"),
    ("inspect nonesuch", "has no images"),
    ("inspect model", "--model=nonesuch is not known"),
    ("inspect unsaved", "unsaved has no checkpoints yet"),
    ("inspect less", "is of another model: it has no batch_stats/BatchNorm_1/mean"),
    ("inspect more", "is of another model: it has params/Dense_7/bias, which"),
    (
        "inspect wider",
        r"BatchNorm_1/var has shape \(65,\), and that of the run's config.json \(64,\)",
    ),
    ("inspect run --checkpoint=2", "has no checkpoint 2: there are steps 69"),
    ("inspect run --checkpoint=worst", "must be last, best or a number of steps"),
    ("inspect run --batches=0", "--batches=0 is out of range: at least 1"),
    ("inspect run --figure=a.xyz", "must end in one of"),
    ("inspect run --figure=run", "run already exists, and is not overwritten"),
    ("inspect run --json=run/config.json", "run/config.json already exists"),
    ("inspect gan", "gan has --model=dcgan, which is two networks; this is for one"),
    ("fold gan --out new.npz", "gan has --model=dcgan, which is two networks"),
    ("port some.npz --to gan --out new", "gan has --model=dcgan, which is two net"),
    ("inspect run/checkpoints/70", "run has no checkpoint 70: there are steps 69"),
    ("inspect run --figure=no/a.png", "cannot be written: there is no folder"),
    ("inspect run --json=no/a.json", "cannot be written: there is no folder"),
    ("recalibrate empty --out new", "empty is not a run"),
    ("recalibrate wider --out new", "is of another model"),
    ("recalibrate run --out run", "run already exists, and is not overwritten"),
    ("recalibrate run --out no/new", "cannot be written: there is no folder"),
    ("recalibrate run --out new --batches=-1", "--batches=-1 is out of range"),
    ("fold less --out new.npz", "is of another model"),
    ("fold run --out some.npz", "some.npz already exists"),
    ("fold run --out new.txt", "must end in .npz or .msgpack"),
    ("port nothing.npz --to run --out new", "nothing.npz is not a file"),
    ("port text.npz --to run --out new", "text.npz is not an .npz"),
    (
        "port some.npz --to run --out new",
        "some.npz does not fit run: .*'BatchNorm_0.bias'",
    ),
    ("port some.npz --to run --out run", "run already exists"),
    ("port some.npz --to empty --out new", "empty is not a run"),
    ("port some.npz --to run --out new --names=Dense_0", "must be OURS=THEIRS each"),
]


def test_bad_input_is_one_line_and_changes_nothing(
    home: Path, command: Any, spoiled: None
):
    for line, match in BAD:
        assert_refused(home, command, line, match)


def assert_refused(home: Path, command: Any, line: str, match: str) -> None:
    before = contents(home)
    status, out, err = command(*line.split())
    assert (status, out) == (2, ""), line
    assert re.fullmatch(rf"error: .*{match}.*\n", err), (line, err)
    assert contents(home) == before, line


@pytest.mark.peers("torch")
def test_a_file_that_pytorch_cannot_read(home: Path, command: Any, spoiled: None):
    line = "port text.pt --to run --out new"
    assert_refused(home, command, line, "text.pt is not a state dict that torch.save")


def test_a_file_of_pytorch_without_pytorch(
    home: Path, command: Any, spoiled: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    line = "port text.pt --to run --out new"
    assert_refused(home, command, line, "text.pt needs PyTorch, .*pip install torch")


def test_bad_input_in_a_process_of_its_own(home: Path, spoiled: None):
    """Orbax leaves threads behind that complain when they are collected."""
    before = contents(home)
    args = ("-m", "jbn", "recalibrate", "cut", "--out", "new")
    out, err = python(*args, cwd=home, rc=2)
    assert out == ""
    assert re.fullmatch("error: .*cut/checkpoints/69 cannot be read.*\n", err)
    assert contents(home) == before


def test_reads_that_are_left_behind_do_not_complain(tmp_path: Path):
    """Which Orbax leaves now and then."""
    script = """
import asyncio, sys
from jbn.__main__ import quiet_reads

async def read():
    raise ValueError("not found")

async def main():
    asyncio.ensure_future(read())
    await asyncio.sleep(0)

asyncio.run(main())
print("and now", file=sys.stderr)
quiet_reads()
asyncio.run(main())
"""
    _, err = python("-c", script, cwd=tmp_path)
    loud, quiet = err.split("and now\n")
    assert "not found" in loud
    assert quiet == ""


# ---- Help ----------------------------------------------------------------------------


def test_help(command: Any, tmp_path: Path):
    """Lists all commands, with a sentence each."""
    status, alone, _ = command("--help")
    assert status == 0
    out, err = python(ROOT / "train.py", "--help", cwd=tmp_path)
    assert err == ""
    for name, sentence in cli.COMMANDS.items():
        for text in (alone, out):
            assert re.search(rf"^  {name} +{re.escape(sentence)}$", text, re.MULTILINE)
    # Without a command, train.py trains.
    assert "--learning-rate" in out
    assert "--learning-rate" not in alone


def test_a_command_that_is_not_there(command: Any):
    status, out, err = command("inspct", "run")
    assert (status, out) == (2, "")
    assert err.startswith("error: There is no command inspct. Did you mean inspect? ")
    status, out, _ = command()
    assert status == 2
    assert out.startswith("usage: jbn COMMAND")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command(command: Any, name: str):
    status, out, _ = command(name, "--help")
    assert status == 0
    for metavar in ("RUN", "FILE") if name == "port" else ("RUN",):
        assert metavar in out
    # Docstrings all of it: what is not explained has no text.
    options = re.findall(r"^[│ ]? ?(--[\w-]+|RUN|FILE) ", out, re.MULTILINE)
    assert len(options) >= 2
    assert "None" not in out


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose configuration names a class beside it, of a module that fails."""
    (tmp_path / "trap.py").write_text("raise RuntimeError('the trap has run')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    flags = ["--model=trap:Net", f"--data-dir={tmp_path}", f"--workdir={tmp_path}/run"]
    claim_workdir(parse_config(flags))
    (tmp_path / "run" / "checkpoints").mkdir()
    np.savez(tmp_path / "weights.npz", x=np.zeros(1))
    return tmp_path


@pytest.mark.parametrize(
    "args",
    [
        ("eval", "run"),
        ("predict", "run", "image.png"),
        ("inspect", "run"),
        ("recalibrate", "run", "--out=new"),
        ("fold", "run", "--out=new.npz"),
        ("port", "weights.npz", "--to=run", "--out=new"),
        ("train", "--resume", "--workdir=run"),
        ("train", "--config=run/config.json", "--workdir=new"),
    ],
    ids=" ".join,
)
def test_a_class_that_only_a_file_names_is_not_imported(
    command: Callable[..., tuple[int, str, str]],
    stranger: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
):
    monkeypatch.chdir(stranger)
    before = contents(stranger)
    status, out, err = command(*args)
    assert (status, out) == (2, "")
    assert err == (
        "error: run/config.json names a class outside jbn, and importing trap runs "
        "its code. If you trust it, add --model=trap:Net.\n"
    )
    assert contents(stranger) == before
    # With the flag that the message names, it is.
    status, _, err = command(*args, "--model=trap:Net")
    assert status == 2
    assert "trap cannot be imported (RuntimeError: the trap has run)" in err
    # And another class does not import it.
    status, _, err = command(*args, "--model=other:Net")
    assert status == 2
    assert "other" in err
    assert "the trap has run" not in err
