"""`jbn.ops.segments`: sums within segments, and statistics back to their rows."""

import functools
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn
from jbn.ops.segments import inside, segments_of, spread, total


pytestmark = pytest.mark.sweep


# The shape of the input, which axes are reduced, and along which of these ids vary.
LAYOUTS = {
    "rows": ((7, 3), (0,), (0,)),
    "images": ((4, 2, 3, 5), (0, 1, 2), (0,)),
    "pixels": ((4, 2, 3, 5), (0, 1, 2), (0, 1, 2)),
    "inner": ((4, 6, 5), (0, 1), (1,)),
    "channels first": ((4, 5, 3), (0, 2), (0,)),
    "channels first, inner": ((4, 5, 3), (0, 2), (2,)),
    "channels first, all": ((4, 5, 3), (0, 2), (0, 2)),
    "one for all": ((4, 5, 3), (0, 1), ()),
    "of all axes": ((4, 5), (0, 1), (0, 1)),
    "several feature axes": ((3, 4, 2, 5), (0, 2), (0, 2)),
    "one row": ((1, 3), (0,), (0,)),
    "no row": ((0, 3), (0,), (0,)),
    "no feature": ((4, 0), (0,), (0,)),
}
NUM = 3
jit_total = jax.jit(total, static_argnums=1)
jit_spread = jax.jit(spread)


def draw(rng, shape, varies, low=-2, high=NUM + 2):
    """Some ids, of which some are of no segment."""
    ids = rng.integers(
        low, high, [n if a in varies else 1 for a, n in enumerate(shape)]
    )
    return ids, segments_of(jnp.asarray(ids), NUM)


def loop_total(v, axes, ids, num):
    """The sum of each segment, one element after the other."""
    result = np.zeros((num, *(1 if a in axes else n for a, n in enumerate(v.shape))))
    ids = np.broadcast_to(ids, v.shape)
    for index in np.ndindex(v.shape):
        if 0 <= ids[index] < num:
            at = tuple(0 if a in axes else i for a, i in enumerate(index))
            result[(ids[index], *at)] += v[index]
    return result


def loop_spread(stat, ids, shape):
    """The statistic of each element's segment; that of the last for all others."""
    result = np.zeros(shape)
    ids = np.broadcast_to(ids, shape)
    for index in np.ndindex(*shape):
        i = ids[index] if 0 <= ids[index] < len(stat) else len(stat) - 1
        at = tuple(
            0 if n == 1 else j for n, j in zip(stat.shape[1:], index, strict=True)
        )
        result[index] = stat[(i, *at)]
    return result


@pytest.mark.parametrize(("shape", "axes", "varies"), LAYOUTS.values(), ids=LAYOUTS)
def test_total_adds_up_what_shares_an_id(rng, shape, axes, varies):
    v, (ids, segments) = rng.normal(size=shape).astype("f"), draw(rng, shape, varies)
    got = jit_total(v, axes, segments)
    want = loop_total(v, axes, ids, NUM)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("shape", "axes", "varies"), LAYOUTS.values(), ids=LAYOUTS)
def test_spread_gives_each_row_its_own(rng, shape, axes, varies):
    ids, segments = draw(rng, shape, varies)
    of_features = [1 if a in axes else n for a, n in enumerate(shape)]
    stat = rng.normal(size=(NUM, *of_features)).astype("f")
    got = jit_spread(stat, segments)
    # No larger than it has to be: what does not vary has size 1.
    wanted = [n if a in varies or a not in axes else 1 for a, n in enumerate(shape)]
    assert list(got.shape) == wanted
    got = np.broadcast_to(got, shape)
    np.testing.assert_array_equal(got, loop_spread(stat, ids, shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "axes", "varies"), LAYOUTS.values(), ids=LAYOUTS)
def test_they_are_transposes(rng, shape, axes, varies):
    v, (ids, segments) = jnp.asarray(rng.normal(size=shape)), draw(rng, shape, varies)
    of_features = [1 if a in axes else n for a, n in enumerate(shape)]
    stat = jnp.asarray(rng.normal(size=(NUM, *of_features)))
    there = np.broadcast_to(inside(segments), shape)
    # A row of no segment has no part in a total.
    left = (jit_total(v, axes, segments) * stat).sum()
    right = (
        np.where(there, v, 0) * np.broadcast_to(spread(stat, segments), shape)
    ).sum()
    np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-12)
    pull = jax.linear_transpose(lambda v: total(v, axes, segments), v)
    want = np.where(there, loop_spread(stat, ids, shape), 0)
    np.testing.assert_allclose(jax.jit(pull)(stat)[0], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ids", [[0, 1, 2], [-1, 3, 99], [-(2**31), 2**31 - 1, 1]])
def test_ids_out_of_range_are_of_no_segment(ids):
    segments = segments_of(jnp.asarray(ids).reshape(3, 1), NUM)
    v = np.asarray([[1.0], [10.0], [100.0]], "f")
    valid = [0 <= i < NUM for i in ids]
    np.testing.assert_array_equal(np.ravel(inside(segments)), valid)
    want = np.zeros(NUM)
    for i, x in zip(ids, v.ravel(), strict=True):
        if 0 <= i < NUM:
            want[i] += x
    np.testing.assert_array_equal(np.ravel(jit_total(v, (0,), segments)), want)
    stat = np.asarray([5.0, 6.0, 7.0], "f").reshape(NUM, 1, 1)
    want = [stat[i, 0, 0] if 0 <= i < NUM else 7 for i in ids]
    np.testing.assert_array_equal(np.ravel(jit_spread(stat, segments)), want)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_ids_of_any_integer_dtype(rng, dtype):
    ids = rng.integers(0, NUM, (50, 1)).astype(dtype)
    v = rng.normal(size=(50, 2)).astype("f")
    got = jit_total(v, (0,), segments_of(jnp.asarray(ids), NUM))
    np.testing.assert_allclose(got, loop_total(v, (0,), ids, NUM), rtol=1e-5, atol=1e-5)


def test_a_weight_that_does_not_vary_counts_for_each_row(rng):
    # As `total_weight` passes them: of size 1 along reduced axes.
    ids, segments = draw(rng, (6, 4, 3), (0,), 0, NUM)
    got = jit_total(np.full((1, 1, 1), 2, "f"), (0, 1), segments)
    want = 2 * np.bincount(np.ravel(ids), minlength=NUM)
    np.testing.assert_array_equal(np.ravel(got), want)


def test_without_segments_there_is_one_statistic(rng):
    v = rng.normal(size=(4, 5, 3)).astype("f")
    got = jax.jit(total, static_argnums=1)(v, (0, 1))
    np.testing.assert_allclose(got, v.sum((0, 1), keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(spread(got), got)


def test_a_statistic_with_one_entry_is_that_of_all(rng):
    _, segments = draw(rng, (7, 3), (0,))
    stat = rng.normal(size=(1, 1, 3)).astype("f")
    np.testing.assert_array_equal(jit_spread(stat, segments), stat[0])


@hypothesis.given(
    ids=st.lists(st.integers(-2, 4), min_size=6, max_size=6),
    layout=st.sampled_from(["leading", "inner", "both"]),
    seed=st.integers(0, 100),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=60)
def test_any_ids(ids, layout, seed):
    shapes = {"leading": (6, 1, 1), "inner": (1, 6, 1), "both": (2, 3, 1)}
    x_shape = {"leading": (6, 2, 3), "inner": (2, 6, 3), "both": (2, 3, 3)}[layout]
    v = np.random.default_rng(seed).normal(size=x_shape).astype("f")
    ids = np.asarray(ids).reshape(shapes[layout])
    got = jit_total(v, (0, 1), segments_of(jnp.asarray(ids), NUM))
    want = loop_total(v, (0, 1), ids, NUM)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# Statistics by segment, of so many rows and so far from zero that plain sums fail.


@functools.partial(jax.jit, static_argnames="num")
def statistics(x, ids, num, **options) -> Any:
    """The mean and variance of each segment, as a domain's running statistics."""
    _, start = jbn.init((num, x.shape[-1]))
    _, stats = jbn.domain_batch_norm(
        x,
        None,
        start,
        use_running_average=False,
        domain=ids,
        momentum=0.0,
        **options,
    )
    return stats


# The rows of the largest segment, which decide into how many blocks all are split.
ROWS = {
    "many divisors": 200_000,
    "no divisors": 199_901,
}


@pytest.mark.parametrize("order", ["shuffled", "sorted"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("largest", ROWS.values(), ids=ROWS)
def test_variances_are_exact_far_from_zero(rng, largest, order, masked):
    # One large segment beside small ones, their means 1e4 standard deviations from
    # zero and from each other.
    sizes = [largest, 3000, 40, 8]
    ids = np.repeat(np.arange(4), sizes)
    if order == "shuffled":
        rng.shuffle(ids)
    centers = np.asarray([1e4, 0, 2e4, -1e4])
    x = (rng.normal(size=(len(ids), 2)) + centers[ids, None]).astype("f")
    mask = np.arange(len(ids)) % 7 > 0 if masked else np.ones(len(ids), bool)
    options: Any = {"mask": mask} if masked else {}
    stats = statistics(x, ids, 4, **options)
    for i in range(4):
        rows = x[(ids == i) & mask]
        _, mean, var = oracle.moments(rows)
        # Half of the last bit of a float32 near 1e4 is 5e-4.
        np.testing.assert_allclose(stats.mean[i], mean, atol=1e-3)
        assert np.abs(stats.var[i] / var - 1).max() < 1e-5


def test_variances_of_images_are_exact_far_from_zero(rng):
    ids = rng.integers(0, 3, 40)
    x = (rng.normal(size=(40, 16, 16, 2)) + 1e4 * ids[:, None, None, None]).astype("f")
    stats = statistics(x, ids, 3)
    for i in range(3):
        _, _, var = oracle.moments(x[ids == i])
        assert np.abs(stats.var[i] / var - 1).max() < 1e-5


@pytest.mark.parametrize("num", [1, 2, 1000])
def test_any_number_of_segments(rng, num):
    ids = rng.integers(0, num, 5000)
    x = (3 * rng.normal(size=(5000, 2)) + ids[:, None] % 7).astype("f")
    stats = statistics(x, ids, num)
    for i in np.unique(ids)[:5]:
        _, mean, var = oracle.moments(x[ids == i])
        np.testing.assert_allclose(stats.mean[i], mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats.var[i], var, rtol=1e-5, atol=1e-5)


def test_a_batch_without_rows_changes_nothing():
    stats = statistics(np.zeros((0, 3), "f"), np.zeros(0, int), 2)
    np.testing.assert_array_equal(stats.mean, np.zeros((2, 3)))
    np.testing.assert_array_equal(stats.var, np.ones((2, 3)))
