"""`jax.export` of what is batch normalized, for any batch, height and width."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differentiation import QUICKLY
from flax import nnx
from jax import export

import jbn
import jbn.nnx


# Sizes that are not known are no integers to a type checker.
pytestmark = pytest.mark.usefixtures("untyped")

# How inputs are described, and two examples each.
LAYOUTS = {
    "rows": ("b, 4", [(5,), (200,)]),
    "images": ("b, h, w, 4", [(3, 2, 5), (8, 4, 3)]),
}
# Groups need to know the batch, in training.
OF_A_BATCH = {
    "rows": ("6, 4", [(6,)]),
    "images": ("4, h, w, 4", [(4, 2, 5), (4, 4, 3)]),
}
PLATFORMS = "cpu", "cuda", "tpu"


@dataclasses.dataclass(frozen=True)
class Method:
    """A function of jbn, as one of `x`, ids, parameters and statistics."""

    call: Callable[..., Any]
    params: tuple[int, ...] = (4,)
    stats: tuple[int, ...] = (4,)
    layouts: Any = dataclasses.field(default_factory=lambda: LAYOUTS)


METHODS = {
    "batch norm": Method(
        lambda x, ids, *state, **mode: jbn.batch_norm(x, *state, **mode)
    ),
    "a mask, ReLU and a residual": Method(
        lambda x, ids, *state, **mode: jbn.batch_norm(
            x, *state, mask=ids > 0, activation=jax.nn.relu, residual=x, **mode
        )
    ),
    "weights, trim and tau": Method(
        lambda x, ids, *state, **mode: jbn.batch_norm(
            x, *state, weights=ids.astype(jnp.float32), trim=3, tau=2, **mode
        )
    ),
    "renorm": Method(
        lambda x, ids, *state, **mode: jbn.batch_renorm(x, *state, **mode)
    ),
    "ghost": Method(
        lambda x, ids, *state, **mode: jbn.ghost_batch_norm(
            x, *state, num_groups=2, **mode
        ),
        layouts=OF_A_BATCH,
    ),
    "domain": Method(
        lambda x, ids, *state, **mode: jbn.domain_batch_norm(
            x, *state, domain=ids, **mode
        ),
        stats=(3, 4),
    ),
    "labels": Method(
        lambda x, ids, *state, **mode: jbn.conditional_batch_norm(
            x, *state, labels=ids, **mode
        ),
        params=(3, 4),
    ),
    "maps": Method(
        lambda x, ids, params, stats, **mode: jbn.conditional_batch_norm(
            x, None, stats, scale=jnp.sin(x), bias=jnp.cos(x), **mode
        ),
    ),
    "frozen": Method(
        lambda x, ids, *state, **mode: jbn.frozen_batch_norm(
            x, *state, freeze_stats=False, freeze_affine=False, **mode
        )
    ),
}
QUICK = (
    ("batch norm", "images"),
    ("a mask, ReLU and a residual", "rows"),
    ("renorm", "rows"),
    ("ghost", "images"),
    ("domain", "rows"),
    ("labels", "rows"),
    ("frozen", "rows"),
)
every_method = pytest.mark.parametrize("name", METHODS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def both_modes(method: Method):
    """What is computed at inference, and in training with its gradient."""

    def run(x, ids, params, stats):
        y, _ = method.call(x, ids, params, stats, use_running_average=True)

        def loss(x, params):
            y, new = method.call(x, ids, params, stats, use_running_average=False)
            return (y * jnp.cos(x)).sum(), (y, new)

        return y, jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)

    return run


def arguments(method: Method, layout: str):
    """Descriptions, and two examples, of the arguments of `both_modes`."""
    text, examples = method.layouts[layout]
    shape = export.symbolic_shape(text)
    params, _ = jbn.init(method.params)
    _, stats = jbn.init(method.stats)
    described = (
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape[:-1], jnp.int32),
        *jax.tree.map(
            lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), (params, stats)
        ),
    )

    def example(rows):
        rng = np.random.default_rng(len(rows))
        x = np.float32(rng.standard_normal((*rows, 4)) + 1)
        return x, rng.integers(3, size=rows).astype(np.int32), params, stats

    return described, map(example, examples)


def assert_same(f, exported: export.Exported, args: Any):
    """What was exported gives what the function gives."""
    got = jax.jit(exported.call, compiler_options=QUICKLY)(*args)
    want = jax.jit(f, compiler_options=QUICKLY)(*args)
    pairs = zip(*map(jax.tree.leaves, (got, want)), strict=True)
    for g, w in pairs:
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[pytest.mark.slow] if slow else [])
        for name in METHODS
        for layout in LAYOUTS
        for slow in [(name, layout) not in QUICK]
    ],
)
def test_every_method_is_exported(name, layout):
    """For all platforms at once: inference, training and gradient."""
    method = METHODS[name]
    described, _ = arguments(method, layout)
    f = jax.jit(both_modes(method))
    exported = export.export(f, platforms=PLATFORMS)(*described)
    assert exported.platforms == PLATFORMS
    assert exported.out_avals[0].shape == described[0].shape


@pytest.mark.sweep
@every_method
@every_layout
def test_what_was_exported_gives_the_same(name, layout):
    method = METHODS[name]
    described, examples = arguments(method, layout)
    f = both_modes(method)
    exported = export.export(jax.jit(f))(*described)
    for args in examples:
        assert_same(f, exported, args)


@pytest.mark.parametrize("batch", ["b", "3*b"])
def test_groups_of_any_batch(batch):
    """Are as of a known one, or refused in words; inference is always possible."""
    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"{batch}, 4"), jnp.float32)
    state = jbn.init(4)

    def run(mode):
        return lambda x: jbn.ghost_batch_norm(
            x, *state, num_groups=3, use_running_average=mode
        )

    rows = np.float32(np.random.default_rng(0).standard_normal((9, 4)))
    assert_same(run(True), export.export(jax.jit(run(True)))(x), (rows,))
    try:
        exported = export.export(jax.jit(run(False)))(x)
    except ValueError as error:
        assert "`ghost_batch_norm`" in str(error)  # noqa: PT017
    else:
        assert_same(run(False), exported, (rows,))


# --- Pieces ----------------------------------------------------------------------


def by_moments(x):
    moments = jbn.moments(x)
    return jbn.normalize(x, moments), moments


def by_trimmed_moments(x):
    _, stats = jbn.init(4)
    weights = jbn.trimmed_weights(x, stats, trim=2)
    moments = jbn.moments(x, weights=weights)
    new = jbn.update_batch_stats(stats, jbn.shrink(moments, stats, tau=3))
    return weights, jbn.merge(moments, moments), new


@pytest.mark.parametrize(
    ("f", "layout"),
    [
        (by_moments, "images"),
        pytest.param(by_moments, "rows", marks=pytest.mark.slow),
        pytest.param(by_trimmed_moments, "rows", marks=pytest.mark.slow),
        pytest.param(by_trimmed_moments, "images", marks=pytest.mark.slow),
    ],
)
def test_pieces(f, layout):
    text, examples = LAYOUTS[layout]
    x = jax.ShapeDtypeStruct(export.symbolic_shape(text), jnp.float32)
    exported = export.export(jax.jit(f))(x)
    rng = np.random.default_rng(0)
    for rows in examples:
        x = np.float32(rng.standard_normal((*rows, 4)) + 1)
        assert_same(f, exported, (x,))
    moments = by_moments(x)[1]
    np.testing.assert_allclose(moments.weight, np.full(4, x.size // 4))


# --- Modules ---------------------------------------------------------------------

MODULES = {
    "BatchNorm": ({}, lambda ids: {"mask": ids > 0}),
    "BatchRenorm": ({}, lambda ids: {}),
    "GhostBatchNorm": ({"num_groups": 2}, lambda ids: {}),
    "DomainBatchNorm": ({"num_domains": 3}, lambda ids: {"domain": ids}),
    "ConditionalBatchNorm": ({"num_classes": 3}, lambda ids: {"labels": ids}),
    "FrozenBatchNorm": (
        {"freeze_stats": False, "freeze_affine": False},
        lambda ids: {},
    ),
}
every_module = pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name,
            layout,
            marks=[] if (name, layout) == ("BatchNorm", "images") else pytest.mark.slow,
        )
        for name in MODULES
        for layout in LAYOUTS
    ],
)


def described(tree):
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), tree)


def check_module(name, layout, f, state):
    """Exports `f(state, x, ids)`, and calls it."""
    layouts = OF_A_BATCH if name == "GhostBatchNorm" else LAYOUTS
    (x, ids, *_), examples = arguments(Method(f, layouts=layouts), layout)
    exported = export.export(jax.jit(f))(described(state), x, ids)
    x, ids, *_ = list(examples)[-1]
    assert_same(f, exported, (state, x, ids))


@every_module
def test_linen(name, layout):
    own, call = MODULES[name]
    layer = getattr(jbn, name)(**own)

    def f(variables, x, ids):
        y = layer.apply(variables, x, True, **call(ids))

        def loss(params):
            z, new = layer.apply(
                {**variables, "params": params},
                x,
                False,
                mutable=["batch_stats"],
                **call(ids),
            )
            return (z * jnp.cos(x)).sum(), (z, new)

        return y, jax.value_and_grad(loss, has_aux=True)(variables["params"])

    x, ids = np.zeros((2, 4), np.float32), np.zeros(2, np.int32)
    variables = layer.init(jax.random.key(0), x, True, **call(ids))
    check_module(name, layout, f, variables)


@every_module
def test_nnx(name, layout):
    own, call = MODULES[name]
    layer = getattr(jbn.nnx, name)(4, **own, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)

    def f(state, x, ids):
        y = nnx.merge(graph, state)(x, use_running_average=True, **call(ids))
        layer = nnx.merge(graph, state)

        def loss(layer):
            z = layer(x, use_running_average=False, **call(ids))
            return (z * jnp.cos(x)).sum(), z

        value, grads = nnx.value_and_grad(loss, has_aux=True)(layer)
        return y, value, nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(layer))

    check_module(name, layout, f, state)


# --- Files -----------------------------------------------------------------------


def step(x, params, stats):
    """With all records in its signature, and in its output."""

    def loss(params):
        y, new = jbn.batch_norm(x, params, stats, use_running_average=False)
        return (y * jnp.cos(x)).sum(), new

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
    moments = jbn.moments(x)
    return value, grads, new, jbn.merge(new.pending, moments)


def test_serialized_records():
    pytest.importorskip("flatbuffers")
    state = jbn.init(4, track_weight=True, accumulate=True)
    x = jax.ShapeDtypeStruct(export.symbolic_shape("b, 4"), jnp.float32)
    exported = export.export(jax.jit(step))(x, *described(state))
    again = export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree
    assert again.out_tree == exported.out_tree
    x = np.float32(np.random.default_rng(0).standard_normal((3, 4)))
    assert_same(step, again, (x, *state))
    _, grads, new, moments = again.call(x, *state)
    assert isinstance(grads, jbn.Params)
    assert isinstance(new, jbn.BatchStats)
    assert isinstance(moments, jbn.Moments)


def test_serialized_modules():
    pytest.importorskip("flatbuffers")
    layer = jbn.BatchNorm(use_running_average=True)
    example = np.float32(np.random.default_rng(0).standard_normal((3, 2, 5, 4)))
    variables = layer.init(jax.random.key(0), example)
    shape = export.symbolic_shape("b, h, w, 4")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = export.export(jax.jit(layer.apply))(described(variables), x)
    again = export.deserialize(exported.serialize())
    assert_same(layer.apply, again, (variables, example))


@pytest.mark.parametrize("record", [jbn.Params, jbn.BatchStats, jbn.Moments])
def test_records_are_registered(record):
    """Which JAX tells by refusing another registration."""
    with pytest.raises(ValueError, match="Duplicate serialization registration"):
        export.register_namedtuple_serialization(
            record, serialized_name=f"test_export.{record.__name__}"
        )
