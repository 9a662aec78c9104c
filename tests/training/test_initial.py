"""Weights from elsewhere: what is taken, what is left out, what is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import optax
import pytest

from jbn.models import MLP
from jbn.training.config import Config
from jbn.training.errors import UsageError
from jbn.training.initial import initialize_from
from jbn.training.state import TrainState
from jbn.training.step import create_state
from jbn.training.tasks import Supervised


def make(classes: int = 2, *, seed: int = 0, averaged: bool = False) -> TrainState:
    task = Supervised(
        kind="classification",
        model=MLP(features=(3,), num_classes=classes),
        image_shape=(2, 2, 1),
        num_classes=classes,
        optimizer=optax.adam(1e-3),
    )
    return jax.device_get(create_state(task, seed, averaged=averaged))


def saved(path: Path, state: TrainState) -> Path:
    """A file as `jbn fold` writes it."""
    if path.suffix == ".npz":
        flat: Any = flax.traverse_util.flatten_dict(state.variables, sep="/")
        np.savez(path, allow_pickle=False, **flat)
    else:
        path.write_bytes(flax.serialization.msgpack_serialize(state.variables))
    return path


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("name", ["old.npz", "old.msgpack"])
def test_variables_are_those_of_the_file(tmp_path: Path, name: str, averaged: bool):
    old, new = make(seed=1), make(seed=2, averaged=averaged)
    config = Config(init_from=saved(tmp_path / name, old))
    found = initialize_from(config, new)
    jax.tree.map(np.testing.assert_array_equal, found.variables, old.variables)
    jax.tree.map(np.testing.assert_array_equal, found.params, old.params)
    jax.tree.map(np.testing.assert_array_equal, found.opt_state, new.opt_state)
    assert bool(found.average) == averaged
    assert jax.tree.structure(found) == jax.tree.structure(new)


def test_another_head(tmp_path: Path):
    old, new = make(seed=1), make(5, seed=2)
    config = Config(init_from=saved(tmp_path / "old.npz", old))
    match = r"has params/Dense_1/bias of shape \(2,\).*\(5,\).*--init-skip='Dense_1/\*'"
    with pytest.raises(UsageError, match=match):
        initialize_from(config, new)
    config = dataclasses.replace(config, init_skip="Dense_1/*")
    params = initialize_from(config, new).params
    equal = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    equal(params["Dense_0"], old.params["Dense_0"])
    equal(params["Dense_1"], new.params["Dense_1"])


def test_what_cannot_be_used(tmp_path: Path):
    old, new = make(seed=1), make(seed=2)
    part = dataclasses.replace(old, batch_stats={})
    more = dataclasses.replace(
        old, params={**old.params, "Dense_7": {"bias": np.ones(2)}}
    )
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "text.txt").write_text("no arrays")
    for source, match in (
        (saved(tmp_path / "part.npz", part), "has no batch_stats/BatchNorm_0/mean"),
        (saved(tmp_path / "more.npz", more), "another model: it has params/Dense_7/bi"),
        (tmp_path / "text.npz", "text.npz cannot be read"),
        (tmp_path / "text.txt", "is not an .npz or .msgpack"),
        (tmp_path / "nothing.npz", "nothing.npz cannot be read"),
        (tmp_path / "nothing", "nothing does not exist"),
        (tmp_path, "is not a run: it has no config.json"),
    ):
        with pytest.raises(UsageError, match=match):
            initialize_from(Config(init_from=source), new)
    config = Config(init_from=saved(tmp_path / "old.npz", old), init_skip="head/*")
    with pytest.raises(UsageError, match=r"matches no layer.* BatchNorm_0, Dense_0"):
        initialize_from(config, new)
    # A layer of the source alone is left out, too.
    config = Config(init_from=tmp_path / "more.npz", init_skip="Dense_7/*")
    equal = np.testing.assert_array_equal
    jax.tree.map(equal, initialize_from(config, new).params, old.params)
