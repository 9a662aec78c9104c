"""Domain-specific batch norm: one batch norm a domain, and what it is used for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from peers import load_peer

import jbn
from jbn import BatchStats, Params


pytestmark = pytest.mark.sweep


STATIC = ("use_running_average", "update_stats", "axis", "num_domains", "unbiased")
domain_norm = jax.jit(jbn.domain_batch_norm, static_argnames=STATIC)
train = functools.partial(domain_norm, use_running_average=False)
evaluate = functools.partial(domain_norm, use_running_average=True)
# In a domain of two rows the mean can be 100 deviations, and is rounded to float32.
CLOSE: Any = {"rtol": 1e-5, "atol": 1.5e-5}
TIGHT: Any = {"rtol": 1e-10, "atol": 1e-12}  # float64


def make(rng, num_domains=3, features: Any = (3,), own=False):
    """Parameters and statistics that all differ from the defaults and each other."""
    full = (num_domains, *features)
    stats = BatchStats(rng.normal(size=full), rng.uniform(0.5, 3, full))
    shape = full if own else features
    params = Params(rng.uniform(0.5, 2, shape), rng.normal(size=shape))
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), (params, stats))


def wide(tree) -> Any:
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), tree)


def by_domains(x, ids, params, stats, axis: Any = -1, epsilon=1e-5, momentum=0.99):
    """Output and new statistics, one domain after the other.

    `ids` have the rank of `x`, or broadcast to it.
    """
    rank = len(axis) if isinstance(axis, tuple) else 1
    ids = np.broadcast_to(ids, x.shape)
    y = np.full(x.shape, np.nan)
    mean, var = np.array(stats.mean, float), np.array(stats.var, float)
    for g in range(len(mean)):
        weight, *seen = oracle.moments(x, ids == g, axis)
        some = weight > 0
        by = [
            np.where(some, v, old[g]) for v, old in zip(seen, (mean, var), strict=True)
        ]
        scale, bias = (
            None if p is None else p[g] if p.ndim > rank else p for p in params
        )
        rows = oracle.normalize(x, by[0], by[1], scale, bias, axis, epsilon)
        y = np.where(ids == g, rows, y)
        for v, new in zip((mean, var), seen, strict=True):
            v[g] = np.where(some, momentum * v[g] + (1 - momentum) * new, v[g])
    return y, mean, var


def assert_all(got, want, **tolerance):
    y, stats = got
    for a, e in zip((y, stats.mean, stats.var), want, strict=True):
        np.testing.assert_allclose(a, e, **(tolerance or CLOSE))


@pytest.mark.parametrize(
    ("shape", "axis", "of_ids", "reshaped", "known"),
    [
        ((12, 3), -1, (12,), (12, 1), True),
        ((3, 12), 0, (12,), (1, 12), False),
        ((6, 4, 3), -1, (6,), (6, 1, 1), False),
        ((6, 4, 3), -1, (6, 4), (6, 4, 1), True),
        ((6, 4, 3), -1, (6, 4, 1), (6, 4, 1), False),
        ((6, 4, 3), -1, (1, 4, 1), (1, 4, 1), True),
        ((6, 3, 4), 1, (6,), (6, 1, 1), True),
        ((6, 3, 4), 1, (6, 4), (6, 1, 4), False),
        ((6, 3, 4), 1, (6, 1, 4), (6, 1, 4), False),
        ((5, 3, 4, 2), (1, 3), (5, 4), (5, 1, 4, 1), False),
        ((6, 4, 3), -1, (), (1, 1, 1), True),
        ((6, 4, 3), -1, (), (1, 1, 1), False),
    ],
    ids=str,
)
def test_ids_of_rows_of_images_or_of_all(rng, shape, axis, of_ids, reshaped, known):
    axes = axis if isinstance(axis, tuple) else (axis,)
    x = rng.normal(size=shape).astype(np.float32)
    ids = rng.integers(0, 3, of_ids).astype(np.int32)
    x += 3 * ids.reshape(reshaped)
    params, stats = make(rng, 3, tuple(shape[a] for a in axes), own=True)
    options: Any = {"axis": axis, "epsilon": 0.01, "momentum": 0.7}
    call = functools.partial(
        jbn.domain_batch_norm, use_running_average=False, **options
    )
    if known:
        run = jax.jit(functools.partial(call, domain=ids))
    else:
        run = functools.partial(jax.jit(call), domain=ids)
    want = by_domains(x, ids.reshape(reshaped), params, stats, **options)
    assert_all(run(x, params, stats), want)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint32, np.int64])
def test_ids_of_any_integers(rng, dtype):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    ids = np.arange(8) % 3
    params, stats = make(rng)
    want = by_domains(x, ids[:, None], params, stats)
    run = functools.partial(
        jbn.domain_batch_norm, x, params, stats, use_running_average=False
    )
    assert_all(run(domain=ids.astype(dtype)), want)


@pytest.mark.parametrize("own", [False, True])
def test_gradients_are_those_of_one_batch_norm_for_each(rng, x64, own):
    x, dy = rng.normal(size=(2, 11, 3))
    ids = np.asarray([0, 2, 2, 0, 3, 0, 2, 0, 3, 0, 2])  # 1 is absent
    params, stats = wide(make(rng, 4, own=own))

    def run(x, params):
        return train(x, params, stats, domain=ids, epsilon=0.1)[0]

    y, back = jax.vjp(run, jnp.asarray(x), params)
    np.testing.assert_allclose(
        y, by_domains(x, ids[:, None], params, stats, epsilon=0.1)[0], **TIGHT
    )
    dx, dparams = back(jnp.asarray(dy))
    dscale, dbias = np.zeros((2, 4, 3))
    for g in (0, 2, 3):
        rows = ids == g
        scale = np.asarray(params.scale[g] if own else params.scale)
        want, dscale[g], dbias[g] = oracle.input_gradient(
            x[rows], dy[rows], scale, epsilon=0.1
        )
        np.testing.assert_allclose(np.asarray(dx)[rows], want, **TIGHT)
    if not own:
        dscale, dbias = dscale.sum(0), dbias.sum(0)
    np.testing.assert_allclose(dparams.scale, dscale, **TIGHT)
    np.testing.assert_allclose(dparams.bias, dbias, **TIGHT)


def test_a_domain_that_is_absent_keeps_its_statistics_bit_for_bit(rng):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    params, stats = make(rng, 4)
    ids = np.asarray([1, 3] * 4)
    _, new = train(x, params, stats, domain=ids)
    for old, now in zip(stats[:2], new[:2], strict=True):
        for g in (0, 2):
            np.testing.assert_array_equal(now[g], old[g])
        for g in (1, 3):
            assert (now[g] != old[g]).all()
    # Neither does what they hold make a difference to the others.
    other = stats._replace(mean=stats.mean.at[0].set(1e30))
    y, _ = train(x, params, stats, domain=ids)
    same, _ = train(x, params, other, domain=ids)
    np.testing.assert_array_equal(same, y)


@pytest.mark.parametrize("update_stats", [False, True])
def test_inference_takes_the_statistics_of_the_rows_own_domain(rng, update_stats):
    x = rng.normal(size=(8, 3)).astype(np.float32)
    ids = np.asarray([0, 1, 2, 2, 1, 0, 0, 1])
    params, stats = make(rng, own=True)
    y, new = evaluate(x, params, stats, domain=ids, update_stats=update_stats)
    for i, g in enumerate(ids):
        by = (v[g] for v in (stats.mean, stats.var, params.scale, params.bias))
        want = oracle.normalize(x[i : i + 1], *by)
        np.testing.assert_allclose(y[i : i + 1], want, **CLOSE)
    _, mean, var = by_domains(x, ids[:, None], params, stats)
    want = (mean, var) if update_stats else stats
    np.testing.assert_allclose(new.mean, want[0], **CLOSE)
    np.testing.assert_allclose(new.var, want[1], **CLOSE)


def test_domains_that_are_far_apart_and_cold(rng):
    center = np.asarray([0.0, 1e4, -1e4])
    ids = np.arange(600) % 3
    x = (rng.normal(size=(600, 2)) + center[ids][:, None]).astype(np.float32)
    _, stats = jbn.init((3, 2))
    _, new = train(x, None, stats, domain=ids, momentum=0.0)
    for g in range(3):
        _, mean, var = oracle.moments(x[ids == g])
        np.testing.assert_allclose(new.var[g], var, rtol=1e-5)
        np.testing.assert_allclose(new.mean[g], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("none", "poison", "known"),
    [
        ((-1, -7, -1), np.nan, True),
        ((-1, -3, -7), 1e30, True),
        # Those that are known to be too large are errors: see `test_ids.py`.
        ((3, 3, 99), np.inf, False),
        ((-1, 3, 7), 1e30, False),
        ((-1, 3, 7), -np.inf, False),
    ],
    ids=str,
)
def test_rows_of_no_domain_are_padding(rng, none, poison, known):
    x = rng.normal(size=(9, 3)).astype(np.float32)
    ids = np.asarray([0, none[0], 1, 2, none[1], 0, 1, 2, none[2]])
    outside = (ids < 0) | (ids > 2)
    params, stats = make(rng, own=True)
    want = by_domains(x[~outside], ids[~outside][:, None], params, stats)
    poisoned = np.where(outside[:, None], np.float32(poison), x)
    dy = np.where(outside[:, None], 0, rng.normal(size=x.shape)).astype(np.float32)

    def run(x, ids=ids):
        y, back, new = jax.vjp(
            lambda x, params: jbn.domain_batch_norm(
                x, params, stats, use_running_average=False, domain=ids
            ),
            x,
            params,
            has_aux=True,
        )
        return y, new, back(dy)

    call = jax.jit(run) if known else jax.jit(lambda x: jax.jit(run)(x, ids))
    y, new, (dx, dparams) = jax.tree.map(np.asarray, call(poisoned))
    assert_all((y[~outside], new), want)
    for g in range(3):
        rows = ids == g
        scale = np.asarray(params.scale[g])
        want, *rest = oracle.input_gradient(x[rows], dy[rows], scale)
        # Two rows have a gradient that is a difference of two larger numbers.
        np.testing.assert_allclose(dx[rows], want, rtol=1e-4, atol=1e-4)
        for got, want in zip(dparams, rest, strict=True):
            np.testing.assert_allclose(got[g], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(dx[outside], np.zeros((3, 3)))
    if not np.isfinite(poison):
        bias = np.broadcast_to(params.bias[2], (3, 3))
        np.testing.assert_array_equal(y[outside], bias)
    # They are normalized by the last domain.
    y, _, _ = call(x)
    _, mean, var = oracle.moments(x[ids == 2])
    last = oracle.normalize(x, mean, var, params.scale[2], params.bias[2])
    np.testing.assert_allclose(np.asarray(y)[outside], last[outside], **CLOSE)
    infer = lambda ids: evaluate(x, params, stats, domain=ids)
    y, _ = infer(ids) if known else jax.jit(infer)(ids)
    by = (v[2] for v in (stats.mean, stats.var, params.scale, params.bias))
    last = oracle.normalize(x, *by)
    np.testing.assert_allclose(np.asarray(y)[outside], last[outside], **CLOSE)


def test_nothing_of_any_domain(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    params, stats = make(rng)
    y, new = train(x, params, stats, domain=np.full(4, -1))
    jax.tree.map(np.testing.assert_array_equal, new, stats)
    want = oracle.normalize(x, stats.mean[2], stats.var[2], params.scale, params.bias)
    np.testing.assert_allclose(y, want, **CLOSE)


def test_small_domains_are_drawn_to_the_running_statistics(rng):
    x = rng.normal(2, 3, (10, 3)).astype(np.float32)
    ids = np.asarray([0, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    params, stats = make(rng)
    tau = 3.0
    y, new = train(x, params, stats, domain=ids, tau=tau)
    old_mean, old_var = (np.asarray(v, np.float64) for v in stats[:2])
    for g in range(3):
        rows = x[ids == g]
        n, mean, var = oracle.moments(rows)
        a = n / (n + tau)
        var = (1 - a) * old_var[g] + a * var + a * (1 - a) * (mean - old_mean[g]) ** 2
        mean = (1 - a) * old_mean[g] + a * mean
        want = oracle.normalize(rows, mean, var, params.scale, params.bias)
        np.testing.assert_allclose(np.asarray(y)[ids == g], want, **CLOSE)
    # What is folded in is the batch.
    _, *want = by_domains(x, ids[:, None], params, stats)
    np.testing.assert_allclose(new.mean, want[0], **CLOSE)
    np.testing.assert_allclose(new.var, want[1], **CLOSE)


def test_too_small_domains_are_as_if_absent(rng):
    x = rng.normal(2, 3, (10, 3)).astype(np.float32)
    ids = np.asarray([0, 1, 1, 2, 2, 2, 2, 2, 2, 2])
    params, stats = make(rng)
    y, new = train(x, params, stats, domain=ids, min_weight=2)
    want, want_mean, want_var = by_domains(x, ids[:, None], params, stats)
    for g in (0, 1):
        np.testing.assert_array_equal(new.mean[g], stats.mean[g])
        np.testing.assert_array_equal(new.var[g], stats.var[g])
        by = stats.mean[g], stats.var[g], params.scale, params.bias
        want[ids == g] = oracle.normalize(x[ids == g], *by)
    np.testing.assert_allclose(y, want, **CLOSE)
    np.testing.assert_allclose(new.mean[2], want_mean[2], **CLOSE)
    np.testing.assert_allclose(new.var[2], want_var[2], **CLOSE)


def test_tracked_weights_and_the_cumulative_rule_are_each_domains_own(rng):
    stats: Any = jbn.init((3, 2), track_weight=True)[1]
    seen = []
    for t in range(4):
        x = rng.normal(t, 1 + t, (6, 2)).astype(np.float32)
        ids = np.asarray([[0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 0, 0]][t % 2])
        seen.append((x, ids))
        _, stats = train(x, None, stats, domain=ids, momentum=None)
    x, ids = (np.concatenate(v) for v in zip(*seen, strict=True))
    for g in (0, 1):
        weight, mean, var = oracle.moments(x[ids == g])
        np.testing.assert_allclose(stats.weight[g], weight)
        np.testing.assert_allclose(stats.mean[g], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats.var[g], var, rtol=1e-5)
    for v, fresh in ((stats.weight, 0), (stats.mean, 0), (stats.var, 1)):
        np.testing.assert_array_equal(v[2], np.full(2, fresh))


# PEERS 1.3, defect 14: torch_geometric's HeteroBatchNorm takes the statistics of each
# type without a gradient.
def test_pyg_has_no_gradient_through_the_statistics_of_types(rng, x64):
    x, dy = rng.normal(size=(2, 9, 3))
    ids = np.asarray([0, 1, 1, 0, 2, 0, 1, 2, 2])
    params, stats = wide(make(rng, own=True))

    def run(x):
        return train(x, params, stats, domain=ids)[0]

    dx = np.asarray(jax.vjp(run, jnp.asarray(x))[1](jnp.asarray(dy))[0])
    step = 1e-6
    for g in range(3):
        rows = ids == g
        scale = np.asarray(params.scale[g])
        want, _, _ = oracle.input_gradient(x[rows], dy[rows], scale)
        np.testing.assert_allclose(dx[rows], want, **TIGHT)
        _, _, var = oracle.moments(x[rows])
        theirs = dy[rows] * scale / np.sqrt(var + 1e-5)
        assert np.abs(theirs - want).max() > 0.1
    # And the difference quotient is on our side.
    moved = rng.normal(size=x.shape)
    up, down = (
        by_domains(x + sign * step * moved, ids[:, None], params, stats)[0]
        for sign in (1, -1)
    )
    quotient = (dy * (up - down)).sum() / (2 * step)
    np.testing.assert_allclose((dx * moved).sum(), quotient, rtol=1e-6)


# --- what it is used for -----------------------------------------------------------


@pytest.mark.peers("torch")
def test_advprop_splits_the_batch_in_clean_and_adversarial(rng):
    # As timm's SplitBatchNorm2d: the first half by the layer, the rest by another.
    torch = load_peer("torch")
    main, aux = (torch.nn.BatchNorm2d(3, affine=False) for _ in range(2))
    scale, bias = rng.normal(size=(2, 3)).astype(np.float32)
    params = Params(jnp.asarray(scale), jnp.asarray(bias))
    _, stats = jbn.init((2, 3))
    ids = np.repeat([0, 1], 4)
    step = functools.partial(
        train, axis=1, momentum=0.9, unbiased=True, domain=jnp.asarray(ids)
    )
    for t in range(3):
        clean = rng.normal(t, 1, (4, 3, 5, 5)).astype(np.float32)
        adversarial = clean + rng.choice([-2, 3], clean.shape).astype(np.float32)
        x = np.concatenate([clean, adversarial])
        y, stats = step(x, params, stats)
        parts = main(torch.from_numpy(clean)), aux(torch.from_numpy(adversarial))
        want = np.concatenate([part.numpy() for part in parts])
        want = want * scale[:, None, None] + bias[:, None, None]
        np.testing.assert_allclose(y, want, **CLOSE)
        for g, peer in enumerate((main, aux)):
            np.testing.assert_allclose(stats.mean[g], peer.running_mean, **CLOSE)
            np.testing.assert_allclose(stats.var[g], peer.running_var, **CLOSE)
    # Inference is on clean images.
    x = rng.normal(size=(2, 3, 5, 5)).astype(np.float32)
    main.eval()
    want = main(torch.from_numpy(x)).numpy()
    want = want * scale[:, None, None] + bias[:, None, None]
    y, _ = evaluate(x, params, stats, domain=0, axis=1)
    np.testing.assert_allclose(y, want, **CLOSE)


@pytest.mark.peers("torch")
@pytest.mark.parametrize("own", [False, True])
def test_dsbn_has_a_layer_for_each_domain(rng, own):
    # As DSBN's: a list of layers, and one domain a batch.
    torch = load_peer("torch")
    params, stats = make(rng, own=own)
    layers = []
    for g in range(3):
        peer = torch.nn.BatchNorm1d(3)
        for mine, theirs in (
            (params.scale, peer.weight),
            (params.bias, peer.bias),
        ):
            mine = np.array(mine[g] if own else mine)
            theirs.data = torch.from_numpy(mine)
        for mine, theirs in (
            (stats.mean, peer.running_mean),
            (stats.var, peer.running_var),
        ):
            theirs.copy_(torch.from_numpy(np.array(mine[g])))
        layers.append(peer)
    step = jax.jit(
        lambda x, stats, domain: jbn.domain_batch_norm(
            x,
            params,
            stats,
            use_running_average=False,
            domain=domain,
            momentum=0.9,
            unbiased=True,
        )
    )
    for domain in (0, 2, 1, 2, 0):
        x = rng.normal(domain, 1 + domain, (8, 3)).astype(np.float32)
        y, stats = step(x, stats, domain)
        want = layers[domain](torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(y, want, **CLOSE)
    for g, peer in enumerate(layers):
        np.testing.assert_allclose(stats.mean[g], peer.running_mean, **CLOSE)
        np.testing.assert_allclose(stats.var[g], peer.running_var, **CLOSE)


def test_a_discriminator_sees_real_and_fake_in_one_batch(rng):
    params, stats = make(rng, 2)
    real = rng.normal(0, 1, (6, 3)).astype(np.float32)
    fake = rng.normal(4, 2, (5, 3)).astype(np.float32)
    w = rng.normal(size=(3, 3)).astype(np.float32)

    def discriminator(w, params, stats, x, ids, norm=jbn.domain_batch_norm):
        y, new = norm(
            jnp.dot(x, w), params, stats, use_running_average=False, domain=ids
        )
        return jax.nn.relu(y).sum(1), new

    @jax.jit
    def together(w, real, fake):
        def loss(w, real, fake):
            ids = jnp.asarray([0] * 6 + [1] * 5)
            x = jnp.concatenate([real, fake])
            d, new = discriminator(w, params, stats, x, ids)
            return jax.nn.softplus(-d[:6]).sum() + jax.nn.softplus(d[6:]).sum(), new

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(w, real, fake)

    @jax.jit
    def apart(w, real, fake):
        def loss(w, real, fake):
            d, a = discriminator(w, params, stats, real, 0)
            e, b = discriminator(w, params, a, fake, 1)
            return jax.nn.softplus(-d).sum() + jax.nn.softplus(e).sum(), b

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(w, real, fake)

    got, want = together(w, real, fake), apart(w, real, fake)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), got, want
    )
    # The fake ones do not leak into what real ones get.
    (_, new), (_, dreal, _) = together(w, real, fake * 3 + 1)
    np.testing.assert_array_equal(dreal, got[1][1])
    np.testing.assert_array_equal(new.mean[0], got[0][1].mean[0])
    assert (new.mean[1] != got[0][1].mean[1]).all()


# PEERS 1.3, defect 12: MAML++ keeps statistics for each step, and never uses them.
def test_maml_has_statistics_for_each_inner_step(rng, x64):
    x, target = rng.normal(1, 2, (2, 7, 3))
    w = jnp.asarray(rng.normal(size=(3, 3)))
    params, stats = wide(make(rng, 4))

    def inner(w, stats, steps=3):
        def body(carry, step):
            w, stats = carry

            def loss(w):
                y, new = jbn.domain_batch_norm(
                    x @ w,
                    params,
                    stats,
                    use_running_average=False,
                    domain=step,
                    momentum=0.8,
                )
                return jnp.square(y - target).mean(), new

            grad, new = jax.grad(loss, has_aux=True)(w)
            return (w - 0.5 * grad, new), w

        return jax.lax.scan(body, (w, stats), jnp.arange(steps))

    (_, new), ws = jax.jit(inner)(w, stats)
    assert np.abs(np.diff(ws, axis=0)).max() > 0.01
    for step in range(3):
        _, mean, var = oracle.moments(x @ np.asarray(ws[step]))
        for seen, old, now in ((mean, stats.mean, new.mean), (var, stats.var, new.var)):
            want = 0.8 * np.asarray(old[step]) + 0.2 * seen
            np.testing.assert_allclose(now[step], want, rtol=1e-10)
        y, _ = evaluate(x, params, new, domain=step)
        by = new.mean[step], new.var[step], params.scale, params.bias
        np.testing.assert_allclose(y, oracle.normalize(x, *by), **TIGHT)
    np.testing.assert_array_equal(new.mean[3], stats.mean[3])
    # The gradient of the outer loop passes through the inner steps.
    weigh, toward = rng.normal(size=(2, 3, 3))

    @jax.jit
    def outer(w):
        return (inner(w, stats)[0][0] * weigh).sum()

    quotient = (outer(w + 1e-6 * toward) - outer(w - 1e-6 * toward)) / 2e-6
    slope = (jax.grad(outer)(w) * toward).sum()
    np.testing.assert_allclose(slope, quotient, rtol=1e-6)


@pytest.mark.peers("torch")
def test_instance_norm_on_packed_data(rng):
    torch = load_peer("torch")
    lengths = [4, 2, 7, 3]
    ids = np.concatenate([np.repeat(np.arange(4), lengths), [-1, -1, 4]])
    x = rng.normal(ids[:, None], 1 + abs(ids[:, None]), (19, 3)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 3)).astype(np.float32)
    params = Params(jnp.asarray(scale), jnp.asarray(bias))
    y, none = train(x, params, None, domain=ids, num_domains=4)
    assert none is None
    for g in range(4):
        sample = torch.from_numpy(x[ids == g].T[None])  # (1, channels, length)
        want = torch.nn.functional.instance_norm(
            sample, weight=torch.from_numpy(scale), bias=torch.from_numpy(bias)
        )
        np.testing.assert_allclose(np.asarray(y)[ids == g], want[0].T, **CLOSE)
    # Twice as many samples are no reason to compile again, and an absent one is none.
    y, _ = train(x, params, None, domain=ids, num_domains=8)
    assert np.isfinite(y).all()


# --- mistakes ----------------------------------------------------------------------

X = np.ones((4, 3, 2), np.float32)
IDS = np.arange(4) % 2


def run(**kwargs: Any) -> Any:
    params, stats = jbn.init(2)[0], jbn.init((2, 2))[1]
    kwargs = {"params": params, "batch_stats": stats, "domain": IDS} | kwargs
    kwargs = {"x": X, "use_running_average": False} | kwargs
    return jbn.domain_batch_norm(**kwargs)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("kwargs", "error", "came", "fix"),
    [
        (
            {"domain": None},
            TypeError,
            "`domain` must be given",
            "which domain each row, each entry of the leading axes, or the whole of",
        ),
        (
            {"batch_stats": None},
            ValueError,
            "got None",
            "`num_domains` must be given if `batch_stats` is None",
        ),
        (
            {"batch_stats": None, "num_domains": 2.5},
            TypeError,
            "got 2.5",
            "`num_domains` must be an integer",
        ),
        (
            {"num_domains": "2"},
            TypeError,
            "got '2'",
            "`num_domains` must be an integer",
        ),
        (
            {"batch_stats": None, "num_domains": 0},
            ValueError,
            "got 0",
            "`num_domains` must be at least 1",
        ),
        (
            {"num_domains": -2},
            ValueError,
            "got -2",
            "`num_domains` must be at least 1",
        ),
        (
            {"num_domains": 3},
            ValueError,
            "`batch_stats.mean` must have one entry per domain and feature",
            r"Make it by `init\(\(3, \.\.\.\)\)`",
        ),
        (
            {"batch_stats": jbn.init(2)[1]},
            ValueError,
            "it has shape (2,), and not (2, 2)",
            r"Make it by `init\(\(2, \.\.\.\)\)`",
        ),
        (
            {"params": jbn.init((3, 2))[0]},
            ValueError,
            "`params.scale` must have one entry per domain and feature",
            r"Make it by `init\(\(2, \.\.\.\)\)`",
        ),
        (
            {"domain": IDS.astype(np.float32)},
            ValueError,
            "one per domain (2), along its last axis; got shape (4,)",
            "Ids must be of an integer dtype",
        ),
        (
            {"domain": IDS > 0},
            TypeError,
            "got bool",
            "`domain` must be of integers",
        ),
        (
            {"domain": np.zeros(3, int)},
            ValueError,
            "it has shape (3,), and the rows of `x`, of shape (4, 3, 2), have shape",
            "one entry for each row of `x`, or for each entry of its leading axes",
        ),
        (
            {"domain": np.zeros((4, 2), int)},
            ValueError,
            "it has shape (4, 2)",
            "one entry for each row",
        ),
        (
            {"domain": np.zeros((4, 3, 2), int)},
            ValueError,
            "it has shape (4, 3, 2)",
            "one entry for each row",
        ),
    ],
)
def test_a_mistake_gets_one_clear_error(kwargs, error, came, fix):
    with pytest.raises(error, match=fix) as raised:
        run(**kwargs)
    assert came in str(raised.value)


@pytest.mark.usefixtures("untyped")
def test_ids_as_a_list():
    jax.tree.map(np.testing.assert_array_equal, run(domain=IDS.tolist()), run())
    with pytest.raises(ValueError, match="must hold shares, one per domain"):
        run(domain=0.5)


@pytest.mark.usefixtures("untyped")
def test_a_dict_is_refused():
    stats = {"mean": np.zeros((2, 2)), "var": np.ones((2, 2))}
    with pytest.raises(TypeError, match=r"Make one of a dict by `jbn.BatchStats\("):
        run(batch_stats=stats)


def test_no_domains_is_refused_beside_statistics():
    with pytest.raises(ValueError, match="`num_domains` must be at least 1; got 0"):
        run(num_domains=0)
