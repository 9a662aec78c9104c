"""Checkpoints: what is kept, and that it comes back to the last bit."""

import dataclasses
import gc
import importlib.util
import shutil
from pathlib import Path

import jax
import numpy as np
import optax
import orbax
import orbax.checkpoint as ocp
import pytest
from ways import executors

from jbn.models import MLP
from jbn.training import store
from jbn.training.checkpoint import Checkpoints
from jbn.training.errors import UsageError
from jbn.training.executor import Executor
from jbn.training.state import TrainState
from jbn.training.step import create_state
from jbn.training.tasks import Supervised


def make(width: int = 3, *, depth: int = 1, averaged: bool = False) -> TrainState:
    task = Supervised(
        kind="classification",
        model=MLP(features=(width,) * depth, num_classes=2),
        image_shape=(2, 2, 1),
        num_classes=2,
        optimizer=optax.adam(1e-3),
    )
    return jax.device_get(create_state(task, seed=1, averaged=averaged))


@pytest.fixture(scope="module")
def state() -> TrainState:
    return make()


def at(state: TrainState, step: int) -> TrainState:
    """The state after other steps, which its parameters show."""
    params = jax.tree.map(lambda x: x + np.float32(step), state.params)
    return dataclasses.replace(state, step=np.int32(step), params=params)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("higher_is_better", "values", "best"),
    [
        (True, [0.5, 0.9, 0.7, 0.8], 20),
        (True, [0.9, 0.9, 0.7, 0.8], 20),  # The later one of two.
        (False, [0.5, 0.9, 0.3, 0.4], 30),
        (False, [0.5, 0.3, 0.3, 0.4], 30),
        (True, [0.0, 0.0, -1.0, -2.0], 20),
        (False, [0.1, 0.2, 0.3, 0.05], 40),
    ],
)
def test_keeps_the_last_and_the_best(
    tmp_path: Path,
    state: TrainState,
    higher_is_better: bool,
    values: list[float],
    best: int,
):
    options = {"higher_is_better": higher_is_better}
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.last_step is None
        assert checkpoints.best_step is None
        assert checkpoints.describe() == "There is no checkpoint yet."
        for step, value in zip((10, 20), values[:2], strict=True):
            checkpoints.save(at(state, step), metric=value)
    # In another process the old metrics count as well.
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, value in zip((30, 40), values[2:], strict=True):
            checkpoints.save(at(state, step), metric=value)
        checkpoints.wait()
        assert checkpoints.steps == sorted({best, 40})
    assert names(tmp_path) == {str(best), "40"}
    for read_only in (False, True):
        with Checkpoints(tmp_path, **options, read_only=read_only) as checkpoints:
            assert (checkpoints.last_step, checkpoints.best_step) == (40, best)
            assert checkpoints.steps == sorted({best, 40})
            assert str(tmp_path / "40") in checkpoints.describe()
            assert "after step 40" in checkpoints.describe()
            for step in (best, 40):
                restored, progress = checkpoints.restore(step, state)
                assert restored.step == step
                expected = at(state, step).params
                jax.tree.map(np.testing.assert_array_equal, restored.params, expected)
                assert progress == {}
    assert names(tmp_path) == {str(best), "40"}


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_in_the_middle_of_an_epoch(
    tmp_path: Path, state: TrainState, higher_is_better: bool
):
    """Without a metric: never the best, and gone when there is a later one."""
    options = {"higher_is_better": higher_is_better}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(at(state, step), progress={"loss": step / 3, "weight": 8})
        checkpoints.wait()
        assert checkpoints.steps == [3]
        for step, value in ((10, 0.5), (20, 0.6), (30, 0.5)):
            checkpoints.save(at(state, step - 1), progress={"loss": 0.1})
            checkpoints.save(at(state, step), metric=value)
        checkpoints.save(at(state, 31), progress={"loss": 0.1, "num_skipped": 2})
        checkpoints.wait()
        best = 20 if higher_is_better else 30
        assert checkpoints.steps == [best, 31]
        assert (checkpoints.last_step, checkpoints.best_step) == (31, best)
    assert names(tmp_path) == {str(best), "31"}
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.best_step == best
        restored, progress = checkpoints.restore(31, state)
        assert restored.step == 31
        assert progress == {"loss": 0.1, "num_skipped": 2}
        assert isinstance(progress["num_skipped"], int)
        checkpoints.save(at(state, 32))
    assert names(tmp_path) == {str(best), "32"}


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize(
    ("parallel", "num_devices"),
    executors(("pmap", 1), ("jit", 1), ("pmap", 4), ("jit", 4)),
)
def test_comes_back_to_the_last_bit(
    tmp_path: Path, parallel: str, num_devices: int, averaged: bool
):
    """Also onto another number of devices."""
    state = make(averaged=averaged)
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda x: (
            rng.normal(size=x.shape).astype(x.dtype) if x.dtype == np.float32 else x
        ),
        state,
    )
    devices = jax.devices()[:num_devices]
    executor = Executor(devices, parallel)  # pyright: ignore
    sums = {"loss": 0.1 + 0.2, "weight": 1e-320, "correct": 1 / 3}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(
            executor.get(executor.put(at(state, 7))), metric=0.5, progress=sums
        )
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        restored, progress = checkpoints.restore(7, jax.eval_shape(lambda: state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    fewer = Executor(devices[:2], parallel)  # pyright: ignore
    for found in (restored, fewer.get(fewer.put(restored))):
        jax.tree.map(np.testing.assert_array_equal, found, at(state, 7))
    dtypes = lambda tree: jax.tree.map(lambda x: x.dtype, tree)
    assert dtypes(restored) == dtypes(state)
    assert progress == sums
    assert restored.variables is not None


@pytest.mark.parametrize(
    ("like", "match"),
    [
        (make(4), r"its batch_stats/BatchNorm_0/mean has shape \(3,\), and .* \(4,\)"),
        (make(depth=2), "it has no batch_stats/BatchNorm_1/mean"),
        (make(averaged=True), "it has no average/batch_stats/BatchNorm_0/mean"),
    ],
)
def test_of_another_model(
    tmp_path: Path, state: TrainState, like: TrainState, match: str
):
    """The first name that differs is named, and nothing is changed."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 5), metric=0.5)
        checkpoints.wait()
        with pytest.raises(UsageError, match=rf"5 is of another model: {match}"):
            checkpoints.restore(5, like)
    assert names(tmp_path) == {"5"}


def test_of_a_smaller_model(tmp_path: Path, state: TrainState):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(make(depth=2), 5), metric=0.5)
        checkpoints.wait()
        match = "it has batch_stats/BatchNorm_1/mean, which that of the run's"
        with pytest.raises(UsageError, match=match):
            checkpoints.restore(5, state)


def test_cannot_be_read(tmp_path: Path, state: TrainState):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 5), metric=0.5)
    shutil.rmtree(tmp_path / "5" / "state")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UsageError, match=r"5 cannot be read \("):
            checkpoints.restore(5, state)


def test_what_has_not_been_finished_is_not_there(tmp_path: Path, state: TrainState):
    """As a process leaves it that is killed while it saves."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 5), metric=0.5)
    unfinished = "6.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "5", tmp_path / unfinished)
    (tmp_path / unfinished / "_CHECKPOINT_METADATA").unlink()
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps == [5]
    assert names(tmp_path) == {"5", unfinished}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_step == 5
        checkpoints.save(at(state, 6), metric=0.6)
    assert names(tmp_path) == {"6"}


def test_read_only_leaves_the_folder_alone(tmp_path: Path, state: TrainState):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 5), metric=0.5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore(5, state)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(found, key=lambda path: path.stat().st_size, reverse=True)


# (Orbax leaves the reads of other arrays behind, which fail when they are collected.)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_changed_byte_is_found(tmp_path: Path, rng: np.random.Generator):
    """Wherever it is: it has no effect, or the checkpoint is refused."""
    state = make(40)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 10), metric=0.9)
        checkpoints.save(at(state, 20), metric=0.5, progress={"loss": 0.5})
    largest, *others = files(tmp_path / "20")
    size = largest.stat().st_size
    places = [(largest, int(k)) for k in rng.integers(0, size, 6)]
    places += [(path, path.stat().st_size // 2) for path in others[:6]]
    refused = []
    for path, place in places:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[place] ^= 0x10
        path.write_bytes(bad)
        with Checkpoints(tmp_path, read_only=True) as checkpoints:
            try:
                restored, progress = checkpoints.restore(20, state)
            except UsageError as error:
                refused.append(str(error))
            else:
                jax.tree.map(np.testing.assert_array_equal, restored, at(state, 20))
                assert progress == {"loss": 0.5}
        path.write_bytes(good)
    gc.collect()
    assert len(refused) >= 5
    for text in refused:
        assert str(tmp_path / "20") in text
        assert text.endswith(
            "The checkpoint after step 10 is intact: use it with --checkpoint=best."
        )


def test_a_changed_value_is_named(tmp_path: Path, state: TrainState):
    """Also where the files are as Orbax would have them."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 10), metric=0.9)
    with Checkpoints(tmp_path / "other") as checkpoints:
        checkpoints.save(dataclasses.replace(at(state, 11), step=np.int32(10)))
    shutil.rmtree(tmp_path / "10" / "state")
    shutil.copytree(tmp_path / "other" / "10" / "state", tmp_path / "10" / "state")
    match = "damaged: the checksum of params/.* differs. There is no other intact"
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(UsageError, match=match):
            checkpoints.restore(10, state)
        with pytest.raises(UsageError, match=match):
            checkpoints.restore_variables(10)


def test_without_checksums(tmp_path: Path, state: TrainState):
    """As version 0.2.0 saved it."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 10), metric=0.9)
    shutil.rmtree(tmp_path / "10" / "checksums")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore(10, state)[0].step == 10
        params = checkpoints.restore_variables(10)["params"]
        jax.tree.map(np.testing.assert_array_equal, params, at(state, 10).params)


def test_of_the_version_before(tmp_path: Path, state: TrainState):
    """As written by Orbax' first API, which version 0.2.0 used."""
    if not hasattr(ocp, "CheckpointManager"):
        pytest.skip("this version of Orbax does not have its first API")
    value = lambda metrics: metrics["value"]
    with ocp.CheckpointManager(
        tmp_path,
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(best_fn=value),
    ) as manager:
        for step, metrics in ((10, {"value": 0.9}), (20, {"value": 0.5}), (21, None)):
            parts = dataclasses.fields(TrainState)
            tree = {part.name: getattr(at(state, step), part.name) for part in parts}
            items = {
                "state": ocp.args.StandardSave(tree),  # pyright: ignore[reportCallIssue]
                "progress": ocp.args.JsonSave({"loss": step / 7, "num_skipped": 2}),  # pyright: ignore[reportCallIssue]
            }
            manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [10, 20, 21]
        assert (checkpoints.last_step, checkpoints.best_step) == (21, 10)
        restored, progress = checkpoints.restore(20, jax.eval_shape(lambda: state))
        assert progress == {"loss": 20 / 7, "num_skipped": 2}
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        jax.tree.map(np.testing.assert_array_equal, restored, at(state, 20))
        with pytest.raises(UsageError, match="its batch_stats/BatchNorm_0/mean has sh"):
            checkpoints.restore(20, make(4))
        checkpoints.save(at(state, 30), metric=0.8)
    assert names(tmp_path) == {"10", "30"}


def test_where_the_v1_api_is_the_top_level_one(
    tmp_path: Path, state: TrainState, monkeypatch: pytest.MonkeyPatch
):
    """As version 1.0 of Orbax announces it."""
    v1 = getattr(ocp, "v1", ocp)
    assert not hasattr(v1, "CheckpointManager")
    monkeypatch.setattr(orbax, "checkpoint", v1)
    spec = importlib.util.spec_from_file_location("store_of_1", store.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    opened = module.Store(tmp_path, ("sums",), lambda metrics: metrics["value"])
    tree = {"params": state.params, "opt_state": state.opt_state}
    opened.save(3, tree, {"sums": {"loss": 0.25}}, {"value": 0.5})
    opened.wait()
    found, documents = opened.load(3, tree, ("sums",))
    opened.close()
    assert opened.metrics == {3: {"value": 0.5}}
    assert documents == {"sums": {"loss": 0.25}}
    jax.tree.map(np.testing.assert_array_equal, found, tree)


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_what_is_held_is_saved_in_the_end(
    tmp_path: Path, state: TrainState, higher_is_better: bool
):
    """The best and the last: as if all had been saved."""
    sign = 1 if higher_is_better else -1
    options = {"higher_is_better": higher_is_better}
    with Checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.save(at(state, 1), metric=sign * 0.3)
        for step, value in ((2, 0.2), (3, 0.5), (4, 0.5), (5, 0.4)):
            checkpoints.hold(at(state, step), metric=sign * value)
        assert checkpoints.steps == [1]
        checkpoints.flush()
        checkpoints.wait()
        assert checkpoints.steps == [4, 5]
        assert checkpoints.best_step == 4
        checkpoints.hold(at(state, 6), metric=sign * 0.1)
        checkpoints.hold(at(state, 7), metric=sign * 0.1)
        # In the middle of an epoch: the later one is the last.
        checkpoints.save(at(state, 8))
        checkpoints.hold(at(state, 9), metric=sign * 0.6)
        checkpoints.hold(at(state, 10), metric=sign * 0.2)
    with Checkpoints(tmp_path, **options, read_only=True) as checkpoints:
        assert checkpoints.steps == [9, 10]
        assert checkpoints.best_step == 9
        restored, _ = checkpoints.restore(9, state)
        jax.tree.map(np.testing.assert_array_equal, restored, at(state, 9))


def test_going_back(tmp_path: Path, state: TrainState):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at(state, 10), metric=0.9)
        checkpoints.save(at(state, 20), metric=0.5)
        checkpoints.delete_after(10)
        assert checkpoints.steps == [10]
        checkpoints.save(at(state, 20), metric=0.6)
    assert names(tmp_path) == {"10", "20"}
