"""The training step: the same on any number of devices, both ways, as a plain loop."""

import dataclasses
import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ways import executors

from jbn.linen import BatchNorm, GhostBatchNorm
from jbn.models import MLP
from jbn.training.batches import Plan, permutation, plan_epoch
from jbn.training.data import InMemory
from jbn.training.executor import Executor
from jbn.training.loader import load
from jbn.training.state import TrainState
from jbn.training.step import create_state, initialize, make_train_step
from jbn.training.tasks import Supervised


pytestmark = pytest.mark.sweep


Parallel = Literal["pmap", "jit"]
NUM_ROWS, BATCH_SIZE, EPOCHS = 51, 16, 3  # The last batch of an epoch has 3 rows.
SHAPE = (4, 4, 1)
OPTIMIZER = optax.sgd(0.1)
RUNS = executors(*((how, n) for how in ("pmap", "jit") for n in (1, 2, 4, 8)))


@pytest.fixture(scope="module")
def split() -> InMemory:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, NUM_ROWS, np.int32)
    noise = rng.integers(0, 100, (NUM_ROWS, *SHAPE))
    return InMemory((noise + 60 * label[:, None, None, None]).astype(np.uint8), label)


def make_model(norm: Any = BatchNorm, **kwargs: Any) -> MLP:
    partial = functools.partial(norm, momentum=0.5, **kwargs)
    return MLP(features=(8,), num_classes=3, norm=partial)


def make_task(axis_name: str | None = None, optimizer: Any = OPTIMIZER) -> Supervised:
    return Supervised(
        kind="classification",
        model=make_model(axis_name=axis_name),
        image_shape=SHAPE,
        num_classes=3,
        optimizer=optimizer,
        axis_name=axis_name,
    )


def initial(optimizer: Any = OPTIMIZER) -> TrainState:
    return create_state(make_task(optimizer=optimizer), seed=0)


def batches(executor: Executor, split: InMemory, plan: Plan) -> Any:
    """All the batches of a plan, on the devices."""
    ((_, found),) = load(split, plan, len(plan.indices))
    return executor.put_batches(found)


def run_plan(
    executor: Executor,
    split: InMemory,
    plan: Plan,
    state: TrainState,
    optimizer: Any = OPTIMIZER,
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """The state after, and the metrics of each step."""
    run = executor.train(make_train_step(make_task(executor.axis_name, optimizer)))
    state, metrics = run(executor.put(state), batches(executor, split, plan))
    return executor.get(state), executor.get(metrics)


def losses(metrics: dict[str, np.ndarray]) -> np.ndarray:
    return metrics["loss"] / metrics["weight"]


def train(
    split: InMemory, parallel: Parallel, num_devices: int, batch_size: int = BATCH_SIZE
) -> tuple[np.ndarray, TrainState]:
    """The loss of each step, and the state after."""
    executor = Executor(jax.devices()[:num_devices], parallel)
    run = executor.train(make_train_step(make_task(executor.axis_name)))
    state = executor.put(initial())
    found = []
    for epoch in range(EPOCHS):
        order = permutation(0, epoch, NUM_ROWS)
        plan = plan_epoch(order, batch_size, multiple=num_devices)
        state, metrics = run(state, batches(executor, split, plan))
        metrics = executor.get(metrics)
        found.append(losses(metrics))
        np.testing.assert_array_equal(metrics["weight"], plan.weights.sum(axis=1))
        assert not metrics["skipped"].any()
    return np.concatenate(found), executor.get(state)


@pytest.fixture(scope="module")
def plain_loop(split: InMemory) -> tuple[np.ndarray, Any, Any]:
    """Flax's own norm, no padding, no weights, no scan, no devices."""
    model = make_model(nn.BatchNorm, use_fast_variance=False)
    init = initial()
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

    found = []
    for epoch in range(EPOCHS):
        order = permutation(0, epoch, NUM_ROWS)
        for start in range(0, NUM_ROWS, BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            image, label = split.image[rows], split.label[rows]
            params, batch_stats, opt_state, loss = update(
                params, batch_stats, opt_state, image, label
            )
            found.append(loss)
    return np.array(found), jax.device_get(params), jax.device_get(batch_stats)


@pytest.mark.parametrize(("parallel", "num_devices"), RUNS)
def test_equals_plain_loop(
    split: InMemory, plain_loop: Any, parallel: Parallel, num_devices: int
):
    """Also where the last batch leaves five of eight devices without a row."""
    found, state = train(split, parallel, num_devices)
    expected, params, batch_stats = plain_loop
    assert int(state.step) == len(found) == len(expected) == 12
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        (state.params, state.batch_stats),
        (params, batch_stats),
    )


@pytest.mark.devices
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_equal_for_long_in_float64(split: InMemory):
    """With Adam and for 400 steps, where float32 would be off by then."""
    optimizer = optax.adam(1e-2)

    def train(parallel: Parallel, num_devices: int) -> np.ndarray:
        executor = Executor(jax.devices()[:num_devices], parallel)
        state = jax.tree.map(
            lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x,
            initial(optimizer),
        )
        data = InMemory(split.image / 255, split.label)
        plan = plan_epoch(permutation(0, 0, NUM_ROWS), BATCH_SIZE, multiple=num_devices)
        plan = Plan(np.tile(plan.indices, (100, 1)), np.tile(plan.weights, (100, 1)))
        return losses(run_plan(executor, data, plan, state, optimizer)[1])

    expected = train("jit", 1)
    assert expected.dtype == np.float64
    assert expected[-1] < 0.1 * expected[0]
    for parallel in ("pmap", "jit"):
        np.testing.assert_allclose(train(parallel, 8), expected, rtol=1e-8)


@pytest.mark.parametrize(
    ("parallel", "num_devices"), executors(("jit", 1), ("pmap", 4), ("jit", 4))
)
def test_gradient_is_that_of_one_device(
    split: InMemory, parallel: Parallel, num_devices: int
):
    """With weights other than one, and a different sum of them on each device."""
    optimizer = optax.sgd(1.0)  # The step is the gradient.
    rng = np.random.default_rng(1)
    indices = rng.integers(0, NUM_ROWS, (1, 16), np.int32)
    weights = rng.uniform(0.1, 2, (1, 16)).astype(np.float32)
    weights[0, [0, 1, 2, 3, 9]] = 0

    def gradient() -> Any:
        executor = Executor(jax.devices()[:num_devices], parallel)
        state, plan = initial(optimizer), Plan(indices, weights)
        new_state, _ = run_plan(executor, split, plan, state, optimizer)
        return jax.tree.map(lambda x, y: x - y, new_state.params, state.params)

    def plain_gradient() -> Any:
        model = make_model(nn.BatchNorm, use_fast_variance=False)
        state = initial(optimizer)
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
        gradient(),
        expected,
    )


@pytest.mark.parametrize(
    ("parallel", "num_devices"), executors(("jit", 1), ("pmap", 2), ("jit", 2))
)
def test_padding_changes_nothing(split: InMemory, parallel: Parallel, num_devices: int):
    """Neither rows without weight, which may be any rows, nor steps without any."""
    executor = Executor(jax.devices()[:num_devices], parallel)
    plan = plan_epoch(np.arange(20), 10, multiple=2)
    expected, metrics = run_plan(executor, split, plan, initial())

    indices = np.full((4, 16), 50, np.int32)
    weights = np.zeros((4, 16), np.float32)
    indices[:2, 3:13], weights[:2, 3:13] = plan.indices, 1
    more = Plan(indices, weights)
    padded, padded_metrics = run_plan(executor, split, more, initial())
    assert int(padded.step) == int(expected.step) == 2
    np.testing.assert_allclose(padded_metrics["loss"][:2], metrics["loss"], rtol=1e-5)
    assert not padded_metrics["skipped"].any()
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
        padded,
        expected,
    )
    # Bit for bit, for a step of nothing but padding.
    nothing = Plan(plan.indices, np.zeros_like(plan.weights))
    same, _ = run_plan(executor, split, nothing, expected)
    jax.tree.map(np.testing.assert_array_equal, same, expected)


@pytest.mark.parametrize("parallel", ["pmap", "jit"])
def test_dispatch(split: InMemory, parallel: Parallel):
    """Traced once for all epochs, in place, and as good as step by step."""
    executor = Executor(jax.devices()[:1], parallel)
    step = make_train_step(make_task(executor.axis_name))
    traces = []

    def counted(state: Any, batch: Any) -> Any:
        traces.append(None)
        return step(state, batch)

    run = executor.train(counted)
    plan = plan_epoch(np.arange(NUM_ROWS), BATCH_SIZE, multiple=2)
    first = executor.put(initial())
    state, together = run(first, batches(executor, split, plan))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    for epoch in range(3):
        order = permutation(0, epoch, NUM_ROWS)
        plan_again = plan_epoch(order, BATCH_SIZE, multiple=2)
        state, _ = run(state, batches(executor, split, plan_again))
    assert len(traces) == 1

    together = executor.get(together)
    state = executor.put(initial())
    for i in range(len(plan.indices)):
        one = Plan(plan.indices[i : i + 1], plan.weights[i : i + 1])
        state, metrics = run(state, batches(executor, split, one))
        metrics = executor.get(metrics)
        np.testing.assert_allclose(metrics["loss"][0], together["loss"][i], rtol=1e-5)
    assert len(traces) == 2


@pytest.mark.parametrize("averaged", [False, True])
def test_initialize_makes_what_create_state_makes(averaged: bool):
    """To one rounding, whatever the compiler's effort; no buffer is given twice."""
    task = make_task()
    found = initialize(task, 3, averaged=averaged)
    expected = create_state(task, 3, averaged=averaged)
    assert bool(found.average) == averaged
    # Random weights differ by one ulp between the efforts on JAX 0.12, not before.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-7)
    jax.tree.map(close, found, expected)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(found)]
    assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize(
    ("parallel", "num_devices"), executors(("pmap", 1), ("pmap", 4), ("jit", 4))
)
def test_evaluation_uses_running_statistics(
    split: InMemory, parallel: Parallel, num_devices: int
):
    _, state = train(split, "jit", 1)
    executor = Executor(jax.devices()[:num_devices], parallel)
    task = make_task(executor.axis_name)
    run = executor.evaluate(task.evaluate)
    plan = plan_epoch(np.arange(NUM_ROWS), 20, multiple=num_devices)
    variables = executor.put(state.variables)
    sums = executor.get(run(variables, batches(executor, split, plan)))

    flax_model = make_model(nn.BatchNorm)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = np.asarray(
        flax_model.apply(variables, jnp.asarray(split.image), train=False)
    )
    expected = np.log(np.exp(logits.astype(np.float64)).sum(axis=1))
    expected -= logits[np.arange(NUM_ROWS), split.label]
    found = logits.argmax(axis=1)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (split.label, found), 1)
    np.testing.assert_array_equal(sums["confusion"], confusion)
    metrics = task.summarize(sums)
    np.testing.assert_allclose(metrics["loss"], expected.mean(), rtol=1e-5)
    assert metrics["accuracy"] == pytest.approx((found == split.label).mean())


def test_repeatable_bit_for_bit(split: InMemory):
    first, second = train(split, "pmap", 1), train(split, "pmap", 1)
    jax.tree.map(np.testing.assert_array_equal, first, second)


# ---- What else a step may do ---------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "num_devices"), executors(("jit", 1), ("pmap", 2), ("jit", 4))
)
def test_microbatches_are_ghost_groups(
    split: InMemory, parallel: Parallel, num_devices: int
):
    """Every fourth row together; the statistics are those of the whole batch."""
    weights = np.ones((1, 32), np.float32)
    weights[0, [5, 6, 9, 30, 31]] = 0
    plan = Plan(np.arange(32, dtype=np.int32)[None], weights)

    executor = Executor(jax.devices()[:num_devices], parallel)
    task = dataclasses.replace(
        make_task(executor.axis_name),
        model=make_model(axis_name=executor.axis_name, accumulate=True),
        microbatches=4,
        momentum=0.5,
    )
    run = executor.train(make_train_step(task))
    start = create_state(task, seed=0)
    state, metrics = run(executor.put(start), batches(executor, split, plan))

    # Rows of a group next to each other, on one device.
    order = np.arange(32).reshape(8, 4).T.ravel()
    ghost = dataclasses.replace(
        make_task(), model=make_model(GhostBatchNorm, num_groups=4)
    )
    alone = Executor(jax.devices()[:1], "jit")
    regrouped = Plan(plan.indices[:, order], plan.weights[:, order])
    expected, wanted = alone.train(make_train_step(ghost))(
        alone.put(initial()), batches(alone, split, regrouped)
    )
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6)
    jax.tree.map(close, executor.get(state.params), alone.get(expected.params))
    for name in ("mean", "var"):
        got, want = (s.batch_stats["BatchNorm_0"][name] for s in (state, expected))
        close(executor.get(got), alone.get(want))
    close(executor.get(metrics)["loss"], alone.get(wanted)["loss"])


@pytest.mark.parametrize(
    ("parallel", "num_devices"), executors(("jit", 1), ("pmap", 2), ("jit", 2))
)
def test_what_is_not_finite_is_skipped_whole(
    split: InMemory, parallel: Parallel, num_devices: int
):
    """The loss, or only the optimizer's update; and the run goes on behind it."""
    image = split.image.astype(np.float32) / 255
    image[7] = np.nan
    data = InMemory(image, split.label)
    indices = np.arange(30, dtype=np.int32).reshape(5, 6)  # Row 7 is in step 1.
    plan = Plan(indices, np.ones((5, 6), np.float32))

    def spoil(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        factor = jnp.where(state == 2, jnp.inf, 1.0)
        return jax.tree.map(lambda x: -0.1 * factor * x, updates), state + 1

    optimizer = optax.GradientTransformation(
        lambda params: jnp.zeros((), jnp.int32), spoil
    )
    executor = Executor(jax.devices()[:num_devices], parallel)
    state, metrics = run_plan(executor, data, plan, initial(optimizer), optimizer)
    # The third update is of step 3, as step 1 was none; so are all that come after it,
    # because the optimizer's count stays where it was.
    np.testing.assert_array_equal(metrics["skipped"], [0, 1, 0, 2, 2])
    np.testing.assert_array_equal(metrics["weight"], [6, 0, 6, 0, 0])
    assert np.isfinite(metrics["loss"]).all()
    assert state.step == 5

    kept = Plan(indices[[0, 2]], plan.weights[:2])
    expected, _ = run_plan(executor, data, kept, initial(optimizer), optimizer)
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.batch_stats, state.opt_state),
        (expected.params, expected.batch_stats, expected.opt_state),
    )


def test_average_of_parameters(split: InMemory):
    """By its recursion, in float64."""
    executor = Executor(jax.devices()[:1], "jit")
    task = make_task()
    state = create_state(task, seed=0, averaged=True)
    average = jax.tree.map(np.float64, state.params)
    run = executor.train(make_train_step(task, ema_decay=0.9))
    device_state = executor.put(state)
    plan = plan_epoch(np.arange(NUM_ROWS), BATCH_SIZE, multiple=1)
    for step in range(4):
        one = Plan(plan.indices[step : step + 1], plan.weights[step : step + 1])
        device_state, _ = run(device_state, batches(executor, split, one))
        decay = min(0.9, (1 + step) / (10 + step))
        params = executor.get(device_state.params)
        average = jax.tree.map(
            lambda old, new, d=decay: d * old + (1 - d) * new, average, params
        )
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    found = executor.get(device_state)
    jax.tree.map(close, found.average["params"], average)
    assert found.variables["params"] is found.average["params"]


def test_label_smoothing_is_that_of_optax(split: InMemory):
    executor = Executor(jax.devices()[:1], "jit")
    task = dataclasses.replace(make_task(), label_smoothing=0.2)
    state = create_state(task, seed=0)
    plan = Plan(np.arange(NUM_ROWS, dtype=np.int32)[None], np.ones((1, NUM_ROWS), "f"))
    run = executor.train(make_train_step(task))
    _, metrics = run(executor.put(state), batches(executor, split, plan))
    logits, _ = make_model().apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        jnp.asarray(split.image),
        train=True,
        mutable=["batch_stats"],
    )
    labels = optax.smooth_labels(jax.nn.one_hot(split.label, 3), 0.2)
    expected = optax.softmax_cross_entropy(logits, labels).mean()
    np.testing.assert_allclose(losses(executor.get(metrics))[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("parallel", "num_devices"), executors(("pmap", 4), ("jit", 8))
)
def test_augmentation_does_not_depend_on_the_devices(
    split: InMemory, parallel: Parallel, num_devices: int
):
    plan = plan_epoch(np.arange(NUM_ROWS), BATCH_SIZE, multiple=num_devices)

    def run(parallel: Parallel, num_devices: int) -> np.ndarray:
        executor = Executor(jax.devices()[:num_devices], parallel)
        task = dataclasses.replace(make_task(executor.axis_name), shift=1, flip=True)
        step = executor.train(make_train_step(task, seed=3))
        _, metrics = step(executor.put(initial()), batches(executor, split, plan))
        return losses(executor.get(metrics))

    one = run("jit", 1)
    np.testing.assert_allclose(run(parallel, num_devices), one, rtol=1e-5)
    plain = losses(
        run_plan(Executor(jax.devices()[:1], "jit"), split, plan, initial())[1]
    )
    assert (np.abs(plain - one) > 1e-4).all()
