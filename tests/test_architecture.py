"""What may import what, what importing costs, and that this test can fail."""

import importlib
import pkgutil
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
    assert not loaded & {"equinox", *HEAVY}


def test_the_skins_load_flax_so_the_test_above_can_fail():
    assert "flax" in loaded_by("import jbn; jbn.BatchNorm")
    assert "flax" in loaded_by("import jbn.nnx")


def test_equinox_needs_no_flax():
    loaded = loaded_by("import jbn.equinox")
    assert "equinox" in loaded
    assert "flax" not in loaded


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
    layers = project.read_text()
    shorter = layers.replace('"jbn.ops",\n    "jbn.lowering"', '"jbn.ops"', 1)
    assert shorter != layers
    project.write_text(shorter)
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


def shared_names(root: str) -> list[str]:
    """Dotted names of modules that are those of something else in a package, too."""
    found = []
    path = importlib.import_module(root).__path__
    for info in pkgutil.walk_packages(path, f"{root}."):
        package, _, name = info.name.rpartition(".")
        # This may import the module, on first use.
        attribute = getattr(importlib.import_module(package), name, None)
        if attribute is not None and attribute is not sys.modules.get(info.name):
            found.append(info.name)
    return found


def test_functions_and_modules_share_no_dotted_name():
    assert shared_names("jbn") == []


def test_a_shared_dotted_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "planted" / "tools"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").write_text(
        "from planted.tools import layers\n"
        "from planted.tools._merge import merge\n"
        "from planted.tools.fold import fold\n"
    )
    for name in ("_merge", "fold", "layers", "unused"):
        (folder / f"{name}.py").write_text(f"def {name.strip('_')}(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert shared_names("planted") == ["planted.tools.fold"]
