"""`jbn.lowering.late`: programs without `jax.jit`, and under `jax.vmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn


FUNCTIONS = {
    "masked": lambda x, ids, params, stats: jbn.batch_norm(
        x,
        params,
        stats,
        use_running_average=False,
        mask=ids > 0,
        activation=jax.nn.relu,
        residual=x,
    ),
    "renorm": lambda x, ids, *state: jbn.batch_renorm(
        x, *state, use_running_average=False
    ),
    "ghost": lambda x, ids, *state: jbn.ghost_batch_norm(
        x, *state, use_running_average=False, num_groups=2
    ),
    "domain": lambda x, ids, params, stats: jbn.domain_batch_norm(
        x, params, jbn.init((3, 3))[1], domain=ids, use_running_average=False
    ),
    "labels": lambda x, ids, params, stats: jbn.conditional_batch_norm(
        x, jbn.init((3, 3))[0], stats, labels=ids, use_running_average=False
    ),
    "moments": lambda x, ids, params, stats: (
        jbn.normalize(x, jbn.moments(x), params),
        None,
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_disable_jit(name, rng):
    """Users debug with it: the same output, statistics and gradient."""
    f = FUNCTIONS[name]
    x = np.float32(rng.standard_normal((12, 3)))
    ct = np.float32(rng.standard_normal(x.shape))
    ids = np.arange(12) % 3
    params, stats = jbn.init(3)

    def loss(x, params):
        y, new = f(x, ids, params, stats)
        return (y * ct).sum(), (y, new)

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    want = jax.jit(run)(x, params)
    with jax.disable_jit():
        found = run(jnp.asarray(x), params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, want
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap_over_any_axis(axis, rng):
    """Output and gradient are those of each batch alone."""
    xs, cts = rng.standard_normal((2, 4, 6, 3))
    scale = np.array([0.5, -1.0, 2.0])
    params = jbn.Params(jnp.asarray(scale), jnp.zeros(3))

    def layer(x, ct):
        f = lambda x: jbn.batch_norm(x, params, None, use_running_average=False)[0]
        y, vjp = jax.vjp(f, x)
        return y, *vjp(ct)

    mapped = jax.jit(jax.vmap(layer, axis, axis))
    got = mapped(np.moveaxis(xs, 0, axis), np.moveaxis(cts, 0, axis))
    want = [
        (
            oracle.batch_norm(x, scale, epsilon=1e-5),
            oracle.input_gradient(x, ct, scale)[0],
        )
        for x, ct in zip(xs, cts, strict=True)
    ]
    for found, wanted in zip(got, zip(*want, strict=True), strict=True):
        found = np.moveaxis(np.asarray(found), axis, 0)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)
