"""What a run was started with, as its folder keeps it."""

import subprocess
from pathlib import Path

import jax
import pytest

from jbn.training.environment import environment


def git(*args: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", *author, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the folder that the process was started in, if something is committed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def found() -> tuple[str | None, bool | None]:
        values = environment(jax.devices())
        return values.get("git_commit"), values.get("git_changed")

    assert found() == (None, None)
    git("init", "-q")
    Path("a b.txt").write_text("1")
    assert found() == (None, None)
    git("add", ".")
    git("commit", "-qm", "one")
    commit = git("rev-parse", "HEAD").strip()
    assert found() == (commit, False)
    Path("other.txt").write_text("1")
    assert found() == (commit, False)
    Path("a b.txt").write_text("2")
    assert found() == (commit, True)
