"""The plan of an epoch: every row once, and the rest without weight."""

import numpy as np
import pytest

from jbn.training.batches import chunk_length, chunks, permutation, plan_epoch


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


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 100])
def test_chunks_are_equally_long_and_together_the_plan(length: int):
    plan = plan_epoch(np.arange(1, 71), 8, multiple=1)
    parts = list(chunks(plan, length))
    assert {part.indices.shape for part in parts} == {(length, 8)}
    assert {part.weights.shape for part in parts} == {(length, 8)}
    weights = np.concatenate([part.weights for part in parts])
    indices = np.concatenate([part.indices for part in parts])
    np.testing.assert_array_equal(weights[:9], plan.weights)
    np.testing.assert_array_equal(indices[:9], plan.indices)
    assert not weights[9:].any()
    assert not indices[9:].any()
    assert len(weights) - 9 < length
    assert sum(part.num_steps for part in parts) == plan.num_steps == 9
    # The steps that only fill up come last.
    assert all(part.num_steps == length for part in parts[:-1])


@pytest.mark.parametrize("num_steps", [1, 2, 23, 24, 97])
@pytest.mark.parametrize("max_steps", [1, 2, 5, 23, 256])
def test_chunk_length_is_the_shortest_for_the_fewest_chunks(
    num_steps: int, max_steps: int
):
    length = chunk_length(num_steps, max_steps)
    fewest = -(-num_steps // max_steps)
    shortest = next(n for n in range(1, max_steps + 1) if n * fewest >= num_steps)
    assert length == shortest


def test_parts_of_a_plan():
    plan = plan_epoch(np.arange(1, 23), 8, multiple=4)  # 8, 8 and 6 rows.
    assert (plan.num_steps, plan.num_rows) == (3, 8)
    rest = plan.part(1, 9)
    assert rest.num_steps == 2
    np.testing.assert_array_equal(rest.indices, plan.indices[1:])
    np.testing.assert_array_equal(rest.weights, plan.weights[1:])
    assert plan.part(3, 9).num_steps == 0
    right = plan.columns(slice(4, 8))
    assert right.num_rows == 4
    np.testing.assert_array_equal(
        right.indices, [[5, 6, 7, 8], [13, 14, 15, 16], [21, 22, 0, 0]]
    )
    np.testing.assert_array_equal(right.weights[2], [1, 1, 0, 0])


def test_order_follows_from_seed_and_epoch():
    order = permutation(1, 2, 50)
    np.testing.assert_array_equal(np.sort(order), np.arange(50))
    np.testing.assert_array_equal(order, permutation(1, 2, 50))
    for seed, epoch in [(1, 3), (2, 2), (2, 1)]:
        assert not np.array_equal(order, permutation(seed, epoch, 50))
