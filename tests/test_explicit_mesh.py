"""An `Explicit` mesh over the features: what belongs to a feature stays where it is."""

import re

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jbn


# Four of them.
pytestmark = pytest.mark.devices

X = np.float32(np.random.default_rng(0).standard_normal((12, 8)) * 3 + 1)
IDS = np.arange(12) % 2
COTANGENT = np.float32(np.random.default_rng(1).standard_normal((12, 8)))


def of_everything(x, params, stats, **mode):
    return jbn.batch_norm(
        x, params, stats, trim=3, tau=2, activation=jax.nn.relu, residual=x, **mode
    )


def masked(x, params, stats, **mode):
    return jbn.batch_norm(x, params, stats, mask=IDS == 0, **mode)


def renorm(x, params, stats, **mode):
    return jbn.batch_renorm(x, params, stats, **mode)


def ghost(x, params, stats, **mode):
    return jbn.ghost_batch_norm(x, params, stats, num_groups=2, **mode)


def frozen(x, params, stats, **mode):
    return jbn.frozen_batch_norm(x, params, stats, freeze_stats=False, **mode)


def domain(x, params, stats, **mode):
    return jbn.domain_batch_norm(x, params, stats, domain=IDS, **mode)


def labels(x, params, stats, **mode):
    return jbn.conditional_batch_norm(x, params, stats, labels=IDS, **mode)


def linen(x, params, stats, use_running_average):
    variables = {
        "params": params._asdict(),
        "batch_stats": {"mean": stats.mean, "var": stats.var},
    }
    y, new = jbn.BatchNorm().apply(
        variables, x, use_running_average, mutable=["batch_stats"]
    )
    return y, jbn.BatchStats(**new["batch_stats"])  # pyright: ignore[reportArgumentType]


def pieces(x, params, stats, use_running_average):
    moments = jbn.moments(x)
    new = jbn.update_batch_stats(stats, moments)
    by = stats if use_running_average else moments
    return jbn.normalize(x, by, params), new


METHODS = {
    f.__name__: f
    for f in (
        of_everything,
        masked,
        renorm,
        ghost,
        frozen,
        domain,
        labels,
        linen,
        pieces,
    )
}


def place(mesh, spec, name=""):
    """The input, parameters and statistics, with each feature on devices of its own."""
    params, _ = jbn.init((2, 8) if name == "labels" else 8)
    _, stats = jbn.init((2, 8) if name == "domain" else 8)

    def put(v):
        of_features = P(*[None] * (v.ndim - 1), "model")
        return jax.device_put(v, NamedSharding(mesh, of_features))

    x = jax.device_put(X, NamedSharding(mesh, spec))
    return x, *jax.tree.map(put, (params, stats))


def mesh_of(**axes):
    return jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        (AxisType.Explicit,) * len(axes),
        devices=jax.devices()[:4],
    )


every_mesh = pytest.mark.parametrize(
    ("axes", "spec"),
    [
        ({"model": 4}, P(None, "model")),
        ({"data": 2, "model": 2}, P("data", "model")),
    ],
    ids=["features", "rows and features"],
)


def both_modes(f):
    """What is computed at inference, and in training with its gradient."""

    @jax.jit
    def run(x, params, stats):
        y, _ = f(x, params, stats, use_running_average=True)

        def loss(x, params):
            z, new = f(x, params, stats, use_running_average=False)
            return (z * COTANGENT).sum(), (z, new)

        (_, (z, new)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
        return y, z, new, grads

    return run


def gathered(compiled):
    return re.findall(r"\b(?:all-gather|all-to-all|collective-permute)\S*\(", compiled)


@every_mesh
def test_batch_norm(axes, spec):
    args = place(mesh_of(**axes), spec)
    compiled = both_modes(jbn.batch_norm).lower(*args).compile()
    assert gathered(compiled.as_text()) == []
    y, z, new, (dx, dparams) = compiled(*args)
    for v in (y, z, dx):
        assert v.sharding.spec == spec
    for v in (new.mean, new.var, dparams.scale, dparams.bias):
        assert v.sharding.spec == P("model")
    _, mean, var = oracle.moments(X)
    np.testing.assert_allclose(y, oracle.normalize(X, 0 * mean, 1 + 0 * var), rtol=1e-5)
    np.testing.assert_allclose(z, oracle.batch_norm(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new.mean, 0.01 * mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(new.var, 0.99 + 0.01 * var, rtol=1e-5)
    want = oracle.input_gradient(X, COTANGENT, np.ones(8))
    for got, w in zip((dx, *dparams), want, strict=True):
        np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-4)


@pytest.mark.sweep
@every_mesh
@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_gathered(name, axes, spec):
    args = place(mesh_of(**axes), spec, name)
    compiled = both_modes(METHODS[name]).lower(*args).compile()
    assert gathered(compiled.as_text()) == []
