"""The training step: a pure function of state and batch, whatever is trained.

A batch is a dict of arrays with one row per example: `image`, uint8; `weight`; `index`,
the row of the data set; and further arrays of the task. Rows of weight zero are
padding: they do not affect the loss, the gradient, the metrics or the batch statistics.
A batch with only such rows does not change the state.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jbn
from jbn.training.state import TrainState


Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Objective = Callable[[Any, Any, Batch], tuple[jax.Array, tuple[Any, Metrics]]]


@runtime_checkable
class Updates(Protocol):
    """The part of a task that the step uses (see `tasks`)."""

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes `params`, `batch_stats` and `opt_state`."""
        ...

    def update(
        self, state: TrainState, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """Updates them with a batch."""
        ...


def create_state(task: Updates, seed: int, *, averaged: bool = False) -> TrainState:
    """Initializes the model and the optimizer.

    Args:
        task: The task.
        seed: Everything that is random follows from this.
        averaged: Whether to keep an average over the steps.

    Returns:
        The state at step 0.
    """

    @jax.jit
    def create() -> TrainState:
        state = TrainState(
            step=jnp.zeros((), jnp.int32), **task.init(jax.random.key(seed))
        )
        if not averaged:
            return state
        # A copy: a buffer cannot be donated twice.
        copy = lambda tree: jax.tree.map(jnp.array, tree)
        return dataclasses.replace(state, average=copy(state.variables))

    return create()


def initialize(task: Updates, seed: int, *, averaged: bool = False) -> TrainState:
    """`create_state`, compiled for a single use; do not trace it.

    With reduced effort, XLA on CPU computes the same numbers, and compiles a U-Net in
    two seconds instead of nine.
    """
    on_cpu = jax.default_backend() == "cpu"
    create = jax.jit(
        functools.partial(create_state, task, seed, averaged=averaged),
        compiler_options={"xla_backend_optimization_level": 1} if on_cpu else None,
    )
    return create()


def make_train_step(
    task: Updates, *, seed: int = 0, ema_decay: float | None = None
) -> Step:
    """Makes the training step, the same for every way to run it.

    With the task's `axis_name`, `batch` is one device's share of the rows, and sums are
    over all devices. A step with a non-finite result is skipped entirely: parameters,
    statistics, optimizer and average do not change.

    Args:
        task: The task.
        seed: Random numbers in a step only depend on this, the number of the step, and
            the rows of the data set.
        ema_decay: Decay of the average of the parameters. It is limited to
            `(1 + step) / (10 + step)`, so that the average soon forgets the initial
            parameters.

    Returns:
        The function `(state, batch) -> (state, metrics)`. The metrics are sums over all
        rows of all devices: those of the task, and `skipped`: 1 if the `loss` was not
        finite, 2 if anything else was not. Those of a skipped step are 0.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        new, metrics = task.update(state, batch, key)
        if ema_decay is not None:
            done = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + done) / (10 + done))
            params = optax.incremental_update(
                new.params, state.average["params"], 1 - decay
            )
            average = {**state.average, "params": params}
            new = dataclasses.replace(new, average=average)

        finite_loss = jnp.isfinite(metrics["loss"])
        finite = finite_loss & _all_finite(new)
        seen = metrics["weight"] > 0
        new = jax.tree.map(lambda n, o: jnp.where(seen & finite, n, o), new, state)
        new = dataclasses.replace(new, step=jnp.where(seen, state.step + 1, state.step))
        zeroed = lambda v: jnp.where(finite, v, jnp.zeros_like(v))
        metrics = jax.tree.map(zeroed, metrics)
        reason = jnp.where(finite, 0, jnp.where(finite_loss, 2, 1))
        return new, {**metrics, "skipped": jnp.where(seen, reason, 0)}

    return train_step


def without_padding(step: Step) -> Step:
    """The step for batches in which every row has weight one.

    The weights are constants of this program, so XLA leaves the masks out, which take a
    ResNet on a CPU a seventh of its time.
    """

    def full_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return step(state, {**batch, "weight": jnp.ones_like(batch["weight"])})

    return full_step


def gradient(
    objective: Objective,
    params: Any,
    batch_stats: Any,
    batch: Batch,
    *,
    axis_name: str | None,
    microbatches: int = 1,
    momentum: float | None = None,
) -> tuple[Any, Any, Metrics]:
    """The gradient of a loss that is a sum over the rows of all devices.

    Args:
        objective: The function of parameters, running statistics and a batch that
            returns the loss, already summed over the devices, and as auxiliary output
            the new statistics and metrics.
        params: Parameters.
        batch_stats: Running statistics.
        batch: The batch, or one device's share of it.
        axis_name: The mapped axis over the devices, if there is one.
        microbatches: Number of parts of the batch, processed one after the other to
            save memory. Each is normalized separately, and norm layers must collect
            moments (`accumulate=True`).
        momentum: With several microbatches, the momentum of the single update of the
            running statistics.

    Returns:
        The gradient, the new statistics, and the metrics.
    """
    differentiate = jax.value_and_grad(objective, has_aux=True)
    if microbatches == 1:
        (_, (batch_stats, metrics)), grads = differentiate(params, batch_stats, batch)
    else:

        def body(carry: Any, part: Batch) -> tuple[Any, None]:
            stats, sums = carry
            (_, (stats, metrics)), grads = differentiate(params, stats, part)
            return (stats, jax.tree.map(jnp.add, sums, (grads, metrics))), None

        def first(part: Batch) -> Any:
            (_, (_, metrics)), grads = differentiate(params, batch_stats, part)
            return grads, metrics

        # Every k-th row: contiguous blocks would move rows between devices.
        parts = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0),
            batch,
        )
        shapes = jax.eval_shape(first, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (batch_stats, (grads, metrics)), _ = lax.scan(body, (batch_stats, zeros), parts)
        batch_stats = jbn.commit(batch_stats, momentum=momentum)
    if axis_name is not None:
        # The loss is already summed over the devices, so under pmap each device's
        # gradient with respect to its own copy of the parameters includes all of them:
        # the mean of these gradients is the gradient of the loss.
        grads = lax.pmean(grads, axis_name)
    return grads, batch_stats, metrics


def descend(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any]:
    """The new parameters and the new optimizer state."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def sum_rows(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Sums all elements, over all devices."""
    total = jnp.sum(x)
    return total if axis_name is None else lax.psum(total, axis_name)


def by_row(key: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
    """A key for each row, independent of the device."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])


def _all_finite(tree: Any) -> jax.Array:
    # A parameter and its moments have the same shape: one reduction per shape needs a
    # third of the reductions per array, which XLA compiles and runs one by one.
    finite: dict[tuple[int, ...], jax.Array] = {}
    for x in jax.tree.leaves(tree):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            finite[x.shape] = finite.get(x.shape, True) & jnp.isfinite(x)
    return jnp.all(jnp.stack([jnp.all(x) for x in finite.values()]))
