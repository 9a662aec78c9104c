"""`python train.py eval` and `predict`, on runs of their own."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.special
from caches import compilation_cache
from PIL import Image

from jbn.training.build import make_task, open_dataset
from jbn.training.checkpoint import Checkpoints
from jbn.training.config import claim_workdir, parse_config
from jbn.training.metrics import MetricsFile
from jbn.training.run import OpenRun, open_run
from jbn.training.step import create_state


def main(args: Sequence[object]) -> tuple[int, str, str]:
    """Runs `train.py` in this process: exit status, output, error output."""
    path = Path(__file__).parents[2] / "train.py"
    spec: Any = importlib.util.spec_from_file_location("train_py", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    # (Strict promotion is not Optax's.)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.numpy_rank_promotion("allow"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            status: Any = module.main([str(arg) for arg in args])
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs in this process compile each program once."""
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with trained runs, `mlp` and `ema`, and untrained ones of any model."""
    home = tmp_path_factory.mktemp("home")
    data = f"--data-dir={home}/data"
    flags = ["--epochs=1", "--learning-rate=0.01", data]
    assert main([*flags, f"--workdir={home / 'mlp'}"])[0] == 0
    add_a_worse_epoch(home / "mlp")
    flags = ["--epochs=1", "--ema-decay=.9", data]
    assert main([*flags, f"--workdir={home / 'ema'}"])[0] == 0
    untrained("gan", home, "--model=dcgan", "--image-size=8")
    untrained("unet", home, "--model=unet", "--image-size=8")
    return home


def add_a_worse_epoch(folder: Path) -> None:
    """As if training had spoiled the last layer, so that the best is not the last."""
    run = opened(folder)
    rng = np.random.default_rng(0)
    kernel = run.state.params["Dense_2"]["kernel"]
    noise = rng.normal(0, 0.3, kernel.shape).astype(np.float32)
    layer = {**run.state.params["Dense_2"], "kernel": kernel + noise}
    params = {**run.state.params, "Dense_2": layer}
    state = dataclasses.replace(run.state, step=np.int32(46), params=params)
    with jax.numpy_dtype_promotion("standard"):
        found = run.evaluate(state.variables)
    file = MetricsFile(folder / "metrics.jsonl")
    (line,) = file.read()
    assert found["accuracy"] < line["test_accuracy"] - 0.05
    test = {f"test_{name}": value for name, value in found.items()}
    file.append({**line, "epoch": 2, "step": 46, **test})
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state, metric=found["accuracy"])


def untrained(name: str, home: Path, *flags: str) -> None:
    """A run with random numbers for variables, as if after the first epoch."""
    config = parse_config(
        [*flags, f"--data-dir={home}/data", f"--workdir={home / name}"]
    )
    dataset = open_dataset(config)
    task = make_task(config, dataset)
    rng = np.random.default_rng(0)

    def number(path: Any, x: Any) -> np.ndarray:
        # Neither all logits alike, nor all of one class.
        positive = path[-1].key in ("var", "scale")
        value = rng.uniform(0.5, 1.5, x.shape) if positive else rng.normal(size=x.shape)
        return value.astype(x.dtype)

    shapes = jax.eval_shape(lambda: create_state(task, 0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    parts = {
        part: jax.tree_util.tree_map_with_path(number, getattr(shapes, part))
        for part in ("params", "batch_stats")
    }
    state = dataclasses.replace(zeros, step=np.int32(1), **parts)
    claim_workdir(config)
    with Checkpoints(home / name / "checkpoints") as checkpoints:
        checkpoints.save(state, metric=0.5)


@pytest.fixture
def standing(home: Path, monkeypatch: pytest.MonkeyPatch, untyped: None) -> Path:
    """In the folder of the runs, and without type checks, as users are."""
    monkeypatch.chdir(home)
    return home


def opened(path: Path) -> OpenRun:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return open_run(path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- eval ----------------------------------------------------------------------------


def test_eval_is_what_the_run_says(standing: Path):
    """To the last bit, for each checkpoint that is kept, however it is named."""
    history = MetricsFile(standing / "mlp" / "metrics.jsonl").read()
    expected = {
        line["step"]: {
            name.removeprefix("test_"): value
            for name, value in line.items()
            if name.startswith("test_")
        }
        for line in history
    }
    best = 23  # After the first epoch: see `home`.
    before = files(standing)
    for args, step in {
        ("mlp",): 46,
        ("mlp", "--checkpoint=best"): best,
        (f"mlp/checkpoints/{best}",): best,
        ("mlp/checkpoints/46",): 46,
    }.items():
        status, out, err = main(["eval", *args])
        assert (status, err) == (0, "")
        assert json.loads(out) == {"step": step, **expected[step]}
    assert files(standing) == before


def test_eval_of_an_average(standing: Path):
    """Not of the parameters that were averaged."""
    (line,) = MetricsFile(standing / "ema" / "metrics.jsonl").read()
    status, out, err = main(["eval", "ema"])
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["loss"] == line["test_loss"]
    assert found["accuracy"] == line["test_accuracy"]
    run = opened(Path("ema"))
    x = run.dataset.test.rows(np.arange(360))
    logits: Any = mlp(run.state.average, x["image"])
    log_p = scipy.special.log_softmax(logits, -1)
    loss = -log_p[np.arange(360), x["label"]].mean()
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    last = {"params": run.state.params, "batch_stats": run.state.batch_stats}
    assert np.abs(mlp(last, x["image"]) - logits).max() > 0.1


def mlp(variables: Any, images: np.ndarray) -> np.ndarray:
    """The logits, in NumPy and float64."""
    params, stats = variables["params"], variables["batch_stats"]
    y = images.reshape(len(images), -1) / 255.0
    for k in range(3):
        dense = {n: np.asarray(v, np.float64) for n, v in params[f"Dense_{k}"].items()}
        y = y @ dense["kernel"] + dense["bias"]
        if k < 2:
            norm, stat = params[f"BatchNorm_{k}"], stats[f"BatchNorm_{k}"]
            root = np.sqrt(np.asarray(stat["var"], np.float64) + 1e-5)
            y = (np.maximum(y, 0) - stat["mean"]) / root * norm["scale"] + norm["bias"]
    return y


@pytest.mark.parametrize(
    ("name", "metric", "picture"),
    [
        ("mlp", "accuracy", "confusion"),
        ("unet", "miou", "overlays"),
        ("gan", "frechet", "samples"),
    ],
)
@pytest.mark.slow
def test_eval_of_each_task_with_pictures(
    standing: Path, tmp_path: Path, name: str, metric: str, picture: str
):
    """The output is JSON alone."""
    folder = tmp_path / "some" / "folder"
    status, out, err = main(["eval", name, f"--pictures={folder}"])
    assert status == 0
    assert {"step", metric} < set(json.loads(out))
    assert err == f"saved in {folder / picture}.png\n"
    assert [path.name for path in folder.iterdir()] == [f"{picture}.png"]
    assert pixels(folder / f"{picture}.png").shape[1] > 100


def test_eval_of_each_class(standing: Path):
    status, out, _ = main(["eval", "mlp", "--per-class"])
    assert status == 0
    metrics = json.loads(out)
    run = opened(Path("mlp"))
    test = run.dataset.test.rows(np.arange(360))
    found = mlp(run.variables, test["image"]).argmax(-1)
    assert list(metrics["classes"]) == [str(k) for k in range(10)]
    for k, values in enumerate(metrics["classes"].values()):
        label, hit = test["label"] == k, found == k
        both = (label & hit).sum()
        assert values["examples"] == label.sum()
        assert values["recall"] == pytest.approx(both / label.sum())
        assert values["precision"] == (pytest.approx(both / hit.sum()) if both else 0)
        assert values["iou"] == pytest.approx(both / (label | hit).sum())
    order = np.argsort(-mlp(run.variables, test["image"]), axis=-1)
    among = (order[:, :5] == test["label"][:, None]).any(1).mean()
    assert metrics["top5_accuracy"] == pytest.approx(among)


def test_a_run_without_its_data(standing: Path, tmp_path: Path):
    """Is applied from what it keeps, and evaluated with the data of another place."""
    shutil.copytree(standing / "ema", tmp_path / "ema")
    config = tmp_path / "ema" / "config.json"
    values = json.loads(config.read_text()) | {"data_dir": str(tmp_path / "gone")}
    values["dataset"] = "nonesuch"
    config.write_text(json.dumps(values))
    _, expected, _ = main(["eval", "ema"])
    status, out, err = main(
        [
            *("eval", tmp_path / "ema", "--dataset=digits"),
            f"--data-dir={standing / 'data'}",
        ]
    )
    assert (status, out, err) == (0, expected, "")
    (image,) = write_images(tmp_path, np.zeros((1, 8, 8, 1), np.uint8))
    for run in ("ema", tmp_path / "ema"):
        status, out, err = main(["predict", run, image])
        assert (status, err) == (0, "")
    assert not (tmp_path / "gone").exists()
    status, _, err = main(["eval", tmp_path / "ema"])
    assert (status, err.count("\n")) == (2, 1)
    assert "knows no data set called `nonesuch`" in err
    config.write_text(json.dumps(values | {"dataset": str(tmp_path / "moved")}))
    status, _, err = main(["eval", tmp_path / "ema"])
    assert (status, err.count("\n")) == (2, 1)
    assert "is not in" in err
    assert "Say where it is with --dataset." in err


# ---- predict -------------------------------------------------------------------------


def write_images(folder: Path, images: np.ndarray) -> list[Path]:
    paths = [folder / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path)
    return paths


def test_predict_classes(standing: Path, tmp_path: Path):
    """Of more images than are taken at once; --out is not for them."""
    run = opened(Path("mlp"))
    test = run.dataset.test.rows(np.arange(70))
    paths = write_images(tmp_path, test["image"])
    logits = mlp(run.variables, test["image"])
    probability = scipy.special.softmax(logits, -1)
    before = files(standing)
    status, out, err = main(["predict", "mlp", *paths])
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 70
    for line, path, row in zip(lines, paths, probability, strict=True):
        file, name, shown = line.split()
        assert (file, name) == (str(path), str(row.argmax()))
        assert float(shown) == pytest.approx(row.max(), abs=1e-4)
    assert files(standing) == before
    assert len(files(tmp_path)) == 70


def test_predict_the_most_probable_as_json(standing: Path, tmp_path: Path):
    run = opened(Path("mlp"))
    paths = write_images(tmp_path, run.dataset.test.rows(np.arange(3))["image"])
    status, out, err = main(["predict", "mlp", *paths, "--top=3", "--json"])
    assert (status, err) == (0, "")
    logits = mlp(run.variables, run.dataset.test.rows(np.arange(3))["image"])
    probability = scipy.special.softmax(logits, -1)
    for line, path, row in zip(out.splitlines(), paths, probability, strict=True):
        found = json.loads(line)
        assert found["file"] == str(path)
        assert (found["class"], found["probability"]) == tuple(found["top"][0].values())
        best = np.argsort(-row)[:3]
        assert [entry["class"] for entry in found["top"]] == list(map(str, best))
        shown = [entry["probability"] for entry in found["top"]]
        np.testing.assert_allclose(shown, row[best], rtol=1e-4)
    (line,) = main(["predict", "mlp", paths[0], "--top=2"])[1].splitlines()
    assert len(line.split()) == 5


def test_predict_makes_images_fit(standing: Path, tmp_path: Path):
    """Of another size, in color, as a JPEG: what is in them counts."""
    run = opened(Path("mlp"))
    (image,) = run.dataset.test.rows(np.zeros(1, np.int64))["image"]
    big = np.kron(image[..., 0], np.ones((4, 4), np.uint8))
    Image.fromarray(big).convert("RGB").save(tmp_path / "big.jpg", quality=100)
    (small,) = write_images(tmp_path, image[None])
    args = ("mlp", small, tmp_path / "big.jpg", "--checkpoint=best")
    status, out, _ = main(["predict", *args])
    assert status == 0
    one, other = (line.split()[1] for line in out.splitlines())
    assert one == other


def test_predict_masks(standing: Path, tmp_path: Path):
    run = opened(Path("unet"))
    rows = run.dataset.test.rows(np.arange(3))
    model: nn.Module = run.supervised.model
    logits: Any = jax.jit(lambda x: model.apply(run.variables, x, train=False))(
        rows["image"]
    )
    expected = np.asarray(logits).argmax(-1)
    assert len(np.unique(expected)) > 1
    paths = write_images(tmp_path, rows["image"])
    # Of the same name, in another folder.
    (tmp_path / "other").mkdir()
    paths[2] = paths[2].rename(tmp_path / "other" / "0.png")
    out_folder = tmp_path / "masks"
    status, out, err = main(["predict", "unet", *paths, "--out", out_folder])
    assert (status, err) == (0, "")
    names = ["0000-0", "0001-1", "0002-0"]
    for name, mask, line, path in zip(
        names, expected, out.splitlines(), paths, strict=True
    ):
        found = pixels(out_folder / f"{name}-mask.png")
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, mask)
        overlay = pixels(out_folder / f"{name}-overlay.png")
        assert overlay.shape == (*mask.shape, 3)
        assert line.startswith(f"{path}  ")
        assert line.endswith(f"  {out_folder / name}-mask.png")
        shares = [float(x) for x in re.findall(r": ([\d.]+) %", line)]
        counts = np.bincount(mask.ravel(), minlength=3) / mask.size
        np.testing.assert_allclose(shares, 100 * counts, atol=0.051)
    assert len(files(out_folder)) == 6


def test_predict_of_a_gan(standing: Path, tmp_path: Path):
    """Equal seeds make equal images, and others make others."""
    images = {}
    for name, flags in {
        "a": ["--samples=5"],
        "b": ["--samples=5", "--seed=0"],
        "c": ["--samples=5", "--seed=1"],
    }.items():
        folder = tmp_path / name
        status, out, err = main(["predict", "gan", *flags, "--out", folder])
        assert (status, err) == (0, "")
        assert out.startswith("saved 5 images in ")
        assert files(folder) == ["samples.npy", "samples.png"]
        images[name] = np.load(folder / "samples.npy")
        assert images[name].shape == (5, 8, 8, 1)
        assert images[name].dtype == np.uint8
        sheet = pixels(folder / "samples.png")
        np.testing.assert_array_equal(sheet[:8, 9:17], images[name][1].repeat(3, -1))
    np.testing.assert_array_equal(images["a"], images["b"])
    assert (images["a"] != images["c"]).mean() > 0.2
    run: Any = opened(Path("gan"))
    assert np.ptp(images["a"]) > 100
    np.testing.assert_array_equal(run.task.sample(run.variables, 5, 1), images["c"])


# ---- What cannot be done -------------------------------------------------------------


def spoil(home: Path, name: str, what: Callable[[Path], Any]) -> None:
    if not (home / name).exists():
        shutil.copytree(home / "ema", home / name)
        what(home / name)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("eval nowhere", "nowhere is not a folder"),
        ("eval bare", "bare is not a run: it has no config.json"),
        ("eval ema/checkpoints", "ema/checkpoints is not a run"),
        ("eval ema/checkpoints/7", "ema has no checkpoint 7: there are steps 23"),
        ("eval ema --checkpoint=7", "ema has no checkpoint 7: there are steps 23"),
        ("eval plain", "is of another model: it has average/"),
        ("eval ema --pictures=text.png", r"text.png cannot be a folder: .*exists"),
        ("predict ema", "Name the image files to predict"),
        ("predict ema good.png --top=0", "--top=0 is out of range: 1 to 10"),
        ("predict ema good.png --top=11", "--top=11 is out of range"),
        ("eval gan --per-class", "has --model=dcgan, which is two networks"),
        ("eval untold", "untold/dataset.json does not describe the data set of a run"),
        ("predict ema no.png", "no.png is not an image that can be read: .*No such"),
        ("predict ema text.png", "text.png is not an image that can be read"),
        ("predict ema good.png cut.png", "cut.png is not an image that can be read"),
        ("predict ema bare", "bare is a folder: name the image files in it"),
        ("predict unet good.png --out=text.png", "text.png cannot be a folder"),
        ("predict gan good.png", "takes none: leave the files out"),
        ("predict gan --samples=0", "--samples=0 is out of range: at least 1"),
        ("predict gan --seed=-1", "--seed=-1 is out of range: from 0 to"),
        ("predict gan --out=text.png", "text.png cannot be a folder"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    standing: Path, line: str, match: str
):
    (standing / "bare").mkdir(exist_ok=True)
    (standing / "text.png").write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(standing / "good.png")
    whole = (standing / "good.png").read_bytes()
    (standing / "cut.png").write_bytes(whole[: len(whole) // 2])

    def forget(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ema_decay": None}))

    spoil(standing, "plain", forget)
    spoil(standing, "untold", lambda folder: (folder / "dataset.json").write_text("{"))
    before = files(standing)
    status, out, err = main(line.split())
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"error: .*{match}.*\n", err), err
    assert files(standing) == before


@pytest.mark.parametrize("name", ["eval", "predict"])
def test_help(name: str):
    status, out, _ = main([name, "--help"])
    assert status == 0
    assert f"usage: train.py {name} " in out
    assert "CHECKPOINT" in out
    assert "None" not in out
