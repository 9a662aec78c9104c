"""The folder of a run: one process at a time, and no trace of a failed start."""

import multiprocessing
from pathlib import Path

import pytest

from jbn.training.config import Config
from jbn.training.errors import UsageError
from jbn.training.workdir import reserved


def test_a_folder_that_nothing_was_written_to_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    for config in (Config(), Config(workdir=Path("a/b/c"))):
        with reserved(config) as folder:
            assert folder.is_dir()
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with reserved(Config(workdir=Path("mine"))):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert list((tmp_path / "mine").iterdir()) == []
    with reserved(Config(workdir=Path("a/b"))) as folder:
        (folder / "config.json").touch()
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_new_folders_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with (
        reserved(Config(dataset="a/b:1")) as one,
        reserved(Config(dataset="a/b:1")) as two,
    ):
        assert one != two
        for folder in (one, two):
            assert folder.name.startswith("a-b-1-mlp-seed0-")
    with reserved(Config(model="mine:Net", dataset="/data/a")) as folder:
        assert folder.name.startswith("a-mine-Net-seed0-")


def _try(folder: Path, found: multiprocessing.Queue) -> None:  # pyright: ignore
    try:
        with reserved(Config(workdir=folder)):
            found.put("reserved")
    except UsageError as error:
        found.put(str(error))


def test_another_process(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    with reserved(Config(workdir=tmp_path)):
        process = context.Process(target=_try, args=(tmp_path, found))
        process.start()
        text = found.get(timeout=100)
        process.join()
    assert text.startswith(f"Another process trains in {tmp_path}. ")
    _try(tmp_path, found)
    assert found.get(timeout=100) == "reserved"


def test_what_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/run", "file/run/deeper"):
        with (
            pytest.raises(UsageError, match=r"--workdir=.*file.* cannot be written: "),
            reserved(Config(workdir=tmp_path / folder)),
        ):
            pass
