"""Statistics of sbx's `BatchRenorm`, by a layer that keeps them as it does."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jbn.linen
from jbn.tools import from_sbx, to_sbx


def critics(mapped):
    """Ours, with the names of sbx's critic: one, or two that are mapped over."""

    class Critic(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for _ in range(2):
                x = nn.Dense(3)(x)
                norm = jbn.linen.BatchRenorm(warmup_steps=10, epsilon=1e-3)
                x = norm(x, use_running_average=not train)
            return x

    if not mapped:
        return Critic()
    axes = {"params": 0, "batch_stats": 0}
    split = {"params": True}
    options: Any = {"variable_axes": axes, "split_rngs": split, "axis_size": 2}
    options["in_axes"] = None, None
    return nn.vmap(Critic, **options)()


@pytest.mark.parametrize("mapped", [False, True])
def test_both_ways(rng, mapped):
    x = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    critic = critics(mapped)
    variables = critic.init(jax.random.key(0), x, False)
    for _ in range(3):
        _, new = critic.apply(variables, x, True, mutable=["batch_stats"])
        variables = {**variables, **new}
    theirs = to_sbx(variables, r_max=2, d_max=4)
    node = theirs["batch_stats"]["BatchRenorm_1"]
    assert set(node) == {"mean", "var", "r_max", "d_max", "steps"}
    shape = (2,) if mapped else ()
    np.testing.assert_array_equal(node["steps"], np.full(shape, 3))
    np.testing.assert_array_equal(node["r_max"], np.full(shape, 2))
    np.testing.assert_array_equal(node["d_max"], np.full(shape, 4))
    back = from_sbx(theirs)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    np.testing.assert_array_equal(
        critic.apply(back, x, False), critic.apply(variables, x, False)
    )


def test_nothing_of_sbx_is_an_error():
    stats = {"norm": {"mean": 0.0, "var": 1.0}}
    with pytest.raises(ValueError, match=r"`from_sbx` found no layer with .*`steps`"):
        from_sbx({"batch_stats": stats})
    with pytest.raises(ValueError, match=r"`to_sbx` found no layer with .*`step`"):
        to_sbx({"batch_stats": stats})
