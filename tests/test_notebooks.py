"""Notebooks are paired with their scripts, and stand as they were run.

`.ci/run` executes them.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml


ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "applications",
    "batch_norm",
    "distributed",
    "effects",
    "nnx",
    "paper",
    "uneven",
]


def read(path: Path) -> nbformat.NotebookNode:
    return jupytext.read(path)


def test_all_are_there():
    assert [path.stem for path in PATHS] == NAMES
    scripts = sorted((ROOT / "notebooks").glob("*.py"))
    assert [path.stem for path in scripts] == NAMES


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_the_script_is_the_notebook(path):
    cells = [(c.cell_type, c.source) for c in read(path).cells]
    script = read(path.with_suffix(".py"))
    assert [(c.cell_type, c.source) for c in script.cells] == cells
    kept = {k: read(path).metadata[k] for k in ("accelerator", "colab", "kernelspec")}
    assert kept.items() <= script.metadata.items()
    assert kept["accelerator"] == "GPU"
    assert kept["colab"]["gpuType"] == "T4"
    assert kept["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_outputs_are_those_of_one_run_from_top_to_bottom(path):
    code = [c for c in read(path).cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert pictures
    assert path.stat().st_size < 700_000


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_it_opens_in_colab_and_installs_jbn_there(path):
    first, second = read(path).cells[:2]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    address = citation["repository-code"].removeprefix("https://github.com/")
    link = f"/github/{address}/blob/main/notebooks/{path.name})"
    assert first.source.startswith("# ")
    assert f"https://colab.research.google.com{link}" in first.source
    assert second.source == read(PATHS[0]).cells[1].source
    assert second.metadata["cellView"] == "form"  # Colab folds it to its title.
    assert f'"jbn[train] @ git+https://github.com/{address}"' in second.source
    # A reader sees first what there is to see.
    picture = rf"https://raw\.[\w.]+/{address}/main/docs/notebooks/{path.stem}\.png"
    assert re.search(rf"!\[[^\]]+\]\({picture}\)$", first.source)


def test_pictures_at_the_top_are_those_of_the_outputs():
    command = [sys.executable, str(ROOT / "docs" / "covers.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch):
    """Runs the set-up cell on a machine without jbn; returns what pip installed."""
    source = read(PATHS[0]).cells[1].source

    def run(*, gpu: bool, backends: Iterable[str] = (), rc: int = 0) -> list[str]:
        installed, seen = [], iter(backends)

        def call(command, **kwargs):
            if "pip" in command:
                installed.append(command[-1])
                return subprocess.CompletedProcess(command, rc)
            return subprocess.CompletedProcess(command, 0, stdout=next(seen) + "\n")

        monkeypatch.setattr(subprocess, "run", call)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(shutil, "which", lambda name: "/bin/smi" if gpu else None)
        monkeypatch.delitem(sys.modules, "jax", raising=False)
        exec(source, {})
        return installed

    return run


def test_a_jax_that_sees_the_gpu_is_left_alone(colab, capsys):
    (jbn,) = colab(gpu=True, backends=["gpu"])
    assert jbn.startswith("jbn[train] @ ")
    (jbn,) = colab(gpu=False)
    assert capsys.readouterr().out == ""


def test_a_gpu_that_is_lost_is_brought_back_or_named(colab, capsys):
    assert colab(gpu=True, backends=["cpu", "gpu"])[1:] == ["jax[cuda12]"]
    assert capsys.readouterr().out == ""
    colab(gpu=True, backends=["cpu", "cpu"])
    assert "does not see the accelerator" in capsys.readouterr().out


def test_an_address_that_cannot_be_reached_is_named(colab):
    with pytest.raises(SystemExit, match=r"pip could not install jbn.*https://"):
        colab(gpu=False, rc=1)


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_links_lead_somewhere(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for link in re.findall(r"\]\(((?!https?:|#)[^)]+)\)", cell.source):
                target = path.parent / link.partition("#")[0]
                assert target.exists(), link
