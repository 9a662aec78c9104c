"""What may import what, what importing costs, and that this test can fail."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


HEAVY = ("flax", "optax", "orbax", "tensorflow", "tensorflow_datasets", "matplotlib")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {name.partition(".")[0] for name in run.stdout.split()}


def test_importing_jbn_loads_jax_and_nothing_heavier():
    loaded = loaded_by(
        "import jbn, jax.numpy as jnp\n"
        "jbn.batch_norm(jnp.ones((2, 3)), *jbn.init(3), use_running_average=False)"
    )
    assert "jax" in loaded
    assert not loaded & set(HEAVY)


def test_the_skins_load_flax_so_the_test_above_can_fail():
    assert "flax" in loaded_by("import jbn; jbn.BatchNorm")
    assert "flax" in loaded_by("import jbn.nnx")


def test_unknown_names_are_attribute_errors():
    import jbn

    with pytest.raises(AttributeError, match="no attribute 'BatchNrom'"):
        jbn.BatchNrom  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def drawn(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "docs" / "layers.py"), "--check"]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_picture_of_the_layers_is_that_of_the_contract(tmp_path: Path):
    assert drawn(ROOT).returncode == 0
    (tmp_path / "docs").mkdir()
    for name in ("docs/layers.py", "docs/layers.svg", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("train.py", "jbn"):
        (tmp_path / name).symlink_to(ROOT / name)
    project = tmp_path / "pyproject.toml"
    swapped = project.read_text().replace('"jbn.ops",\n    "jbn.axes"', '"jbn.ops"', 1)
    project.write_text(swapped)
    found = drawn(tmp_path)
    assert found.returncode == 1
    assert "out of date" in found.stderr


def test_the_map_in_contributing_is_that_of_the_contract():
    """Line by line, the names in their order."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = content["tool"]["importlinter"]["contracts"][0]["layers"]
    text = (ROOT / "CONTRIBUTING.md").read_text()
    drawing = re.search(r"    train\.py -> .*?\n\n", text, re.DOTALL)
    assert drawing
    names = re.findall(r"\w+", drawing[0].replace("train.py", ""))
    layers = [
        name.removeprefix("jbn.") for line in contract for name in line.split(" | ")
    ]
    assert names == [name for name in layers if name != "__main__"]
