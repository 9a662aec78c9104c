"""The Equinox module: its state, its modes and settings, against NumPy and Equinox.

Which options reach the function is for `test_options.py`.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn
from jbn.options import LayerOptions, defaults


eqx: Any = pytest.importorskip("equinox")
BatchNorm = jbn.equinox.BatchNorm
pytestmark = pytest.mark.usefixtures("standard_promotion")
CLOSE: dict[str, Any] = {"rtol": 2e-5, "atol": 2e-5}


def made(cls=BatchNorm, *args, **settings):
    return eqx.nn.make_with_state(cls)(*args, **settings)


def mapped(layer, x, state, **call):
    """Over the first axis, as in Equinox's documentation."""
    run = lambda x, state: layer(x, state, **call)
    axes: Any = {"in_axes": (0, None), "out_axes": (0, None)}
    return jax.vmap(run, axis_name="batch", **axes)(x, state)


@pytest.fixture
def x(rng):
    return jnp.asarray(3 + 0.5 * rng.normal(size=(64, 4, 5)), jnp.float32)


def normalized(x, mean, var):
    return (np.asarray(x, float) - mean) / np.sqrt(var + 1e-5)


@pytest.mark.parametrize("momentum", [0.99, None])
def test_evaluation_is_right_after_one_step(x, momentum):
    layer, state = made(BatchNorm, 4, "batch", momentum=momentum)
    flat = np.asarray(x, float)
    want = normalized(x, flat.mean((0, 2))[:, None], flat.var((0, 2))[:, None])
    y, state = mapped(layer, x, state)
    np.testing.assert_allclose(y, want, **CLOSE)
    y, same = mapped(eqx.nn.inference_mode(layer), x, state)
    np.testing.assert_allclose(y, want, **CLOSE)
    assert eqx.tree_equal(same, state)
    y, _ = mapped(layer, x, state, inference=True)
    np.testing.assert_allclose(y, want, **CLOSE)
    mean, var = state.get(layer.batch_state_index)
    np.testing.assert_allclose(mean, flat.mean((0, 2)), **CLOSE)
    np.testing.assert_allclose(var, flat.var((0, 2)), **CLOSE)


def test_means_are_those_of_equinox(x):
    """Whose debiased variance is not that of the data, see `test_peer_defects.py`."""
    pair = [(BatchNorm, {}), (eqx.nn.BatchNorm, {"mode": "batch"})]
    found = []
    for cls, settings in pair:
        layer, state = made(cls, 4, "batch", momentum=0.7, **settings)
        layer = eqx.tree_at(
            lambda v: (v.weight, v.bias), layer, (x[0, :, 0], x[1, :, 0])
        )
        for batch in (x[:20], x[20:50], x[50:]):
            y, state = mapped(layer, batch, state)
        found.append((y, state, layer))
    (ours, state, layer), (theirs, other, peer) = found
    np.testing.assert_allclose(ours, theirs, **CLOSE)
    mean = other.get(peer.batch_state_index)[0] / (1 - 0.7**3)
    np.testing.assert_allclose(state.get(layer.batch_state_index)[0], mean, **CLOSE)


def test_positional_arguments_are_those_of_equinox():
    names = list(inspect.signature(eqx.nn.BatchNorm).parameters)
    assert list(inspect.signature(BatchNorm).parameters)[: len(names)] == names
    layer = BatchNorm(3, "batch", 0.1, False, 0.5, True, jnp.bfloat16, "batch")
    assert (layer.epsilon, layer.momentum, layer.inference) == (0.1, 0.5, True)
    assert layer.weight is layer.bias is None


def test_every_setting_of_layers_is_an_argument():
    names = set(inspect.signature(BatchNorm).parameters)
    renamed = {"epsilon": "eps", "param_dtype": "dtype", "dtype": "output_dtype"}
    assert {renamed.get(name, name) for name in defaults(LayerOptions)} <= names
    doc = str(BatchNorm.__init__.__doc__)
    assert all(f" {name}: " in doc for name in names)


def test_settings_make_the_parameters(x):
    init = {"scale_init": jax.nn.initializers.constant(2.0), "use_bias": False}
    layer, state = made(BatchNorm, 4, "batch", dtype=jnp.bfloat16, **init)
    assert layer.bias is None
    assert layer.weight is not None
    assert (layer.weight.dtype, float(layer.weight[0])) == (jnp.bfloat16, 2)
    y, _ = mapped(layer, x.astype(jnp.float16), state)
    assert y.dtype == jnp.float16
    layer, state = made(BatchNorm, 4, "batch", output_dtype=jnp.bfloat16)
    assert mapped(layer, x, state)[0].dtype == jnp.bfloat16
    layer, _ = made(BatchNorm, 3, axis_index_groups=[[0, 1]])
    hash(jax.tree.structure(layer))


def test_without_a_mapped_axis_and_with_a_mask(x):
    layer, state = made(BatchNorm, (4, 5), axis=(1, 2))
    mask = jnp.arange(64) < 40
    y, state = layer(x, state, mask=mask)
    seen = np.asarray(x[:40], float)
    np.testing.assert_allclose(y, normalized(x, seen.mean(0), seen.var(0)), **CLOSE)


def test_update_stats(x):
    layer, state = made(BatchNorm, 4, "batch", update_stats=False)
    assert eqx.tree_equal(mapped(layer, x, state)[1], state)
    _, new = mapped(layer, x, state, update_stats=True)
    assert not eqx.tree_equal(new, state)


def test_tau_in_a_call(x):
    """As of the function; in place of the layer's."""
    layer, state = made(BatchNorm, 4, "batch", tau=3.0)
    running = jbn.BatchStats(*state.get(layer.batch_state_index), weight=jnp.zeros(4))
    run = lambda x: jbn.batch_norm(
        x, None, running, use_running_average=False, axis=0, axis_name="batch", tau=9
    )[0]
    want = jax.vmap(run, axis_name="batch")(x)
    y, _ = mapped(layer, x, state, tau=jnp.asarray(9.0))
    np.testing.assert_allclose(y, want, **CLOSE)
    y, _ = mapped(layer, x, state)
    assert abs(y - want).max() > 0.1


def test_gradients_in_a_sequence(x, rng):
    """Jitted, filtered and differentiated with a random cotangent, as a model is."""
    make = lambda: eqx.nn.Sequential(
        [eqx.nn.Linear(4, 3, key=jax.random.key(0)), BatchNorm(3, "batch")]
    )
    model, state = eqx.nn.make_with_state(make)()
    ct = jnp.asarray(rng.normal(size=(64, 3)), jnp.float32)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def grad(model, state):
        y, state = mapped(model, x[..., 0], state)
        return (y * ct).sum(), state

    found, state = grad(model, state)
    linear = model.layers[0]
    h = np.asarray(x[..., 0], float) @ np.asarray(linear.weight, float).T + linear.bias
    xh = normalized(h, h.mean(0), h.var(0))
    np.testing.assert_allclose(found.layers[1].bias, ct.sum(0), rtol=1e-4, atol=1e-4)
    want = (np.asarray(ct) * xh).sum(0)
    np.testing.assert_allclose(found.layers[1].weight, want, rtol=1e-4, atol=1e-4)
    assert jnp.isfinite(found.layers[0].weight).all()
    mean, _ = state.get(model.layers[1].batch_state_index)
    np.testing.assert_allclose(mean, h.mean(0), **CLOSE)


def test_refusals(x):
    with pytest.raises(TypeError, match="counts no calls"):
        made(BatchNorm, 4, "batch", tau=lambda step: 1.0)
    with pytest.raises(ValueError, match='`mode="batch"` alone'):
        BatchNorm(3, "batch", mode="ema")
    with pytest.raises(TypeError, match="`BatchNorm` has no option `epsilno`"):
        BatchNorm(3, "batch", epsilno=1)
    layer, state = made(BatchNorm, 4, "batch")
    with pytest.raises(NameError, match="batch"):
        layer(x[0], state)


def test_accumulated_moments_are_committed(x):
    layer, state = made(BatchNorm, 4, "batch", accumulate=True, debias=False)
    for part in (x[:20], x[20:]):
        _, state = mapped(layer, part, state)
    mean, var = state.get(layer.batch_state_index)
    assert not mean.any()
    more = state.get(layer.more_state_index)
    new = jbn.commit(jbn.BatchStats(mean, var, *more), momentum=0.5)
    np.testing.assert_allclose(new.mean, np.mean(x, (0, 2)) / 2, **CLOSE)
