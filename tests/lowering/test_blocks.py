"""`jbn.lowering.blocks`: counts that divide the rows, and short sums."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from jbn.lowering import blocks
from jbn.lowering.late import PLAIN, Target


TARGETS = [
    Target("cpu", 1),
    Target("cpu", 8),
    Target("tpu", 4),
    Target("gpu", 4),
    PLAIN,
]


@pytest.mark.parametrize("target", TARGETS, ids=str)
@hypothesis.given(st.lists(st.integers(1, 20_000), min_size=1, max_size=3))
def test_blocks_divide_the_rows(target, shape):
    """And no block is on two devices."""
    axes = tuple(range(len(shape)))
    shards = blocks.num_shards(target, (*shape, 3), axes)
    counts = blocks.block_counts(target, (*shape, 3), axes, shards)
    assert list(counts) == [*axes]
    assert all(shape[a] % counts[a] == 0 for a in axes)
    assert counts[0] % shards == 0
    assert shards == math.gcd(shape[0], target.shards)


def test_blocks_are_short_where_they_can_be(monkeypatch):
    monkeypatch.setattr("jbn.lowering.cpu._FUSES_SUMS", False)
    for target, longest in ((Target("cpu", 1), 16_384), (PLAIN, 2048)):
        counts = blocks.block_counts(target, (256, 56, 56, 64), (0, 1, 2), 1)
        assert 256 * 56 * 56 / math.prod(counts.values()) <= longest
