"""Converted models against the models they were, and against NumPy."""

# Flax types what `init` and `apply` return as unions that nothing can be read from.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn, nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.tools import convert, converting


# Flax's own layers do not hold to strict promotion.
pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("standard_promotion")]

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
Norm = functools.partial(nn.BatchNorm, momentum=0.7, epsilon=0.1)


# --- Linen models, of a user who has never heard of us -----------------------------


class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, train):
        x = Norm()(nn.Dense(self.width)(x), use_running_average=not train)
        return nn.tanh(x)


class Compact(nn.Module):
    """Names, other axes, absent scale and bias, and blocks within."""

    @nn.compact
    def __call__(self, x, train):
        x = Block()(x, train)
        x = x[..., None] + jnp.arange(3.0)
        x = Norm(axis=1, use_scale=False, name="rows")(x, use_running_average=not train)
        norm = Norm(axis=(1, 2), use_bias=False, name="both")
        return norm(x, use_running_average=not train).sum(-1)


class Setup(nn.Module):
    def setup(self):
        self.blocks = [Block(), Block()]
        self.norm = Norm()
        self.table = {"a": Norm()}

    def __call__(self, x, train):
        for block in self.blocks:
            x = block(x, train)
        x = self.norm(x, use_running_average=not train)
        return self.table["a"](x, use_running_average=not train)

    def first(self, x, train):
        return self.blocks[0](x, train)


class Given(nn.Module):
    """A model that gets its layers from outside."""

    body: nn.Module

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(2)(self.body(x, train))


class Sequential(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = Norm(use_running_average=not train)
        return nn.Sequential([nn.Dense(4), norm, nn.relu, nn.Dense(2)])(x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return Block(4)(x, train), None

        stack = nn.scan(
            Step,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(name="stack")(nn.Dense(4)(x), None)[0]


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for _ in range(2):
            x = nn.remat(Block, static_argnums=2)()(x, train)
        return x


class Shared(nn.Module):
    """One norm, called twice: two updates."""

    @nn.compact
    def __call__(self, x, train):
        norm = Norm()
        x = norm(x, use_running_average=not train)
        return norm(2 * x + 1, use_running_average=not train)


class Vmapped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        many = nn.vmap(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=(None, None),
            axis_size=2,
        )
        return many()(x, train).sum(0)


MODELS = {
    "compact": Compact(),
    "setup": Setup(),
    "given": Given(Setup()),
    "sequential": Sequential(),
    "scan": Scanned(),
    "remat": Remat(),
    "shared": Shared(),
    "vmap": Vmapped(),
}


@pytest.fixture
def x(rng):
    return jnp.asarray(2 * rng.standard_normal((6, 4)) + 1, jnp.float32)


def randomized(variables, rng):
    """Variables with no two values alike, and variances that are positive."""

    def value(path, leaf):
        low = 0.5 if path[-1].key in ("var", "scale") else -1.0
        return jnp.asarray(rng.uniform(low, 2.0, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(value, variables)


def equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def all_close(got, want, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(functools.partial(close, **tolerance), got, want)


def trained(model, variables, x):
    return model.apply(variables, x, True, mutable=["batch_stats"])


@pytest.mark.parametrize("name", MODELS)
class TestLinen:
    def test_initializes_to_the_same_variables(self, name, x):
        model = MODELS[name]
        want = model.init(jax.random.key(3), x, False)
        equal(convert(model).init(jax.random.key(3), x, False), want)
        equal(convert(model).init(jax.random.key(3), x, True), want)

    def test_outputs_and_updates_are_those_of_flax(self, name, x, rng):
        model = MODELS[name]
        new = convert(model)
        variables = randomized(model.init(jax.random.key(0), x, False), rng)
        kept = jax.tree.map(np.array, variables)
        close(new.apply(variables, x, False), model.apply(variables, x, False))
        want, want_stats = trained(model, variables, x)
        got, got_stats = jax.jit(functools.partial(trained, new))(variables, x)
        close(got, want, rtol=1e-4, atol=1e-5)
        all_close(got_stats, want_stats)
        equal(variables, kept)

    def test_every_norm_is_ours(self, name, x):
        model = MODELS[name]
        variables = model.init(jax.random.key(0), x, False)
        with converting() as paths:
            model.apply(variables, x, False)
        found = {
            "/".join(k.key for k in path[:-1])
            for path, _ in jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
        }
        assert set(paths) == found
        assert len(paths) == len(found)

    def test_gradients_are_those_of_flax(self, name, x, rng):
        model = MODELS[name]
        variables = randomized(model.init(jax.random.key(0), x, False), rng)
        weight = jnp.asarray(
            rng.standard_normal(model.apply(variables, x, False).shape)
        )

        def loss(params, model):
            y, _ = trained(model, {**variables, "params": params}, x)
            return (weight * y).sum()

        grads = [
            jax.grad(loss)(variables["params"], m) for m in (convert(model), model)
        ]
        all_close(*grads, rtol=1e-3, atol=1e-4)

    def test_checkpoints_go_both_ways(self, name, x, rng):
        model = MODELS[name]
        new = convert(model)
        blank = model.init(jax.random.key(0), x, False)
        theirs = randomized(blank, rng)
        ours = {**theirs, **trained(new, theirs, x)[1]}
        for variables, source, target in ((theirs, model, new), (ours, new, model)):
            saved = flax.serialization.to_bytes(variables)
            loaded = flax.serialization.from_bytes(blank, saved)
            equal(loaded, variables)
            close(target.apply(loaded, x, False), source.apply(variables, x, False))

    def test_all_frozen_is_inference_in_training(self, name, x, rng):
        model = MODELS[name]
        frozen = convert(model, jbn.linen.FrozenBatchNorm)
        variables = randomized(model.init(jax.random.key(0), x, False), rng)
        got, new = trained(frozen, variables, x)
        close(got, model.apply(variables, x, False), rtol=1e-4, atol=1e-5)
        equal(new["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("axis", [-1, 1, (1, 2)], ids=str)
def test_arguments_of_the_old_layer_are_kept(axis, rng):
    """By the definition, in NumPy: momentum, epsilon, axis, initializers."""
    x = np.asarray(3 * rng.standard_normal((5, 3, 2)) + 1, np.float32)
    old = nn.BatchNorm(
        use_running_average=False,
        axis=axis,
        momentum=0.6,
        epsilon=0.3,
        scale_init=nn.initializers.constant(1.5),
        bias_init=nn.initializers.constant(-0.5),
    )
    new = convert(old)
    variables = new.init(jax.random.key(0), x)
    y, updated = new.apply(variables, x, mutable=["batch_stats"])
    _, mean, var = oracle.moments(x, axis=axis)
    scale, bias = np.full(mean.shape, 1.5), np.full(mean.shape, -0.5)
    close(y, oracle.normalize(x, mean, var, scale, bias, axis, epsilon=0.3))
    close(updated["batch_stats"]["mean"], 0.4 * mean)
    close(updated["batch_stats"]["var"], 0.6 + 0.4 * var)


@pytest.mark.parametrize("old", [nn.BatchNorm, jbn.linen.BatchNorm])
def test_linen_options_go_before_the_old_arguments(old, x):
    model = old(use_running_average=False, momentum=0.6, epsilon=0.3)
    new = convert(model, momentum=0.25, unbiased=True)
    _, updated = new.apply(model.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    close(updated["batch_stats"]["var"], 0.25 + 0.75 * np.var(x, 0, ddof=1))


def test_linen_dtypes_and_axis_names_are_kept(x):
    model = nn.BatchNorm(
        use_running_average=False,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        axis_name="d",
    )
    new = convert(model)
    variables = new.init(jax.random.key(0), x)
    assert variables["params"]["scale"].dtype == jnp.float16
    step = lambda x: new.apply(variables, x, mutable=["batch_stats"])
    y, updated = jax.vmap(step, axis_name="d")(x.reshape(3, 2, 4))
    assert y.dtype == jnp.bfloat16
    close(updated["batch_stats"]["mean"][1], 0.01 * np.mean(x, 0))


def test_masks_and_modes_of_the_call_are_passed_on(x):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            return nn.BatchNorm(momentum=0.0)(x, False, mask=mask)

    model, mask = Masked(), jnp.arange(6)[:, None] < 4
    variables = model.init(jax.random.key(0), x, mask)
    _, updated = convert(model).apply(variables, x, mask, mutable=["batch_stats"])
    node = updated["batch_stats"]["BatchNorm_0"]
    close(node["mean"], np.mean(x[:4], 0))
    close(node["var"], np.var(x[:4], 0))


@pytest.mark.parametrize(
    ("where", "frozen"),
    [
        ("blocks_1/*", {"blocks_1/BatchNorm_0"}),
        ("blocks_*", {"blocks_0/BatchNorm_0", "blocks_1/BatchNorm_0"}),
        (("norm", "table_a"), {"norm", "table_a"}),
        (lambda path: path.endswith("_a"), {"table_a"}),
        ("*", {"blocks_0/BatchNorm_0", "blocks_1/BatchNorm_0", "norm", "table_a"}),
    ],
    ids=["one", "glob", "several", "function", "all"],
)
def test_linen_where(where, frozen, x):
    model = Setup()
    new = convert(model, jbn.linen.FrozenBatchNorm, where=where)
    variables = model.init(jax.random.key(0), x, False)
    before = variables["batch_stats"]
    _, updated = trained(new, variables, x)
    after = updated["batch_stats"]
    still = {
        path
        for path in ("blocks_0/BatchNorm_0", "blocks_1/BatchNorm_0", "norm", "table_a")
        if (at(before, path)["mean"] == at(after, path)["mean"]).all()
    }
    assert still == frozen


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


def test_linen_where_is_no_prefix(x):
    """`norm` is not `norm_2`, and a pattern must fit the whole path."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            for name in ("norm", "norm_2"):
                x = nn.BatchNorm(use_running_average=False, name=name)(x)
            return x

    with converting(where="norm") as paths:
        Two().init(jax.random.key(0), x)
    assert paths == ["norm"]


def test_linen_to_renorm_with_options(x, rng):
    model = Block()
    new = convert(model, jbn.linen.BatchRenorm, r_max=1.5, d_max=0.5)
    variables = randomized(model.init(jax.random.key(0), x, False), rng)
    equal(
        new.init(jax.random.key(0), x, False), model.init(jax.random.key(0), x, False)
    )
    got, updated = trained(new, variables, x)
    p, s = (variables[c]["BatchNorm_0"] for c in ("params", "batch_stats"))
    dense = variables["params"]["Dense_0"]
    h = np.asarray(x, float) @ np.asarray(dense["kernel"], float) + dense["bias"]
    mean, std = h.mean(0), np.sqrt(h.var(0) + 0.1)
    running_std = np.sqrt(np.asarray(s["var"], float) + 0.1)
    r = np.clip(std / running_std, 1 / 1.5, 1.5)
    d = np.clip((mean - s["mean"]) / running_std, -0.5, 0.5)
    assert (abs(d) == 0.5).any()
    assert ((r > 1 / 1.5) & (r < 1.5)).any() or (r == 1.5).any()
    close(got, np.tanh(((h - mean) / std * r + d) * p["scale"] + p["bias"]), atol=1e-5)
    close(updated["batch_stats"]["BatchNorm_0"]["mean"], 0.7 * s["mean"] + 0.3 * mean)


def test_linen_to_ghost_normalizes_groups(x):
    model = nn.BatchNorm(use_running_average=False, epsilon=0.1)
    new = convert(model, jbn.linen.GhostBatchNorm, num_groups=2)
    y, _ = new.apply(model.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    for half in (slice(0, 3), slice(3, 6)):
        close(y[half], oracle.batch_norm(x[half], epsilon=0.1))


def test_linen_renorm_schedule_adds_its_step_to_a_checkpoint(x):
    model = nn.BatchNorm(use_running_average=False)
    new = convert(model, jbn.linen.BatchRenorm, r_max=lambda step: 1.0 + step)
    assert new.init(jax.random.key(0), x)["batch_stats"]["step"] == 0
    variables = model.init(jax.random.key(0), x)
    _, updated = new.apply(variables, x, mutable=["batch_stats"])
    assert updated["batch_stats"]["step"] == 1
    _, updated = new.apply({**variables, **updated}, x, mutable=["batch_stats"])
    assert updated["batch_stats"]["step"] == 2


@pytest.mark.parametrize("inner_first", [True, False])
def test_converted_again(inner_first, x):
    """Both conversions hold, wherever their layers are apart; options of both."""
    model = Setup()
    steps: list[Any] = [
        functools.partial(convert, to=jbn.linen.FrozenBatchNorm, where="blocks_*"),
        functools.partial(convert, where="norm", momentum=0.25),
    ]
    new = model
    for step in steps if inner_first else steps[::-1]:
        new = step(new)
    variables = model.init(jax.random.key(0), x, False)
    equal(new.init(jax.random.key(0), x, False), variables)
    _, updated = trained(new, variables, x)
    before, after = variables["batch_stats"], updated["batch_stats"]
    equal(after["blocks_0"], before["blocks_0"])
    # `norm` sees inputs normalized by running statistics; `table_a` is Flax's still.
    frozen = convert(model, jbn.linen.FrozenBatchNorm, where="blocks_*")
    _, reference = trained(frozen, variables, x)
    ratio = after["norm"]["mean"] / reference["batch_stats"]["norm"]["mean"]
    close(ratio, np.full(4, 0.75 / 0.3), rtol=1e-4)
    all_close(after["table_a"], reference["batch_stats"]["table_a"], atol=1e-4)


def test_the_last_conversion_of_a_layer_decides(x):
    model = nn.BatchNorm(use_running_average=False, momentum=0.9)
    variables = model.init(jax.random.key(0), x)
    new = convert(convert(model, momentum=0.5), momentum=0.25)
    _, updated = new.apply(variables, x, mutable=["batch_stats"])
    # Either order of the two is an order; this is the one that is.
    shares = updated["batch_stats"]["mean"] / np.mean(x, 0)
    assert np.allclose(shares, 0.5, rtol=1e-4) or np.allclose(shares, 0.75, rtol=1e-4)
    frozen = convert(convert(model, momentum=0.5), jbn.linen.FrozenBatchNorm)
    _, updated = frozen.apply(variables, x, mutable=["batch_stats"])
    equal(updated["batch_stats"], variables["batch_stats"])


def test_a_converted_model_is_a_part_of_another(x):
    """Names are those of the model in the same place; paths are from the root."""
    theirs, ours = Given(Setup()), Given(convert(Setup()))
    equal(
        ours.init(jax.random.key(0), x, False), theirs.init(jax.random.key(0), x, False)
    )
    with converting(where="body/norm") as paths:
        theirs.init(jax.random.key(0), x, False)
    assert paths == ["body/norm"]


def test_converting_reaches_other_methods(x, rng):
    model = Setup()
    variables = randomized(model.init(jax.random.key(0), x, False), rng)
    first = functools.partial(
        model.apply, variables, x, True, method=Setup.first, mutable=["batch_stats"]
    )
    want, _ = model.apply(
        variables, x, False, method=Setup.first, mutable=["batch_stats"]
    )
    assert np.abs(first()[0] - want).max() > 0.1
    with converting(jbn.linen.FrozenBatchNorm) as paths:
        got, _ = first()
    close(got, want)
    assert paths == ["blocks_0/BatchNorm_0"]
    assert np.abs(first()[0] - want).max() > 0.1  # It ends with the block.


def test_converting_ends_with_an_error(x):
    model = nn.BatchNorm(use_running_average=False)
    with pytest.raises(KeyError), converting(jbn.linen.FrozenBatchNorm):
        raise KeyError
    variables = model.init(jax.random.key(0), x)
    _, updated = model.apply(variables, x, mutable=["batch_stats"])
    assert (updated["batch_stats"]["mean"] != 0).all()


def test_random_numbers_are_those_of_the_model(x):
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.Dense(4)(x))
            return Norm(use_running_average=True)(x)

    model = Noisy()
    variables = model.init(
        {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x
    )
    rngs = {"dropout": jax.random.key(2)}
    close(
        convert(model).apply(variables, x, rngs=rngs),
        model.apply(variables, x, rngs=rngs),
    )


def test_layers_of_ours_keep_their_class_and_state(x):
    model = nn.Sequential(
        [
            jbn.linen.GhostBatchNorm(2, use_running_average=False, momentum=0.5),
            jbn.linen.BatchNorm(use_running_average=False, debias=True),
        ]
    )
    variables = model.init(jax.random.key(0), x)
    new = convert(model, epsilon=0.1)
    equal(new.init(jax.random.key(0), x), variables)
    y, updated = new.apply(variables, x, mutable=["batch_stats"])
    groups = [
        oracle.batch_norm(x[:3], epsilon=0.1),
        oracle.batch_norm(x[3:], epsilon=0.1),
    ]
    close(y, oracle.batch_norm(np.concatenate(groups), epsilon=0.1), atol=1e-5)
    close(updated["batch_stats"]["layers_1"]["weight"], np.full(4, 0.01))


def test_other_norms_are_left_alone(x):
    model = nn.Sequential([nn.LayerNorm(), nn.GroupNorm(2)])
    variables = model.init(jax.random.key(0), x)
    with converting() as paths:
        got = model.apply(variables, x)
    assert paths == []
    np.testing.assert_array_equal(got, model.apply(variables, x))


# --- NNX ---------------------------------------------------------------------------


class NnxNet(nnx.Module):
    """Attributes, lists, dicts, a layer that is in two places, and other norms."""

    def __init__(self, rngs: nnx.Rngs, norm=nnx.BatchNorm):
        make = functools.partial(norm, 4, momentum=0.7, epsilon=0.1, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = make()
        self.listed = nnx.List([make(), nnx.LayerNorm(4, rngs=rngs)])
        self.named = nnx.Dict(a=make(use_bias=False))
        self.sequence = nnx.Sequential(make(use_scale=False), jax.nn.tanh)
        self.again = self.norm

    def __call__(self, x):
        x = self.norm(self.dense(x))
        x = self.listed[1](self.listed[0](x))
        x = self.sequence(self.named["a"](x))
        return self.again(x)


PATHS = {"again", "listed/0", "named/a", "sequence/layers/0"}


def nnx_net(rng, norm=nnx.BatchNorm):
    net = NnxNet(nnx.Rngs(0), norm)
    state = nnx.to_pure_dict(nnx.state(net))
    nnx.replace_by_pure_dict(values := nnx.state(net), randomized(state, rng))
    nnx.update(net, values)
    return net


def pure(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))


def norms(model):
    kinds = (nnx.BatchNorm, jbn.nnx.BatchNorm)
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_graph(model)
        if isinstance(module, kinds)
    }


def test_nnx_outputs_and_updates_are_those_of_flax(x, rng):
    net = nnx_net(rng)
    before = pure(net)
    new = convert(net)
    equal(pure(new), before)
    assert {type(m) for m in norms(new).values()} == {jbn.nnx.BatchNorm}
    assert set(norms(new)) == PATHS
    close(new(x), net(x), rtol=1e-4, atol=1e-5)
    all_close(pure(new), pure(net), rtol=1e-4, atol=1e-5)
    for model in (net, new):
        model.eval()
    close(new(x), net(x), rtol=1e-4, atol=1e-5)


def test_nnx_original_is_untouched_and_shares_nothing(x, rng):
    net = nnx_net(rng)
    before = pure(net)
    new = convert(net)
    new(x)
    new.norm.scale[...] = jnp.zeros(4)
    equal(pure(net), before)
    assert {type(m) for m in norms(net).values()} == {nnx.BatchNorm}


def test_nnx_shared_references_stay_shared(rng):
    new = convert(nnx_net(rng))
    assert new.norm is new.again
    assert isinstance(new.listed[1], nnx.LayerNorm)


def test_nnx_checkpoints_go_both_ways(x, rng):
    theirs, ours = nnx_net(rng), convert(NnxNet(nnx.Rngs(1)))
    nnx.update(ours, nnx.state(theirs))
    ours(x)
    back = NnxNet(nnx.Rngs(2))
    nnx.update(back, nnx.state(ours))
    for model in (ours, back):
        model.eval()
    close(back(x), ours(x), rtol=1e-4, atol=1e-5)


def test_nnx_under_jit_and_grad(x, rng):
    net = nnx_net(rng)
    new = convert(net)

    @nnx.jit
    def step(model, x):
        return nnx.grad(lambda m: (m(x) ** 3).sum())(model)

    all_close(
        nnx.to_pure_dict(step(new, x)),
        nnx.to_pure_dict(step(net, x)),
        rtol=1e-3,
        atol=1e-3,
    )
    all_close(pure(new), pure(net), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1])
def test_nnx_root_that_is_itself_a_norm_keeps_its_arguments(axis, rng):
    x = jnp.asarray(3 * rng.standard_normal((5, 3, 2)) + 1, jnp.float32)
    _, mean, var = oracle.moments(x, axis=axis)
    old = nnx.BatchNorm(
        mean.size,
        axis=axis,
        momentum=0.6,
        epsilon=0.3,
        rngs=nnx.Rngs(0),
    )
    new = convert(old)
    assert type(new) is jbn.nnx.BatchNorm
    close(new(x), oracle.normalize(x, mean, var, axis=axis, epsilon=0.3))
    close(new.mean[...], 0.4 * mean)
    close(new.var[...], 0.6 + 0.4 * var)
    np.testing.assert_array_equal(old.mean[...], np.zeros(mean.shape))


def test_nnx_modes_dtypes_and_masks(x):
    old = nnx.BatchNorm(
        4,
        dtype=jnp.bfloat16,
        param_dtype=jnp.float16,
        use_running_average=True,
        rngs=nnx.Rngs(0),
    )
    new = convert(old, momentum=0.0)
    assert new(x).dtype == jnp.bfloat16
    assert new.scale[...].dtype == jnp.float16
    np.testing.assert_array_equal(new.mean[...], np.zeros(4))  # still in evaluation
    new.train()
    new(x, mask=jnp.arange(6)[:, None] < 4)
    close(new.mean[...], np.mean(x[:4], 0), rtol=1e-2)


def test_nnx_where_and_classes(x, rng):
    net = nnx_net(rng)
    new = convert(net, jbn.nnx.FrozenBatchNorm, where=["listed/*", "named/a"])
    kinds = {path: type(layer) for path, layer in norms(new).items()}
    assert kinds == {
        "again": nnx.BatchNorm,
        "sequence/layers/0": nnx.BatchNorm,
        "listed/0": jbn.nnx.FrozenBatchNorm,
        "named/a": jbn.nnx.FrozenBatchNorm,
    }
    before = pure(new)
    new(x)
    after = pure(new)
    equal(after["listed"], before["listed"])
    assert (after["again"]["mean"] != before["again"]["mean"]).all()
    again = convert(new, epsilon=0.2)
    assert type(norms(again)["named/a"]) is jbn.nnx.FrozenBatchNorm
    assert {layer.epsilon for layer in norms(again).values()} == {0.2}
    assert {layer.momentum for layer in norms(again).values()} == {0.7}


def test_nnx_to_renorm_and_ghost(x):
    old = nnx.BatchNorm(4, momentum=0.7, epsilon=0.1, rngs=nnx.Rngs(0))
    renorm = convert(old, jbn.nnx.BatchRenorm, r_max=2.0, d_max=0.25)
    assert (renorm.r_max, renorm.d_max) == (2.0, 0.25)
    mean, std = np.mean(x, 0), np.sqrt(np.var(x, 0) + 0.1)
    r = np.clip(std / np.sqrt(1.1), 0.5, 2.0)
    d = np.clip(mean / np.sqrt(1.1), -0.25, 0.25)
    close(renorm(x), (np.asarray(x) - mean) / std * r + d, atol=1e-5)
    ghost = convert(old, jbn.nnx.GhostBatchNorm, num_groups=2)
    close(ghost(x)[:3], oracle.batch_norm(x[:3], epsilon=0.1))


def test_nnx_keeps_extra_state(x):
    layer = jbn.nnx.BatchRenorm(
        4, r_max=lambda step: 1.0 + step, debias=True, rngs=nnx.Rngs(0)
    )
    layer(x)
    layer(x)
    new = convert(layer, epsilon=0.1)
    assert new.step[...] == 2
    np.testing.assert_array_equal(new.weight[...], layer.weight[...])
    assert type(new) is jbn.nnx.BatchRenorm


def test_nnx_keeps_what_is_pending(x):
    layer = jbn.nnx.BatchNorm(4, accumulate=True, rngs=nnx.Rngs(0))
    layer(x)
    new = convert(layer, momentum=0.5)
    jbn.nnx.commit(new)
    close(new.mean[...], 0.5 * np.mean(x, 0))


def test_nnx_metadata_of_variables_is_kept():
    old = nnx.BatchNorm(4, scale_metadata={"tag": "t"}, rngs=nnx.Rngs(0))
    assert convert(old).scale.get_metadata("tag") == "t"


@pytest.mark.parametrize("pytree", [True, False])
def test_nnx_layers_in_plain_containers(pytree, x):
    class Held(nnx.Module, pytree=pytree):
        def __init__(self, rngs):
            data = nnx.data if pytree else lambda value: value
            make = functools.partial(nnx.BatchNorm, 4, momentum=0.7, rngs=rngs)
            self.l = data([make()])
            self.t = data((make(), [make()]))
            self.d = data({"a": make()})

        def __call__(self, x):
            return self.l[0](self.d["a"](self.t[1][0](self.t[0](x))))

    old = Held(nnx.Rngs(0))
    new = convert(old)
    assert {type(layer) for layer in norms(new).values()} == {jbn.nnx.BatchNorm}
    assert len(norms(new)) == 4
    assert {type(layer) for layer in norms(old).values()} == {nnx.BatchNorm}
    close(new(x), old(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nnx.BatchNorm, jbn.nnx.BatchNorm])
def test_nnx_layers_that_are_scanned(kind, x):
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 4, rngs=rngs)
            self.norm = kind(4, momentum=0.7, epsilon=0.1, rngs=rngs)

        def __call__(self, x):
            return jax.nn.tanh(self.norm(self.dense(x)))

    make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: Layer(rngs)))
    old = make(nnx.Rngs(0))
    new = convert(old)
    equal(pure(new), pure(old))
    run = nnx.scan(lambda x, m: m(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    close(run(x, new), run(x, old), rtol=1e-4, atol=1e-5)
    all_close(pure(new), pure(old), rtol=1e-4, atol=1e-5)


# --- refusals ----------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("model", "to"),
    [
        (nn.BatchNorm(), nn.BatchNorm),
        (nn.BatchNorm(), jbn.nnx.BatchNorm),
        (nn.BatchNorm(), nn.Dense),
        (nn.BatchNorm(), "FrozenBatchNorm"),
        (nn.BatchNorm(), jbn.linen.BatchNorm()),
        (nnx.BatchNorm(2, rngs=nnx.Rngs(0)), jbn.linen.FrozenBatchNorm),
        (nnx.BatchNorm(2, rngs=nnx.Rngs(0)), nnx.BatchNorm),
    ],
)
def test_a_class_for_another_api_is_refused(model, to):
    api = "jbn.linen" if isinstance(model, nn.Module) else "jbn.nnx"
    with pytest.raises(TypeError, match=f"a batch norm class of `{api}`"):
        convert(model, to)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("model", [None, {"params": {}}, nn.BatchNorm])
def test_what_is_not_a_model_is_refused(model):
    with pytest.raises(
        TypeError, match=r"must be a `flax.linen.Module` or a `flax.nnx"
    ):
        convert(model)


def test_nnx_without_a_layer_that_is_meant_is_refused():
    net = NnxNet(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"where='nowhere/\*'.*listed/0"):
        convert(net, where="nowhere/*")
    with pytest.raises(ValueError, match=r"no batch norm layer that matches.*none"):
        convert(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_nnx_variables_that_do_not_fit_are_refused():
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"statistics of shape \(2, 4\).*cannot be kept"
    ):
        convert(layer, jbn.nnx.DomainBatchNorm, num_domains=2)


def test_options_that_the_class_lacks_are_refused(x):
    with pytest.raises(TypeError, match="num_groups"):
        convert(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), jbn.nnx.GhostBatchNorm)
    with pytest.raises(TypeError, match="renorm"):
        convert(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), renorm=True)
    with pytest.raises(TypeError, match="num_groups"):
        convert(nn.BatchNorm(), jbn.linen.GhostBatchNorm).init(jax.random.key(0), x)


def test_a_converted_model_can_be_a_static_argument():
    model = convert(Norm(use_running_average=True), momentum=0.5, where=["*"])
    x = jnp.ones((2, 3))
    apply = jax.jit(lambda model, v, x: model.apply(v, x), static_argnums=0)
    variables = model.init(jax.random.key(0), x)
    close(apply(model, variables, x), model.apply(variables, x))
