"""The training state, as one frozen pytree."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The number of steps, the variables of the model, and the optimizer's state.

    The fields are arrays or pytrees of arrays, or of whatever `jax.tree.map` returns.

    Attributes:
        step: Number of batches, including skipped non-finite steps, so that it gives
            the position in the data.
        params: Parameters.
        batch_stats: Running statistics.
        opt_state: The optimizer's state.
        average: `{}`, or an average over the steps: its `params` and their
            `batch_stats`.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any
    average: Any = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to evaluate: the average, if there is one."""
        if self.average:
            return dict(self.average)
        return {"params": self.params, "batch_stats": self.batch_stats}

    def with_variables(self, variables: dict[str, Any]) -> "TrainState":
        """Replaces `variables`."""
        if self.average:
            return dataclasses.replace(self, average=variables)
        return dataclasses.replace(self, **variables)
