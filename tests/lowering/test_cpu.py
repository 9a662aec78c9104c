"""`jbn.lowering.cpu`: split sums against NumPy, and what XLA makes of them."""

import functools
import math
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec as P
from ways import on

import jbn
from jbn.lowering import cpu, late
from jbn.lowering.cpu import Merged, Split, hoisted
from jbn.lowering.late import PLAIN, Target
from jbn.lowering.passes import hoist
from jbn.lowering.sums import repeat


SHAPE = 32, 16, 16, 32  # 1 MB in float32
ONE_CPU = Target("cpu", 1)


shapes = st.lists(st.sampled_from([1, 3, 5, 8, 12, 14, 35]), min_size=1, max_size=3)


@on("split")
@hypothesis.given(data=st.data(), shape=shapes)
@hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_split_sums_are_sums(data, shape):
    """Exactly, of integers; over any axes, of any number of terms."""
    every = st.sets(st.integers(0, len(shape) - 1))
    axes = tuple(sorted(data.draw(every)))
    split = Split.of(ONE_CPU, tuple(shape), axes)
    can = any(shape[a] % w == 0 for a in axes for w in (4, 5, 6, 7, 8))
    assert (split is not None) == can
    if split is None:
        return
    v = np.random.default_rng(0).integers(-9, 9, shape).astype("f")
    v = jnp.asarray(v)
    factors = jnp.arange(1.0, 4.0).reshape(*[1] * len(shape), 3, 1)
    sums = split.total(split.view(v) * factors)
    want = np.asarray(v).sum(axes, keepdims=True)
    for i in range(3):
        np.testing.assert_array_equal(sums[..., i, :], (i + 1) * want)
    # What does not vary along the split axis may have size 1 there.
    weight = np.arange(shape[-1], dtype="f").reshape(*[1] * (len(shape) - 1), -1)
    if split.axis == len(shape) - 1:
        weight = np.ones_like(weight[..., :1])
    sums = split.total(split.view(v) * split.view(jnp.asarray(weight)))
    want = (np.asarray(v) * weight).sum(axes, keepdims=True)
    np.testing.assert_array_equal(sums[..., 0, :], want)


@on("split")
@pytest.mark.parametrize("axes", [(0,), (0, 2), (1, 2), (2,)], ids=str)
def test_repeating_is_the_transpose_of_a_sum(axes, rng):
    like = jnp.zeros((8, 6, 15))
    shape = [1 if a in axes else n for a, n in enumerate(like.shape)]
    stat = jnp.asarray(rng.standard_normal(shape), "f")
    assert Split.of(ONE_CPU, like.shape, axes) is not None
    f = lambda stat: repeat(stat, like, axes)
    np.testing.assert_array_equal(f(stat), np.broadcast_to(stat, like.shape))
    ct = rng.standard_normal(like.shape).astype("f")
    (got,) = jax.jit(jax.linear_transpose(f, stat))(ct)
    want = ct.astype(float).sum(axes, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@on("split")
@pytest.mark.parametrize("value", [1.5, -0.0, np.inf, -np.inf, np.nan])
def test_hoist_is_the_identity(value):
    stat = jnp.full((1, 3), value)
    got, grad = jax.jit(jax.value_and_grad(lambda v: hoist(v, (9, 3)).sum()))(stat)
    np.testing.assert_array_equal(got, stat.sum())
    np.testing.assert_array_equal(grad, jnp.ones_like(stat))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_form_of_each_xla_computes_the_same(dtype, masked, monkeypatch, rng):
    """With sums that XLA fuses, and with sums that are merged and split before."""
    x, ct = (jnp.asarray(rng.standard_normal(SHAPE), dtype) for _ in range(2))
    mask = jnp.asarray(rng.random((*SHAPE[:-1], 1)) < 0.7) if masked else None
    found = {}
    for fuses in (False, True):
        monkeypatch.setattr(cpu, "_FUSES_SUMS", fuses)
        late._jaxpr.cache_clear()
        name = f"fuses_{fuses}".lower()
        with jax.set_mesh(jax.make_mesh((1,), (name,), axis_types=(AxisType.Auto,))):
            text = jax.jit(backward).lower(x, ct, mask=mask).as_text()
            found[fuses] = text, jax.jit(backward)(x, ct, mask=mask)
    late._jaxpr.cache_clear()
    assert found[False][0] != found[True][0]
    y, want = (np.asarray(found[fuses][1], np.float64) for fuses in (True, False))
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-5 if dtype == "f" else 0.05)


ELSEWHERE = [Target("cpu", 8), Target("gpu", 1), Target("tpu", 1), PLAIN]


@pytest.mark.parametrize("target", ELSEWHERE, ids=str)
def test_elsewhere_nothing_is_done(target, monkeypatch):
    monkeypatch.setattr(cpu, "_FUSES_SUMS", False)
    x, axes = jnp.ones(SHAPE), (0, 1, 2)
    assert Split.of(ONE_CPU, SHAPE, axes) is not None
    assert Merged.of(ONE_CPU, axes, x).view(x).ndim == 2
    assert Split.of(target, SHAPE, axes) is None
    assert Merged.of(target, axes, x).view(x) is x
    stat = jnp.ones((1, 1, 1, SHAPE[-1]))
    (same,) = hoist_program(SHAPE)(target, stat)
    assert (same is stat) == (target.platform != "cpu")


def hoist_program(shape):
    """What `hoist` binds, to call it for any target."""
    jaxpr = jax.make_jaxpr(lambda v: hoist(v, shape))(jnp.ones((1, 1, 1, SHAPE[-1])))
    (equation,) = jaxpr.eqns
    return equation.params["program"]


def test_few_elements_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(cpu, "_FUSES_SUMS", False)
    few = 2, 2, 2, SHAPE[-1]
    assert Split.of(ONE_CPU, few, (0, 1, 2)) is None
    stat = jnp.ones((1, 1, 1, SHAPE[-1]))
    assert hoisted(stat, few) is stat
    assert hoisted(stat, SHAPE) is not stat


def norm(x, axis=-1, mask=None):
    params, running = jbn.init(x.shape[axis])
    return jbn.batch_norm(
        x, params, running, use_running_average=False, axis=axis, mask=mask
    )


def backward(x, ct, **options):
    return jax.vjp(lambda x: norm(x, **options)[0], x)[1](ct)[0]


def compiled(f, *args) -> Any:
    return jax.jit(f).lower(*args).compile()


@on("one device")
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_terms_of_sums_are_not_written_out(dtype, masked, axis):
    """Temporary memory in float32 elements of `x`: a fraction, not one or two."""
    x = jnp.zeros(SHAPE if axis == -1 else (32, 32, 16, 16), dtype)
    shape = list(x.shape)
    shape[axis] = 1
    options = {"axis": axis, "mask": jnp.ones(shape, bool) if masked else None}

    def temporary(f, *args):
        analysis = compiled(functools.partial(f, **options), *args).memory_analysis()
        return analysis.temp_size_in_bytes / (4 * math.prod(SHAPE))

    # The parts that are added up, of two sums. An XLA that fuses sums does not do so
    # with selections: with a mask it writes terms out, of one sum at a time.
    selected = masked and cpu.fuses_sums(ONE_CPU)
    assert temporary(norm, x) < 0.3 + selected
    # Backward, with a mask, what is centered is written out once.
    assert temporary(backward, x, x) < 0.3 + masked + selected


def test_the_program_of_inference_is_the_formula():
    """On any platform: no operation that it does not need."""
    x, (params, running) = jnp.zeros(SHAPE), jbn.init(SHAPE[-1])

    def f(x, params, running):
        return jbn.batch_norm(x, params, running, use_running_average=True)[0]

    for platform in ("cpu", "tpu", "cuda"):
        traced = jax.jit(f).trace(x, params, running)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.rsqrt") == 1
        assert text.count("stablehlo.multiply") == 2
        assert text.count("stablehlo.add") == 2
        assert text.count("stablehlo.subtract") == 1
        others = re.sub("stablehlo.(broadcast_in_dim|constant|reshape)", "", text)
        assert others.count("stablehlo.") == 6


@on("one device")
@pytest.mark.parametrize("differentiated", [False, True])
def test_loops_over_elements_do_no_work_of_features(differentiated):
    x, (params, running) = jnp.zeros(SHAPE), jbn.init(SHAPE[-1])

    def f(x, params, running):
        return jbn.batch_norm(x, params, running, use_running_average=False)[0]

    forward = functools.partial(jax.vjp, f) if differentiated else f
    text = compiled(forward, x, params, running).as_text()
    loops = [
        computation
        for computation in text.split("\n}\n")
        if "-> f32[32,16,16,32] {" in computation and "ENTRY" not in computation
    ]
    assert len(loops) == 1
    assert "rsqrt(" not in loops[0]
    assert "select(" not in loops[0]
    assert loops[0].count("multiply(") == 1


@pytest.mark.devices
@pytest.mark.parametrize("check_vma", [False, True])
def test_shards_send_statistics_and_no_parts_of_sums(check_vma, rng):
    """Inside of `shard_map` an array is whole, and its sums are split."""
    mesh = Mesh(np.array(jax.devices()[:2]), "d", axis_types=(AxisType.Auto,))
    params, running = jbn.init(SHAPE[-1])

    def step(x, ct, params, axis_name=None):
        def f(x, params):
            y, _ = jbn.batch_norm(
                x, params, running, use_running_average=False, axis_name=axis_name
            )
            return y

        dx, dparams = jax.vjp(f, x, params)[1](ct)
        if axis_name is not None and not check_vma:
            dparams = jax.lax.psum(dparams, axis_name)
        return dx, dparams

    sharded = jax.shard_map(
        functools.partial(step, axis_name="d"),
        mesh=mesh,
        in_specs=(P("d"), P("d"), P()),
        out_specs=(P("d"), P()),
        check_vma=check_vma,
    )
    x, ct = rng.standard_normal((2, *SHAPE)).astype("f")
    run = compiled(sharded, x, ct, params)
    sent = re.findall(r"= (.*) all-reduce\(", run.as_text())
    shapes = [dims for line in sent for dims in re.findall(r"\[([\d,]+)\]", line)]
    assert shapes
    for dims in shapes:
        assert math.prod(map(int, dims.split(","))) <= 8 * SHAPE[-1]
    got, want = run(x, ct, params), jax.jit(step)(x, ct, params)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-2), got, want
    )
