"""What the README and the docs say of speed and memory is what was measured."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks"


def run(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_tables_are_those_of_the_results():
    found = run("benchmarks/tables.py", "--check")
    assert (found.returncode, found.stdout) == (0, ""), found.stderr


def test_a_table_that_was_typed_is_found(tmp_path: Path):
    """And mended, from the results alone."""
    pages = "README.md", "docs/benchmarks.md", "docs/evidence.md"
    for name in (*pages, "benchmarks/tables.py"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((ROOT / name).read_text())
    for name in ("benchmarks", "evidence"):
        (tmp_path / "docs" / name).symlink_to(ROOT / "docs" / name)
    readme = tmp_path / "README.md"
    right = readme.read_text()
    readme.write_text(right.replace("<!-- end -->", "| better |\n<!-- end -->", 1))
    found = run("benchmarks/tables.py", "--check", cwd=tmp_path)
    assert found.returncode == 1
    assert "README.md: out of date" in found.stdout
    assert run("benchmarks/tables.py", cwd=tmp_path).returncode == 0
    assert readme.read_text() == right


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.stem)
def test_results_say_how_they_came_about(path: Path):
    content = json.loads(path.read_text())
    assert re.fullmatch(r"python benchmarks/\w+\.py( --\S+)*", content["command"])
    assert (ROOT / content["command"].split()[1]).is_file()
    assert re.match(r"\d{4}-\d\d-\d\dT", content["date"])
    assert content["platform"]
    assert content["versions"]["jax"]
    assert path.with_suffix(".png").is_file()


def test_one_command_for_all():
    found = run("-m", "benchmarks", "--help")
    assert found.returncode == 0
    for name in (
        "op",
        "memory",
        "network",
        "first_step",
        "scale",
        "variance",
        "groups",
        "gpu",
        "job",
        "epoch",
    ):
        assert name in found.stdout
        assert (ROOT / "benchmarks" / f"{name}.py").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("clients", ["| digits | 1 | tau |"]),
        ("domains", ["**digits, faint**", "| pooled tau |"]),
        ("small_batches", ["| 16 images of one class | tau=inf |"]),
    ],
)
def test_evidence_is_made_by_a_script_that_runs(name: str, texts: list[str]):
    """Every part of it on the digits, with few steps; nothing is written."""
    path = ROOT / "docs" / "evidence" / f"{name}.json"
    before = path.read_bytes()
    found = run(f"benchmarks/{name}.py", "--quick")
    assert found.returncode == 0, found.stderr
    for text in texts:
        assert text in found.stdout
    assert path.read_bytes() == before


@pytest.mark.slow
def test_crossq_learns_with_either_layer():
    """Every part of the script, with few steps; nothing is written."""
    pytest.importorskip("sbx")
    pytest.importorskip("mujoco")
    found = run("benchmarks/reinforcement.py", "--quick")
    assert found.returncode == 0, found.stderr
    for text in ("Pendulum-v1, 2 seeds", "renormalization | jbn", "| act, one"):
        assert text in found.stdout


@pytest.mark.slow
def test_every_norm_learns_from_a_long_tail():
    """Every part of the script, with few steps; nothing is written."""
    found = run("benchmarks/long_tail.py", "--quick")
    assert found.returncode == 0, found.stderr
    for text in (
        "| digits | logits | recalibrated |",
        "| digits | adjusted logits | soft domains, tau |",
        "| digits | adjusted loss | batch norm |",
    ):
        assert text in found.stdout


@pytest.mark.slow
def test_graphs_of_a_file_are_classified_with_each_norm(tmp_path: Path):
    """Every part of the script, with few steps, on rings and chains without tags."""
    lines = ["40"]
    for i in range(40):
        size, ring = 3 + i % 7, i % 2
        lines.append(f"{size} {ring}")
        for k in range(size):
            near = [j for j in (k - 1, k + 1) if ring or 0 <= j < size]
            lines.append(" ".join(map(str, [0, len(near), *(j % size for j in near)])))
    (tmp_path / "shapes.txt").write_text("\n".join(lines))
    found = run("benchmarks/graphs.py", "--quick", f"--data={tmp_path}")
    assert found.returncode == 0, found.stderr
    cells = [line.strip("| ").split(" | ") for line in found.stdout.splitlines()]
    rows = [row[1:] for row in cells if row[0] == "shapes"]
    methods = "no mask", "masked", "by graph", "graph norm", "layer norm", "none"
    accuracy = {method: float(test) for method, test, *_ in rows[:6]}
    padding = {method: float(change) for method, *_, change in rows[6:]}
    assert tuple(accuracy) == tuple(padding) == methods
    assert accuracy["masked"] > 75
    assert padding.pop("no mask") > 1e-3
    assert max(padding.values()) < 1e-4


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="no GPU compiler: pip install --no-deps, as `benchmarks/gpu_passes.py` says",
)
def test_on_a_gpu_no_more_is_read_and_written_than_must_be():
    """As compiled for an H200, that is not there."""
    found = run("benchmarks/gpu_passes.py")
    assert found.returncode == 0, found.stderr
    rows = [line.strip("| ").split(" | ") for line in found.stdout.splitlines()[2:]]
    assert len(rows) == 3
    for _, forward, training, *_, least_forward, least_training in rows:
        assert float(forward) <= float(least_forward) + 0.05
        assert float(training) <= float(least_training) + 0.05
