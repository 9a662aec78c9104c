"""All that changes during training, as one frozen pytree."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The number of steps taken, the variables of the model, the optimizer's state.

    The fields are arrays, or pytrees of arrays; or of whatever a `jax.tree.map` over
    the state makes of them.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: Any


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
) -> TrainState:
    """Initializes the model and the optimizer.

    Args:
        model: Called with images and `train`.
        optimizer: Makes the optimizer's state.
        image_shape: Shape of one image, uint8.
        seed: Everything that is random follows from this.

    Returns:
        The state at step 0.
    """

    @jax.jit
    def create() -> TrainState:
        images = jnp.zeros((1, *image_shape), jnp.uint8)
        variables = model.init(jax.random.key(seed), images, train=False)
        params = variables["params"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            batch_stats=variables.get("batch_stats", {}),
            opt_state=optimizer.init(params),
        )

    return create()
