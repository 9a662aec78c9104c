"""Frozen batch norm: three switches, and models of which a part is frozen."""

import functools
import itertools
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn, nnx

import jbn
import jbn.nnx
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


CLOSE: Any = {"rtol": 1e-5, "atol": 1e-5}  # sums of some ten float32 numbers
SWITCHES = ("freeze_affine", "freeze_stats", "freeze_mode")


def make(rng, features=3):
    """Parameters and statistics that all differ from the defaults and each other."""
    stats = BatchStats(rng.normal(size=features), rng.uniform(0.5, 3, features))
    params = Params(rng.uniform(0.5, 2, features), rng.normal(size=features))
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, stats))


def call(x, dy, params, stats, **options):
    """Output, new statistics, and gradients by x and parameters."""
    y, back, new = jax.vjp(
        lambda x, params: jbn.frozen_batch_norm(x, params, stats, **options),
        x,
        params,
        has_aux=True,
    )
    return y, new, back(jnp.asarray(dy))


def jitted(*arrays, **options):
    return jax.jit(functools.partial(call, **options))(*arrays)


@pytest.mark.parametrize("update_stats", [None, False, True])
@pytest.mark.parametrize("asked", [None, False, True])
@pytest.mark.parametrize(
    "frozen", list(itertools.product([False, True], repeat=3)), ids=str
)
def test_three_switches(rng, frozen, asked, update_stats):
    x, dy = rng.normal(2, 3, (2, 8, 3)).astype(np.float32)
    params, stats = make(rng)
    affine, statistics, mode = frozen
    options: Any = dict(zip(SWITCHES, frozen, strict=True))
    options |= {"use_running_average": asked, "epsilon": 0.1, "momentum": 0.7}
    if update_stats is not None:
        options["update_stats"] = update_stats
    if asked is None and not mode:
        with pytest.raises(
            TypeError, match="`use_running_average` must be True or Fal"
        ):
            call(x, dy, params, stats, **options)
        return
    y, new, (dx, dparams) = call(x, dy, params, stats, **options)

    scale, bias = np.float64(params.scale), np.float64(params.bias)
    _, mean, var = oracle.moments(x)
    want_dx, dscale, dbias = oracle.input_gradient(x, dy, scale, epsilon=0.1)
    if mode or asked:
        by = np.float64(stats.mean), np.float64(stats.var)
        want_dx = dy * scale / np.sqrt(by[1] + 0.1)
        dscale = (dy * oracle.normalize(x, *by, epsilon=0.1)).sum(0)
    else:
        by = mean, var
    want = oracle.normalize(x, *by, scale, bias, epsilon=0.1)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(dx, want_dx, rtol=1e-4, atol=1e-5)
    if affine:
        np.testing.assert_array_equal(dparams.scale, np.zeros(3))
        np.testing.assert_array_equal(dparams.bias, np.zeros(3))
    else:
        np.testing.assert_allclose(dparams.scale, dscale, **CLOSE)
        np.testing.assert_allclose(dparams.bias, dbias, **CLOSE)
    # A call for training updates, whatever normalizes, unless told or frozen.
    updates = asked is False if update_stats is None else update_stats
    if updates and not statistics:
        want_mean = 0.7 * np.float64(stats.mean) + 0.3 * mean
        want_var = 0.7 * np.float64(stats.var) + 0.3 * var
        np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
        np.testing.assert_allclose(new.var, want_var, **CLOSE)
    else:
        jax.tree.map(np.testing.assert_array_equal, new, stats)


def test_all_three_are_frozen_by_default(rng):
    x, dy = rng.normal(2, 3, (2, 8, 3)).astype(np.float32)
    params, stats = make(rng)
    want = jitted(x, dy, params, stats, **dict.fromkeys(SWITCHES, True))
    for mode in (None, False, True):
        asked: Any = {} if mode is None else {"use_running_average": mode}
        got = jitted(x, dy, params, stats, **asked)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        _, same = jbn.frozen_batch_norm(x, params, stats, **asked)
        assert same is stats


def test_the_formula_of_torchvision(rng):
    # scale = weight / sqrt(var + eps), bias - mean * scale: an affine map of NCHW.
    x, dy = rng.normal(2, 3, (2, 4, 3, 5, 5)).astype(np.float32)
    params, stats = make(rng)
    y, same, (dx, _) = jitted(
        x, dy, params, stats, axis=1, epsilon=1e-3, use_running_average=False
    )
    weight, bias, mean, var = (
        np.float64(v).reshape(1, 3, 1, 1)
        for v in (params.scale, params.bias, stats.mean, stats.var)
    )
    scale = weight / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(y, x * scale + (bias - mean * scale), **CLOSE)
    np.testing.assert_allclose(dx, dy * scale, **CLOSE)
    jax.tree.map(np.testing.assert_array_equal, same, stats)


def test_what_is_absent_is_left_out(rng):
    x = rng.normal(2, 3, (8, 3)).astype(np.float32)
    params, stats = make(rng)
    for given in (None, Params(), Params(params.scale), Params(bias=params.bias)):
        y, _ = jbn.frozen_batch_norm(x, given, stats)
        want = oracle.normalize(x, stats.mean, stats.var, *(given or Params()))
        np.testing.assert_allclose(y, want, **CLOSE)


def test_the_backward_pass_keeps_some_numbers_a_feature(rng):
    x = rng.normal(size=(64, 16, 32)).astype(np.float32)
    params, stats = make(rng, 32)

    def saved_bytes(**switches):
        run = functools.partial(jbn.frozen_batch_norm, **switches)
        _, back = jax.vjp(lambda x, params: run(x, params, stats)[0], x, params)
        leaves = [v for v in jax.tree.leaves(back) if isinstance(v, jax.Array)]
        return sum({v.unsafe_buffer_pointer(): v.nbytes for v in leaves}.values())

    assert saved_bytes() <= 8 * 4 * 32
    assert saved_bytes(freeze_affine=False) >= x.nbytes  # as the gradient needs it


def test_statistics_adapt_while_the_old_ones_normalize(rng):
    _, stats = jbn.init(2)
    adapt = jax.jit(
        lambda x, stats: jbn.frozen_batch_norm(
            x,
            None,
            stats,
            use_running_average=False,
            freeze_stats=False,
            momentum=0.5,
        )
    )
    mean, var = np.zeros(2), np.ones(2)
    for t in range(5):
        x = rng.normal(t, 1 + t, (16, 2)).astype(np.float32)
        y, stats = adapt(x, stats)
        np.testing.assert_allclose(y, oracle.normalize(x, mean, var), **CLOSE)
        _, batch_mean, batch_var = oracle.moments(x)
        mean, var = 0.5 * mean + 0.5 * batch_mean, 0.5 * var + 0.5 * batch_var
    np.testing.assert_allclose(stats.mean, mean, **CLOSE)
    np.testing.assert_allclose(stats.var, var, **CLOSE)


X = np.ones((4, 2), np.float32)


def run(**kwargs: Any) -> Any:
    params, stats = jbn.init(2)
    kwargs = {"params": params, "batch_stats": stats} | kwargs
    return jbn.frozen_batch_norm(X, **kwargs)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("kwargs", "error", "came", "fix"),
    [
        *(
            (
                {switch: 1},
                TypeError,
                f"`{switch}` must be True or False when the function is traced; got 1",
                "Make it a static argument of `jit`",
            )
            for switch in SWITCHES
        ),
        (
            {"freeze_mode": False},
            TypeError,
            "`use_running_average` must be True or False",
            "got None",
        ),
        (
            {"freeze_mode": False, "use_running_average": 64},
            TypeError,
            "`use_running_average` must be True or False",
            "got 64",
        ),
        (
            {"freeze_stats": False, "update_stats": 1},
            TypeError,
            "`update_stats` must be True or False",
            "got 1",
        ),
        (
            {"batch_stats": None},
            ValueError,
            "got None",
            "Make them with `init`",
        ),
    ],
)
def test_a_mistake_gets_one_clear_error(kwargs, error, came, fix):
    with pytest.raises(error, match=fix) as raised:
        run(**kwargs)
    assert came in str(raised.value)


@pytest.mark.usefixtures("untyped")
def test_flags_of_numpy():
    for flag in (False, np.bool_(False)):
        _, new = run(use_running_average=flag, freeze_stats=flag)
        np.testing.assert_allclose(new.mean, np.full(2, 0.01), rtol=1e-6)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("flag", ["use_running_average", "update_stats"])
def test_flags_that_are_overridden_are_checked(flag):
    with pytest.raises(TypeError, match=f"`{flag}` must be True or False"):
        run(**{flag: 64})


@pytest.mark.usefixtures("untyped")
def test_a_traced_switch_is_refused():
    with pytest.raises(TypeError, match="Make it a static argument of `jit`"):
        jax.jit(lambda flag: run(freeze_affine=flag))(True)


# --- in models ---------------------------------------------------------------------


class Network(nn.Module):
    """A backbone and a head, each with a norm of its own, told to train."""

    backbone: Any
    head: Any

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(4, name="backbone_dense")(x)
        x = nn.relu(self.backbone(name="backbone_norm")(x, not train))
        x = nn.Dense(3, name="head_dense")(x)
        x = self.head(name="head_norm")(x, not train)
        return nn.Dense(1, name="out")(x)[:, 0]


RNG = np.random.default_rng(0)
X_OF_TASK = RNG.normal(1, 2, (32, 5)).astype(np.float32)
TARGET = np.sin(X_OF_TASK).sum(1)


def trained(model, variables, steps=2, tx: Any = None) -> Any:
    tx = tx or optax.sgd(0.1)

    @jax.jit
    def step(variables, opt_state):
        def loss(params):
            y, new = model.apply(
                {**variables, "params": params},
                X_OF_TASK,
                train=True,
                mutable="batch_stats",
            )
            return jnp.square(y - TARGET).mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **new}, opt_state

    opt_state = tx.init(variables["params"])
    for _ in range(steps):
        variables, opt_state = step(variables, opt_state)
    return variables


@functools.cache
def pretrained() -> Any:
    """What a network of plain layers has learned and seen."""
    model = Network(jbn.BatchNorm, functools.partial(jbn.BatchNorm, momentum=0.8))
    init = jax.jit(functools.partial(model.init, train=True))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return trained(model, init(jax.random.key(0), X_OF_TASK))


# https://github.com/n2cholas/jax-resnet/issues/9: whether a layer updates is decided by
# what is mutable, so that a backbone cannot be frozen under a head that trains.
@pytest.mark.usefixtures("standard_promotion")
def test_a_frozen_backbone_under_a_head_that_trains():
    before = pretrained()
    model = Network(jbn.FrozenBatchNorm, jbn.BatchNorm)
    after = trained(model, before)
    for collection in ("params", "batch_stats"):
        assert jax.tree.structure(after[collection]) == jax.tree.structure(
            before[collection]
        )
        old, new = before[collection], after[collection]
        jax.tree.map(
            np.testing.assert_array_equal, new["backbone_norm"], old["backbone_norm"]
        )
        for name, value in new["head_norm"].items():
            assert (value != old["head_norm"][name]).all()
    # Gradients do pass through the frozen layer.
    old, new = (v["params"]["backbone_dense"]["kernel"] for v in (before, after))
    assert (old != new).any(0).all()


@pytest.mark.usefixtures("standard_promotion")
def test_only_the_affine_part_frozen():
    before = pretrained()
    backbone = functools.partial(
        jbn.FrozenBatchNorm, freeze_stats=False, freeze_mode=False
    )
    after = trained(Network(backbone, jbn.BatchNorm), before)
    old, new = (v["params"]["backbone_norm"] for v in (before, after))
    jax.tree.map(np.testing.assert_array_equal, new, old)
    old, new = (v["batch_stats"]["backbone_norm"] for v in (before, after))
    jax.tree.map(lambda v, w: np.testing.assert_array_less(0, abs(v - w)), old, new)


@pytest.mark.usefixtures("standard_promotion")
def test_weight_decay_moves_what_is_frozen():
    before = pretrained()
    model = Network(jbn.FrozenBatchNorm, jbn.BatchNorm)
    decay = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1))
    after = trained(model, before, steps=1, tx=decay)
    old, new = (v["params"]["backbone_norm"]["scale"] for v in (before, after))
    np.testing.assert_allclose(new, 0.99 * old, rtol=1e-6)


@pytest.mark.usefixtures("standard_promotion")
def test_nothing_needs_to_be_mutable():
    before = pretrained()
    model = Network(jbn.FrozenBatchNorm, jbn.FrozenBatchNorm)
    y: Any = model.apply(before, X_OF_TASK, train=True)
    plain = Network(jbn.BatchNorm, jbn.BatchNorm)
    want: Any = plain.apply(before, X_OF_TASK, train=False)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    # Statistics that are not frozen would have to be.
    adapting = functools.partial(jbn.FrozenBatchNorm, freeze_stats=False)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        Network(adapting, jbn.FrozenBatchNorm).apply(before, X_OF_TASK, train=True)


def test_no_mode_has_to_be_asked_for(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    _, stats = make(rng)
    want = oracle.normalize(x, stats.mean, stats.var)
    layer = jbn.FrozenBatchNorm()
    variables = layer.init(jax.random.key(0), x)
    state = {"mean": stats.mean, "var": stats.var}
    y: Any = layer.apply({**variables, "batch_stats": state}, x)
    np.testing.assert_allclose(y, want, **CLOSE)
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.FrozenBatchNorm(freeze_mode=False).apply(variables, x)
    for use_running_average in (False, True):
        layer = jbn.nnx.FrozenBatchNorm(
            3, use_running_average=use_running_average, rngs=nnx.Rngs(0)
        )
        layer.mean[...], layer.var[...] = stats.mean, stats.var
        np.testing.assert_allclose(layer(x), want, **CLOSE)
        np.testing.assert_array_equal(layer.mean[...], stats.mean)


def test_nnx_needs_no_mode_either(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    options: Any = {"use_running_average": None, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.nnx.FrozenBatchNorm(3, freeze_mode=False, **options)(x)
    layer = jbn.nnx.FrozenBatchNorm(3, **options)
    np.testing.assert_allclose(layer(x), x, **CLOSE)
