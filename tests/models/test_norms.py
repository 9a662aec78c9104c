"""A norm and its activation, in the layer or behind it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from jbn.models.norms import activated


pytestmark = pytest.mark.sweep


class Net(nn.Module):
    norm: object

    @nn.compact
    def __call__(self, x, residual=None):
        layer = activated(self.norm, nn.silu, name="norm", momentum=0.5)  # pyright: ignore[reportArgumentType]
        return layer(x, residual=residual, use_running_average=False)


def wrapped(**options):
    return jbn.linen.BatchNorm(**options)


@pytest.mark.parametrize("residual", [False, True])
def test_is_the_same_for_any_norm(residual, rng):
    x, r = jnp.asarray(rng.standard_normal((2, 6, 3)), jnp.float32)
    ours = functools.partial(functools.partial(jbn.linen.BatchNorm), epsilon=1e-5)
    found = []
    for norm in (ours, nn.BatchNorm, wrapped):
        variables = Net(norm).init(jax.random.key(0), x)
        found.append(
            Net(norm).apply(
                variables, x, r if residual else None, mutable=["batch_stats"]
            )
        )
    for y, stats in found[1:]:
        np.testing.assert_allclose(y, found[0][0], rtol=1e-5, atol=1e-6)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            stats,
            found[0][1],
        )
    xh = (x - x.mean(0)[None]) / jnp.sqrt(x.var(0)[None] + 1e-5)
    want = nn.silu(xh + r if residual else xh)
    np.testing.assert_allclose(found[0][0], want, rtol=1e-4, atol=1e-5)


def test_ours_has_it_inside(rng):
    """So that nothing is kept for it."""
    x = jnp.ones((4096, 8))
    kept = {}
    for norm in (jbn.linen.BatchNorm, wrapped):
        variables = Net(norm).init(jax.random.key(0), x)

        net = functools.partial(Net(norm).apply, mutable=["batch_stats"])
        _, vjp, _ = jax.vjp(jax.jit(functools.partial(net, variables)), x, has_aux=True)
        leaves = jax.tree.leaves(vjp)
        leaves = {leaf.unsafe_buffer_pointer(): leaf for leaf in leaves}
        kept[norm] = sum(leaf.nbytes for leaf in leaves.values())
    assert kept[jbn.linen.BatchNorm] < 1.01 * x.nbytes < kept[wrapped]
