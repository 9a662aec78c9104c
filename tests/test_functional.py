"""`jbn.batch_norm` in every mode, shape, dtype and mask, against float64 NumPy."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


STATIC = (
    "use_running_average",
    "update_stats",
    "axis",
    "unbiased",
    "dtype",
)
batch_norm = jax.jit(jbn.batch_norm, static_argnames=STATIC)
train = functools.partial(batch_norm, use_running_average=False)
evaluate = functools.partial(batch_norm, use_running_average=True)

MODES = list(itertools.product([False, True], [False, True]))
POISONS = [np.nan, np.inf, -np.inf]


def tolerance(dtype) -> dict[str, Any]:
    """One rounding of the output, and the float32 rounding of what led to it."""
    eps = float(jnp.finfo(dtype).eps)
    inner = min(eps, float(jnp.finfo(jnp.float32).eps))
    # Sums of some ten elements, then a difference, a root and two products.
    return {"rtol": eps / 2 + 20 * inner, "atol": 20 * inner}


def make(rng, features, dtype: Any = np.float32, *, track_weight=False):
    """Parameters and statistics that all differ from the defaults and each other."""
    scale, bias = rng.uniform(0.5, 2, features), rng.normal(size=features)
    mean, var = rng.normal(3, 1, features), rng.uniform(0.5, 3, features)
    weight = rng.uniform(0.2, 0.9, features) if track_weight else None
    return jax.tree.map(
        lambda v: jnp.asarray(v, dtype),
        (Params(scale, bias), BatchStats(mean, var, weight)),
    )


def rows_like(rng, shape, axis: int | tuple[int, ...] = -1):
    """Data whose features differ in mean and scale."""
    axes = axis if isinstance(axis, tuple) else (axis,)
    per_feature = [1] * len(shape)
    for a in axes:
        per_feature[a] = shape[a]
    x = rng.normal(size=shape) * rng.uniform(0.5, 2, per_feature)
    return (x + rng.normal(3, 1, per_feature)).astype(np.float32)


def folded(stats, mean, var, momentum=0.7):
    """The mean and variance that an exponential average has next, in float64."""
    return tuple(
        momentum * np.asarray(old).astype(np.result_type(new)) + (1 - momentum) * new
        for old, new in ((stats.mean, mean), (stats.var, var))
    )


def assert_state(actual, mean_and_var, **kwargs):
    for a, e in zip((actual.mean, actual.var), mean_and_var, strict=True):
        np.testing.assert_allclose(a, e, **kwargs)


def assert_identical(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert dtypes(actual) == dtypes(expected)


def dtypes(tree):
    return [v.dtype for v in jax.tree.leaves(tree)]


@pytest.mark.parametrize(
    ("use_running_average", "update_stats", "unbiased"),
    [(*mode, False) for mode in MODES] + [(False, True, True), (True, True, True)],
)
def test_what_to_normalize_by_and_whether_to_update_are_two_switches(
    rng, use_running_average, update_stats, unbiased
):
    x = rows_like(rng, (6, 4, 3))
    params, stats = make(rng, 3)
    y, new = batch_norm(
        x,
        params,
        stats,
        use_running_average=use_running_average,
        update_stats=update_stats,
        momentum=0.7,
        epsilon=0.01,
        unbiased=unbiased,
    )
    weight, mean, var = oracle.moments(x)
    by = (stats.mean, stats.var) if use_running_average else (mean, var)
    expected = oracle.normalize(x, *by, params.scale, params.bias, epsilon=0.01)
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))
    if update_stats:
        var = var * weight / (weight - 1) if unbiased else var
        assert_state(new, folded(stats, mean, var), **tolerance(x.dtype))
    else:
        assert_identical(new, stats)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_statistics_are_updated_in_training_only_by_default(rng, use_running_average):
    x = rows_like(rng, (6, 3))
    params, stats = make(rng, 3)
    default, explicit = (
        batch_norm(x, params, stats, use_running_average=use_running_average, **kwargs)
        for kwargs in ({}, {"update_stats": not use_running_average})
    )
    assert_identical(default, explicit)


def test_statistics_that_are_not_updated_are_the_very_object_that_came(rng):
    x = rows_like(rng, (6, 3))
    params, stats = make(rng, 3)
    for use_running_average in (False, True):
        _, same = jbn.batch_norm(
            x,
            params,
            stats,
            use_running_average=use_running_average,
            update_stats=False,
        )
        assert same is stats


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5,), -1),
        ((1, 3), -1),
        ((6, 1), 1),
        ((3, 6), 0),
        ((4, 3, 5), 1),
        ((2, 5, 4, 3), -1),
        ((2, 3, 4, 5), -3),
        ((2, 3, 4, 5), (1, 3)),
        ((2, 3, 4, 5), (-1, 1)),
        ((2, 3, 4, 2), (0, 1, 3)),
        ((2, 3, 2), (0, 1, 2)),
        ((2, 2, 1, 3, 2, 2, 3), (3, -1)),
    ],
    ids=str,
)
def test_features_may_be_along_any_axes_of_any_rank(rng, shape, axis):
    axes = axis if isinstance(axis, tuple) else (axis,)
    features = tuple(shape[a] for a in sorted(a % len(shape) for a in axes))
    x = rows_like(rng, shape, axis)
    params, stats = make(rng, features)
    y, new = train(x, params, stats, axis=axis, momentum=0.7)
    _, mean, var = oracle.moments(x, axis=axis)
    expected = oracle.normalize(x, mean, var, params.scale, params.bias, axis)
    # One element a feature has the variance 0, which 1 / sqrt(epsilon) = 316 meets.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert_state(new, folded(stats, mean, var), **tolerance(x.dtype))
    y, _ = evaluate(x, params, stats, axis=axis)
    expected = oracle.normalize(
        x, stats.mean, stats.var, params.scale, params.bias, axis
    )
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("fields", ["", "scale", "bias", "scale bias"])
def test_scale_and_bias_are_optional(rng, fields, use_running_average):
    x = rows_like(rng, (6, 3))
    params, stats = make(rng, 3)
    params = Params(**{name: getattr(params, name) for name in fields.split()})
    _, mean, var = oracle.moments(x)
    by = (stats.mean, stats.var) if use_running_average else (mean, var)
    expected = oracle.normalize(x, *by, params.scale, params.bias)
    for given in [params, None] if not fields else [params]:
        y, _ = batch_norm(x, given, stats, use_running_average=use_running_average)
        np.testing.assert_allclose(y, expected, **tolerance(x.dtype))


def test_init_is_the_identity_at_first():
    params, stats = jbn.init((2, 3), track_weight=True)
    for v, value in zip(jax.tree.leaves((params, stats)), (1, 0, 0, 1, 0), strict=True):
        np.testing.assert_array_equal(v, np.full((2, 3), value))
    params, stats = jbn.init(4, use_scale=False, use_bias=False)
    assert params == Params(None, None)
    assert stats.weight is None


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float32])
def test_statistics_are_float32_whatever_the_parameters(param_dtype):
    params, stats = jbn.init(4, param_dtype=param_dtype, track_weight=True)
    assert set(dtypes(params)) == {jnp.dtype(param_dtype)}
    assert set(dtypes(stats)) == {jnp.dtype(jnp.float32)}


def check_dtype(rng, dtype, param_dtype, wide, use_running_average):
    x = rows_like(rng, (16, 3))
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x = x + 1j * rows_like(rng, (16, 3))
    x = jnp.asarray(x, dtype)
    params, stats = make(rng, 3)
    params = jax.tree.map(lambda v: v.astype(param_dtype), params)
    seen = np.asarray(x).astype(wide)
    scale, bias = (np.asarray(v).astype(wide) for v in params)
    _, mean, var = oracle.moments(seen)
    by = (stats.mean, stats.var) if use_running_average else (mean, var)
    y, new = batch_norm(
        x, params, stats, use_running_average=use_running_average, momentum=0.7
    )
    assert y.dtype == x.dtype
    expected = oracle.normalize(seen, by[0], by[1], scale, bias)
    np.testing.assert_allclose(np.asarray(y).astype(wide), expected, **tolerance(dtype))
    if not use_running_average:
        # The state is float32 as `make` gives it, and stays of that precision.
        assert_state(new, folded(stats, mean, var), **tolerance(jnp.float32))
        assert new.var.dtype == jnp.float32


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (jnp.float16, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16),
    ],
)
def test_real_dtypes_are_right_to_their_last_bits(
    rng, dtype, param_dtype, use_running_average
):
    check_dtype(rng, dtype, param_dtype, np.float64, use_running_average)


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.complex64])
def test_complex_input_has_a_complex_mean_and_a_real_variance(
    rng, param_dtype, use_running_average
):
    check_dtype(rng, jnp.complex64, param_dtype, np.complex128, use_running_average)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("dtype", "use_running_average"),
    [
        (jnp.float64, False),
        (jnp.float64, True),
        (jnp.complex128, False),
        (jnp.complex128, True),
    ],
)
def test_wide_dtypes_stay_wide(rng, dtype, use_running_average):
    wide = np.complex128 if dtype == jnp.complex128 else np.float64
    check_dtype(rng, dtype, jnp.float64, wide, use_running_average)


def test_complex_input_is_evaluated_by_a_complex_mean(rng):
    x = (rng.normal(size=(6, 3)) + 1j * rng.normal(size=(6, 3))).astype(np.complex64)
    params, stats = make(rng, 3)
    stats = stats._replace(mean=stats.mean.astype(jnp.complex64) * (1 - 0.5j))
    y, same = evaluate(x, params, stats)
    expected = oracle.normalize(x, stats.mean, stats.var, params.scale, params.bias)
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))
    assert_identical(same, stats)


@pytest.mark.usefixtures("x64")
def test_float64_statistics_are_kept_for_float32_input(rng):
    x = rows_like(rng, (16, 3))
    params, stats = make(rng, 3, np.float64)
    y, new = train(x, params, stats, momentum=0.7)
    assert y.dtype == jnp.float32
    assert new.mean.dtype == new.var.dtype == jnp.float64


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (jnp.bfloat16, jnp.float16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
)
def test_output_dtype_can_be_chosen_and_rounds_once(rng, dtype, out):
    x = jnp.asarray(rows_like(rng, (16, 3)), dtype)
    params, stats = make(rng, 3)
    seen = np.asarray(x).astype(np.float64)
    _, mean, var = oracle.moments(seen)
    for run, by in ((train, (mean, var)), (evaluate, (stats.mean, stats.var))):
        y, _ = run(x, params, stats, dtype=out)
        assert y.dtype == out
        expected = oracle.normalize(seen, *by, params.scale, params.bias)
        np.testing.assert_allclose(
            np.asarray(y).astype(np.float64), expected, **tolerance(out)
        )


@pytest.mark.parametrize(
    ("x", "dtype", "out", "expected"),
    [
        # flax.linen and flax.nnx with dtype=bfloat16 give 0.
        (1000.0, jnp.bfloat16, None, -0.70),
        # flax.nnx gives 0.
        (1001.7, jnp.float32, jnp.bfloat16, 1.0),
        (1001.7, jnp.float32, None, 1.0),
    ],
)
def test_evaluation_subtracts_the_mean_before_it_rounds(x, dtype, out, expected):
    stats = BatchStats(jnp.full(1, 1000.7, jnp.float32), jnp.ones(1))
    y, _ = evaluate(jnp.full((1, 1), x, dtype), None, stats, dtype=out)
    # The float32 spacing at 1000 is 6e-5; bfloat16 has 8 bits.
    eps = float(jnp.finfo(out or dtype).eps)
    np.testing.assert_allclose(float(y[0, 0]), expected, rtol=eps, atol=2e-4)
    y = jbn.normalize(jnp.full((1, 1), x, dtype), stats, dtype=out)
    np.testing.assert_allclose(float(y[0, 0]), expected, rtol=eps, atol=2e-4)


def test_training_subtracts_the_mean_before_it_rounds():
    x = jnp.asarray([[1000.0], [1004.0], [1012.0]], jnp.bfloat16)
    y, _ = train(x, None, None)
    expected = oracle.batch_norm(np.asarray(x).astype(np.float64))
    np.testing.assert_allclose(
        np.asarray(y).astype(np.float64), expected, **tolerance(jnp.bfloat16)
    )


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_batch_of_one_row_comes_out_as_bias(rng, unbiased):
    x = rows_like(rng, (1, 3))
    params, stats = make(rng, 3)
    y, new = train(x, params, stats, momentum=0.7, unbiased=unbiased)
    np.testing.assert_array_equal(y, params.bias[None])
    # One row has no unbiased variance.
    var = np.asarray(stats.var) if unbiased else np.zeros(3)
    assert_state(new, folded(stats, x[0], var), rtol=1e-6)


@pytest.mark.parametrize(("use_running_average", "update_stats"), MODES)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)], ids=str)
def test_zero_rows_leave_the_state_alone(rng, shape, use_running_average, update_stats):
    params, stats = make(rng, 3)
    y, new = batch_norm(
        jnp.zeros(shape),
        params,
        stats,
        use_running_average=use_running_average,
        update_stats=update_stats,
    )
    assert y.shape == shape
    assert_identical(new, stats)


WEIGHTS = {
    "element": ((4, 5, 3), (4, 5, 3)),
    "row": ((4, 5), (4, 5, 1)),
    "row, full rank": ((4, 5, 1), (4, 5, 1)),
    "example": ((4, 1, 1), (4, 1, 1)),
    "position": ((1, 5, 1), (1, 5, 1)),
    "position and feature": ((5, 3), (1, 5, 3)),
    "feature": ((3,), (1, 1, 3)),
    "feature, full rank": ((1, 1, 3), (1, 1, 3)),
}


def some_zero(rng, shape, kind):
    """Weights of which some are zero, but never all of a feature's."""
    if kind == "real":
        w = rng.uniform(0.1, 3, shape).astype(np.float32)
    elif kind == "integer":
        w = rng.integers(1, 4, shape)
    else:
        w = np.ones(shape, bool)
    drop = rng.random(shape) < 0.4
    if max(shape) == shape[-1]:  # features alone
        drop[...] = False
    drop[-1] = False
    return np.where(drop, np.zeros_like(w), w)


@pytest.mark.parametrize(
    ("which", "kind"),
    [(which, "real") for which in WEIGHTS]
    + [("element", "mask"), ("row", "mask"), ("row", "integer")],
)
def test_weights_have_any_shape_that_broadcasts(rng, which, kind):
    shape, full = WEIGHTS[which]
    x = rows_like(rng, (4, 5, 3))
    params, stats = make(rng, 3)
    w = some_zero(rng, shape, kind)
    given = {"mask" if kind == "mask" else "weights": w}
    y, new = train(x, params, stats, momentum=0.7, **given)
    _, mean, var = oracle.moments(x, w.reshape(full))
    expected = oracle.normalize(x, mean, var, params.scale, params.bias)
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))
    assert_state(new, folded(stats, mean, var), **tolerance(x.dtype))


@pytest.mark.parametrize("w", [True, 2.5])
def test_one_weight_for_everything_changes_nothing(rng, w):
    x = rows_like(rng, (6, 3))
    params, stats = make(rng, 3)
    given = {"mask" if w is True else "weights": np.asarray(w)}
    actual, expected = train(x, params, stats, **given), train(x, params, stats)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance(x.dtype)),
        actual,
        expected,
    )


@pytest.mark.parametrize("axis", [0, 1, (1, 2)], ids=str)
def test_weights_go_with_features_anywhere(rng, axis):
    x = rows_like(rng, (4, 3, 5), axis)
    axes = axis if isinstance(axis, tuple) else (axis % 3,)
    params, stats = make(rng, tuple(x.shape[a] for a in axes))
    row = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
    w = some_zero(rng, row, "real")
    squeezed = w.reshape([n for a, n in enumerate(x.shape) if a not in axes])
    expected = oracle.batch_norm(x, params.scale, params.bias, w, axis)
    for given in (w, squeezed):
        y, _ = train(x, params, stats, axis=axis, weights=given)
        np.testing.assert_allclose(y, expected, **tolerance(x.dtype))


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("kind", ["mask", "real"])
@pytest.mark.parametrize("which", ["element", "row", "position"])
def test_what_is_left_out_may_hold_anything(rng, which, kind, poison):
    shape, full = WEIGHTS[which]
    x = rows_like(rng, (4, 5, 3))
    params, stats = make(rng, 3)
    w = some_zero(rng, shape, kind)
    counts = np.broadcast_to(w.reshape(full) > 0, x.shape)
    x = np.where(counts, x, np.float32(poison))
    given = {"mask" if kind == "mask" else "weights": w}
    y, new = train(x, params, stats, momentum=0.7, **given)
    _, mean, var = oracle.moments(x, w.reshape(full))
    expected = oracle.normalize(
        np.where(counts, x, 0), mean, var, params.scale, params.bias
    )
    # What is not finite comes out as bias.
    expected = np.where(counts, expected, params.bias)
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))
    assert_state(new, folded(stats, mean, var), **tolerance(x.dtype))


@pytest.mark.parametrize("poison", POISONS, ids=str)
def test_what_is_left_out_may_hold_anything_in_evaluation_too(rng, poison):
    x = rows_like(rng, (6, 3))
    x[2, 1] = poison
    params, stats = make(rng, 3)
    mask = np.isfinite(x)
    expected = oracle.normalize(x, stats.mean, stats.var, params.scale, params.bias)
    expected[2, 1] = params.bias[1]
    for update_stats in (False, True):
        y, new = evaluate(
            x, params, stats, mask=mask, update_stats=update_stats, momentum=0.7
        )
        np.testing.assert_allclose(y, expected, **tolerance(x.dtype))
        assert np.isfinite(jax.tree.leaves(new)).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_what_is_left_out_may_hold_anything_in_16_bits(rng, dtype):
    x = rows_like(rng, (6, 3))
    x[2:4] = np.nan
    mask = np.arange(6) // 2 != 1
    params, stats = make(rng, 3)
    x = jnp.asarray(x, dtype)
    y, new = train(x, params, stats, mask=mask)
    seen = np.nan_to_num(np.asarray(x).astype(np.float64))
    expected = oracle.batch_norm(seen, params.scale, params.bias, mask[:, None])
    expected[2:4] = params.bias
    y = np.asarray(y).astype(np.float64)
    np.testing.assert_allclose(y, expected, **tolerance(dtype))
    assert np.isfinite(jax.tree.leaves(new)).all()


@pytest.mark.parametrize("left_out", ["mask", "weights"])
@pytest.mark.parametrize("poison", [1.0, np.nan], ids=str)
@pytest.mark.parametrize("options", [{}, {"unbiased": True}, {"track_weight": True}])
def test_an_empty_batch_is_normalized_by_the_state_it_leaves_alone(
    rng, left_out, poison, options
):
    x = rows_like(rng, (6, 3))
    params, stats = make(rng, 3, track_weight=options.get("track_weight", False))
    w = np.zeros((6, 1), bool if left_out == "mask" else np.float32)
    unbiased = options.get("unbiased", False)
    x[0] *= poison
    y, new = train(x, params, stats, unbiased=unbiased, **{left_out: w})
    assert_identical(new, stats)
    expected, same = evaluate(x, params, stats, **{left_out: w})
    assert_identical(same, stats)
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))
    assert np.isfinite(y).all()


def test_an_empty_batch_without_a_state_is_normalized_by_that_of_init(rng):
    x = rows_like(rng, (6, 3))
    y, new = train(x, None, None, mask=np.zeros(6, bool))
    assert new is None
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.7, np.asarray([0.7, 0.2, 0.5], np.float32)])
def test_a_dead_feature_is_normalized_by_the_state_it_leaves_alone(rng, momentum):
    x = rows_like(rng, (4, 5, 3))
    params, stats = make(rng, 3)
    mask = rng.random((4, 5, 3)) < 0.7
    mask[0, 0], mask[..., 1] = True, False
    y, new = train(x, params, stats, mask=mask, momentum=momentum)
    _, mean, var = oracle.moments(x, mask)
    mean[1], var[1] = stats.mean[1], stats.var[1]
    expected = oracle.normalize(x, mean, var, params.scale, params.bias)
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))
    assert_state(new, folded(stats, mean, var, momentum), **tolerance(x.dtype))
    np.testing.assert_array_equal(new.mean[1], stats.mean[1])
    np.testing.assert_array_equal(new.var[1], stats.var[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_variance_that_overflows_gives_bias_and_no_nan(rng, dtype):
    x = jnp.asarray(rng.normal(size=(8, 3)) * 1e20, dtype)
    params, stats = make(rng, 3)
    y, new = train(x, params, stats)
    np.testing.assert_array_equal(
        y, jnp.broadcast_to(params.bias, x.shape).astype(dtype)
    )
    np.testing.assert_array_equal(new.var, np.inf)
    assert np.isfinite(new.mean).all()
    assert not np.isnan(evaluate(x, params, new)[0].astype(np.float32)).any()


@pytest.mark.parametrize("row", [0, 7, 999])
def test_one_row_that_is_huge_gives_no_nan(rng, row):
    # Wherever the shift is taken from, the mean may be so far off that its square
    # overflows as well: inf - inf.
    x = rng.normal(size=(1000, 3)).astype(np.float32)
    x[row] = 1e25
    params, stats = make(rng, 3)
    y, new = train(x, params, stats)
    assert not np.isnan(y).any()
    np.testing.assert_array_equal(new.var, np.inf)
    np.testing.assert_allclose(new.mean, 0.01 * 1e22, rtol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value", [1e37, 3e38])
def test_a_sum_that_overflows_gives_no_nan(value, masked):
    params, stats = jbn.init(3)
    mask = np.ones((64, 1), bool) if masked else None
    x = np.full((64, 3), value, np.float32)
    y, new = train(x, params, stats, mask=mask)
    assert not np.isnan(y).any()
    assert not np.isnan(jax.tree.leaves(new)).any()


def test_there_may_be_no_features():
    params, stats = jbn.init(0)
    y, new = train(jnp.zeros((4, 0)), params, stats)
    assert y.shape == (4, 0)
    assert new.mean.shape == (0,)


@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("epsilon", [1e-3, 1e-5, 1e-7])
def test_epsilon_is_added_inside_the_root(rng, epsilon, use_running_average):
    # The variance is about epsilon: anywhere else it would make another output.
    spread = np.sqrt(epsilon)
    x = (rng.normal(size=(32, 3)) * spread).astype(np.float32)
    params, _ = make(rng, 3)
    stats = BatchStats(jnp.zeros(3), jnp.asarray([0.3, 1, 3], jnp.float32) * epsilon)
    _, mean, var = oracle.moments(x)
    by = (stats.mean, stats.var) if use_running_average else (mean, var)
    expected = oracle.normalize(x, *by, params.scale, params.bias, epsilon=epsilon)
    for given in (epsilon, jnp.float32(epsilon)):
        y, _ = batch_norm(
            x, params, stats, use_running_average=use_running_average, epsilon=given
        )
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("use_running_average", "update_stats", "masked"),
    [(False, True, True), (True, False, False)],
)
def test_jit_changes_nothing_but_rounding(
    rng, use_running_average, update_stats, masked
):
    x = rows_like(rng, (6, 4, 3))
    params, stats = make(rng, 3)
    kwargs = {"use_running_average": use_running_average, "update_stats": update_stats}
    if masked:
        kwargs["mask"] = rng.random((6, 4, 1)) < 0.7
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, **tolerance(x.dtype)),
        batch_norm(x, params, stats, **kwargs),
        jbn.batch_norm(x, params, stats, **kwargs),
    )


def test_ten_steps_with_changing_values_are_traced_once(rng):
    traces = 0

    @jax.jit
    def step(x, params, stats, momentum, epsilon, mask):
        nonlocal traces
        traces += 1
        return jbn.batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            momentum=momentum,
            epsilon=epsilon,
            mask=mask,
        )

    params, stats = jbn.init(3)
    for i in range(10):
        x, mask = rows_like(rng, (6, 3)), rng.random(6) < 0.8
        mask[0] = True
        momentum, epsilon = 0.5 + i / 20, 10.0**-i
        before = stats
        y, stats = step(x, params, stats, momentum, epsilon, mask)
        _, mean, var = oracle.moments(x, mask[:, None])
        np.testing.assert_allclose(
            y, oracle.normalize(x, mean, var, epsilon=epsilon), rtol=1e-4, atol=1e-5
        )
        assert_state(stats, folded(before, mean, var, momentum), **tolerance(x.dtype))
    assert traces == 1


@pytest.mark.parametrize("track_weight", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_state_is_a_carry_of_scan(rng, dtype, track_weight):
    x = jnp.asarray(rows_like(rng, (10, 6, 3)), dtype)
    params, stats = jbn.init(3, param_dtype=dtype, track_weight=track_weight)

    @jax.jit
    def scan(stats, x):
        def step(stats, x):
            y, stats = jbn.batch_norm(x, params, stats, use_running_average=False)
            return stats, y

        return jax.lax.scan(step, stats, x)

    final, ys = scan(stats, x)
    assert dtypes(final) == dtypes(stats)
    for x_, y_ in zip(x, ys, strict=True):
        y, stats = train(x_, params, stats)
        np.testing.assert_allclose(
            y.astype(np.float32), y_.astype(np.float32), **tolerance(dtype)
        )
    assert_state(final, (stats.mean, stats.var), **tolerance(np.float32))


def test_the_state_of_complex_input_is_a_carry_once_its_mean_is_complex(rng):
    x = (rng.normal(size=(5, 6, 3)) + 1j * rng.normal(size=(5, 6, 3))).astype("c8")
    params, stats = jbn.init(3)

    def step(stats, x):
        y, stats = jbn.batch_norm(x, params, stats, use_running_average=False)
        return stats, y

    # `init` knows of no input: its mean is real until the first batch, and no carry.
    _, first = train(x[0], params, stats)
    assert first.mean.dtype == jnp.complex64
    assert first.var.dtype == jnp.float32
    stats = stats._replace(mean=stats.mean.astype(jnp.complex64))
    final, _ = jax.lax.scan(step, stats, x)
    weight = 0.01 * 0.99 ** np.arange(5)[::-1, None]
    expected = (weight * x.mean(1)).sum(0), 0.99**5 + (weight * x.var(1)).sum(0)
    assert_state(final, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update_stats", [None, False])
def test_training_needs_no_state(rng, update_stats):
    x = rows_like(rng, (6, 3))
    params, _ = make(rng, 3)
    y, stats = train(x, params, None, update_stats=update_stats)
    assert stats is None
    expected = oracle.batch_norm(x, params.scale, params.bias)
    np.testing.assert_allclose(y, expected, **tolerance(x.dtype))


def test_a_constant_feature_comes_out_as_bias(rng):
    # In one pass, E[x**2] - E[x]**2, this is off by 1e4 * 2**-24.
    x = np.tile(np.asarray([[100.3, -7.7, 0]], np.float32), (1000, 1))
    params, stats = make(rng, 3)
    y, _ = train(x, params, stats)
    # The mean is right to the last bit or two, 1e-5, and 1 / sqrt(epsilon) is 316.
    expected = np.broadcast_to(params.bias, x.shape)
    np.testing.assert_allclose(y, expected, atol=2 * 2e-5 * 316 * 2)
    var = jbn.moments(x).var
    np.testing.assert_allclose(var, 0, atol=1e-9)


@pytest.mark.parametrize("shift", [1e2, 1e3, 1e4])
def test_the_output_does_not_notice_a_large_mean(rng, shift):
    x = (rng.normal(size=(512, 3)) + shift).astype(np.float32)
    y, _ = train(x, None, None)
    # What is left is the rounding of the mean itself.
    atol = 2 * shift * np.finfo(np.float32).eps
    np.testing.assert_allclose(y, oracle.batch_norm(x), rtol=1e-5, atol=atol)


def test_a_variance_that_float32_can_hold_is_not_infinite(rng):
    x = (2e18 * rng.normal(size=(4096, 2))).astype(np.float32)
    got = jbn.moments(x)
    np.testing.assert_allclose(got.var, oracle.moments(x)[2], rtol=1e-5)


def test_a_constant_feature_without_epsilon_is_the_bias():
    params, _ = jbn.init(2)

    def loss(x):
        y, _ = jbn.batch_norm(x, params, None, use_running_average=False, epsilon=0.0)
        return (jnp.sin(y) * x).sum(), y

    x = jnp.full((4, 2), 3.0)
    (_, y), dx = jax.value_and_grad(loss, has_aux=True)(x)
    np.testing.assert_array_equal(y, np.zeros((4, 2)))
    np.testing.assert_array_equal(dx, np.zeros((4, 2)))
    assert np.isfinite(jax.hessian(lambda x: loss(x)[0])(x)).all()
