"""Statistics of a stream against their definition, class by class, in float64."""

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
from jbn.tools import adapt, empirical_bayes, stream


close = functools.partial(np.testing.assert_allclose, rtol=3e-5, atol=3e-5)
EPSILON, CLASSES, WIDTH, STEPS = 0.1, 3, 4, 3


class Net(nn.Module):
    """Two norms: one of sequences, one of rows."""

    make: Any = jbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(self.make, epsilon=EPSILON)
        x = jnp.tanh(norm()(nn.Dense(WIDTH)(x), use_running_average=not train))
        x = norm()(x.mean(1), use_running_average=not train)
        return nn.Dense(CLASSES)(x)


def apply(variables, x):
    return Net().apply(variables, x, mutable=["batch_stats"])


@pytest.fixture
def variables(rng):
    fresh = Net().init(jax.random.key(0), jnp.zeros((1, 5, 2)))
    value = lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype)
    return jax.tree.map(value, fresh)


@pytest.fixture
def data(rng):
    """Batches of sequences: (steps, batch, length, features)."""
    return jnp.asarray(2 * rng.standard_normal((STEPS, 6, 5, 2)) + 3, jnp.float32)


def softmax(y):
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def hard(y):
    return np.eye(CLASSES)[y.argmax(-1)]


def mixture(mean, var, weights):
    """Of parts along the first axis."""
    w = np.asarray(weights, float)[:, None] / np.sum(weights)
    center = (w * mean).sum(0)
    return center, (w * (var + (mean - center) ** 2)).sum(0)


def expected(variables, batches, momentum, tau=0.0, shares=softmax):
    """Outputs, and the statistics after all batches, by loops over classes."""
    wide = lambda tree: jax.tree.map(lambda v: np.asarray(v, np.float64), tree)
    params, source = wide(variables["params"]), wide(variables["batch_stats"])
    names = ["BatchNorm_0", "BatchNorm_1"]
    classes = {n: [(source[n]["mean"], source[n]["var"])] * CLASSES for n in names}
    now = {n: (source[n]["mean"], source[n]["var"]) for n in names}
    seen, outputs = np.zeros(CLASSES), []
    for x in np.asarray(batches, np.float64):
        rows = {}

        def norm(h, name, rows=rows):
            rows[name] = h.reshape(len(h), -1, h.shape[-1])
            p = params[name]
            return oracle.normalize(h, *now[name], **p, epsilon=EPSILON)

        dense = lambda h, n: h @ params[n]["kernel"] + params[n]["bias"]
        h = np.tanh(norm(dense(x, "Dense_0"), names[0])).mean(1)
        outputs.append(dense(norm(h, names[1]), "Dense_1"))
        p = shares(outputs[-1])
        seen += p.sum(0)
        n = np.minimum(seen, 1 / (1 - momentum)).sum() if momentum < 1 else 1
        mixtures = {}
        for name in names:
            for k in range(CLASSES):
                if p[:, k].sum() == 0:
                    continue
                # Each row with its example's share.
                w = np.broadcast_to(p[:, k, None, None], (*rows[name].shape[:2], 1))
                _, mean, var = oracle.moments(rows[name], w)
                keep = momentum ** p[:, k].sum()
                old = classes[name][k]
                both = np.stack([old[0], mean]), np.stack([old[1], var])
                classes[name] = list(classes[name])
                classes[name][k] = mixture(*both, [keep, 1 - keep])
            mean, var = map(np.stack, zip(*classes[name], strict=True))
            mixed = mixture(mean, var, np.ones(CLASSES))
            mixtures[name] = mixed
        towards = tau(mixtures, source) if callable(tau) else tau
        for name, mixed in mixtures.items():
            own = towards[name] if isinstance(towards, dict) else towards
            s, a = source[name], n / (n + np.asarray(own))
            mean = (1 - a) * s["mean"] + a * mixed[0]
            gap = a * (1 - a) * (mixed[0] - s["mean"]) ** 2
            now[name] = mean, (1 - a) * s["var"] + a * mixed[1] + gap
    return np.stack(outputs), now, seen


def distance(mixtures, source):
    """Of all layers from the source, in its standard deviations, squared."""
    found = []
    for name, (mean, var) in mixtures.items():
        s = source[name]
        off = (mean - s["mean"]) ** 2 + (np.sqrt(var) - np.sqrt(s["var"])) ** 2
        found.append(off.sum() / s["var"].sum())
    return np.mean(found)


def run(variables, data, apply=apply, **options):
    adapter = stream(apply, **{"momentum": 0.9, "tau": 0.0, **options})
    state = adapter.init(variables, data[0])
    state, outputs = jax.jit(lambda *args: jax.lax.scan(adapter.step, *args))(
        state, data
    )
    return outputs, adapter.variables(state), state


def assert_as_expected(found, want):
    (outputs, variables, state), (want_outputs, now, seen) = found, want
    close(outputs, want_outputs)
    close(state.seen, seen)
    for name, (mean, var) in now.items():
        close(variables["batch_stats"][name]["mean"], mean)
        close(variables["batch_stats"][name]["var"], var)


@pytest.mark.parametrize("momentum", [0.5, 0.95])
def test_the_formula(momentum, variables, data):
    found = run(variables, data, momentum=momentum)
    assert_as_expected(found, expected(variables, data, momentum))
    # It has moved, and the input is as it was.
    new, old = found[1], variables
    assert abs(new["batch_stats"]["BatchNorm_0"]["mean"] - 1).max() > 0.2
    jax.tree.map(np.testing.assert_array_equal, new["params"], old["params"])


def test_predicted_classes_alone(variables, data):
    one_hot = lambda y: jax.nn.one_hot(y.argmax(-1), CLASSES)
    found = run(variables, data, shares=one_hot)
    assert_as_expected(found, expected(variables, data, 0.9, shares=hard))


@pytest.mark.parametrize("tau", [8.0, np.inf])
def test_tau_draws_to_the_source(tau, variables, data):
    outputs, new, _ = run(variables, data, tau=tau)
    if tau == np.inf:
        close(outputs, np.stack([Net().apply(variables, x) for x in data]))
        jax.tree.map(close, new, variables)
    else:
        want = expected(variables, data, 0.9, tau)
        close(outputs, want[0])
        close(new["batch_stats"]["BatchNorm_1"]["var"], want[1]["BatchNorm_1"][1])


def test_tau_of_each_layer_and_feature_may_be_traced(variables, data):
    each = jnp.asarray([0.0, 2.0, jnp.inf, 8.0])

    @jax.jit
    def both(tau):
        taus = {"BatchNorm_0": tau, "BatchNorm_1": 0.0}
        outputs, new, _ = run(variables, data[:1], tau=taus)
        return outputs, new["batch_stats"]

    _, stats = both(each)
    for i, tau in enumerate([0.0, 2.0, 1e12, 8.0]):
        _, want, _ = expected(variables, data[:1], 0.9, tau)
        close(stats["BatchNorm_0"]["mean"][i], want["BatchNorm_0"][0][i])
        close(stats["BatchNorm_0"]["var"][i], want["BatchNorm_0"][1][i])
    _, want, _ = expected(variables, data[:1], 0.9)
    close(stats["BatchNorm_1"]["mean"], want["BatchNorm_1"][0])


def test_by_default_tau_is_that_of_empirical_bayes(variables, data):
    adapter = stream(apply)
    state, outputs = jax.lax.scan(adapter.step, adapter.init(variables, data[0]), data)
    tau = lambda mixtures, source: 1 / distance(mixtures, source)
    want = expected(variables, data, 0.99, tau)
    assert_as_expected((outputs, adapter.variables(state), state), want)


def test_tau_as_a_function_of_the_statistics(variables, data):
    gaps = lambda now, source, mean: {
        path: 9 * abs(mean(now[path]) - mean(source[path])).sum() for path in now
    }
    found = run(variables, data, tau=lambda *a: gaps(*a, lambda stats: stats.mean))
    # In `expected` a mixture is a tuple, and the source a dict.
    mean = lambda stats: stats["mean"] if isinstance(stats, dict) else stats[0]
    want = expected(variables, data, 0.9, lambda *a: gaps(*a, mean))
    assert_as_expected(found, want)


def test_a_stream_like_the_source_leaves_it_in_place():
    stats = jbn.Moments(jnp.ones(2), jnp.asarray([1.0, 2.0]), jnp.asarray([0.0, 3.0]))
    source = {"norm": jbn.BatchStats(stats.mean, stats.var)}
    assert empirical_bayes({"norm": stats}, source) == jnp.inf
    # The same distance in both directions, in a layer beside one that has no scale.
    moved = stats._replace(mean=stats.mean + 3)
    flat = jbn.Moments(jnp.ones(2), jnp.ones(2), jnp.zeros(2))
    now = {"norm": moved, "flat": flat}
    source["flat"] = jbn.BatchStats(jnp.zeros(2), jnp.zeros(2))
    np.testing.assert_allclose(empirical_bayes(now, source), 2 / (18 / 3))


def test_training_mode_is_the_same(variables, data):
    """`adapt` takes the model in that mode, and norms do not care here."""
    training = lambda v, x: Net().apply(v, x, True, mutable=["batch_stats"])
    found = run(variables, data, training)
    assert_as_expected(found, expected(variables, data, 0.9))


def test_examples_that_are_not_finite_do_not_count(variables, data):
    outputs, *new = run(variables, data.at[:, 5].set(jnp.nan))
    want = expected(variables, data[:, :5], 0.9)
    assert_as_expected((outputs[:, :5], *new), want)


def test_examples_without_shares_do_not_count(variables, data):
    nothing = lambda y: jnp.zeros((len(y), 2))
    _, same, _ = run(variables, data[:1], shares=nothing)
    jax.tree.map(close, same, variables)


def test_where_and_layers_of_flax(variables, data):
    theirs = lambda v, x: Net(nn.BatchNorm).apply(v, x, mutable=["batch_stats"])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _, new, _ = run(variables, data[:1], theirs, where="*_0")
    stats, old = new["batch_stats"], variables["batch_stats"]
    _, want, _ = expected(variables, data[:1], 0.9)
    close(stats["BatchNorm_0"]["mean"], want["BatchNorm_0"][0])
    jax.tree.map(
        np.testing.assert_array_equal, stats["BatchNorm_1"], old["BatchNorm_1"]
    )


def test_debiased_layers_are_fully_trained(data):
    make = functools.partial(jbn.linen.BatchNorm, epsilon=EPSILON, debias=True)
    layer = make(use_running_average=True)
    x = data[..., 0]
    variables = layer.init(jax.random.key(0), x[0])
    call = lambda v, x: layer.apply(v, x, mutable=["batch_stats"])
    pooled = lambda y: jnp.ones((len(y), 1))
    _, new, _ = run(variables, x, call, shares=pooled, momentum=0.0)
    stats = new["batch_stats"]
    close(stats["weight"], np.ones(5))
    close(stats["mean"], np.asarray(x[-1]).mean(0))
    close(stats["var"], np.asarray(x[-1]).var(0))


class NNXNet(nnx.Module):
    """The same network."""

    def __init__(self, variables):
        rngs = nnx.Rngs(0)
        norm = functools.partial(jbn.nnx.BatchNorm, epsilon=EPSILON, rngs=rngs)
        self.Dense_0, self.BatchNorm_0 = nnx.Linear(2, WIDTH, rngs=rngs), norm(WIDTH)
        self.Dense_1 = nnx.Linear(WIDTH, CLASSES, rngs=rngs)
        self.BatchNorm_1 = norm(WIDTH)
        for tree in variables.values():
            for layer, values in tree.items():
                for name, value in values.items():
                    getattr(getattr(self, layer), name)[...] = value
        self.eval()

    def __call__(self, x):
        x = jnp.tanh(self.BatchNorm_0(self.Dense_0(x)))
        return self.Dense_1(self.BatchNorm_1(x.mean(1)))


def test_nnx(variables, data):
    model = NNXNet(variables)
    outputs, new, state = run(model, data, lambda m, x: m(x))
    stats = {
        name: {k: getattr(getattr(new, name), k)[...] for k in ("mean", "var")}
        for name in variables["batch_stats"]
    }
    found = outputs, {"batch_stats": stats}, state
    assert_as_expected(found, expected(variables, data, 0.9))
    # A copy, in inference mode.
    assert type(new) is NNXNet
    assert new.BatchNorm_0.use_running_average
    close(model.BatchNorm_0.mean[...], variables["batch_stats"]["BatchNorm_0"]["mean"])


def test_a_step_is_compiled_once(variables, data):
    traces = []

    def counted(variables, x):
        traces.append(1)
        return apply(variables, x)

    adapter = stream(counted)
    state = adapter.init(variables, data[0])
    before, step = len(traces), jax.jit(adapter.step)
    for x in data:
        state, _ = step(state, x)
    assert len(traces) == before + 1


# --- Digits sorted by class ---------------------------------------------------------


@pytest.mark.slow
def test_digits_sorted_by_class_keep_their_accuracy():
    """16 images of one class a batch: 59 % by the mixture with the batch's own."""
    folder = Path(jbn.training.__file__).parent / "digits"
    with np.load(folder / "digits.npz") as archive:
        images, labels = archive["images"], archive["labels"].astype(np.int32)
        test = archive["test"]
    images = jnp.asarray(np.float32(images)[..., None] / 16)
    model = MLP(norm=functools.partial(jbn.linen.BatchNorm, momentum=0.9))
    variables = model.init(jax.random.key(0), images[:1], train=False)
    optimizer, x, y = optax.adam(3e-3), images[~test], jnp.asarray(labels[~test])

    @jax.jit
    def train(variables, state, order):
        def step(carry, rows):
            variables, state = carry

            def loss(params):
                logits, new = model.apply(
                    {**variables, "params": params},
                    x[rows],
                    train=True,
                    mutable=["batch_stats"],
                )
                ce = optax.softmax_cross_entropy_with_integer_labels
                return ce(logits, y[rows]).mean(), new

            params = variables["params"]
            grads, new = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return ({"params": params, **new}, state), None

        return jax.lax.scan(step, (variables, state), order)[0]

    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(len(x))[: 22 * 64] for _ in range(20)])
    order = rows.reshape(-1, 64)
    with jax.numpy_dtype_promotion("standard"):
        variables, _ = train(variables, optimizer.init(variables["params"]), order)
    by_class = np.argsort(labels[test], kind="stable")[: 22 * 16]
    batches = images[test][by_class].reshape(22, 16, 8, 8, 1)
    answers = labels[test][by_class].reshape(22, 16)
    accuracy = lambda logits: (np.asarray(logits).argmax(-1) == answers).mean()
    call = lambda v, x, train=False: model.apply(
        v, x, train=train, mutable=["batch_stats"]
    )
    clean = accuracy(run(variables, batches, call)[0])
    assert accuracy(model.apply(variables, batches[0], train=False)[None]) >= 0.1
    assert clean >= 0.95
    # Brighter images, of which the source knows nothing.
    brighter = accuracy(run(variables, batches + 0.6, call)[0])
    source = accuracy(
        np.stack([model.apply(variables, x + 0.6, train=False) for x in batches])
    )
    assert brighter > source + 0.2
    training = functools.partial(call, train=True)
    one_by_one = [adapt(training, variables, [x], prior=16) for x in batches[:6]]
    mixed = [
        model.apply(v, x, train=False)
        for v, x in zip(one_by_one, batches[:6], strict=True)
    ]
    assert (np.stack(mixed).argmax(-1) == answers[:6]).mean() < 0.8


# --- Refusals -----------------------------------------------------------------------


@pytest.mark.usefixtures("untyped")
def test_refusals(variables, data):
    with pytest.raises(ValueError, match=r"`momentum` .* must be from 0 to 1"):
        stream(apply, momentum=1.1)
    init = lambda apply, v=variables, **options: stream(apply, **options).init(
        v, data[0]
    )
    with pytest.raises(TypeError, match="Linen's variables, a dict"):
        init(apply, 3)
    with pytest.raises(ValueError, match=r"must return what Linen.*mutable="):
        init(lambda v, x: apply(v, x)[0])
    with pytest.raises(ValueError, match="found no batch norm layer"):
        init(apply, where="nowhere")
    with pytest.raises(ValueError, match=r"a column for each class, shape \(6,"):
        init(apply, shares=lambda y: y.sum(1))
    loss = lambda v, x: (lambda y: (y[0].mean(), y[1]))(apply(v, x))
    with pytest.raises(ValueError, match="outputs with the batch in front"):
        init(loss)
    with pytest.raises(ValueError, match="`tau` must be at least 0"):
        init(apply, tau=-1)
    with pytest.raises(ValueError, match="`tau` has no entry for 'BatchNorm_1'"):
        init(apply, tau={"BatchNorm_0": 1.0})
