"""The Flax modules: equal to the function, to each other, and in place of Flax's."""

import functools
import inspect
from typing import Any

import flax.errors
import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from jax.sharding import AxisType, PartitionSpec as P

import jbn
import jbn.linen
import jbn.nnx


pytestmark = pytest.mark.sweep


SHAPE = (4, 6, 3, 2)


def linen_run(x, params, stats, call, **options):
    """Output and new statistics of the Linen module from given variables."""
    layer = jbn.linen.BatchNorm(**options)
    variables = {
        "params": {k: v for k, v in params._asdict().items() if v is not None},
        "batch_stats": {k: v for k, v in stats._asdict().items() if v is not None},
    }
    y, new = layer.apply(variables, x, mutable=["batch_stats"], **call)
    new_stats: Any = new["batch_stats"]
    return y, jbn.BatchStats(**new_stats)


def nnx_run(x, params, stats, call, **options):
    layer = jbn.nnx.BatchNorm(stats.mean.shape, rngs=nnx.Rngs(0), **options)
    for name, value in (*params._asdict().items(), *stats._asdict().items()):
        if value is not None:
            getattr(layer, name)[...] = value
    y = layer(x, **call)
    new = {n: getattr(layer, n)[...] for n in stats._fields if hasattr(layer, n)}
    return y, jbn.BatchStats(**new)


@pytest.mark.parametrize("run", [linen_run, nnx_run])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"axis": 1, "momentum": 0.7, "epsilon": 0.3},
        {"axis": (1, -1), "momentum": 0.5, "epsilon": 0.1, "unbiased": True},
        {"dtype": jnp.bfloat16, "use_scale": False},
        {"param_dtype": jnp.bfloat16, "use_bias": False},
        {"debias": True, "momentum": 0.6},
        {"momentum": None},
        {"use_fast_variance": False, "epsilon": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("counting", ["all", "mask", "weights"])
@pytest.mark.parametrize(
    "mode", [(False, None), (False, False), (True, None), (True, True)], ids=str
)
def test_modules_are_the_function_bit_for_bit(run, options, counting, mode, rng):
    x = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    axis = options.get("axis", -1)
    features = tuple(SHAPE[a] for a in (axis if isinstance(axis, tuple) else (axis,)))
    dtype = options.get("param_dtype", jnp.float32)
    tracked = options.get("debias", False) or options.get("momentum", 0) is None
    params = jbn.Params(
        jnp.asarray(rng.standard_normal(features), dtype)
        if options.get("use_scale", True)
        else None,
        jnp.asarray(rng.standard_normal(features), dtype)
        if options.get("use_bias", True)
        else None,
    )
    stats = jbn.BatchStats(
        jnp.asarray(rng.standard_normal(features), jnp.float32),
        jnp.asarray(rng.uniform(1, 2, features), jnp.float32),
        jnp.full(features, 0.4) if tracked else None,
    )
    call: dict[str, Any] = {"use_running_average": mode[0], "update_stats": mode[1]}
    if counting == "mask":
        call["mask"] = jnp.asarray(rng.random(SHAPE) > 0.4)
    elif counting == "weights":
        call["weights"] = jnp.asarray(rng.random(SHAPE), jnp.float32)

    function = {
        k: v
        for k, v in options.items()
        if k in ("axis", "momentum", "epsilon", "unbiased", "dtype")
    }
    want, want_stats = jbn.batch_norm(x, params, stats, **function, **call)
    got, got_stats = run(x, params, stats, call, **options)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)
    jax.tree.map(np.testing.assert_array_equal, got_stats, want_stats)


@pytest.mark.devices
@pytest.mark.parametrize("axis_name", ["d", ("a", "b")])
@pytest.mark.parametrize("run", [linen_run, nnx_run])
def test_modules_pass_axis_names_on(run, axis_name, rng):
    x = jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    sizes = (4,) if len(names) == 1 else (2, 2)
    mesh = jax.make_mesh(
        sizes, names, (AxisType.Auto,) * len(names), devices=jax.devices()[:4]
    )
    params, stats = jbn.init(3)
    call = {"use_running_average": False}

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(names), out_specs=(P(names), P())
    )
    def sharded(x):
        return run(x, params, stats, call, axis_name=axis_name)

    y, new = jax.jit(sharded)(x)
    want, want_new = jbn.batch_norm(x, params, stats, use_running_average=False)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        new,
        want_new,
    )


@pytest.mark.devices
@pytest.mark.parametrize("run", [linen_run, nnx_run])
def test_modules_pass_groups_on(run, rng):
    x = jnp.asarray(rng.standard_normal((4, 5, 3)), jnp.float32)
    params, stats = jbn.init(3)
    groups = [[0, 1], [2, 3]]
    call = {"use_running_average": False}
    y, _ = jax.pmap(
        lambda x: run(x, params, stats, call, axis_name="d", axis_index_groups=groups),
        "d",
        devices=jax.devices()[:4],
    )(x)
    for group in groups:
        rows = jnp.concatenate([x[i] for i in group])
        want, _ = jbn.batch_norm(rows, params, stats, use_running_average=False)
        got = np.concatenate([y[i] for i in group])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# --- in place of Flax's ------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (jbn.linen.BatchNorm.__call__, flax.linen.BatchNorm.__call__),
        (jbn.nnx.BatchNorm.__call__, flax.nnx.BatchNorm.__call__),
        (jbn.nnx.BatchNorm.__init__, flax.nnx.BatchNorm.__init__),
        (jbn.linen.BatchNorm, flax.linen.BatchNorm),
    ],
)
def test_every_argument_of_flax_by_name_position_and_default(ours, theirs):
    ours, theirs = (inspect.signature(f).parameters for f in (ours, theirs))
    positional = [
        [n for n, p in s.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
        for s in (ours, theirs)
    ]
    if "parent" in theirs:  # a Linen dataclass: `parent` and `name` come last
        positional = [[n for n in p if n not in ("parent", "name")] for p in positional]
    assert positional[0][: len(positional[1])] == positional[1]
    for name, parameter in theirs.items():
        default = ours[name].default
        if callable(parameter.default) and "init" in name:
            # Initializers are compared by what they make.
            args = (jax.random.key(0), (3,), jnp.float32)
            np.testing.assert_array_equal(default(*args), parameter.default(*args))
        else:
            assert default == parameter.default


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_linen_checkpoint_of_flax_evaluates_equally_and_back(dtype, rng):
    x = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    theirs, ours = flax.linen.BatchNorm(dtype=dtype), jbn.BatchNorm(dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):
        variables = theirs.init(jax.random.key(0), x, False)
        _, new = theirs.apply(variables, x + 3, False, mutable=["batch_stats"])
        trained = {**variables, **new}
        want = theirs.apply(trained, x, True)
    assert_same_structure(ours.init(jax.random.key(0), x, False), variables)
    np.testing.assert_array_equal(ours.apply(trained, x, True), want)
    _, again = ours.apply(variables, x + 3, False, mutable=["batch_stats"])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), again, new)


def test_nnx_state_of_flax_evaluates_equally(rng):
    x = jnp.asarray(rng.standard_normal(SHAPE), jnp.float32)
    theirs = flax.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    ours = jbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    with jax.numpy_dtype_promotion("standard"):
        theirs(x)
        theirs.eval()
        want = theirs(x)
    nnx.update(ours, nnx.state(theirs))
    ours.eval()
    np.testing.assert_array_equal(ours(x), want)
    assert_same_structure(
        nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(theirs))
    )


def assert_same_structure(got, want):
    def describe(tree):
        return jax.tree.map(lambda v: (v.shape, v.dtype), tree)

    assert describe(got) == describe(want)


def test_linen_initialization_updates_nothing_and_needs_no_axis(rng):
    x = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    layer = jbn.BatchNorm(use_running_average=False, axis_name="nowhere")
    y, variables = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))
    np.testing.assert_allclose(y.mean(0), np.zeros(3), atol=1e-6)
    with pytest.raises(NameError, match="Under plain `jit` leave it None"):
        layer.apply(variables, x, mutable=["batch_stats"])


def test_inference_needs_no_axis(rng):
    """A model that was trained under `pmap` is evaluated anywhere, as in Flax."""
    x = rng.standard_normal((5, 3)).astype("f")
    others = {"axis_name": "nowhere", "axis_index_groups": [[0, 1]]}
    want = nn.BatchNorm(use_running_average=True, **others)
    ours = jbn.BatchNorm(use_running_average=True, **others)
    variables = ours.init(jax.random.key(0), x)
    expected: Any = want.apply(variables, x)
    found: Any = ours.apply(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    layer = jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), use_running_average=True, **others)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-6)
    with pytest.raises(NameError, match="Under plain `jit` leave it None"):
        ours.apply(variables, x, update_stats=True, mutable=["batch_stats"])


def test_linen_inference_needs_nothing_mutable(rng):
    x = jnp.asarray(rng.standard_normal((5, 3)), jnp.float32)
    layer = jbn.BatchNorm()
    variables = layer.init(jax.random.key(0), x, use_running_average=True)
    layer.apply(variables, x, use_running_average=True)
    layer.apply(variables, x, use_running_average=False, update_stats=False)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        layer.apply(variables, x, use_running_average=False)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_images_of_integers_are_taken_as_float32(dtype, rng):
    x = rng.integers(0, 2, (8, 3)).astype(dtype)
    want, _ = jbn.batch_norm(
        x.astype(np.float32), None, None, use_running_average=False
    )
    layer = jbn.BatchNorm(use_running_average=False)
    got, _ = layer.init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x), want)


@pytest.mark.usefixtures("untyped")
def test_a_feature_count_in_place_of_a_flag_is_refused():
    with pytest.raises(TypeError, match="infers the number of features from"):
        jbn.BatchNorm(64)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="Pass flags by name"):
        jbn.nnx.BatchNorm(True, rngs=nnx.Rngs(0))


def test_a_mode_must_be_given(rng):
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="use_running_average"):
        jbn.BatchNorm().init(jax.random.key(0), x)
    layer = jbn.nnx.BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        layer(x)


# --- under the transformations of NNX and Linen ------------------------------------


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(3, 3, rngs=rngs)
        self.norm = jbn.nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return jax.nn.relu(self.norm(self.dense(x)))


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.standard_normal((8, 3)), jnp.float32)


@pytest.mark.usefixtures("standard_promotion")
class TestNnx:
    def test_train_and_eval(self, x):
        net = Net(nnx.Rngs(0))
        net.train()
        before = net.norm.mean[...]
        net(x)
        after = net.norm.mean[...]
        assert (before != after).all()
        net.eval()
        net(x)
        np.testing.assert_array_equal(net.norm.mean[...], after)

    def test_view_freezes_one_layer(self, x):
        net = Net(nnx.Rngs(0))
        frozen = nnx.view(net, use_running_average=False, update_stats=False)
        before = net.norm.mean[...]
        frozen(x)
        np.testing.assert_array_equal(net.norm.mean[...], before)

    def test_view_info_explains_the_view(self):
        info = nnx.view_info(Net(nnx.Rngs(0)))
        assert "use_running_average: bool | None = None" in info
        assert "Whether to normalize by the running statistics." in info

    def test_split_and_merge(self, x):
        net = Net(nnx.Rngs(0))
        graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)

        @jax.jit
        def step(params, stats, x):
            net = nnx.merge(graphdef, params, stats, copy=True)
            y = net(x)
            return y, nnx.state(net, nnx.BatchStat)

        y, new = step(params, stats, x)
        np.testing.assert_allclose(y, net(x), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(
            new["norm"]["mean"][...], net.norm.mean[...], rtol=1e-6, atol=1e-7
        )

    def test_jit_and_grad_update_once(self, x):
        net, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))

        @nnx.jit
        def step(net, x):
            return nnx.grad(lambda net, x: (net(x) ** 2).sum())(net, x)

        grads = step(net, x)
        other(x)
        np.testing.assert_allclose(
            net.norm.mean[...], other.norm.mean[...], rtol=1e-5, atol=1e-7
        )
        assert np.abs(grads["norm"]["scale"][...]).min() > 0

    def test_remat_updates_once(self, x):
        net, other = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))

        def loss(net, x):
            return (nnx.remat(lambda net, x: net(x))(net, x) ** 2).sum()

        got = nnx.grad(loss)(net, x)
        want = nnx.grad(lambda net, x: (net(x) ** 2).sum())(other, x)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            nnx.to_pure_dict(got),
            nnx.to_pure_dict(want),
        )
        np.testing.assert_allclose(
            net.norm.mean[...], other.norm.mean[...], rtol=1e-5, atol=1e-7
        )

    def test_vmap_over_an_ensemble(self, x):
        @nnx.split_rngs(splits=4)
        @nnx.vmap
        def make(rngs):
            return Net(rngs)

        nets = make(nnx.Rngs(0))
        y = nnx.vmap(lambda net, x: net(x), in_axes=(0, None))(nets, x)
        assert y.shape == (4, 8, 3)
        assert nets.norm.mean[...].shape == (4, 3)
        assert np.ptp(nets.norm.mean[...], axis=0).min() > 0

    def test_scan_over_layers(self, x):
        @nnx.split_rngs(splits=4)
        @nnx.vmap
        def make(rngs):
            return Net(rngs)

        nets = make(nnx.Rngs(0))
        single = [
            nnx.merge(
                nnx.graphdef(Net(nnx.Rngs(0))),
                jax.tree.map(lambda v, i=i: v[i], nnx.state(nets)),
            )
            for i in range(4)
        ]
        y = nnx.scan(lambda x, net: net(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, nets
        )
        want = x
        for net in single:
            want = net(want)
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            nets.norm.var[...], [n.norm.var[...] for n in single], rtol=1e-6
        )

    def test_a_users_promote_dtype_is_honoured(self, x):
        seen = {}

        def promote(arrays, *, dtype):
            seen["dtypes"] = [a.dtype for a in arrays]
            return tuple(a.astype(jnp.bfloat16) for a in arrays)

        layer = jbn.nnx.BatchNorm(
            3, promote_dtype=promote, use_running_average=True, rngs=nnx.Rngs(0)
        )
        layer.mean[...] = jnp.full(3, 1000.7)
        y = layer(jnp.full((1, 3), 1000.0))
        assert seen["dtypes"] == [jnp.float32] * 5
        assert y.dtype == jnp.bfloat16
        # 1000.7 is 1000 in bfloat16: what the user asked for.
        np.testing.assert_array_equal(y, np.zeros((1, 3)))

    def test_the_default_never_rounds_statistics(self):
        layer = jbn.nnx.BatchNorm(
            1, dtype=jnp.bfloat16, use_running_average=True, rngs=nnx.Rngs(0)
        )
        layer.mean[...] = jnp.full(1, 1000.7)
        y = layer(jnp.full((1, 1), 1001.7))
        assert float(y[0, 0]) == 1.0  # flax.nnx: 0.0


@pytest.mark.usefixtures("standard_promotion")
class TestLinen:
    def test_vmap_with_a_mapped_axis_is_one_batch(self, x):
        layer = nn.vmap(
            jbn.BatchNorm,
            variable_axes={"params": None, "batch_stats": None},
            split_rngs={"params": False},
            axis_name="d",
        )(use_running_average=False, axis_name="d")
        variables = layer.init(jax.random.key(0), x.reshape(4, 2, 3))
        y, new = layer.apply(variables, x.reshape(4, 2, 3), mutable=["batch_stats"])
        new_stats: Any = new["batch_stats"]
        want, stats = jbn.batch_norm(x, *jbn.init(3), use_running_average=False)
        np.testing.assert_allclose(y.reshape(8, 3), want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new_stats["var"], stats.var, rtol=1e-6, atol=1e-7)

    def test_remat_updates_once(self, x):
        class Model(nn.Module):
            norm: type[nn.Module]

            @nn.compact
            def __call__(self, x):
                return jnp.sin(self.norm(use_running_average=False, name="n")(x))

        def run(norm):
            model = Model(norm)
            variables = model.init(jax.random.key(0), x)

            def loss(params):
                y, new = model.apply(
                    {**variables, "params": params}, x, mutable=["batch_stats"]
                )
                return (y * x).sum(), new

            return jax.grad(loss, has_aux=True)(variables["params"])

        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            run(nn.remat(jbn.BatchNorm)),
            run(jbn.BatchNorm),
        )

    def test_scan_over_layers(self, x):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return jbn.BatchNorm(use_running_average=False)(nn.Dense(3)(x)), None

        stack = nn.scan(
            Layer,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )()
        variables = stack.init(jax.random.key(0), x, None)
        (y, _), new = stack.apply(variables, x, None, mutable=["batch_stats"])
        h = x
        for i in range(3):
            one = jax.tree.map(lambda v, i=i: v[i], variables)
            (h, _), state = Layer().apply(one, h, None, mutable=["batch_stats"])
            jax.tree.map(
                lambda got, want, i=i: np.testing.assert_allclose(
                    got[i], want, rtol=1e-5, atol=1e-6
                ),
                new,
                state,
            )
        np.testing.assert_allclose(y, h, rtol=1e-5, atol=1e-6)

    def test_summary_has_one_row(self, x):
        table = jbn.BatchNorm(use_running_average=True).tabulate(jax.random.key(0), x)
        assert "BatchNorm" in table
