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
# # Batch normalization, forward and backward
#
# What batch norm computes, how its gradient is derived, what its running statistics
# are for, and, by measurement, what it does to a network.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jbn-team/jbn/blob/main/notebooks/batch_norm.ipynb)
#
# ![Test accuracy by epoch for three momenta, and after recalibration](https://raw.githubusercontent.com/jbn-team/jbn/main/docs/notebooks/batch_norm.png)

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


BLUE, ORANGE, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#666666"
plt.rc("figure", dpi=80, figsize=(8, 3))
plt.rc("figure.constrained_layout", use=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)

# %% [markdown]
# ## Forward
#
# Batch norm is due to Sergey Ioffe and Christian Szegedy
# ([2015](https://arxiv.org/abs/1502.03167)). For each feature, over the $n$ rows of a
# batch,
#
# $$\hat x = (x - \mu)\, r, \qquad r = \frac{1}{\sqrt{\sigma^2 + \epsilon}}, \qquad
# y = \gamma \hat x + \beta,$$
#
# where $\mu$ is the mean of the rows and $\sigma^2$ their biased variance (divided by
# $n$). The scale $\gamma$ and the bias $\beta$ are learned. By hand it is four lines:


# %%
import functools


def by_hand(x, scale, bias, epsilon=1e-5):
    mean = x.mean(0)
    var = ((x - mean) ** 2).mean(0)
    xh = (x - mean) / jnp.sqrt(var + epsilon)
    return scale * xh + bias


rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(3, 2, (64, 5)), jnp.float32)
params, batch_stats = jbn.init(5)
params = jbn.Params(
    scale=jnp.asarray(rng.uniform(0.5, 2, 5), jnp.float32),
    bias=jnp.asarray(rng.normal(size=5), jnp.float32),
)

train = jax.jit(functools.partial(jbn.batch_norm, use_running_average=False))
y, batch_stats = train(x, params, batch_stats)
np.testing.assert_allclose(y, jax.jit(by_hand)(x, *params), rtol=1e-5, atol=1e-5)
with np.printoptions(precision=3, suppress=True):
    print("mean of y:", np.mean(y, 0), " bias: ", np.asarray(params.bias))
    print("std of y: ", np.std(y, 0), " scale:", np.asarray(params.scale))

# %% [markdown]
# Whatever the mean and the standard deviation of `x`, those of `y` are the bias and the
# scale. `jbn.batch_norm` also returns the running statistics, which are explained
# below.
#
# ## Backward
#
# Write $\langle\cdot\rangle$ for the mean over the rows. Vary $x$ by $\dot x$:
#
# $$\dot\mu = \langle\dot x\rangle, \qquad
# \dot{(\sigma^2)} = 2\langle (x-\mu)\,\dot x\rangle, \qquad
# \dot r = -\tfrac12 r^3\, \dot{(\sigma^2)} = -r^2 \langle\hat x\,\dot x\rangle .$$
#
# Then, by the product rule, and with $x - \mu = \hat x / r$,
#
# $$\dot{\hat x} = r\,(\dot x - \dot\mu) + (x-\mu)\,\dot r
# = r\,\bigl(\dot x - \langle\dot x\rangle -
# \hat x\,\langle\hat x\,\dot x\rangle\bigr).$$
#
# As a matrix over the rows this is
# $r\,(I - \tfrac1n \mathbf 1\mathbf 1^\top - \tfrac1n \hat x\hat x^\top)$. It is
# symmetric, and the backward pass applies the transpose, so it has the same form. For
# a cotangent $dy = \partial L/\partial y$,
#
# $$dx = r\,\gamma\,\bigl(dy - \langle dy\rangle -
# \hat x\,\langle\hat x\,dy\rangle\bigr), \qquad
# d\gamma = \sum \hat x\, dy, \qquad d\beta = \sum dy .$$
#
# No step used $\langle\hat x^2\rangle = 1$, which $\epsilon$ makes slightly false:
# the formula is exact for any $\epsilon$. In words: the gradient loses its mean over
# the batch, and its component along $\hat x$.


# %%
def backward(x, scale, dy, epsilon=1e-5):
    mean = x.mean(0)
    rstd = 1 / jnp.sqrt(((x - mean) ** 2).mean(0) + epsilon)
    xh = (x - mean) * rstd
    dx = rstd * scale * (dy - dy.mean(0) - xh * (xh * dy).mean(0))
    return dx, (xh * dy).sum(0), dy.sum(0)


def ours(x, scale, bias):
    params = jbn.Params(scale, bias)
    return jbn.batch_norm(x, params, None, use_running_average=False)[0]


@functools.partial(jax.jit, static_argnums=0)
def pullback(f, x, scale, bias, dy):
    return jax.vjp(f, x, scale, bias)[1](dy)


x64, dy = rng.normal(3, 2, (64, 32)), rng.normal(size=(64, 32))
scale, bias = rng.uniform(0.5, 2, 32), rng.normal(size=32)
jax.config.update("jax_enable_x64", True)
derived, autodiff, rule = jax.device_get(
    (
        jax.jit(backward)(x64, scale, dy),
        pullback(by_hand, x64, scale, bias, dy),
        pullback(ours, x64, scale, bias, dy),
    )
)
jax.config.update("jax_enable_x64", False)

assert derived[0].dtype == np.float64
print("largest difference from autodiff:")
names = "dx", "dscale", "dbias"
for name, a, b, c in zip(names, derived, autodiff, rule, strict=True):
    print(f"    {name:7} derived {abs(a - b).max():.0e}, jbn {abs(c - b).max():.0e}")
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(c, b, rtol=1e-10, atol=1e-12)

# %% [markdown]
# For a random cotangent, the formula, autodiff of the plain code, and jbn's rule agree
# to float64 precision.
#
# ### Common errors
#
# A common error is to treat mean and variance as constants, so that $dx = r\gamma\,dy$.
# Others are a term that is missing, has the wrong sign, or is divided by $n-1$. The
# gradient of `y.sum()`, a popular check, detects hardly any of them. With $dy = 1$
# everywhere, $dy - \langle dy\rangle = 0$ and $\langle\hat x\rangle = 0$: the right
# answer is zero, and most wrong formulas also give zero.

# %%
WRONG = {
    "mean and variance constant": lambda xh, r, s, dy: r * s * dy,
    "variance constant": lambda xh, r, s, dy: r * s * (dy - dy.mean(0)),
    "mean constant": lambda xh, r, s, dy: r * s * (dy - xh * (xh * dy).mean(0)),
    "variance term added": lambda xh, r, s, dy: (
        r * s * (dy - dy.mean(0) + xh * (xh * dy).mean(0))
    ),
    "n - 1 in the variance term": lambda xh, r, s, dy: (
        r * s * (dy - dy.mean(0) - xh * (xh * dy).sum(0) / (len(xh) - 1))
    ),
    "scale forgotten": lambda xh, r, s, dy: (
        r * (dy - dy.mean(0) - xh * (xh * dy).mean(0))
    ),
    "multiplied by the deviation": lambda xh, r, s, dy: (
        s / r * (dy - dy.mean(0) - xh * (xh * dy).mean(0))
    ),
}
rstd = 1 / np.sqrt(x64.var(0) + 1e-5)
xh = (x64 - x64.mean(0)) * rstd
right = rstd * scale * (dy - dy.mean(0) - xh * (xh * dy).mean(0))

print(f"{'error in dx (batch of 64)':30}{'y.sum()':>12}{'random dy':>12}")
for name, formula in WRONG.items():
    of_sum = abs(formula(xh, rstd, scale, np.ones_like(dy))).max()
    off = np.linalg.norm(formula(xh, rstd, scale, dy) - right) / np.linalg.norm(right)
    seen = "found" if of_sum > 1e-9 else "passes"
    print(f"{name:30}{seen:>12}{off:>11.1%}")
    assert off > 1e-4
    assert (seen == "found") == (
        name in ("mean and variance constant", "mean constant")
    )

# %% [markdown]
# Only the two formulas without the mean's term fail the check by `y.sum()`; the other
# five pass it, although their gradients are wrong. A random cotangent detects all
# seven.
#
# Constant statistics look harmless here: they keep two of 64 directions that should be
# removed, so that for random $dy$ the error is about $\sqrt{2/n}$, 18 % at $n = 64$.
# But in these two directions the output of batch norm cannot change at all, and a
# network has several layers. The [next notebook](effects.ipynb) measures the error in
# ten layers.
#
# ## Running statistics
#
# In training each row is normalized by its batch. At inference the output should only
# depend on the row itself, so mean and variance come from an average over training
# batches:
#
#     running = momentum * running + (1 - momentum) * batch
#
# which starts at mean 0 and variance 1. A batch from $k$ steps ago has the weight
# $(1-m)\,m^k$. Two things follow. The weight of the initial values decays like $m^t$,
# with a time constant of about $1/(1-m)$ steps. And where the statistics change
# (because earlier layers are learning), the average lags $m/(1-m)$ steps behind.

# %%
STEPS = 400
momenta = jnp.array([0.9, 0.99, 0.999])
noise = 2 * jax.random.normal(jax.random.key(0), (STEPS, 64, 1))


@functools.partial(jax.jit, static_argnames="debias")
def follow(batches, momentum, debias=False):
    """The running mean after each batch."""

    def step(stats, batch):
        stats = jbn.update_batch_stats(stats, jbn.moments(batch), momentum=momentum)
        return stats, stats.mean[0]

    return jax.lax.scan(step, jbn.init(1, track_weight=debias)[1], batches)[1]


t = np.arange(1, STEPS + 1)
fixed, moving = np.full(STEPS, 3.0), 3 + 0.01 * t
fig, axes = plt.subplots(1, 2, sharey=True)
for ax, target, title in zip(
    axes,
    (fixed, moving),
    ("batches of mean 3", "batches whose mean grows"),
    strict=True,
):
    batches = jnp.asarray(target, jnp.float32)[:, None, None] + noise
    plain = jax.vmap(lambda m, b=batches: follow(b, m))(momenta)
    debiased = follow(batches, momenta[1], debias=True)
    ax.plot(t, target, color="black", lw=1)
    for mean, color in zip(plain, (GREEN, BLUE, GRAY), strict=True):
        ax.plot(t, mean, color=color)
    ax.plot(t, debiased, color=ORANGE, ls="--")
    ax.set(title=title, xlabel="step", xlim=(0, STEPS))
    if target is fixed:
        expected = 3 * (1 - np.asarray(momenta, np.float64)[:, None] ** t)
        np.testing.assert_allclose(plain, expected, atol=0.3)
    else:
        behind = (moving[-1] - debiased[-1]) / 0.01
        print(f"momentum 0.99, debiased: {behind:.0f} steps behind at step {STEPS}")
        assert 70 < behind < 130
axes[0].set_ylabel("running mean")
for where, name, color in (
    ((38, 2.45), "momentum 0.9", GREEN),
    ((110, 1.5), "0.99", BLUE),
    ((250, 0.2), "0.999", GRAY),
    ((150, 3.4), "0.99, debiased", ORANGE),
):
    axes[0].text(*where, name, color=color)
plt.show()

# %% [markdown]
# At 0.99 a third of the running mean is still the initial value after 110 steps
# ($0.99^{110} = 0.33$). Debiasing (`jbn.init(..., track_weight=True)`, or `debias=True`
# in a layer) divides by the total weight of the batches. This removes the initial
# value, but not the lag: on the right it ends up as far behind as the plain average.
#
# ## A network
#
# The multilayer perceptron of two hidden layers of 64 units, each followed by ReLU
# and batch norm, with Adam at batch 64 for five epochs: on the digits that come with
# the package (64-64-64-10), then on MNIST (784-64-64-10).

# %%
import tempfile
from pathlib import Path

from jbn.training.data import load_dataset


with tempfile.TemporaryDirectory() as folder:
    digits = load_dataset("digits", data_dir=Path(folder))
print(digits.train.image.shape, digits.test.image.shape, digits.train.image.dtype)

# %% [markdown]
# A training step takes the parameters and the running statistics, and returns both.
# The statistics have no gradient: they are an auxiliary output of the loss function.


# %%
import optax


optimizer = optax.adam(1e-3)


def train_step(model, state, images, labels):
    params, batch_stats, opt_state = state

    def loss_fn(params):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return loss.mean(), updated["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state)
    return (optax.apply_updates(params, updates), batch_stats, opt_state), loss


@functools.partial(jax.jit, static_argnums=0)
def train_epoch(model, state, images, labels, indices):
    """All the steps of an epoch, in one compiled loop."""
    step = lambda state, rows: train_step(model, state, images[rows], labels[rows])
    return jax.lax.scan(step, state, indices)


@functools.partial(jax.jit, static_argnums=0)
def accuracy(model, variables, images, labels):
    logits = model.apply(variables, images, train=False)
    return (logits.argmax(-1) == labels).mean()


def fit(model, data, *, seed, epochs=5, batch_size=64):
    """Trains; returns the variables and the test accuracy after each epoch."""
    train, test = jax.tree.map(
        jnp.asarray,
        [(split.image, split.label) for split in (data.train, data.test)],
    )
    variables = model.init(jax.random.key(seed), train[0][:1], train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]
    state, found = (params, batch_stats, optimizer.init(params)), []
    rng = np.random.default_rng(seed)
    steps = len(train[0]) // batch_size  # The few rows that are left over are dropped.
    for _ in range(epochs):
        rows = rng.permutation(len(train[0]))[: steps * batch_size]
        state, _ = train_epoch(model, state, *train, rows.reshape(steps, batch_size))
        variables = {"params": state[0], "batch_stats": state[1]}
        found.append(float(accuracy(model, variables, *test)))
    return variables, found


# %% [markdown]
# Flax's default momentum is 0.99. An epoch of the digits is 22 steps, so five epochs
# are 110 steps, little more than one time constant. The parameters are the same for any
# momentum, since training never reads the running statistics. Only the evaluation
# differs.

# %%
from jbn import tools
from jbn.models import MLP


norm = functools.partial(jbn.BatchNorm, momentum=0.99)
models = {
    "0.9": MLP(norm=functools.partial(jbn.BatchNorm, momentum=0.9)),
    "0.99": MLP(norm=norm),
    "0.99, debiased": MLP(norm=functools.partial(norm, debias=True)),
}
SEEDS = 3
runs = {
    name: [fit(model, digits, seed=seed) for seed in range(SEEDS)]
    for name, model in models.items()
}
for name in models:
    jax.tree.map(
        np.testing.assert_array_equal,
        runs[name][0][0]["params"],
        runs["0.9"][0][0]["params"],
    )

# Recalibration: one pass over the training images, with the parameters as they are.
images = jnp.asarray(digits.train.image)
recalibrated = []
for seed in range(SEEDS):
    again = tools.recalibrate(
        lambda v, x: models["0.99"].apply(v, x, train=True, mutable=["batch_stats"]),
        runs["0.99"][seed][0],
        [images[i : i + 64] for i in range(0, len(images), 64)],
    )
    recalibrated.append(
        float(accuracy(models["0.99"], again, digits.test.image, digits.test.label))
    )
curves = {name: np.mean([curve for _, curve in runs[name]], 0) for name in models}
final = {name: curve[-1] for name, curve in curves.items()}
final["0.99, recalibrated"] = np.mean(recalibrated)
for name, value in final.items():
    print(f"{name:20} test accuracy {value:.1%} (mean of {SEEDS} seeds)")
assert final["0.99"] < final["0.9"] - 0.02
assert final["0.99, recalibrated"] > final["0.99"] + 0.02

fig, ax = plt.subplots(figsize=(6, 3))
for (name, curve), style in zip(
    curves.items(),
    ({"color": GREEN}, {"color": BLUE}, {"color": ORANGE, "ls": "--"}),
    strict=True,
):
    ax.plot(range(1, 6), 100 * curve, "o", **{"ls": "-"} | style, label=name)
ax.plot(5, 100 * final["0.99, recalibrated"], "k*", ms=11, label="0.99, recalibrated")
ax.set(xlabel="epoch", ylabel="test accuracy (%)", xticks=range(1, 6))
ax.legend(title="momentum", loc="lower right")
plt.show()

# %% [markdown]
# With momentum 0.99 the network looks worse than it is. Nothing is wrong with its
# parameters: a debiased average, a shorter one, or statistics recomputed in one pass
# over the training images all give the same accuracy. As a rule of thumb,
# `1 / (1 - momentum)` should be well below the number of training steps.
#
# On MNIST five epochs are 4,685 steps, and 0.99 is short enough.


# %%
from jbn.training.data import Dataset, InMemory
from jbn.training.errors import UsageError
from jbn.training.idx import read_idx


def load_mnist():
    """MNIST of `shared/data/mnist`, here or in a folder above; else downloaded."""
    here = Path.cwd()
    for folder in (parent / "shared/data/mnist" for parent in (here, *here.parents)):
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            splits = (
                InMemory(
                    read_idx(folder / f"{name}-images-idx3-ubyte.gz")[..., None],
                    read_idx(folder / f"{name}-labels-idx1-ubyte.gz").astype(np.int32),
                )
                for name in ("train", "t10k")
            )
            return Dataset("mnist", "0123456789", (28, 28, 1), *splits)
    with tempfile.TemporaryDirectory() as folder:
        return load_dataset("mnist", data_dir=Path(folder))


try:
    mnist = load_mnist()
except UsageError:
    print("Skipped: MNIST is not here, and cannot be downloaded.")
else:
    _, curve = fit(models["0.99"], mnist, seed=0)
    print("test accuracy by epoch:", " ".join(f"{value:.2%}" for value in curve))
    assert curve[-1] > 0.965


# %% [markdown]
# ## Training and inference
#
# One network, the one trained on the digits, evaluated on the test images in both
# modes: by the running statistics, and by the statistics of test batches of different
# sizes.

# %%
model, variables = models["0.9"], runs["0.9"][0][0]
test_images, test_labels = digits.test.image, digits.test.label


@jax.jit
def accuracy_in_training_mode(images, labels):
    def one(batch):
        logits, _ = model.apply(
            variables, batch[0], train=True, mutable=["batch_stats"]
        )
        return (logits.argmax(-1) == batch[1]).mean()

    return jax.lax.map(one, (images, labels)).mean()


inference = float(accuracy(model, variables, test_images, test_labels))
orders = {
    "classes mixed": np.random.default_rng(0).permutation(len(test_labels)),
    "sorted by class": np.argsort(test_labels, kind="stable"),
}
SIZES = (2, 6, 18, 60, 180)
fig, ax = plt.subplots(figsize=(6, 3))
print(f"inference: {inference:.1%}")
for (name, order), color in zip(orders.items(), (BLUE, ORANGE), strict=True):
    found = [
        float(
            accuracy_in_training_mode(
                test_images[order].reshape(-1, size, 8, 8, 1),
                test_labels[order].reshape(-1, size),
            )
        )
        for size in SIZES
    ]
    print(
        f"{name}:",
        ", ".join(f"{v:.1%} in {n}s" for v, n in zip(found, SIZES, strict=True)),
    )
    ax.semilogx(SIZES, 100 * np.array(found), "o-", color=color, label=name)
    assert found[0] < inference - 0.2
ax.axhline(100 * inference, color="black", lw=1)
ax.text(2, 100 * inference + 2, "inference mode")
ax.set(
    xlabel="rows of a batch, in training mode",
    ylabel="test accuracy (%)",
    ylim=(0, 105),
)
ax.set_xticks(SIZES, SIZES)
ax.minorticks_off()
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# In training mode the output for an image depends on the other images of its batch. In
# large batches of all classes this does no harm. In batches of two, or of one class, it
# does: the mean that is subtracted contains what these images have in common. Training
# mode at inference is no fix for bad running statistics; recalibration is.
