"""The training step: the same on any number of devices, both ways, as a plain loop."""

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jbn.linen import BatchNorm
from jbn.models import MLP
from jbn.training.batches import Plan, permutation, plan_epoch
from jbn.training.data import Split
from jbn.training.executor import Executor
from jbn.training.state import TrainState, create_state
from jbn.training.step import make_eval_step, make_train_step


Parallel = Literal["pmap", "jit"]
NUM_ROWS, BATCH_SIZE, EPOCHS = 51, 16, 3  # The last batch of an epoch has 3 rows.
SHAPE = (4, 4, 1)
OPTIMIZER = optax.sgd(0.1)
RUNS = [("pmap", n) for n in (1, 2, 4, 8)] + [("jit", n) for n in (1, 2, 4, 8)]


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, NUM_ROWS, np.int32)
    noise = rng.integers(0, 100, (NUM_ROWS, *SHAPE))
    return Split((noise + 60 * label[:, None, None, None]).astype(np.uint8), label)


def make_model(norm: Any = BatchNorm, **kwargs: Any) -> MLP:
    partial = functools.partial(norm, momentum=0.5, **kwargs)
    return MLP(features=(8,), num_classes=3, norm=partial)


def train(
    split: Split, parallel: Parallel, num_devices: int, batch_size: int = BATCH_SIZE
) -> tuple[np.ndarray, TrainState]:
    """The loss of each step, and the state after."""
    executor = Executor(jax.devices()[:num_devices], parallel)
    model = make_model(axis_name=executor.axis_name)
    step = make_train_step(model, OPTIMIZER, axis_name=executor.axis_name)
    run = executor.compile(step, donate=True)
    state = executor.put(create_state(model, OPTIMIZER, SHAPE, seed=0))
    data = executor.put_split(split)
    losses = []
    for epoch in range(EPOCHS):
        order = permutation(0, epoch, NUM_ROWS)
        plan = plan_epoch(order, batch_size, multiple=num_devices)
        state, metrics = run(state, data, plan)
        losses.append(metrics["loss"])
        np.testing.assert_array_equal(metrics["weight"], plan.weights.sum(axis=1))
    return np.concatenate(losses), jax.device_get(state)


@pytest.fixture(scope="module")
def plain_loop(split: Split) -> tuple[np.ndarray, Any, Any]:
    """Flax's own norm, no padding, no weights, no scan, no devices."""
    model = make_model(nn.BatchNorm, use_fast_variance=False)
    init = create_state(make_model(), OPTIMIZER, SHAPE, seed=0)
    params, batch_stats, opt_state = init.params, init.batch_stats, init.opt_state

    @jax.jit
    def update(params: Any, batch_stats: Any, opt_state: Any, image: Any, label: Any):
        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(
                variables, image, train=True, mutable=["batch_stats"]
            )
            picked = jax.nn.log_softmax(logits)[jnp.arange(len(label)), label]
            return -picked.mean(), updated["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    losses = []
    for epoch in range(EPOCHS):
        order = permutation(0, epoch, NUM_ROWS)
        for start in range(0, NUM_ROWS, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            image, label = split.image[rows], split.label[rows]
            params, batch_stats, opt_state, loss = update(
                params, batch_stats, opt_state, image, label
            )
            losses.append(loss)
    return np.array(losses), jax.device_get(params), jax.device_get(batch_stats)


@pytest.mark.parametrize(("parallel", "num_devices"), RUNS)
def test_equals_plain_loop(
    split: Split, plain_loop: Any, parallel: Parallel, num_devices: int
):
    """Also where the last batch leaves five of eight devices without a row."""
    losses, state = train(split, parallel, num_devices)
    expected, params, batch_stats = plain_loop
    assert int(state.step) == len(losses) == len(expected) == 12
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        (state.params, state.batch_stats),
        (params, batch_stats),
    )


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_equal_for_long_in_float64(split: Split):
    """With Adam and for 400 steps, where float32 would be off by then."""
    optimizer = optax.adam(1e-2)

    def train(parallel: Parallel, num_devices: int) -> np.ndarray:
        executor = Executor(jax.devices()[:num_devices], parallel)
        model = make_model(axis_name=executor.axis_name)
        step = make_train_step(model, optimizer, axis_name=executor.axis_name)
        state = create_state(model, optimizer, SHAPE, seed=0)
        state = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, state
        )
        data = {"image": split.image / 255, "label": split.label}
        run = executor.compile(step, donate=True)
        plan = plan_epoch(permutation(0, 0, NUM_ROWS), BATCH_SIZE, multiple=num_devices)
        plan = Plan(np.tile(plan.indices, (100, 1)), np.tile(plan.weights, (100, 1)))
        return run(executor.put(state), executor.put(data), plan)[1]["loss"]

    expected = train("jit", 1)
    assert expected.dtype == np.float64
    assert expected[-1] < 0.1 * expected[0]
    for parallel in ("pmap", "jit"):
        np.testing.assert_allclose(train(parallel, 8), expected, rtol=1e-9)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_gradient_is_that_of_one_device(split: Split, parallel: Parallel):
    """With weights other than one, and a different sum of them on each device."""
    optimizer = optax.sgd(1.0)  # The step is the gradient.
    rng = np.random.default_rng(1)
    indices = rng.integers(0, NUM_ROWS, (1, 16), np.int32)
    weights = rng.uniform(0.1, 2, (1, 16)).astype(np.float32)
    weights[0, [0, 1, 2, 3, 9]] = 0

    def gradient(num_devices: int) -> Any:
        executor = Executor(jax.devices()[:num_devices], parallel)
        model = make_model(axis_name=executor.axis_name)
        step = make_train_step(model, optimizer, axis_name=executor.axis_name)
        state = create_state(model, optimizer, SHAPE, seed=0)
        new_state, _ = executor.compile(step, donate=False)(
            executor.put(state), executor.put_split(split), Plan(indices, weights)
        )
        new_params = jax.device_get(new_state.params)
        return jax.tree.map(lambda x, y: x - y, new_params, state.params)

    def plain_gradient() -> Any:
        model = make_model(nn.BatchNorm, use_fast_variance=False)
        state = create_state(make_model(), optimizer, SHAPE, seed=0)
        rows, weight = indices[0][weights[0] > 0], weights[0][weights[0] > 0]

        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            image = jnp.asarray(split.image[rows])
            logits, _ = model.apply(
                variables, image, train=True, mutable=["batch_stats"]
            )
            log_p = jax.nn.log_softmax(logits)[jnp.arange(len(rows)), split.label[rows]]
            return -jnp.sum(weight * log_p) / weight.sum()

        return jax.tree.map(lambda g: -g, jax.grad(loss_fn)(state.params))

    expected = plain_gradient()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        gradient(4),
        expected,
    )


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_padding_changes_nothing(split: Split, parallel: Parallel):
    """Neither rows without weight, which may be any rows, nor steps without any."""
    executor = Executor(jax.devices()[:2], parallel)
    model = make_model(axis_name=executor.axis_name)
    step = make_train_step(model, OPTIMIZER, axis_name=executor.axis_name)
    run = executor.compile(step, donate=False)
    data = executor.put_split(split)
    start = executor.put(create_state(model, OPTIMIZER, SHAPE, seed=0))
    order = np.arange(20)
    plan = plan_epoch(order, 10, multiple=2)
    expected, metrics = run(start, data, plan)

    indices = np.full((4, 16), 50, np.int32)
    weights = np.zeros((4, 16), np.float32)
    indices[:2, 3:13], weights[:2, 3:13] = plan.indices, 1
    padded, padded_metrics = run(start, data, Plan(indices, weights))
    assert int(padded.step) == int(expected.step) == 2
    np.testing.assert_allclose(padded_metrics["loss"][:2], metrics["loss"], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        jax.device_get(padded),
        jax.device_get(expected),
    )
    # Bit for bit, for a step of nothing but padding.
    same, _ = run(expected, data, plan.without_weight())
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(same), jax.device_get(expected)
    )


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_dispatch(split: Split, parallel: Parallel):
    """Traced once for all epochs, in place, and as good as step by step."""
    executor = Executor(jax.devices()[:2], parallel)
    model = make_model(axis_name=executor.axis_name)
    step = make_train_step(model, OPTIMIZER, axis_name=executor.axis_name)
    traces = []

    def counted(state: Any, batch: Any) -> Any:
        traces.append(None)
        return step(state, batch)

    run = executor.compile(counted, donate=True)
    data = executor.put_split(split)
    plan = plan_epoch(np.arange(NUM_ROWS), BATCH_SIZE, multiple=2)
    first = executor.put(create_state(model, OPTIMIZER, SHAPE, seed=0))
    state, together = run(first, data, plan)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    for epoch in range(3):
        order = permutation(0, epoch, NUM_ROWS)
        state, _ = run(state, data, plan_epoch(order, BATCH_SIZE, multiple=2))
    assert len(traces) == 1

    state = executor.put(create_state(model, OPTIMIZER, SHAPE, seed=0))
    for i in range(len(plan.indices)):
        one = Plan(plan.indices[i : i + 1], plan.weights[i : i + 1])
        state, metrics = run(state, data, one)
        np.testing.assert_allclose(metrics["loss"][0], together["loss"][i], rtol=1e-5)
    assert len(traces) == 2


@pytest.mark.parametrize(("parallel", "num_devices"), [("pmap", 4), ("jit", 4)])
def test_evaluation_uses_running_statistics(
    split: Split, parallel: Parallel, num_devices: int
):
    _, state = train(split, "jit", 1)
    executor = Executor(jax.devices()[:num_devices], parallel)
    model = make_model(axis_name=executor.axis_name)
    run = executor.compile(
        make_eval_step(model, axis_name=executor.axis_name), donate=False
    )
    plan = plan_epoch(np.arange(NUM_ROWS), 20, multiple=num_devices)
    after, metrics = run(executor.put(state), executor.put_split(split), plan)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), state)

    flax_model = make_model(nn.BatchNorm)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = np.asarray(
        flax_model.apply(variables, jnp.asarray(split.image), train=False)
    )
    losses = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    losses -= logits[np.arange(NUM_ROWS), split.label]
    assert metrics["correct"].sum() == (logits.argmax(axis=1) == split.label).sum()
    np.testing.assert_allclose(
        (metrics["loss"] * metrics["weight"]).sum() / NUM_ROWS, losses.mean(), rtol=1e-5
    )


def test_repeatable_bit_for_bit(split: Split):
    first, second = train(split, "pmap", 1), train(split, "pmap", 1)
    jax.tree.map(np.testing.assert_array_equal, first, second)
