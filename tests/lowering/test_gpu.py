"""`jbn.lowering.gpu`: right on any device, and local to each."""

import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ways import on

import jbn
from jbn.lowering import sums
from jbn.lowering.gpu import Blocks, in_pairs
from jbn.lowering.late import PLAIN, Target


SHAPE = 32, 4, 6, 16
AXES = 0, 1, 2
ONE_GPU = Target("gpu", 1)


def arrays(rng, *shapes):
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


shapes = st.lists(st.sampled_from([1, 2, 3, 8, 12, 35]), min_size=1, max_size=4)


@on("as on a GPU")
@hypothesis.given(data=st.data(), shape=shapes)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_sums_and_their_transposes(data, shape):
    """Exactly, of integers; over any axes, next to each other or not."""
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1)))))
    v = np.random.default_rng(0).integers(-9, 9, shape).astype("f")
    want = v.sum(axes, keepdims=True)
    np.testing.assert_array_equal(sums.total(jnp.asarray(v), axes), want)

    def repeated(stat):
        return jnp.broadcast_to(sums.repeat(stat, jnp.asarray(v), axes), v.shape)

    stat = jnp.asarray(want)
    np.testing.assert_array_equal(repeated(stat), np.broadcast_to(want, v.shape))
    np.testing.assert_array_equal(jax.linear_transpose(repeated, stat)(v)[0], want)
    each = jax.linear_transpose(lambda v: sums.total(v, axes), jnp.asarray(v))(stat)[0]
    np.testing.assert_array_equal(each, np.broadcast_to(want, v.shape))


@on("as on a GPU")
@pytest.mark.parametrize(
    ("shape", "axes", "blocks"),
    [
        (SHAPE, AXES, (0, 2, 2)),
        ((1, *SHAPE), (1, 2, 3), (1, 3, 2)),
        ((5, 1, 32, 4, 16), (1, 2, 3), (2, 3, 2)),  # groups
        (SHAPE, (0, 2, 3), None),  # features are not last
        ((16, 96), (1,), None),  # along rows XLA is fast
        ((31, 16), (0,), None),  # a prime number of rows
        ((0, 16), (0,), None),
        ((1, 16), (0,), None),
        ((32, 16), (), None),
    ],
)
def test_what_is_summed_in_blocks(shape, axes, blocks):
    want = None if blocks is None else Blocks(*blocks)
    assert Blocks.of(ONE_GPU, shape, axes) == want


@pytest.mark.parametrize("target", [Target("cpu", 1), Target("tpu", 1), PLAIN], ids=str)
def test_nothing_changes_elsewhere(target):
    shape = 1 << 12, 1 << 12
    assert Blocks.of(ONE_GPU, shape, (0,)) is not None
    assert Blocks.of(target, shape, (0,)) is None


def test_blocks_on_a_card():
    """Of the sizes that were measured, a few thousand rows each, and enough of them."""
    for shape in (
        (256, 112, 112, 64),
        (256, 56, 56, 256),
        (128, 14, 14, 1024),
        (128, 7, 7, 2048),
        (64, 28, 28, 512),
    ):
        found = Blocks.of(ONE_GPU, shape, AXES)
        assert found is not None
        rows = math.prod(shape[:3]) / found.num
        assert rows % 1 == 0
        assert rows <= 4096
        teams = found.num * -(-shape[-1] // 128)
        assert 512 <= teams < 1024
    assert Blocks.of(ONE_GPU, (64, 64), (0,)) is None


def test_blocks_are_not_merged(rng):
    """XLA would make one sum of the two. On a CPU, its simplifier is the same."""
    (v,) = arrays(rng, SHAPE)
    blocks = Blocks(0, 2, 8)
    compiled = jax.jit(blocks.total).lower(v).compile()
    want = np.asarray(v, np.float64).sum(AXES, keepdims=True)
    np.testing.assert_allclose(compiled(v), want, rtol=1e-5, atol=1e-4)
    assert "f32[8,16]" in str(compiled.as_text())  # the sums of the blocks


def same_bits(got, want):
    got, want = (np.asarray(v).view(np.uint16) for v in (got, want))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("f", [jax.nn.relu, jax.nn.silu, jnp.sin])
def test_pairs_are_bit_for_bit_what_elements_are(f, dtype, rng):
    x, scale, bias, shift = arrays(rng, (3, 5, 8), (1, 1, 8), (1, 5, 1), ())
    x = x.astype(dtype).at[0, 0, :3].set(jnp.array([jnp.inf, jnp.nan, -0.0], dtype))

    def formula(x, read):
        scale, bias, shift = read
        return f(x.astype(jnp.float32) * scale + bias + shift)

    def in_twos(x, *read):
        return in_pairs(formula, x, read, x.dtype)

    want = jax.jit(formula)(x, (scale, bias, shift)).astype(dtype)
    got = jax.jit(in_twos)(x, scale, bias, shift)
    assert got.dtype == dtype
    same_bits(got, want)
    mapped = jax.jit(jax.vmap(in_twos, (1, None, None, None), 1))
    bias = bias[:, :1]
    want = jax.jit(formula)(x, (scale, bias, shift)).astype(dtype)
    got = mapped(x, scale[0], bias[0], shift)
    same_bits(got, want)


def layer(x, residual, ct, axis_name=None):
    """Output, new statistics and gradients."""
    params = jbn.Params(jnp.linspace(-1, 2, 16), jnp.linspace(-1, 1, 16))

    def f(x, params, residual):
        return jbn.batch_norm(
            x,
            params,
            jbn.init(16)[1],
            use_running_average=False,
            residual=residual,
            activation=jax.nn.relu,
            axis_name=axis_name,
        )

    y, vjp, stats = jax.vjp(f, x, params, residual, has_aux=True)
    dx, dparams, dresidual = vjp(ct)
    if axis_name is not None:
        dparams = jax.lax.psum(dparams, axis_name)
    return y, stats, dx, dparams, dresidual


def close(got, want, tolerance):
    """Beside each value, and beside the largest of its array."""
    for found, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        found, wanted = (np.asarray(v, np.float64) for v in (found, wanted))
        atol = tolerance * abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=atol)


@pytest.mark.devices
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, "shard_map"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_sharded_rows_stay_where_they_are(kind, with_residual, dtype, rng, request):
    """The same as on one device, by one all-reduce each way and nothing else."""
    x, ct, residual = arrays(rng, SHAPE, SHAPE, SHAPE)
    x, ct, residual = (v.astype(dtype) for v in (x, ct, residual))
    residual = residual if with_residual else None
    want = jax.jit(layer)(x, residual, ct)
    request.getfixturevalue("as_on_a_gpu")
    axis = kind if isinstance(kind, AxisType) else AxisType.Auto
    mesh = jax.make_mesh((4,), ("gpus",), (axis,), devices=jax.devices()[:4])
    run = layer
    if kind == "shard_map":
        run = jax.shard_map(
            lambda *args: layer(*args, axis_name="gpus"),
            mesh=mesh,
            in_specs=P("gpus"),
            out_specs=(P("gpus"), P(), P("gpus"), P(), P("gpus")),
            check_vma=False,
        )
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("gpus"))
        args = jax.device_put((x, residual, ct), rows)
        compiled = jax.jit(run).lower(*args).compile()
        got = compiled(*args)
    close(got, want, 1e-5 if dtype == jnp.float32 else 1e-2)
    assert got[0].sharding.is_equivalent_to(rows, x.ndim)
    assert got[2].sharding.is_equivalent_to(rows, x.ndim)
    hlo = compiled.as_text() or ""
    assert hlo.count(" all-reduce(") <= 3  # one of them for `params`
    assert not re.findall(r" (?:all-gather|all-to-all|collective-permute)\(", hlo)


@pytest.mark.devices
def test_sharded_features_stay_where_they_are(rng, as_on_a_gpu):
    x, ct = (v.astype(jnp.bfloat16) for v in arrays(rng, SHAPE, SHAPE))
    mesh = jax.make_mesh(
        (2, 2), ("rows", "features"), (AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        spec = NamedSharding(mesh, P("rows", None, None, "features"))
        args = jax.device_put((x, ct), spec)
        run = jax.jit(lambda x, ct: layer(x, None, ct))
        compiled = run.lower(*args).compile()
        got = compiled(*args)
    want = jax.jit(lambda x, ct: layer(x, None, ct))(x, ct)
    close(got, want, 1e-2)
    assert "all-to-all(" not in (compiled.as_text() or "")


def test_sums_around_an_axis_that_is_kept_have_no_blocks():
    assert Blocks.of(ONE_GPU, (256, 256, 64), (0, 1)) is not None
    assert Blocks.of(ONE_GPU, (256, 256, 64), (0,)) is not None
    assert Blocks.of(ONE_GPU, (256, 16, 256, 64), (0, 2)) is None
