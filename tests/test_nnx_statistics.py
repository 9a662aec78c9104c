"""What NNX variables hold after training: all that was computed, in any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jbn.nnx
import jbn.tools


LAYERS = {
    "BatchNorm": ({}, {}),
    "BatchRenorm": ({"r_max": lambda step: jnp.where(step > 0, 3.0, 2.0)}, {}),
    "GhostBatchNorm": ({"num_groups": 2}, {}),
    "DomainBatchNorm": ({"num_domains": 1}, {"domain": 0}),
    "ConditionalBatchNorm": ({"num_classes": 2}, {"labels": 1}),
    "FrozenBatchNorm": ({"freeze_stats": False, "freeze_mode": False}, {}),
}
every_class = pytest.mark.parametrize("name", LAYERS)
QUICK = "BatchNorm", "GhostBatchNorm"
REAL = np.asarray([[1.0], [3.0], [5.0], [7.3]], np.float32)
COMPLEX = REAL + 1j * np.asarray([[4.0], [8.0], [-1.0], [2.0]], np.float32)


def layer_of(name, **options):
    return getattr(jbn.nnx, name)(1, **options, **LAYERS[name][0], rngs=nnx.Rngs(0))


def cast(model, dtype):
    """The model with all that is floating in `dtype`, as for mixed precision."""

    def to_dtype(v):
        return v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(to_dtype, state))


def check(layer, mean, var):
    """Compares the statistics with what they should be, and their dtypes."""
    dtype = jnp.complex64 if np.iscomplexobj(mean) else jnp.float32
    assert (layer.mean[...].dtype, layer.var[...].dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(layer.mean[...].ravel(), np.ravel(mean), rtol=2e-6)
    np.testing.assert_allclose(layer.var[...].ravel(), np.ravel(var), rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "dtype", "x"),
    [
        pytest.param(
            name,
            dtype,
            x,
            id=f"{name}, {dtype.__name__}",
            marks=pytest.mark.slow if complex_one and name not in QUICK else [],
        )
        for name in LAYERS
        for dtype, x, complex_one in (
            (jnp.bfloat16, REAL, False),
            (jnp.float16, COMPLEX, True),
        )
    ],
)
def test_training_in_16_bits(name, dtype, x):
    """Two steps: a hundredth of a batch, and as much again, is not lost."""
    layer = cast(layer_of(name), dtype)

    @nnx.jit
    def train(layer):
        for _ in range(2):
            layer(x, **LAYERS[name][1])

    train(layer)
    _, mean, var = oracle.moments(x)
    keep = 0.99**2
    check(layer, (1 - keep) * mean, keep + (1 - keep) * var)
    if layer.scale is not None:
        assert layer.scale[...].dtype == dtype
    if name == "BatchRenorm":
        assert layer.step[...] == 2


@pytest.mark.sweep
@every_class
def test_training_on_complex_data(name):
    layer = layer_of(name, momentum=0.5)
    layer(COMPLEX, **LAYERS[name][1])
    _, mean, var = oracle.moments(COMPLEX)
    check(layer, mean / 2, (1 + var) / 2)


@pytest.mark.parametrize("jitted", [False, True])
def test_a_variance_beyond_float16(jitted):
    layer = cast(jbn.nnx.BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0)), jnp.float16)
    call = nnx.jit(lambda layer, x: layer(x)) if jitted else lambda layer, x: layer(x)
    x = 1000 * REAL
    call(layer, x)
    check(layer, x.mean(), x.astype(float).var())


def test_running_statistics_move_on_for_many_steps():
    layer = cast(jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0)), jnp.bfloat16)
    step = nnx.jit(lambda layer, x: layer(x))
    x = REAL + 6
    for _ in range(200):
        step(layer, x)
    np.testing.assert_allclose(layer.mean[...], (1 - 0.99**200) * x.mean(), rtol=1e-4)


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)
def test_weights_in_16_bits(options):
    layer = cast(jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0), **options), jnp.bfloat16)
    step = nnx.jit(lambda layer: (layer(REAL), layer(REAL[:1]), None)[-1])
    step(layer)
    assert layer.weight[...].dtype == jnp.float32
    if "debias" in options:
        total, shares = 1 - 0.99**2, [0.99 * 0.01, 0.01]
        mean = np.dot(shares, [REAL.mean(), REAL[0, 0]]) / total
        var = shares[0] * REAL.astype(float).var() / total
    else:
        total, rows = 5, np.concatenate([REAL, REAL[:1]]).astype(float)
        mean, var = rows.mean(), rows.var()
    np.testing.assert_allclose(layer.weight[...], [total], rtol=1e-5)
    np.testing.assert_allclose(layer.mean[...], [mean], rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], [var], rtol=1e-5)


def test_frozen_statistics_stay_as_they_are():
    layer = cast(jbn.nnx.FrozenBatchNorm(1, rngs=nnx.Rngs(0)), jnp.bfloat16)
    layer(REAL, use_running_average=False)
    assert layer.mean[...].dtype == layer.var[...].dtype == jnp.bfloat16


# --- Pending moments -------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        pytest.param(REAL, jnp.bfloat16, id="real, bfloat16"),
        pytest.param(COMPLEX, jnp.float32, id="complex, float32"),
        pytest.param(
            COMPLEX, jnp.bfloat16, id="complex, bfloat16", marks=pytest.mark.slow
        ),
    ],
)
def test_commit(x, dtype):
    """In two parts, of one row and of three."""
    layer = jbn.nnx.BatchNorm(1, momentum=0.5, accumulate=True, rngs=nnx.Rngs(0))
    model = cast(nnx.List([layer]), dtype)

    @nnx.jit
    def train(model):
        for part in (x[:1], x[1:]):
            model[0](part)

    train(model)
    weight, mean, var = oracle.moments(x)
    pending = {k: v[...] for k, v in model[0].pending.items()}
    for name, want in {"weight": weight, "mean": mean, "var": var}.items():
        assert pending[name].dtype == (x.dtype if name == "mean" else jnp.float32)
        np.testing.assert_allclose(pending[name], want, rtol=1e-6)
    jbn.nnx.commit(model)
    check(model[0], mean / 2, (1 + var) / 2)
    assert not np.any(model[0].pending["weight"][...])


@pytest.mark.parametrize("name", ["BatchNorm", "DomainBatchNorm"])
def test_commit_in_a_compiled_step(name):
    layer = cast(layer_of(name, accumulate=True, momentum=0.0), jnp.float16)

    @nnx.jit
    def train(layer):
        layer(1000 * COMPLEX, **LAYERS[name][1])
        jbn.nnx.commit(layer)

    train(layer)
    check(layer, *oracle.moments(1000 * COMPLEX)[1:])


# --- Tools -----------------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize(
    ("x", "dtype"),
    [
        pytest.param(1000 * REAL, jnp.float16, id="real, float16"),
        pytest.param(COMPLEX, jnp.float32, id="complex, float32"),
        pytest.param(
            COMPLEX, jnp.float16, id="complex, float16", marks=pytest.mark.slow
        ),
    ],
)
def test_recalibrate(x, dtype):
    """The statistics of the data, whatever those before were kept in."""
    model = cast(Net(jbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))), dtype)
    batches = [jnp.asarray(x[:1]), jnp.asarray(x[1:])]
    new = jbn.tools.recalibrate(lambda model, x: model(x), model, batches)
    check(new.norm, *oracle.moments(x)[1:])
    assert model.norm.mean[...].dtype == dtype


def test_a_layer_of_flax_that_was_converted():
    model = cast(Net(nnx.BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))), jnp.bfloat16)
    model = jbn.tools.convert(model)
    model(COMPLEX)
    check(model.norm, *oracle.moments(COMPLEX)[1:])
