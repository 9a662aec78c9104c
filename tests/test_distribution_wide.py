"""Uneven and empty shards at large: meshes, groups, gradients of gradients, at random.

`test_distribution.py` has the plain cases. Here the oracle is the formula on all rows
at once, in float64, which JAX differentiates.
"""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jbn


pytestmark = pytest.mark.sweep


FEATURES = 3
ROWS = 6  # a device
EPSILON = 0.5  # of the size of the variance, so that no rounding error is amplified
KINDS = ("jit", "pmap", "vmap", "shard_map checked", "shard_map unchecked")
# How many of its rows each of eight devices has; with fewer devices these merge.
COUNTS = (
    (6, 4, 1, 0, 2, 0, 0, 5),
    (0, 0, 0, 0, 6, 4, 1, 0),
    (0, 0, 0, 0, 0, 0, 1, 0),
    (0, 0, 0, 0, 0, 0, 0, 0),
)


def mesh_of(*sizes):
    return jax.make_mesh(
        sizes,
        ("a", "b", "c")[: len(sizes)],
        (AxisType.Auto,) * len(sizes),
        devices=jax.devices()[: math.prod(sizes)],
    )


def data(rng, counts, rows=ROWS, dtype=float):
    """Rows of which so many on each device have weight, scale, bias and a cotangent."""
    total = len(counts) * rows
    x, ct = rng.standard_normal((2, total, FEATURES))
    valid = np.concatenate([np.arange(rows) < c for c in counts])
    weights = np.where(valid, rng.uniform(0.3, 2, total), 0)[:, None]
    scale, bias = rng.standard_normal((2, FEATURES))
    arrays = (2 * x + 3, weights, scale, bias, ct)
    return tuple(jnp.asarray(v, dtype) for v in arrays)


RUNNING_MEAN, RUNNING_VAR = np.array([0.5, 2.0, 1.0]), np.array([2.0, 0.5, 3.0])


def running(dtype=float):
    """The running statistics, in the default precision."""
    return jbn.BatchStats(
        jnp.asarray(RUNNING_MEAN, dtype), jnp.asarray(RUNNING_VAR, dtype)
    )


def formula(x, weights, scale, bias):
    """Output, mean and variance of rows that are all in one place."""
    total = weights.sum()
    some = total > 0
    per_weight = 1 / jnp.where(some, total, 1)
    mean = (weights * x).sum(0) * per_weight
    var = (weights * jnp.square(x - mean[None])).sum(0) * per_weight
    mean = jnp.where(some, mean, RUNNING_MEAN)
    var = jnp.where(some, var, RUNNING_VAR)
    xh = (x - mean[None]) / jnp.sqrt(var + EPSILON)[None]
    return xh * scale[None] + bias[None], mean, var


def layer(x, weights, scale, bias, **options):
    return jbn.batch_norm(
        x,
        jbn.Params(scale, bias),
        running(x.dtype),
        use_running_average=False,
        weights=weights,
        epsilon=EPSILON,
        momentum=0.0,
        **options,
    )


def loss_of(y, weights, ct):
    return jnp.where(weights > 0, jnp.sin(y) * ct, 0).sum()


def want_loss(x, weights, scale, bias, ct):
    return loss_of(formula(x, weights, scale, bias)[0], weights, ct)


def derivatives(loss):
    """Value, gradients, and Hessian-vector products in both ways of getting them."""

    def all_of(args, along, ct):
        f = lambda *args: loss(*args, ct)
        grad = jax.grad(f, range(4))
        forward = jax.jvp(grad, args, along)[1]
        backward = jax.grad(
            lambda *args: sum(
                (g * v).sum() for g, v in zip(grad(*args), along, strict=True)
            ),
            range(4),
        )(*args)
        return f(*args), grad(*args), forward, backward

    return all_of


def assert_close(got, want, rtol=1e-10, atol=1e-10):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=rtol, atol=atol)


@functools.cache
def wanted():
    return jax.jit(derivatives(want_loss))


def spread_loss(kind, sizes, axis_name):
    """The loss of rows over a mesh, to be differentiated from outside.

    The total is one number, the same on all devices, and so there is nothing to be
    divided or averaged: it is JAX that has to bring the gradients home.
    """

    def local(x, weights, scale, bias, ct):
        y, _ = layer(x, weights, scale, bias, axis_name=axis_name)
        return jax.lax.psum(loss_of(y, weights, ct), axis_name)

    if kind == "jit":

        def whole(x, weights, scale, bias, ct):
            return loss_of(layer(x, weights, scale, bias)[0], weights, ct)

        return whole
    if kind.startswith("shard_map"):
        rows = P(axis_name)
        return jax.shard_map(
            local,
            mesh=mesh_of(*sizes),
            in_specs=(rows, rows, P(), P(), rows),
            out_specs=P(),
            check_vma=kind.endswith(" checked"),
        )
    in_axes = (0, 0, None, None, 0)
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    run = local
    for i, (name, size) in enumerate(reversed(list(zip(names, sizes, strict=True)))):
        outermost = i == len(sizes) - 1
        if kind == "pmap" and outermost:
            devices = jax.devices()[:size]
            run = jax.pmap(run, name, in_axes=in_axes, out_axes=None, devices=devices)
        else:
            run = jax.vmap(run, in_axes, None, axis_name=name)

    def call(x, weights, scale, bias, ct):
        x, weights, ct = (v.reshape(*sizes, -1, v.shape[-1]) for v in (x, weights, ct))
        return run(x, weights, scale, bias, ct)

    return call


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        pytest.param(
            kind,
            sizes,
            marks=[
                *([] if sizes in ((8,), (2, 4)) else [pytest.mark.slow]),
                *([] if kind == "vmap" else [pytest.mark.devices]),
            ],
        )
        for kind, sizes in itertools.product(KINDS, ((8,), (4,), (2,), (2, 4), (4, 2)))
        if len(sizes) == 1 or kind not in ("jit", "pmap")
    ],
)
@pytest.mark.usefixtures("x64")
def test_derivatives_from_outside(kind, sizes, rng):
    """By x, weights, scale and bias, once and twice, over one mapped axis or two.

    (Not by `pmap` of `vmap`: JAX 0.10.1 then loses the inner axis in what is remade for
    the backward pass, also of a plain `axis_index`.)
    """
    axis_name = ("a", "b")[: len(sizes)] if len(sizes) > 1 else "a"
    derive = jax.jit(derivatives(spread_loss(kind, sizes, axis_name)))
    for counts in COUNTS:
        *args, ct = data(rng, counts)
        along = tuple(data(rng, counts)[:4])
        want = wanted()(tuple(args), along, ct)
        if kind == "jit":
            sharding = NamedSharding(mesh_of(*sizes), P("a"))
            args[0], args[1], ct = jax.device_put((args[0], args[1], ct), sharding)
        assert_close(derive(tuple(args), along, ct), want)


def own_step(axis_name, size, groups=None):
    """What each device computes of its own rows, with derivatives inside of the map."""
    mean = functools.partial(jax.lax.pmean, axis_name=axis_name)

    def local(x, weights, scale, bias, ct, along):
        def loss(x, weights, scale, bias):
            y, stats = layer(
                x, weights, scale, bias, axis_name=axis_name, axis_index_groups=groups
            )
            # The mean over devices, times their number, as in the trainer.
            return mean(size * loss_of(y, weights, ct)), (y, stats[:2])

        grad = jax.grad(loss, range(4), has_aux=True)
        (grads, (y, stats)), (hvp, _) = jax.jvp(grad, (x, weights, scale, bias), along)
        m = jbn.moments(
            x, weights=weights, axis_name=axis_name, axis_index_groups=groups
        )
        return (y, grads[:2], hvp[:2]), (stats, m), mean((grads[2:], hvp[2:]))

    return local


@jax.jit
def want_step(x, weights, scale, bias, ct, along):
    """The same of rows that are all in one place."""
    args = x, weights, scale, bias
    grad = jax.grad(want_loss, range(4))
    grads, hvp = jax.jvp(lambda *args: grad(*args, ct), args, along)
    y, mean, var = formula(*args)
    some = weights.sum() > 0
    m = weights.sum(), jnp.where(some, mean, 0), jnp.where(some, var, 0)
    return (
        (y, grads[:2], hvp[:2]),
        ((mean, var), (jnp.broadcast_to(m[0], mean.shape), *m[1:])),
        (grads[2:], hvp[2:]),
    )


GROUPS = [
    ((0, 1), (2, 3)),
    ((0, 3), (2, 1)),
    ((0, 1, 2, 3),),
    ((2,), (0,), (3,), (1,)),
]


@functools.cache
def on_each(kind, groups):
    """`own_step` on four devices, with all results device by device."""
    local = own_step("a", 4, groups)
    if kind == "pmap":
        in_axes = (0, 0, None, None, 0, (0, 0, None, None))
        return jax.pmap(local, "a", in_axes=in_axes, devices=jax.devices()[:4])

    def one(x, weights, scale, bias, ct, along):
        mine = lambda tree: jax.tree.map(lambda v: v[0], tree)
        x, weights, ct, of_rows = mine((x, weights, ct, along[:2]))
        done = local(x, weights, scale, bias, ct, (*of_rows, *along[2:]))
        return jax.tree.map(lambda v: v[None], done)

    split = P("a")
    in_specs = (split, split, P(), P(), split, (split, split, P(), P()))
    mapped = jax.shard_map(
        one, mesh=mesh_of(4), in_specs=in_specs, out_specs=split, check_vma=False
    )
    return jax.jit(mapped)


@pytest.mark.devices
@pytest.mark.parametrize("kind", ["pmap", "shard_map"])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.usefixtures("x64")
def test_groups_of_devices(groups, kind, rng):
    """Each is a batch of its own, also one that is empty, or of one device."""
    by_device = lambda v: v.reshape(4, ROWS, -1)
    for counts in ((6, 2, 0, 1), (0, 3, 0, 0), (0, 0, 0, 0)):
        x, weights, scale, bias, ct = data(rng, counts)
        dx, dweights, *along = data(rng, counts)[:4]
        split = [by_device(v) for v in (x, weights, ct, dx, dweights)]
        of_rows, stats, of_all = on_each(kind, groups)(
            *split[:2], scale, bias, split[2], (*split[3:], *along)
        )
        # The derivatives of a mean over four.
        of_rows = (of_rows[0], *jax.tree.map(lambda v: v / 4, of_rows[1:]))
        totals = []
        for group in map(np.asarray, groups):
            mine = lambda v: v[group].reshape(-1, v.shape[-1])  # noqa: B023
            x_, weights_, ct_, *along_ = map(mine, split)
            want_rows, want_stats, want_all = want_step(
                x_, weights_, scale, bias, ct_, (*along_, *along)
            )
            assert_close(jax.tree.map(mine, of_rows), want_rows)
            for device in group:
                assert_close([v[device] for v in jax.tree.leaves(stats)], want_stats)
            totals.append(jax.tree.leaves(want_all))
        for device in range(4):
            got = [v[device] for v in jax.tree.leaves(of_all)]
            assert_close(got, [sum(parts) for parts in zip(*totals, strict=True)])


ALL = slice(None)


@pytest.mark.devices
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize(
    ("axis_name", "batches"),
    [
        ("a", [(ALL, j) for j in range(4)]),
        ("b", [(i, ALL) for i in range(2)]),
        (("b", "a"), [(ALL, ALL)]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("x64")
def test_some_axes_of_a_mesh(axis_name, batches, check_vma, rng):
    """Statistics over one of two axes are those of a column or a row of the mesh."""
    rest = {"a": ("b",), "b": ("a",)}.get(axis_name, ())

    def local(x, weights, scale, bias, ct):
        x, weights, ct = (v[0, 0] for v in (x, weights, ct))
        y, stats = layer(x, weights, scale, bias, axis_name=axis_name)
        total = jax.lax.psum(loss_of(y, weights, ct), ("a", "b"))
        return total, (y[None, None], [v[None] if rest else v for v in stats[:2]])

    split = P("a", "b")
    loss = jax.shard_map(
        local,
        mesh=mesh_of(2, 4),
        in_specs=(split, split, P(), P(), split),
        out_specs=(P(), (split, P(*rest))),
        check_vma=check_vma,
    )
    grad = jax.jit(jax.grad(loss, range(4), has_aux=True))
    for counts in COUNTS:
        x, weights, scale, bias, ct = data(rng, counts)
        x, weights, ct = (v.reshape(2, 4, ROWS, -1) for v in (x, weights, ct))
        (dx, dweights, dscale, dbias), (y, stats) = grad(x, weights, scale, bias, ct)
        totals = []
        for k, index in enumerate(batches):
            x_, weights_, ct_, *got = (
                v[index].reshape(-1, v.shape[-1])
                for v in (x, weights, ct, y, dx, dweights)
            )
            args = x_, weights_, scale, bias
            (want_y, want_grads, _), (want_stats, _), (want_all, _) = want_step(
                *args, ct_, args
            )
            assert_close(got, (want_y, want_grads))
            assert_close([v[k] if rest else v for v in stats], want_stats)
            totals.append(want_all)
        assert_close((dscale, dbias), [sum(v) for v in zip(*totals, strict=True)])


@functools.cache
def over(kind, devices):
    """`own_step` over so many devices, as a function of all rows."""
    local = own_step("a", devices)
    stack = lambda v: v.reshape(devices, -1, v.shape[-1])
    along_axes = (0, 0, None, None)
    in_axes, out_axes = (0, 0, None, None, 0, along_axes), (0, None, None)
    if kind == "vmap":
        run = jax.jit(jax.vmap(local, in_axes, out_axes, axis_name="a"))
    elif kind == "pmap":
        run = jax.pmap(
            local,
            "a",
            in_axes=in_axes,
            out_axes=out_axes,
            devices=jax.devices()[:devices],
        )
    else:
        rows = P("a")
        run = jax.jit(
            jax.shard_map(
                local,
                mesh=mesh_of(devices),
                in_specs=(rows, rows, P(), P(), rows, (rows, rows, P(), P())),
                out_specs=(rows, P(), P()),
                check_vma=kind == "shard_map checked",
            )
        )

    def call(x, weights, scale, bias, ct, along):
        arrays = x, weights, ct, *along[:2]
        if kind in ("vmap", "pmap"):
            arrays = [stack(v) for v in arrays]
        done = run(*arrays[:2], scale, bias, arrays[2], (*arrays[3:], *along[2:]))
        of_rows, stats, of_all = jax.tree.map(np.asarray, done)
        if kind in ("vmap", "pmap"):
            of_rows = jax.tree.map(lambda v: v.reshape(-1, v.shape[-1]), of_rows)
        y, *grads = of_rows
        if kind != "shard_map checked":
            grads = jax.tree.map(lambda v: v / devices, grads)
        return (y, *grads), stats, of_all

    if kind != "jit":
        return call

    @jax.jit
    def whole(x, weights, scale, bias, ct, along):
        def loss(x, weights, scale, bias):
            y, stats = layer(x, weights, scale, bias)
            return loss_of(y, weights, ct), (y, stats[:2])

        args = x, weights, scale, bias
        grad = jax.grad(loss, range(4), has_aux=True)
        (grads, (y, stats)), (hvp, _) = jax.jvp(grad, args, along)
        m = jbn.moments(x, weights=weights)
        return (y, grads[:2], hvp[:2]), (stats, m), (grads[2:], hvp[2:])

    def sharded(x, weights, scale, bias, ct, along):
        sharding = NamedSharding(mesh_of(devices), P("a"))
        x, weights, ct, *of_rows = jax.device_put(
            (x, weights, ct, *along[:2]), sharding
        )
        return whole(x, weights, scale, bias, ct, (*of_rows, *along[2:]))

    return sharded


drawn = hypothesis.given(
    counts=st.lists(st.integers(0, ROWS), min_size=8, max_size=8),
    where=st.sampled_from(
        [
            ("jit", 1),
            ("jit", 8),
            ("vmap", 4),
            ("pmap", 2),
            ("pmap", 8),
            ("shard_map checked", 1),
            ("shard_map checked", 8),
            ("shard_map unchecked", 4),
        ]
    ),
    seed=st.integers(0, 2**16),
)
settings = functools.partial(hypothesis.settings, deadline=None, derandomize=True)


def check_in_float64(counts, where, seed):
    rng = np.random.default_rng(seed)
    kind, devices = where
    with jax.enable_x64(True):
        x, weights, scale, bias, ct = data(rng, counts)
        args = x, weights, scale, bias, ct, tuple(data(rng, counts)[:4])
        assert_close(over(kind, devices)(*args), want_step(*args))


@pytest.mark.devices
@drawn
@settings(max_examples=40)
def test_any_counts_in_float64(counts, where, seed):
    check_in_float64(counts, where, seed)


@pytest.mark.devices
@pytest.mark.slow
@hypothesis.given(
    counts=st.lists(st.integers(0, ROWS), min_size=8, max_size=8),
    where=st.tuples(st.sampled_from(KINDS), st.sampled_from([1, 2, 4, 8])),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=300)
def test_any_counts_anywhere(counts, where, seed):
    check_in_float64(counts, where, seed)


@pytest.mark.devices
@drawn
@settings(max_examples=40)
def test_any_counts_in_float32(counts, where, seed):
    """Outputs, statistics and first derivatives, to float32's rounding."""
    rng = np.random.default_rng(seed)
    kind, devices = where
    x, weights, scale, bias, ct = data(rng, counts)
    args = x, weights, scale, bias, ct, tuple(data(rng, counts)[:4])
    done = over(kind, devices)(*args)
    (y, grads, _), ((mean, var), m), (shared, _) = done

    x, weights, scale, bias, ct = (np.asarray(v, np.float64) for v in args[:5])
    total, want_mean, want_var = oracle.moments(x, np.broadcast_to(weights, x.shape))
    # Sums of 48 numbers of some 10: 48 half units of 1e-7 in the worst case.
    close = functools.partial(assert_close, rtol=1e-5, atol=2e-5)
    close(m, (total, want_mean, want_var))
    np.testing.assert_allclose(m.var, want_var, rtol=1e-5, atol=1e-10)
    if not total.any():
        want_mean, want_var = RUNNING_MEAN, RUNNING_VAR
    close((mean, var), (want_mean, want_var))
    want = oracle.normalize(x, want_mean, want_var, scale, bias, epsilon=EPSILON)
    close(y, want)
    dy = np.where(weights > 0, np.cos(want) * ct, 0)
    if total.any():
        dx, *want_shared = oracle.input_gradient(
            x, dy, scale, np.broadcast_to(weights, x.shape), epsilon=EPSILON
        )
        close((grads[0], shared), (dx, want_shared))
    else:
        close(grads[0], 0 * x)
        close(shared, (0 * scale, 0 * bias))
