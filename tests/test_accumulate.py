"""`accumulate=True` and `jbn.commit`: one update of the statistics for many batches."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from ways import mapped_by

import jbn
from jbn import BatchStats, Moments, Params


pytestmark = pytest.mark.sweep


FEATURES = 3
MOMENTUM, EPSILON = 0.7, 1e-3
LESS: Any = {"rtol": 1e-5, "atol": 1e-5}
# The sizes of microbatches: k of them, even or not.
SPLITS = {
    "one": (12,),
    "two": (6, 6),
    "four": (3, 3, 3, 3),
    "two, uneven": (9, 3),
    "four, uneven": (7, 1, 0, 4),
}


def state(rng, *, accumulate=True, weight=None) -> tuple[Params, BatchStats]:
    """Parameters and statistics without a special value, and nothing pending."""
    scale, bias, mean = (jnp.asarray(v, "f") for v in rng.normal(size=(3, FEATURES)))
    var = jnp.asarray(rng.uniform(0.5, 2, FEATURES), "f")
    zeros = Moments(*(jnp.zeros(FEATURES) for _ in range(3)))
    seen = None if weight is None else jnp.full(FEATURES, weight, jnp.float32)
    stats = BatchStats(mean, var, seen, zeros if accumulate else None)
    return Params(scale, bias), stats


def rows(rng, n=12, offset=0.0):
    return (rng.normal(size=(n, FEATURES)) * 2 + offset).astype("f")


@functools.partial(jax.jit, static_argnames="others")
def train(x, params, stats, others=(), **options):
    given: Any = {"epsilon": EPSILON, "use_running_average": False}
    return jbn.batch_norm(x, params, stats, **given | options | dict(others))


commit = jax.jit(jbn.commit, static_argnames=("unbiased", "second_moment"))


def assert_committed(got, before, mean, var, keep: Any = MOMENTUM, close=LESS):
    """Raises unless the statistics took up this mean and variance, all there were."""
    np.testing.assert_allclose(
        got.mean, keep * before.mean + (1 - keep) * mean, **close
    )
    np.testing.assert_allclose(got.var, keep * before.var + (1 - keep) * var, **close)
    for leaf in jax.tree.leaves(got.pending):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))


# The statistics are those of the whole batch.


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_statistics_are_those_of_all_rows(rng, split, offset):
    params, before = state(rng)
    x, stats = rows(rng, offset=offset), before
    for part in np.split(x, np.cumsum(split)[:-1]):
        _, stats = train(part, params, stats)
        # Until then, what is normalized by at inference stays as it was.
        np.testing.assert_array_equal(stats.mean, before.mean)
        np.testing.assert_array_equal(stats.var, before.var)
    weight, mean, var = oracle.moments(x)
    assert stats.pending is not None
    np.testing.assert_array_equal(stats.pending.weight, weight)
    np.testing.assert_allclose(stats.pending.mean, mean, **LESS)
    np.testing.assert_allclose(stats.pending.var, var, rtol=1e-4)
    # Each mean is rounded to float32, half of 7.6e-6 near 100.
    close: Any = {"rtol": 1e-5, "atol": 1e-5 + 1e-7 * offset}
    assert_committed(commit(stats, momentum=MOMENTUM), before, mean, var, close=close)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_masked_microbatches_in_a_scan(rng, k):
    params, before = state(rng)
    x = rows(rng).reshape(k, 12 // k, FEATURES)
    mask = rng.random(x.shape[:2]) < 0.6
    mask[0, 0], mask[-1] = True, k == 1
    x[~mask] = np.nan

    @jax.jit
    def optimizer_step(stats, x, mask):
        def microbatch(stats, part):
            x, mask = part
            options: Any = {"mask": mask[:, None]}
            y, stats = train(x, params, stats, **options)
            return stats, y

        stats, y = jax.lax.scan(microbatch, stats, (x, mask))
        return jbn.commit(stats, momentum=MOMENTUM), y

    after, y = optimizer_step(before, x, mask)
    _, mean, var = oracle.moments(x[mask])
    assert_committed(after, before, mean, var)
    for part, out, m in zip(x, y, mask, strict=True):
        by = oracle.moments(part[m])[1:] if m.any() else before[:2]
        want = oracle.normalize(part[m], *by, *params, epsilon=EPSILON)
        np.testing.assert_allclose(out[m], want, **LESS)


RULES = {
    "exponential": ({"momentum": 0.9}, None),
    "debiased": ({"momentum": 0.9}, 0.4),
    "cumulative": ({"momentum": None}, 20.0),
    "unbiased": ({"momentum": 0.9, "unbiased": True}, None),
    "by weight": ({"momentum": 0.9, "reference_weight": 8}, None),
    "second moment": ({"momentum": 0.9, "second_moment": True}, None),
}


@pytest.mark.parametrize(("rule", "weight"), RULES.values(), ids=RULES)
def test_every_running_rule(rng, rule, weight):
    params, before = state(rng, weight=weight)
    x, stats = rows(rng), before
    for part in np.split(x, [7, 8]):
        _, stats = train(part, params, stats)
    n, mean, var = oracle.moments(x)
    got = jbn.commit(stats, **rule)
    keep = 0.9 ** (1.5 if "reference_weight" in rule else 1)
    add, seen = 1 - keep, None
    if weight == 0.4:
        seen = keep * 0.4 + add
        keep, add = keep * 0.4 / seen, add / seen
    elif weight:
        seen = weight + n
        keep, add = weight / seen, n / seen
    if "unbiased" in rule:
        var = var * n / (n - 1)
    want = keep * before.var + add * var
    if "second_moment" in rule or rule["momentum"] is None:
        want += keep * add * (mean - before.mean) ** 2
    np.testing.assert_allclose(got.mean, keep * before.mean + add * mean, **LESS)
    np.testing.assert_allclose(got.var, want, **LESS)
    if seen is None:
        assert got.weight is None
    else:
        assert got.weight is not None
        np.testing.assert_allclose(got.weight, np.broadcast_to(seen, 3), **LESS)


def test_the_rule_is_that_of_commit_and_not_of_the_microbatch(rng):
    params, before = state(rng)
    x = rows(rng)
    _, stats = train(x, params, before, momentum=0.1)
    _, mean, var = oracle.moments(x)
    assert_committed(commit(stats, momentum=MOMENTUM), before, mean, var)
    # 0.99 by default, as everywhere.
    assert_committed(commit(stats), before, mean, var, 0.99)


def test_what_is_committed_is_not_committed_again(rng):
    params, before = state(rng)
    _, stats = train(rows(rng), params, before)
    once = commit(stats, momentum=MOMENTUM)
    for got in (commit(once, momentum=MOMENTUM), commit(once, momentum=0.0)):
        jax.tree.map(np.testing.assert_array_equal, got, once)
    # Nothing was pending to begin with, nor is there after a batch of no rows.
    jax.tree.map(np.testing.assert_array_equal, commit(before), before)
    _, stats = train(rows(rng), params, before, mask=np.zeros((12, 1), bool))
    jax.tree.map(np.testing.assert_array_equal, commit(stats), before)


def test_the_next_step_starts_from_nothing(rng):
    params, before = state(rng)
    x, stats = rows(rng, 24), before
    want = before
    for step in np.split(x, 2):
        for part in np.split(step, [4, 5]):
            _, stats = train(part, params, stats)
        stats = commit(stats, momentum=MOMENTUM)
        _, mean, var = oracle.moments(step)
        assert_committed(stats, want, mean, var)
        want = stats


def test_no_update_and_inference_leave_what_is_pending(rng):
    params, before = state(rng)
    _, stats = train(rows(rng), params, before)
    x = rows(rng)
    _, same = train(x, params, stats, (("update_stats", False),))
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    y, same = train(x, params, stats, (("use_running_average", True),))
    jax.tree.map(np.testing.assert_array_equal, same, stats)
    want = oracle.normalize(x, *before[:2], *params, epsilon=EPSILON)
    np.testing.assert_allclose(y, want, **LESS)


def test_a_feature_of_no_weight_is_not_committed(rng):
    params, before = state(rng)
    x, mask = rows(rng), np.ones((12, FEATURES), bool)
    mask[:, 1] = False
    _, stats = train(x, params, before, mask=mask)
    after = commit(stats, momentum=MOMENTUM)
    _, mean, var = oracle.moments(x)
    keep = np.asarray([MOMENTUM, 1, MOMENTUM])
    assert_committed(after, before, mean, var, keep)


def test_each_microbatch_is_trimmed(rng):
    params, before = state(rng)
    x, stats = rows(rng), before
    x[5, 1] = 1e6
    for part in np.split(x, [9]):
        _, stats = train(part, params, stats, trim=20.0)
    mask = np.ones_like(x, bool)
    mask[5, 1] = False
    _, mean, var = oracle.moments(x, mask)
    assert_committed(commit(stats, momentum=MOMENTUM), before, mean, var)


def test_too_little_weight_to_normalize_by_still_counts(rng):
    # Microbatches of one row each: normalized by the running statistics, but of all of
    # them there is a variance.
    params, before = state(rng)
    x, stats = rows(rng), before
    for part in np.split(x, 12):
        y, stats = train(part, params, stats, min_weight=1.0)
        want = oracle.normalize(part, *before[:2], *params, epsilon=EPSILON)
        np.testing.assert_allclose(y, want, **LESS)
    _, mean, var = oracle.moments(x)
    assert_committed(commit(stats, momentum=MOMENTUM), before, mean, var)


def test_complex_data_make_the_pending_mean_complex(rng):
    _, stats = jbn.init(FEATURES, accumulate=True)
    x = (rows(rng) + 1j * rows(rng)).astype(np.complex64)
    for part in np.split(x, 2):
        _, stats = train(part, None, stats)
    got = commit(stats, momentum=0.0)
    np.testing.assert_allclose(got.mean, x.mean(0), **LESS)
    np.testing.assert_allclose(got.var, x.var(0), **LESS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_scan_can_carry_it(rng, dtype):
    params, before = state(rng)
    x = jnp.asarray(rows(rng), dtype).reshape(4, 3, FEATURES)

    @jax.jit
    def steps(stats, x):
        def step(stats, x):
            y, stats = train(x, params, stats)
            return jbn.commit(stats, momentum=MOMENTUM), y

        return jax.lax.scan(step, stats, x)

    after, y = steps(before, x)
    assert y.dtype == dtype
    mean, var = before[:2]
    for part in np.asarray(x.astype(jnp.float32)):
        _, batch_mean, batch_var = oracle.moments(part)
        mean = MOMENTUM * mean + (1 - MOMENTUM) * batch_mean
        var = MOMENTUM * var + (1 - MOMENTUM) * batch_var
    np.testing.assert_allclose(after.mean, mean, **LESS)
    np.testing.assert_allclose(after.var, var, **LESS)


@pytest.mark.parametrize("kind", mapped_by("vmap", "shard_map"))
def test_devices_accumulate_the_same_moments(rng, kind):
    params, before = state(rng)
    x, mask = rows(rng, 24), rng.random((24, 1)) < 0.6
    f = lambda x, mask, stats: train(x, params, stats, (("axis_name", "d"),), mask=mask)
    if kind == "vmap":
        mapped = jax.vmap(f, (0, 0, None), (0, None), axis_name="d")
    else:
        mesh = jax.make_mesh((4,), ("d",), (AxisType.Auto,), devices=jax.devices()[:4])
        mapped = jax.shard_map(
            f, mesh=mesh, in_specs=(P("d"), P("d"), P()), out_specs=(P("d"), P())
        )
    stats = before
    for part, m in zip(np.split(x, 2), np.split(mask, 2), strict=True):
        if kind == "vmap":
            part, m = part.reshape(4, 3, -1), m.reshape(4, 3, 1)
        _, stats = jax.jit(mapped)(part, m, stats)
    _, mean, var = oracle.moments(x, mask)
    assert_committed(commit(stats, momentum=MOMENTUM), before, mean, var)


def test_each_domain_accumulates_its_own(rng):
    _, before = jbn.init((3, FEATURES), accumulate=True)
    x, ids = rows(rng), rng.integers(0, 2, 12)
    stats = before

    @jax.jit
    def norm(x, ids, stats):
        return jbn.domain_batch_norm(
            x, None, stats, use_running_average=False, domain=ids, epsilon=EPSILON
        )

    for part in np.split(np.arange(12), 3):
        y, stats = norm(x[part], ids[part], stats)
        for i in set(ids[part]):
            own = x[part][ids[part] == i]
            want = oracle.batch_norm(own, epsilon=EPSILON)
            # A single row has variance 0, and 1 / sqrt(epsilon) its roundings.
            np.testing.assert_allclose(y[ids[part] == i], want, rtol=1e-4, atol=1e-4)
    after = commit(stats, momentum=MOMENTUM)
    for i in range(2):
        _, mean, var = oracle.moments(x[ids == i])
        got = BatchStats(after.mean[i], after.var[i])
        old = BatchStats(before.mean[i], before.var[i])
        assert_committed(got, old, mean, var)
    np.testing.assert_array_equal(after.mean[2], np.zeros(FEATURES))
    np.testing.assert_array_equal(after.var[2], np.ones(FEATURES))


# Outputs and gradients: those of ghost batch norm, and those of the whole batch where
# the running statistics normalize.


def of_microbatches(norm, x, params, stats, ct, k):
    """The outputs, and the gradients added up, of `k` microbatches; and the state."""

    def loss(x, params, stats, ct):
        y, stats = norm(x, params, stats)
        return (y * ct).sum(), (y, stats)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    ys, dxs, total = [], [], jax.tree.map(jnp.zeros_like, params)
    for part, part_ct in zip(np.split(x, k), np.split(ct, k), strict=True):
        (dx, dparams), (y, stats) = gradient(part, params, stats, part_ct)
        total = jax.tree.map(jnp.add, total, dparams)
        ys.append(y)
        dxs.append(dx)
    return np.concatenate(ys), np.concatenate(dxs), total, stats


def assert_gradients(got, want, close: Any = None):
    """Raises unless dx and the gradients of scale and bias are close."""
    (dx, dparams), (want_dx, dscale, dbias) = got, want
    close = close or {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(dx, want_dx, **close)
    np.testing.assert_allclose(dparams.scale, dscale, **close)
    np.testing.assert_allclose(dparams.bias, dbias, **close)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_microbatches_are_the_groups_of_ghost_batch_norm(rng, k):
    params, before = state(rng)
    x, ct = rows(rng), rng.normal(size=(12, FEATURES)).astype("f")
    y, dx, dparams, stats = of_microbatches(train, x, params, before, ct, k)
    # By the oracle, one group after the other.
    groups = list(zip(np.split(x, k), np.split(ct, k), strict=True))
    scale = np.asarray(params.scale)
    want = [oracle.batch_norm(part, *params, epsilon=EPSILON) for part, _ in groups]
    np.testing.assert_allclose(y, np.concatenate(want), **LESS)
    each: Any = [oracle.input_gradient(*g, scale, epsilon=EPSILON) for g in groups]
    summed = (
        np.concatenate([g[0] for g in each]),
        *(sum(g[i] for g in each) for i in (1, 2)),
    )
    assert_gradients((dx, dparams), summed)

    # And by the function itself, statistics too.
    def ghost(x, params):
        y, new = jbn.ghost_batch_norm(
            x,
            params,
            before._replace(pending=None),
            use_running_average=False,
            num_groups=k,
            momentum=MOMENTUM,
            epsilon=EPSILON,
        )
        return (y * ct).sum(), (y, new)

    gradient = jax.jit(jax.grad(ghost, (0, 1), has_aux=True))
    (ghost_dx, ghost_dparams), (ghost_y, new) = gradient(x, params)
    np.testing.assert_allclose(y, ghost_y, **LESS)
    assert_gradients((dx, dparams), (ghost_dx, *ghost_dparams))
    after = commit(stats, momentum=MOMENTUM)
    np.testing.assert_allclose(after.mean, new.mean, **LESS)
    np.testing.assert_allclose(after.var, new.var, **LESS)


def test_they_are_not_those_of_the_whole_batch(rng):
    params, before = state(rng)
    x, ct = rows(rng), rng.normal(size=(12, FEATURES)).astype("f")
    y, dx, _, stats = of_microbatches(train, x, params, before, ct, 4)
    want: Any = oracle.batch_norm(x, *params, epsilon=EPSILON)
    scale = np.asarray(params.scale)
    want_dx: Any = oracle.input_gradient(x, ct, scale, epsilon=EPSILON)[0]
    assert abs(y - want).max() > 0.1
    assert abs(dx - want_dx).max() > 0.1
    # Whereas the statistics are.
    _, mean, var = oracle.moments(x)
    assert_committed(commit(stats, momentum=MOMENTUM), before, mean, var)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("kind", ["running", "renorm"])
def test_by_the_running_statistics_they_are(rng, kind, k):
    params, before = state(rng)
    x, ct = rows(rng), rng.normal(size=(12, FEATURES)).astype("f")
    scale = np.asarray(params.scale)
    if kind == "running":
        norm = functools.partial(
            train, others=(("use_running_average", True), ("update_stats", True))
        )
    else:
        norm = functools.partial(
            jbn.batch_renorm,
            use_running_average=False,
            r_max=np.inf,
            d_max=np.inf,
            epsilon=EPSILON,
        )
    y, dx, dparams, stats = of_microbatches(norm, x, params, before, ct, k)
    want = oracle.normalize(x, *before[:2], *params, epsilon=EPSILON)
    np.testing.assert_allclose(y, want, **LESS)
    _, mean, var = oracle.moments(x)
    assert_committed(commit(stats, momentum=MOMENTUM), before, mean, var)
    rstd = 1 / np.sqrt(np.asarray(before.var) + EPSILON)
    dbias = ct.sum(0)
    dscale = (ct * (x - np.asarray(before.mean)) * rstd).sum(0)
    if kind == "running":
        assert_gradients((dx, dparams), (ct * scale * rstd, dscale, dbias))
    else:
        # r and d are constants, but gradients pass through the batch's own moments:
        # these are of the microbatch.
        np.testing.assert_allclose(dparams.scale, dscale, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dparams.bias, dbias, rtol=1e-4, atol=1e-4)


# One norm before a quadratic loss: what of the large batch can be had, and how.


@functools.partial(jax.jit, static_argnames="use_running_average")
def quadratic(x, t, params, stats, use_running_average):
    """The gradients of half the squared error; and output and statistics."""

    def loss(x, params):
        y, new = train(
            x, params, stats, (("use_running_average", use_running_average),)
        )
        return ((y - t) ** 2).sum() / 2, (y, new)

    return jax.grad(loss, (0, 1), has_aux=True)(x, params)


def in_parts(x, t, params, stats, use_running_average):
    parts = []
    for part, target in zip(np.split(x, 4), np.split(t, 4), strict=True):
        parts.append(quadratic(part, target, params, stats, use_running_average))
        stats = parts[-1][1][1]
    dx, y = (
        np.concatenate(v)
        for v in zip(*((p[0][0], p[1][0]) for p in parts), strict=True)
    )
    dparams = jax.tree.map(lambda *v: sum(v), *(p[0][1] for p in parts))
    return y, dx, dparams, stats


def whole(x, t, params) -> Any:
    """The same of the large batch, in float64."""
    y = oracle.batch_norm(x, *params, epsilon=EPSILON)
    scale = np.asarray(params.scale)
    return y, *oracle.input_gradient(x, y - t, scale, epsilon=EPSILON)


def test_microbatches_of_the_same_moments_are_the_large_batch(rng):
    # Each microbatch holds the same rows in another order, and so do its moments.
    base, params_stats = rows(rng, 3), state(rng)
    x = np.concatenate([rng.permutation(base) for _ in range(4)])
    t = rng.normal(size=x.shape).astype("f")
    y, dx, dparams, _ = in_parts(x, t, *params_stats, False)
    want, want_dx, dscale, dbias = whole(x, t, params_stats[0])
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    # Of scale and bias, too, but not of x: each microbatch removes its own part.
    np.testing.assert_allclose(dparams.scale, dscale, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dparams.bias, dbias, rtol=1e-4, atol=1e-3)
    assert abs(dx - want_dx).max() > 0.01


def test_other_microbatches_are_not(rng):
    x, (params, stats) = rows(rng), state(rng)
    t = rng.normal(size=x.shape).astype("f")
    y, dx, dparams, _ = in_parts(x, t, params, stats, False)
    want, want_dx, dscale, _ = whole(x, t, params)
    assert abs(y - want).max() > 0.1
    assert abs(dx - want_dx).max() > 0.1
    assert abs(dparams.scale - dscale).max() > 0.1


def test_a_pass_for_the_statistics_gives_the_forward_of_the_large_batch(rng):
    x, (params, stats) = rows(rng), state(rng)
    t = rng.normal(size=x.shape).astype("f")
    # The first pass only gathers moments, the second one normalizes by them.
    *_, stats = in_parts(x, t, params, stats, False)
    y, dx, dparams, _ = in_parts(x, t, params, commit(stats, momentum=0.0), True)
    want, want_dx, dscale, dbias = whole(x, t, params)
    np.testing.assert_allclose(y, want, **LESS)
    np.testing.assert_allclose(dparams.scale, dscale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dparams.bias, dbias, rtol=1e-4, atol=1e-4)
    # All that is missing of the gradient of x is what passes through the moments.
    assert abs(dx - want_dx).max() > 0.1
    missing = dx - want_dx
    _, mean, var = oracle.moments(x)
    xh = (x - mean) / np.sqrt(var + EPSILON)
    slope = np.asarray(params.scale) / np.sqrt(var + EPSILON)
    g = y - t
    through = slope * (g.mean(0) + xh * (g * xh).mean(0))
    np.testing.assert_allclose(missing, through, rtol=1e-4, atol=1e-4)


# Trees, modules, optimizers.


def test_trees_of_dicts(rng):
    (_, one), (_, two) = state(rng), state(rng, weight=0.4)
    x = rows(rng)
    _, one = train(x, None, one)
    _, two = train(x, None, two)
    plain = {"mean": jnp.ones(2), "var": jnp.ones(2)}

    def as_dict(stats):
        fields = {k: v for k, v in stats._asdict().items() if v is not None}
        return fields | {"pending": stats.pending._asdict()}

    tree = {
        "block": {"norm": as_dict(one), "step": jnp.asarray(7)},
        "norm": as_dict(two) | {"step": jnp.asarray(3)},
        "plain": plain,
        "empty": {},
    }
    got: Any = jax.jit(lambda tree: jbn.commit(tree, momentum=MOMENTUM))(tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for new, old in ((got["block"]["norm"], one), (got["norm"], two)):
        want = jbn.commit(old, momentum=MOMENTUM)
        np.testing.assert_allclose(new["mean"], want.mean, rtol=1e-6)
        np.testing.assert_allclose(new["var"], want.var, rtol=1e-6)
        for leaf in new["pending"].values():
            np.testing.assert_array_equal(leaf, np.zeros(FEATURES))
    _, mean, var = oracle.moments(x)
    new = got["block"]["norm"]
    fields = BatchStats(new["mean"], new["var"], None, Moments(**new["pending"]))
    assert_committed(fields, one, mean, var)
    np.testing.assert_allclose(got["norm"]["weight"], 0.7 * 0.4 + 0.3, rtol=1e-6)
    assert got["block"]["step"] == 7
    assert got["norm"]["step"] == 3
    jax.tree.map(np.testing.assert_array_equal, got["plain"], plain)
    # What was passed in is as it was.
    np.testing.assert_array_equal(tree["norm"]["pending"]["weight"], np.full(3, 12))


@pytest.mark.usefixtures("standard_promotion")
def test_the_collection_of_a_linen_model(rng):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.Dense(FEATURES)(x)
                x = jbn.BatchNorm(
                    use_running_average=False, accumulate=True, epsilon=EPSILON
                )(x)
            return nn.BatchNorm(use_running_average=False)(x)

    model, x = Model(), rows(rng)
    variables = model.init(jax.random.key(0), x)
    start = variables["batch_stats"]
    apply = jax.jit(lambda v, x: model.apply(v, x, mutable=["batch_stats"]))
    inputs = []
    for part in np.split(x, 3):
        _, updates = apply(variables, part)
        variables = {**variables, **updates}
        dense = variables["params"]["Dense_0"]
        inputs.append(part @ np.asarray(dense["kernel"], float) + dense["bias"])
    got = jbn.commit(variables["batch_stats"], momentum=MOMENTUM)
    assert jax.tree.structure(got) == jax.tree.structure(start)
    first = got["BatchNorm_0"]
    _, mean, var = oracle.moments(np.concatenate(inputs))
    np.testing.assert_allclose(first["mean"], (1 - MOMENTUM) * mean, **LESS)
    want = MOMENTUM + (1 - MOMENTUM) * var
    np.testing.assert_allclose(first["var"], want, **LESS)
    np.testing.assert_array_equal(first["pending"]["weight"], np.zeros(FEATURES))
    # A layer of Flax beside them is left alone.
    for key in ("mean", "var"):
        np.testing.assert_array_equal(
            got["BatchNorm_2"][key], variables["batch_stats"]["BatchNorm_2"][key]
        )
    # The tree goes back into the model.
    apply({**variables, "batch_stats": got}, x)


def test_with_multi_steps_of_optax(rng):
    """Three optimizer steps of four microbatches, in one compiled scan."""
    optax = pytest.importorskip("optax")
    params, before = state(rng)
    x, t = rows(rng, 36), rows(rng, 36)
    optimizer = optax.MultiSteps(optax.sgd(0.1), every_k_schedule=4)

    @jax.jit
    def run(params, stats, x, t):
        def microbatch(carry, batch):
            params, stats, opt_state = carry
            x, t = batch

            def loss(params):
                y, new = train(x, params, stats)
                return ((y - t) ** 2).mean(), new

            grads, stats = jax.grad(loss, has_aux=True)(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            # Whenever the parameters moved, the statistics do.
            stats = jax.lax.cond(
                optimizer.has_updated(opt_state),
                lambda stats: jbn.commit(stats, momentum=MOMENTUM),
                lambda stats: stats,
                stats,
            )
            return (params, stats, opt_state), None

        carry = params, stats, optimizer.init(params)
        return jax.lax.scan(microbatch, carry, (x, t))[0]

    split = lambda v: v.reshape(12, 3, FEATURES)
    with jax.numpy_dtype_promotion("standard"):
        got_params, got, _ = run(params, before, split(x), split(t))

    scale, bias = (np.asarray(p, float) for p in params)
    mean, var = (np.asarray(v, float) for v in before[:2])
    for step in range(3):
        grads = np.zeros((2, FEATURES))
        for i in range(4 * step, 4 * step + 4):
            part, target = split(x)[i], split(t)[i]
            y = oracle.batch_norm(part, scale, bias, epsilon=EPSILON)
            dy = 2 * (y - target) / y.size
            _, *affine = oracle.input_gradient(part, dy, scale, epsilon=EPSILON)
            grads += np.asarray(affine) / 4
        scale, bias = np.asarray([scale, bias]) - 0.1 * grads
        _, batch_mean, batch_var = oracle.moments(x[12 * step : 12 * step + 12])
        mean = MOMENTUM * mean + (1 - MOMENTUM) * batch_mean
        var = MOMENTUM * var + (1 - MOMENTUM) * batch_var
    np.testing.assert_allclose(got_params.scale, scale, **LESS)
    np.testing.assert_allclose(got_params.bias, bias, **LESS)
    np.testing.assert_allclose(got.mean, mean, **LESS)
    np.testing.assert_allclose(got.var, var, **LESS)


_, PLAIN = jbn.init(2)
_, PENDING = jbn.init(2, accumulate=True)
X = np.ones((4, 2), "f")
ANYTHING: Any = [PENDING]
MISTAKES = {
    "statistics that do not accumulate": (
        lambda: jbn.commit(PLAIN),
        ValueError,
        "found no pending moments",
        "`init(..., accumulate=True)`",
    ),
    "layers that do not accumulate": (
        lambda: jbn.commit({"norm": {"mean": X[0], "var": X[0]}, "more": {}}),
        ValueError,
        "found no pending moments",
        "Make the layers with `accumulate=True`",
    ),
    "an empty tree": (
        lambda: jbn.commit({}),
        ValueError,
        "found no pending moments",
        "Make the layers with `accumulate=True`",
    ),
    "a list": (
        lambda: jbn.commit(ANYTHING),
        TypeError,
        "got list",
        "takes a `jbn.BatchStats`, or a dict",
    ),
    "a momentum out of range": (
        lambda: jbn.commit(PENDING, momentum=1.5),
        ValueError,
        "got 1.5",
        "must be from 0 to 1",
    ),
    "the cumulative rule without a weight": (
        lambda: jbn.commit(PENDING, momentum=None),
        ValueError,
        "got `batch_stats.weight=None`",
        "Make them with `init(..., track_weight=True)`",
    ),
    "unbiased second moments": (
        lambda: jbn.commit(PENDING, unbiased=True, second_moment=True),
        ValueError,
        "would count twice",
        "Drop one of them",
    ),
    "pending moments of other features": (
        lambda: jbn.batch_norm(
            X, None, PLAIN._replace(pending=jbn.moments(X.T)), use_running_average=False
        ),
        ValueError,
        "`batch_stats.pending.mean`",
        "must have one entry per feature",
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
