"""Tasks: a GAN's two networks, and what is summed and summarized for each."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ways import executors

from jbn.linen import BatchNorm, DomainBatchNorm
from jbn.models import MLP, Discriminator, Generator, UNet
from jbn.training.batches import plan_epoch
from jbn.training.data import Dataset, InMemory
from jbn.training.executor import Executor
from jbn.training.loader import load
from jbn.training.step import by_row, create_state, make_train_step
from jbn.training.tasks import GAN, Supervised, Task
from jbn.training.tasks.gan import frechet_distance
from jbn.training.tasks.supervised import _among_top, intersection_over_union


Parallel = Literal["pmap", "jit"]
SHAPE = (8, 8, 1)
NUM_ROWS = 20  # In batches of 12: the second has 8.
MOMENTUM = 0.6
# Compiles GANs a dozen times.
pytestmark = pytest.mark.slow

WAYS = executors(("pmap", 1), ("pmap", 4), ("jit", 4))


# ---- GAN -----------------------------------------------------------------------------


def make_gan(axis_name: str | None = None) -> GAN:
    norm = functools.partial(BatchNorm, momentum=MOMENTUM)
    domains = functools.partial(
        DomainBatchNorm, num_domains=2, momentum=MOMENTUM, axis_name=axis_name
    )
    make = lambda norm: Generator(image_size=8, channels=1, width=4, norm=norm)
    # (8 by 8 images have one layer in the discriminator, and no norm.)
    return GAN(
        generator=make(functools.partial(norm, axis_name=axis_name)),
        local_generator=make(norm),
        discriminator=Discriminator(width=4, norm=domains),
        image_shape=SHAPE,
        latent_size=6,
        optimizer=optax.sgd(0.1),
        axis_name=axis_name,
    )


def make_big_gan(axis_name: str | None = None) -> GAN:
    """Of 16 by 16 images, for which the discriminator has a norm."""
    small = make_gan(axis_name)
    fields = {name: getattr(small, name) for name in ("discriminator", "optimizer")}
    make = lambda model: model.clone(image_size=16)
    return GAN(
        **fields,
        generator=make(small.generator),
        local_generator=make(small.local_generator),
        image_shape=(16, 16, 1),
        latent_size=6,
        axis_name=axis_name,
    )


@pytest.fixture(scope="module")
def images() -> InMemory:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (NUM_ROWS, 16, 16, 1), np.uint8)
    return InMemory(image, np.zeros(NUM_ROWS, np.int32))


def train_gan(
    images: InMemory, parallel: Parallel, num_devices: int, multiple: int | None = None
) -> tuple[Any, dict[str, np.ndarray]]:
    executor = Executor(jax.devices()[:num_devices], parallel)
    task = make_big_gan(executor.axis_name)
    run = executor.train(make_train_step(task, seed=3))
    plan = plan_epoch(np.arange(NUM_ROWS), 12, multiple=multiple or num_devices)
    ((_, batches),) = load(images, plan, 2)
    state, metrics = run(
        executor.put(create_state(task, 0)), executor.put_batches(batches)
    )
    return executor.get(state), executor.get(metrics)


def close(x: Any, y: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    check = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(check, x, y)


@pytest.fixture(scope="module")
def one_device(images: InMemory) -> tuple[Any, dict[str, np.ndarray]]:
    return train_gan(images, "jit", 1)


@pytest.mark.parametrize(("parallel", "num_devices"), WAYS)
def test_gan_is_the_same_on_any_devices(
    images: InMemory, one_device: Any, parallel: Parallel, num_devices: int
):
    """Losses, parameters and statistics of both; noise follows the rows."""
    state, metrics = train_gan(images, parallel, num_devices)
    expected, wanted = one_device
    close(metrics, wanted)
    np.testing.assert_array_equal(metrics["weight"], [12, 8])
    close((state.params, state.batch_stats), (expected.params, expected.batch_stats))


def test_gan_filling_takes_no_part(images: InMemory, one_device: Any):
    """Each batch filled up to 16 rows; with other rows' pixels in them, too."""
    state, metrics = train_gan(images, "jit", 1, multiple=16)
    expected, wanted = one_device
    close(metrics, wanted)
    close((state.params, state.batch_stats), (expected.params, expected.batch_stats))


def first_batch(images: InMemory, rows: int = 12, real: int = 9) -> dict[str, Any]:
    """A batch of which the last rows only fill it up."""
    indices = np.arange(rows, dtype=np.int32)
    batch = {**images.rows(indices), "index": indices}
    batch["weight"] = (indices < real).astype(np.float32)
    return {name: jnp.asarray(x) for name, x in batch.items()}


def test_gan_by_hand(images: InMemory):
    """One step, from the two losses as they are written, on the rows that count."""
    task = make_big_gan()
    state = create_state(task, 0)
    batch = first_batch(images)
    key = jax.random.key(5)
    new, metrics = jax.jit(task.update)(state, batch, key)

    count = 9
    normal = lambda key: jax.random.normal(key, (6,))
    z = jax.vmap(normal)(by_row(key, batch))[:count]
    real = batch["image"][:count].astype(jnp.float32) / 127.5 - 1
    old = state.batch_stats

    def generate(params: Any) -> tuple[Any, Any]:
        variables = {"params": params, "batch_stats": old["generator"]}
        return task.generator.apply(variables, z, train=True, mutable=["batch_stats"])

    def judge(params: Any, stats: Any, images: Any, domain: int) -> tuple[Any, Any]:
        variables = {"params": params, "batch_stats": stats}
        logits, updated = task.discriminator.apply(
            variables, images, train=True, domain=domain, mutable=["batch_stats"]
        )
        return logits, updated["batch_stats"]

    fake, updated = generate(state.params["generator"])

    def d_loss(params: Any) -> tuple[Any, Any]:
        on_real, stats = judge(params, old["discriminator"], real, 0)
        on_fake, stats = judge(params, stats, fake, 1)
        loss = -jnp.log(jax.nn.sigmoid(on_real)).mean()
        return loss - jnp.log(1 - jax.nn.sigmoid(on_fake)).mean(), stats

    @jax.jit
    def turns() -> Any:
        (d, stats), grads = jax.value_and_grad(d_loss, has_aux=True)(
            state.params["discriminator"]
        )
        discriminator = jax.tree.map(
            lambda p, g: p - 0.1 * g, state.params["discriminator"], grads
        )

        def g_loss(params: Any) -> Any:
            logits, _ = judge(discriminator, stats, generate(params)[0], 1)
            return -jnp.log(jax.nn.sigmoid(logits)).mean()

        g, grads = jax.value_and_grad(g_loss)(state.params["generator"])
        generator = jax.tree.map(
            lambda p, g: p - 0.1 * g, state.params["generator"], grads
        )
        return d, stats, discriminator, g, generator

    d, stats, discriminator, g, generator = turns()
    np.testing.assert_allclose(metrics["discriminator_loss"] / count, d, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"] / count, g, rtol=1e-4)
    assert metrics["weight"] == count
    close(new.params, {"discriminator": discriminator, "generator": generator})
    # The discriminator's running statistics moved with its own turn alone, and the
    # generator's once.
    expected = {"discriminator": stats, "generator": updated["batch_stats"]}
    close(new.batch_stats, expected)


def test_gan_keeps_real_and_generated_apart(images: InMemory):
    """Domain 0 has the moments of real images alone, in NumPy; domain 1 of others."""
    task = make_big_gan()
    state = create_state(task, 0)
    batch = first_batch(images)
    new, _ = jax.jit(task.update)(state, batch, jax.random.key(5))
    params = state.params["discriminator"]
    real = batch["image"][:9].astype(jnp.float32) / 127.5 - 1

    @jax.jit
    def before_norm(x: jax.Array) -> jax.Array:
        for name in ("conv1", "conv2"):
            kernel = params[name]["kernel"]
            x = jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            if "bias" in params[name]:
                bias = params[name]["bias"]
                x = jax.nn.leaky_relu(x + bias.reshape(1, 1, 1, -1), 0.2)
        return x

    hidden = np.asarray(before_norm(real), np.float64).reshape(-1, 8)
    stats = new.batch_stats["discriminator"]["norm2"]
    mean = MOMENTUM * 0 + (1 - MOMENTUM) * hidden.mean(0)
    var = MOMENTUM * 1 + (1 - MOMENTUM) * hidden.var(0)
    np.testing.assert_allclose(stats["mean"][0], mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"][0], var, rtol=1e-4, atol=1e-6)
    # With other real images, what the first generator's images leave is the same.
    other = {**batch, "image": 255 - batch["image"] // 2}
    again, _ = jax.jit(task.update)(state, other, jax.random.key(5))
    found = again.batch_stats["discriminator"]["norm2"]
    np.testing.assert_array_equal(found["mean"][1], stats["mean"][1])
    assert np.abs(found["mean"][0] - stats["mean"][0]).max() > 1e-4
    assert np.abs(stats["mean"][1] - stats["mean"][0]).max() > 1e-4


@pytest.mark.parametrize(
    ("parallel", "num_devices"), executors(("jit", 1), ("pmap", 4), ("jit", 4))
)
def test_gan_evaluation(images: InMemory, parallel: Parallel, num_devices: int):
    """Sums over the rows that count, then the moments of images in NumPy."""
    executor = Executor(jax.devices()[:num_devices], parallel)
    task = make_big_gan(executor.axis_name)
    variables = jax.device_get(create_state(make_big_gan(), 0).variables)
    plan = plan_epoch(np.arange(NUM_ROWS), 12, multiple=num_devices)
    ((_, batches),) = load(images, plan, 2)
    sums = executor.get(
        executor.evaluate(task.evaluate)(
            executor.put(variables), executor.put_batches(batches)
        )
    )
    found = task.summarize(sums)

    normal = lambda key: jax.random.normal(key, (6,))
    keys = by_row(jax.random.key(1), {"index": jnp.arange(NUM_ROWS)})
    of_generator = {name: part["generator"] for name, part in variables.items()}
    fake: Any = make_big_gan().generator.apply(
        of_generator, jax.vmap(normal)(keys), train=False
    )
    gaussians = []
    for name, x in {"real": images.image / 255, "fake": (fake + 1) / 2}.items():
        x = np.asarray(x, np.float64)
        assert found[f"{name}_mean"] == pytest.approx(x.mean(), rel=1e-4)
        assert found[f"{name}_std"] == pytest.approx(x.std(), rel=1e-3)
        coarse = x.reshape(NUM_ROWS, 8, 2, 8, 2).mean((2, 4)).reshape(NUM_ROWS, 64)
        gaussians += [coarse.mean(0), np.cov(coarse.T, bias=True)]
    expected = frechet_distance(*gaussians)
    assert found["frechet"] == pytest.approx(expected, rel=1e-2)
    assert found["frechet"] > 0.1


def test_gan_in_general(images: InMemory):
    task = make_big_gan()
    assert isinstance(task, Task)
    assert not task.metric.higher_is_better
    assert task.recalibrates
    sums = {"loss": 6.0, "discriminator_loss": 9.0, "weight": 3.0}
    arrays = {name: np.asarray(x) for name, x in sums.items()}
    assert task.summarize(arrays) == {"generator_loss": 2, "discriminator_loss": 3}
    nothing = {name: np.zeros(()) for name in sums}
    assert np.isnan(task.summarize(nothing)["generator_loss"])
    variables = jax.device_get(create_state(task, 0).variables)
    made = task.sample(variables, 5, seed=2)
    assert (made.shape, made.dtype) == ((5, 16, 16, 1), np.uint8)
    np.testing.assert_array_equal(made, task.sample(variables, 5, seed=2))
    assert (made != task.sample(variables, 5, seed=3)).any()
    dataset = Dataset("set", (), (16, 16, 1), images, images)
    assert list(task.pictures(variables, {}, dataset)) == ["samples"]


def test_gan_new_statistics_are_the_generators(images: InMemory):
    """Those of the discriminator stay as they are."""
    task = make_big_gan("batch")  # (Not mapped here: the local generator is asked.)
    variables = create_state(make_big_gan(), 0).variables
    _, updated = task.apply(variables, first_batch(images))
    old, new = variables["batch_stats"], updated["batch_stats"]
    jax.tree.map(
        np.testing.assert_array_equal, new["discriminator"], old["discriminator"]
    )
    for name in ("norm1", "norm2"):
        moved = np.abs(new["generator"][name]["mean"] - old["generator"][name]["mean"])
        assert moved.max() > 1e-3


def test_frechet_distance(rng: np.random.Generator):
    """Against the formula with SciPy's matrix root, and cases known otherwise."""
    linalg = pytest.importorskip("scipy.linalg")

    def gaussian(scale: float) -> tuple[np.ndarray, np.ndarray]:
        x = scale * rng.normal(size=(50, 7)) @ rng.normal(size=(7, 7))
        return x.mean(0), np.cov(x.T)

    (m1, c1), (m2, c2) = gaussian(1), gaussian(3)
    root = linalg.sqrtm(c1 @ c2).real
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2 * root)
    found = frechet_distance(m1, c1, m2, c2)
    assert found == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(found, rel=1e-8)
    assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(m1, c1, m2, c1) == pytest.approx(np.sum((m1 - m2) ** 2))
    # Of standard deviations a and b alone: the sum of (a - b)^2; even if some are zero.
    a, b = np.array([1.0, 2.0, 0.0]), np.array([4.0, 0.0, 0.0])
    zero = np.zeros(3)
    assert frechet_distance(zero, np.diag(a**2), zero, np.diag(b**2)) == pytest.approx(
        13
    )


# ---- Supervised ----------------------------------------------------------------------


def make_unet(axis_name: str | None = None) -> Supervised:
    norm = functools.partial(BatchNorm, momentum=MOMENTUM, axis_name=axis_name)
    return Supervised(
        kind="segmentation",
        model=UNet(widths=(4, 8), num_classes=3, norm=norm),
        image_shape=SHAPE,
        num_classes=3,
        optimizer=optax.sgd(0.1),
        axis_name=axis_name,
    )


@pytest.fixture(scope="module")
def pixels() -> InMemory:
    """A third of the pixels has no label."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (NUM_ROWS, *SHAPE), np.uint8)
    label = rng.integers(0, 3, (NUM_ROWS, 8, 8), np.int32)
    return InMemory(image, np.where(rng.uniform(size=label.shape) < 0.3, -1, label))


def test_intersection_over_union(rng: np.random.Generator):
    """By sets of pixels; a class that is nowhere does not count."""
    label, found = rng.integers(0, 3, (2, 500))
    confusion = np.zeros((5, 5), np.int64)
    np.add.at(confusion, (label, found), 1)
    confusion[3, 0] = 7  # Class 3 is there, and never found. Class 4 is nowhere.
    expected = []
    for c in range(3):
        both = np.sum((label == c) & (found == c))
        either = np.sum((label == c) | (found == c)) + (7 if c == 0 else 0)
        expected.append(both / either)
    np.testing.assert_allclose(
        intersection_over_union(confusion), [*expected, 0, np.nan]
    )
    sums = {"loss": 1.0, "correct": 1.0, "weight": 2.0, "confusion": confusion}
    task = make_unet()
    metrics = task.summarize({name: np.asarray(x) for name, x in sums.items()})
    assert metrics["miou"] == pytest.approx(np.mean([*expected, 0]))
    assert (metrics["loss"], metrics["accuracy"]) == (0.5, 0.5)
    del sums["confusion"]
    assert "miou" not in task.summarize({k: np.asarray(x) for k, x in sums.items()})


@pytest.mark.parametrize(("parallel", "num_devices"), WAYS)
def test_pixels_without_a_label_take_no_part(
    pixels: InMemory, parallel: Parallel, num_devices: int
):
    """Not in sums, and not in the gradient, whatever was found there."""
    executor = Executor(jax.devices()[:num_devices], parallel)
    task = make_unet(executor.axis_name)
    state = jax.device_get(create_state(make_unet(), 0))
    plan = plan_epoch(np.arange(NUM_ROWS), NUM_ROWS, multiple=num_devices)
    ((_, batches),) = load(pixels, plan, 1)
    put = executor.put_batches(batches)
    sums = executor.get(
        executor.evaluate(task.evaluate)(executor.put(state.variables), put)
    )
    logits: Any = make_unet().model.apply(
        state.variables, jnp.asarray(pixels.image), train=False
    )
    logits = np.asarray(logits, np.float64)
    known = pixels.label >= 0
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_p, np.maximum(pixels.label, 0)[..., None], -1)
    best = logits.argmax(-1)
    assert sums["weight"] == known.sum()
    assert sums["correct"] == (best == pixels.label).sum()
    np.testing.assert_allclose(sums["loss"], -picked[..., 0][known].sum(), rtol=1e-5)
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (pixels.label[known], best[known]), 1)
    np.testing.assert_array_equal(sums["confusion"], confusion)

    run = executor.train(make_train_step(task))
    new, metrics = run(executor.put(state), put)
    new, metrics = executor.get(new), executor.get(metrics)
    assert metrics["weight"] == known.sum()

    @jax.jit
    def gradient() -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, _ = make_unet().model.apply(
                variables,
                jnp.asarray(pixels.image),
                train=True,
                mutable=["batch_stats"],
            )
            rows, columns = jax.nn.log_softmax(logits)[known], pixels.label[known]
            return -rows[jnp.arange(len(columns)), columns].mean()

        return jax.value_and_grad(loss)(state.params)

    loss, grads = gradient()
    np.testing.assert_allclose(metrics["loss"][0] / known.sum(), loss, rtol=1e-4)
    close(new.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))


def test_images_of_nothing_but_void_change_no_parameters(pixels: InMemory):
    """And make no NaN."""
    task = make_unet()
    state = create_state(task, 0)
    void = InMemory(pixels.image, np.full_like(pixels.label, -1))
    new, metrics = jax.jit(make_train_step(task))(state, first_batch(void))
    assert metrics["weight"] == 0
    assert metrics["skipped"] == 0
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)


def test_supervised_in_general(pixels: InMemory):
    task = make_unet()
    assert isinstance(task, Task)
    assert task.metric.name == "miou"
    assert task.metric.higher_is_better
    assert not task.recalibrates
    dataset = Dataset("set", "abc", SHAPE, pixels, pixels)
    variables = jax.device_get(create_state(task, 0).variables)
    assert list(task.pictures(variables, {}, dataset)) == ["overlays"]

    classify = Supervised(
        kind="classification",
        model=MLP(features=(3,), num_classes=3),
        image_shape=SHAPE,
        num_classes=3,
        optimizer=optax.sgd(0.1),
    )
    assert isinstance(classify, Task)
    assert classify.metric.name == "accuracy"
    sums = {"confusion": np.eye(3, dtype=int)}
    assert list(classify.pictures({}, sums, dataset)) == ["confusion"]
    nothing = {name: np.zeros(()) for name in ("loss", "correct", "weight")}
    assert all(np.isnan(list(classify.summarize(nothing).values())))


def test_top_5_and_mixed_labels(rng: np.random.Generator):
    """Against NumPy; with equal logits the label is the first."""
    logits = rng.normal(size=(50, 9)).astype(np.float32)
    logits[0] = 1
    label, other = rng.integers(0, 9, (2, 50))
    rank = np.array([(logits[i] > logits[i, label[i]]).sum() for i in range(50)])
    found = _among_top(jnp.asarray(logits), jnp.asarray(label), 5)
    np.testing.assert_array_equal(found, rank < 5)

    share = rng.uniform(0.5, 1, 50).astype(np.float32)
    batch = {"label": label, "other_label": other, "share": share}
    batch["weight"] = np.ones(50, np.float32)
    task = Supervised("classification", None, (1,), 9, optax.sgd(0.1))
    arrays = {name: jnp.asarray(x) for name, x in batch.items()}
    loss = task._sums(jnp.asarray(logits), arrays, 0.0)["loss"]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(50)
    expected = -(share * log_p[rows, label] + (1 - share) * log_p[rows, other]).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
