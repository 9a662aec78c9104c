"""`jbn.moments` and `jbn.merge`: exact, whatever the mean and however it is split."""

import functools
import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from ways import on

import jbn
from jbn import Moments


pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("lowering")]
moments = jax.jit(jbn.moments, static_argnames=("axis",))
merge = jax.jit(jbn.merge)
EPS = float(np.finfo(np.float32).eps)

# Few shapes, so that JAX compiles few programs.
ROWS, FEATURES = 12, 2
properties = functools.partial(
    hypothesis.settings, deadline=None, derandomize=True, max_examples=50
)
values = hnp.arrays(
    np.float32,
    (ROWS, FEATURES),
    elements=st.floats(-1000, 1000, width=32).map(lambda v: v if abs(v) > 1e-3 else 0),
)
counts = hnp.arrays(np.int32, (ROWS, FEATURES), elements=st.integers(0, 3))
masks = hnp.arrays(np.bool_, (ROWS, FEATURES))


def assert_moments(actual, expected, x, *, merged=False):
    """Compares moments of data like `x`."""
    weight, mean, var = map(np.asarray, expected)
    # A mean is right to its rounding, and so a variance to the square of that. Means
    # of parts come rounded, and their distance from each other is known no better.
    rounding = 4 * EPS * max(1e-3, float(abs(np.nan_to_num(x)).max(initial=0)))
    atol = rounding**2 + (2 * rounding * np.sqrt(var.max(initial=0)) if merged else 0)
    np.testing.assert_allclose(actual.weight, weight, rtol=1e-6)
    np.testing.assert_allclose(actual.mean, mean, rtol=1e-6, atol=rounding)
    np.testing.assert_allclose(actual.var, var, rtol=1e-5, atol=atol)


def wide_moments(x, weights=None, axis=-1):
    """Like the oracle's, for large arrays: two passes of NumPy in float64."""
    x = np.moveaxis(x.astype(np.float64), axis, -1).reshape(-1, x.shape[axis])
    w = np.ones(len(x)) if weights is None else weights.reshape(-1).astype(np.float64)
    total = w.sum()
    mean = w @ x / total
    return total, mean, w @ (x - mean) ** 2 / total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((64, 3), -1),
        ((4096, 8), -1),
        ((10007, 2), -1),  # a prime: no equal blocks
        ((16, 14, 14, 256), -1),
        ((32, 32, 32, 64), -1),
        ((16, 64, 28, 28), 1),
        ((3, 5000), 0),
    ],
    ids=str,
)
def test_variance_is_right_to_1e_5_at_any_mean(rng, shape, axis, masked):
    noise = rng.standard_normal(shape, np.float32)
    mask = None
    if masked:
        mask_shape = list(shape)
        mask_shape[axis] = 1
        mask = rng.random(mask_shape) < 0.7
    for ratio in (0, 10, 1e2, 1e3, 1e4):
        x = noise + np.float32(ratio)
        got = moments(x, mask=mask, axis=axis)
        weight, mean, var = wide_moments(x, mask, axis)
        np.testing.assert_array_equal(got.weight, weight)
        np.testing.assert_allclose(got.mean, mean, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(got.var, var, rtol=1e-5, err_msg=f"at {ratio}")


def test_variance_is_right_to_1e_5_without_jit(rng):
    x = (rng.normal(size=(64, 3)) + 1e4).astype(np.float32)
    np.testing.assert_allclose(jbn.moments(x).var, oracle.moments(x)[2], rtol=1e-5)


@pytest.mark.parametrize("ratio", [1e2, 1e4])
@pytest.mark.parametrize("order", ["rising", "outlier first", "padding first"])
def test_variance_does_not_depend_on_which_rows_come_first(rng, order, ratio):
    # A shift that is taken from the first rows is far from the mean here.
    x = rng.normal(size=(4096, 3)) + ratio
    mask = np.ones((4096, 1), bool)
    if order == "rising":
        x = np.sort(x, axis=0)
    elif order == "outlier first":
        x[0] = -3 * ratio
    else:
        x[:2048], mask[:2048] = 0, False
    x = x.astype(np.float32)
    for given in [mask] if order == "padding first" else [None, mask]:
        got = moments(x, mask=given)
        np.testing.assert_allclose(got.var, wide_moments(x, mask)[2], rtol=1e-5)


def test_real_weights_are_right_at_any_mean(rng):
    w = rng.uniform(0, 3, (4096, 1)).astype(np.float32)
    for ratio in (0, 1e2, 1e4):
        x = (rng.normal(size=(4096, 3)) + ratio).astype(np.float32)
        weight, mean, var = wide_moments(x, w)
        got = moments(x, weights=w)
        np.testing.assert_allclose(got.weight, np.full(3, weight), rtol=1e-6)
        np.testing.assert_allclose(got.mean, mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(got.var, var, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_moments_of_16_bits_are_float32(rng, dtype):
    x = jnp.asarray(rng.normal(size=(256, 3)) + 600, dtype)
    got = moments(x)
    assert {v.dtype for v in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    seen = np.asarray(x).astype(np.float64)
    assert_moments(got, oracle.moments(seen), seen)


def test_moments_of_complex_data_have_a_real_variance(rng):
    x = rng.normal(size=(64, 3)) + 1j * rng.normal(size=(64, 3)) + (100 - 30j)
    x = x.astype(np.complex64)
    got = moments(x)
    assert got.mean.dtype == jnp.complex64
    assert got.weight.dtype == got.var.dtype == jnp.float32
    weight, mean, var = oracle.moments(x)
    np.testing.assert_array_equal(got.weight, weight)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.var, var, rtol=1e-5)


@pytest.mark.usefixtures("x64")
def test_moments_of_float64_are_right_to_float64(rng):
    x = rng.normal(size=(64, 3)) + 1e4
    for weights in (None, rng.uniform(0.1, 3, (64, 1))):
        got = jbn.moments(x, weights=weights)
        _, mean, var = oracle.moments(x, weights)
        np.testing.assert_allclose(got.mean, mean, rtol=1e-14)
        np.testing.assert_allclose(got.var, var, rtol=1e-12)


def test_rows_are_counted_past_what_float32_can_count():
    mask = jnp.ones((2**24 + 32, 1), bool)
    got = moments(jnp.zeros((2**24 + 32, 1)), mask=mask)
    np.testing.assert_array_equal(got.weight, [2**24 + 32])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)], ids=str)
def test_moments_of_nothing_are_zero(shape):
    got = moments(jnp.zeros(shape))
    for v in jax.tree.leaves(got):
        np.testing.assert_array_equal(v, np.zeros(3))


@pytest.mark.parametrize("poison", [1.0, np.nan, np.inf], ids=str)
def test_moments_of_what_is_left_out_are_zero(poison):
    got = moments(np.full((6, 3), poison, np.float32), mask=np.zeros((6, 1), bool))
    for v in jax.tree.leaves(got):
        np.testing.assert_array_equal(v, np.zeros(3))


def parts_of(rng, sizes, features=3, *, offset=0.0):
    """Float32 rows in parts whose means differ, and the moments of each."""
    rows = [
        (rng.normal(size=(n, features)) + 3 * i + offset).astype(np.float32)
        for i, n in enumerate(sizes)
    ]
    parts = []
    for x in rows:
        weight, mean, var = oracle.moments(x) if len(x) else np.zeros((3, features))
        parts.append(
            Moments(*(jnp.asarray(v, jnp.float32) for v in (weight, mean, var)))
        )
    return np.concatenate(rows), parts


@on("one device")
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("sizes", [(5,), (5, 3), (2, 0, 3), (1, 1, 1, 1), (7, 1, 4)])
def test_merge_equals_the_whole(rng, sizes, offset):
    x, parts = parts_of(rng, sizes, offset=offset)
    assert_moments(merge(*parts), oracle.moments(x), x, merged=True)


@pytest.mark.parametrize("shards", [3, 40])
def test_shards_that_weigh_alike_are_the_whole(rng, shards):
    """In one all-reduce, and in two."""
    x = rng.standard_normal((shards, 5, 3), np.float32) + 1e3 * np.arange(3)
    x = (x + 3 * np.arange(shards)[:, None, None]).astype(np.float32)
    got = jax.jit(jax.vmap(lambda x: jbn.moments(x, axis_name="i"), axis_name="i"))(x)
    for shard in range(shards):
        of_shard = jax.tree.map(lambda v, i=shard: v[i], got)
        assert_moments(of_shard, wide_moments(x.reshape(-1, 3)), x)


@on("one device")
def test_merge_takes_many_parts(rng):
    x, parts = parts_of(rng, rng.integers(0, 6, 300))
    assert_moments(jbn.merge(*parts), oracle.moments(x), x, merged=True)


@on("one device")
def test_the_scatter_of_the_means_belongs_to_the_variance():
    # Four replicas with means 0..3 and variance 1: averaged variances would be 1.
    parts = [
        Moments(jnp.full(1, 8.0), jnp.full(1, float(k)), jnp.ones(1)) for k in range(4)
    ]
    both = jbn.merge(*parts)
    np.testing.assert_allclose(both.weight, [32])
    np.testing.assert_allclose(both.mean, [1.5], rtol=1e-6)
    np.testing.assert_allclose(both.var, [2.25], rtol=1e-6)


@on("one device")
def test_merge_is_commutative_and_associative(rng):
    x, (a, b, c) = parts_of(rng, (5, 3, 9))
    whole = oracle.moments(x)
    for order in itertools.permutations((a, b, c)):
        assert_moments(merge(*order), whole, x, merged=True)
    assert_moments(merge(merge(a, b), c), whole, x, merged=True)
    assert_moments(merge(a, merge(b, c)), whole, x, merged=True)


@on("one device")
@pytest.mark.parametrize("junk", [0.0, 7.0, 1e6])
def test_a_part_of_zero_weight_changes_nothing(rng, junk):
    _, (a,) = parts_of(rng, (5,))
    nothing = Moments(jnp.zeros(3), jnp.full(3, junk), jnp.full(3, junk))
    for merged in (merge(a, nothing), merge(nothing, a), merge(nothing, a, nothing)):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6), merged, a
        )


@on("one device")
def test_features_without_weight_merge_to_zero():
    nothing = Moments(jnp.zeros(2), jnp.zeros(2), jnp.zeros(2))
    some = Moments(jnp.asarray([0.0, 4.0]), jnp.asarray([0.0, 5]), jnp.ones(2))
    both = merge(nothing, some)
    np.testing.assert_array_equal(both.weight, [0, 4])
    np.testing.assert_array_equal(both.mean, [0, 5])
    np.testing.assert_array_equal(both.var, [0, 1])


@on("one device")
def test_merging_one_part_returns_it(rng):
    _, (a,) = parts_of(rng, (5,))
    jax.tree.map(np.testing.assert_array_equal, jbn.merge(a), a)


@on("one device")
@pytest.mark.usefixtures("standard_promotion")
def test_merge_promotes_real_and_complex_parts():
    real = jbn.moments(jnp.asarray([[1.0], [3.0]]))
    complex_ = jbn.moments(jnp.asarray([[1j], [3j]]))
    both = jbn.merge(real, complex_)
    assert both.mean.dtype == jnp.complex64
    assert both.var.dtype == jnp.float32
    np.testing.assert_allclose(both.mean, [1 + 1j])
    np.testing.assert_allclose(both.var, [3.0])


def test_merged_moments_normalize_like_the_whole(rng):
    x = rng.normal(size=(ROWS, 3)).astype(np.float32)
    stats = jbn.merge(jbn.moments(x[:4]), jbn.moments(x[4:5]), jbn.moments(x[5:]))
    y = jbn.normalize(x, stats, epsilon=1e-3)
    np.testing.assert_allclose(
        y, oracle.batch_norm(x, epsilon=1e-3), rtol=1e-5, atol=1e-6
    )


def test_normalize_can_be_undone(rng):
    x = (rng.normal(size=(ROWS, 3)) * 4 + 2).astype(np.float32)
    stats = jbn.moments(x)
    params = jbn.Params(scale=jnp.sqrt(stats.var), bias=stats.mean)
    y = jbn.normalize(x, stats, params, epsilon=0.0)
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


@properties()
@hypothesis.given(values, masks, hnp.arrays(np.int8, ROWS, elements=st.integers(0, 3)))
def test_any_split_with_any_mask_equals_the_whole(x, mask, part):
    x = np.where(mask, x, np.float32(np.nan))
    parts = [moments(x, mask=mask & (part == k)[:, None]) for k in range(4)]
    merged = merge(*parts)
    assert_moments(merged, oracle.moments(x, mask), x, merged=True)
    assert_moments(moments(x, mask=mask), oracle.moments(x, mask), x)


@properties()
@hypothesis.given(values, counts)
def test_integer_weights_equal_repeated_rows(x, count):
    for f in range(FEATURES):
        # The repeated rows, filled up to a fixed length.
        column = np.repeat(x[:, f], count[:, f])
        repeated = np.zeros((3 * ROWS, 1), np.float32)
        repeated[: len(column), 0] = column
        mask = np.arange(3 * ROWS)[:, None] < len(column)
        expected = moments(repeated, mask=mask)
        assert_moments(expected, oracle.moments(column[:, None]), x)
        got = moments(x, weights=count)
        got = jax.tree.map(lambda v, f=f: v[f : f + 1], got)
        assert_moments(got, expected, x)


@properties()
@hypothesis.given(
    values,
    st.integers(0, ROWS),
    st.sampled_from([1, 20]),
    st.floats(width=32),
)
def test_padding_to_any_length_changes_nothing(x, valid, length, filler):
    x = x[:valid]
    stats = jbn.BatchStats(jnp.full(2, 5.0), jnp.full(2, 2.0))
    padded = np.full((ROWS + length, FEATURES), filler, np.float32)
    padded[:valid] = x
    mask = np.arange(ROWS + length) < valid
    got = moments(padded, mask=mask)
    assert_moments(got, oracle.moments(x), x)
    y, new = normalize(padded, stats, mask)
    if valid == 0:
        jax.tree.map(np.testing.assert_array_equal, new, stats)
        return
    _, mean, var = oracle.moments(x)
    expected = oracle.normalize(x, mean, var, epsilon=1.0)
    # The rounding of a mean, over a standard deviation of 1 (epsilon) or more.
    np.testing.assert_allclose(y[:valid], expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(new.mean, 2.5 + mean / 2, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(new.var, 1 + var / 2, rtol=1e-5)


@jax.jit
def normalize(x, stats, mask):
    return jbn.batch_norm(
        x,
        None,
        stats,
        use_running_average=False,
        momentum=0.5,
        epsilon=1.0,
        mask=mask,
    )


@properties()
@hypothesis.given(values, masks, st.permutations(range(ROWS)))
def test_the_order_of_rows_does_not_matter(x, mask, order):
    stats = jbn.BatchStats(jnp.full(2, 5.0), jnp.full(2, 2.0))
    whole, permuted = moments(x, mask=mask), moments(x[order], mask=mask[order])
    assert_moments(permuted, whole, x)
    y, new = normalize(x, stats, mask)
    y_permuted, new_permuted = normalize(x[order], stats, mask[order])
    np.testing.assert_allclose(y_permuted, y[np.array(order)], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(new_permuted.mean, new.mean, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(new_permuted.var, new.var, rtol=1e-5, atol=1e-6)


@properties()
@hypothesis.given(
    hnp.arrays(np.int32, (ROWS, FEATURES), elements=st.integers(-64, 64)),
    st.integers(-1000, 1000),
    st.integers(-9, 9),
)
def test_shifting_and_scaling_the_rows_shifts_and_scales_the_moments(x, shift, scale):
    # Integers, so that the shifted and scaled rows are exact.
    x = x.astype(np.float32)
    before, after = moments(x), moments(scale * x + shift)
    expected = Moments(
        before.weight, scale * before.mean + shift, scale**2 * before.var
    )
    assert_moments(after, expected, scale * x + shift)


def test_variance_is_never_negative(rng):
    """Of equal rows it is a difference of two roundings of the same number."""
    x = np.repeat(rng.standard_normal((1, 500), np.float32), 7, axis=0)
    for weights in (None, rng.uniform(0.1, 3, (7, 1)).astype(np.float32)):
        var = np.asarray(moments(x, weights=weights).var)
        assert var.min() >= 0
        np.testing.assert_allclose(var, np.zeros(500), atol=1e-12)
