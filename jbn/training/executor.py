"""Runs a step on the devices of one or several processes, many times per dispatch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jbn.training.devices import Device
from jbn.training.state import TrainState
from jbn.training.step import Batch, Metrics, Step


_AXIS = "batch"
Batches = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Executor:
    """Distributes the rows of each batch over `devices`, by `pmap` or `jit`.

    Device `i` of `n` gets the `i`-th of `n` equal parts of the rows.

    Attributes:
        devices: The devices of all processes, ordered by process.
        parallel: `pmap` maps the step over a named axis, over which the step has to
            sum; `jit` gives the compiler the whole batch, sharded.
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

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec())

    @property
    def _by_row(self) -> NamedSharding:
        return NamedSharding(self._mesh, PartitionSpec(None, _AXIS))

    @property
    def num_local(self) -> int:
        """The number of devices of this process."""
        return len(self._local)

    @property
    def _local(self) -> list[int]:
        here = jax.process_index()
        return [i for i, d in enumerate(self.devices) if d.process_index == here]

    def share(self, num_rows: int) -> slice:
        """The rows of a batch that belong to this process."""
        part = num_rows // len(self.devices)
        return slice(part * self._local[0], part * (self._local[-1] + 1))

    def put(self, tree: Any) -> Any:
        """Replicates NumPy arrays, or arrays of this executor, on all devices."""
        return jax.device_put(self.get(tree), self._everywhere)

    def get(self, tree: Any) -> Any:
        """Copies a replicated pytree to NumPy arrays."""
        first = lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x
        return jax.device_get(jax.tree.map(first, tree))

    def put_rows(self, batch: Batches) -> dict[str, jax.Array]:
        """Shards one batch for plain `jit`, given the rows of this process."""
        by_row = NamedSharding(self._mesh, PartitionSpec(_AXIS))
        return {
            name: jax.make_array_from_process_local_data(by_row, x)
            for name, x in batch.items()
        }

    def train(self, step: Step) -> Callable[[TrainState, Any], Any]:
        """Compiles the training step, repeated over batches.

        Args:
            step: The function `(state, batch) -> (state, metrics)`, made with this
                executor's `axis_name`.

        Returns:
            The function `(state, batches) -> (state, metrics)`. `state` comes from
            `put`, and is donated; `batches` come from `put_batches`; each metric has
            one entry per step. The function does not wait for its results.
        """
        compiled = self._compile(functools.partial(_repeat, step), donate=True)
        return self._on_mesh(compiled)

    def evaluate(
        self, step: Callable[[Any, Batch], Metrics]
    ) -> Callable[[Any, Any], dict[str, Any]]:
        """Compiles an evaluation, summed over batches.

        Args:
            step: The function `(variables, batch) -> sums`.

        Returns:
            The function `(variables, batches) -> sums`, as for `train`.
        """

        def run(variables: Any, batches: Batch) -> tuple[Any, Metrics]:
            each = lambda batch: step(variables, batch)
            shapes = jax.eval_shape(each, jax.tree.map(lambda x: x[0], batches))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            def body(sums: Metrics, batch: Batch) -> tuple[Metrics, None]:
                return jax.tree.map(jnp.add, sums, each(batch)), None

            return variables, _repeat(body, zeros, batches)[0]

        compiled = self._on_mesh(self._compile(run, donate=False))
        return lambda variables, batches: compiled(variables, batches)[1]

    def lower(self, step: Step, state: Any, batch: Mapping[str, Any]) -> Any:
        """Lowers one training step, for devices that need not be present.

        Args:
            step: As for `train`.
            state: Shapes and dtypes of the state.
            batch: Shapes and dtypes of a batch, with the rows of all devices.

        Returns:
            A `jax.stages.Lowered`.
        """

        def stacked(x: Any) -> Any:
            shape = (1, *x.shape)
            if self.parallel == "pmap":
                count = len(self.devices)
                shape = (1, count, x.shape[0] // count, *x.shape[1:])
            return jax.ShapeDtypeStruct(shape, x.dtype)

        batches = {name: stacked(x) for name, x in batch.items()}
        compiled = self._compile(functools.partial(_repeat, step), donate=True)
        with jax.set_mesh(self._mesh):
            return compiled.lower(state, batches)

    def _on_mesh(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """Calls a function under the mesh, where norm layers find the device count."""

        def call(*args: Any) -> Any:
            with jax.set_mesh(self._mesh):
                return compiled(*args)

        return compiled if self.parallel == "pmap" else call

    def _compile(self, run: Callable[..., Any], *, donate: bool) -> Any:
        donated = (0,) if donate else ()
        if self.parallel == "pmap":
            return jax.pmap(
                run,
                axis_name=_AXIS,
                in_axes=(None, 1),
                out_axes=None,  # type: ignore[arg-type]
                devices=self.devices,
                donate_argnums=donated,
            )
        return jax.jit(
            run,
            in_shardings=(self._everywhere, self._by_row),
            out_shardings=self._everywhere,
            donate_argnums=donated,
        )

    def put_batches(self, batches: Batches) -> dict[str, Any]:
        """Shards several batches, given this process's rows: (steps, rows, ...)."""
        if self.parallel == "pmap":
            count = self.num_local
            return {
                name: x.reshape(len(x), count, x.shape[1] // count, *x.shape[2:])
                for name, x in batches.items()
            }
        return {
            name: jax.make_array_from_process_local_data(self._by_row, x)
            for name, x in batches.items()
        }


def _repeat(step: Callable[..., Any], carry: Any, batches: Batch) -> tuple[Any, Any]:
    """`lax.scan`, but without a loop for a single step.

    XLA's convolutions on CPU are ten times slower inside a loop.
    """
    if jax.tree.leaves(batches)[0].shape[0] > 1:
        return lax.scan(step, carry, batches)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], batches))
    return carry, jax.tree.map(lambda x: x[None], out)
