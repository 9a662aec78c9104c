"""Labels, and what optimizers do with them."""

# Flax types what `init` and `apply` return as unions that nothing can be read from.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.models import MLP
from jbn.tools import convert, decays, freeze, kinds


# Optax does not hold to strict promotion.
pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("standard_promotion")]


class Block(nn.Module):
    norm: type = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        return nn.relu(self.norm(use_running_average=False)(x))


class Net(nn.Module):
    """A backbone and a head, with norms of all kinds and a stack that is scanned."""

    norm: type = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x):
        x = Block(self.norm, name="backbone")(x)

        class Step(nn.Module):
            norm: type

            @nn.compact
            def __call__(self, x, _):
                return Block(self.norm, name="block")(x), None

        stack = nn.scan(
            Step,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = stack(self.norm, name="stack")(x, None)
        x = nn.LayerNorm(name="layer_norm")(x)
        x = nn.Dense(4, use_bias=False, name="plain")(x)
        plain = self.norm(use_running_average=False, use_scale=False, name="no_scale")
        return nn.Dense(2, name="head")(plain(x))


NORMS = {
    "backbone/BatchNorm_0/bias",
    "backbone/BatchNorm_0/scale",
    "layer_norm/scale",
    "no_scale/bias",
    "stack/block/BatchNorm_0/bias",
    "stack/block/BatchNorm_0/scale",
}
BIASES = {
    "backbone/Dense_0/bias",
    "head/bias",
    "layer_norm/bias",
    "stack/block/Dense_0/bias",
}
WEIGHTS = {
    "backbone/Dense_0/kernel",
    "head/kernel",
    "plain/kernel",
    "stack/block/Dense_0/kernel",
}


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((8, 4)), jnp.float32)


@pytest.fixture(scope="module")
def variables():
    variables = Net().init(jax.random.key(0), jnp.ones((2, 4)))
    # Weight decay of what is zero would not show.
    params = jax.tree.map(lambda v: v + 0.5, variables["params"])
    return {**variables, "params": params}


def flat(tree):
    return {
        "/".join(str(getattr(k, "key", k)) for k in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def steps(optimizer, variables, x, model=None, number=3):
    """Parameters after some steps, of a loss that moves everything."""
    model, params = model or Net(), variables["params"]

    @jax.jit
    def step(params, state):
        def loss(params):
            y, _ = model.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return (y * y).sum() + y[:, 0].sum()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(number):
        params, state = step(params, state)
    return params


def moved(before, after):
    before, after = flat(before), flat(after)
    return {k for k in before if not np.array_equal(before[k], after[k])}


# --- freeze ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "frozen"),
    [
        ("backbone/*", {k for k in NORMS | BIASES | WEIGHTS if k[:4] == "back"}),
        (["head/*", "plain/kernel"], {"head/bias", "head/kernel", "plain/kernel"}),
        ("*/kernel", {k for k in WEIGHTS}),
        (lambda path: path.endswith("/scale"), {k for k in NORMS if k[-5:] == "scale"}),
        ("*", NORMS | BIASES | WEIGHTS),
    ],
    ids=["backbone", "several", "kernels", "function", "all"],
)
def test_frozen_parameters_stay_bit_for_bit(where, frozen, variables, x):
    labels = freeze(variables, where)
    assert jax.tree.structure(labels) == jax.tree.structure(variables["params"])
    assert {k for k, v in flat(labels).items() if v == "frozen"} == frozen
    assert set(flat(labels).values()) <= {"frozen", "trainable"}
    optimizer = optax.multi_transform(
        {
            "trainable": optax.adamw(1e-2, weight_decay=0.1),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    params = steps(optimizer, variables, x)
    # (A bias before a norm has no gradient, and moves by weight decay.)
    everything = NORMS | BIASES | WEIGHTS
    assert moved(variables["params"], params) == everything - frozen


def test_parameters_alone_are_labelled_as_well(variables):
    want = freeze(variables, "head/*")
    assert freeze(variables["params"], "head/*") == want


def test_a_pattern_is_of_the_whole_path(variables):
    labels = flat(freeze(variables, ["head/kernel", "kernel", "block/*"]))
    assert {k for k, v in labels.items() if v == "frozen"} == {"head/kernel"}


def test_frozen_in_all_respects(variables, x):
    """With `FrozenBatchNorm` the statistics stay, too; then the other way about."""
    where = "backbone/*"
    model = convert(Net(), jbn.linen.FrozenBatchNorm, where=where)
    _, updated = model.apply(variables, x, mutable=["batch_stats"])
    before, after = variables["batch_stats"], updated["batch_stats"]
    changed = moved(before, after)
    assert changed == {k for k in flat(before) if not k.startswith("backbone/")}
    optimizer = optax.multi_transform(
        {"trainable": optax.sgd(0.1), "frozen": optax.set_to_zero()},
        freeze(variables, where),
    )
    params = steps(optimizer, variables, x, model)
    assert not {k for k in moved(variables["params"], params) if k[:4] == "back"}


def test_nothing_to_freeze_is_refused(variables):
    with pytest.raises(
        ValueError, match=r"no parameter whose path matches 'encoder/\*'"
    ):
        freeze(variables, "encoder/*")
    with pytest.raises(ValueError, match="no parameter"):
        freeze({}, "*")


# --- kinds and decays --------------------------------------------------------------


def test_kinds(variables):
    labels = kinds(variables)
    assert jax.tree.structure(labels) == jax.tree.structure(variables["params"])
    found = flat(labels)
    assert {k for k, v in found.items() if v == "norm"} == NORMS
    assert {k for k, v in found.items() if v == "bias"} == BIASES
    assert {k for k, v in found.items() if v == "weight"} == WEIGHTS


def test_kinds_of_a_model_of_flax(variables, x):
    theirs = jax.eval_shape(Net(nn.BatchNorm).init, jax.random.key(0), x)
    assert kinds(theirs) == kinds(variables)


def test_kinds_of_tables_and_domains(x):
    layer = jbn.linen.DomainBatchNorm(3, own_affine=True, use_running_average=False)
    variables = layer.init(jax.random.key(0), x, domain=0)
    assert variables["params"]["scale"].ndim == 2
    assert set(kinds(variables).values()) == {"norm"}


def test_decay_leaves_norms_and_biases_alone(variables, x):
    """At zero gradient AdamW only decays: what it moves is what decays."""
    mask = decays(variables)
    assert jax.tree.structure(mask) == jax.tree.structure(variables["params"])
    optimizer = optax.adamw(0.1, weight_decay=0.5, mask=mask)
    params = variables["params"]
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    after = optax.apply_updates(params, updates)
    assert moved(params, after) == WEIGHTS
    for path in WEIGHTS:
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        close(flat(after)[path], 0.95 * flat(params)[path])
    assert moved(params, steps(optimizer, variables, x)) == NORMS | BIASES | WEIGHTS


def test_a_rule_by_rank_fails_for_layers_that_are_scanned(variables):
    """The rule of thumb, `ndim > 1`, would decay scales that are stacked."""
    params = variables["params"]
    by_rank = {k for k, v in flat(params).items() if v.ndim > 1}
    wrong = by_rank - WEIGHTS
    assert wrong == {
        "stack/block/BatchNorm_0/bias",
        "stack/block/BatchNorm_0/scale",
        "stack/block/Dense_0/bias",
    }
    assert {k for k, v in flat(decays(variables)).items() if v} == WEIGHTS


def test_a_learning_rate_for_each_kind(variables, x):
    rates = {
        "norm": optax.sgd(0.1),
        "bias": optax.set_to_zero(),
        "weight": optax.sgd(0.0),
    }
    params = steps(optax.multi_transform(rates, kinds(variables)), variables, x)
    assert moved(variables["params"], params) <= NORMS
    assert "no_scale/bias" in moved(variables["params"], params)


def test_without_statistics_only_scales_are_known(variables):
    found = flat(kinds(variables["params"]))
    assert {k for k, v in found.items() if v == "norm"} == {
        k for k in NORMS if k.endswith("/scale")
    }


def test_a_model_that_is_one_norm(x):
    variables = jbn.linen.BatchNorm(use_running_average=False).init(
        jax.random.key(0), x
    )
    assert kinds(variables) == {"scale": "norm", "bias": "norm"}
    assert freeze(variables, "scale") == {"scale": "frozen", "bias": "trainable"}


def test_the_mlp_of_the_trainer():
    images = jnp.zeros((2, 8, 8, 1), jnp.uint8)
    init = functools.partial(MLP().init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    mask = flat(decays(variables))
    assert {k for k, v in mask.items() if v} == {f"Dense_{i}/kernel" for i in range(3)}


# --- NNX ---------------------------------------------------------------------------


class NnxNet(nnx.Module):
    def __init__(self, rngs, norm=jbn.nnx.BatchNorm):
        self.backbone = nnx.Linear(4, 4, rngs=rngs)
        self.norms = nnx.List([norm(4, rngs=rngs)])
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norms[0](self.backbone(x)))


def nnx_steps(model, optimizer, x):
    optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    before = flat(jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    for _ in range(3):
        loss = lambda model: (model(x) ** 2).sum() + model(x)[:, 0].sum()
        optimizer.update(model, nnx.grad(loss)(model))
    after = flat(jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    return {k for k in before if not np.array_equal(before[k], after[k])}


def labels_of(state):
    return flat(nnx.to_pure_dict(state))


@pytest.mark.parametrize("norm", [jbn.nnx.BatchNorm, nnx.BatchNorm])
class TestNnx:
    def test_freeze(self, norm, x):
        model = NnxNet(nnx.Rngs(0), norm)
        labels = freeze(model, ["backbone/*", "norms/0/scale"])
        optimizer = optax.multi_transform(
            {
                "trainable": optax.adamw(1e-2, weight_decay=0.1),
                "frozen": optax.set_to_zero(),
            },
            labels,
        )
        want = {"head/bias", "head/kernel", "norms/0/bias"}
        assert nnx_steps(model, optimizer, x) == want

    def test_kinds_and_decays(self, norm, x):
        model = NnxNet(nnx.Rngs(0), norm)
        assert labels_of(kinds(model)) == {
            "backbone/bias": "bias",
            "backbone/kernel": "weight",
            "head/bias": "bias",
            "head/kernel": "weight",
            "norms/0/bias": "norm",
            "norms/0/scale": "norm",
        }
        rates = {
            "norm": optax.sgd(0.1),
            "bias": optax.set_to_zero(),
            "weight": optax.set_to_zero(),
        }
        moving = nnx_steps(model, optax.multi_transform(rates, kinds(model)), x)
        assert moving == {"norms/0/bias", "norms/0/scale"}
        decaying = optax.chain(
            optax.scale(0.0), optax.add_decayed_weights(0.1, decays(model))
        )
        moving = nnx_steps(model, decaying, x)
        assert moving == {"backbone/kernel", "head/kernel"}

    def test_nothing_to_freeze(self, norm, x):
        with pytest.raises(ValueError, match="no parameter"):
            freeze(NnxNet(nnx.Rngs(0), norm), "encoder/*")
