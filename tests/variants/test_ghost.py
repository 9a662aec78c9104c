"""Ghost batch norm against a loop over the groups, in float64."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from peers import load_peer

import jbn
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


STATIC = ("use_running_average", "update_stats", "axis", "unbiased")
ghost = jax.jit(jbn.ghost_batch_norm, static_argnames=(*STATIC, "num_groups"))
batch_norm = jax.jit(jbn.batch_norm, static_argnames=STATIC)
# In a group of two rows the mean can be 100 deviations, and is rounded to float32.
CLOSE: Any = {"rtol": 1e-5, "atol": 1.5e-5}


def make(rng, features: Any = 3):
    """Parameters and statistics that all differ from the defaults and each other."""
    stats = BatchStats(rng.normal(size=features), rng.uniform(0.5, 3, features))
    params = Params(rng.uniform(0.5, 2, features), rng.normal(size=features))
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, stats))


def rows_like(rng, shape):
    """Data whose groups differ: a trend along every axis."""
    return (rng.normal(size=shape) + np.indices(shape).sum(0)).astype(np.float32)


def groups_of(n, num_groups):
    """The entries of each group: contiguous, `ceil(n / num_groups)` of them."""
    size = int(np.ceil(n / num_groups))
    return [range(n)[g * size : (g + 1) * size] for g in range(num_groups)]


def by_groups(x, params, stats, num_groups, axis: Any = -1, epsilon=1e-5, weights=None):
    """Each group by its own statistics, or by the running ones if it has no weight."""
    given = axis if isinstance(axis, tuple) else (axis,)
    features = {a % x.ndim for a in given}
    first = min(a for a in range(x.ndim) if a not in features)
    weights = np.broadcast_to(1.0 if weights is None else weights, x.shape)
    parts = []
    for group in groups_of(x.shape[first], num_groups):
        if len(group):
            rows, w = (np.take(v, group, axis=first) for v in (x, weights))
            total, mean, var = oracle.moments(rows, w, axis)
            mean = np.where(total > 0, mean, stats.mean)
            var = np.where(total > 0, var, stats.var)
            args = (mean, var, params.scale, params.bias, axis, epsilon)
            parts.append(oracle.normalize(rows, *args))
    return np.concatenate(parts, first)


def folded(stats, moments, momentum):
    _, mean, var = moments
    return tuple(
        momentum * np.float64(old) + (1 - momentum) * batch
        for old, batch in ((stats.mean, mean), (stats.var, var))
    )


@pytest.mark.parametrize(
    ("n", "num_groups", "sizes"),
    [
        (12, 4, [3, 3, 3, 3]),
        (10, 4, [3, 3, 3, 1]),
        (9, 4, [3, 3, 3, 0]),
        (5, 4, [2, 2, 1, 0]),
        (3, 5, [1, 1, 1, 0, 0]),
        (1, 3, [1, 0, 0]),
    ],
)
def test_groups_of_any_number_are_a_loop(rng, n, num_groups, sizes):
    assert [len(group) for group in groups_of(n, num_groups)] == sizes
    x = rows_like(rng, (n, 2, 3))
    params, stats = make(rng)
    y, new = ghost(
        x,
        params,
        stats,
        use_running_average=False,
        num_groups=num_groups,
        momentum=0.7,
        epsilon=0.01,
    )
    want = by_groups(x, params, stats, num_groups, epsilon=0.01)
    np.testing.assert_allclose(y, want, **CLOSE)
    want_mean, want_var = folded(stats, oracle.moments(x), 0.7)
    np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
    np.testing.assert_allclose(new.var, want_var, **CLOSE)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((7, 3), -1),
        ((7, 3, 4), 1),
        ((3, 7, 2), 0),
        ((7, 3, 2, 4), (-1, 1)),
        ((3, 7, 2, 4), (0, 3)),
        ((3, 4, 7), (0, 1)),
    ],
    ids=str,
)
def test_groups_are_cut_along_the_first_axis_without_features(rng, shape, axis):
    x = rows_like(rng, shape)
    axes = sorted(a % x.ndim for a in (axis if isinstance(axis, tuple) else (axis,)))
    params, stats = make(rng, tuple(shape[a] for a in axes))
    y, new = ghost(x, params, stats, use_running_average=False, num_groups=3, axis=axis)
    np.testing.assert_allclose(y, by_groups(x, params, stats, 3, axis), **CLOSE)
    want_mean, want_var = folded(stats, oracle.moments(x, axis=axis), 0.99)
    np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
    np.testing.assert_allclose(new.var, want_var, **CLOSE)


@pytest.mark.parametrize("shape", [(10, 1, 1), (10, 1, 3), (1, 4, 1), (10, 4, 3)])
def test_masks_of_any_shape_are_cut_along(rng, shape):
    x = rows_like(rng, (10, 4, 3))
    params, stats = make(rng)
    mask = rng.random(shape) < 0.6
    if shape[0] == 10:
        mask[3:6] = False  # the second group: nothing in it counts
        mask[0] = True
    else:
        mask[0, 0] = True
    x_nan = np.where(mask, x, np.nan).astype(np.float32)
    y, new = ghost(
        x_nan, params, stats, use_running_average=False, num_groups=4, mask=mask
    )
    want = by_groups(x, params, stats, 4, weights=mask)
    counts = np.broadcast_to(mask, x.shape)
    np.testing.assert_allclose(np.asarray(y)[counts], want[counts], **CLOSE)
    assert np.isfinite(y).all()
    want_mean, want_var = folded(stats, oracle.moments(x, mask), 0.99)
    np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
    np.testing.assert_allclose(new.var, want_var, **CLOSE)


def test_a_group_without_weight_is_normalized_by_the_running_statistics(rng):
    x = rows_like(rng, (8, 3))
    params, stats = make(rng)
    weights = rng.uniform(0.5, 2, (8, 1)).astype(np.float32)
    weights[2:4] = 0
    y, _ = ghost(
        x, params, stats, use_running_average=False, num_groups=4, weights=weights
    )
    want = by_groups(x, params, stats, 4, weights=weights)
    running = oracle.normalize(x, stats.mean, stats.var, params.scale, params.bias)
    np.testing.assert_array_equal(want[2:4], running[2:4])
    np.testing.assert_allclose(y, want, **CLOSE)


@pytest.mark.parametrize("num_groups", [7, 64])
def test_running_statistics_are_exact_at_a_mean_of_ten_thousand_deviations(
    rng, num_groups
):
    x = (rng.normal(size=(512, 2)) + 1e4).astype(np.float32)
    _, stats = jbn.init(2)
    _, new = ghost(
        x, None, stats, use_running_average=False, num_groups=num_groups, momentum=0.0
    )
    _, mean, var = oracle.moments(x)
    np.testing.assert_allclose(new.var, var, rtol=1e-5)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-7)


# PEERS 1.3, defect 16: chunks one after the other through one layer. Each decays what
# the one before has left, and the scatter between them is lost.
@pytest.mark.peers("torch")
def test_tabnet_and_composer_lose_the_scatter_between_groups(rng):
    torch = load_peer("torch")
    x = rng.normal(size=(4, 50, 1))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    x = (x + np.arange(4)[:, None, None]).reshape(200, 1).astype(np.float32)
    stats = BatchStats(jnp.zeros(1), jnp.ones(1))
    y, new = ghost(
        x, None, stats, use_running_average=False, num_groups=4, momentum=0.2
    )
    np.testing.assert_allclose(new.mean, [0.8 * 1.5], rtol=1e-5)
    np.testing.assert_allclose(new.var, [0.2 + 0.8 * (1 + 1.25)], rtol=1e-5)
    for momentum in (0.8, 0.8 / 4):  # tabnet, composer
        peer = torch.nn.BatchNorm1d(1, momentum=momentum, affine=False)
        parts = [peer(chunk) for chunk in torch.from_numpy(x).chunk(4)]
        np.testing.assert_allclose(y, torch.cat(parts).numpy(), rtol=1e-5, atol=1e-5)
        assert abs(peer.running_mean.item() - 0.8 * 1.5) > 0.1
        assert peer.running_var.item() < 1.1


def test_inference_has_no_groups(rng):
    x = rows_like(rng, (10, 3))
    params, stats = make(rng)
    evaluate = functools.partial(ghost, use_running_average=True)
    want, _ = batch_norm(x, params, stats, use_running_average=True)
    for num_groups in (1, 3, 10, 99):
        y, same = evaluate(x, params, stats, num_groups=num_groups)
        np.testing.assert_array_equal(y, want)
        jax.tree.map(np.testing.assert_array_equal, same, stats)
    for part in (slice(0, 1), slice(4, 10)):
        y, _ = evaluate(x[part], params, stats, num_groups=3)
        np.testing.assert_array_equal(y, want[part])
    # A lone row of features alone has no batch to cut.
    jbn.ghost_batch_norm(x[0], params, stats, use_running_average=True, num_groups=3)
    # Adapting: the whole batch, once.
    options: Any = {"use_running_average": True, "update_stats": True}
    got = ghost(x, params, stats, num_groups=3, **options)
    want = batch_norm(x, params, stats, **options)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    ("masked", "affine"), [(False, False), (False, True), (True, True)]
)
def test_one_group_is_batch_norm(rng, masked, affine):
    x = rows_like(rng, (6, 5, 3))
    params, stats = make(rng)
    options: Any = {
        "use_running_average": False,
        "momentum": 0.7,
        "epsilon": 0.01,
        "unbiased": True,
        "mask": rng.random((6, 5, 1)) < 0.6 if masked else None,
    }
    params = params if affine else None
    got = ghost(x, params, stats, num_groups=1, **options)
    want = batch_norm(x, params, stats, **options)
    # XLA may sum in another order: the rows of a group are an axis of their own.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    jax.tree.map(close, got, want)


def test_groups_of_one_row_that_is_too_little(rng):
    x = rows_like(rng, (6, 3))
    params, stats = make(rng)
    run = functools.partial(
        ghost, x, params, stats, use_running_average=False, num_groups=6
    )
    # By themselves, rows have no variance, and nothing is left of them.
    y, _ = run()
    np.testing.assert_allclose(y, np.broadcast_to(params.bias, (6, 3)), atol=1e-6)
    y, new = run(min_weight=1)
    want = oracle.normalize(x, stats.mean, stats.var, params.scale, params.bias)
    np.testing.assert_allclose(y, want, **CLOSE)
    want_mean, want_var = folded(stats, oracle.moments(x), 0.99)
    np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
    np.testing.assert_allclose(new.var, want_var, **CLOSE)


def test_each_group_is_drawn_to_the_running_statistics_by_its_own_weight(rng):
    x = rows_like(rng, (10, 3))
    params, stats = make(rng)
    tau = 2.5
    y, new = ghost(x, params, stats, use_running_average=False, num_groups=4, tau=tau)
    old_mean, old_var = np.float64(stats.mean), np.float64(stats.var)
    parts = []
    for group in groups_of(10, 4):
        rows = x[list(group)]
        _, mean, var = oracle.moments(rows)
        a = len(group) / (len(group) + tau)
        var = (1 - a) * old_var + a * var + a * (1 - a) * (mean - old_mean) ** 2
        mean = (1 - a) * old_mean + a * mean
        parts.append(oracle.normalize(rows, mean, var, params.scale, params.bias))
    np.testing.assert_allclose(y, np.concatenate(parts), **CLOSE)
    want_mean, want_var = folded(stats, oracle.moments(x), 0.99)
    np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
    np.testing.assert_allclose(new.var, want_var, **CLOSE)


def test_without_statistics_or_update(rng):
    x = rows_like(rng, (7, 3))
    params, stats = make(rng)
    want = by_groups(x, params, stats, 2)
    y, none = ghost(x, params, None, use_running_average=False, num_groups=2)
    assert none is None
    np.testing.assert_allclose(y, want, **CLOSE)
    y, same = jbn.ghost_batch_norm(
        x, params, stats, use_running_average=False, num_groups=2, update_stats=False
    )
    assert same is stats
    np.testing.assert_allclose(y, want, **CLOSE)


def test_no_gradient_passes_between_groups(rng, x64):
    x = rows_like(rng, (7, 3)).astype(np.float64)
    dy = rng.normal(size=x.shape)
    params, stats = jax.tree.map(lambda v: v.astype(jnp.float64), make(rng))

    def run(x, params):
        return jbn.ghost_batch_norm(
            x, params, stats, use_running_average=False, num_groups=3
        )[0]

    _, back = jax.vjp(jax.jit(run), jnp.asarray(x), params)
    dx, dparams = back(jnp.asarray(dy))
    dscale = dbias = 0
    for group in groups_of(7, 3):
        i = list(group)
        want, *rest = oracle.input_gradient(x[i], dy[i], np.asarray(params.scale))
        np.testing.assert_allclose(dx[np.asarray(i)], want, rtol=1e-9, atol=1e-11)
        dscale, dbias = dscale + rest[0], dbias + rest[1]
    np.testing.assert_allclose(dparams.scale, dscale, rtol=1e-10)
    np.testing.assert_allclose(dparams.bias, dbias, rtol=1e-10)
    # What another group is told, or holds, makes no difference at all.
    other = np.where(np.arange(7)[:, None] < 3, 1, 5)
    _, back = jax.vjp(jax.jit(run), jnp.asarray(x * other), params)
    same, _ = back(jnp.asarray(dy * other))
    np.testing.assert_array_equal(dx[:3], same[:3])


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )


@pytest.mark.devices
@pytest.mark.parametrize("masked", [False, True])
def test_each_device_cuts_its_own_share(rng, masked):
    x = rows_like(rng, (20, 3))
    params, stats = make(rng)
    mask = np.ones((20, 1), bool)
    if masked:  # one device with a half, one with nothing
        mask[7:15] = False
    step = functools.partial(
        jbn.ghost_batch_norm,
        use_running_average=False,
        num_groups=2,
        momentum=0.6,
        axis_name="d",
    )
    sharded = jax.jit(
        jax.shard_map(
            lambda x, mask: step(x, params, stats, mask=mask),
            mesh=mesh_of(4),
            in_specs=(P("d"), P("d")),
            out_specs=(P("d"), P()),
        )
    )
    y, new = sharded(x, mask)
    # Groups of 3 and 2 on each.
    want = np.concatenate(
        [
            by_groups(x[i : i + 5], params, stats, 2, weights=mask[i : i + 5])
            for i in range(0, 20, 5)
        ]
    )
    np.testing.assert_allclose(y, want, **CLOSE)
    want_mean, want_var = folded(stats, oracle.moments(x, mask), 0.6)
    np.testing.assert_allclose(new.mean, want_mean, **CLOSE)
    np.testing.assert_allclose(new.var, want_var, **CLOSE)


@pytest.mark.devices
@pytest.mark.parametrize(("update_stats", "messages"), [(True, 1), (False, 0)])
def test_only_the_running_statistics_need_communication(update_stats, messages):
    params, stats = jbn.init(3)

    def loss(x):
        y, new = jbn.ghost_batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            num_groups=2,
            update_stats=update_stats,
            axis_name="d",
        )
        return jnp.sin(y).sum(), new

    out = (P("d"), P())
    step = jax.shard_map(
        jax.grad(loss, has_aux=True), mesh=mesh_of(4), in_specs=P("d"), out_specs=out
    )
    text = jax.jit(step).lower(jnp.zeros((16, 3))).compile().as_text() or ""
    assert len(re.findall(r"= \S+ all-reduce(?:-start)?\(", text)) == messages


@pytest.mark.devices
def test_groups_of_devices_and_within_them(rng):
    x = rows_like(rng, (4, 6, 3))
    _, stats = make(rng)
    run = jax.pmap(
        lambda x: jbn.ghost_batch_norm(
            x,
            None,
            stats,
            use_running_average=False,
            num_groups=2,
            momentum=0.0,
            axis_name="d",
            axis_index_groups=[[0, 3], [1, 2]],
        ),
        "d",
        devices=jax.devices()[:4],
    )
    y, new = run(x)
    for i, others in enumerate(([0, 3], [1, 2], [1, 2], [0, 3])):
        want = by_groups(x[i], Params(), stats, 2)
        np.testing.assert_allclose(y[i], want, **CLOSE)
        _, mean, var = oracle.moments(x[others])
        np.testing.assert_allclose(new.mean[i], mean, rtol=1e-5)
        np.testing.assert_allclose(new.var[i], var, rtol=1e-5)


@pytest.mark.devices
def test_groups_over_devices(rng):
    """Two devices have a group together; the statistics are those of all four."""
    x, dy = rows_like(rng, (4, 6, 3)), rows_like(rng, (4, 6, 3))
    weights = rng.uniform(0, 2, (4, 6, 1)).astype(np.float32)
    weights[1] = 0  # a device without rows
    params, stats = make(rng)

    def run(x, weights, dy):
        y, back, new = jax.vjp(
            lambda x: jbn.ghost_batch_norm(
                x,
                params,
                stats,
                use_running_average=False,
                num_groups=2,
                devices_per_group=2,
                momentum=0.0,
                axis_name="d",
                weights=weights,
            ),
            x,
            has_aux=True,
        )
        return y, back(dy)[0], new

    y, dx, new = jax.pmap(run, "d", devices=jax.devices()[:4])(x, weights, dy)
    new = jax.tree.map(lambda v: v[0], new)
    for devices in (slice(0, 2), slice(2, 4)):
        for rows in (slice(0, 3), slice(3, 6)):
            part = np.concatenate(x[devices, rows])
            w = np.concatenate(weights[devices, rows])
            want, back = jax.vjp(
                lambda part, w=w: jbn.batch_norm(
                    part, params, stats, use_running_average=False, weights=w
                )[0],
                part,
            )
            shape = x[devices, rows].shape
            np.testing.assert_allclose(y[devices, rows], want.reshape(shape), **CLOSE)
            (want,) = back(np.concatenate(dy[devices, rows]))
            np.testing.assert_allclose(
                dx[devices, rows], want.reshape(shape), rtol=1e-4, atol=1e-4
            )
    _, mean, var = oracle.moments(x.reshape(24, 3), weights.reshape(24, 1))
    np.testing.assert_allclose(new.mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new.var, var, rtol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_devices_that_cannot_share_a_group():
    call = functools.partial(
        jbn.ghost_batch_norm, use_running_average=False, num_groups=1
    )
    x, state = np.ones((4, 2), np.float32), jbn.init(2)
    with pytest.raises(
        ValueError, match=r"`devices_per_group` splits .* axis_name=None"
    ):
        call(x, *state, devices_per_group=2)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        call(x, *state, devices_per_group=0)
    with pytest.raises(ValueError, match="must divide the number of devices, 4; got 3"):
        jax.vmap(
            lambda x: call(x, *state, devices_per_group=3, axis_name="d"),
            axis_name="d",
        )(x[:, None])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("x", "num_groups", "error", "message"),
    [
        ((4, 2), 0, ValueError, "`num_groups` must be at least 1; got 0"),
        ((4, 2), -3, ValueError, "at least 1; got -3"),
        ((4, 2), 2.0, TypeError, "`num_groups` must be an integer; got 2.0"),
        ((4, 2), None, TypeError, "must be an integer; got None"),
        ((2,), 1, ValueError, r"first axis that is not a feature axis, .* \(2,\), has"),
    ],
    ids=str,
)
def test_a_mistake_gets_one_clear_error(x, num_groups, error, message):
    with pytest.raises(error, match=message):
        jbn.ghost_batch_norm(
            np.ones(x, np.float32),
            *jbn.init(2),
            use_running_average=False,
            num_groups=num_groups,
        )


@pytest.mark.usefixtures("untyped")
def test_the_number_of_groups_may_be_numpys(rng):
    x = rows_like(rng, (6, 3))
    params, stats = make(rng)
    for num_groups in (np.int64(2), np.uint8(2)):
        y, _ = jbn.ghost_batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            num_groups=num_groups,  # pyright: ignore[reportArgumentType]
        )
        np.testing.assert_allclose(y, by_groups(x, params, stats, 2), **CLOSE)


@pytest.mark.parametrize(("rows", "groups"), [(12, 3), (11, 4), (3, 5)])
def test_interleaved_groups_take_turns(rng, rows, groups):
    x = (rng.normal(size=(rows, 3)) + 3 * np.arange(rows)[:, None]).astype("f")
    w = rng.uniform(0.5, 2, (rows, 1)).astype("f")
    params, stats = jbn.init(3)
    y, new = jbn.ghost_batch_norm(
        x,
        params,
        stats,
        use_running_average=False,
        num_groups=groups,
        interleaved=True,
        weights=w,
        momentum=0.0,
    )
    for k in range(min(groups, rows)):
        own = slice(k, None, groups)
        want = oracle.batch_norm(x[own], weights=w[own])
        np.testing.assert_allclose(y[own], want, rtol=1e-3, atol=1e-3)
    _, mean, var = oracle.moments(x, w)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-5)
    np.testing.assert_allclose(new.var, var, rtol=1e-5)
