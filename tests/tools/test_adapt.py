"""Adapted statistics against those of samples that really are such mixtures."""

# Flax types what `init` and `apply` return as unions that nothing can be read from.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn, nnx

import jbn
import jbn.linen
import jbn.nnx
import jbn.training
from jbn.models import MLP
from jbn.tools import adapt, kinds, recalibrate


pytestmark = pytest.mark.sweep


close = functools.partial(np.testing.assert_allclose, rtol=3e-5, atol=1e-5)
EPSILON = 0.1
LAYER = jbn.linen.BatchNorm(use_running_average=False)


def run(variables, x):
    return LAYER.apply(variables, x, mutable=["batch_stats"])


def of(mean, var, layer=LAYER):
    """Variables of one layer with these statistics."""
    mean, var = jnp.float32(mean), jnp.float32(var)
    variables = layer.init(jax.random.key(0), jnp.zeros((2, *mean.shape)))
    stats = {**variables["batch_stats"], "mean": mean, "var": var}
    return {**variables, "batch_stats": stats}


def source_of(rows):
    _, mean, var = oracle.moments(rows)
    return of(mean, var)


@pytest.fixture
def source(rng):
    return np.float32(rng.standard_normal((12, 3)) * [1, 4, 0.5] + [0, 30, -2])


@pytest.fixture
def target(rng):
    return np.float32(rng.standard_normal((8, 3)) * [3, 1, 0.1] + [2, 25, 0])


# --- the mixture -------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_of_rows_of_the_source_that_are_really_there(copies, source, target):
    """`prior` rows of the source: all of its rows, some number of times each."""
    sample = np.concatenate([*[source] * copies, target])
    new = adapt(run, source_of(source), [target], prior=12 * copies)["batch_stats"]
    _, mean, var = oracle.moments(sample)
    close(new["mean"], mean)
    close(new["var"], var)


@pytest.mark.parametrize("sizes", [[8], [4, 4], [7, 1], [1] * 8], ids=str)
def test_of_all_batches_together(sizes, source, target):
    parts = np.split(target, np.cumsum(sizes)[:-1])
    new = adapt(run, source_of(source), parts, prior=12)["batch_stats"]
    _, mean, var = oracle.moments(np.concatenate([source, target]))
    close(new["mean"], mean)
    close(new["var"], var)


def test_a_blend_of_variances_lacks_the_distance_of_the_means():
    """Mean 0 and 4, variance 1, one half each: 5. (The docstring's term.)"""
    x = np.float32([[3.0], [5.0]])
    new = adapt(run, of([0.0], [1.0]), [x], prior=2)["batch_stats"]
    assert (float(new["mean"][0]), float(new["var"][0])) == (2.0, 5.0)


@pytest.mark.parametrize(
    ("prior", "gap", "rows"), [(0.5, -100, 1), (1, 3, 6), (16, 50, 2), (1e4, 0, 3)]
)
def test_the_formula(prior, gap, rows):
    x = np.float32(np.arange(rows)[:, None] + gap)
    new = adapt(run, of([1.0], [2.0]), [x], prior=prior)["batch_stats"]
    a = rows / (rows + prior)
    mean, var = np.mean(x, dtype=np.float64), np.var(x, dtype=np.float64)
    close(new["mean"][0], (1 - a) + a * mean, rtol=1e-4, atol=1e-4)
    want = (1 - a) * 2 + a * var + a * (1 - a) * (mean - 1) ** 2
    close(new["var"][0], want, rtol=1e-4, atol=1e-4)


def test_no_prior_is_recalibration(source, target):
    parts = [target[:5], target[5:]]
    new = adapt(run, source_of(source), parts, prior=0)
    jax.tree.map(
        np.testing.assert_array_equal, new, recalibrate(run, source_of(source), parts)
    )
    close(new["batch_stats"]["var"], oracle.moments(target)[2])


def test_an_infinite_prior_is_the_source(source, target):
    variables = source_of(source)
    new = adapt(run, variables, [target], prior=float("inf"))
    jax.tree.map(np.testing.assert_array_equal, new, variables)


def test_a_huge_prior_is_nearly_the_source(source, target):
    new = adapt(run, source_of(source), [target], prior=1e9)["batch_stats"]
    close(new["mean"], oracle.moments(source)[1])
    close(new["var"], oracle.moments(source)[2])


@pytest.mark.parametrize("prior", [0, 1, 16])
def test_one_row_is_finite(prior, source, target):
    new = adapt(run, source_of(source), [target[:1]], prior=prior)
    y = LAYER.apply(new, target, use_running_average=None, mutable=["batch_stats"])[0]
    assert np.isfinite(y).all()
    var = new["batch_stats"]["var"]
    assert np.isfinite(var).all()
    assert (var == 0).all() if prior == 0 else (var > 0).all()


def test_nothing_seen_keeps_the_source(source, target):
    masked = lambda v, x: LAYER.apply(
        v, x, mask=jnp.zeros((8, 1), bool), mutable=["batch_stats"]
    )
    variables = source_of(source)
    for prior in (0, 3):
        new = adapt(masked, variables, [target], prior=prior)
        jax.tree.map(np.testing.assert_array_equal, new, variables)


def test_images_count_their_pixels(rng):
    x = np.float32(rng.standard_normal((2, 4, 4, 3)) + 3)
    new = adapt(run, of(np.zeros(3), np.ones(3)), [x], prior=32)["batch_stats"]
    _, mean, var = oracle.moments(x)
    close(new["mean"], mean / 2)
    close(new["var"], (1 + var) / 2 + mean**2 / 4)


# --- models ------------------------------------------------------------------------


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for width in (4, 5):
            norm = jbn.linen.BatchNorm(epsilon=EPSILON)
            x = jnp.tanh(norm(nn.Dense(width)(x), use_running_average=not train))
        return x


def deep(rng):
    variables = Deep().init(jax.random.key(0), jnp.zeros((2, 3)), False)
    value = lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype)
    return jax.tree.map(value, variables)


def deep_run(variables, x):
    return Deep().apply(variables, x, True, mutable=["batch_stats"])


def mixtures(variables, x, prior):
    """Each layer's input is normalized by the mixture with its own batch."""
    p, s = (
        jax.tree.map(lambda v: np.asarray(v, np.float64), variables[c])
        for c in ("params", "batch_stats")
    )
    h, found, a = np.asarray(x, np.float64), {}, len(x) / (len(x) + prior)
    for i in range(2):
        h = h @ p[f"Dense_{i}"]["kernel"] + p[f"Dense_{i}"]["bias"]
        name = f"BatchNorm_{i}"
        gap = h.mean(0) - s[name]["mean"]
        mean = s[name]["mean"] + a * gap
        var = (1 - a) * s[name]["var"] + a * h.var(0) + a * (1 - a) * gap**2
        found[name] = {"mean": mean, "var": var}
        h = oracle.normalize(h, mean, var, **p[name], epsilon=EPSILON)
        h = np.tanh(h)
    return found, h


@pytest.mark.parametrize("prior", [0, 4, 64.0])
def test_several_layers_and_their_output(prior, target, rng):
    variables = deep(rng)
    want, output = mixtures(variables, target, prior)
    new = adapt(deep_run, variables, [target], prior=prior)
    got = new["batch_stats"]
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(functools.partial(close, rtol=1e-4), got, want)
    # "To be used in inference mode": what one batch gave is then its own output.
    close(Deep().apply(new, target, False), output, atol=1e-4)


def test_where_and_purity(target, rng):
    variables = deep(rng)
    before = jax.tree.map(np.array, variables)
    new = adapt(deep_run, variables, [target], prior=4, where="BatchNorm_0")
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    for kept in (
        lambda v: v["params"],
        lambda v: v["batch_stats"]["BatchNorm_1"],
    ):
        jax.tree.map(np.testing.assert_array_equal, kept(new), kept(variables))
    want, _ = mixtures(variables, target, 4)
    got = new["batch_stats"]["BatchNorm_0"]
    jax.tree.map(functools.partial(close, rtol=1e-4), got, want["BatchNorm_0"])


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("kind", [jbn.nnx.BatchNorm, nnx.BatchNorm])
def test_nnx(kind, target, source):
    model: Any = nnx.Sequential(kind(3, rngs=nnx.Rngs(0)))
    _, mean, var = oracle.moments(source)
    layer = model.layers[0]
    layer.mean[...], layer.var[...] = jnp.float32(mean), jnp.float32(var)
    new: Any = adapt(lambda m, x: m(x), model, [target[:5], target[5:]], prior=12)
    _, mixed, mixed_var = oracle.moments(np.concatenate([source, target]))
    close(new.layers[0].mean[...], mixed)
    close(new.layers[0].var[...], mixed_var)
    assert type(new.layers[0]) is kind
    close(layer.mean[...], mean)


@pytest.mark.usefixtures("standard_promotion")
def test_linen_layers_of_flax(target, source):
    model = nn.BatchNorm(use_running_average=False)
    flax_run = lambda v, x: model.apply(v, x, mutable=["batch_stats"])
    new = adapt(flax_run, source_of(source), [target], prior=12)["batch_stats"]
    close(new["mean"], oracle.moments(np.concatenate([source, target]))[1])


def test_domains_are_mixed_each_with_its_own(source, target):
    layer = jbn.linen.DomainBatchNorm(2, use_running_average=False)
    variables = layer.init(jax.random.key(0), target, domain=0)
    domain = np.arange(8) // 4
    call = lambda v, x: layer.apply(v, x, domain=domain, mutable=["batch_stats"])
    new = adapt(call, variables, [target], prior=4)["batch_stats"]
    for d in range(2):
        _, mean, var = oracle.moments(target[domain == d])
        close(new["mean"][d], mean / 2)
        close(new["var"][d], (1 + var) / 2 + mean**2 / 4)


@pytest.mark.parametrize("options", [{"debias": True}, {"momentum": None}], ids=str)
def test_the_weight_that_layers_track_is_of_the_mixture(options, target):
    layer = jbn.linen.BatchNorm(use_running_average=False, **options)
    variables = of(np.zeros(3), np.ones(3), layer)
    variables["batch_stats"]["weight"] = jnp.full(3, 0.5)
    call = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
    new = adapt(call, variables, [target], prior=12)["batch_stats"]
    close(new["weight"], np.full(3, 20.0))
    same = adapt(call, variables, [target], prior=float("inf"))["batch_stats"]
    np.testing.assert_array_equal(same["weight"], np.full(3, 0.5, np.float32))


# --- a stream ----------------------------------------------------------------------


def test_a_stream_forgets_the_source_exponentially(rng):
    """From the last result; after k batches (prior / (n + prior))**k is left."""
    x = np.float32(rng.standard_normal((4, 3)) + 8)
    variables = of(np.zeros(3), np.ones(3))
    _, mean, _ = oracle.moments(x)
    for k in range(1, 5):
        variables = adapt(run, variables, [x], prior=12)
        left = (12 / 16) ** k
        close(variables["batch_stats"]["mean"], (1 - left) * mean, rtol=1e-4)


def test_a_stream_equals_its_mixture_of_rows(source, rng):
    """Two batches, one after the other: weights 9/16, 3/16 and 1/4."""
    a, b = (np.float32(rng.standard_normal((4, 3)) + m) for m in (3, -5))
    first = adapt(run, source_of(source), [a], prior=12)
    second = adapt(run, first, [b], prior=12)["batch_stats"]
    w = np.repeat([9 / 16 / 12, 3 / 16 / 4, 1 / 4 / 4], [12, 4, 4])[:, None]
    _, mean, var = oracle.moments(np.concatenate([source, a, b]), w)
    close(second["mean"], mean)
    close(second["var"], var)


# --- TENT --------------------------------------------------------------------------


def entropy(logits):
    log_p = jax.nn.log_softmax(logits)
    return -(jnp.exp(log_p) * log_p).sum(-1).mean()


@pytest.fixture(scope="module")
def digits():
    folder = Path(jbn.training.__file__).parent / "digits"
    with np.load(folder / "digits.npz") as archive:
        images, labels = archive["images"], archive["labels"].astype(np.int32)
        test = archive["test"]
    images = np.float32(images)[..., None] / 16
    return images[~test], labels[~test], images[test], labels[test]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_tent_moves_norms_alone_and_lowers_the_entropy(digits):
    """The recipe of the docstring, on digits whose contrast and offset have changed."""
    images, labels, shifted, answers = map(jnp.asarray, digits)
    shifted = 0.4 * shifted + 0.5
    model = MLP(features=(32,))
    variables = model.init(jax.random.key(0), images[:1], train=False)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(variables, state, x, y):
        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            cost = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return cost, new

        params = variables["params"]
        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return {"params": optax.apply_updates(params, updates), **new}, state

    state, rng = optimizer.init(variables["params"]), np.random.default_rng(0)
    for _ in range(60):
        rows = rng.integers(0, len(images), 128)
        variables, state = step(variables, state, images[rows], labels[rows])

    call = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    accuracy = lambda v: float(
        (model.apply(v, shifted, train=False).argmax(-1) == answers).mean()
    )
    start = adapt(call, variables, [shifted], prior=0)
    optimizer = optax.multi_transform(
        {
            "norm": optax.adam(1e-2),
            "bias": optax.set_to_zero(),
            "weight": optax.set_to_zero(),
        },
        kinds(variables),
    )

    @jax.jit
    def tent(params, state):
        def loss(params):
            logits, _ = call({**start, "params": params}, shifted)
            return entropy(logits)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params, state, entropies = start["params"], optimizer.init(start["params"]), []
    for _ in range(10):
        params, state, value = tent(params, state)
        entropies.append(float(value))
    assert (np.diff(entropies) < 0).all()
    labels_of = kinds(variables)
    jax.tree.map(
        lambda kind, a, b: np.testing.assert_equal(
            bool((a != b).any()), kind == "norm"
        ),
        labels_of,
        params,
        start["params"],
    )
    adapted = {**start, "params": params}
    assert accuracy(start) > accuracy(variables) + 0.1
    assert accuracy(adapted) > accuracy(start) - 0.02


# --- refusals ----------------------------------------------------------------------


@pytest.mark.parametrize("prior", [-1, -1e-9, float("-inf"), float("nan")])
def test_a_negative_prior_is_refused(prior, source, target):
    with pytest.raises(ValueError, match="`prior` must not be negative; got"):
        adapt(run, source_of(source), [target], prior=prior)


@pytest.mark.usefixtures("untyped")
def test_errors_are_those_of_recalibrate(source, target):
    with pytest.raises(TypeError, match="Linen's variables, a dict"):
        adapt(run, None, [target], prior=1)  # pyright: ignore[reportArgumentType, reportCallIssue]
    with pytest.raises(ValueError, match="at least one batch"):
        adapt(run, source_of(source), [], prior=1)
    with pytest.raises(ValueError, match="`adapt` found no batch norm layer"):
        adapt(run, source_of(source), [target], prior=1, where="nothing")
