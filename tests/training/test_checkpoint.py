"""Checkpoints: what is kept, and that it comes back to the last bit."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from jbn.models import MLP
from jbn.training.checkpoint import Checkpoints
from jbn.training.executor import Executor
from jbn.training.state import TrainState, create_state


@pytest.fixture
def state() -> TrainState:
    return create_state(MLP(features=(3,)), optax.adam(1e-3), (2, 2, 1), seed=1)


def test_keeps_the_last_and_the_best(tmp_path: Path, state: TrainState):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.last_epoch is None
        assert checkpoints.describe() == "There is no checkpoint yet."
        for epoch, accuracy in enumerate([0.5, 0.9, 0.7, 0.8], start=1):
            step = np.int32(10 * epoch)
            new = TrainState(step, state.params, state.batch_stats, state.opt_state)
            checkpoints.save(epoch, new, accuracy)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}
    with Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.last_epoch, checkpoints.best_epoch) == (4, 2)
        assert str(tmp_path / "4") in checkpoints.describe()
        for epoch in (2, 4):
            assert checkpoints.restore(epoch, state).step == 10 * epoch


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_comes_back_to_the_last_bit(tmp_path: Path, state: TrainState, parallel: str):
    executor = Executor(jax.devices()[:2], parallel)  # pyright: ignore
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, executor.put(state), 0.5)
        like = jax.tree.map(np.zeros_like, jax.device_get(state))
        restored = checkpoints.restore(1, like)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, jax.device_get(state))
