"""The plan of an epoch: every row once, and the rest without weight."""

import numpy as np
import pytest

from jbn.training.batches import chunks, permutation, plan_epoch


@pytest.mark.parametrize("num_rows", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("multiple", [1, 3, 8])
def test_every_row_has_weight_once(num_rows: int, multiple: int):
    plan = plan_epoch(np.arange(num_rows)[::-1], 16, multiple=multiple)
    assert plan.indices.shape == plan.weights.shape
    assert plan.indices.shape[1] % multiple == 0
    np.testing.assert_array_equal(
        plan.indices[plan.weights == 1], np.arange(num_rows)[::-1]
    )
    assert set(np.unique(plan.weights)) <= {0, 1}
    assert (plan.weights.sum(axis=1) <= 16).all()


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 100])
def test_chunks_are_equally_long_and_together_the_plan(max_steps: int):
    plan = plan_epoch(np.arange(70), 8, multiple=1)
    parts = list(chunks(plan, max_steps))
    assert len({part.indices.shape for part in parts}) == 1
    assert all(len(part.indices) <= max_steps for part in parts)
    weights = np.concatenate([part.weights for part in parts])
    indices = np.concatenate([part.indices for part in parts])
    np.testing.assert_array_equal(weights[:9], plan.weights)
    np.testing.assert_array_equal(indices[:9], plan.indices)
    assert not weights[9:].any()
    assert len(weights) - 9 < len(parts)
    assert sum(part.num_steps for part in parts) == plan.num_steps == 9


def test_order_follows_from_seed_and_epoch():
    order = permutation(1, 2, 50)
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
    np.testing.assert_array_equal(order, permutation(1, 2, 50))
    for seed, epoch in [(1, 3), (2, 2), (2, 1)]:
        assert not np.array_equal(order, permutation(seed, epoch, 50))
