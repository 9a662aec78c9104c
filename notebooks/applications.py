# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#     provenance: []
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: accelerator,colab,kernelspec
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Batch norm at work: three networks, and four tools for them
#
# A classifier, a segmentation network and a GAN are trained with plain jitted steps, so
# that you see where `params` and `batch_stats` go. The classifier is then inspected,
# broken on purpose, recalibrated, adapted to other images, and folded for inference.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jbn-team/jbn/blob/main/notebooks/applications.ipynb)
#
# ![Digits drawn by a GAN during training](https://raw.githubusercontent.com/jbn-team/jbn/main/docs/notebooks/applications.png)

# %% cellView="form" tags=["setup"]
# @title Set-up: installs jbn where it is missing, such as on Colab
import importlib.util
import shutil
import subprocess
import sys


def install(source):
    """Installs jbn, and leaves a JAX that sees the accelerator of this machine."""
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    if subprocess.run([*pip, source]).returncode:
        raise SystemExit(f"jbn is not installed: pip could not install {source}")
    extra = "tpu" if importlib.util.find_spec("libtpu") else None
    extra = "cuda12" if shutil.which("nvidia-smi") else extra
    if extra and backend() == "cpu":
        # JAX was replaced; a plugin for an accelerator fits one version of it.
        subprocess.run([*pip, f"jax[{extra}]"])
        if backend() == "cpu":
            print("JAX does not see the accelerator: this notebook runs on the CPU.")


def backend():
    """What JAX uses in a new process; this one may have an older JAX loaded."""
    code = "import jax; print(jax.default_backend())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return run.stdout.strip()


if importlib.util.find_spec("jbn") is None:
    install("jbn[train] @ git+https://github.com/jbn-team/jbn")
    if "jax" in sys.modules:
        print("Restart the session (menu Runtime) to use the packages just installed.")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jbn


# These random numbers compile seconds faster than JAX's default ones; and all devices
# are to compute in full float32.
jax.config.update("jax_default_prng_impl", "rbg")
jax.config.update("jax_default_matmul_precision", "highest")
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"image.interpolation": "nearest", "image.cmap": "gray"})
BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"

# %% [markdown]
# Two small data sets come with the package: handwritten digits of 8x8 pixels, and the
# same digits drawn in color on a background, with the class of each pixel.

# %%
import tempfile
from pathlib import Path

from jbn.training.data import load_dataset


with tempfile.TemporaryDirectory() as folder:
    digits = load_dataset("digits", data_dir=Path(folder))
    trimaps = load_dataset(
        "digit_trimaps", target="segmentation_mask", data_dir=Path(folder)
    )
for data in (digits, trimaps):
    shapes = data.train.image.shape, data.test.image.shape
    print(f"{data.name}: training images {shapes[0]}, test images {shapes[1]}")


# %% [markdown]
# ## The step
#
# Batch norm has parameters, which the optimizer updates, and running statistics, which
# it does not. In training the layer normalizes by the batch and *returns* new
# statistics. They are an auxiliary output of the gradient, and an input of the next
# step. This is the complete step, for any Linen model:


# %%
import optax


def make_step(model, optimizer):
    @jax.jit
    def step(params, batch_stats, opt_state, images, labels):
        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_stats, opt_state, loss

    return step


def batches(num_rows, batch_size, epoch):
    """Row numbers of the batches of an epoch; a last partial batch is dropped."""
    order = np.random.default_rng(epoch).permutation(num_rows)
    return order[: num_rows // batch_size * batch_size].reshape(-1, batch_size)


# %% [markdown]
# ## A classifier
#
# A ResNet-8. Evaluation normalizes by the running statistics, an average over past
# batches. Its length depends on `momentum`: about 10 steps for 0.9, and 100 for 0.99,
# the default here, in Flax and in Keras. We track both for the same network at the same
# time: training never reads them, so nothing else differs.

# %%
from functools import partial

from jbn import models, tools


model = models.resnet8(norm=partial(jbn.BatchNorm, momentum=0.9))
slow_model = models.resnet8(norm=partial(jbn.BatchNorm, momentum=0.99))

init = jax.jit(partial(model.init, train=False))
variables = init(jax.random.key(0), digits.train.image[:1])
params, batch_stats = variables["params"], variables["batch_stats"]
slow_stats = batch_stats

EPOCHS = 6
num_steps = EPOCHS * (len(digits.train) // 64)
optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, num_steps))
opt_state = optimizer.init(params)
step = make_step(model, optimizer)


@jax.jit
def update_slow_stats(params, slow_stats, images):
    variables = {"params": params, "batch_stats": slow_stats}
    _, updated = slow_model.apply(
        variables, images, train=True, mutable=["batch_stats"]
    )
    return updated["batch_stats"]


@jax.jit
def predict(variables, images):
    return model.apply(variables, images, train=False).argmax(-1)


images_test = digits.test.image


def accuracy(variables, images=images_test):
    return float(np.mean(predict(variables, images) == digits.test.label))


losses, curves = [], {"0.9": [], "0.99": []}
for epoch in range(EPOCHS):
    for rows in batches(len(digits.train), 64, epoch):
        images, labels = digits.train.image[rows], digits.train.label[rows]
        slow_stats = update_slow_stats(params, slow_stats, images)
        params, batch_stats, opt_state, loss = step(
            params, batch_stats, opt_state, images, labels
        )
        losses.append(float(loss))
    healthy = {"params": params, "batch_stats": batch_stats}
    cold = {"params": params, "batch_stats": slow_stats}
    curves["0.9"].append(accuracy(healthy))
    curves["0.99"].append(accuracy(cold))

print(f"test accuracy after {num_steps} steps")
print(f"  momentum 0.9   {accuracy(healthy):.1%}")
print(f"  momentum 0.99  {accuracy(cold):.1%}")
assert accuracy(healthy) > 0.95 > accuracy(cold)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
left.plot(np.arange(num_steps) + 1, losses, color=BLUE)
left.set(title="Training loss", xlabel="step", yscale="log")
for (momentum, curve), color in zip(curves.items(), (BLUE, ORANGE), strict=True):
    right.plot(np.arange(EPOCHS) + 1, 100 * np.array(curve), "o-", color=color)
    right.text(EPOCHS + 0.15, 100 * curve[-1], momentum, color=color, va="center")
right.set(title="Test accuracy, by momentum", xlabel="epoch", ylabel="%")
right.set(xlim=(0.8, EPOCHS + 0.9), ylim=(0, 103))
plt.show()

# %% [markdown]
# The two only differ in the statistics of the evaluation. The tools below fix this.
#
# ## Segmentation
#
# A U-Net finds the class of each pixel: background, digit, or the border between. The
# step is the same as above. Neither the step nor the batch norm needs to know about
# pixels: statistics are taken over all axes but the last.

# %%
unet = models.UNet(widths=(8, 16, 32), norm=partial(jbn.BatchNorm, momentum=0.9))
init = jax.jit(partial(unet.init, train=False))
variables = init(jax.random.key(0), trimaps.train.image[:1])
params, batch_stats = variables["params"], variables["batch_stats"]

NUM_STEPS = 150
unet_optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, NUM_STEPS))
opt_state = unet_optimizer.init(params)
unet_step = make_step(unet, unet_optimizer)
order = np.concatenate([batches(len(trimaps.train), 32, epoch) for epoch in (0, 1)])
for rows in order[:NUM_STEPS]:
    images, labels = trimaps.train.image[rows], trimaps.train.label[rows]
    params, batch_stats, opt_state, loss = unet_step(
        params, batch_stats, opt_state, images, labels
    )

segment = jax.jit(lambda variables, x: unet.apply(variables, x, train=False).argmax(-1))
variables = {"params": params, "batch_stats": batch_stats}
found = np.asarray(segment(variables, trimaps.test.image))
label = trimaps.test.label

overlaps = []
for i, name in enumerate(["digit", "background", "border"]):
    both, either = (found == i) & (label == i), (found == i) | (label == i)
    overlaps.append(both.sum() / either.sum())
    print(f"{name:10}  intersection over union {overlaps[-1]:.3f}")
print(f"mean after {NUM_STEPS} steps                {np.mean(overlaps):.3f}")
assert np.mean(overlaps) > 0.6

# %%
# Blue and orange can be distinguished with any color vision. The background gets no
# color.
COLORS = np.array([[230, 120, 0], [0, 0, 0], [60, 160, 255]])
OPACITY = np.array([0.9, 0.0, 0.9])


def overlay(images, classes):
    alpha, gray = OPACITY[classes][..., None], images.mean(-1, keepdims=True)
    return np.rint((1 - alpha) * gray + alpha * COLORS[classes]).astype(np.uint8)


rows = np.linspace(0, len(label) - 1, 8).astype(int)
images = trimaps.test.image[rows]
shown = {
    "image": images,
    "label": overlay(images, label[rows]),
    "found": overlay(images, found[rows]),
}
figure, axes = plt.subplots(3, 8, figsize=(8, 3.2), layout="constrained")
for line, (name, pictures) in zip(axes, shown.items(), strict=True):
    for ax, picture in zip(line, pictures, strict=True):
        ax.imshow(picture)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    line[0].set_ylabel(name)
figure.suptitle("Test images: digit orange, border blue", fontsize=10)
plt.show()

# %% [markdown]
# ## A GAN
#
# A GAN has two networks with batch norms, and each step runs both several times. For
# each pass, decide by which statistics it normalizes, and whether it updates the
# running statistics.
#
# | pass | normalized by | running statistics |
# |---|---|---|
# | generator, images for the discriminator | the batch | unchanged |
# | discriminator, real images | the batch of real ones (domain 0) | updated |
# | discriminator, generated images | the batch of generated ones (domain 1) | updated |
# | generator, in its own loss | the batch | updated |
# | discriminator, in the generator's loss | the batch of generated ones | unchanged |
#
# A pure function changes nothing in place: to leave the statistics unchanged, drop
# those that it returns (`_` below). In a layer, `update_stats=False` has the same
# effect. Real and generated images are two domains of a `DomainBatchNorm`, so they do
# not share statistics.

# %%
with tempfile.TemporaryDirectory() as folder:
    larger = load_dataset("digits", target=None, image_size=16, data_dir=Path(folder))
real_images = larger.train.image

norm_options = {"momentum": 0.9, "debias": True}
generator = models.Generator(
    image_size=16, channels=1, width=16, norm=partial(jbn.BatchNorm, **norm_options)
)
discriminator = models.Discriminator(
    width=16, norm=partial(jbn.DomainBatchNorm, num_domains=2, **norm_options)
)
LATENT_SIZE = 32
# The discriminator's learning rate is a fifth, so that it does not win at once.
optimizers = {"g": optax.adam(1e-3, b1=0.5), "d": optax.adam(2e-4, b1=0.5)}


def create(model, optimizer, key, x, **call):
    variables = jax.jit(partial(model.init, train=False, **call))(key, x)
    return {**variables, "opt_state": optimizer.init(variables["params"])}


def run(model, params, batch_stats, x, **call):
    """Output in training mode, and new statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    y, updated = model.apply(variables, x, train=True, mutable=["batch_stats"], **call)
    return y, updated["batch_stats"]


def descend(net, optimizer, loss_fn):
    """The network after a step down `loss_fn`, which returns the new statistics too."""
    grads, batch_stats = jax.grad(loss_fn, has_aux=True)(net["params"])
    updates, opt_state = optimizer.update(grads, net["opt_state"], net["params"])
    params = optax.apply_updates(net["params"], updates)
    return {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}


@jax.jit
def gan_step(g, d, average, images, key):
    latents = jax.random.normal(key, (len(images), LATENT_SIZE))
    fake, _ = run(generator, g["params"], g["batch_stats"], latents)

    def d_loss(params):
        on_real, stats = run(discriminator, params, d["batch_stats"], images, domain=0)
        on_fake, stats = run(discriminator, params, stats, fake, domain=1)
        return jnp.mean(jax.nn.softplus(-on_real) + jax.nn.softplus(on_fake)), stats

    new_d = descend(d, optimizers["d"], d_loss)

    def g_loss(params):
        fake, stats = run(generator, params, g["batch_stats"], latents)
        judge = new_d["params"], new_d["batch_stats"]
        on_fake, _ = run(discriminator, *judge, fake, domain=1)
        return jnp.mean(jax.nn.softplus(-on_fake)), stats

    new_g = descend(g, optimizers["g"], g_loss)
    average = optax.incremental_update(new_g["params"], average, 0.01)
    return new_g, new_d, average


keys = jax.random.split(jax.random.key(1), 3)
g = create(generator, optimizers["g"], keys[0], jnp.zeros((1, LATENT_SIZE)))
d = create(discriminator, optimizers["d"], keys[1], real_images[:1], domain=0)
average = g["params"]
rng = np.random.default_rng(0)
GAN_STEPS = 750
for i in range(GAN_STEPS):
    images = real_images[rng.choice(len(real_images), 64, replace=False)]
    g, d, average = gan_step(g, d, average, images, jax.random.fold_in(keys[2], i))
    if i == 0:
        # `debias` keeps count: 1 - 0.9 after one update, in each network and domain.
        np.testing.assert_allclose(g["batch_stats"]["norm1"]["weight"], 0.1, rtol=1e-5)
        np.testing.assert_allclose(d["batch_stats"]["norm2"]["weight"], 0.1, rtol=1e-5)
        print("after one step, running statistics have moved once")

# %% [markdown]
# The parameters of a GAN fluctuate, so images are generated with their average over
# about the last hundred steps. The averaged network has never seen a batch, so no
# running statistics belong to it: `recalibrate` takes them from some batches of
# latents. The Fréchet distance measures how much the generated and the real images
# differ (at 8x8 pixels, as Gaussians); the distance between two halves of the real
# images is a lower limit.

# %%
from jbn.training.tasks.gan import frechet_distance


latents = jax.random.normal(jax.random.key(2), (8, 128, LATENT_SIZE))
generate = jax.jit(lambda variables, z: generator.apply(variables, z, train=False))


def make_images(variables):
    made = np.concatenate([generate(variables, z) for z in latents])
    return np.rint(np.clip(127.5 * (made + 1), 0, 255)).astype(np.uint8)


def distance(images, others):
    gaussians = []
    for x in (images, others):
        coarse = x.reshape(-1, 8, 2, 8, 2).mean((2, 4)).reshape(-1, 64) / 255
        gaussians += [coarse.mean(0), np.cov(coarse, rowvar=False)]
    return frechet_distance(*gaussians)


last = {"params": g["params"], "batch_stats": g["batch_stats"]}
averaged = {"params": average, "batch_stats": g["batch_stats"]}
recalibrated = tools.recalibrate(
    lambda variables, z: generator.apply(
        variables, z, train=True, mutable=["batch_stats"]
    ),
    averaged,
    list(latents),
)
print(f"Fréchet distance after {GAN_STEPS} steps")
for name, images in (
    ("the last parameters", make_images(last)),
    ("averaged, statistics of the last", make_images(averaged)),
    ("averaged, recalibrated", make_images(recalibrated)),
):
    print(f"  {name:33} {distance(images, real_images):.3f}")
halves = real_images[::2], real_images[1::2]
print(f"  {'two halves of the real images':33} {distance(*halves):.3f}")


# %%
def sheet(images, columns):
    padded = np.pad(images[..., 0], [(0, 0), (0, 1), (0, 1)], constant_values=255)
    lines = padded.reshape(-1, columns, *padded.shape[1:])
    return lines.transpose(0, 2, 1, 3).reshape(len(lines) * 17, columns * 17)


figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
for ax, title, images in (
    (axes[0], "generated", make_images(recalibrated)),
    (axes[1], "real", real_images),
):
    ax.imshow(sheet(images[:66], 11), vmin=0, vmax=255)
    ax.set_title(title, loc="left")
    ax.set_axis_off()
plt.show()

# %% [markdown]
# Averaging and recalibrating gain little here, because the parameters hardly change any
# more. Most of the images look like digits, and many are legible. Twice the width and
# 1,840 steps give [better
# ones](https://github.com/jbn-team/jbn/blob/main/docs/samples.png), in
# three minutes on two cores: `python train.py --model=dcgan --ema-decay=0.99`.
#
# ## What is wrong: `inspect`
#
# Back to the classifier, whose two sets of statistics gave such different accuracies.
# `jbn.tools.inspect` runs a model on batches in training mode, and compares the input
# of each layer with its running statistics. Tools take a function such as `apply`, of
# variables and a batch, that returns the updated variables.


# %%
def in_training_mode(model):
    return lambda variables, images: model.apply(
        variables, images, train=True, mutable=["batch_stats"]
    )


train_batches = [digits.train.image[rows] for rows in batches(1437, 64, epoch=EPOCHS)]
report = tools.inspect(in_training_mode(model), healthy, train_batches)
print("momentum 0.9, findings:", report.findings)
assert all(finding.severity == "note" for finding in report.findings)

# %%
report = tools.inspect(in_training_mode(slow_model), cold, train_batches)
print("momentum 0.99:")
print(report)
assert "cold" in {finding.kind for finding in report.findings}

# %%
from IPython.display import Image, display


with tempfile.TemporaryDirectory() as folder:
    report.figure(Path(folder) / "layers.png")
    display(Image(Path(folder) / "layers.png", width=640))

# %% [markdown]
# The first layer matters most: its variance is far below the initial 1, which still has
# a quarter of the weight in the average.
#
# A common way to break a network in JAX is to fine-tune it and forget to keep the new
# `batch_stats`. The loss does not show this, since training never reads them. Here the
# classifier is trained for an epoch on images of half the contrast, and keeps its old
# statistics.


# %%
def contrast(images, factor):
    return np.rint(127.5 + factor * (images - 127.5)).astype(np.uint8)


pale_train, pale_test = (contrast(x, 0.5) for x in (digits.train.image, images_test))
params, opt_state = healthy["params"], optimizer.init(healthy["params"])
for rows in batches(len(pale_train), 64, epoch=0):
    labels = digits.train.label[rows]
    params, _, opt_state, loss = step(  # `_` is what should have been kept
        params, healthy["batch_stats"], opt_state, pale_train[rows], labels
    )
stale = {"params": params, "batch_stats": healthy["batch_stats"]}
print(f"training loss {loss:.3f}, test accuracy {accuracy(stale, pale_test):.1%}\n")

pale_batches = [pale_train[rows] for rows in batches(1437, 64, epoch=1)]
report = tools.inspect(in_training_mode(model), stale, pale_batches)
first = report.findings[0]
print(f"{len(report.findings)} findings, first {first.kind} {first.layer}:")
print(f"{first.message}\n-> {first.advice.partition(';')[0]}")
assert "shifted" in {finding.kind for finding in report.findings}

# %% [markdown]
# ## Fix it: `recalibrate`
#
# One pass over the training images replaces the averages by the exact statistics for
# the current parameters. This needs no training and no labels.

# %%
print("test accuracy         before  recalibrated")
for name, broken, data, images in (
    ("cold, momentum 0.99", cold, train_batches, images_test),
    ("stale, fine-tuned", stale, pale_batches, pale_test),
):
    mended = tools.recalibrate(in_training_mode(model), broken, data)
    before, after = accuracy(broken, images), accuracy(mended, images)
    print(f"{name:20}  {before:6.1%}  {after:12.1%}")
    assert after > 0.95 > before

# %% [markdown]
# ## Other data than in training: `adapt`
#
# The classifier has never seen a faded, blurred or noisy image. If such a change shifts
# or scales the input of a layer, statistics of the new images compensate for it,
# without labels. `adapt` mixes them with the statistics of training, which count as
# `prior` rows of a layer. (Rows are pixels: here 64 per image in the first layers, and
# 4 in the last.)


# %%
def blur(images):
    """A filter [1 2 1] / 4 along both axes."""
    for axis in (1, 2):
        width = [(0, 0)] * 4
        width[axis] = (1, 1)
        padded = np.pad(images.astype(np.float32), width)
        left, middle, right = (
            np.take(padded, np.arange(8) + start, axis) for start in range(3)
        )
        images = (left + 2 * middle + right) / 4
    return np.rint(images).astype(np.uint8)


noise = np.random.default_rng(0).normal(0, 0.3 * 255, images_test.shape)
shifted = {
    "contrast times 0.3": contrast(images_test, 0.3),
    "blur": blur(images_test),
    "noise of std 0.3": np.rint(np.clip(images_test + noise, 0, 255)).astype(np.uint8),
}
PRIOR = 16
faded = shifted["contrast times 0.3"]
adapted = tools.adapt(in_training_mode(model), healthy, [faded], prior=PRIOR)
print(f"faded images: {accuracy(healthy, faded):.1%} -> {accuracy(adapted, faded):.1%}")
assert accuracy(adapted, faded) > 0.9

# %% [markdown]
# How much data does this need? To test many batches, let the model adapt to each batch
# separately: in training mode, a layer with `tau=PRIOR` normalizes by the same mixture.
# `convert` puts such layers into our model. On a single batch with all images, the
# logits are those of `adapt`.

# %%
NUMBERS = (1, 4, 20, 360)
figure, axes = plt.subplots(1, 3, figsize=(8, 3), sharey=True, layout="constrained")
for tau, color in ((0.0, ORANGE), (float(PRIOR), BLUE)):
    adaptive = tools.convert(model, tau=tau)
    by_batch = in_training_mode(adaptive)
    adapt_and_predict = jax.jit(lambda *args, run=by_batch: run(*args)[0])
    for ax, (name, images) in zip(axes, shifted.items(), strict=True):
        found = []
        for number in NUMBERS:
            parts = images.reshape(-1, number, 8, 8, 1)
            logits = [adapt_and_predict(healthy, part) for part in parts]
            right = np.concatenate(logits).argmax(-1) == digits.test.label
            found.append(100 * right.mean())
        if tau and images is faded:
            expected = model.apply(adapted, faded, train=False)
            np.testing.assert_allclose(logits[0], expected, rtol=1e-3, atol=1e-3)
        ax.plot(NUMBERS, found, "o-", color=color)
        print(f"{name:18} prior={tau:2.0f}:", *(f"{value:5.1f}" for value in found))

for ax, (name, images) in zip(axes, shifted.items(), strict=True):
    before = 100 * accuracy(healthy, images)
    print(f"{name:18} not adapted: {before:.1f}")
    ax.axhline(before, color=GRAY, ls="--", lw=1)
    ax.set(title=name, xscale="log", xlabel="images in a batch", ylim=(0, 103))
    ax.set_xticks(NUMBERS, NUMBERS)
    ax.minorticks_off()
axes[0].set_ylabel("test accuracy, %")
for name, style, color in (
    (f"prior={PRIOR}", "o-", BLUE),
    ("prior=0", "o-", ORANGE),
    ("not adapted", "--", GRAY),
):
    axes[1].plot([], [], style, color=color, label=name)
axes[1].legend(loc="lower right")
plt.show()

# %% [markdown]
# Twenty images are almost as good as all 360. With `prior=0`, fewer images are not
# enough for statistics: with one image, the last layers have four rows. With the prior,
# one image already helps a lot for contrast and blur; for noise there is little to
# gain. Shifted digits gain nothing and inverted ones lose, as measured in
# [docs/evidence.md](https://github.com/jbn-team/jbn/blob/main/docs/evidence.md).
#
# ## For inference: `fold`
#
# With fixed statistics a batch norm multiplies by constants and adds constants. The
# convolution before it can do this with its own kernel and bias.

# %%
folded = tools.fold(model, healthy, images_test, train=False)
for layer, what in folded.report.items():
    print(f"{layer:28} {what}")

plain = partial(model.apply, train=False)
short = partial(folded.apply, train=False)
before, after = plain(healthy, images_test), short(folded.variables, images_test)
np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def flops(function, variables):
    return jax.jit(function).lower(variables, images_test).cost_analysis()["flops"]


print(f"\nlargest change of a logit  {np.abs(after - before).max():.1e}")
print(f"numbers stored             {size(healthy):,} -> {size(folded.variables):,}")
operations = flops(plain, healthy) / 360, flops(short, folded.variables) / 360
print("operations for an image    {:,.0f} -> {:,.0f}".format(*operations))
assert size(folded.variables) < size(healthy)

# %% [markdown]
# Folding saves few parameters and little work, since convolutions dominate. Its purpose
# is a model without batch norms, for a runtime that has none, or for quantization.
#
# All of this is also on the command line for a run of `train.py`: `python -m jbn
# inspect|recalibrate|fold`. All tools and their cost are described in
# [docs/tools.md](https://github.com/jbn-team/jbn/blob/main/docs/tools.md).
