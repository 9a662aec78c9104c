"""The training step and the evaluation step: pure functions of state and batch.

A batch is a dict of `image`, `label` and `weight`. Rows of weight zero only fill it up:
they take no part in the loss, the gradient, the metrics or the batch statistics. A
batch of nothing but such rows leaves the state as it was.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jbn.training.state import TrainState


Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the one training step, whichever way it is then run.

    With an `axis_name`, `batch` is one device's share of the rows, and sums go over all
    the devices. The loss is

        loss = sum(weight * cross_entropy) / sum(weight)

    over the rows of all devices, so that it does not matter how they are shared out.

    Args:
        model: Called with images, `train` and `mask`. Its norm layers must take their
            statistics over `axis_name` too.
        optimizer: Turns gradients into updates.
        axis_name: The mapped axis over the devices, or `None` if `batch` holds all the
            rows (under plain `jit`, sharded or not).

    Returns:
        The function `(state, batch) -> (state, metrics)`. The metrics are the `loss`,
        the number of right answers, `correct`, and the sum of the weights, `weight`,
        over all the rows of all devices.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weight = batch["weight"]
        total = _sum(weight, axis_name)

        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                batch["image"],
                train=True,
                mask=weight > 0,
                mutable=["batch_stats"],
            )
            loss = _weighted_loss(logits, batch, total, axis_name)
            return loss, (logits, updated.get("batch_stats", {}))

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (logits, batch_stats)), grads = gradient(state.params)
        if axis_name is not None:
            # The loss is already the sum over the devices, and under pmap its gradient
            # with respect to this device's copy of the parameters counts each of them:
            # the mean of these gradients is the gradient of the loss.
            grads = lax.pmean(grads, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        new_state = jax.tree.map(
            lambda new, old: jnp.where(total > 0, new, old), new_state, state
        )
        correct = _num_correct(logits, batch, axis_name)
        return new_state, {"loss": loss, "correct": correct, "weight": total}

    return train_step


def make_eval_step(
    model: nn.Module, *, axis_name: str | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the evaluation step, which normalizes by the running statistics.

    Args:
        model: Called with images and `train`.
        axis_name: As for `make_train_step`.

    Returns:
        The function `(state, batch) -> (state, metrics)`, which returns the state as it
        was, and the metrics of `make_train_step`.
    """

    def eval_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits = model.apply(variables, batch["image"], train=False)
        total = _sum(batch["weight"], axis_name)
        loss = _weighted_loss(logits, batch, total, axis_name)
        correct = _num_correct(logits, batch, axis_name)
        return state, {"loss": loss, "correct": correct, "weight": total}

    return eval_step


def _sum(x: jax.Array, axis_name: str | None) -> jax.Array:
    """Sums over the rows of all devices."""
    total = jnp.sum(x)
    return total if axis_name is None else lax.psum(total, axis_name)


def _weighted_loss(
    logits: Any, batch: Batch, total: jax.Array, axis_name: str | None
) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return _sum(batch["weight"] * losses, axis_name) / jnp.where(total > 0, total, 1)


def _num_correct(logits: Any, batch: Batch, axis_name: str | None) -> jax.Array:
    right = jnp.argmax(logits, axis=-1) == batch["label"]
    return _sum(jnp.where(right, batch["weight"], 0), axis_name)
