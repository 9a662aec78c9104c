"""Stops a run after too many non-finite steps."""

from collections.abc import Callable, Mapping

import numpy as np

from jbn.training.errors import NonFiniteLossError


_REASONS = {
    1: "the loss was not finite",
    2: "a parameter, a statistic or the optimizer's state would not have been finite",
}


class Guard:
    """Counts steps that were skipped.

    Args:
        most: Number of skipped steps in a row that is allowed.
        steps_per_epoch: For the message.
        describe: Returns a sentence about checkpoints that can be loaded.
    """

    def __init__(
        self, most: int, steps_per_epoch: int, describe: Callable[[], str]
    ) -> None:
        self._most, self._steps, self._describe = most, steps_per_epoch, describe
        self._in_a_row = 0

    def check(self, metrics: Mapping[str, np.ndarray], done: int) -> None:
        """Checks further steps.

        Args:
            metrics: Metrics with `skipped`, one entry per step.
            done: Steps before them.

        Raises:
            NonFiniteLossError: If too many in a row were skipped.
        """
        for step, reason in enumerate(metrics["skipped"], start=done + 1):
            self._in_a_row = self._in_a_row + 1 if reason else 0
            if self._in_a_row > self._most:
                raise NonFiniteLossError(
                    f"{self._in_a_row} steps in a row were skipped, up to step {step}, "
                    f"in epoch {(step - 1) // self._steps + 1}: in the last, "
                    f"{_REASONS[int(reason)]}. Check the data, or try a smaller "
                    f"--learning-rate, or --clip-norm. {self._describe()}"
                )

    def check_test(self, metrics: Mapping[str, float], done: int) -> None:
        """Checks an evaluation.

        Args:
            metrics: By name.
            done: Steps before it.

        Raises:
            NonFiniteLossError: If one of them is not finite.
        """
        for name, value in metrics.items():
            if not np.isfinite(value):
                raise NonFiniteLossError(
                    f"The test {name} is {value} after step {done}, in epoch "
                    f"{(done - 1) // self._steps + 1}. {self._describe()}"
                )
