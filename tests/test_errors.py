"""Every static mistake gets one clear error: the rule, what came, the fix."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn


# Users have no type checker: these are the errors that they see.
pytestmark = pytest.mark.usefixtures("untyped")

X = np.asarray([[1, 10], [3, 30], [5, 10], [7, 50]], np.float32)
PARAMS, STATS = jbn.init(2)


def train(x: Any = X, params: Any = PARAMS, stats: Any = STATS, **kwargs: Any) -> Any:
    kwargs = {"use_running_average": False} | kwargs
    return jbn.batch_norm(x, params, stats, **kwargs)


def in_vmap(**kwargs):
    return jax.vmap(lambda x: jbn.moments(x, **kwargs), axis_name="i")(X[:, None])


MISTAKES = {
    "infinite weights": (
        lambda: train(weights=np.asarray([[1.0], [np.inf], [0.0], [1.0]])),
        ValueError,
        "from 0.0 to inf",
        "A weight of 0 leaves an element out",
    ),
    "integer output": (
        lambda: train(dtype=jnp.int32),
        TypeError,
        "got int32",
        "`dtype` must be a floating or complex dtype",
    ),
    "real output of complex input": (
        lambda: train(X.astype(np.complex64), dtype=jnp.float32),
        TypeError,
        "got float32",
        "`dtype` must be complex, like `x`",
    ),
    "integer parameters": (
        lambda: jbn.init(3, param_dtype=jnp.int32),
        TypeError,
        "got int32",
        "`param_dtype` must be a floating or complex dtype",
    ),
    "a list of moments": (
        lambda: jbn.merge([jbn.moments(X)]),  # pyright: ignore[reportArgumentType]
        TypeError,
        "got list",
        "merge(*parts)",
    ),
    "scalar input": (
        lambda: train(np.float32(1.0)),
        ValueError,
        "got a scalar",
        "Pass an array of shape (..., num_features)",
    ),
    "integer input": (
        lambda: train(X.astype(np.int32)),
        TypeError,
        "got int32",
        "x.astype(jnp.float32)",
    ),
    "boolean input": (
        lambda: train(X > 4),
        TypeError,
        "got bool",
        "x.astype(jnp.float32)",
    ),
    "integer input to moments": (
        lambda: jbn.moments(X.astype(np.uint8)),
        TypeError,
        "got uint8",
        "x.astype(jnp.float32)",
    ),
    "integer input to normalize": (
        lambda: jbn.normalize(X.astype(np.uint8), STATS),
        TypeError,
        "got uint8",
        "x.astype(jnp.float32)",
    ),
    "axis out of range": (
        lambda: train(axis=2),
        ValueError,
        "shape (4, 2); got axis=2",
        "Pass values from -2 to 1",
    ),
    "one of many axes out of range": (
        lambda: train(axis=(1, -3)),
        ValueError,
        "got axis=(1, -3)",
        "Pass values from -2 to 1",
    ),
    "repeated axis": (
        lambda: train(axis=(1, 1)),
        ValueError,
        "got axis=(1, 1)",
        "Remove the repeated one",
    ),
    "repeated axis by two names": (
        lambda: train(axis=(1, -1)),
        ValueError,
        "got axis=(1, -1)",
        "Remove the repeated one",
    ),
    "no feature axis": (
        lambda: train(axis=()),
        ValueError,
        "an empty sequence",
        "Keep an axis of size 1",
    ),
    "axis by name": (
        lambda: train(axis="features"),
        TypeError,
        "got 'features'",
        "must be an integer or a sequence of integers",
    ),
    "fractional axis": (
        lambda: train(axis=(0.5,)),
        TypeError,
        "got (0.5,)",
        "must be an integer or a sequence of integers",
    ),
    "scale of another shape": (
        lambda: train(params=PARAMS._replace(scale=jnp.ones(3))),
        ValueError,
        "`params.scale` must have one entry per feature: it has shape (3,)",
        "pass `axis` (channels-first images: axis=1)",
    ),
    "bias of another rank": (
        lambda: train(params=PARAMS._replace(bias=jnp.ones((1, 2)))),
        ValueError,
        "`params.bias` must have one entry per feature: it has shape (1, 2)",
        "pass `axis`",
    ),
    "mean of another shape": (
        lambda: train(stats=STATS._replace(mean=jnp.ones(4))),
        ValueError,
        "`batch_stats.mean` must have one entry per feature: it has shape (4,)",
        "pass `axis`",
    ),
    "var of another shape": (
        lambda: train(stats=STATS._replace(var=jnp.ones(()))),
        ValueError,
        "`batch_stats.var` must have one entry per feature: it has shape ()",
        "pass `axis`",
    ),
    "features elsewhere": (
        lambda: train(axis=0),
        ValueError,
        "features of shape (4,) along axis=0",
        "pass `axis`",
    ),
    "stats of another shape in normalize": (
        lambda: jbn.normalize(X, jbn.init(3)[1]),
        ValueError,
        "`stats.mean` must have one entry per feature: it has shape (3,)",
        "pass `axis`",
    ),
    "integer scale": (
        lambda: train(params=PARAMS._replace(scale=jnp.ones(2, int))),
        TypeError,
        "got int32",
        "`params.scale` must be of a floating dtype",
    ),
    "complex bias of a real input": (
        lambda: train(params=PARAMS._replace(bias=jnp.ones(2, complex))),
        TypeError,
        "got complex64",
        "`params.bias` must be of a floating dtype, since `x` is not complex",
    ),
    "complex variance": (
        lambda: train(X + 0j, stats=STATS._replace(var=jnp.ones(2, complex))),
        TypeError,
        "got complex64",
        "`batch_stats.var` must be of a floating dtype",
    ),
    "mask of another shape": (
        lambda: train(mask=np.ones(3, bool)),
        ValueError,
        "it has shape (3,), and `x` has shape (4, 2)",
        "for one entry a row give it the shape (4, 1)",
    ),
    "mask of images": (
        lambda: train(jnp.ones((1, 3, 5, 2)), mask=np.ones((1, 3), bool)),
        ValueError,
        "it has shape (1, 3), and `x` has shape (1, 3, 5, 2)",
        "for one entry for each of the leading axes give it the shape (1, 3, 1, 1)",
    ),
    "mask of higher rank": (
        lambda: train(mask=np.ones((1, 4, 2), bool)),
        ValueError,
        "it has shape (1, 4, 2)",
        "give it the shape (4, 1)",
    ),
    "weights of another shape": (
        lambda: train(weights=np.ones((4, 3), np.float32)),
        ValueError,
        "`weights` must broadcast to `x`: it has shape (4, 3)",
        "give it the shape (4, 1)",
    ),
    "ambiguous mask": (
        lambda: train(X[:2], mask=np.ones(2, bool)),
        ValueError,
        "`mask` of shape (2,) is ambiguous for `x` of shape (2, 2)",
        "for one entry a row give it the shape (2, 1)",
    ),
    "mask and weights": (
        lambda: train(mask=np.ones(4, bool), weights=np.ones(4, np.float32)),
        ValueError,
        "got both",
        "Pass `weights=weights * mask`",
    ),
    "fractional mask": (
        lambda: train(mask=np.asarray([1, 0.5, 1, 1], np.float32)),
        ValueError,
        "Got numbers other than 0 and 1",
        "pass them as `weights`",
    ),
    "counts as mask": (
        lambda: jbn.moments(X, mask=np.arange(4)),
        ValueError,
        "Got numbers other than 0 and 1",
        "pass them as `weights`",
    ),
    "negative weights": (
        lambda: train(weights=np.asarray([1, 1, -0.25, 1], np.float32)),
        ValueError,
        "go from -0.25 to 1.0",
        "A weight of 0 leaves an element out",
    ),
    "weights that are not numbers": (
        lambda: train(weights=np.asarray([1, 1, np.nan, 1], np.float32)),
        ValueError,
        "nan",
        "A weight of 0 leaves an element out",
    ),
    "complex weights": (
        lambda: train(weights=np.ones(4, np.complex64)),
        TypeError,
        "got complex64",
        "`weights` must be real",
    ),
    "negative momentum": (
        lambda: train(momentum=-0.1),
        ValueError,
        "must be from 0 to 1; got -0.1",
        "PyTorch's `momentum` is one minus this",
    ),
    "momentum above one": (
        lambda: train(momentum=99),
        ValueError,
        "got 99",
        "PyTorch's `momentum` is one minus this",
    ),
    "momentum of one feature above one": (
        lambda: train(momentum=np.asarray([0.9, 1.5], np.float32)),
        ValueError,
        "1.5",
        "must be from 0 to 1",
    ),
    "momentum that is not a number": (
        lambda: train(momentum=float("nan")),
        ValueError,
        "got nan",
        "must be from 0 to 1",
    ),
    "cumulative rule without a weight": (
        lambda: train(momentum=None),
        ValueError,
        "got `batch_stats.weight=None`",
        "Make them with `init(..., track_weight=True)`",
    ),
    "momentum in update_batch_stats": (
        lambda: jbn.update_batch_stats(STATS, jbn.moments(X), momentum=1.01),
        ValueError,
        "got 1.01",
        "PyTorch's `momentum` is one minus this",
    ),
    "other features in update_batch_stats": (
        lambda: jbn.update_batch_stats(STATS, jbn.moments(X.T)),
        ValueError,
        "got shapes (2,) and (4,)",
        "must be of the same features",
    ),
    "negative epsilon": (
        lambda: train(epsilon=-1e-5),
        ValueError,
        "got -1e-05",
        "1e-5 by default",
    ),
    "negative epsilon in normalize": (
        lambda: jbn.normalize(X, STATS, epsilon=-1.0),
        ValueError,
        "got -1.0",
        "1e-5 by default",
    ),
    "evaluation without batch_stats": (
        lambda: train(stats=None, use_running_average=True),
        ValueError,
        "got None",
        "Make them with `init`",
    ),
    "update without batch_stats": (
        lambda: train(stats=None, update_stats=True),
        ValueError,
        "got None",
        "`use_running_average=False` and `update_stats=False`",
    ),
    "feature count as flag": (
        lambda: train(use_running_average=64),
        TypeError,
        "got 64",
        "True or False",
    ),
    "number as update_stats": (
        lambda: train(update_stats=1),
        TypeError,
        "`update_stats` must be True or False when the function is traced; got 1",
        "static argument of `jit`",
    ),
    "traced flag": (
        lambda: jax.jit(lambda flag: train(use_running_average=flag))(True),
        TypeError,
        "`use_running_average` must be True or False when the function is traced",
        "Make it a static argument of `jit`",
    ),
    "unknown axis name": (
        lambda: train(axis_name="batch"),
        NameError,
        "got 'batch', which is not",
        "Under plain `jit` leave it None",
    ),
    "misspelled axis name": (
        lambda: in_vmap(axis_name="j"),
        NameError,
        "got 'j', which is not",
        "Check the spelling in `shard_map`, `pmap` or `vmap`",
    ),
    "groups without an axis name": (
        lambda: train(axis_index_groups=[[0, 1]]),
        ValueError,
        "`axis_name`, which is None",
        "Pass `axis_name`, or drop `axis_index_groups`",
    ),
    "groups that miss an index": (
        lambda: in_vmap(axis_name="i", axis_index_groups=[[0, 1], [2]]),
        ValueError,
        "0 to 3, into groups; got [[0, 1], [2]]",
        "Name each index exactly once",
    ),
    "fractional number of features": (
        lambda: jbn.init(2.5),  # pyright: ignore[reportArgumentType]
        TypeError,
        "got 2.5",
        "must be an integer, or a sequence of them for several feature axes",
    ),
    "negative number of features": (
        lambda: jbn.init((3, -1)),
        ValueError,
        "got (3, -1)",
        "must not be negative",
    ),
    "nothing to merge": (
        lambda: jbn.merge(),
        TypeError,
        "got none",
        "takes at least one `Moments`",
    ),
    "means of integers": (
        lambda: jbn.merge(jbn.Moments(jnp.ones(2), jnp.array([1, 2]), jnp.ones(2))),
        TypeError,
        "got int32",
        "`mean` of `Moments` must be of a floating or complex dtype",
    ),
    "other features to merge": (
        lambda: jbn.merge(jbn.moments(X), jbn.moments(X.T)),
        ValueError,
        "shapes [(2,), (4,)]",
        "takes moments of the same features",
    ),
}


@pytest.mark.parametrize(
    ("call", "error", "came", "fix"), MISTAKES.values(), ids=MISTAKES
)
def test_a_mistake_gets_one_clear_error(call, error, came, fix):
    with pytest.raises(error, match=re.escape(fix)) as raised:
        call()
    assert came in str(raised.value)


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ({"stats": STATS._replace(weight=jnp.ones(3))}, "`batch_stats.weight`"),
        ({"momentum": np.full(3, 0.9, np.float32)}, "`momentum`"),
        ({"epsilon": np.full(2, 1e-5, np.float32)}, "`epsilon`"),
        ({"params": PARAMS._asdict()}, "`params`"),
    ],
    ids=["weight", "momentum", "epsilon", "params"],
)
def test_a_mistake_of_shape_or_kind_names_the_argument(argument, name):
    with pytest.raises((TypeError, ValueError), match=name):
        train(**argument)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (4, 4)])
def test_a_mask_of_lower_rank_is_taken_where_one_reading_fits(rng, shape):
    rows, features = shape
    x = rng.normal(size=(rows, 3, features)).astype(np.float32)
    mask = rng.random((rows, 3)) < 0.7
    mask[0] = True
    got = jbn.moments(x, mask=mask)
    np.testing.assert_allclose(
        got.var, oracle.moments(x, mask[..., None])[2], rtol=1e-5
    )


def test_a_mask_of_lower_rank_is_refused_where_two_readings_fit(rng):
    # Flax takes it for (1, L, C), the wrong axis: (B, L) is what a user means.
    x = rng.normal(size=(3, 3, 3)).astype(np.float32)
    mask = rng.random((3, 3)) < 0.5
    mask[0, 0] = True
    with pytest.raises(ValueError, match=r"give it the shape \(3, 3, 1\)"):
        jbn.moments(x, mask=mask)
    for spelled in (mask[..., None], mask[None], mask[:, None]):
        got = jbn.moments(x, mask=spelled)
        for actual, expected in zip(got, oracle.moments(x, spelled), strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


LEGITIMATE = {
    "numpy everywhere": lambda: train(X, *jax.tree.map(np.asarray, (PARAMS, STATS))),
    "a list": lambda: train(X.tolist()),
    "float64 without x64": lambda: train(X.astype(np.float64)),
    "float64 parameters without x64": lambda: train(
        X, *jax.tree.map(np.float64, (PARAMS, STATS))
    ),
    "a list of axes": lambda: train(axis=[1]),
    "an axis of NumPy": lambda: train(axis=np.int64(1)),
    "flags of NumPy": lambda: train(
        use_running_average=np.bool_(False), update_stats=np.bool_(True)
    ),
    "momentum as float32": lambda: train(momentum=np.float32(0.99)),
    "momentum as float64": lambda: train(momentum=np.full(2, 0.99)),
    "momentum traced": lambda: jax.jit(lambda m: train(momentum=m))(0.99),
    "epsilon as float64": lambda: train(epsilon=np.float64(1e-5)),
    "epsilon traced": lambda: jax.jit(lambda e: train(epsilon=e))(1e-5),
    "mask of ones": lambda: train(mask=np.ones(4)),
    "mask of integer ones": lambda: train(mask=np.ones((4, 1), np.uint8)),
    "mask as a list": lambda: train(mask=[True] * 4),
    "weights as booleans": lambda: train(weights=np.ones(4, bool)),
    "weights as integers": lambda: train(weights=np.ones((4, 2), np.int64)),
    "weights as a list": lambda: train(weights=[[1.0]] * 4),
}


@pytest.mark.parametrize("call", LEGITIMATE.values(), ids=LEGITIMATE)
def test_what_is_legitimate_keeps_working(call):
    (y, stats), (expected_y, expected_stats) = call(), train()
    np.testing.assert_allclose(y, expected_y, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(stats.mean, expected_stats.mean, rtol=1e-6)
    np.testing.assert_allclose(stats.var, expected_stats.var, rtol=1e-6)
    assert {y.dtype, stats.mean.dtype, stats.var.dtype} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32, np.float16])
def test_masks_of_zeros_and_ones_are_masks_of_any_dtype(dtype, jitted):
    x = X.copy()
    x[1] = np.nan
    mask = np.asarray([1, 0, 1, 1], dtype)

    def run(mask):
        return train(x, mask=mask)

    y, stats = (jax.jit(run) if jitted else run)(mask)
    expected = oracle.batch_norm(X[[0, 2, 3]])
    np.testing.assert_allclose(y[np.array([0, 2, 3])], expected, rtol=1e-5)
    np.testing.assert_array_equal(y[1], [0, 0])
    np.testing.assert_allclose(stats.mean, 0.01 * X[[0, 2, 3]].mean(0), rtol=1e-5)


@pytest.mark.parametrize("momentum", [0, 1, 0.0, 1.0])
def test_the_ends_of_momentum_are_allowed(momentum):
    _, stats = train(momentum=momentum)
    expected = (0, 1) if momentum else (X.mean(0), X.var(0))
    np.testing.assert_allclose(stats.mean, np.broadcast_to(expected[0], 2), rtol=1e-6)
    np.testing.assert_allclose(stats.var, np.broadcast_to(expected[1], 2), rtol=1e-6)


def test_an_epsilon_of_zero_is_allowed():
    y, _ = train(epsilon=0)
    np.testing.assert_allclose(y, oracle.batch_norm(X, epsilon=0), rtol=1e-5)


@pytest.mark.parametrize("argument", ["momentum", "epsilon", "weights"])
def test_values_that_are_not_known_are_not_checked(argument):
    # They could be anything, and a check would cost every step.
    y, _ = jax.jit(lambda v: train(**{argument: v}))(jnp.full((1, 1), 0.5)[0, 0])
    assert y.shape == X.shape


@pytest.mark.parametrize("use_running_average", [False, True])
def test_a_batch_of_one_is_no_error(use_running_average):
    y, stats = train(X[:1], use_running_average=use_running_average)
    assert np.isfinite(jax.tree.leaves((y[0], stats))).all()
