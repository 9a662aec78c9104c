"""`jbn.segment_ids`, and batch norm over packed rows: sequences, sets and graphs."""

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

import jbn
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


# Numbers of rows in each segment, and how many rows there are with their padding.
LENGTHS = {
    "plain": ([2, 3, 1], 6),
    "padded": ([2, 3, 1], 9),
    "empty segments": ([0, 2, 0, 0, 3, 0], 7),
    "empty segments, no padding": ([0, 2, 0, 0, 3, 0], 5),
    "nothing but padding": ([0, 0], 4),
    "no segments": ([], 3),
    "one segment": ([4], 4),
    "no rows": ([0, 0, 0], 0),
}
LESS: Any = {"rtol": 1e-5, "atol": 1e-5}
EPSILON = 1e-3


def repeated(lengths, num_rows):
    """The ids, by NumPy."""
    lengths = [*lengths, num_rows - sum(lengths)]
    return np.repeat(np.arange(len(lengths)), lengths)


def given_as(kind, lengths) -> dict[str, Any]:
    if kind == "lengths":
        return {"lengths": np.asarray(lengths, int)}
    return {"row_splits": np.concatenate([[0], np.cumsum(lengths, dtype=int)])}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "row_splits"])
@pytest.mark.parametrize(("lengths", "num_rows"), LENGTHS.values(), ids=LENGTHS)
def test_ids_are_those_of_repeat(lengths, num_rows, kind, jitted):
    f = functools.partial(jbn.segment_ids, num_rows=num_rows)
    ids = (jax.jit(f) if jitted else f)(**given_as(kind, lengths))
    assert ids.dtype == jnp.int32
    np.testing.assert_array_equal(ids, repeated(lengths, num_rows))


@hypothesis.given(
    lengths=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    kind=st.sampled_from(["lengths", "row_splits"]),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=60)
def test_any_lengths(lengths, kind):
    ids = ids_of_twenty(**given_as(kind, lengths))
    np.testing.assert_array_equal(ids, repeated(lengths, 20))


@jax.jit
def ids_of_twenty(lengths=None, row_splits=None):
    return jbn.segment_ids(lengths, row_splits=row_splits, num_rows=20)


@pytest.mark.parametrize("kind", ["lengths", "row_splits"])
def test_other_lengths_do_not_recompile(kind):
    traces = 0

    @jax.jit
    def ids(lengths=None, row_splits=None):
        nonlocal traces
        traces += 1
        return jbn.segment_ids(lengths, row_splits=row_splits, num_rows=9)

    for lengths in ([1, 2, 3], [9, 0, 0], [0, 0, 0], [3, 3, 3]):
        got = ids(**given_as(kind, lengths))
        np.testing.assert_array_equal(got, repeated(lengths, 9))
    assert traces == 1


def test_a_batch_of_lengths_under_vmap():
    lengths = np.asarray([[1, 2, 0], [0, 5, 1], [0, 0, 0]])
    got = jax.vmap(functools.partial(jbn.segment_ids, num_rows=6))(lengths)
    np.testing.assert_array_equal(got, [repeated(row, 6) for row in lengths])


@pytest.mark.usefixtures("untyped")
def test_what_numpy_takes_for_an_array_will_do():
    lists: Any = [2, 0, 1]
    np.testing.assert_array_equal(jbn.segment_ids(lists, num_rows=4), [0, 0, 2, 3])
    splits: Any = (0, 2, 3)
    got = jbn.segment_ids(row_splits=splits, num_rows=4)
    np.testing.assert_array_equal(got, [0, 0, 1, 2])


@pytest.mark.parametrize(
    ("dtype", "most"),
    [
        (np.int8, 100),
        (np.uint8, 200),
        (np.int16, 20_000),
        (np.int32, 20_000),
        (np.uint32, 20_000),
    ],
)
def test_lengths_of_any_integer_dtype(dtype, most):
    # Their sum need not fit into it.
    lengths, num_rows = [most, 0, most - 1], 3 * most
    got = jbn.segment_ids(np.asarray(lengths, dtype), num_rows=num_rows)
    np.testing.assert_array_equal(got, repeated(lengths, num_rows))


# Batch norm over packed rows, against a loop over the samples.

SIZES = (4, 1, 0, 6, 2)
FEATURES = 3


def state(rng) -> tuple[Params, BatchStats]:
    draws = rng.normal(size=(3, FEATURES)), rng.uniform(0.5, 2, FEATURES)
    scale, bias, mean, var = (
        jnp.asarray(v, jnp.float32) for v in (*draws[0], draws[1])
    )
    return Params(scale, bias), BatchStats(mean, var)


def packed(rng, sizes, num_rows):
    """Samples, and the same as packed rows, whose padding holds whatever it may."""
    samples = [rng.normal(size=(n, FEATURES)) * 2 + rng.normal() for n in sizes]
    samples = [s.astype("f") for s in samples]
    padding = np.full((num_rows - sum(sizes), FEATURES), np.nan, "f")
    return samples, np.concatenate([*samples, padding])


@jax.jit
def over_rows(x, lengths, params, stats, ct):
    """Batch norm in which each packed row counts once, and its gradients."""
    ids = jbn.segment_ids(lengths, num_rows=x.shape[0])
    mask = ids < len(lengths)

    def loss(x, params):
        y, new = jbn.batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            momentum=0.7,
            epsilon=EPSILON,
            mask=mask,
        )
        return (jnp.where(mask[:, None], y, 0) * ct).sum(), (y, new)

    (_, (y, new)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
    return y, new, *grads


@pytest.mark.parametrize("sizes", [SIZES, (5, 0, 0), (1, 1, 1, 1), (16,)], ids=str)
def test_packed_rows_are_one_batch(rng, sizes):
    samples, x = packed(rng, sizes, 16)
    params, stats = state(rng)
    ct = rng.normal(size=x.shape).astype("f")
    y, new, dx, dparams = over_rows(x, np.asarray(sizes), params, stats, ct)
    rows = np.concatenate(samples)
    _, mean, var = oracle.moments(rows)
    want = np.concatenate(
        [
            oracle.normalize(sample, mean, var, *params, epsilon=EPSILON)
            for sample in samples
        ]
    )
    n = len(rows)
    np.testing.assert_allclose(y[:n], want, **LESS)
    np.testing.assert_allclose(new.mean, 0.7 * stats.mean + 0.3 * mean, **LESS)
    np.testing.assert_allclose(new.var, 0.7 * stats.var + 0.3 * var, **LESS)
    want_dx, *affine = oracle.input_gradient(
        rows, ct[:n], np.asarray(params.scale), epsilon=EPSILON
    )
    # Some thirty float32 roundings.
    close: Any = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(dx[:n], want_dx, **close)
    np.testing.assert_array_equal(dx[n:], np.zeros_like(dx[n:]))
    np.testing.assert_allclose(dparams.scale, affine[0], **close)
    np.testing.assert_allclose(dparams.bias, affine[1], **close)


def test_packed_rows_equal_the_dense_masked_batch(rng):
    samples, x = packed(rng, SIZES, 16)
    params, stats = state(rng)
    ct = rng.normal(size=x.shape).astype("f")
    y, new, dx, dparams = over_rows(x, np.asarray(SIZES), params, stats, ct)
    mask = np.arange(6) < np.asarray(SIZES)[:, None]
    dense, dense_ct = np.zeros((2, *mask.shape, FEATURES), "f")
    dense[~mask] = np.nan
    dense[mask], dense_ct[mask] = np.concatenate(samples), ct[: sum(SIZES)]

    @jax.jit
    def masked(x, params):
        def loss(x, params):
            y, new = jbn.batch_norm(
                x,
                params,
                stats,
                use_running_average=False,
                momentum=0.7,
                epsilon=EPSILON,
                mask=mask,
            )
            return jnp.where(mask[..., None], y * dense_ct, 0).sum(), (y, new)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)

    (_, (dense_y, dense_new)), (dense_dx, dense_dparams) = masked(dense, params)
    n = sum(SIZES)
    np.testing.assert_allclose(y[:n], dense_y[mask], **LESS)
    np.testing.assert_allclose(dx[:n], dense_dx[mask], **LESS)
    for a, b in zip(
        jax.tree.leaves((new, dparams)),
        jax.tree.leaves((dense_new, dense_dparams)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, **LESS)


@jax.jit
def by_segment(x, lengths, params, ct):
    """Instance norm of packed rows, and its gradients."""
    ids = jbn.segment_ids(lengths, num_rows=x.shape[0])

    def loss(x, params):
        y, none = jbn.domain_batch_norm(
            x,
            params,
            None,
            use_running_average=False,
            domain=ids,
            num_domains=len(lengths),
            epsilon=EPSILON,
        )
        assert none is None
        return jnp.where((ids < len(lengths))[:, None], y * ct, 0).sum(), y

    (_, y), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, params)
    return y, *grads


@pytest.mark.parametrize("sizes", [SIZES, (5, 0, 0), (16,)], ids=str)
def test_each_segment_by_its_own_statistics(rng, sizes):
    samples, x = packed(rng, sizes, 16)
    params, _ = state(rng)
    ct = rng.normal(size=x.shape).astype("f")
    y, dx, dparams = by_segment(x, np.asarray(sizes), params, ct)
    scale = np.asarray(params.scale)
    dscale, dbias = np.zeros((2, FEATURES))
    start = 0
    for sample in samples:
        rows = slice(start, start + len(sample))
        start += len(sample)
        if not len(sample):
            continue
        want = oracle.batch_norm(sample, *params, epsilon=EPSILON)
        np.testing.assert_allclose(y[rows], want, rtol=1e-4, atol=1e-4)
        want_dx, *affine = oracle.input_gradient(
            sample, ct[rows], scale, epsilon=EPSILON
        )
        np.testing.assert_allclose(dx[rows], want_dx, rtol=1e-4, atol=1e-4)
        dscale, dbias = dscale + affine[0], dbias + affine[1]
    np.testing.assert_allclose(dparams.scale, dscale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dparams.bias, dbias, rtol=1e-4, atol=1e-4)
    # What is padding sends nothing back.
    np.testing.assert_array_equal(dx[start:], np.zeros_like(dx[start:]))


# Graphs in the form of jraph: all nodes one after the other, `n_node` of each graph,
# the last one being padding.

N_NODE, PADDED_TO = (3, 1, 0, 5), 14


def graphs(rng):
    """Nodes and `n_node` with a graph of padding, as `jraph.pad_with_graphs` makes."""
    samples, x = packed(rng, N_NODE, PADDED_TO)
    return samples, x, np.asarray([*N_NODE, PADDED_TO - sum(N_NODE)])


@pytest.mark.parametrize("by", ["ids", "jraph"])
def test_nodes_of_padded_graphs(rng, by):
    samples, x, n_node = graphs(rng)
    if by == "jraph":
        jraph = pytest.importorskip("jraph")
        edges = np.zeros(0, int)
        batch = jraph.GraphsTuple(
            nodes=x[: sum(N_NODE)],
            edges=None,
            receivers=edges,
            senders=edges,
            globals=None,
            n_node=np.asarray(N_NODE),
            n_edge=np.zeros(len(N_NODE), int),
        )
        batch = jraph.pad_with_graphs(batch, PADDED_TO, 1, len(N_NODE) + 1)
        x, mask = np.asarray(batch.nodes), jraph.get_node_padding_mask(batch)
        np.testing.assert_array_equal(batch.n_node, n_node)
        # Their ids are those of the mask, since padding is a graph as well.
        ids = jbn.segment_ids(batch.n_node, num_rows=PADDED_TO)
        np.testing.assert_array_equal(ids < len(N_NODE), mask)
    else:
        mask = jbn.segment_ids(n_node, num_rows=PADDED_TO) < len(n_node) - 1
    params, stats = state(rng)

    @jax.jit
    def norm(x, mask):
        return jbn.batch_norm(
            x, params, stats, use_running_average=False, mask=mask, momentum=0.0
        )

    y, new = norm(x, mask)
    rows = np.concatenate(samples)
    _, mean, var = oracle.moments(rows)
    want = oracle.normalize(rows, mean, var, *params)
    np.testing.assert_allclose(y[: len(rows)], want, **LESS)
    np.testing.assert_allclose(new.mean, mean, **LESS)
    np.testing.assert_allclose(new.var, var, **LESS)


def test_graphs_that_count_once_each(rng):
    samples, x, n_node = graphs(rng)
    params, stats = state(rng)

    @jax.jit
    def norm(x, n_node):
        ids = jbn.segment_ids(n_node, num_rows=len(x))
        weights = jbn.group_weights(ids, len(n_node) - 1)
        return jbn.batch_norm(
            x, params, stats, use_running_average=False, weights=weights, momentum=0.0
        )

    y, new = norm(x, n_node)
    full = [sample.astype(float) for sample in samples if len(sample)]
    mean = np.mean([sample.mean(0) for sample in full], 0)
    var = np.mean([((sample - mean) ** 2).mean(0) for sample in full], 0)
    want = oracle.normalize(np.concatenate(samples), mean, var, *params)
    np.testing.assert_allclose(y[: sum(N_NODE)], want, **LESS)
    np.testing.assert_allclose(new.mean, mean, **LESS)
    np.testing.assert_allclose(new.var, var, **LESS)


def test_graphs_by_their_own_statistics(rng):
    samples, x, n_node = graphs(rng)
    params, _ = state(rng)
    y, *_ = by_segment(x, n_node[:-1], params, np.zeros_like(x))
    want = [oracle.batch_norm(s, *params, epsilon=EPSILON) for s in samples if len(s)]
    got = y[: sum(N_NODE)]
    np.testing.assert_allclose(got, np.concatenate(want), rtol=1e-4, atol=1e-4)


# Mistakes.

HALF: Any = 2.5
MISTAKES = {
    "neither": (
        lambda: jbn.segment_ids(num_rows=3),
        TypeError,
        "got none",
        "takes either `lengths` or `row_splits`",
    ),
    "both": (
        lambda: jbn.segment_ids(np.ones(2, int), row_splits=np.arange(3), num_rows=3),
        TypeError,
        "got both",
        "takes either `lengths` or `row_splits`",
    ),
    "fractional lengths": (
        lambda: jbn.segment_ids(np.ones(2), num_rows=3),
        TypeError,
        "got float64",
        "`lengths` must be of integers",
    ),
    "boolean lengths": (
        lambda: jbn.segment_ids(np.ones(2, bool), num_rows=3),
        TypeError,
        "got bool",
        "`lengths` must be of integers",
    ),
    "fractional row_splits": (
        lambda: jbn.segment_ids(row_splits=np.ones(2, "f"), num_rows=3),
        TypeError,
        "got float32",
        "`row_splits` must be of integers",
    ),
    "one length": (
        lambda: jbn.segment_ids(np.asarray(3), num_rows=3),
        ValueError,
        "got shape ()",
        "`lengths` must have one axis, with one entry per segment",
    ),
    "a matrix of row_splits": (
        lambda: jbn.segment_ids(row_splits=np.zeros((2, 2), int), num_rows=3),
        ValueError,
        "got shape (2, 2)",
        "one axis, with one entry per segment and one more",
    ),
    "no row_splits": (
        lambda: jbn.segment_ids(row_splits=np.zeros(0, int), num_rows=3),
        ValueError,
        "got shape (0,)",
        "one axis, with one entry per segment and one more",
    ),
    "a fractional num_rows": (
        lambda: jbn.segment_ids(np.ones(2, int), num_rows=HALF),
        TypeError,
        "got 2.5",
        "It is the size that rows are padded to",
    ),
    "a traced num_rows": (
        lambda: jax.jit(lambda n: jbn.segment_ids(np.ones(2, int), num_rows=n))(3),
        TypeError,
        "`num_rows` must be a static integer",
        "It is the size that rows are padded to",
    ),
    "negative lengths": (
        lambda: jbn.segment_ids(np.asarray([2, -1]), num_rows=3),
        ValueError,
        "got [ 2 -1]",
        "`lengths` must not be negative",
    ),
    "row_splits that fall": (
        lambda: jbn.segment_ids(row_splits=np.asarray([0, 3, 2]), num_rows=3),
        ValueError,
        "got [0 3 2]",
        "`row_splits` must start with 0 and not decrease",
    ),
    "row_splits that begin late": (
        lambda: jbn.segment_ids(row_splits=np.asarray([1, 3]), num_rows=3),
        ValueError,
        "got [1 3]",
        "`row_splits` must start with 0 and not decrease",
    ),
    "too many rows": (
        lambda: jbn.segment_ids(np.asarray([2, 2]), num_rows=3),
        ValueError,
        "4 rows into 3",
        "Pad `x` to a larger static size",
    ),
    "too many rows by row_splits": (
        lambda: jbn.segment_ids(row_splits=np.asarray([0, 2, 4]), num_rows=3),
        ValueError,
        "4 rows into 3",
        "`row_splits` must fit into `num_rows`",
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
