"""Integers that say what rows belong to: of few bits, and out of range."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from differentiation import QUICKLY
from flax import nnx
from jax.experimental.sparse import BCOO

import jbn
import jbn.nnx


# More rows than an integer of this type can count, and not of a number that several
# devices could share.
MORE = {np.int8: 131, np.uint8: 301, np.int16: 32_801, np.uint16: 65_601}


def of_few_bits(*dtypes, slow=()):
    """For each of these types, with ids that are known and with ids that are not."""
    return pytest.mark.parametrize(
        ("dtype", "traced"),
        [
            pytest.param(
                dtype,
                traced,
                marks=[pytest.mark.slow] if (dtype, traced) in slow else [],
                id=f"{dtype.__name__}-{'traced' if traced else 'known'}",
            )
            for dtype in dtypes
            for traced in (True, False)
        ],
    )


LONG = (np.int16, False), (np.uint16, False)  # constants that XLA computes with


def run(f, ids, *args, traced):
    """`f(ids, *args)`, compiled, with ids that are known or are not."""
    g = f if traced else lambda _, *args: f(ids, *args)
    return jax.jit(g, compiler_options=QUICKLY)(jnp.asarray(ids), *args)


def train(function, x, params, stats, **options) -> Any:
    options = {"use_running_average": False, "momentum": 0.0, "epsilon": 0.0} | options
    return function(x, params, stats, **options)


def halves(rows, dtype):
    """Ids of 0, then of 1, and rows that have a mean of their own in each half."""
    ids = (np.arange(rows) >= rows // 2).astype(dtype)
    x = np.sin(np.arange(rows))[:, None] + 3 * ids[:, None]
    return ids, x.astype(np.float32)


@of_few_bits(*MORE, slow=[*LONG, (np.int8, False), (np.uint8, True), (np.uint16, True)])
def test_domains(dtype, traced):
    ids, x = halves(MORE[dtype], dtype)
    _, stats = jbn.init((2, 1))
    f = lambda ids, x: train(jbn.domain_batch_norm, x, None, stats, domain=ids)
    y, new = run(f, ids, x, traced=traced)
    for kind in (0, 1):
        _, mean, var = oracle.moments(x[ids == kind])
        np.testing.assert_allclose(new.mean[kind], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.var[kind], var, rtol=1e-5)
        want = (x[ids == kind] - mean) / np.sqrt(var)
        np.testing.assert_allclose(y[ids == kind], want, rtol=1e-4, atol=1e-5)


def test_domains_of_images():
    ids, _ = halves(301, np.uint8)
    x = np.cos(np.arange(4 * ids.size)).reshape(-1, 2, 2, 1).astype(np.float32)
    _, stats = jbn.init((2, 1))
    _, new = train(jbn.domain_batch_norm, x, None, stats, domain=ids)
    for kind in (0, 1):
        _, mean, var = oracle.moments(x[ids == kind])
        np.testing.assert_allclose(new.mean[kind], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(new.var[kind], var, rtol=1e-5)


@of_few_bits(np.int8, np.uint8, slow=[(np.int8, False), (np.uint8, False)])
def test_more_domains_than_an_id_can_name(dtype, traced):
    ids, x = halves(20, dtype)
    ids *= 100
    _, stats = jbn.init((MORE[dtype], 1))
    f = lambda ids, x: train(jbn.domain_batch_norm, x, None, stats, domain=ids)
    _, new = run(f, ids, x, traced=traced)
    want = np.zeros((MORE[dtype], 1))
    want[[0, 100], 0] = x[:10].mean(), x[10:].mean()
    np.testing.assert_allclose(new.mean, want, rtol=1e-5, atol=1e-6)


def test_gradients_by_domain():
    ids, x = halves(301, np.uint8)
    ct = np.cos(np.arange(301.0))[:, None].astype(np.float32)
    scale = np.full(1, 1.5, np.float32)

    def loss(x, scale):
        y, _ = jbn.domain_batch_norm(
            x,
            jbn.Params(scale),
            None,
            use_running_average=False,
            domain=ids,
            num_domains=2,
            epsilon=0.5,
        )
        return (y * ct).sum()

    grad = jax.jit(jax.grad(loss, (0, 1)), compiler_options=QUICKLY)
    dx, dscale = grad(x, scale)
    total = 0
    for kind in (0, 1):
        mine = ids == kind
        want, by_scale, _ = oracle.input_gradient(x[mine], ct[mine], scale, epsilon=0.5)
        np.testing.assert_allclose(dx[mine], want, rtol=1e-4, atol=1e-5)
        total += by_scale
    np.testing.assert_allclose(dscale, total, rtol=1e-4)


@of_few_bits(np.int8, np.uint8)
@pytest.mark.parametrize("classes", [300, pytest.param(2, marks=pytest.mark.slow)])
def test_labels(dtype, traced, classes):
    ids, x = halves(MORE[dtype], dtype)
    ids *= min(classes - 1, 127)
    tables = np.sin(np.arange(2.0 * classes)).reshape(2, classes, 1).astype("f")
    params = jbn.Params(*tables)
    _, stats = jbn.init(1)
    f = lambda ids, x: train(jbn.conditional_batch_norm, x, params, stats, labels=ids)
    y, _ = run(f, ids, x, traced=traced)
    scale, bias = tables[:, ids]
    want = scale * (x - x.mean()) / x.astype(float).std() + bias
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


LENGTHS = {
    np.int8: [100, 0, 27, 60],
    np.uint8: [200, 0, 90, 11],
    np.int16: [20_000, 0, 20_000, 3],
    np.uint16: [40_000, 0, 40_000, 3],
}


@of_few_bits(*LENGTHS, slow=LONG)
def test_packed_rows(dtype, traced):
    lengths = LENGTHS[dtype]
    f = lambda lengths: jbn.segment_ids(lengths, num_rows=sum(LENGTHS[dtype]) + 2)
    got = run(f, np.asarray(lengths, dtype), traced=traced)
    np.testing.assert_array_equal(got, np.repeat(np.arange(5), [*lengths, 2]))


@of_few_bits(np.uint8)
def test_row_splits(dtype, traced):
    splits = np.asarray([0, 3, 3, 120, 250], dtype)
    f = lambda splits: jbn.segment_ids(row_splits=splits, num_rows=300)
    got = run(f, splits, traced=traced)
    np.testing.assert_array_equal(got, np.repeat(np.arange(5), [3, 0, 117, 130, 50]))


@of_few_bits(*MORE, slow=LONG)
def test_weights_of_groups(dtype, traced):
    ids, _ = halves(MORE[dtype], dtype)
    ids[:3] = 0, 1, 2  # the last of them is of no group
    f = lambda ids: jbn.group_weights(ids, 2)
    got = run(f, ids, traced=traced)
    want = np.select([ids == 0, ids == 1], [1 / (ids == 0).sum(), 1 / (ids == 1).sum()])
    np.testing.assert_allclose(got, want, rtol=1e-6)


@of_few_bits(np.int8, np.uint8)
def test_more_groups_than_an_id_can_name(dtype, traced):
    f = lambda ids: jbn.group_weights(ids, MORE[dtype])
    got = run(f, np.asarray([0, 100, 100, 1], dtype), traced=traced)
    np.testing.assert_allclose(got, [1, 0.5, 0.5, 1])


@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [
        pytest.param((101, 3), -1, np.int8, id="more elements, int8"),
        pytest.param((256, 2), -1, np.uint8, id="a size, uint8"),
        pytest.param(
            (101, 3), -1, np.uint8, id="more elements, uint8", marks=pytest.mark.slow
        ),
        pytest.param((128, 2), -1, np.int8, id="a size, int8", marks=pytest.mark.slow),
        pytest.param(
            (3, 20, 15), (1, 2), np.uint8, id="more features", marks=pytest.mark.slow
        ),
    ],
)
def test_sparse_indices(shape, axis, dtype, rng):
    dense = rng.standard_normal(shape).astype(np.float32)
    index = np.argwhere(rng.random(shape) < 2)
    _, stats = jbn.init(shape[1:])

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(data, index):
        x = BCOO((data, index), shape=shape, indices_sorted=True, unique_indices=True)
        return train(jbn.sparse_batch_norm, x, None, stats, axis=axis)

    y, new = run(dense.ravel(), index.astype(dtype))
    _, mean, var = oracle.moments(dense, axis=axis)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new.var, var, rtol=1e-4)
    got = np.asarray(y.background)[None] + np.asarray(y.values.data).reshape(shape)
    want = (dense - mean) / np.sqrt(var)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_modules():
    ids, x = halves(300, np.uint8)
    want = [x[:150].mean(), x[150:].mean()]
    layer = jbn.DomainBatchNorm(2, use_running_average=False, momentum=0.0)
    _, new = layer.init_with_output(jax.random.key(0), x, domain=ids)
    _, new = layer.apply(new, x, domain=ids, mutable=["batch_stats"])
    mean = np.ravel(new["batch_stats"]["mean"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    np.testing.assert_allclose(mean, want, rtol=1e-5)
    layer = jbn.nnx.DomainBatchNorm(1, 2, momentum=0.0, rngs=nnx.Rngs(0))
    layer(x, domain=ids)
    np.testing.assert_allclose(layer.mean[...].ravel(), want, rtol=1e-5)


# --- Out of range ----------------------------------------------------------------

X = np.asarray([[1], [3], [10], [30], [100]], np.float32)


def by_domain(ids, **options):
    _, stats = jbn.init((2, 1))
    return train(jbn.domain_batch_norm, X, None, stats, domain=ids, **options)


def linen(ids):
    layer = jbn.DomainBatchNorm(2, use_running_average=False)
    return layer.init(jax.random.key(0), X, domain=ids)


def of_nnx(ids):
    return jbn.nnx.DomainBatchNorm(1, 2, rngs=nnx.Rngs(0))(X, domain=ids)


def at_inference(ids):
    return by_domain(ids, use_running_average=True)


def without_statistics(ids):
    return jbn.domain_batch_norm(
        X, None, None, use_running_average=False, domain=ids, num_domains=2
    )


@pytest.mark.parametrize(
    "call", [by_domain, at_inference, without_statistics, linen, of_nnx]
)
@pytest.mark.parametrize(
    ("ids", "worst"),
    [
        (np.asarray([0, 0, 1, 1, 2]), 2),
        (np.asarray([0, 0, 1, 1, 255], np.uint8), 255),
        (jnp.asarray([0, -1, 1, 7, 0]), 7),
        (5, 5),
    ],
    ids=["one more", "uint8", "jax", "one for all"],
)
def test_a_domain_that_is_not_there_is_refused(call, ids, worst):
    with pytest.raises(
        ValueError, match=r"`domain`.*\b(0 to 1|domains, 2)\b"
    ) as raised:
        call(ids)
    assert re.search(rf"\b{worst}\b", str(raised.value))


@pytest.mark.parametrize(
    "ids",
    [
        np.asarray([0, 0, 1, 1, -1]),
        jnp.asarray([0, 0, 1, 1, -1], jnp.int8),
    ],
    ids=["int64", "int8"],
)
def test_a_negative_domain_is_padding(ids):
    _, new = by_domain(ids)
    np.testing.assert_allclose(new.mean.ravel(), [2, 20], rtol=1e-6)
    np.testing.assert_allclose(new.var.ravel(), [1, 100], rtol=1e-6)


@pytest.mark.parametrize(
    ("padding", "dtype"),
    [
        (255, np.uint8),
        (-128, np.int8),
        pytest.param(2, np.int32, marks=pytest.mark.slow),
    ],
)
def test_a_traced_domain_that_is_not_there_is_padding(padding, dtype):
    ids = jnp.asarray([0, 0, 1, 1, padding], dtype)

    def loss(x, ids):
        _, stats = jbn.init((2, 1))
        y, new = train(jbn.domain_batch_norm, x, None, stats, domain=ids, epsilon=0.5)
        ct = np.asarray([[1.0], [2.0], [-1.0], [3.0], [0.0]], np.float32)
        return (y * ct).sum(), (y, new)

    grad = jax.value_and_grad(loss, has_aux=True)
    (_, (y, new)), dx = jax.jit(grad, compiler_options=QUICKLY)(X, ids)
    np.testing.assert_allclose(new.mean.ravel(), [2, 20], rtol=1e-6)
    np.testing.assert_allclose(new.var.ravel(), [1, 100], rtol=1e-6)
    want = [-1 / 1.5**0.5, 1 / 1.5**0.5, -10 / 100.5**0.5, 10 / 100.5**0.5]
    np.testing.assert_allclose(y.ravel()[:4], want, rtol=1e-5)
    assert dx[4, 0] == 0
    assert np.isfinite(dx).all()


def by_label(labels):
    params = jbn.Params(jnp.asarray([[1.0], [2.0]]), jnp.asarray([[0.0], [5.0]]))
    return train(jbn.conditional_batch_norm, X, params, None, labels=labels)[0]


@pytest.mark.parametrize(
    ("labels", "worst"),
    [
        (np.asarray([0, 0, 1, 1, 2]), 2),
        (np.asarray([0, 0, 1, 1, -1], np.int8), -1),
        (jnp.asarray([0, 0, 1, 1, 255], jnp.uint8), 255),
        (-3, -3),
    ],
    ids=["one more", "int8", "uint8", "one for all"],
)
def test_a_label_that_is_not_there_is_refused(labels, worst):
    with pytest.raises(ValueError, match=r"`labels`.*\b0 to 1\b") as raised:
        by_label(labels)
    assert str(worst) in str(raised.value)


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_a_traced_label_that_is_not_there_is_the_nearest(dtype):
    traced = jax.jit(by_label, compiler_options=QUICKLY)
    got = traced(jnp.asarray([-128, -1, 2, 100, 1], dtype))
    np.testing.assert_array_equal(got, traced(jnp.asarray([0, 0, 1, 1, 1], dtype)))
