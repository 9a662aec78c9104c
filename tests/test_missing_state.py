"""Running statistics that lack what a rule needs: those of another layer or library.

A trained mean and variance alone, as Flax's checkpoints have them, of 5 and 4.
"""

# Flax types what `init` and `apply` return as unions that nothing can be read from.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import jbn
import jbn.linen
import jbn.nnx
import jbn.tools


X = np.asarray([[99.0], [101.0]], np.float32)  # of mean 100 and variance 1
BY_RUNNING = (X - 5) / np.sqrt(4 + 1e-5)
BY_BATCH = (X - 100) / np.sqrt(1 + 1e-5)
SCHEDULE = lambda step: jnp.where(step == 0, 1.0, 1e6)

# Arguments of a class, and of its call.
LAYERS = {
    "BatchNorm": ({}, {}),
    "BatchRenorm": ({"r_max": SCHEDULE, "d_max": lambda step: SCHEDULE(step) - 1}, {}),
    "GhostBatchNorm": ({"num_groups": 1}, {}),
    "DomainBatchNorm": ({"num_domains": 2}, {"domain": 0}),
    "ConditionalBatchNorm": ({"num_classes": 2}, {"labels": 1}),
    "FrozenBatchNorm": ({"freeze_stats": False, "freeze_mode": False}, {}),
}
every_class = pytest.mark.parametrize("name", LAYERS)
# The others are much like the first.
QUICK = "BatchNorm", "BatchRenorm"
RULES = {
    "debias": {"debias": True},
    "cumulative": {"momentum": None},
    "cumulative, debias": {"momentum": None, "debias": True},
    "accumulate": {"accumulate": True},
    "all": {"debias": True, "accumulate": True},
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def linen(name, mode=False, **options):
    """A layer, its parameters with a trained mean and variance, and how to call it."""
    own, call = LAYERS[name]
    layer = getattr(jbn.linen, name)(use_running_average=mode, **own, **options)
    start = layer.init(jax.random.key(0), X, **call)
    shape = start["batch_stats"]["mean"].shape
    stats = {"mean": jnp.full(shape, 5.0), "var": jnp.full(shape, 4.0)}
    return layer, {**start, "batch_stats": stats}, call


def first(v):
    """Of all domains, the first."""
    return float(np.ravel(v)[0])


# --- Training --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in LAYERS
    ],
)
def test_a_trained_mean_counts_in_full(name):
    layer, variables, call = linen(name, debias=True)
    _, new = layer.apply(variables, X, mutable=["batch_stats"], **call)
    new = new["batch_stats"]
    assert first(new["mean"]) == pytest.approx(0.99 * 5 + 0.01 * 100, rel=1e-6)
    assert first(new["var"]) == pytest.approx(0.99 * 4 + 0.01 * 1, rel=1e-6)
    np.testing.assert_allclose(new["weight"], np.ones_like(new["mean"]), rtol=1e-6)
    if name == "BatchRenorm":
        assert new["step"] == 1


def test_and_goes_on_so():
    """After many steps, too, it is what a plain average is."""
    layer, variables, _ = linen("BatchNorm", debias=True, momentum=0.5)
    for _ in range(3):
        _, new = layer.apply(variables, X, mutable=["batch_stats"])
        variables = {**variables, **new}
    mean = variables["batch_stats"]["mean"]
    np.testing.assert_allclose(mean, [5 / 8 + 100 * 7 / 8], rtol=1e-6)


@pytest.mark.sweep
@every_class
def test_a_new_mean_does_not_count(name):
    own, call = LAYERS[name]
    layer = getattr(jbn.linen, name)(**own, debias=True, use_running_average=False)
    variables = layer.init(jax.random.key(0), X, **call)
    _, new = layer.apply(variables, X, mutable=["batch_stats"], **call)
    assert first(new["batch_stats"]["mean"]) == pytest.approx(100)
    assert first(new["batch_stats"]["weight"]) == pytest.approx(0.01)


def test_a_schedule_starts_at_zero():
    """Batch norm in the first step; then normalization by the running statistics."""
    layer, variables, _ = linen("BatchRenorm")
    y, new = layer.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, BY_BATCH, rtol=1e-4)
    assert new["batch_stats"]["step"] == 1
    variables["batch_stats"]["step"] = new["batch_stats"]["step"]
    y, new = layer.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, BY_RUNNING, rtol=1e-4)
    assert new["batch_stats"]["step"] == 2


def test_how_many_rows_were_seen_cannot_be_guessed():
    layer, variables, _ = linen("BatchNorm", momentum=None)
    with pytest.raises(ValueError, match=r"`momentum=None`.*weight"):
        layer.apply(variables, X, mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"`momentum=None`.*weight"):
        jbn.batch_norm(
            X,
            None,
            jbn.BatchStats(*trained()),
            use_running_average=False,
            momentum=None,
        )


# --- Without training ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(
            name,
            rule,
            marks=[] if name == "BatchNorm" or rule == "all" else pytest.mark.slow,
        )
        for name in LAYERS
        for rule in RULES
    ],
)
def test_inference(name, rule):
    layer, variables, call = linen(name, True, **RULES[rule])
    y = layer.apply(variables, X, **call)
    np.testing.assert_allclose(y, BY_RUNNING, rtol=1e-5)


def test_inference_beside_a_collection_that_may_change():
    """As in a call for training of a model of which this layer is frozen."""
    layer, variables, _ = linen("BatchNorm", True, debias=True)
    y, new = layer.apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_allclose(y, BY_RUNNING, rtol=1e-5)
    np.testing.assert_array_equal(new["batch_stats"]["mean"], [5])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("BatchNorm", "debias"),
        ("BatchNorm", "cumulative"),
        ("BatchRenorm", "accumulate"),
        pytest.param("DomainBatchNorm", "all", marks=pytest.mark.slow),
    ],
)
def test_by_the_batch_without_an_update(name, rule):
    layer, variables, call = linen(name, **RULES[rule])
    y = layer.apply(variables, X, update_stats=False, **call)
    np.testing.assert_allclose(y, BY_BATCH, rtol=1e-4)


def trained():
    return jnp.full(1, 5.0), jnp.full(1, 4.0)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (jbn.batch_norm, {}),
        (jbn.batch_renorm, {}),
        (jbn.ghost_batch_norm, {"num_groups": 2}),
        (jbn.frozen_batch_norm, {}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_functions_need_no_weight_where_nothing_is_updated(function, options):
    stats = jbn.BatchStats(*trained())
    y, same = function(
        X, None, stats, use_running_average=True, momentum=None, **options
    )
    np.testing.assert_allclose(y, BY_RUNNING, rtol=1e-5)
    assert same is stats


def test_nor_do_they_in_a_second_pass():
    y, _ = jbn.batch_norm(
        X,
        None,
        jbn.BatchStats(*trained()),
        use_running_average=False,
        update_stats=False,
        momentum=None,
    )
    np.testing.assert_allclose(y, BY_BATCH, rtol=1e-4)


# --- Converted models ------------------------------------------------------------


class Net(nnx.Module):
    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x):
        return self.norm(x)


def trained_net(cls=nnx.BatchNorm, **options):
    net = Net(cls(1, use_running_average=False, rngs=nnx.Rngs(0), **options))
    net.norm.mean[...], net.norm.var[...] = trained()
    return net


TARGETS = {
    "BatchNorm": {},
    "BatchRenorm": {"r_max": SCHEDULE, "d_max": lambda step: SCHEDULE(step) - 1},
    "GhostBatchNorm": {"num_groups": 1},
}


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("cls", [nnx.BatchNorm, jbn.nnx.BatchNorm])
def test_nnx_layers_go_on_from_what_they_have(cls, to):
    net = jbn.tools.convert(
        trained_net(cls), getattr(jbn.nnx, to), debias=True, **TARGETS[to]
    )
    net(X)
    np.testing.assert_allclose(net.norm.mean[...], [0.99 * 5 + 0.01 * 100], rtol=1e-6)
    np.testing.assert_allclose(net.norm.var[...], [0.99 * 4 + 0.01 * 1], rtol=1e-6)
    np.testing.assert_allclose(net.norm.weight[...], [1], rtol=1e-6)


@pytest.mark.parametrize("to", ["BatchNorm", "BatchRenorm"])
def test_linen_layers_go_on_from_what_they_have(to):
    model = nn.Sequential([nn.BatchNorm(use_running_average=False)])
    variables = model.init(jax.random.key(0), X)
    variables["batch_stats"]["layers_0"] = dict(
        zip(("mean", "var"), trained(), strict=True)
    )
    model = jbn.tools.convert(model, getattr(jbn.linen, to), debias=True, **TARGETS[to])
    _, new = model.apply(variables, X, mutable=["batch_stats"])
    new = new["batch_stats"]["layers_0"]
    np.testing.assert_allclose(new["mean"], [0.99 * 5 + 0.01 * 100], rtol=1e-6)
    np.testing.assert_allclose(new["var"], [0.99 * 4 + 0.01 * 1], rtol=1e-6)
    np.testing.assert_allclose(new["weight"], [1], rtol=1e-6)


def test_nnx_layers_that_know_their_weight_keep_it():
    net = Net(jbn.nnx.BatchNorm(1, debias=True, rngs=nnx.Rngs(0)))
    net(X)
    net = jbn.tools.convert(net, momentum=0.9)
    np.testing.assert_allclose(net.norm.weight[...], [0.01], rtol=1e-6)


def test_stacked_nnx_layers_have_a_weight_each():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return nnx.BatchNorm(1, rngs=rngs)

    new = jbn.tools.convert(make(nnx.Rngs(0)), debias=True)
    np.testing.assert_array_equal(new.weight[...], np.ones((3, 1)))


def test_an_nnx_layer_does_not_forget_in_silence():
    """By the cumulative rule, what it has is refused in training, if not before."""

    def train():
        jbn.tools.convert(trained_net(), momentum=None)(X)

    with pytest.raises(ValueError, match="`momentum=None`"):
        train()


@every_rule
def test_nnx_inference(rule):
    net = jbn.tools.convert(trained_net(), use_running_average=True, **rule)
    np.testing.assert_allclose(net(X), BY_RUNNING, rtol=1e-5)


def test_linen_inference():
    model = nn.Sequential([nn.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), X)
    variables["batch_stats"]["layers_0"] = dict(
        zip(("mean", "var"), trained(), strict=True)
    )
    for to, options in TARGETS.items():
        new = jbn.tools.convert(model, getattr(jbn.linen, to), momentum=None, **options)
        np.testing.assert_allclose(new.apply(variables, X), BY_RUNNING, rtol=1e-5)
