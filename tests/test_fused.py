"""Activation and residual inside of a batch norm: the same values, in less memory."""

import dataclasses
import functools
import operator
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from differentiation import QUICKLY, SHAPE, example, modes, once, plain
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ways import on

import jbn
import jbn.nnx
from jbn.models.resnet import BottleneckBlock, ResNet


pytestmark = pytest.mark.sweep


ACTIVATIONS = {
    "none": lambda z: z,
    "relu": jax.nn.relu,
    "leaky relu": functools.partial(jax.nn.leaky_relu, negative_slope=0.3),
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}


def reference(activation: Callable[..., Any]):
    """The formula, for JAX to differentiate; the residual, too, depends on `x`."""

    def f(x, *others):
        return activation(plain(x, *others) + jnp.sin(3 * x))

    return f


def ours(activation: Callable[..., Any], weighted: bool = True):
    def f(x, weights, scale, bias, epsilon):
        return jbn.batch_norm(
            x,
            jbn.Params(scale, bias),
            None,
            use_running_average=False,
            weights=weights if weighted else None,
            epsilon=epsilon,
            residual=jnp.sin(3 * x),
            activation=activation,
        )[0]

    return f


@pytest.fixture
def args(rng: np.random.Generator):
    return example(rng)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", list(modes(0.0)))
def test_every_mode_agrees_with_autodiff_of_the_formula(mode, args, rng):
    derive = modes(jnp.asarray(rng.standard_normal(SHAPE)))[mode]
    got = jax.jit(functools.partial(derive, ours(jax.nn.silu)))(args)
    want = once(functools.partial(derive, reference(jax.nn.silu)), args)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9), got, want
    )


@pytest.mark.usefixtures("lowering")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name, args, rng):
    derive = modes(jnp.asarray(rng.standard_normal(SHAPE)))
    activation = ACTIVATIONS[name]
    for mode in ("jvp", "grad", "grad of affine alone"):
        got = jax.jit(functools.partial(derive[mode], ours(activation)))(args)
        want = once(functools.partial(derive[mode], reference(activation)), args)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9),
            got,
            want,
        )


@on("one device", "as on a GPU")
@pytest.mark.usefixtures("x64")
def test_relu_whose_slope_is_seen_in_the_output(args, rng):
    """Without weights, and with a residual."""
    x, _, *others = args
    args = x, jnp.ones_like(x[..., :1]), *others
    derive = modes(jnp.asarray(rng.standard_normal(SHAPE)))
    for mode in ("jvp", "grad of x alone", "grad of affine alone", "third"):
        f = functools.partial(derive[mode], ours(jax.nn.relu, weighted=False))
        want = once(functools.partial(derive[mode], reference(jax.nn.relu)), args)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9),
            jax.jit(f)(args),
            want,
        )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("with_residual", [False, True])
def test_relu_has_no_slope_at_zero(with_residual):
    """In a feature of mean zero, and in one whose scale is zero."""
    x = np.array([[-1.0, 2.0], [0.0, 3.0], [1.0, 7.0]])
    ct = np.array([[2.0, 3.0], [5.0, 7.0], [11.0, 13.0]])
    params = jbn.Params(jnp.array([2.0, 0.0]), jnp.zeros(2))
    residual = jnp.zeros(x.shape) if with_residual else None

    def f(x, params):
        return jbn.batch_norm(
            x,
            params,
            None,
            use_running_average=False,
            residual=residual,
            activation=jax.nn.relu,
        )[0]

    y, vjp = jax.vjp(f, x, params)
    positive = np.array([[0, 0], [0, 0], [1, 0]])
    np.testing.assert_array_equal(y > 0, positive)
    dx, dparams = vjp(jnp.asarray(ct))
    want = oracle.input_gradient(x, ct * positive, params.scale)
    for g, w in zip((dx, *dparams), want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", [None, jax.nn.silu])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_gradient_of_the_residual(activation, use_running_average, args, rng):
    """Alone, and beside the others."""
    x, weights, scale, bias, _ = args
    r, ct = jnp.asarray(rng.standard_normal((2, *SHAPE)))
    running = jbn.BatchStats(bias, jnp.square(scale) + 1)

    def norm(x, residual, activation, weights=weights):
        return jbn.batch_norm(
            x,
            jbn.Params(scale, bias),
            running,
            use_running_average=use_running_average,
            weights=weights,
            residual=residual,
            activation=activation,
        )[0]

    act = activation or (lambda z: z)
    fused = lambda x, r: (norm(x, r, activation) * ct).sum()
    apart = lambda x, r: (act(norm(x, None, None) + r) * ct).sum()
    for argnums in (0, 1, (0, 1)):
        got = jax.jit(jax.grad(fused, argnums))(x, r)
        want = once(jax.grad(apart, argnums), x, r)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-10),
            got,
            want,
        )


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu])
def test_padding_of_any_value(activation, bad, rng):
    """What is masked may be anything, in `x` and in the residual, also in gradients."""
    x, r, ct = rng.standard_normal((3, 8, 4)).astype(np.float32)
    x[5:], r[6:] = bad, -bad
    ct[5:] = 0
    params = jbn.Params(*jnp.asarray(rng.standard_normal((2, 4)), jnp.float32))
    mask = np.arange(8) < 5

    def loss(x, r, params, mask, ct):
        y, _ = jbn.batch_norm(
            x,
            params,
            None,
            use_running_average=False,
            mask=mask,
            residual=r,
            activation=activation,
        )
        return (jnp.where(ct == 0, 0, y) * ct).sum(), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, y), got = run(x, r, params, mask, ct)
    (_, _), want = run(x[:5], r[:5], params, mask[:5], ct[:5])
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g[: len(w)], w, rtol=1e-5, atol=1e-6)
        assert not np.asarray(g[len(w) :]).any()
    act = activation or (lambda z: z)
    np.testing.assert_allclose(y[5], act(params.bias + r[5]), rtol=1e-5, atol=1e-6)
    assert params.bias is not None
    for row in (6, 7):
        np.testing.assert_allclose(y[row], act(params.bias), rtol=1e-5, atol=1e-6)


def test_rounded_once(rng):
    """In 16 bits the sum and the activation are of what has not been rounded."""
    x, r = (jnp.asarray(v, jnp.bfloat16) for v in rng.standard_normal((2, 64, 8)))
    call = functools.partial(
        jbn.batch_norm,
        params=None,
        batch_stats=None,
        use_running_average=False,
        activation=jax.nn.silu,
    )
    y, _ = call(x, residual=r)
    wide, _ = call(x.astype(jnp.float32), residual=r.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@on("one device", "as on a GPU")
@pytest.mark.parametrize("with_residual", [False, True])
def test_16_bit_tangents_are_rounded_once(with_residual, rng):
    """Not term by term: the terms of a tangent are larger than their sum."""
    x, dx, r, dr = jnp.asarray(rng.standard_normal((4, 64, 8)), jnp.bfloat16)

    def f(x, r):
        return jbn.batch_norm(
            x,
            None,
            None,
            use_running_average=False,
            residual=r if with_residual else None,
            activation=jax.nn.relu,
        )[0]

    _, got = jax.jit(lambda *args: jax.jvp(f, args[:2], args[2:]))(x, r, dx, dr)
    x, dx, r, dr = (np.asarray(v, np.float64) for v in (x, dx, r, dr))
    rstd = 1 / np.sqrt(x.var(0) + 1e-5)
    xh = (x - x.mean(0)) * rstd
    want = rstd * (dx - dx.mean(0) - xh * (xh * dx).mean(0)) + with_residual * dr
    want = np.where(xh + with_residual * r > 0, want, 0)
    # Half a unit in the last place, and what float32 can tip.
    ulp = np.abs(np.asarray(jnp.spacing(jnp.asarray(want, jnp.bfloat16)), np.float64))
    assert (np.abs(np.asarray(got, np.float64) - want) / ulp).max() < 0.51


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize(
    ("activation", "residual", "kept"),
    [
        (None, False, 2),
        (jax.nn.relu, False, 2),
        (jax.nn.relu, True, 4),
        (None, True, 2),
    ],
)
def test_what_is_kept_for_the_backward_pass(activation, residual, kept, rng):
    """`x`, and the residual where its sign matters: nothing for the activation."""
    rows, features = 4096, 8
    x, r = jnp.asarray(rng.standard_normal((2, rows, features)), jnp.bfloat16)
    params, _ = jbn.init(features)

    def f(x, params, r):
        return jbn.batch_norm(
            x,
            params,
            None,
            use_running_average=False,
            residual=r if residual else None,
            activation=activation,
        )[0]

    _, vjp = jax.vjp(jax.jit(f), x, params, r)
    leaves = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(vjp)}
    size = sum(leaf.nbytes for leaf in leaves.values())
    assert kept * x.size <= size <= kept * x.size + 64 * features


def layers(cls: type, skin: str, **options: Any):
    """Two layers with the same variables, the second with ReLU: each a function."""
    own = {
        "GhostBatchNorm": {"num_groups": 3},
        "DomainBatchNorm": {"num_domains": 2},
        "ConditionalBatchNorm": {"num_classes": 3},
        "FrozenBatchNorm": {"freeze_mode": False},
    }.get(cls.__name__, {}) | options
    calls = {
        "DomainBatchNorm": {"domain": np.arange(8) % 2},
        "ConditionalBatchNorm": {"labels": np.arange(8) % 3},
    }.get(cls.__name__, {})

    def linen(activation):
        layer = cls(use_running_average=False, activation=activation, **own)

        def run(x, **kwargs):
            variables = layer.init(jax.random.key(0), x, **calls)
            return layer.apply(variables, x, **calls, **kwargs, mutable=["batch_stats"])

        return run

    def of_nnx(activation):
        def run(x, **kwargs):
            layer = cls(x.shape[-1], activation=activation, rngs=nnx.Rngs(0), **own)
            y = layer(x, **calls, **kwargs)
            return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

        return run

    make = linen if skin == "linen" else of_nnx
    return make(None), make(jax.nn.relu)


@pytest.mark.parametrize("skin", ["linen", "nnx"])
@pytest.mark.parametrize(
    "name", [n for n in dir(jbn) if n.endswith("BatchNorm") or n == "BatchRenorm"]
)
def test_modules(name, skin, rng):
    """Each class has both, and statistics do not notice."""
    module = jbn if skin == "linen" else jbn.nnx
    plain, fused = layers(getattr(module, name), skin)
    x, r = rng.standard_normal((2, 8, 5)).astype(np.float32)
    y, stats = plain(x)
    z, same = fused(x, residual=r)
    np.testing.assert_allclose(z, jax.nn.relu(y + r), rtol=1e-6, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    z, _ = fused(x)
    np.testing.assert_allclose(z, jax.nn.relu(y), rtol=1e-6, atol=1e-6)


@pytest.mark.devices
@pytest.mark.parametrize("by", ["jit", "shard_map"])
def test_devices(by, rng):
    """The same on four devices, gradients included, in one all-reduce each way."""
    x, r, ct = rng.standard_normal((3, 16, 5)).astype(np.float32)
    params, _ = jbn.init(5)

    def loss(x, r, params, ct, axis_name=None):
        y, _ = jbn.batch_norm(
            x,
            params,
            None,
            use_running_average=False,
            axis_name=axis_name,
            residual=r,
            activation=jax.nn.silu,
        )
        return (y * ct).sum()

    want = once(jax.grad(loss, (0, 1, 2)), x, r, params, ct)
    mesh = Mesh(np.array(jax.devices()[:4]), "data")
    sharded = NamedSharding(mesh, P("data"))
    x, r, ct = jax.device_put((x, r, ct), sharded)
    grad = jax.grad(loss, (0, 1, 2))
    if by == "shard_map":
        local = jax.grad(functools.partial(loss, axis_name="data"), (0, 1, 2))
        grad = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("data"), P("data"), P(), P("data")),
            out_specs=(P("data"), P("data"), P()),
        )
    with jax.set_mesh(mesh):
        compiled = jax.jit(grad).lower(x, r, params, ct).compile()
    got = compiled(x, r, params, ct)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5), got, want
    )
    text = str(compiled.as_text())
    assert "all-gather" not in text
    # Forward, backward, and the gradients of scale and bias.
    assert 2 <= text.count(" all-reduce(") <= 3


@on("eight shards", "one device")
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_temporary_memory_of_a_stack(dtype, scanned):
    """Eight blocks of convolution, norm and ReLU, compiled: against Flax's."""
    shape, depth = (16, 16, 16, 32), 8
    kernel = jnp.zeros((depth, 3, 3, 32, 32))

    def memory(norm: nn.Module, activation: Callable[..., Any]) -> float:
        x = jnp.zeros(shape, dtype)
        variables = norm.init(jax.random.key(0), x)
        variables = jax.tree.map(
            lambda v: jnp.broadcast_to(v, (depth, *v.shape)), variables
        )

        def block(x, weights):
            kernel, variables = weights
            x = jax.lax.conv_general_dilated(
                x,
                kernel.astype(dtype),
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            y, _ = norm.apply(variables, x, mutable=["batch_stats"])
            return activation(y), None

        def loss(kernel, variables, x, ct):
            if scanned:
                x, _ = jax.lax.scan(block, x, (kernel, variables))
            else:
                for i in range(depth):
                    at_i = functools.partial(jax.tree.map, operator.itemgetter(i))
                    x, _ = block(x, at_i((kernel, variables)))
            return (x.astype(jnp.float32) * ct).sum()

        step = jax.jit(jax.grad(loss, (0, 1, 2)))
        lowered = step.lower(kernel, variables, x, x.astype(jnp.float32))
        # What is kept is decided before machine code is made.
        compiled = lowered.compile(compiler_options=QUICKLY)
        analysis: Any = compiled.memory_analysis()
        return analysis.temp_size_in_bytes / x.nbytes

    flax = memory(nn.BatchNorm(use_running_average=False, dtype=dtype), nn.relu)
    plain = memory(jbn.BatchNorm(use_running_average=False), nn.relu)
    fused = memory(
        jbn.BatchNorm(use_running_average=False, activation=nn.relu), lambda y: y
    )
    # What was measured, and a little: docs/benchmarks.md has the figures.
    if dtype == jnp.bfloat16:
        limits = (0.76, 0.69) if scanned else (0.87, 0.72)
    else:
        # Unrolled, XLA finds the same for Flax's by itself, but for one more array.
        limits = (0.76, 0.70) if scanned else (1.07, 1.07)
    assert plain <= limits[0] * flax
    assert fused <= limits[1] * flax


@on("one device")
@pytest.mark.usefixtures("standard_promotion")
def test_temporary_memory_of_residual_blocks():
    """No more than with Flax's, for which XLA keeps what convolutions and norms read.

    It makes what convolutions are differentiated by anew in each product that reads it,
    if the last operation has one large operand, such as a reshape; and then keeps all
    that it is made of.
    """

    def memory(norm: type[nn.Module]) -> float:
        model = ResNet(
            stage_sizes=(2,),
            block=BottleneckBlock,
            widths=(16,),
            num_classes=10,
            stem="small",
            norm=norm,
        )
        x = jnp.zeros((16, 16, 16, 3))
        init = functools.partial(model.init, train=False)
        variables: Any = jax.eval_shape(init, jax.random.key(0), x)

        def loss(params, stats, x):
            variables = {"params": params, "batch_stats": stats}
            y, updated = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.square(y).sum(), updated

        step = jax.jit(jax.grad(loss, has_aux=True))
        lowered = step.lower(variables["params"], variables["batch_stats"], x)
        analysis: Any = lowered.compile(compiler_options=QUICKLY).memory_analysis()
        return analysis.temp_size_in_bytes

    assert memory(jbn.BatchNorm) <= 1.05 * memory(nn.BatchNorm)


@on("as on a TPU")
@pytest.mark.parametrize("residual", [False, True])
def test_relu_chooses_among_cotangents_of_16_bits(residual):
    """On a TPU what it leaves of a cotangent is kept, and no mask beside it."""
    x = jnp.zeros((8, 6, 6, 3), jnp.bfloat16)

    def f(x, r):
        return jbn.batch_norm(
            x,
            None,
            None,
            use_running_average=False,
            residual=r if residual else None,
            activation=jax.nn.relu,
        )[0]

    backward = jax.jit(lambda x, r, ct: jax.vjp(f, x, r)[1](ct))
    text = backward.lower(x, x, x).as_text()
    chosen = set(re.findall(r"stablehlo.select .*tensor<8x6x6x3x(\w+)>$", text, re.M))
    assert chosen == {"bf16"}


@dataclasses.dataclass
class Slope:
    slope: float

    def __call__(self, z: jax.Array) -> jax.Array:
        return jax.nn.leaky_relu(z, self.slope)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": 3}, TypeError, "must be a function of one array.*got 3"),
        (
            {"activation": Slope(0.2)},
            TypeError,
            "must be hashable.*Slope",
        ),
        ({"activation": jnp.sum}, ValueError, r"act on each element.*shape \(\)"),
        ({"residual": np.zeros((4, 1), np.float32)}, ValueError, r"got \(4, 1\)"),
        ({"residual": np.zeros((4, 3), int)}, TypeError, "floating dtype.*int"),
        ({"residual": np.zeros((4, 3), complex)}, TypeError, "floating dtype"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        jbn.batch_norm(
            jnp.ones((4, 3)), None, None, use_running_average=False, **options
        )


@pytest.mark.parametrize("name", ["activation", "residual"])
def test_sparse_arrays_take_neither(name):
    from jax.experimental import sparse

    x = sparse.BCOO.fromdense(jnp.eye(3))
    value = {"activation": jax.nn.relu, "residual": jnp.eye(3)}[name]
    with pytest.raises(ValueError, match=f"does not take `{name}`"):
        jbn.sparse_batch_norm(x, None, None, use_running_average=False, **{name: value})


def test_what_an_activation_closes_over_is_not_differentiated():
    """It is a constant, and whoever expects something else is told."""

    def loss(slope, x):
        prelu = lambda z: jnp.where(z > 0, z, slope * z)
        y, _ = jbn.batch_norm(
            x, None, None, use_running_average=False, activation=prelu
        )
        return (y * x).sum()

    with pytest.raises(Exception, match=r"closed.over|leak|closes over"):
        jax.grad(loss)(0.2, jnp.ones((4, 3)))
