"""All that changes during training, as one frozen pytree."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The number of steps taken, the variables of the model, the optimizer's state.

    The fields are arrays, or pytrees of arrays; or of whatever a `jax.tree.map` over
    the state makes of them.

    Attributes:
        step: Batches seen. It counts those that were skipped for not being finite, so
            that it says where in the data the run is.
        params: Parameters.
        batch_stats: Running statistics.
        opt_state: The optimizer's state.
        average: `{}`, or an average over the steps: its `params`, and the `batch_stats`
            that belong to them.
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
        """Replaces what `variables` is."""
        if self.average:
            return dataclasses.replace(self, average=variables)
        return dataclasses.replace(self, **variables)
