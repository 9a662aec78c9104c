"""Soft domains, and the pooled fallback, next to formulas in float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from differentiation import once
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn import BatchStats, Params
from jbn.lowering import blocks
from jbn.ops import soft


ROWS, PLACES, FEATURES, DOMAINS = 12, 2, 3, 4
EPSILON = 1e-3
TRAIN: Any = {"use_running_average": False, "epsilon": EPSILON, "momentum": 0.7}


def problem(rng, dtype: Any = np.float64) -> Any:
    """Rows and shares, scale and bias of each domain, running statistics."""
    x = 2 * rng.normal(size=(ROWS, PLACES, FEATURES)) + 1
    shares = rng.uniform(0.1, 2, (ROWS, PLACES, DOMAINS))
    params = rng.normal(size=(2, DOMAINS, FEATURES))
    var = rng.uniform(0.5, 2, (DOMAINS, FEATURES))
    stats = BatchStats(*jnp.asarray([rng.normal(size=var.shape), var], dtype))
    return (
        x.astype(dtype),
        shares.astype(dtype),
        Params(*jnp.asarray(params, dtype)),
        stats,
    )


def formula(x, shares, params, mix, w: Any = 1.0):
    """Output and moments, in the plainest jax.numpy."""
    own = shares[..., None] * jnp.broadcast_to(w, x.shape[:2])[..., None, None]
    total = own.sum((0, 1))
    mean = (own * x[:, :, None]).sum((0, 1)) / total
    var = (own * (x[:, :, None] - mean[None, None]) ** 2).sum((0, 1)) / total
    return normalized(x, shares, params, mix, mean, var), mean, var


def normalized(x, shares, params, mix, mean, var):
    scale, bias, mean, var = (v[None, None] for v in (*params, mean, var))
    x, p = x[:, :, None], shares[..., None]
    if mix == "output":
        return (p * (scale * (x - mean) / jnp.sqrt(var + EPSILON) + bias)).sum(2)
    p = p / p.sum(2, keepdims=True)
    m = (p * mean).sum(2, keepdims=True)
    v = (p * (var + (mean - m) ** 2)).sum(2, keepdims=True)
    y = (x - m) / jnp.sqrt(v + EPSILON)
    return (y * (p * scale).sum(2, keepdims=True) + (p * bias).sum(2, keepdims=True))[
        :, :, 0
    ]


def ours(x, shares, params, mix, stats=None, w=None, **options):
    given: Any = {"num_domains": DOMAINS, **TRAIN, **options}
    if w is not None:
        given["weights"] = w[..., None]
    return jbn.domain_batch_norm(x, params, stats, domain=shares, mix=mix, **given)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mix", ["output", "stats"])
def test_values_statistics_and_gradients_are_those_of_the_formula(rng, mix):
    x, shares, params, stats = problem(rng)
    ct, w = jnp.asarray(rng.normal(size=x.shape)), jnp.asarray(rng.random(x.shape[:2]))
    y, new = jax.jit(ours, static_argnums=3)(x, shares, params, mix, stats, w)
    of_args = lambda x, s, p, w: formula(x, s, p, mix, w)
    want, mean, var = once(of_args, x, shares, params, w)
    np.testing.assert_allclose(y, want, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(new.mean, 0.7 * stats.mean + 0.3 * mean, rtol=1e-10)
    np.testing.assert_allclose(new.var, 0.7 * stats.var + 0.3 * var, rtol=1e-10)

    def along(f):
        loss = lambda *args: (jnp.sin(f(*args)) * ct).sum()
        grad = jax.grad(loss, (0, 1, 2, 3))
        return lambda *a: jax.jvp(lambda s: grad(a[0], s, *a[2:]), (a[1],), (a[1],))

    args = x, shares, params, w
    got = jax.jit(along(lambda x, s, p, w: ours(x, s, p, mix, w=w)[0]))(*args)
    wanted = once(along(lambda *args: of_args(*args)[0]), *args)
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(g, v, rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mix", ["output", "stats"])
@pytest.mark.parametrize("options", [{}, {"tau": 2.0}, {"min_weight": 6.0}], ids=str)
def test_one_hot_shares_are_ids(rng, mix, options):
    x, _, params, stats = problem(rng)
    ids = rng.integers(-1, DOMAINS, (ROWS, PLACES)).astype(np.int32)
    x[ids < 0] = np.nan
    shares = (ids[..., None] == np.arange(DOMAINS)) * 1.0
    w = jnp.asarray(rng.integers(0, 3, ids.shape) * 1.0)
    ct = np.where(ids < 0, 0, rng.random(ids.shape))[..., None]

    def run(domain):
        def loss(x, params):
            y, new = ours(x, domain, params, mix, stats, w, **options)
            return jnp.where(ids[..., None] < 0, 0, y * ct).sum(), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(x, params)

    got, want = jax.jit(run)(jnp.asarray(shares)), once(run, ids)
    there = ids >= 0
    np.testing.assert_allclose(got[1][0][there], want[1][0][there], 1e-9, 1e-9)
    for g, v in zip(
        jax.tree.leaves((got[0], got[1][1])),
        jax.tree.leaves((want[0], want[1][1])),
        strict=True,
    ):
        np.testing.assert_allclose(g, v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("distance", [1.0, 1e3])
def test_domains_far_apart_are_as_exact(rng, distance):
    # Up to a thousand standard deviations, and each row of one domain but for a little.
    rows, num = 4000, 3
    ids = rng.integers(0, num, rows)
    x = (rng.normal(size=(rows, 2)) + distance * ids[:, None]).astype("f")
    shares = np.where(ids[:, None] == np.arange(num), 1, 0).astype("f")
    shares[::7] = [[0.2, 0.0, 0.8]]
    _, stats = jbn.init((num, 2))
    train: Any = {"use_running_average": False, "domain": shares, "momentum": 0.0}
    y, new = jbn.domain_batch_norm(x, None, stats, mix="stats", **train)
    d, w = x.astype(float)[:, None], shares.astype(float)[..., None]
    mean = (w * d).sum(0) / w.sum(0)
    var = (w * (d - mean) ** 2).sum(0) / w.sum(0)
    np.testing.assert_allclose(new.mean, mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(new.var, var, rtol=1e-5)
    m = (w * mean).sum(1)
    v = (w * (var + (mean - m[:, None]) ** 2)).sum(1) + 1e-5
    # A distance of 1e3 leaves x itself so many digits.
    np.testing.assert_allclose(
        y, (d[:, 0] - m) / np.sqrt(v), atol=1e-6 * (3 + distance)
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mix", ["output", "stats"])
def test_blocks_channels_first_and_inference(rng, mix, monkeypatch):
    x, shares, params, stats = problem(rng)
    of_args = lambda x, s: formula(x, s, params, mix)[0]
    want = np.asarray(once(of_args, x, shares))
    monkeypatch.setattr(blocks, "_LOOP_ELEMENTS", 9)
    monkeypatch.setattr(soft, "_ROWS_PER_DOMAIN", 0)
    run = jax.jit(ours, static_argnames=("mix", "axis", "use_running_average"))
    got, _ = run(x.transpose(2, 0, 1), shares, params, mix, axis=0)
    np.testing.assert_allclose(got.transpose(1, 2, 0), want, rtol=1e-10, atol=1e-10)
    got, same = ours(x, shares, params, mix, stats, use_running_average=True)
    assert same is stats
    want = once(lambda x: normalized(x, shares, params, mix, *stats[:2]), x)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
    images = shares[:, :1]
    want = once(of_args, x, np.broadcast_to(images, shares.shape))
    for given in (images, images[:, 0]):  # one vector an image
        got, _ = run(x, given, params, mix)
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mix", ["output", "stats"])
def test_rows_that_no_number_of_blocks_divides(rng, mix, monkeypatch):
    monkeypatch.setattr(blocks, "_LOOP_ELEMENTS", 9)
    monkeypatch.setattr(soft, "_ROWS_PER_DOMAIN", 0)
    x, shares, params, _ = problem(rng)
    x, shares = x[:11, :1], shares[:11, :1]  # 4 to 7 blocks of at most 3 rows
    ct = rng.normal(size=x.shape)

    def gradient(norm):
        loss = lambda *args: (ct * norm(*args, mix)[0]).sum()
        return once(jax.grad(loss, (0, 1, 2)), x, shares, params)

    got, want = gradient(ours), gradient(formula)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9)


@pytest.mark.devices
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("how", ["shard_map", "jit"])
def test_devices(rng, how):
    x, shares, params, stats = problem(rng)
    x, shares = np.concatenate([x, x[:4] + 3]), np.concatenate([shares, shares[4:8]])
    want = ours(x, shares, params, "output", stats, tau=2.0)
    P = jax.sharding.PartitionSpec
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    f = lambda x, s, **o: ours(x, s, params, "output", stats, tau=2.0, **o)
    if how == "jit":
        sharding = jax.sharding.NamedSharding(mesh, P("d"))
        got = jax.jit(f)(*jax.device_put((x, shares), sharding))
    else:
        g = lambda x, s: f(x, s, axis_name="d")
        specs = P("d"), (P("d"), P())
        got = jax.shard_map(
            g, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False
        )(x, shares)
    for g, v in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, v, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("soft_ids", [False, True])
def test_a_pooled_tau_draws_to_all_domains_of_the_batch(rng, soft_ids):
    x, _, _, stats = problem(rng)
    ids = np.asarray([0] * 8 + [2] + [3] * 3, np.int32)  # 1 is absent, 2 is rare
    domain = (ids[:, None] == np.arange(DOMAINS)) * 1.0 if soft_ids else ids
    tau, given = 5.0, {**TRAIN, "tau": 5.0, "shrink_to": "pooled"}
    y, new = jbn.domain_batch_norm(x, None, stats, domain=jnp.asarray(domain), **given)
    pool, pool_var = x.mean((0, 1)), x.var((0, 1))
    for k in (0, 2, 3):
        own = x[ids == k]
        n = own.shape[0] * PLACES
        a = n / (n + tau)
        mean = (1 - a) * pool + a * own.mean((0, 1))
        var = (1 - a) * pool_var + a * own.var((0, 1))
        var += a * (1 - a) * (own.mean((0, 1)) - pool) ** 2
        np.testing.assert_allclose(
            y[ids == k], (own - mean) / np.sqrt(var + EPSILON), rtol=1e-10, atol=1e-10
        )
        # The running statistics take up the domain's own.
        want = 0.7 * stats.mean[k] + 0.3 * own.mean((0, 1))
        np.testing.assert_allclose(new.mean[k], want, rtol=1e-10)
    np.testing.assert_array_equal(new.mean[1], stats.mean[1])


@pytest.mark.parametrize("mix", ["output", "stats"])
def test_modules_are_the_function_and_a_gate_learns(rng, mix):
    x, shares, params, stats = problem(rng, np.float32)
    options: Any = {"mix": mix, "tau": 2.0, "shrink_to": "pooled", "epsilon": EPSILON}
    pooled = functools.partial(ours, mix=mix, tau=2.0, shrink_to="pooled")
    want, _ = jax.jit(pooled)(x, shares, params, stats=stats)
    layer = jbn.linen.DomainBatchNorm(DOMAINS, False, own_affine=True, **options)
    variables = {"params": params._asdict()}
    variables["batch_stats"] = {"mean": stats.mean, "var": stats.var}

    @jax.jit
    def linen(shares):
        return layer.apply(variables, x, domain=shares, mutable=["batch_stats"])[0]

    np.testing.assert_allclose(linen(shares), want, rtol=1e-5, atol=1e-5)
    grad = jax.jit(jax.grad(lambda s: (linen(s) ** 3).sum()))(shares)
    assert np.isfinite(grad).all()
    assert abs(np.asarray(grad)).max() > 0.1
    module = jbn.nnx.DomainBatchNorm(
        FEATURES, DOMAINS, own_affine=True, rngs=nnx.Rngs(0), **options
    )
    nnx.update(module, nnx.State(variables["params"] | variables["batch_stats"]))
    got = module(x, domain=shares)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("untyped")
def test_errors(rng):
    x, shares, params, stats = problem(rng, np.float32)
    cases: Any = (
        ({"mix": "both"}, "`mix` must be one of"),
        ({"shrink_to": "all"}, "`shrink_to` must be one of"),
        ({"domain": shares[..., :2]}, "`domain` .* must hold shares, one per domain"),
        ({"domain": -shares}, "`domain` .* must be non-negative"),
        ({"domain": shares[:5]}, "`domain` must have shares for each row"),
        ({"trim": 3.0}, "`trim` judges a row"),
    )
    for given, error in cases:
        with pytest.raises(ValueError, match=error):
            jbn.domain_batch_norm(
                x, params, stats, **{"domain": shares, **TRAIN, **given}
            )
