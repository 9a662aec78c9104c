"""The guard: what it lets pass, and what it says when it does not."""

import numpy as np
import pytest

from jbn.training.errors import NonFiniteLossError
from jbn.training.guard import Guard


def make(most: int) -> Guard:
    return Guard(most, 10, lambda: "The last checkpoint is there.")


def skipped(*reasons: int) -> dict[str, np.ndarray]:
    return {"skipped": np.array(reasons)}


def test_as_many_in_a_row_as_allowed():
    guard = make(2)
    guard.check(skipped(1, 2, 0, 1), 0)
    guard.check(skipped(2, 0, 1, 1), 4)  # A row of two across the two calls.
    guard.check(skipped(0), 8)
    guard.check(skipped(*[0, 1] * 50), 9)


@pytest.mark.parametrize(
    ("reason", "text"),
    [(1, "the loss was not finite"), (2, "a parameter, a statistic or the optimizer")],
)
def test_one_more(reason: int, text: str):
    guard = make(2)
    guard.check(skipped(0, 0, 0, 0, 0, 0, 0, 3 - reason), 2)
    with pytest.raises(NonFiniteLossError) as raised:
        guard.check(skipped(3 - reason, reason, 0, 0), 10)
    message = str(raised.value)
    assert "3 steps in a row were skipped, up to step 12, in epoch 2: " in message
    assert text in message
    assert message.endswith("The last checkpoint is there.")


def test_none_allowed():
    with pytest.raises(NonFiniteLossError, match="up to step 20, in epoch 2"):
        make(0).check(skipped(1), 19)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_test_metrics(value: float):
    guard = make(5)
    guard.check_test({"loss": 1.0, "accuracy": 0.0}, 10)
    match = rf"The test loss is {value} after step 20, in epoch 2\. The last checkpoint"
    with pytest.raises(NonFiniteLossError, match=match):
        guard.check_test({"accuracy": 0.5, "loss": value}, 20)
