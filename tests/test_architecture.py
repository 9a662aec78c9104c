"""What may import what, what importing costs, and that this test can fail."""

import subprocess
import sys

import pytest


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
