"""What the README shows is what happens."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
# The first two are for .ci/run: installing, and running these tests.
COMMANDS = [text.strip() for language, text in BLOCKS if language == "bash"][2:]


def run(*command: str, cwd: pathlib.Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_runs_and_prints_what_is_shown(code, tmp_path):
    printed = run(sys.executable, "-c", code, cwd=tmp_path)
    following = BLOCKS[BLOCKS.index(("python", code)) + 1]
    shown = following[1] if following[0] == "text" else ""
    assert printed == shown


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path):
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    for i, flag in enumerate(flags):
        name, _, value = flag.partition("=")
        if name == "--manual-dir":
            folder = ROOT / value
            if not folder.is_dir():
                pytest.skip(f"no {folder}")
            flags[i] = f"{name}={folder}"
    flags += [f"--workdir={tmp_path}/run", f"--data-dir={tmp_path}/data"]
    printed = run(sys.executable, str(ROOT / script), *flags, cwd=tmp_path)
    assert re.search(r"^final test accuracy: 9[789]\.\d+ %", printed, re.MULTILINE)


def test_every_path_named_exists():
    for path in re.findall(r"\]\(([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
