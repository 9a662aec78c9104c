"""Variables and steps of small networks, for the tests of several."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def images(rng, *shape):
    return jnp.asarray(rng.normal(size=shape or (4, 8, 8, 3)), jnp.float32)


def shapes_of(model, *shape):
    """Of the variables; nothing is compiled."""
    x = jnp.zeros(shape or (1, 8, 8, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))


def make(rng, model):
    """Variables without the zeros and ones that hide what they multiply."""

    def fill(path, leaf):
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        fan_in = np.prod(leaf.shape[:-1], initial=4)
        value = rng.normal(size=leaf.shape) * (2 / fan_in) ** 0.5
        return jnp.asarray(value, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes_of(model))


def train(model, variables, x, mask=None) -> Any:
    step = partial(model.apply, train=True, mutable=["batch_stats"])
    return jax.jit(lambda v, x, mask: step(v, x, mask=mask))(variables, x, mask)
