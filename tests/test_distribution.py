"""Any split of the same rows over any devices is the same batch."""

import functools
import itertools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ways import mapped_by, needs_devices, numbers_of_devices

import jbn


pytestmark = pytest.mark.sweep


FEATURES = 3
ROWS = 6  # a device
SCALE, BIAS = np.array([0.5, 1.0, -2.0], "f"), np.array([0.1, 0.2, 0.3], "f")
RUNNING = jbn.BatchStats(jnp.full(FEATURES, 0.5), jnp.full(FEATURES, 2.0))


def mesh_of(devices: int):
    return jax.make_mesh(
        (devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )


def step(params, x, weights, ct, *, axis_name=None, groups=None, devices=1):
    """A training step: loss, outputs, statistics and all gradients, of the whole.

    As the trainer does: the mean of the loss is taken inside what is differentiated,
    and the mean of the gradients outside, which is right wherever it runs.
    """

    def pmean(tree):
        return tree if axis_name is None else jax.lax.pmean(tree, axis_name)

    def loss(params, x):
        y, stats = jbn.batch_norm(
            x,
            params,
            RUNNING,
            use_running_average=False,
            weights=weights[:, None],
            axis_name=axis_name,
            axis_index_groups=groups,
        )
        total = jnp.where(weights[:, None] > 0, jnp.sin(y) * ct, 0).sum() * devices
        return pmean(total), (y, stats)

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (total, (y, stats)), (dparams, dx) = grad(params, x)
    return total, stats, pmean(dparams), y, dx


@functools.cache
def executor(kind: str, devices: int):
    """`step` over so many devices, as a function of arrays of all rows."""
    split = functools.partial(step, axis_name="d", devices=devices)

    def stacked(run):
        def call(params, *arrays):
            arrays = [v.reshape(devices, -1, *v.shape[1:]) for v in arrays]
            *whole, y, dx = jax.tree.map(np.asarray, run(params, *arrays))
            return *whole, y.reshape(-1, FEATURES), dx.reshape(-1, FEATURES) / devices

        return call

    if kind == "vmap":
        return stacked(
            jax.jit(
                jax.vmap(
                    split, (None, 0, 0, 0), (None, None, None, 0, 0), axis_name="d"
                )
            )
        )
    if kind == "pmap":
        return stacked(
            jax.pmap(
                split,
                "d",
                in_axes=(None, 0, 0, 0),
                out_axes=(None, None, None, 0, 0),
                devices=jax.devices()[:devices],
            )
        )
    if kind.startswith("shard_map"):
        check = kind.endswith("checked")
        run = jax.jit(
            jax.shard_map(
                split,
                mesh=mesh_of(devices),
                in_specs=(P(), P("d"), P("d"), P("d")),
                out_specs=(P(), P(), P(), P("d"), P("d")),
                check_vma=check,
            )
        )

        def call(*args):
            *whole, dx = run(*args)
            return *whole, dx if check else dx / devices

        return call
    sharding = NamedSharding(mesh_of(devices), P("d"))
    run = jax.jit(step)
    return lambda params, *arrays: run(params, *jax.device_put(arrays, sharding))


def reference(x, weights, ct):
    """The same in float64, on one device, from the oracle and the chain rule."""
    w = np.broadcast_to(weights[:, None], x.shape)
    total, mean, var = oracle.moments(x, w)
    mean = np.where(total > 0, mean, RUNNING.mean)
    var = np.where(total > 0, var, RUNNING.var)
    y = oracle.normalize(x, mean, var, SCALE, BIAS)
    dy = np.where(w > 0, np.cos(y) * ct, 0)
    loss = np.where(w > 0, np.sin(y) * ct, 0).sum()
    if not (total > 0).all():  # nothing at all: normalized by constants
        rstd = 1 / np.sqrt(var + 1e-5)
        dx, dscale, dbias = (
            dy * SCALE * rstd,
            (dy * (x - mean) * rstd).sum(0),
            dy.sum(0),
        )
        return loss, RUNNING[:2], (dscale, dbias), y, dx
    dx, dscale, dbias = oracle.input_gradient(x, dy, SCALE.astype(float), w)
    stats = [
        0.99 * np.asarray(r) + 0.01 * b
        for r, b in zip(RUNNING[:2], (mean, var), strict=True)
    ]
    return loss, stats, (dscale, dbias), y, dx


def data(rng, devices, counts):
    """Rows for `devices` devices, of which `counts` are valid on each."""
    x, ct = rng.standard_normal((2, devices * ROWS, FEATURES)).astype("f")
    valid = np.concatenate([np.arange(ROWS) < c for c in counts])
    return 3 * x + 5, valid.astype("f"), ct


EXECUTORS = ["jit", "pmap", "vmap", "shard_map checked", "shard_map unchecked"]


@pytest.mark.parametrize(
    ("kind", "devices"),
    [
        needs_devices(kind, devices, when=kind != "vmap" and devices > 1)
        for kind, devices in itertools.product(EXECUTORS, (1, 2, 4, 8))
    ],
)
def test_uneven_shards_are_one_batch(kind, devices, rng):
    for counts in (
        [ROWS] * 8,
        [6, 4, 1, 0, 2, 0, 0, 5],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0] * 8,
    ):
        x, weights, ct = data(rng, devices, counts[:devices])
        weights *= rng.integers(1, 4, weights.shape)
        params = jbn.Params(jnp.asarray(SCALE), jnp.asarray(BIAS))
        got = executor(kind, devices)(params, x, weights, ct)
        want = reference(x, weights, ct)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            # One valid row has variance 0, so 1 / sqrt(epsilon) amplifies its noise.
            np.testing.assert_allclose(g, w, rtol=2e-5, atol=316 * 4e-7)


@pytest.mark.devices
@hypothesis.given(
    valid=st.lists(st.booleans(), min_size=4 * ROWS, max_size=4 * ROWS),
    seed=st.integers(0, 1000),
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=40)
def test_any_mask_over_any_shards_is_one_batch(valid, seed):
    rng = np.random.default_rng(seed)
    x, _, ct = data(rng, 4, [0] * 4)
    weights = np.asarray(valid, "f")
    params = jbn.Params(jnp.asarray(SCALE), jnp.asarray(BIAS))
    for kind in ("shard_map checked", "jit"):
        got = executor(kind, 4)(params, x, weights, ct)
        for g, w in zip(
            jax.tree.leaves(got),
            jax.tree.leaves(reference(x, weights, ct)),
            strict=True,
        ):
            # One valid row has variance 0, and its noise is amplified by 1/sqrt(eps).
            np.testing.assert_allclose(g, w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("devices", numbers_of_devices(1, 2, 4, 8))
@pytest.mark.parametrize("masked", [False, True])
def test_variance_is_exact_on_every_split(devices, mean, masked, rng):
    x = (rng.standard_normal((64, 8, 3)) + mean).astype("f")
    mask = rng.random((64, 8, 1)) > 0.5 if masked else np.ones((64, 8, 1), bool)
    mask[:16] &= np.arange(8)[None, :, None] == 0  # uneven
    _, _, want = oracle.moments(x, mask)
    mesh = mesh_of(devices)
    with_name = jax.shard_map(
        lambda x, m: jbn.moments(x, mask=m, axis_name="d").var,
        mesh=mesh,
        in_specs=P("d"),
        out_specs=P(),
    )
    sharded = jax.device_put((x, mask), NamedSharding(mesh, P("d")))
    for got in (
        jax.jit(with_name)(x, mask),
        jax.jit(lambda x, m: jbn.moments(x, mask=m).var)(*sharded),
    ):
        assert np.abs(got / want - 1).max() < 1e-5


@pytest.mark.parametrize("kind", mapped_by("vmap", "shard_map"))
def test_more_devices_than_one_all_reduce_has_slots_for(kind, monkeypatch, rng):
    """Beyond that the moments go around in two all-reduces, to the same result."""
    monkeypatch.setattr("jbn.summary._MOST_SLOTS", 4)
    x = (rng.standard_normal((64, 3)) + 1e4).astype("f")
    mask = rng.random((64, 1)) > 0.3
    mask[8:16] = False
    f = lambda x, m: jbn.moments(x, mask=m, axis_name="d")
    if kind == "vmap":
        run = jax.vmap(f, axis_name="d", out_axes=None)
        got = jax.jit(run)(x.reshape(8, 8, 3), mask.reshape(8, 8, 1))
    else:
        run = jax.shard_map(f, mesh=mesh_of(8), in_specs=P("d"), out_specs=P())
        got = jax.jit(run)(x, mask)
    weight, mean, var = oracle.moments(x, mask)
    np.testing.assert_array_equal(got.weight, weight)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-7)
    np.testing.assert_allclose(got.var, var, rtol=1e-5)


@pytest.mark.devices
def test_groups_of_different_sizes_without_weights(rng):
    x = rng.standard_normal((4, ROWS, FEATURES), np.float32) + 3
    groups = ((0,), (1, 2, 3))
    run = lambda x: jbn.moments(x, axis_name="d", axis_index_groups=groups)
    got = jax.pmap(run, "d", devices=jax.devices()[:4])(x)
    for group in groups:
        rows = x[list(group)].reshape(-1, FEATURES).astype(np.float64)
        for device in group:
            np.testing.assert_array_equal(got.weight[device], len(rows))
            np.testing.assert_allclose(got.mean[device], rows.mean(0), rtol=1e-6)
            np.testing.assert_allclose(got.var[device], rows.var(0), rtol=1e-5)


@pytest.mark.devices
@pytest.mark.parametrize(
    "groups", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((0, 1, 2, 3),)]
)
def test_groups_are_batches_of_their_own(groups, rng):
    x, weights, ct = data(rng, 4, [6, 3, 0, 2])
    params = jbn.Params(jnp.asarray(SCALE), jnp.asarray(BIAS))
    run = jax.pmap(
        functools.partial(step, axis_name="d", groups=groups, devices=4),
        "d",
        in_axes=(None, 0, 0, 0),
        devices=jax.devices()[:4],
    )
    arrays = [v.reshape(4, ROWS, *v.shape[1:]) for v in (x, weights, ct)]
    _, stats, _, y, dx = jax.tree.map(np.asarray, run(params, *arrays))
    for group in groups:
        of_group = [v[list(group)].reshape(-1, *v.shape[2:]) for v in arrays]
        _, want_stats, _, want_y, want_dx = reference(*of_group)
        for i, device in enumerate(group):
            rows = slice(i * ROWS, (i + 1) * ROWS)
            np.testing.assert_allclose(y[device], want_y[rows], rtol=1e-4, atol=2e-5)
            np.testing.assert_allclose(
                dx[device] / 4, want_dx[rows], rtol=1e-4, atol=2e-5
            )
            np.testing.assert_allclose(stats.mean[device], want_stats[0], rtol=1e-5)
            np.testing.assert_allclose(stats.var[device], want_stats[1], rtol=1e-5)


@pytest.mark.devices
def test_several_axis_names(rng):
    mesh = jax.make_mesh((2, 4), ("a", "b"), (AxisType.Auto,) * 2)
    x, weights, _ = data(rng, 8, [6, 4, 1, 0, 2, 0, 0, 5])
    got = jax.jit(
        jax.shard_map(
            lambda x, w: jbn.moments(x, weights=w[:, None], axis_name=("a", "b")),
            mesh=mesh,
            in_specs=P(("a", "b")),
            out_specs=P(),
        )
    )(x, weights)
    weight, mean, var = oracle.moments(x, weights[:, None])
    np.testing.assert_array_equal(got.weight, weight)
    np.testing.assert_allclose(got.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(got.var, var, rtol=1e-6)


@pytest.mark.devices
def test_features_may_be_sharded(rng):
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    x = rng.standard_normal((16, 8)).astype("f")
    sharded = jax.device_put(x, NamedSharding(mesh, P("data", "model")))
    params, running = jbn.init(8)
    f = jax.jit(functools.partial(jbn.batch_norm, use_running_average=False))
    y, _ = f(sharded, params, running)
    np.testing.assert_allclose(y, oracle.batch_norm(x), rtol=1e-5, atol=1e-5)
    # Moments of a feature never leave the devices that hold it.
    for shape in all_reduces(compiled_text(f, sharded, params, running)):
        assert shape[-1] == 8 // 4


def compiled_text(jitted, *args) -> str:
    text = jitted.lower(*args).compile().as_text()
    assert text
    return text


def all_reduces(hlo: str) -> list[tuple[int, ...]]:
    """The shapes of the operands of all all-reduces in compiled HLO."""
    shapes = []
    for line in hlo.splitlines():
        if match := re.match(r".* = (.*) all-reduce(?:-start)?\(", line):
            shapes += [
                tuple(int(n) for n in dims.split(",") if n)
                for dims in re.findall(r"f32\[([\d,]*)\]", match[1])
            ]
    return shapes


def other_collectives(hlo: str) -> list[str]:
    return re.findall(
        r" (all-gather|all-to-all|collective-permute|reduce-scatter)[\w-]*\(", hlo
    )


@pytest.mark.devices
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("kind", ["jit", "shard_map"])
def test_one_all_reduce_forward_and_one_backward(kind, devices, masked):
    """Of a few numbers a feature, whatever the batch; and no other collective."""
    mesh = mesh_of(devices)
    params, running = jbn.init(FEATURES)

    def forward(x, mask):
        return jbn.batch_norm(
            x,
            params,
            running,
            use_running_average=False,
            mask=mask if masked else None,
            axis_name="d" if kind == "shard_map" else None,
        )

    def backward(x, mask, dy):
        f = lambda x: forward(x, mask)[0]
        return jax.vjp(f, x)[1](dy)[0]

    def count(f, out_specs, *arrays):
        if kind == "shard_map":
            f = jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=out_specs)
        arrays = jax.device_put(arrays, NamedSharding(mesh, P("d")))
        hlo = compiled_text(jax.jit(f), *arrays)
        assert not other_collectives(hlo)
        return hlo.count(" all-reduce("), all_reduces(hlo)

    x = np.zeros((16 * devices, 7, FEATURES), "f")
    mask = np.ones((16 * devices, 7, 1), bool)
    number, shapes = count(forward, (P("d"), P()), x, mask)
    assert number == 1
    # Weight, two parts of the mean, and variance of each shard.
    assert sum(map(np.prod, shapes)) <= 4 * devices * FEATURES
    number, shapes = count(backward, P("d"), x, mask, x)
    assert number == 2  # one of them is the forward pass's
    assert sum(map(np.prod, shapes)) <= (4 * devices + 2) * FEATURES


@pytest.mark.devices
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "spec", "of_features"),
    [
        ((16, 6), P("d"), P()),
        ((16384, 6), P("d"), P()),
        ((32, 16, 16, 6), P("d"), P()),
        ((32, 16, 16, 6), P(None, "d"), P()),
        ((32, 16, 16, 6), P("d", None, None, "m"), P()),
        ((32, 16, 16, 6), P("d", None, None, "m"), P("m")),
        ((8, 64, 6), P("d", "m"), P()),
    ],
    ids=str,
)
def test_explicit_sharding(shape, spec, of_features, masked, rng):
    """Where the spread is part of an array's type, and stays what it is."""
    mesh = jax.make_mesh(
        (4, 2), ("d", "m"), (AxisType.Explicit,) * 2, devices=jax.devices()
    )
    x, dy = rng.standard_normal((2, *shape)).astype("f")
    mask = rng.random((*shape[:-1], 1)) < 0.7 if masked else None
    scale = rng.standard_normal(6).astype("f")

    def step(x, dy, params, running):
        def f(x, params):
            return jbn.batch_norm(
                x, params, running, use_running_average=False, mask=mask
            )

        y, vjp, running = jax.vjp(f, x, params, has_aux=True)
        evaluated, _ = jbn.batch_norm(x, params, running, use_running_average=True)
        return y, *vjp(dy), running, evaluated

    params, running = jbn.init(6)
    params = params._replace(scale=jnp.asarray(scale))
    want = jax.jit(step)(x, dy, params, running)
    with jax.set_mesh(mesh):
        x, dy = jax.device_put((x, dy), NamedSharding(mesh, spec))
        state = jax.device_put((params, running), NamedSharding(mesh, of_features))
        got = jax.jit(step)(x, dy, *state)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want
    )
    y, dx, dparams, running, evaluated = got
    for like_x in (y, dx, evaluated):
        assert like_x.sharding.is_equivalent_to(x.sharding, x.ndim)
    for of_feature in jax.tree.leaves((dparams, running)):
        want = NamedSharding(mesh, of_features)
        assert of_feature.sharding.is_equivalent_to(want, 1)


@pytest.mark.devices
def test_explicit_sharding_beside_a_mapped_axis(rng):
    mesh = jax.make_mesh((4, 2), ("d", "m"), (AxisType.Explicit,) * 2)
    x = rng.standard_normal((8, 16, 16, 6)).astype("f")
    params, running = jbn.init(6)

    def f(x, axis_name=None):
        return jbn.batch_norm(
            x, params, running, use_running_average=False, axis_name=axis_name
        )[0]

    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("d", "m")))
        mapped = functools.partial(f, axis_name="d")
        y = jax.jit(
            jax.shard_map(mapped, in_specs=P("d"), out_specs=P("d"), axis_names={"d"})
        )(sharded)
    assert y.sharding.is_equivalent_to(sharded.sharding, 4)
    np.testing.assert_allclose(y, f(jnp.asarray(x)), rtol=1e-5, atol=1e-5)
