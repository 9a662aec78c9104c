"""Tests what keeps decoded images."""

from pathlib import Path

import numpy as np
import pytest

from jbn.training import decoded
from jbn.training.decoded import keep


def arrays(value: int = 3) -> dict[str, np.ndarray]:
    return {
        "image": np.full((2, 3, 3, 1), value, np.uint8),
        "label": np.array([4, 5], np.int32),
    }


def not_again():
    raise AssertionError("They are there.")


def check(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def test_arrays_are_made_once(tmp_path: Path):
    path = tmp_path / "decoded.npz"
    check(keep(path, arrays), arrays())
    assert list(tmp_path.iterdir()) == [path]
    check(keep(path, not_again), arrays())


@pytest.mark.parametrize("content", ["empty", "cut", "other", "pickle"])
def test_a_file_that_cannot_be_read_is_made_anew(tmp_path: Path, content: str):
    path = tmp_path / "decoded.npz"
    if content == "pickle":
        np.savez(path, image=np.array([None]))
    else:
        keep(path, arrays)
        whole = path.read_bytes()
        shorter = {"empty": b"", "cut": whole[: len(whole) // 2], "other": b"text"}
        path.write_bytes(shorter[content])
    check(keep(path, lambda: arrays(7)), arrays(7))
    check(keep(path, not_again), arrays(7))


def test_a_changed_byte_is_noticed(tmp_path: Path):
    path = tmp_path / "decoded.npz"
    keep(path, arrays)
    content = path.read_bytes()
    position = content.index(bytes([3] * 18))
    path.write_bytes(content[:position] + b"\x09" + content[position + 1 :])
    check(keep(path, lambda: arrays(7)), arrays(7))


def test_a_folder_that_cannot_be_written_is_left(tmp_path: Path):
    check(keep(tmp_path / "nonesuch" / "decoded.npz", arrays), arrays())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def savez(path: Path, **arrays: np.ndarray) -> None:
        path.write_bytes(b"the beginning")
        raise OSError("no space left on device")

    monkeypatch.setattr(decoded.np, "savez", savez)
    check(keep(tmp_path / "decoded.npz", arrays), arrays())
    assert list(tmp_path.iterdir()) == []


def test_large_ones_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(decoded, "_MOST_BYTES", 18 + 8 - 1)
    keep(tmp_path / "decoded.npz", arrays)
    assert list(tmp_path.iterdir()) == []
