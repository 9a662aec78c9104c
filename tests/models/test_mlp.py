"""The MLP: its formula, masks, dtypes, and that any norm will do."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn.linen
from jbn.models import MLP


pytestmark = pytest.mark.sweep


def make(rng, model, *shape):
    """Variables without the zeros and ones that hide what they multiply."""
    x = jnp.zeros(shape or (1, 4, 4, 3))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))

    def fill(path, leaf):
        low = 0.5 if path[-1].key in ("scale", "var") else -0.5
        return jnp.asarray(rng.uniform(low, low + 1, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def images(rng, *shape):
    return jnp.asarray(rng.normal(size=shape or (5, 4, 4, 3)), jnp.float32)


def test_formula(rng):
    model = MLP(features=(6, 4), num_classes=3)
    variables = make(rng, model)
    x = images(rng)
    logits, _ = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(
        variables, x
    )
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), variables["params"])
    y = np.asarray(x, float).reshape(5, -1)
    for i in (0, 1):
        dense, norm = params[f"Dense_{i}"], params[f"BatchNorm_{i}"]
        y = np.maximum(y @ dense["kernel"] + dense["bias"], 0)
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * norm["scale"] + norm["bias"]
    expected = y @ params["Dense_2"]["kernel"] + params["Dense_2"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_masked_images_take_no_part(rng):
    model = MLP(features=(6,), num_classes=3)
    variables = make(rng, model)
    x = images(rng, 6, 4, 4, 3)
    mask = np.asarray([True, True, False, True, False, True])
    dirty = x.at[2].set(jnp.nan).at[4].set(jnp.inf)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def step(params, x, mask):
        logits, updated = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mask=mask,
            mutable=["batch_stats"],
        )
        each = (logits**2).sum(1)
        kept = each if mask is None else jnp.where(mask, each, 0)
        return kept.sum(), (logits, updated)

    (_, (logits, stats)), grads = step(variables["params"], dirty, mask)
    (_, kept), kept_grads = step(variables["params"], x[mask], None)
    assert np.isfinite(logits).all()
    # Sums of another order.
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, ((logits[mask], stats), grads), (kept, kept_grads))


def test_integer_and_numpy_images(rng):
    model = MLP(features=(6,), num_classes=3)
    variables = make(rng, model)
    x = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
    infer: Any = partial(model.apply, variables, train=False)
    scaled = infer(jnp.asarray(x / 255, jnp.float32))
    assert np.isfinite(scaled).all()
    np.testing.assert_allclose(infer(x), scaled, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_parameters_and_statistics_in_float32(rng):
    model = MLP(dtype=jnp.bfloat16)
    x = images(rng, 64, 4, 4, 3)
    variables = make(rng, model)
    apply = partial(
        model.apply, train=True, mutable=["batch_stats"], capture_intermediates=True
    )
    logits, updated = jax.jit(apply)(variables, x)
    hidden = updated.pop("intermediates")
    for name in ("Dense_0", "BatchNorm_0", "Dense_1", "BatchNorm_1"):
        assert hidden[name]["__call__"][0].dtype == jnp.bfloat16
    init = partial(model.init, jax.random.key(0), train=False)
    trees = (jax.eval_shape(init, x), updated, logits)
    assert {leaf.dtype for leaf in jax.tree.leaves(trees)} == {jnp.dtype(jnp.float32)}
    wide = MLP().apply(variables, x, train=True, mutable=["batch_stats"])[0]
    # Eight bits, through five layers.
    np.testing.assert_allclose(logits, wide, atol=0.05 * np.abs(wide).max())


@pytest.mark.parametrize("norm", [jbn.linen.BatchRenorm, nn.BatchNorm])
def test_any_norm_will_do(rng, norm):
    model = MLP(features=(6,), norm=norm)
    variables = make(rng, model)
    name = "BatchNorm_0"  # Whatever the norm.
    assert variables["params"].keys() == {"Dense_0", name, "Dense_1"}
    _, updated = model.apply(
        variables,
        images(rng),
        train=True,
        mask=jnp.asarray([True] * 4 + [False]),
        mutable=["batch_stats"],
    )
    before, after = variables["batch_stats"][name], updated["batch_stats"][name]
    assert before.keys() == after.keys()
    assert (before["mean"] != after["mean"]).any()
