"""On a TPU a batch is summarized about its running mean: whatever that is."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from differentiation import once
from hypothesis import given, settings, strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from ways import numbers_of_devices

import jbn
from jbn._moments import as_moments, row_summary
from jbn.axes import Rows
from jbn.summary import Guess


pytestmark = pytest.mark.usefixtures("as_on_a_tpu")
NAMES = itertools.count()


def mesh_of(number, kind=AxisType.Auto):
    name = f"tpu{next(NAMES)}"
    return jax.make_mesh((number,), (name,), (kind,), devices=jax.devices()[:number])


def moments(x, guess, mask=None, epsilon=1e-5):
    """Of a feature, about a guess of its mean."""
    axes = tuple(range(x.ndim - 1))
    guess = jnp.broadcast_to(jnp.asarray(guess, "f"), x.shape[-1:])
    guess = Guess(jnp.expand_dims(guess, axes), jnp.asarray(epsilon))
    mask = None if mask is None else jnp.asarray(mask)
    tiny = epsilon < 1e-25
    parts = row_summary(Rows(axes), tiny, jnp.asarray(x), mask, None, guess)
    found = as_moments(parts)
    return jax.tree.map(lambda v: v.ravel(), found)


GUESSES = {
    "nothing": lambda mean: 0 * mean,
    "right": lambda mean: mean,
    "a little off": lambda mean: mean + 0.9,
    "off": lambda mean: mean + 30,
    "huge": lambda mean: mean + 1e30,
    "infinite": lambda mean: mean + np.inf,
    "not a number": lambda mean: mean * np.nan,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("guess", GUESSES)
def test_variance_is_right_to_1e_5_about_any_guess(guess, masked, rng):
    shape = (16, 14, 14, 6)
    noise, mask = rng.standard_normal(shape), rng.random((*shape[:3], 1)) < 0.7
    with jax.set_mesh(mesh_of(1)):
        run = jax.jit(functools.partial(moments, mask=mask if masked else None))
        for ratio in (0, 10, 1e2, 1e4):
            x = (noise + ratio).astype("f")
            weight, mean, var = oracle.moments(x, mask if masked else None)
            got = run(x, GUESSES[guess](mean))
            np.testing.assert_array_equal(got.weight, weight[: got.weight.size])
            np.testing.assert_allclose(got.mean, mean, rtol=1e-6, atol=1e-5)
            np.testing.assert_allclose(got.var, var, rtol=1e-5)


def test_any_guess_is_as_good_as_any(rng):
    with jax.set_mesh(mesh_of(1)):
        run = jax.jit(moments)

        @settings(max_examples=100, deadline=None)
        @given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
        def check(mean, guess):
            x = rng.standard_normal((40, 2)) * [1, 0.1] + mean
            x = x.astype("f")
            got = run(x, guess)
            _, mean, var = oracle.moments(x)
            np.testing.assert_allclose(got.mean, mean, rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(got.var, var, rtol=1e-5, atol=1e-10)

        check()


@pytest.mark.parametrize(
    ("offset", "spread", "epsilon", "again"),
    [
        ([0, 0, 0], 1, 1e-5, False),
        ([0.9, -0.9, 0], 1, 1e-5, False),
        ([0, 1.1, 0], 1, 1e-5, True),
        ([0, 0, np.nan], 1, 1e-5, True),
        # A feature that is all but constant: what the guess is off by is to be small
        # beside epsilon.
        ([0, 0.002, 0], 0, 1e-5, False),
        ([0, 0.01, 0], 0, 1e-5, True),
        ([0, 0.002, 0], 0, 0.0, True),
    ],
)
def test_only_a_poor_guess_takes_a_second_pass(
    offset, spread, epsilon, again, rng, monkeypatch
):
    def fail(first, *_):
        return first._replace(var=first.var * np.nan)

    monkeypatch.setattr("jbn.summary._again", fail)
    x = rng.standard_normal((512, 3)) * [1, spread, 1] + 50
    x = x.astype("f")
    with jax.set_mesh(mesh_of(1)):
        got = jax.jit(functools.partial(moments, epsilon=epsilon))(
            x, oracle.moments(x)[1] + offset
        )
    assert np.isnan(got.var).all() == again


def test_a_feature_without_weight_needs_no_second_pass(monkeypatch):
    def fail(first, *_):
        return first._replace(shift=first.shift * np.nan)

    monkeypatch.setattr("jbn.summary._again", fail)
    for rows in (1, 4):
        x, mask = jnp.full((rows, 3), np.nan), jnp.zeros((rows, 1), bool)
        with jax.set_mesh(mesh_of(1)):
            got = jax.jit(functools.partial(moments, mask=mask))(x, 7.0)
        jax.tree.map(lambda v: np.testing.assert_array_equal(v, 0), got)


def batch_norm(x, ct, guess, axis_name=None):
    """The output, the new statistics, and the gradient."""
    params, _ = jbn.init(x.shape[-1])
    running = None
    if guess is not None:
        running = jbn.BatchStats(jnp.asarray(guess, "f"), jnp.ones(x.shape[-1]))

    def f(x):
        y, new = jbn.batch_norm(
            x,
            params,
            running,
            use_running_average=False,
            momentum=0.0,
            axis_name=axis_name,
        )
        return y, new

    y, vjp, new = jax.vjp(f, x, has_aux=True)
    return y, vjp(ct)[0], new


close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)


@pytest.fixture
def problem(rng):
    """Rows, cotangent, a good guess of the mean, and what is to come out."""
    x, ct = rng.standard_normal((2, 32, 7, 5)).astype("f")
    x += np.float32(100)
    return x, ct, x.mean((0, 1)), without_guess(x, ct)


def without_guess(x, ct):
    with jax.set_mesh(mesh_of(1)):
        found = once(functools.partial(batch_norm, guess=None), x, ct)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("off", [0.0, 80.0])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("number", numbers_of_devices(1, 4, 8))
def test_on_shards_of_jit(number, kind, off, problem):
    x, ct, guess, want = problem
    mesh = mesh_of(number, kind)
    x, ct = jax.device_put((x, ct), NamedSharding(mesh, P(mesh.axis_names[0])))
    with jax.set_mesh(mesh):
        y, dx, new = jax.jit(batch_norm)(x, ct, guess + off)
    close(y, want[0])
    close(dx, want[1])
    close(new.mean, guess)
    close(new.var, np.asarray(x).astype(float).var((0, 1)))


@pytest.mark.devices
@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("off", [0.0, 80.0])
def test_each_shard_decides_for_itself(off, check_vma, problem):
    """A guess that is good for half of the rows; and one that each device has."""
    x, ct, guess, _ = problem
    x = x + np.where(np.arange(32) < 16, 0, off).astype("f")[:, None, None]
    want = without_guess(x, ct)
    mesh = mesh_of(4)
    name = mesh.axis_names[0]
    for of_device in (guess[None], np.stack([guess, guess + 3, guess, guess])):
        spec = P() if len(of_device) == 1 else P(name)
        got = jax.shard_map(
            lambda x, ct, guess: batch_norm(x, ct, guess[0], name)[:2],
            mesh=mesh,
            in_specs=(P(name), P(name), spec),
            out_specs=P(name),
            check_vma=check_vma,
        )
        y, dx = jax.jit(got)(x, ct, of_device)
        close(y, want[0])
        close(dx, want[1])


@pytest.mark.devices
@pytest.mark.parametrize("off", [0.0, 80.0])
def test_each_device_has_the_same_rows_and_a_guess_of_its_own(off, problem):
    x, _, guess, want = problem
    mesh = mesh_of(4)
    name = mesh.axis_names[0]

    def run(x, guess):
        running = jbn.BatchStats(guess[0], jnp.ones_like(guess[0]))
        return jbn.batch_norm(x, None, running, use_running_average=False)[0][None]

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P(), P(name)), out_specs=P(name))
    guesses = guess + np.array([0, off, 0, -off], "f")[:, None]
    for y in jax.jit(mapped)(x, guesses):
        close(y, want[0])


def test_under_vmap(problem):
    x, ct, guess, want = problem
    guesses = np.stack([guess, guess + 50, guess * 0])
    with jax.set_mesh(mesh_of(1)):
        run = jax.jit(jax.vmap(batch_norm, (None, None, 0)))
        y, dx, _ = run(x, ct, guesses)
    for i in range(3):
        close(y[i], want[0])
        close(dx[i], want[1])


@pytest.mark.parametrize("off", [0.0, 50.0])
def test_every_mode_of_differentiation_passes_by_the_guess(off, problem, rng):
    x, ct, guess, _ = problem
    tangent = rng.standard_normal(x.shape).astype("f")

    def modes(guess):
        f = lambda x: (jnp.sin(batch_norm(x, ct, guess)[0]) * ct).sum()
        return (
            jax.jvp(f, (x,), (tangent,))[1],
            jax.jvp(jax.grad(f), (x,), (tangent,))[1],
            jax.grad(lambda x: jax.jvp(f, (x,), (tangent,))[1])(x),
        )

    with jax.set_mesh(mesh_of(1)):
        got = jax.jit(modes)(guess + off)
        # It has no derivative: whatever it is, the moments are the same.
        by_guess = jax.grad(lambda g: (batch_norm(x, ct, g)[0] * ct).sum())
        by_guess = jax.jit(by_guess)(guess + off)
        want = once(functools.partial(modes, None))
    jax.tree.map(functools.partial(close, rtol=1e-3, atol=1e-3), got, want)
    np.testing.assert_array_equal(by_guess, np.zeros_like(guess))
