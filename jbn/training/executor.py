"""Runs a step on one or several devices, many times in each dispatch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jbn.training.batches import Plan
from jbn.training.data import Split
from jbn.training.devices import Device
from jbn.training.state import TrainState
from jbn.training.step import Metrics


_AXIS = "batch"
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Run = Callable[[TrainState, Any, Plan], tuple[TrainState, dict[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Executor:
    """Shares out the rows of each batch over `devices`, in one of two ways.

    Attributes:
        devices: Those to run on.
        parallel: `pmap` maps the step over a named axis, over which the step itself
            takes its sums; `jit` gives the compiler the whole batch, sharded.
    """

    devices: Sequence[Device]
    parallel: Literal["pmap", "jit"]

    @property
    def axis_name(self) -> str | None:
        """The named axis, for the step and for the norm layers; `None` for jit."""
        return _AXIS if self.parallel == "pmap" else None

    @property
    def _mesh(self) -> Mesh:
        return Mesh(np.asarray(self.devices), (_AXIS,), axis_types=(AxisType.Auto,))

    def put(self, tree: Any) -> Any:
        """Copies a pytree to every device."""
        return jax.device_put(tree, NamedSharding(self._mesh, PartitionSpec()))

    def put_split(self, split: Split) -> Any:
        """Copies a split of a data set to every device, as uint8 and int32."""
        return self.put({"image": split.image, "label": split.label})

    def compile(self, step: Step, *, donate: bool) -> Run:
        """Compiles `step`, repeated over the batches of a plan.

        Args:
            step: The function `(state, batch) -> (state, metrics)`, made with this
                executor's `axis_name`.
            donate: Whether the state that goes in may be overwritten.

        Returns:
            The function `(state, data, plan) -> (state, metrics)`, where `state` and
            `data` come from `put` and `put_split`, and each metric is an array with one
            entry per batch. It is compiled at the first call with plans of a length.
        """

        def run(
            state: TrainState, data: Any, indices: jax.Array, weights: jax.Array
        ) -> tuple[TrainState, Metrics]:
            def body(
                state: TrainState, rows: tuple[jax.Array, jax.Array]
            ) -> tuple[TrainState, Metrics]:
                index, weight = rows
                batch = jax.tree.map(
                    lambda x: x.at[index].get(mode="promise_in_bounds"), data
                )
                return step(state, {**batch, "weight": weight})

            return lax.scan(body, state, (indices, weights))

        donated = (0,) if donate else ()
        if self.parallel == "pmap":
            compiled: Any = jax.pmap(
                run,
                axis_name=_AXIS,
                in_axes=(None, None, 1, 1),
                out_axes=None,  # type: ignore[arg-type]
                devices=self.devices,
                donate_argnums=donated,
            )
        else:
            everywhere = NamedSharding(self._mesh, PartitionSpec())
            by_row = NamedSharding(self._mesh, PartitionSpec(None, _AXIS))
            compiled = jax.jit(
                run,
                in_shardings=(everywhere, everywhere, by_row, by_row),
                out_shardings=everywhere,
                donate_argnums=donated,
            )

        def call(
            state: TrainState, data: Any, plan: Plan
        ) -> tuple[TrainState, dict[str, np.ndarray]]:
            indices, weights = plan.indices, plan.weights
            if self.parallel == "pmap":
                shape = (len(indices), len(self.devices), -1)
                indices, weights = indices.reshape(shape), weights.reshape(shape)
            state, metrics = compiled(state, data, indices, weights)
            return state, jax.device_get(metrics)

        return call
