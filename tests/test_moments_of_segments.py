"""`jbn.moments` and `jbn.normalize` by segment, next to a loop over the segments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jbn


NUM = 4
IDS = np.asarray([3, 0, -1, 0, 3, 2, 4, 0, 3, 99], np.int32)  # nothing is of segment 1


def problem(rng):
    return rng.normal(size=(10, 2, 3)) + 5 * IDS[:, None, None] % 7


def loop(x, w, ids, num=NUM, axis: int = -1):
    """The moments of each segment, the others left out."""
    one = lambda i: oracle.moments(x[ids == i], w[ids == i], axis)
    return [np.stack(v) for v in zip(*map(one, range(num)), strict=True)]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["plain", "mask", "weights", "each row", "axis"])
def test_moments_are_those_of_the_rows_of_each_segment(rng, kind):
    x, w, ids, axis = problem(rng), np.ones((10, 2, 3)), IDS, -1
    given: dict[str, Any] = {}
    if kind == "mask":
        w = np.broadcast_to(rng.random((10, 1, 3)) < 0.7, x.shape)
        x = np.where(w, x, np.nan)
        given = {"mask": w}
    if kind == "weights":
        w = rng.integers(0, 3, x.shape) * 1.0
        given = {"weights": w}
    if kind == "axis":
        axis, given = 1, {"axis": 1}
    f = lambda x, ids: jbn.moments(x, segment_ids=ids, num_segments=NUM, **given)
    if kind == "each row":
        ids = rng.integers(-1, NUM + 1, (10, 2), np.int32)
        want = loop(x.reshape(20, 3), w.reshape(20, 3), ids.ravel())
    else:
        want = loop(x, w, ids, axis=axis)
    x[ids < 0] = np.inf  # padding
    got = jax.jit(f)(x, jnp.asarray(ids))
    for g, v in zip(got, want, strict=True):
        assert g.shape == (NUM, x.shape[axis])
        np.testing.assert_allclose(g, v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ["sorted", "any"])
def test_variances_are_exact_at_any_mean_of_any_segment(rng, order):
    num, rows = 50, 20_000
    # Half of the rows are of one segment, the others share the rest.
    ids = np.where(rng.random(rows) < 0.5, 7, rng.integers(0, num, rows))
    ids = np.sort(ids) if order == "sorted" else ids
    x = (rng.normal(size=(rows, 2)) + 1e3 * ids[:, None]).astype("f")
    got = jbn.moments(x, segment_ids=ids, num_segments=num)
    weight, mean, var = loop(x.astype(float), np.ones(x.shape), ids, num)
    np.testing.assert_array_equal(got.weight, weight)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.var, var, rtol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("own", [False, True])
def test_normalize_gives_each_row_the_statistics_of_its_segment(rng, own):
    x = problem(rng)
    stats = jbn.BatchStats(*jnp.asarray(rng.uniform(0.5, 2, (2, NUM, 3))))
    shape = (NUM, 3) if own else (3,)
    params = jbn.Params(*map(jnp.asarray, rng.normal(size=(2, *shape))))
    x[IDS == -1] = np.nan
    got = jax.jit(jbn.normalize)(x, stats, params, segment_ids=IDS)
    for i, row in enumerate(x):
        k = IDS[i] if 0 <= IDS[i] < NUM else NUM - 1
        scale, bias = (np.broadcast_to(np.asarray(p), (NUM, 3))[k] for p in params)
        want = oracle.normalize(row, stats.mean[k], stats.var[k], scale, bias)
        want = np.broadcast_to(bias, want.shape) if IDS[i] == -1 else want
        np.testing.assert_allclose(got[i], want, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_two_are_domain_batch_norm_with_its_gradient(rng):
    x, ct = (jnp.asarray(v) for v in (problem(rng), rng.normal(size=(10, 2, 3))))
    ids = jnp.asarray(np.where(IDS >= NUM, -1, IDS))
    w = jnp.asarray(rng.uniform(0.2, 2, (10, 2, 1)))
    params = jbn.Params(*map(jnp.asarray, rng.normal(size=(2, 3))))

    def pieces(x, w):
        given = {"segment_ids": ids, "num_segments": NUM, "weights": w}
        return jbn.normalize(x, jbn.moments(x, **given), params, segment_ids=ids)

    def whole(x, w):
        given = {"domain": ids, "num_domains": NUM, "weights": w}
        return jbn.domain_batch_norm(
            x, params, None, use_running_average=False, **given
        )[0]

    def grads(f):
        return jax.grad(lambda x, w: (jnp.sin(f(x, w)) * ct)[ids >= 0].sum(), (0, 1))

    np.testing.assert_allclose(pieces(x, w)[ids >= 0], whole(x, w)[ids >= 0], 1e-12)
    for got, want in zip(grads(pieces)(x, w), grads(whole)(x, w), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.devices
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_a_segment_may_lie_on_several_devices(rng, how):
    x, ids = rng.normal(size=(24, 3)), rng.integers(-1, NUM, 24)
    want = loop(x, np.ones(x.shape), ids)
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x, ids, **axis: jbn.moments(x, segment_ids=ids, num_segments=NUM, **axis)
    if how == "jit":
        sharding = jax.sharding.NamedSharding(mesh, P("d"))
        got = jax.jit(f)(*jax.device_put((x, ids), sharding))
    else:
        g = lambda x, ids: f(x, ids, axis_name="d")
        got = jax.shard_map(g, mesh=mesh, in_specs=P("d"), out_specs=P())(x, ids)
    for g, v in zip(got, want, strict=True):
        np.testing.assert_allclose(g, v, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("untyped")
def test_errors_name_the_argument(rng):
    x = problem(rng)
    with pytest.raises(TypeError, match="together; got only `segment_ids`"):
        jbn.moments(x, segment_ids=IDS)
    with pytest.raises(TypeError, match="together; got only `num_segments`"):
        jbn.moments(x, num_segments=3)
    with pytest.raises(ValueError, match="`num_segments` must be at least 1"):
        jbn.moments(x, segment_ids=IDS, num_segments=0)
    with pytest.raises(TypeError, match="`segment_ids` must be of integers"):
        jbn.moments(x, segment_ids=IDS * 1.0, num_segments=3)
    stats = jbn.BatchStats(jnp.zeros(3), jnp.ones(3))
    with pytest.raises(ValueError, match=r"`stats.mean` must .* per segment"):
        jbn.normalize(x, stats, segment_ids=IDS)
