"""The derivative rule: every mode, against float64 oracles and plain autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from differentiation import SHAPE, example, modes, once, plain
from jax.test_util import check_grads

import jbn


pytestmark = [pytest.mark.sweep, pytest.mark.usefixtures("x64")]


def ours(x, weights, scale, bias, epsilon):
    y, _ = jbn.batch_norm(
        x,
        jbn.Params(scale, bias),
        None,
        use_running_average=False,
        weights=weights,
        epsilon=epsilon,
    )
    return y


@pytest.fixture
def args(rng):
    return example(rng)


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("mode", list(modes(0.0)))
def test_every_mode_agrees_with_autodiff_of_the_formula(mode, args, rng):
    derive = modes(jnp.asarray(rng.standard_normal(SHAPE)))[mode]
    got = jax.jit(functools.partial(derive, ours))(args)
    want = once(functools.partial(derive, plain), args)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-10), got, want
    )


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("axis", [-1, 1, (0, 2)])
def test_gradient_is_the_oracles(axis, weighted, rng):
    x, dy = rng.standard_normal((2, *SHAPE))
    axes = axis if isinstance(axis, tuple) else (axis,)
    features = tuple(SHAPE[a] for a in axes)
    scale = rng.standard_normal(features)
    weights = None
    if weighted:
        weights = rng.integers(0, 4, SHAPE).astype(float)
        weights[:, 0] += 1  # or the oracle may have a feature without any

    def loss(x, params):
        y, _ = jbn.batch_norm(
            x, params, None, use_running_average=False, axis=axis, weights=weights
        )
        return (y * dy).sum()

    params = jbn.Params(jnp.asarray(scale), jnp.zeros(features))
    dx, dparams = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, params)
    want = oracle.input_gradient(x, dy, scale, weights, axis)
    for got, expected in zip((dx, *dparams), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_running_average", [False, True])
def test_numerical_derivatives(use_running_average, args):
    x, weights, scale, bias, epsilon = args
    running = jbn.BatchStats(scale + 2, jnp.square(bias) + 1)

    @jax.jit
    def f(x, scale, bias, epsilon):
        return jbn.batch_norm(
            x,
            jbn.Params(scale, bias),
            running,
            use_running_average=use_running_average,
            weights=weights,
            epsilon=epsilon,
        )[0]

    check_grads(f, (x, scale, bias, epsilon), order=2, modes=["fwd", "rev"])


def test_moments_and_normalize_compose_to_the_same_gradient(args, rng):
    ct = jnp.asarray(rng.standard_normal(SHAPE))

    def composed(x, weights, scale, bias, epsilon):
        m = jbn.moments(x, weights=weights)
        return jbn.normalize(x, m, jbn.Params(scale, bias), epsilon=epsilon)

    for derive in (modes(ct)[m] for m in ("grad", "jvp", "hessian")):
        got = jax.jit(functools.partial(derive, composed))(args)
        want = once(functools.partial(derive, plain), args)
        jax.tree.map(
            lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-9),
            got,
            want,
        )


def test_moments_derivatives_are_numerical_ones(args):
    x, weights, *_ = args
    check_grads(
        jax.jit(lambda x, w: jax.tree.leaves(jbn.moments(x, weights=w))),
        (x, weights),
        order=2,
        modes=["fwd", "rev"],
    )


def test_evaluation_differentiates_by_the_running_statistics(args, rng):
    x, _, scale, bias, _ = args
    ct = jnp.asarray(rng.standard_normal(SHAPE))
    var = jnp.square(bias) + 0.5

    def loss(mean, var):
        y, _ = jbn.batch_norm(
            x,
            jbn.Params(scale, bias),
            jbn.BatchStats(mean, var),
            use_running_average=True,
        )
        return (y * ct).sum()

    dmean, dvar = jax.grad(loss, argnums=(0, 1))(scale, var)
    d, c, s = np.asarray(x - scale[None, None]), np.asarray(ct), np.asarray(scale)
    rstd = 1 / np.sqrt(np.asarray(var) + 1e-5)
    np.testing.assert_allclose(dmean, -(c * s * rstd).sum((0, 1)), rtol=1e-10)
    np.testing.assert_allclose(
        dvar, (-0.5 * c * s * d * rstd**3).sum((0, 1)), rtol=1e-10
    )


def test_no_gradient_passes_through_the_statistics_of_training(args):
    x, _, scale, bias, _ = args
    running = jbn.BatchStats(jnp.ones(3), jnp.full(3, 2.0))

    def state(x, running, scale):
        _, new = jbn.batch_norm(
            x, jbn.Params(scale, bias), running, use_running_average=False
        )
        return sum(leaf.sum() for leaf in jax.tree.leaves(new))

    def output(running):
        return jbn.batch_norm(
            x, jbn.Params(scale, bias), running, use_running_average=False
        )[0].sum()

    grads = jax.jit(jax.grad(state, argnums=(0, 1, 2)))(x, running, scale)
    grads = (*grads, jax.jit(jax.grad(output))(running))
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


@pytest.mark.usefixtures("lowering")
def test_complex_gradient(rng):
    """JAX's gradient of a real loss, from the real and imaginary parts' own."""
    re, im, ct_re, ct_im = jnp.asarray(rng.standard_normal((4, 7, 3)))
    scale, bias = jnp.asarray(rng.standard_normal((2, 3)))

    def formula(re, im):
        x = re + 1j * im
        mean = x.mean(0, keepdims=True)
        d = x - mean
        var = (d.real**2 + d.imag**2).mean(0, keepdims=True)
        y = d / jnp.sqrt(var + 1e-5) * scale[None] + bias[None]
        return (y.real * ct_re + y.imag * ct_im).sum()

    def layer(re, im):
        y, _ = jbn.batch_norm(
            jax.lax.complex(re, im),
            jbn.Params(scale, bias),
            None,
            use_running_average=False,
        )
        return (y.real * ct_re + y.imag * ct_im).sum()

    got = jax.jit(jax.grad(layer, argnums=(0, 1)))(re, im)
    with jax.numpy_dtype_promotion("standard"):
        want = once(jax.grad(formula, argnums=(0, 1)), re, im)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_weightless_elements_leave_every_gradient_finite(bad, use_running_average, rng):
    x = rng.standard_normal((8, 3))
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 1], bool)
    dirty = np.where(mask[:, None], x, bad)
    ct = jnp.asarray(rng.standard_normal((8, 3)))
    running = jbn.BatchStats(jnp.ones(3), jnp.full(3, 2.0))

    def loss(x, params):
        y, _ = jbn.batch_norm(
            x,
            params,
            running,
            use_running_average=use_running_average,
            mask=jnp.asarray(mask),
        )
        # As a user's loss would: by a sigmoid, which turns a NaN into a NaN
        # cotangent, and a mask at the very end.
        return jnp.where(mask[:, None], jax.nn.sigmoid(y) * ct, 0).sum()

    params = jbn.Params(jnp.asarray([0.5, 1.5, 2.0]), jnp.asarray([0.1, 0.2, 0.3]))
    grad = jax.jit(jax.grad(loss, argnums=(0, 1)))
    got, want = grad(dirty, params), grad(x, params)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-12)

    @jax.jit
    def hvp(x):
        return jax.jvp(lambda x: jax.grad(loss)(x, params), (x,), (ct,))[1]

    assert np.isfinite(hvp(dirty)).all()


def test_what_takes_no_part_comes_out_as_the_bias_and_passes_nothing_else(rng):
    x, ct = rng.standard_normal((2, 8, 3))
    mask = np.array([1, 1, 0, 1, 0, 1, 1, 1], bool)
    dirty = np.where(mask[:, None], x, np.nan)
    scale, bias = jnp.asarray([0.5, 1.5, 2.0]), jnp.asarray([0.1, 0.2, 0.3])

    def layer(x, params, mask: np.ndarray | None = mask):
        return jbn.batch_norm(x, params, None, use_running_average=False, mask=mask)[0]

    params = jbn.Params(scale, bias)
    y, vjp = jax.vjp(layer, dirty, params)
    np.testing.assert_array_equal(y[2], bias)
    dx, dparams = vjp(jnp.asarray(ct))  # nonzero for the rows that take no part, too
    want_dx, want_dscale, want_dbias = oracle.input_gradient(x[mask], ct[mask], scale)
    np.testing.assert_array_equal(dx[~mask], np.zeros((2, 3)))
    np.testing.assert_allclose(dx[mask], want_dx, rtol=1e-10)
    np.testing.assert_allclose(dparams.scale, want_dscale, rtol=1e-10)
    np.testing.assert_allclose(dparams.bias, want_dbias + ct[~mask].sum(0), rtol=1e-10)
    # Nor does anything come of the direction in which such a row is moved.
    moved = np.where(mask[:, None], ct, np.nan)
    _, dy = jax.jvp(lambda x: layer(x, params), (dirty,), (moved,))
    _, want_dy = jax.jvp(
        lambda x: layer(x, params, None), (x[mask],), (jnp.asarray(ct[mask]),)
    )
    np.testing.assert_array_equal(dy[~mask], np.zeros((2, 3)))
    np.testing.assert_allclose(dy[mask], want_dy, rtol=1e-10)


def test_gradient_of_weights_passes_by_what_is_not_finite(rng):
    x, ct = rng.standard_normal((2, 6, 3))
    weights = np.array([1.0, 2.0, 0.0, 3.0, 0.0, 0.5])
    dirty = np.where(weights[:, None] > 0, x, np.inf)

    def loss(weights, x, ct):
        y, _ = jbn.batch_norm(
            x, None, None, use_running_average=False, weights=weights[:, None]
        )
        return (y * ct).sum()

    got = jax.jit(jax.grad(loss))(jnp.asarray(weights), dirty, ct)
    some = weights > 0
    want = once(jax.grad(loss), jnp.asarray(weights[some]), x[some], ct[some])
    np.testing.assert_allclose(got[some], want, rtol=1e-10)
    np.testing.assert_array_equal(got[~some], np.zeros(2))


def test_all_weightless_gradient_is_that_of_the_running_statistics(rng):
    x, ct = jnp.asarray(rng.standard_normal((2, 5, 3)))
    running = jbn.BatchStats(jnp.ones(3), jnp.full(3, 2.0))

    def loss(x, training):
        y, _ = jbn.batch_norm(
            x,
            None,
            running,
            use_running_average=not training,
            mask=jnp.zeros(5, bool),
        )
        return (y * ct).sum()

    np.testing.assert_array_equal(jax.grad(loss)(x, True), jax.grad(loss)(x, False))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_gradients_are_rounded_once(dtype, rng):
    x = jnp.asarray(rng.standard_normal((64, 8)), dtype)
    dy = jnp.asarray(rng.standard_normal((64, 8)), dtype)
    scale = np.linspace(0.5, 2, 8)
    params = jbn.Params(jnp.asarray(scale, jnp.float32), jnp.zeros(8, jnp.float32))

    def f(x, params):
        return jbn.batch_norm(x, params, None, use_running_average=False)[0]

    dx, dparams = jax.jit(lambda: jax.vjp(f, x, params)[1](dy))()
    want, dscale, dbias = oracle.input_gradient(x, dy, scale)
    assert dx.dtype == dtype
    assert dparams.scale.dtype == jnp.float32
    # Half a unit in the last place is what one rounding costs; a float32
    # computation can tip a tie, no more.
    ulp = np.abs(np.asarray(jnp.spacing(jnp.asarray(want, dtype)), np.float64))
    assert (np.abs(np.asarray(dx, np.float64) - want) / ulp).max() < 0.51
    np.testing.assert_allclose(dparams.scale, dscale, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dparams.bias, dbias, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("lowering")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("use_running_average", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_backward_pass_keeps_x_and_little_else(dtype, use_running_average, masked, rng):
    rows, features = 4096, 8
    x = jnp.asarray(rng.standard_normal((rows, features)), dtype)
    mask = jnp.arange(rows)[:, None] < rows - 7 if masked else None
    params, running = jbn.init(features)

    def f(x, params):
        return jbn.batch_norm(
            x, params, running, use_running_average=use_running_average, mask=mask
        )[0]

    _, vjp = jax.vjp(jax.jit(f), x, params)
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(vjp)}
    size = sum(leaf.nbytes for leaf in kept.values())
    allowed = x.nbytes + (mask.nbytes if mask is not None else 0) + 64 * features
    assert x.nbytes <= size <= allowed


def test_second_derivatives_keep_x_and_its_tangent(rng):
    """For they use the rule: the formula's would save two intermediate arrays."""
    x, dx = jnp.asarray(rng.standard_normal((2, 4096, 8)))

    def both(x, dx):
        f = lambda x: jbn.batch_norm(x, None, None, use_running_average=False)[0]
        return jax.jvp(f, (x,), (dx,))

    _, vjp = jax.vjp(jax.jit(both), x, dx)
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(vjp)}
    assert sum(leaf.nbytes for leaf in kept.values()) <= x.nbytes + dx.nbytes + 1024
