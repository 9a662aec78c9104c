"""Reading batches: shares, chunks, and that processes agree on what a step is."""

import threading
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from jbn.training import loader
from jbn.training.batches import Plan, chunks, plan_epoch
from jbn.training.data import InMemory, OnDisk
from jbn.training.executor import Executor
from jbn.training.images import Preparation
from jbn.training.loader import ahead, empty_chunk, load


NUM_ROWS = 22  # Of batches of 8: the last has six.


@pytest.fixture(params=["memory", "disk"])
def split(request: pytest.FixtureRequest) -> Any:
    """The label says which example it is."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (NUM_ROWS, 4, 4, 1), np.uint8)
    label = np.arange(100, 100 + NUM_ROWS, dtype=np.int32)
    if request.param == "memory":
        return InMemory(image, label)
    pytest.importorskip("grain")
    source = [{"image": i, "label": int(n)} for i, n in zip(image, label, strict=True)]
    return OnDisk(source, Preparation((4, 4, 1)))


@pytest.fixture
def plan() -> Plan:
    return plan_epoch(np.random.default_rng(1).permutation(NUM_ROWS), 8, multiple=4)


def test_batches_are_those_of_the_plan(split: Any, plan: Plan):
    found = list(load(split, plan, 2))
    assert [count for count, _ in found] == [2, 1]
    for (_, batches), piece in zip(found, chunks(plan, 2), strict=True):
        np.testing.assert_array_equal(batches["index"], piece.indices)
        np.testing.assert_array_equal(batches["weight"], piece.weights)
        np.testing.assert_array_equal(batches["label"], 100 + piece.indices)
        assert batches["image"].shape == (2, 8, 4, 4, 1)
        assert batches["image"].dtype == np.uint8
        rows = split.rows(piece.indices.ravel())["image"]
        np.testing.assert_array_equal(batches["image"].reshape(rows.shape), rows)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_shares_are_together_the_whole(split: Any, plan: Plan, length: int):
    """And the second process, which has nothing but filling, counts the same steps.

    The last batch has six rows, of which the second process of two has two; cut into
    four, the last process has none.
    """
    whole = list(load(split, plan, length))
    for processes in (2, 4):
        part = plan.num_rows // processes
        shares = [
            list(load(split, plan, length, share=slice(i * part, (i + 1) * part)))
            for i in range(processes)
        ]
        for i, (count, batches) in enumerate(whole):
            assert {share[i][0] for share in shares} == {count}
            for name, expected in batches.items():
                together = np.concatenate([s[i][1][name] for s in shares], axis=1)
                np.testing.assert_array_equal(together, expected)
    last = shares[-1][-1][1]["weight"]
    assert not last[whole[-1][0] - 1].any()


def test_empty_chunk(split: Any, plan: Plan):
    """Of the very shapes and dtypes of a real one: nothing is compiled twice."""
    for share in (slice(None), slice(4, 8)):
        _, batches = next(load(split, plan, 2, share=share))
        nothing = empty_chunk(split, plan, 2, share=share)
        assert nothing.keys() == batches.keys()
        for name, x in nothing.items():
            assert (x.shape, x.dtype) == (batches[name].shape, batches[name].dtype)
            assert not x.any()


def test_threads_change_nothing(plan: Plan):
    pytest.importorskip("grain")
    rng = np.random.default_rng(0)
    source = [
        {"image": rng.integers(0, 256, (9 + i % 3, 11, 3), np.uint8), "label": i}
        for i in range(NUM_ROWS)
    ]
    split = OnDisk(source, Preparation((5, 5, 3)), crop=True, seed=2)
    expected = list(load(split, plan, 2, epoch=3, threads=1))
    for threads in (2, 7):
        for (count, batches), (n, wanted) in zip(
            load(split, plan, 2, epoch=3, threads=threads), expected, strict=True
        ):
            assert count == n
            jax.tree.map(np.testing.assert_array_equal, batches, wanted)
    other = next(load(split, plan, 2, epoch=4))[1]
    assert (other["image"] != expected[0][1]["image"]).any()
    np.testing.assert_array_equal(other["label"], expected[0][1]["label"])


# ---- Ahead ---------------------------------------------------------------------------


def test_ahead_yields_the_same(split: Any, plan: Plan):
    put = lambda batches: {k: v + 1 for k, v in batches.items()}
    found = list(ahead(load(split, plan, 2), put))
    expected = [(n, put(batches)) for n, batches in load(split, plan, 2)]
    assert [n for n, _ in found] == [n for n, _ in expected] == [2, 1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert list(ahead(iter([]), put)) == []


def test_ahead_is_one_chunk_ahead_and_no_more():
    read = threading.Semaphore(0)
    taken = []

    def numbers() -> Iterator[tuple[int, Any]]:
        for i in range(5):
            taken.append(i)
            read.release()
            yield i, {}

    coming = ahead(numbers(), lambda batches: batches)
    assert next(coming)[0] == 0
    for _ in range(2):
        assert read.acquire(timeout=10)
    assert taken == [0, 1]
    assert [n for n, _ in coming] == [1, 2, 3, 4]


def test_ahead_passes_errors_on():
    def broken() -> Iterator[tuple[int, Any]]:
        yield 1, {}
        raise OSError("disk on fire")

    coming = ahead(broken(), lambda batches: batches)
    assert next(coming)[0] == 1
    with pytest.raises(OSError, match="disk on fire"):
        next(coming)


def test_ahead_can_be_left():
    """As a run does that is stopped in the middle of an epoch: no thread is left."""
    before = threading.active_count()
    coming = ahead(iter([(i, {}) for i in range(9)]), lambda batches: batches)
    next(coming)
    coming.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == before


# ---- Which rows are whose ------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_executors_share_out_the_rows_of_a_batch(
    monkeypatch: pytest.MonkeyPatch, processes: int
):
    """Each process has its own, in a row, and all have all."""
    devices = [
        types.SimpleNamespace(process_index=i * processes // 8) for i in range(8)
    ]
    rows = np.arange(24)
    found = []
    for process in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda p=process: p)
        executor = Executor(devices, "pmap")
        assert executor.num_local == 8 // processes
        found.append(rows[executor.share(24)])
        assert len(found[-1]) == 24 // processes
        batches = {"x": np.zeros((2, len(found[-1]), 5))}
        put = executor.put_batches(batches)["x"]
        assert put.shape == (2, 8 // processes, 3, 5)
    np.testing.assert_array_equal(np.concatenate(found), rows)


def test_grain_is_asked_for(monkeypatch: pytest.MonkeyPatch, plan: Plan):
    import sys

    monkeypatch.setitem(sys.modules, "grain", None)
    source = [{"image": np.zeros((4, 4, 1), np.uint8), "label": 0}] * NUM_ROWS
    split = OnDisk(source, Preparation((4, 4, 1)))
    with pytest.raises(loader.UsageError, match=r'pip install "jbn\[grain\]"'):
        next(load(split, plan, 2))
