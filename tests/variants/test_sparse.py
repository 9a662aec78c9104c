"""`jbn.sparse_batch_norm`: what the dense array would give, without making it."""

import functools
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ways import mapped_by

import jbn
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


SHAPE = (6, 4, 5)
# What is stored of SHAPE: single elements, vectors, or planes; and where features are.
LAYOUTS = {
    "elements": (0, -1),
    "elements, features first": (0, 0),
    "elements, features amid": (0, 1),
    "vectors of features": (1, -1),
    "vectors, sparse features": (1, 1),
    "vectors, features first": (1, 0),
    "planes": (2, -1),
    "planes, features amid": (2, 1),
    "planes, sparse features": (2, 0),
    "elements, two feature axes": (0, (0, 2)),
    "vectors, sparse and dense features": (1, (1, 2)),
    "vectors, two sparse feature axes": (1, (0, 1)),
    "planes, two dense feature axes": (2, (1, 2)),
    "planes, sparse and dense features": (2, (0, 2)),
    "elements, nothing but features": (0, (0, 1, 2)),
    "planes, nothing but features": (2, (0, 1, 2)),
}
SOME = [(0, -1), (1, -1), (1, 1)]
# Enough for weights to vary along sparse axes, dense ones, and both.
MORE = [*SOME, (0, 1), (2, 1), (2, 0), (0, (0, 2)), (1, (1, 2))]
LESS: Any = {"rtol": 1e-5, "atol": 1e-5}
# Roundings of float64, amplified by 1 / sqrt(var + epsilon).
EXACT: Any = {"rtol": 1e-9, "atol": 1e-9}
MOMENTUM, EPSILON = 0.7, 1e-3


def random_sparse(
    rng,
    shape=SHAPE,
    n_dense=0,
    density=0.4,
    *,
    duplicates=False,
    padding=2,
    filler=np.nan,
    dtype: Any = np.float32,
    offset=1.0,
) -> BCOO:
    """Elements at random sites, unsorted, some of them zeros, and padding among them.

    The filler of the padding, whose indices are out of bounds, must not matter.
    """
    n_sparse = len(shape) - n_dense
    sites = np.stack(np.indices(shape[:n_sparse]), -1).reshape(-1, n_sparse)
    n = round(density * len(sites))
    indices = sites[rng.choice(len(sites), n, replace=duplicates)]
    data = rng.normal(size=(n, *shape[n_sparse:])) + offset
    data[: n // 6] = 0
    indices = np.concatenate([indices, np.tile(shape[:n_sparse], (padding, 1))])
    data = np.concatenate([data, np.full((padding, *data.shape[1:]), filler)])
    order = rng.permutation(len(data))
    return make(data[order].astype(dtype), indices[order], shape, not duplicates)


def make(data, indices, shape, unique=True) -> BCOO:
    pair = jnp.asarray(data), jnp.asarray(indices)
    return BCOO(pair, shape=shape, unique_indices=unique)


def inside(x: BCOO) -> np.ndarray:
    return np.all(np.asarray(x.indices) < x.shape[: x.n_sparse], -1)


def dense(x: BCOO) -> np.ndarray:
    """The dense array in float64, one element after the other."""
    full = np.zeros(x.shape)
    data = np.asarray(x.data).astype(np.float64)
    for index, value in zip(
        np.asarray(x.indices)[inside(x)], data[inside(x)], strict=True
    ):
        full[tuple(index)] += value
    return full


def gathered(full, x: BCOO) -> np.ndarray:
    """What belongs to each stored element of a dense array; 0 out of bounds."""
    result = np.zeros(x.data.shape)
    result[inside(x)] = full[tuple(np.asarray(x.indices)[inside(x)].T)]
    return result


def feature_axes(ndim, axis) -> list[int]:
    return sorted(a % ndim for a in (axis if isinstance(axis, tuple) else (axis,)))


def features(shape, axis) -> tuple[int, ...]:
    return tuple(shape[a] for a in feature_axes(len(shape), axis))


def expanded(stat, ndim, axis):
    """A statistic, broadcast against an array of `ndim` axes."""
    kept = feature_axes(ndim, axis)
    return jnp.expand_dims(stat, [a for a in range(ndim) if a not in kept])


def densified(out, axis=-1):
    """The dense array. (Not `todense`, whose transpose `shard_map` may refuse.)"""
    (values, background), shape = out, out.values.shape
    full = jnp.broadcast_to(expanded(background, len(shape), axis), shape)
    return full.at[tuple(values.indices.T)].add(values.data, mode="drop")


def state(rng, shape, dtype: Any = np.float32) -> tuple[Params, BatchStats]:
    """Parameters and statistics without a special value."""
    scale, bias, mean = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3))
    var = jnp.asarray(rng.uniform(0.5, 2, shape), dtype)
    return Params(scale, bias), BatchStats(mean, var)


@functools.partial(jax.jit, static_argnames=("axis", "use_running_average", "others"))
def run(x, params, stats, *, axis=-1, use_running_average=False, others=(), **options):
    """The output, the new statistics, and the output as a dense array."""
    given: Any = {"momentum": MOMENTUM, "epsilon": EPSILON} | options | dict(others)
    out, new = jbn.sparse_batch_norm(
        x, params, stats, use_running_average=use_running_average, axis=axis, **given
    )
    return out, new, densified(out, axis)


@functools.partial(jax.jit, static_argnames="axis")
def gradients(x, params, stats, ct, *, axis=-1, **options):
    """Of the dense output's product with a cotangent, by stored numbers and affine."""

    def loss(data, params):
        filled = make(data, x.indices, x.shape, x.unique_indices)
        _, new, y = run(filled, params, stats, axis=axis, **options)
        return (y * ct).sum(), (new, y)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(x.data, params)


def average(old, mean, var, some: Any = True):
    """The running statistics after a batch; as they were where it has no weight."""
    keep = np.where(some, MOMENTUM, 1)
    return keep * old.mean + (1 - keep) * mean, keep * old.var + (1 - keep) * var


def reference(full, params, stats, axis=-1, w=None):
    """The dense output, and the new running statistics."""
    total, mean, var = oracle.moments(full, w, axis)
    some = total > 0
    new = average(stats, mean, var, some)
    mean, var = np.where(some, mean, stats.mean), np.where(some, var, stats.var)
    y = oracle.normalize(full, mean, var, *params, axis=axis, epsilon=EPSILON)
    return y, new


def assert_all_close(got, want, close):
    """Raises unless outputs and statistics are close: `(y, (mean, var))` each."""
    (y, stats), (want_y, want_stats) = got, want
    np.testing.assert_allclose(y, want_y, **close)
    np.testing.assert_allclose(stats[0], want_stats[0], **close)
    np.testing.assert_allclose(stats[1], want_stats[1], **close)


def check(x: BCOO, params, stats, axis=-1, w=None, close=LESS, **options: Any):
    """Raises unless outputs and statistics are those of the dense array."""
    _, new, y = run(x, params, stats, axis=axis, **options)
    assert y.dtype == x.dtype
    assert_all_close((y, new), reference(dense(x), params, stats, axis, w), close)


def check_gradients(rng, x: BCOO, params, stats, axis=-1, w=None, **options: Any):
    """Likewise, of gradients too, in float64."""
    full, ct = dense(x), rng.normal(size=x.shape)
    (ddata, dparams), (new, y) = gradients(x, params, stats, ct, axis=axis, **options)
    assert_all_close((y, new), reference(full, params, stats, axis, w), EXACT)
    dx, dscale, dbias = oracle.input_gradient(
        full, ct, np.asarray(params.scale), w, axis, EPSILON
    )
    np.testing.assert_allclose(ddata, gathered(dx, x), **EXACT)
    np.testing.assert_allclose(dparams.scale, dscale, **EXACT)
    np.testing.assert_allclose(dparams.bias, dbias, **EXACT)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n_dense", "axis"), LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_batch_norm_of_the_dense_array(rng, n_dense, axis):
    x = random_sparse(rng, n_dense=n_dense, duplicates=True, dtype=np.float64)
    check_gradients(rng, x, *state(rng, features(SHAPE, axis), np.float64), axis)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n_dense", "axis"), MORE, ids=str)
def test_weights_are_of_sites(rng, n_dense, axis):
    x = random_sparse(rng, n_dense=n_dense, dtype=np.float64)
    kept = feature_axes(3, axis)
    shape = [1 if a in kept else n for a, n in enumerate(SHAPE)]
    w = rng.uniform(0.5, 2, shape) * (rng.random(shape) < 0.6)
    w.flat[:2] = 1.5
    of_rows = w.reshape([n for n in shape if n > 1])
    params, stats = state(rng, features(SHAPE, axis), np.float64)
    check_gradients(rng, x, params, stats, axis, w, weights=of_rows)


@pytest.mark.parametrize(("n_dense", "axis"), SOME, ids=str)
@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_masks_are_of_sites(rng, n_dense, axis, dtype):
    x = random_sparse(rng, n_dense=n_dense)
    params, stats = state(rng, features(SHAPE, axis))
    shape = [1 if a == axis % 3 else n for a, n in enumerate(SHAPE)]
    mask = rng.random(shape) < 0.6
    check(x, params, stats, axis, mask, mask=mask.astype(dtype))
    # No site, and so no change.
    none = np.zeros(shape, dtype)
    check(x, params, stats, axis, none, mask=none)


@pytest.mark.parametrize("n_dense", [0, 1])
@pytest.mark.parametrize("shape", [(6, 1, 1), (1, 4, 1), (1, 1, 1)])
def test_a_mask_that_varies_along_some_axes_only(rng, n_dense, shape):
    x = random_sparse(rng, n_dense=n_dense)
    mask = rng.random(shape) < 0.7
    mask.flat[0] = True
    check(x, *state(rng, (5,)), w=mask, mask=mask)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n_dense", "axis"), SOME, ids=str)
def test_in_float32(rng, n_dense, axis, seed):
    x = random_sparse(rng, n_dense=n_dense)
    check(x, *state(rng, features(SHAPE, axis)), axis)


@pytest.mark.parametrize(
    ("n_batch", "n_dense", "axis"),
    [(1, 0, -1), (1, 0, 0), (1, 1, -1), (2, 0, (0, 2))],
    ids=str,
)
def test_batched_sparse_arrays(rng, n_batch, n_dense, axis):
    shape, nse = (2, 3, 5), 4
    batch, sites = shape[:n_batch], shape[n_batch : 3 - n_dense]
    full = np.zeros(shape)
    indices = np.zeros((*batch, nse, len(sites)), int)
    data = rng.normal(size=(*batch, nse, *shape[3 - n_dense :])).astype("f")
    for b in np.ndindex(batch):
        number = min(nse - 1, int(np.prod(sites)))
        flat = rng.choice(int(np.prod(sites)), number, replace=False)
        filled = np.stack(np.unravel_index(flat, sites), -1)
        indices[b] = sites  # out of bounds
        indices[b][:number] = filled
        for k, site in enumerate(filled):
            full[(*b, *site)] = data[(*b, k)]
    params, stats = state(rng, features(shape, axis))
    x = make(data, indices, shape)
    _, new, y = run(x, params, stats, axis=axis)
    assert_all_close((y, new), reference(full, params, stats, axis), LESS)


def test_the_output_as_documented(rng):
    x = random_sparse(rng, (8, 4), filler=0.0)
    params, stats = state(rng, (4,))
    w = rng.normal(size=(4, 3)).astype("f")

    @jax.jit
    def layer(x):
        (values, background), _, _ = run(x, params, stats)
        linear = values @ w + (background @ w)[None]
        return values.todense() + background[None], linear

    y, linear = layer(x)
    want = oracle.batch_norm(dense(x), *params, epsilon=EPSILON)
    np.testing.assert_allclose(y, want, **LESS)
    np.testing.assert_allclose(linear, want @ w, **LESS)
    # The indices are those of `x`, so that what goes along with them still does.
    out, _, _ = run(x, params, stats)
    np.testing.assert_array_equal(out.values.indices, x.indices)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("n_dense", "axis"), SOME, ids=str)
def test_forward_mode_and_second_derivatives(rng, n_dense, axis):
    x = random_sparse(rng, n_dense=n_dense, filler=0.0, dtype=np.float64)
    params, stats = state(rng, features(SHAPE, axis), np.float64)
    ct = rng.normal(size=SHAPE)
    step = jnp.asarray(rng.normal(size=x.data.shape))
    full, along = dense(x), dense(make(step, x.indices, SHAPE))

    def central(f, h=1e-5):
        return (f(full + h * along) - f(full - h * along)) / (2 * h)

    @jax.jit
    def derivatives(data):
        def f(data):
            filled = make(data, x.indices, SHAPE)
            grads, (_, y) = gradients(filled, params, stats, ct, axis=axis)
            return y, grads

        return jax.jvp(f, (data,), (step,))[1]

    dy, (hvp, dparams) = derivatives(x.data)
    # Central differences of float64 are good to some 1e-9 of what is differenced.
    close: Any = {"rtol": 1e-5, "atol": 1e-6}
    want = central(lambda v: oracle.batch_norm(v, *params, axis=axis, epsilon=EPSILON))
    np.testing.assert_allclose(dy, want, **close)

    def gradient(i):
        scale = np.asarray(params.scale)
        return central(
            lambda v: oracle.input_gradient(v, ct, scale, None, axis, EPSILON)[i]
        )

    np.testing.assert_allclose(hvp, gathered(gradient(0), x), **close)
    np.testing.assert_allclose(dparams.scale, gradient(1), **close)
    np.testing.assert_allclose(dparams.bias, gradient(2), **close)


def test_a_feature_without_stored_elements_is_a_constant_zero(rng):
    x = random_sparse(rng, (8, 3))
    indices = np.asarray(x.indices)
    indices = np.where(indices[:, 1:] == 1, x.shape, indices)  # out of bounds
    params, stats = state(rng, (3,))
    x = make(x.data, indices, x.shape)
    check(x, params, stats)
    out, _, _ = run(x, params, stats)
    assert params.bias is not None
    np.testing.assert_allclose(out.background[1], params.bias[1], rtol=1e-6)


@pytest.mark.parametrize("rows", [6, 0])
@pytest.mark.parametrize(("n_dense", "axis"), [(0, -1), (1, -1), (0, 0)], ids=str)
def test_nothing_stored_at_all(rng, n_dense, axis, rows):
    shape = (rows, 4) if axis else (4, rows)
    data, indices = (
        np.zeros((0, 4)[: n_dense + 1], "f"),
        np.zeros((0, 2 - n_dense), int),
    )
    for unique in (False, True):
        x = make(data, indices, shape, unique)
        params, stats = state(rng, (4,))
        check(x, params, stats, axis)
        # Of no rows, all that is left of the output is the background.
        mean, var = (np.zeros(4),) * 2 if rows else stats[:2]
        zero = np.zeros((1, 4))
        want = oracle.normalize(zero, mean, var, *params, epsilon=EPSILON)
        out, _, _ = run(x, params, stats, axis=axis)
        np.testing.assert_allclose(out.background, want[0], **LESS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("wild", [np.nan, np.inf])
@pytest.mark.parametrize(("n_dense", "axis"), SOME, ids=str)
def test_what_is_not_finite_in_masked_sites_takes_no_part(rng, n_dense, axis, wild):
    tame = random_sparse(rng, n_dense=n_dense, dtype=np.float64, filler=0.0)
    shape = [1 if a == axis % 3 else n for a, n in enumerate(SHAPE)]
    mask = rng.random(shape) < 0.6
    hit = gathered(np.broadcast_to(mask, SHAPE), tame) == 0
    x = make(jnp.where(hit, wild, tame.data), tame.indices, SHAPE)
    assert hit[inside(x)].any()
    params, stats = state(rng, features(SHAPE, axis), np.float64)
    full, ct = dense(tame), rng.normal(size=SHAPE)
    (ddata, dparams), (new, y) = gradients(x, params, stats, ct, axis=axis, mask=mask)
    want, new_stats = reference(full, params, stats, axis, mask)
    # It comes out as the bias, of which neither mean nor scale is a part.
    wild_sites = ~np.isfinite(dense(x))
    bias = np.broadcast_to(expanded(params.bias, 3, axis), SHAPE)
    want = np.where(wild_sites, bias, want)
    assert_all_close((y, new), (want, new_stats), EXACT)
    dx, dscale, _ = oracle.input_gradient(
        full, np.where(wild_sites, 0, ct), np.asarray(params.scale), mask, axis, EPSILON
    )
    np.testing.assert_allclose(ddata, np.where(hit, 0, gathered(dx, x)), **EXACT)
    np.testing.assert_allclose(dparams.scale, dscale, **EXACT)
    others = tuple(a for a in range(3) if a != axis % 3)
    np.testing.assert_allclose(dparams.bias, ct.sum(others), **EXACT)


@pytest.mark.parametrize("update_stats", [False, True])
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize(("n_dense", "axis"), [(0, 1), (1, -1)], ids=str)
def test_the_two_switches(rng, n_dense, axis, use_running_average, update_stats):
    x = random_sparse(rng, n_dense=n_dense)
    params, stats = state(rng, features(SHAPE, axis))
    _, new, y = run(
        x,
        params,
        stats,
        axis=axis,
        use_running_average=use_running_average,
        others=(("update_stats", update_stats),),
    )
    _, mean, var = oracle.moments(dense(x), axis=axis)
    by = stats[:2] if use_running_average else (mean, var)
    want = oracle.normalize(dense(x), *by, *params, axis=axis, epsilon=EPSILON)
    new_stats = average(stats, mean, var) if update_stats else stats
    assert_all_close((y, new), (want, new_stats), LESS)


@pytest.mark.parametrize("field", ["scale", "bias"])
def test_parameters_may_be_left_out(rng, field):
    x = random_sparse(rng, (8, 3))
    params, stats = state(rng, (3,))
    check(x, params._replace(**{field: None}), stats)


def test_there_need_be_neither_parameters_nor_statistics(rng):
    x = random_sparse(rng, (8, 3))
    out, none = jax.jit(
        lambda x: jbn.sparse_batch_norm(x, None, None, use_running_average=False)
    )(x)
    assert none is None
    np.testing.assert_allclose(densified(out), oracle.batch_norm(dense(x)), **LESS)


@pytest.mark.parametrize("n_dense", [0, 1])
@pytest.mark.parametrize("tau", [0.0, 7.5, np.inf])
def test_tau_draws_towards_the_running_statistics(rng, n_dense, tau):
    x = random_sparse(rng, n_dense=n_dense)
    params, stats = state(rng, (5,))
    w = rng.uniform(0.5, 2, (6, 4, 1)).astype("f")
    _, new, y = run(x, params, stats, weights=w, tau=tau)
    _, mean, var = oracle.moments(dense(x), w)
    # The weights of sites, implicit ones too, are those of so many equal rows.
    n = w.astype(float).sum() ** 2 / (w.astype(float) ** 2).sum()
    a = n / (n + tau)
    mixed = (1 - a) * stats.mean + a * mean
    gap = a * (1 - a) * (mean - stats.mean) ** 2
    mixed_var = (1 - a) * stats.var + a * var + gap
    want = oracle.normalize(dense(x), mixed, mixed_var, *params, epsilon=EPSILON)
    assert_all_close((y, new), (want, average(stats, mean, var)), LESS)


@pytest.mark.parametrize("rows", [1, 2])
def test_min_weight_is_of_all_sites(rng, rows):
    x = random_sparse(rng, (rows, 5))
    params, stats = state(rng, (5,))
    _, new, y = run(x, params, stats, min_weight=1.0)
    _, mean, var = oracle.moments(dense(x))
    by = stats[:2] if rows == 1 else (mean, var)
    want = oracle.normalize(dense(x), *by, *params, epsilon=EPSILON)
    assert_all_close((y, new), (want, average(stats, mean, var, rows > 1)), LESS)


def test_the_running_rules(rng):
    xs = [random_sparse(rng, (9, 4), offset=n) for n in range(3)]
    masks = [np.arange(9) < n for n in (3, 9, 5)]
    rows = [dense(x)[mask] for x, mask in zip(xs, masks, strict=True)]
    each, pooled = (
        [oracle.moments(r) for r in rows],
        oracle.moments(np.concatenate(rows)),
    )
    _, stats = state(rng, (4,))

    def after(stats, number=3, **options):
        options = {"update_stats": True} | options
        for x, mask in list(zip(xs, masks, strict=True))[:number]:
            _, stats, _ = run(x, None, stats, mask=mask, others=tuple(options.items()))
        return stats

    _, seen = jbn.init(4, track_weight=True)
    got: Any = after(seen, momentum=None)
    for field, want in zip((got.weight, *got[:2]), pooled, strict=True):
        np.testing.assert_allclose(field, want, **LESS)
    want = np.average([m[1] for m in each], 0, MOMENTUM ** np.arange(3)[::-1])
    np.testing.assert_allclose(after(seen).mean, want, **LESS)
    # The others by their definitions, after one step.
    weight, mean, var = each[0]
    got = after(stats, 1, second_moment=True)
    second = 0.7 * (stats.var + stats.mean**2) + 0.3 * (var + mean**2)
    want = second - (0.7 * stats.mean + 0.3 * mean) ** 2
    np.testing.assert_allclose(got.var, want, **LESS)
    got = after(stats, 1, unbiased=True)
    want = 0.7 * stats.var + 0.3 * var * weight / (weight - 1)
    np.testing.assert_allclose(got.var, want, **LESS)
    got = after(stats, 1, reference_weight=6.0)
    want = 0.7**0.5 * stats.mean + (1 - 0.7**0.5) * mean
    np.testing.assert_allclose(got.mean, want, **LESS)
    # Gathered, and folded in once.
    got = jbn.commit(after(jbn.init(4, accumulate=True)[1]), momentum=0.5)
    np.testing.assert_allclose(got.mean, 0.5 * pooled[1], **LESS)
    np.testing.assert_allclose(got.var, 0.5 + 0.5 * pooled[2], **LESS)


@pytest.mark.parametrize("n_dense", [0, 1])
def test_bfloat16_is_rounded_once(rng, n_dense):
    x = random_sparse(rng, (64, 4), n_dense, filler=1e9)
    x = make(x.data.astype(jnp.bfloat16), x.indices, x.shape)
    params, stats = state(rng, (4,))
    out, new, _ = run(x, params, stats)
    assert out.values.dtype == out.background.dtype == jnp.bfloat16
    assert new.mean.dtype == new.var.dtype == jnp.float32
    _, mean, var = oracle.moments(dense(x))
    np.testing.assert_allclose(new.mean, average(stats, mean, var)[0], **LESS)
    np.testing.assert_allclose(new.var, average(stats, mean, var)[1], **LESS)
    slope = np.asarray(params.scale) / np.sqrt(var + EPSILON)
    # Each of the two parts is right to half of the last of its eight bits.
    close: Any = {"rtol": 2**-8, "atol": 1e-6}
    want = np.asarray(params.bias) - slope * mean
    np.testing.assert_allclose(out.background.astype(np.float32), want, **close)
    np.testing.assert_allclose(dense(out.values), dense(x) * slope, **close)
    wide, _, _ = run(x, params, stats, others=(("dtype", np.dtype(np.float32)),))
    assert wide.values.dtype == wide.background.dtype == jnp.float32
    np.testing.assert_allclose(dense(wide.values), dense(x) * slope, **LESS)


def test_complex(rng):
    x = random_sparse(rng, (8, 3), filler=0.0)
    other = rng.normal(size=x.nse).astype("f") * inside(x)
    x_imag = make(other, x.indices, x.shape)
    both = make(jax.lax.complex(x.data, x_imag.data), x.indices, x.shape)
    out, _ = jax.jit(
        lambda x: jbn.sparse_batch_norm(x, None, None, use_running_average=False)
    )(both)
    want = oracle.batch_norm(dense(x) + 1j * dense(x_imag))
    np.testing.assert_allclose(densified(out), want, **LESS)


ROWS = {
    "few": (3000, 4, 0),
    "few, vectors": (3000, 4, 1),
    "many": (200_000, 1, 0),
    "many, prime": (200_003, 1, 0),
}


@pytest.mark.parametrize(("rows", "width", "n_dense"), ROWS.values(), ids=ROWS)
def test_statistics_are_exact_far_from_zero(rng, rows, width, n_dense):
    # All is stored. Zeros would make the standard deviation as large as the mean.
    full = (rng.normal(size=(rows, width)) + 1e4).astype("f")
    sites = np.moveaxis(np.indices((rows, width)), 0, -1).reshape(-1, 2)
    x = make(full.ravel(), sites, full.shape)
    if n_dense:
        x = make(full, np.arange(rows)[:, None], full.shape)
    _, new, _ = run(x, None, jbn.init(width)[1], momentum=0.0)
    assert np.abs(new.var / oracle.moments(full)[2] - 1).max() < 1e-5


PLACES = [((3, 4), 0, -1), ((3, 4), 1, -1), ((2, 3, 2), 1, 1), ((5,), 0, 0)]


@hypothesis.given(
    place=st.sampled_from(PLACES),
    fill=st.lists(st.tuples(st.integers(0, 12), st.integers(-3, 3)), max_size=12),
    masked=st.sets(st.integers(0, 11)),
    seed=st.integers(0, 1000),
)
def test_any_sparse_array(place, fill, masked, seed):
    shape, n_dense, axis = place
    rng = np.random.default_rng(seed)
    sparse = shape[: len(shape) - n_dense]
    # Twelve elements whatever the example, so that it compiles once for each place.
    size = int(np.prod(sparse))
    flat = np.array([site for site, _ in fill] + [size] * (12 - len(fill)))
    indices = np.stack(np.unravel_index(np.minimum(flat, size - 1), sparse), -1)
    indices[flat >= size] = sparse
    data = rng.normal(size=(12, *shape[len(sparse) :])).astype("f")
    data[: len(fill)] *= np.reshape([v for _, v in fill], (-1, *(1,) * n_dense))
    data[flat >= size] = np.nan
    params, stats = state(rng, features(shape, axis))
    w = np.ones([1 if a == axis % len(shape) else n for a, n in enumerate(shape)], "f")
    w.flat[[i for i in masked if i < w.size]] = 0
    x = make(data, indices, shape, unique=False)
    # Elements may lie close together, and roundings are amplified by 1 / sqrt(1e-3).
    close = {"rtol": 1e-4, "atol": 1e-4}
    check(x, params, stats, axis, w, close, weights=w)


# Devices. Each holds a block of rows, with as many stored elements as happen to be in
# them, filled up to a common number.

BLOCK, DEVICES = (5, 3, 2), 4
STORED = {"uneven": (9, 4, 1, 0), "even": (6, 6, 6, 6), "nothing": (0, 0, 0, 0)}


def blocks(rng, counts, n_dense):
    """The data and indices of each device, and the dense array of them all."""
    parts = []
    for n in counts:
        part = random_sparse(rng, BLOCK, n_dense, 0.9, padding=0)
        here = np.arange(part.nse) < n
        indices = np.where(here[:, None], part.indices, 99)
        here = here.reshape(-1, *(1,) * n_dense)
        parts.append(make(np.where(here, part.data, np.nan)[:10], indices[:10], BLOCK))
    return (
        jnp.stack([p.data for p in parts]),
        jnp.stack([p.indices for p in parts]),
        np.concatenate([dense(p) for p in parts]),
    )


def on_device(params, stats, mask, data, indices, **options):
    """Dense outputs and statistics of one device's share of the rows."""
    options = {"axis_name": "d"} | options
    masks = {} if mask is None else {"mask": mask}
    x = make(data, indices, BLOCK)
    _, new, y = run(x, params, stats, others=tuple(options.items()), **masks)
    return y, new


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )


def everywhere(kind, masked=True):
    """`on_device` over four devices, of arrays that have them in front."""
    if kind == "vmap":
        of_mask = 0 if masked else None
        return jax.vmap(
            on_device, (None, None, of_mask, 0, 0), (0, None), axis_name="d"
        )

    def one(params, stats, *arrays):
        y, new = on_device(params, stats, *(v if v is None else v[0] for v in arrays))
        return y[None], new

    return jax.shard_map(
        one,
        mesh=mesh_of(DEVICES),
        in_specs=(P(), P(), P("d") if masked else None, P("d"), P("d")),
        out_specs=(P("d"), P()),
        check_vma=kind == "shard_map checked",
    )


@functools.cache
def executor(kind, masked=True):
    def loss(data, params, stats, mask, indices, ct):
        y, new = everywhere(kind, masked)(params, stats, mask, data, indices)
        return (y * ct).sum(), (y, new)

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


kinds = pytest.mark.parametrize(
    "kind", mapped_by("vmap", "shard_map checked", "shard_map unchecked")
)


@pytest.mark.parametrize("n_dense", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("counts", STORED.values(), ids=STORED)
@kinds
def test_uneven_devices_are_one_array(rng, kind, counts, masked, n_dense):
    data, indices, full = blocks(rng, counts, n_dense)
    params, stats = state(rng, (2,))
    mask = np.ones((DEVICES, *BLOCK[:2], 1), bool)
    if masked:
        mask[:] = rng.random(mask.shape) < 0.7
        mask[2] = False
    ct = rng.normal(size=(DEVICES, *BLOCK)).astype("f")
    (ddata, dparams), (y, new) = executor(kind)(data, params, stats, mask, indices, ct)
    w = mask.reshape(-1, 3, 1)
    want, new_stats = reference(full, params, stats, w=w)
    assert_all_close((y, new), (want.reshape(y.shape), new_stats), LESS)
    dx, dscale, dbias = oracle.input_gradient(
        full, ct.reshape(full.shape), np.asarray(params.scale), w, epsilon=EPSILON
    )
    # Float32; 1 / sqrt(epsilon) = 32 amplifies it where nothing is stored.
    close: Any = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(dparams.scale, dscale, **close)
    np.testing.assert_allclose(dparams.bias, dbias, **close)
    for i, part in enumerate(np.split(dx, DEVICES)):
        want = gathered(part, make(data[i], indices[i], BLOCK))
        np.testing.assert_allclose(ddata[i], want, **close)


@kinds
def test_devices_without_a_mask(rng, kind):
    data, indices, full = blocks(rng, (9, 4, 1, 0), 0)
    params, stats = state(rng, (2,))
    ct = rng.normal(size=(DEVICES, *BLOCK)).astype("f")
    run_all = executor(kind, masked=False)
    (ddata, _), (y, new) = run_all(data, params, stats, None, indices, ct)
    want, new_stats = reference(full, params, stats)
    assert_all_close((y, new), (want.reshape(y.shape), new_stats), LESS)
    dx, _, _ = oracle.input_gradient(
        full, ct.reshape(full.shape), np.asarray(params.scale), epsilon=EPSILON
    )
    for i, part in enumerate(np.split(dx, DEVICES)):
        want = gathered(part, make(data[i], indices[i], BLOCK))
        np.testing.assert_allclose(ddata[i], want, rtol=1e-4, atol=1e-4)


@pytest.mark.devices
def test_groups_of_devices_are_arrays_of_their_own(rng):
    data, indices, full = blocks(rng, (9, 4, 7, 2), 0)
    params, stats = state(rng, (2,))
    groups = ((0, 3), (1, 2))
    mask = rng.random((DEVICES, *BLOCK[:2], 1)) < 0.7
    run_all = jax.pmap(
        functools.partial(on_device, axis_index_groups=groups),
        "d",
        in_axes=(None, None, 0, 0, 0),
        devices=jax.devices()[:DEVICES],
    )
    y, new = run_all(params, stats, mask, data, indices)
    shares = np.split(full, DEVICES)
    for group in groups:
        whole = np.concatenate([shares[i] for i in group])
        w = np.concatenate([mask[i] for i in group])
        want, new_stats = reference(whole, params, stats, w=w)
        for i, part in zip(group, np.split(want, 2), strict=True):
            of_device = y[i], (new.mean[i], new.var[i])
            assert_all_close(of_device, (part, new_stats), LESS)


@pytest.mark.devices
@pytest.mark.parametrize("n_dense", [0, 1])
def test_stored_elements_may_be_sharded_under_plain_jit(rng, n_dense):
    x = random_sparse(rng, (16, 3, 2), n_dense, 0.5, padding=0)
    assert x.nse % DEVICES == 0
    sharding = NamedSharding(mesh_of(DEVICES), P("d"))
    data, indices = (jax.device_put(v, sharding) for v in (x.data, x.indices))
    check(make(data, indices, x.shape), *state(rng, (2,)))


@pytest.mark.devices
@pytest.mark.parametrize("masked", [False, True])
def test_one_all_reduce_forward_and_one_backward(rng, masked):
    data, indices, _ = blocks(rng, (9, 4, 1, 0), 0)
    params, stats = state(rng, (2,))
    mask = np.ones((DEVICES, *BLOCK[:2], 1), bool)

    def forward(data, indices, mask):
        options: Any = {"mask": mask[0]} if masked else {}
        x = make(data[0], indices[0], BLOCK)
        (values, background), _ = jbn.sparse_batch_norm(
            x, params, stats, use_running_average=False, axis_name="d", **options
        )
        return values.data[None], background

    def backward(data, indices, mask, dvalues, dbackground):
        _, pull = jax.vjp(lambda data: forward(data, indices, mask), data)
        return pull((dvalues, dbackground))[0]

    def count(f, number, *args):
        in_specs = (P("d"),) * 4 + (P(),)
        out_specs = (P("d"), P()) if f is forward else P("d")
        f = jax.shard_map(
            f, mesh=mesh_of(DEVICES), in_specs=in_specs[:number], out_specs=out_specs
        )
        hlo = jax.jit(f).lower(*args).compile().as_text()
        assert hlo
        return hlo.count(" all-reduce(")

    assert count(forward, 3, data, indices, mask) == 1
    assert count(backward, 5, data, indices, mask, data, jnp.ones(2)) == 2


# Memory: of the order of what is stored.


@pytest.mark.parametrize(
    ("n_dense", "stored"), [(0, 5000), (1, 50)], ids=["elements", "vectors"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_memory_is_of_the_order_of_what_is_stored(n_dense, stored, masked):
    rows, width = 1_000_000, 1000

    def step(data, indices, params, stats, w, mask):
        def loss(data, params):
            options: Any = {"mask": mask} if masked else {}
            (values, background), new = jbn.sparse_batch_norm(
                make(data, indices, (rows, width), unique=False),
                params,
                stats,
                use_running_average=False,
                **options,
            )
            return (values.data**3).sum() + (background * w).sum(), new

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(data, params)

    params, stats = jbn.init(width)
    data = jax.ShapeDtypeStruct((stored, width)[: 1 + n_dense], jnp.float32)
    indices = jax.ShapeDtypeStruct((stored, 2 - n_dense), jnp.int32)
    w = jax.ShapeDtypeStruct((width,), jnp.float32)
    mask = jax.ShapeDtypeStruct((rows,), bool)
    lowered = jax.jit(step).lower(data, indices, params, stats, w, mask)
    compiled = lowered.compile()
    analysis: Any = compiled.memory_analysis()
    # The dense array has 4 GB. The mask, of sites, has one value for each row.
    limit = 4e6 + (5e6 if masked else 0)
    assert analysis.temp_size_in_bytes + analysis.output_size_in_bytes < limit
    hlo = compiled.as_text()
    assert hlo
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", hlo)
    largest = max(np.prod([int(n) for n in dims.split(",")]) for dims in shapes)
    # The largest is known to be there, so the pattern does read the shapes.
    assert stored * width**n_dense <= largest
    assert largest <= max(20 * stored * width**n_dense, rows if masked else 0)


# Mistakes.

FLAT = make(np.ones(4, "f"), np.stack(np.diag_indices(4), -1), (4, 4))
DENSE: Any = np.eye(4, dtype="f")
PLAIN: Any = {"use_running_average": False}
MISTAKES = {
    "a dense array": (
        lambda: jbn.sparse_batch_norm(DENSE, None, None, **PLAIN),
        TypeError,
        "got ndarray",
        "For a dense array use `batch_norm`",
    ),
    "trim": (
        lambda: jbn.sparse_batch_norm(FLAT, *jbn.init(4), **PLAIN, trim=4.0),
        ValueError,
        "does not take `trim`",
        "Trim `x.data` by `trimmed_weights`",
    ),
    "a mask of elements": (
        lambda: jbn.sparse_batch_norm(
            FLAT, *jbn.init(4), **PLAIN, mask=np.ones((4, 4), bool)
        ),
        ValueError,
        "got shape (4, 4)",
        "are per site, the same for all features",
    ),
    "weights of features": (
        lambda: jbn.sparse_batch_norm(
            FLAT, *jbn.init(4), **PLAIN, weights=np.ones((1, 4), "f")
        ),
        ValueError,
        "for features along (1,)",
        "are per site, the same for all features",
    ),
    "integers": (
        lambda: jbn.sparse_batch_norm(
            make(FLAT.data.astype(int), FLAT.indices, (4, 4)), None, None, **PLAIN
        ),
        TypeError,
        "got int32",
        "`x` must be of a floating or complex dtype",
    ),
    "statistics of other features": (
        lambda: jbn.sparse_batch_norm(FLAT, *jbn.init(3), **PLAIN),
        ValueError,
        "has shape (3,)",
        "must have one entry per feature",
    ),
    "no statistics": (
        lambda: jbn.sparse_batch_norm(FLAT, None, None, use_running_average=True),
        ValueError,
        "got None",
        "Make them with `init`",
    ),
    "no such axis": (
        lambda: jbn.sparse_batch_norm(FLAT, *jbn.init(4), **PLAIN, axis=2),
        ValueError,
        "got axis=2",
        "Pass values from -2 to 1",
    ),
    "no such mapped axis": (
        lambda: jbn.sparse_batch_norm(FLAT, *jbn.init(4), **PLAIN, axis_name="d"),
        NameError,
        "got 'd'",
        "Under plain `jit` leave it None",
    ),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("call", "error", "came", "fix"), MISTAKES.values(), ids=MISTAKES
)
def test_mistakes(call, error, came, fix):
    with pytest.raises(error, match=re.escape(fix)) as raised:
        call()
    assert came in str(raised.value)
