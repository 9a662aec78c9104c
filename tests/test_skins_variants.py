"""The Flax modules of the variants: each is its function, with every option."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn, nnx

import jbn
import jbn.linen
import jbn.nnx


pytestmark = pytest.mark.sweep


SHAPE = (7, 4, 3)
IDS = np.asarray([0, 2, 1, 0, 2, 2, 0])


class Method(NamedTuple):
    """A module: its function, its own arguments, and what a call needs besides `x`."""

    function: Any
    own: dict[str, Any] = {}  # noqa: RUF012
    call: dict[str, Any] = {}  # noqa: RUF012
    stats_front: tuple[int, ...] = ()
    params_front: tuple[int, ...] | None = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """What the function takes of the module's own arguments."""
        taken = inspect.signature(self.function).parameters
        return {k: v for k, v in self.own.items() if k in taken} | self.call


TRAINS = {"freeze_stats": False, "freeze_mode": False}
METHODS = {
    "BatchNorm": Method(jbn.batch_norm),
    "BatchRenorm": Method(jbn.batch_renorm, {"r_max": 1.25, "d_max": 0.2}),
    "GhostBatchNorm": Method(jbn.ghost_batch_norm, {"num_groups": 3}),
    "DomainBatchNorm": Method(
        jbn.domain_batch_norm, {"num_domains": 3}, {"domain": IDS}, (3,)
    ),
    "ConditionalBatchNorm": Method(
        jbn.conditional_batch_norm,
        {"num_classes": 4, "one_plus": True},
        {"labels": IDS},
        params_front=(4,),
    ),
    "FrozenBatchNorm": Method(jbn.frozen_batch_norm, TRAINS),
}
OTHERS = {
    "DomainBatchNorm, own affine": Method(
        jbn.domain_batch_norm,
        {"num_domains": 3, "own_affine": True},
        {"domain": IDS},
        (3,),
        (3,),
    ),
    "ConditionalBatchNorm, given": Method(
        jbn.conditional_batch_norm,
        {},
        {
            "scale": np.arange(28, dtype=np.float32).reshape(7, 4, 1) / 28,
            "bias": np.asarray([[[0.5, 1.0, -2.0]]], np.float32),
        },
        params_front=None,
    ),
    "FrozenBatchNorm, adapting": Method(
        jbn.frozen_batch_norm,
        {"freeze_affine": False, "freeze_stats": False, "freeze_mode": True},
    ),
}
EVERY = METHODS | OTHERS


def state_of(rng, method, options, shape=SHAPE):
    """Parameters and statistics that differ from the defaults and from each other."""
    axis = options.get("axis", -1)
    axes = axis if isinstance(axis, tuple) else (axis,)
    features = tuple(shape[a] for a in sorted(a % len(shape) for a in axes))
    params = None
    if method.params_front is not None:
        full, dtype = (*method.params_front, *features), options.get("param_dtype")
        scale, bias = (
            jnp.asarray(rng.normal(size=full), dtype or jnp.float32)
            if options.get(f"use_{name}", True)
            else None
            for name in ("scale", "bias")
        )
        params = jbn.Params(scale, bias)
    full = (*method.stats_front, *features)
    tracked = options.get("debias", False) or options.get("momentum", 0) is None
    pending = None
    if options.get("accumulate"):
        pending = jbn.Moments(*rng.uniform(1, 3, (3, *full)))
    stats = jbn.BatchStats(
        rng.normal(size=full),
        rng.uniform(1, 2, full),
        rng.uniform(0.2, 0.9, full) if tracked else None,
        pending,
    )
    stats = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), stats)
    return params, stats


def present(record) -> dict[str, Any]:
    if record is None:
        return {}
    fields = {k: v for k, v in record._asdict().items() if v is not None}
    return fields | {k: present(v) for k, v in fields.items() if isinstance(v, tuple)}


def linen_run(name, method, params, stats, x, call, **options):
    layer = getattr(jbn.linen, name.split(",")[0])(**method.own, **options)
    variables = {"params": present(params), "batch_stats": present(stats)}
    y, new = layer.apply(variables, x, mutable=["batch_stats"], **method.call, **call)
    return y, new["batch_stats"]


def nnx_run(name, method, params, stats, x, call, **options):
    axis = options.get("axis", -1)
    features = stats.mean.shape[len(method.stats_front) :]
    layer = getattr(jbn.nnx, name.split(",")[0])(
        features if isinstance(axis, tuple) else features[0],
        rngs=nnx.Rngs(0),
        **method.own,
        **options,
    )
    for field, value in (present(params) | present(stats)).items():
        if field == "pending":
            for k, v in value.items():
                layer.pending[k][...] = v
        else:
            getattr(layer, field)[...] = value
    y = layer(x, **method.call, **call)
    new = {k: getattr(layer, k) for k in present(stats)}
    return y, {
        k: {i: u[...] for i, u in v.items()} if k == "pending" else v[...]
        for k, v in new.items()
    }


def function_run(method, params, stats, x, call, **options):
    taken = inspect.signature(jbn.batch_norm).parameters
    options = {k: v for k, v in options.items() if k in taken}
    y, new = method.function(x, params, stats, **method.arguments, **options, **call)
    return y, present(new)


def assert_identical(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, e in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_array_equal(a, e)


def differ(a, b) -> bool:
    """By more than rounding."""
    leaves = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return any(v.dtype != w.dtype or abs(v - w).max() > 1e-5 for v, w in leaves)


# Groups of options, each of which shows in the result where all of the group are given.
OPTIONS = {
    "rule": {"momentum": 0.7, "unbiased": True, "reference_weight": 10.0},
    "numbers": {"epsilon": 0.3, "min_weight": 1.0, "trim": 1.5, "tau": 1.5},
    "second moment": {
        "second_moment": True,
        "momentum": 0.6,
        "debias": True,
        "use_scale": False,
    },
    "cumulative": {"momentum": None},
    "axes": {"axis": (1, 2), "momentum": 0.8, "use_bias": False},
    "pending": {
        "accumulate": True,
        "dtype": jnp.bfloat16,
        "param_dtype": jnp.float16,
        "use_fast_variance": False,
    },
}
# What is not for the function, or what it does not run without.
NOT_PASSED = {"debias", "accumulate", "param_dtype", "use_scale", "use_bias"}
NOT_PASSED |= {"use_fast_variance", "axis"}


@pytest.mark.parametrize(
    ("name", "group"),
    [(name, group) for name in METHODS for group in OPTIONS]
    + [(name, "rule") for name in OTHERS]
    + [("DomainBatchNorm, own affine", "axes")],
)
def test_every_option_reaches_the_function(name, group, rng):
    method, options = EVERY[name], OPTIONS[group]
    if name == "BatchRenorm":
        options = {k: v for k, v in options.items() if k != "tau"}
    x = jnp.asarray(rng.normal(size=SHAPE) * 2 + 1, jnp.float32)
    mask = rng.random(SHAPE) > 0.3
    if group == "numbers":
        mask[..., 0] = False
        mask[2, 1, 0] = True  # no more than `min_weight`
    params, stats = state_of(rng, method, options)
    call: dict[str, Any] = {"use_running_average": False, "mask": jnp.asarray(mask)}
    want = function_run(method, params, stats, x, call, **options)
    for run in (linen_run, nnx_run):
        got = run(name, method, params, stats, x, call, **options)
        assert_identical(got, want)
    # A module that forgets one would be seen. (Without momentum the function refuses.)
    passed = set(options) - NOT_PASSED
    for option in passed - ({"momentum"} if group == "cumulative" else set()):
        fewer = {k: v for k, v in options.items() if k != option}
        assert differ(function_run(method, params, stats, x, call, **fewer), want)


@pytest.mark.parametrize(
    "mode", [(False, None), (False, False), (True, None), (True, True)], ids=str
)
@pytest.mark.parametrize("name", [*METHODS, "FrozenBatchNorm, adapting"])
def test_the_mode_is_that_of_the_call_or_of_the_module(name, mode, rng):
    method = EVERY[name]
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    weights = jnp.asarray(rng.random((*SHAPE[:2], 1)), jnp.float32)
    params, stats = state_of(rng, method, {})
    modes: dict[str, Any] = {"use_running_average": mode[0], "update_stats": mode[1]}
    call = modes | {"weights": weights}
    want = function_run(method, params, stats, x, call)
    updates = not mode[0] if mode[1] is None else mode[1]
    by_running = mode[0] or name == "FrozenBatchNorm, adapting"
    unweighted = function_run(method, params, stats, x, modes)
    assert differ(unweighted, want) == (updates or not by_running)
    for run in (linen_run, nnx_run):
        run = functools.partial(run, name, method, params, stats, x)
        assert_identical(run(call), want)
        assert_identical(run({"weights": weights}, **modes), want)
    # The call goes before the module. (In Linen the mode is given once.)
    other = {} if mode[1] is None else {"update_stats": not mode[1]}
    assert_identical(linen_run(name, method, params, stats, x, call, **other), want)
    other["use_running_average"] = not mode[0]
    assert_identical(nnx_run(name, method, params, stats, x, call, **other), want)


@pytest.mark.devices
@pytest.mark.parametrize("name", METHODS)
def test_axis_names_and_groups_reach_the_function(name, rng):
    method = METHODS[name]
    x = jnp.asarray(rng.normal(size=(4, *SHAPE)), jnp.float32)
    params, stats = state_of(rng, method, {})
    call: dict[str, Any] = {"use_running_average": False}
    options: dict[str, Any] = {
        "axis_name": "d",
        "axis_index_groups": [[0, 3], [1, 2]],
    }

    @functools.partial(jax.pmap, axis_name="d", devices=jax.devices()[:4])
    def run(x):
        return (
            function_run(method, params, stats, x, call, **options),
            linen_run(name, method, params, stats, x, call, **options),
            nnx_run(name, method, params, stats, x, call, **options),
        )

    want, *others = run(x)
    for got in others:
        assert_identical(got, want)
    # Statistics of two devices, not of one, and not of four.
    mean = want[1]["mean"]
    np.testing.assert_array_equal(mean[0], mean[3])
    np.testing.assert_array_equal(mean[1], mean[2])
    assert (mean[0] != mean[1]).any()
    _, alone = function_run(method, params, stats, x[0], call)
    assert (mean[0] != alone["mean"]).any()


# --- variables ---------------------------------------------------------------------


def shapes(tree):
    return {
        k: shapes(v) if isinstance(v, dict) else (v.shape, v.dtype)
        for k, v in tree.items()
    }


F32 = jnp.dtype(jnp.float32)
SCHEDULED = Method(jbn.batch_renorm, {"r_max": lambda step: 1.5})


@pytest.mark.parametrize(
    ("name", "method", "options", "params", "stats"),
    [
        ("BatchRenorm", None, {}, {"scale": (3,), "bias": (3,)}, ["mean", "var"]),
        ("BatchRenorm", SCHEDULED, {}, {"scale": (3,), "bias": (3,)}, None),
        ("GhostBatchNorm", None, {}, {"scale": (3,), "bias": (3,)}, ["mean", "var"]),
        (
            "GhostBatchNorm",
            None,
            {"axis": (0, 2), "use_bias": False, "debias": True},
            {"scale": (7, 3)},
            ["mean", "var", "weight"],
        ),
        ("DomainBatchNorm", None, {}, {"scale": (3,), "bias": (3,)}, ["mean", "var"]),
        (
            "DomainBatchNorm, own affine",
            None,
            {"momentum": None, "use_scale": False},
            {"bias": (3, 3)},
            ["mean", "var", "weight"],
        ),
        (
            "ConditionalBatchNorm",
            None,
            {"accumulate": True},
            {"scale": (4, 3), "bias": (4, 3)},
            ["mean", "var", "pending"],
        ),
        ("ConditionalBatchNorm, given", None, {}, {}, ["mean", "var"]),
        ("FrozenBatchNorm", None, {}, {"scale": (3,), "bias": (3,)}, ["mean", "var"]),
    ],
)
def test_variables_and_an_initialization_that_updates_nothing(
    rng, name, method, options, params, stats
):
    scheduled, method = method is not None, method or EVERY[name]
    x = jnp.asarray(rng.normal(2, 3, SHAPE), jnp.float32)
    layer = getattr(jbn.linen, name.split(",")[0])(
        use_running_average=False, axis_name="nowhere", **method.own, **options
    )
    variables: Any = layer.init(jax.random.key(0), x, **method.call)
    features = (7, 3) if options.get("axis") else (3,)
    full = (*method.stats_front, *features)
    want: dict[str, Any] = {
        k: dict.fromkeys(("weight", "mean", "var"), (full, F32))
        if k == "pending"
        else (full, F32)
        for k in stats or ["mean", "var"]
    }
    if scheduled:
        want["step"] = ((), jnp.dtype(jnp.int32))
    assert shapes(variables["batch_stats"]) == want
    assert shapes(variables.get("params", {})) == {
        k: (v, F32) for k, v in params.items()
    }
    for key, value in variables["batch_stats"].items():
        for leaf in jax.tree.leaves(value):
            start = 1 if key == "var" else 0
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, start))

    layer = getattr(jbn.nnx, name.split(",")[0])(
        features if len(features) > 1 else 3, rngs=nnx.Rngs(0), **method.own, **options
    )
    found, rest = nnx.state(layer, nnx.BatchStat), nnx.state(layer, nnx.Param)
    assert shapes(nnx.to_pure_dict(found)) == want
    assert shapes(nnx.to_pure_dict(rest)) == {k: (v, F32) for k, v in params.items()}
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(found),
        variables["batch_stats"],
    )


def test_positional_arguments():
    linen, own = jbn.linen, jbn.nnx
    assert linen.GhostBatchNorm(4).num_groups == 4
    assert linen.DomainBatchNorm(3).num_domains == 3
    renorm = linen.BatchRenorm(2.5, 0.5)
    assert (renorm.r_max, renorm.d_max) == (2.5, 0.5)
    assert linen.ConditionalBatchNorm(10).num_classes == 10
    assert linen.ConditionalBatchNorm().num_classes is None
    # The options of BatchNorm follow, in their order.
    ghost = linen.GhostBatchNorm(4, True, 1, 0.5)
    assert (ghost.use_running_average, ghost.axis, ghost.momentum) == (True, 1, 0.5)

    rngs = nnx.Rngs(0)
    assert own.GhostBatchNorm(6, 4, rngs=rngs).num_groups == 4
    domain = own.DomainBatchNorm(6, 3, True, rngs=rngs)
    assert (domain.num_domains, domain.own_affine) == (3, True)
    renorm = own.BatchRenorm(6, 2.5, 0.5, rngs=rngs)
    assert (renorm.r_max, renorm.d_max) == (2.5, 0.5)
    conditional = own.ConditionalBatchNorm(6, 10, True, rngs=rngs)
    assert (conditional.num_classes, conditional.one_plus) == (10, True)
    frozen = own.FrozenBatchNorm(6, False, True, False, rngs=rngs)
    assert (frozen.freeze_affine, frozen.freeze_stats, frozen.freeze_mode) == (
        False,
        True,
        False,
    )


def test_every_module_is_a_batch_norm_and_has_its_name_in_the_package():
    for name in METHODS:
        assert getattr(jbn, name) is getattr(jbn.linen, name)
        assert issubclass(getattr(jbn.linen, name), jbn.linen.BatchNorm)
        assert issubclass(getattr(jbn.nnx, name), jbn.nnx.BatchNorm)
    assert isinstance(jbn.GhostBatchNorm(2), jbn.linen.BatchNorm)


@pytest.mark.parametrize("name", METHODS)
def test_attributes_are_documented(name):
    # A module that has one of its own explains it, by its name.
    own = METHODS[name].own
    for module in (getattr(jbn.linen, name), getattr(jbn.nnx, name)):
        for argument in own:
            assert f"\n    {argument}: " in (inspect.getdoc(module) or "")


# --- checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["BatchRenorm", "GhostBatchNorm", "FrozenBatchNorm"])
def test_a_checkpoint_of_batch_norm_is_one_of_these(name, rng):
    method = METHODS[name]
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    params, stats = state_of(rng, method, {})
    variables = {"params": present(params), "batch_stats": present(stats)}
    plain, layer = jbn.BatchNorm(), getattr(jbn, name)(**method.own)
    fresh = layer.init(jax.random.key(0), x, True)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables)
    want = plain.apply(variables, x, True)
    np.testing.assert_array_equal(layer.apply(variables, x, True), want)

    peer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    for field, value in (variables["params"] | variables["batch_stats"]).items():
        getattr(peer, field)[...] = value
    module = getattr(jbn.nnx, name)(3, rngs=nnx.Rngs(1), **method.own)
    nnx.update(module, nnx.state(peer))
    module.eval()
    np.testing.assert_array_equal(module(x), want)


def test_a_checkpoint_of_batch_norm_starts_every_domain(rng):
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    params, stats = state_of(rng, METHODS["BatchNorm"], {})
    want: Any = jbn.BatchNorm().apply(
        {"params": present(params), "batch_stats": present(stats)}, x, True
    )
    tiled = {k: jnp.tile(v, (3, 1)) for k, v in present(stats).items()}
    got: Any = jbn.DomainBatchNorm(3).apply(
        {"params": present(params), "batch_stats": tiled}, x, True, domain=IDS
    )
    # Not bit for bit: two programs, which XLA contracts into other multiply-adds.
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=2e-7)


# --- under the transformations of Linen and NNX ------------------------------------


class Chain(nn.Module):
    """All of them, one after the other."""

    options: Any = None

    @nn.compact
    def __call__(self, x, ids):
        options = {"use_running_average": False, **(self.options or {})}
        x = jbn.BatchRenorm(lambda step: 1.5, 0.5, name="renorm", **options)(x)
        x = jnp.sin(nn.Dense(3, name="dense")(x))
        x = jbn.GhostBatchNorm(2, name="ghost", **options)(x)
        x = jnp.sin(x)
        x = jbn.DomainBatchNorm(3, own_affine=True, name="domain", **options)(
            x, domain=ids
        )
        x = jnp.sin(x)
        x = jbn.ConditionalBatchNorm(3, name="conditional", **options)(x, labels=ids)
        return jbn.FrozenBatchNorm(freeze_stats=False, name="frozen", **options)(x)


class NnxChain(nnx.Module):
    def __init__(self, rngs, **options):
        options["rngs"] = rngs
        self.renorm = jbn.nnx.BatchRenorm(3, lambda step: 1.5, 0.5, **options)
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.ghost = jbn.nnx.GhostBatchNorm(3, 2, **options)
        self.domain = jbn.nnx.DomainBatchNorm(3, 3, own_affine=True, **options)
        self.conditional = jbn.nnx.ConditionalBatchNorm(3, 3, **options)
        self.frozen = jbn.nnx.FrozenBatchNorm(3, freeze_stats=False, **options)

    def __call__(self, x, ids):
        x = jnp.sin(self.dense(self.renorm(x)))
        x = jnp.sin(self.ghost(x))
        x = jnp.sin(self.domain(x, domain=ids))
        return self.frozen(self.conditional(x, labels=ids))


# Five norms in a row, each a few float32 roundings, compiled in different ways.
CLOSE: Any = {"rtol": 2e-5, "atol": 2e-5}
GRADIENTS: Any = {"rtol": 1e-3, "atol": 1e-3}  # of up to twenty


def assert_close(got, want, tolerance=CLOSE):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), got, want)


def slices(tree, i):
    return jax.tree.map(lambda v: v[i], tree)


def stacked(*trees):
    return jax.tree.map(lambda *v: jnp.stack(v), *trees)


X = np.random.default_rng(0).normal(1, 2, (12, 3)).astype(np.float32)
IDS_OF_X = np.arange(12) % 3


def random_variables(model, x: Any = X):
    """Variables that are all different from what they start from."""
    variables = jax.jit(model.init)(jax.random.key(0), x, IDS_OF_X)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        v if v.dtype == jnp.int32 else v + 0.3 * jax.random.uniform(key, v.shape)
        for v, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, leaves)


def apply(model, variables, x=X, ids=IDS_OF_X) -> Any:
    return model.apply(variables, x, ids, mutable=["batch_stats"])


def gradients(model, variables):
    """Output, new statistics and gradients."""

    def loss(params):
        y, new = apply(model, {**variables, "params": params})
        return jnp.sin(3 * y).sum(), (y, new["batch_stats"])

    grads, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return y, new, grads


@functools.cache
def chain() -> Any:
    """Variables of a chain, and what a training step makes of them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        variables = random_variables(Chain())
        return variables, *gradients(Chain(), variables)


def nnx_chain(variables, **options) -> Any:
    """The chain in NNX with the variables of Linen."""
    model = NnxChain(nnx.Rngs(0), **options)
    for tree in variables.values():
        for layer, leaves in tree.items():
            for name, value in leaves.items():
                getattr(getattr(model, layer), name)[...] = value
    return model


def stats_of(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


@pytest.mark.usefixtures("standard_promotion")
class TestLinen:
    @pytest.mark.slow
    def test_remat_updates_once(self):
        variables, y, new, grads = chain()
        again = gradients(nn.remat(Chain)(), variables)
        assert_close(again[:2], (y, new))
        assert_close(again[2], grads, GRADIENTS)
        assert int(new["renorm"]["step"]) == 1
        for layer, leaves in new.items():
            for name, value in leaves.items():
                assert (value != variables["batch_stats"][layer][name]).all()
        for layer, leaves in grads.items():
            largest = [float(abs(v).max()) for v in jax.tree.leaves(leaves)]
            assert (min(largest) > 1e-3) == (max(largest) > 0) == (layer != "frozen")

    @pytest.mark.slow
    def test_vmap_over_an_ensemble_of_scans_over_layers(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, ids):
                return Chain(name="chain")(x, ids), None

        axes: Any = {"variable_axes": {"params": 0, "batch_stats": 0}}
        axes |= {"split_rngs": {"params": True}}
        broadcast: Any = nn.broadcast
        stack = nn.scan(Layer, in_axes=broadcast, length=2, **axes)
        in_axes: Any = (0, None)
        model = nn.vmap(stack, in_axes=in_axes, axis_size=2, **axes)()
        x = jnp.stack([X, 2 * X[::-1]])
        variables = random_variables(model, x)
        (y, _), new = jax.jit(functools.partial(apply, model))(variables, x)
        one = jax.jit(functools.partial(apply, Layer()))
        for i in range(2):
            h = x[i]
            for layer in range(2):
                (h, _), state = one(slices(slices(variables, i), layer), h)
                assert_close(slices(slices(new, i), layer), state)
            assert_close(y[i], h)

    def test_statistics_can_be_donated_to_a_step_that_is_traced_once(self):
        model, traces = Chain({"accumulate": True, "debias": True}), []
        variables = jax.jit(model.init)(jax.random.key(0), X, IDS_OF_X)
        first = {"batch_stats": variables["batch_stats"]}

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, params, x):
            traces.append(x)
            return apply(model, {**state, "params": params}, x)

        state = first
        for _ in range(3):
            _, state = step(state, variables["params"], X)
        assert all(v.is_deleted() for v in jax.tree.leaves(first))
        assert len(traces) == 1
        assert int(state["batch_stats"]["renorm"]["step"]) == 3
        weight = state["batch_stats"]["domain"]["pending"]["weight"]
        np.testing.assert_array_equal(weight, np.full((3, 3), 12))


@pytest.mark.usefixtures("standard_promotion")
class TestNnx:
    def test_jit_and_grad_are_linens(self):
        variables, _, new, grads = chain()

        @nnx.jit
        def grad(model, x, ids):
            return nnx.grad(lambda m: jnp.sin(3 * m(x, ids)).sum())(model)

        model = nnx_chain(variables)
        assert_close(nnx.to_pure_dict(grad(model, X, IDS_OF_X)), grads, GRADIENTS)
        assert_close(stats_of(model), new)

    def test_split_and_merge_train_view_and_eval(self):
        variables, y, new, _ = chain()
        model = nnx_chain(variables)
        model.train()
        graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

        @functools.partial(jax.jit, static_argnames="mode")
        def step(params, stats, mode="train"):
            model = nnx.merge(graphdef, params, stats, copy=True)
            if mode == "view":
                flags: Any = {"use_running_average": False, "update_stats": False}
                model = nnx.view(model, **flags)
            else:
                getattr(model, mode)()
            return model(X, IDS_OF_X), nnx.state(model, nnx.BatchStat)

        got, got_new = step(params, stats)
        assert_close(got, y)
        assert_close(nnx.to_pure_dict(got_new), new)
        # The merged copy learned, and this one has not.
        assert_close(stats_of(model), variables["batch_stats"])

        got, same = step(params, stats, "view")
        assert_close(got, y)
        jax.tree.map(np.testing.assert_array_equal, same, stats)

        got, same = step(params, got_new, "eval")
        jax.tree.map(np.testing.assert_array_equal, same, got_new)
        evaluated = Chain({"use_running_average": True})
        want, _ = jax.jit(functools.partial(apply, evaluated))(
            {**variables, "batch_stats": new}
        )
        assert_close(got, want)
        assert np.abs(np.asarray(got) - np.asarray(y)).max() > 0.1

    def test_train_does_not_thaw_what_is_frozen(self):
        layer = jbn.nnx.FrozenBatchNorm(3, rngs=nnx.Rngs(0))
        layer.train()
        np.testing.assert_allclose(layer(X), X / np.sqrt(1 + 1e-5), rtol=1e-6)
        np.testing.assert_array_equal(layer.mean[...], np.zeros(3))

    @pytest.mark.slow
    def test_vmap_over_an_ensemble_and_scan_over_layers(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return NnxChain(rngs)

        models = make(nnx.Rngs(0))
        graphdef, state = nnx.split(NnxChain(nnx.Rngs(0)))[0], nnx.state(models)

        @jax.jit
        def one(state, x):
            model = nnx.merge(graphdef, state, copy=True)
            return model(x, IDS_OF_X), nnx.state(model)

        singles = [slices(state, 0), slices(state, 1)]
        (y0, new0), (y1, new1) = (one(single, X) for single in singles)

        @nnx.jit
        def ensemble(models, x, ids):
            return nnx.vmap(lambda m, x, ids: m(x, ids), in_axes=(0, None, None))(
                models, x, ids
            )

        assert_close(ensemble(models, X, IDS_OF_X), stacked(y0, y1))
        assert_close(nnx.state(models), stacked(new0, new1))

        @nnx.jit
        def layers(models, x, ids):
            carry = (nnx.Carry, 0, None)
            return nnx.scan(
                lambda x, m, ids: m(x, ids), in_axes=carry, out_axes=nnx.Carry
            )(x, models, ids)

        y, last0 = one(new0, X)
        y, last1 = one(new1, y)
        assert_close(layers(models, X, IDS_OF_X), y)
        assert_close(nnx.state(models), stacked(last0, last1))


# --- accumulated gradients ---------------------------------------------------------


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", METHODS)
def test_committed_microbatches_are_one_batch(name, rng):
    method = METHODS[name]
    x = jnp.asarray(rng.normal(1, 2, (3, *SHAPE)), jnp.float32)
    mask = (
        np.arange(7)[None, :, None, None] < np.asarray([7, 2, 5])[:, None, None, None]
    )
    mask = np.broadcast_to(mask, x.shape)
    params, stats = state_of(rng, method, {"debias": True})
    stats = stats._replace(
        pending=jax.tree.map(jnp.zeros_like, jbn.Moments(*stats[:3]))
    )
    layer = getattr(jbn.linen, name)(
        accumulate=True, use_running_average=False, debias=True, **method.own
    )

    def body(state, xs):
        variables = {"params": present(params), "batch_stats": state}
        microbatch, m = xs
        y, new = layer.apply(
            variables, microbatch, mask=m, mutable=["batch_stats"], **method.call
        )
        return new["batch_stats"], y

    @jax.jit
    def step(state):
        state, y = jax.lax.scan(body, state, (x, jnp.asarray(mask)))
        return y, state, jbn.commit(state, momentum=0.7)

    y, waiting, new = step(present(stats))
    for field in ("mean", "var", "weight"):
        np.testing.assert_array_equal(waiting[field], getattr(stats, field))
    jax.tree.map(lambda v: np.testing.assert_array_equal(v, 0 * v), new["pending"])

    domains = range(3) if method.stats_front else [None]
    for g in domains:
        w = mask if g is None else mask & (IDS == g)[None, :, None, None]
        _, mean, var = oracle.moments(x, w)
        old = {
            k: np.asarray(v, np.float64)
            for k, v in present(stats._replace(pending=None)).items()
        }
        now = {k: np.asarray(v) for k, v in new.items() if k != "pending"}
        if g is not None:
            old, now = ({k: v[g] for k, v in tree.items()} for tree in (old, now))
        kept = 0.7 * old["weight"]
        for k, seen in (("mean", mean), ("var", var)):
            want = (kept * old[k] + 0.3 * seen) / (kept + 0.3)
            np.testing.assert_allclose(now[k], want, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(now["weight"], kept + 0.3, rtol=1e-6)
    # Each microbatch is normalized by itself.
    call: dict[str, Any] = {"use_running_average": False, "mask": jnp.asarray(mask[1])}
    want, _ = function_run(method, params, stats, x[1], call)
    np.testing.assert_allclose(y[1], want, **CLOSE)


@pytest.mark.usefixtures("standard_promotion")
def test_commit_in_a_model_of_linen():
    variables, _, want, _ = chain()
    model = Chain({"accumulate": True})
    fresh: Any = jax.jit(model.init)(jax.random.key(0), X, IDS_OF_X)["batch_stats"]
    state = {
        layer: {**fresh[layer], **leaves}
        for layer, leaves in variables["batch_stats"].items()
    }
    run = jax.jit(functools.partial(apply, model))
    for _ in range(2):
        _, new = run({**variables, "batch_stats": state})
        state = new["batch_stats"]
    committed: Any = jbn.commit({"somewhere": {"deep": state}})
    committed = committed["somewhere"]["deep"]
    assert int(committed["renorm"]["step"]) == 2
    # The same data twice are the data.
    for layer, leaves in want.items():
        for name in ("mean", "var"):
            np.testing.assert_allclose(committed[layer][name], leaves[name], **CLOSE)


@pytest.mark.usefixtures("standard_promotion")
def test_commit_in_a_model_of_nnx_takes_the_rule_of_each_layer(rng):
    class Model(nnx.Module):
        def __init__(self, rngs):
            norm = functools.partial(jbn.nnx.BatchNorm, 3, rngs=rngs)
            self.layers = nnx.List(
                [
                    norm(accumulate=True, momentum=0.5),
                    norm(accumulate=True, momentum=0.8, unbiased=True),
                    norm(accumulate=True, momentum=0.9, reference_weight=20.0),
                    norm(accumulate=True, momentum=0.6, second_moment=True),
                    norm(accumulate=True, momentum=None),
                    jbn.nnx.GhostBatchNorm(
                        3, 2, accumulate=True, momentum=0.4, rngs=rngs
                    ),
                    norm(momentum=0.0, update_stats=False),
                ]
            )

        def __call__(self, x, mask):
            return [layer(x, mask=mask) for layer in self.layers]

    x = rng.normal(1, 2, (2, 6, 3)).astype(np.float32)
    mask = np.arange(6)[:, None] < np.asarray([6, 3])[:, None, None]
    model = Model(nnx.Rngs(0))

    @nnx.jit
    def step(model, x, mask):
        for microbatch, m in zip(x, mask, strict=True):
            model(microbatch, m)
        jbn.nnx.commit(model)

    step(model, jnp.asarray(x), jnp.asarray(mask))
    weight, mean, var = oracle.moments(x, mask)
    add = 1 - 0.9 ** (weight / 20)
    want = [
        (0.5 * mean, 0.5 + 0.5 * var),
        (0.2 * mean, 0.8 + 0.2 * var * 9 / 8),
        (add * mean, 1 - add + add * var),
        (0.4 * mean, 0.6 + 0.4 * var + 0.24 * mean**2),
        (mean, var),
        (0.6 * mean, 0.4 + 0.6 * var),
        (np.zeros(3), np.ones(3)),
    ]
    for layer, (want_mean, want_var) in zip(model.layers, want, strict=True):
        np.testing.assert_allclose(layer.mean[...], want_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.var[...], want_var, rtol=1e-5)
        if layer.accumulate:
            for leaf in layer.pending.values():
                np.testing.assert_array_equal(leaf[...], np.zeros(3))


# --- mistakes ----------------------------------------------------------------------


def linen_call(name, *args, call: Any = None, **options):
    layer = getattr(jbn.linen, name)(*args, **options)
    layer.init(jax.random.key(0), X, False, **(call or {}))


def nnx_call(name, *args, call: Any = None, **options):
    layer = getattr(jbn.nnx, name)(3, *args, rngs=nnx.Rngs(0), **options)
    layer(X, **(call or {}))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("run", [linen_call, nnx_call])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "fix"),
    [
        (("DomainBatchNorm", 3), {}, TypeError, "`domain` must be given: which domain"),
        (
            ("ConditionalBatchNorm", 3),
            {},
            ValueError,
            "got neither. Without a condition use `batch_norm`",
        ),
        (
            ("ConditionalBatchNorm", 3),
            {"call": {"scale": X}},
            ValueError,
            "`params` are tables for `labels`, and must be None if `scale`",
        ),
        (
            ("ConditionalBatchNorm", 3),
            {"call": {"scale": X, "labels": 0}},
            ValueError,
            "takes either `labels`, .*got both",
        ),
        (
            ("ConditionalBatchNorm",),
            {"call": {"labels": 0}},
            ValueError,
            "`params` must have tables with one row per label",
        ),
        (("GhostBatchNorm",), {}, TypeError, "num_groups"),
        (("GhostBatchNorm", 0), {}, ValueError, "`num_groups` must be at least 1"),
        (("GhostBatchNorm", 2.5), {}, TypeError, "`num_groups` must be an integer"),
        (("DomainBatchNorm",), {}, TypeError, "num_domains"),
        (("BatchRenorm",), {"tau": 1.0}, ValueError, "Drop `tau`, or use `batch_norm`"),
        (("BatchRenorm", 0.5), {}, ValueError, "`r_max` must be at least 1; got 0.5"),
        (
            ("BatchRenorm",),
            {"d_max": lambda step: -1.0},
            ValueError,
            "`d_max` must be at least 0; got -1.0",
        ),
        (
            ("FrozenBatchNorm",),
            {"freeze_affine": None},
            TypeError,
            "`freeze_affine` must be True or False",
        ),
    ],
)
def test_a_mistake_gets_one_clear_error(run, arguments, options, error, fix):
    with pytest.raises(error, match=fix):
        run(*arguments, **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_mode_must_be_given(name):
    method = METHODS[name]
    layer = getattr(jbn.linen, name)(**method.own)
    with pytest.raises(ValueError, match="use_running_average"):
        layer.init(jax.random.key(0), jnp.ones(SHAPE), **method.call)
    layer = getattr(jbn.nnx, name)(
        3, use_running_average=None, rngs=nnx.Rngs(0), **method.own
    )
    with pytest.raises(ValueError, match=r"`model.train\(\)` or `model.eval\(\)`"):
        layer(jnp.ones(SHAPE), **method.call)


def test_nothing_to_commit():
    fix = "Make the layers with `accumulate=True`"
    with pytest.raises(ValueError, match=fix):
        jbn.nnx.commit(NnxChain(nnx.Rngs(0)))
    variables: Any = jbn.BatchNorm().init(jax.random.key(0), X, True)
    with pytest.raises(ValueError, match=fix):
        jbn.commit(variables["batch_stats"])
