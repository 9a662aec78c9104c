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
# # What batch norm does to a network
#
# Gradients, the loss surface, learning rates, cost, dropout and weight decay, each
# measured with and without batch norm in a network of ten layers.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jbn-team/jbn/blob/main/notebooks/effects.ipynb)
#
# ![Gradients by layer, with and without batch norm](https://raw.githubusercontent.com/jbn-team/jbn/main/docs/notebooks/effects.png)

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
# ## The network
#
# A plain network of ten hidden layers of 64 units classifies the 8x8 digits that come
# with the package. Its layers are in the order of the paper: product, batch norm, ReLU.
# Without batch norm, a bias takes its place. Both start from the same Gaussian weights,
# with the variance 2 / 64 that suits ReLU (He et al., 2015) times the square of a
# `gain`.

# %%
import functools
import tempfile
from pathlib import Path

import optax

from jbn.training.data import load_dataset


DEPTH, WIDTH = 10, 64
with tempfile.TemporaryDirectory() as folder:
    digits = load_dataset("digits", data_dir=Path(folder))


def pixels(split):
    return jnp.asarray(split.image.reshape(len(split), -1), jnp.float32) / 255


center, spread = pixels(digits.train).mean(), pixels(digits.train).std()
X, X_test = ((pixels(s) - center) / spread for s in (digits.train, digits.test))
labels, labels_test = (jnp.asarray(s.label) for s in (digits.train, digits.test))


@functools.partial(jax.jit, static_argnames="depth")
def init(key, *, depth=DEPTH, gain=1.0):
    """All hidden layers stacked, so that `lax.scan` goes through them."""
    hidden, out = jax.random.split(key)
    norms, _ = jbn.init((depth, WIDTH))
    return {
        "w": gain
        * (2 / WIDTH) ** 0.5
        * jax.random.normal(hidden, (depth, WIDTH, WIDTH)),
        "norm": norms,
        "out": jax.random.normal(out, (WIDTH, 10)) / WIDTH**0.5,
    }


def by_hand(x, scale, bias, epsilon=1e-5):
    mean = x.mean(0)
    var = ((x - mean) ** 2).mean(0)
    return scale * (x - mean) / jnp.sqrt(var + epsilon) + bias


def normed(z, p):
    return jbn.batch_norm(z, p, None, use_running_average=False)[0]


def plain(z, p):
    return z + p.bias


def constant(z, p):
    """Batch norm whose gradient treats mean and variance as constants."""
    mean, var = jax.lax.stop_gradient((z.mean(0), z.var(0)))
    return p.scale * (z - mean) * jax.lax.rsqrt(var + 1e-5) + p.bias


def loss_fn(p, x, y, norm):
    def layer(x, p):
        w, norm_params = p
        return jax.nn.relu(norm(x @ w, norm_params)), None

    x, _ = jax.lax.scan(layer, x, (p["w"], p["norm"]))
    return optax.softmax_cross_entropy_with_integer_labels(x @ p["out"], y).mean()


value_and_grad = jax.jit(jax.value_and_grad(loss_fn), static_argnums=3)


def layer_norms(w):
    return jnp.sqrt((w**2).sum((1, 2)))


# %% [markdown]
# ## Gradients
#
# Without batch norm, each layer multiplies the gradient by the scale of its weights.
# With batch norm, the scale only affects the layer itself: if a weight is multiplied by
# a factor, its gradient is divided by it.

# %%
batch = X[:256], labels[:256]
gains = {0.5: BLUE, 1.0: GREEN, 2.0: ORANGE}
layers = np.arange(1, DEPTH + 1)
by_layer = {
    (norm, gain): np.asarray(
        layer_norms(
            value_and_grad(init(jax.random.key(0), gain=gain), *batch, norm)[1]["w"]
        )
    )
    for norm in (plain, normed)
    for gain in gains
}
p = init(jax.random.key(0))
right, wrong = (value_and_grad(p, *batch, norm)[1]["w"] for norm in (normed, constant))
off = np.asarray(layer_norms(wrong - right) / layer_norms(right))

fig, axes = plt.subplots(1, 3)
axes[1].sharey(axes[0])
for (norm, gain), norms in by_layer.items():
    ax = axes[int(norm is normed)]
    ax.semilogy(layers, norms, color=gains[gain], label=f"gain {gain}")
axes[2].plot(layers, 100 * off, color="black")
axes[0].set(title="without batch norm", ylabel="norm of the gradient")
axes[1].set(title="with batch norm")
axes[1].legend(loc="lower left", reverse=True)
axes[2].set(title="statistics as constants", ylabel="error of the gradient (%)")
axes[2].set_ylim(0)
for ax in axes:
    ax.set(xlabel="layer", xticks=(1, 5, 10))
plt.show()

ratio = {norm: by_layer[norm, 2.0] / by_layer[norm, 0.5] for norm in (plain, normed)}
np.testing.assert_allclose(ratio[normed], 1 / 4, rtol=0.02)
assert ratio[plain].min() > 1e4
growth = (by_layer[normed, 1.0][0] / by_layer[normed, 1.0][-1]) ** (1 / (DEPTH - 1))
print("norm of the first layer's gradient, gain 2 over gain 0.5:")
print(f"    {ratio[plain][0]:.0f} without, {ratio[normed][0]:.3f} with batch norm")
print(f"with: grows {growth:.2f} times a layer, from the last to the first")
print(f"mean and variance constant: {off.min():.0%} to {off.max():.0%} off, by layer")
assert off.min() > 0.5

# %% [markdown]
# Batch norm does not make the gradients of all layers equal. They grow from the last
# layer to the first, at any gain: in deep networks without skip connections, batch norm
# itself causes exploding gradients (Yang et al.,
# [2019](https://arxiv.org/abs/1902.08129)). A well initialized network without it (gain
# 1) has more even gradients. The benefit of batch norm is that the gradients do not
# depend on the initial scale.
#
# On the right, the gradient treats mean and variance as constants, a common error in
# hand-written backward passes: the error is about as large as the gradient.
#
# ## Loss surface
#
# Santurkar et al. ([2018](https://arxiv.org/abs/1805.11604)) argue that batch norm
# helps because it makes the loss smoother. They measured how the loss varies along the
# direction of the gradient during training, and how much the gradient itself changes.
# Here is the same for the ten layers: at each step of gradient descent at learning rate
# 0.1, the loss and the gradient of the batch after steps of half to four times that
# rate.


# %%
def batches_of(seed, steps, batch_size=64):
    """Rows of `steps` batches, epoch by epoch."""
    rng = np.random.default_rng(seed)
    per_epoch = len(X) // batch_size
    epochs = [
        rng.permutation(len(X))[: per_epoch * batch_size].reshape(per_epoch, -1)
        for _ in range(-(-steps // per_epoch))
    ]
    return jnp.asarray(np.concatenate(epochs)[:steps])


def sgd(p, grads, learning_rate):
    return jax.tree.map(lambda p, g: p - learning_rate * g, p, grads)


@functools.partial(jax.jit, static_argnums=1)
def probe(p, norm, rows, rate):
    """Trains; at each step, looks along the gradient, half to four steps far."""

    def step(p, rows):
        at = lambda p: jax.value_and_grad(loss_fn)(p, X[rows], labels[rows], norm)
        _, grads = at(p)
        losses, there = jax.lax.map(
            lambda far: at(sgd(p, grads, far * rate)),
            jnp.geomspace(0.5, 4, 6),
        )
        difference = lambda g: optax.tree.norm(jax.tree.map(jnp.subtract, g, grads))
        change = jax.vmap(difference)(there) / optax.tree.norm(grads)
        return sgd(p, grads, rate), (losses, change, layer_norms(grads["w"]))

    return jax.lax.scan(step, p, rows)[1]


NORMS = {"without": (plain, ORANGE), "with": (normed, BLUE)}
rows = batches_of(0, 150)
fig, axes = plt.subplots(1, 3)
median_range = {}
print(
    "medians over the steps   range of loss   change of gradient / norm   swing of norm"
)
for rate in (0.1, 0.02):
    for name, (norm, color) in NORMS.items():
        losses, change, norms = jax.tree.map(
            np.asarray, probe(init(jax.random.key(0)), norm, rows, rate)
        )
        span = median_range[rate, name] = np.median(np.ptp(losses, 1))
        swing = np.exp(np.median(np.abs(np.diff(np.log(norms[:, 0])))))
        print(
            f"rate {rate:<4}, {name:8}{span:19.2f}{np.median(change.max(1)):22.2f}"
            f"{swing:21.2f}x"
        )
        if rate == 0.1:
            for ax, found in zip(axes, (losses, change), strict=False):
                ax.fill_between(
                    range(len(rows)),
                    found.min(1),
                    found.max(1),
                    color=color,
                    alpha=0.6,
                    lw=0,
                    label=f"{name} batch norm",
                )
            axes[2].semilogy(norms[:, 0], color=color, lw=1)
assert median_range[0.1, "without"] > 3 * median_range[0.1, "with"]
for ax, title in zip(
    axes,
    ("loss", "change of gradient / its norm", "norm of gradient, layer 1"),
    strict=True,
):
    ax.set_title(title, fontsize=10)
    ax.set(xlabel="step", yscale="log")
axes[2].set_yticks((0.3, 1, 3), ("0.3", "1", "3"))
axes[2].minorticks_off()
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# The measurement agrees with theirs. With batch norm the loss varies less along the
# gradient; the gradient changes by about its own norm, and by several times that
# without; and the norm of the first layer's gradient swings less from step to step.
# This holds at a rate of 0.1, near which the network without batch norm becomes
# unstable, and at 0.02. One caution: the parameters of the two networks have different
# meanings, so this compares training at the same learning rate, not two surfaces over
# the same distance.
#
# ## Learning rates
#
# Ten epochs of gradient descent, without momentum, at each of seven learning rates,
# from one seed.

# %%
RATES = np.geomspace(1e-2, 1e1, 7).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def train_at(norm, p, rates, rows):
    """The losses of gradient descent at each learning rate."""

    def train(rate):
        def step(p, rows):
            loss, grads = jax.value_and_grad(loss_fn)(p, X[rows], labels[rows], norm)
            return sgd(p, grads, rate), loss

        return jax.lax.scan(step, p, rows)[1]

    return jax.lax.map(train, rates)


rows = batches_of(0, 220)
fig, ax = plt.subplots(figsize=(6, 3))
last = {}
for name, (norm, color) in NORMS.items():
    # Of the last epoch. What has diverged is drawn at the top.
    loss = last[name] = np.asarray(train_at(norm, p, RATES, rows))[:, -22:].mean(1)
    ax.loglog(RATES, loss, "o-", color=color, label=f"{name} batch norm")
    diverged = RATES[~np.isfinite(loss)]
    ax.loglog(diverged, np.full_like(diverged, 6), "x", color=color)
    best = np.nanargmin(loss)
    print(
        f"{name:8} best loss {loss[best]:.3f} at {RATES[best]:.3g}; below 0.5 up to a"
        f" rate of {RATES[loss < 0.5].max():.3g}"
    )
ax.text(RATES[-1], 6, "  diverged", va="center", color=ORANGE)
ax.set(xlabel="learning rate", ylabel="training loss", xlim=(None, 30))
ax.legend(loc="lower right")
plt.show()
usable = {name: RATES[loss < 0.5].max() for name, loss in last.items()}
assert usable["with"] > 3 * usable["without"]

# %% [markdown]
# Batch norm widens the range of rates that work, by more than a factor of ten at its
# upper end. One reason is explained under "Weight decay": too long a step makes the
# weights longer, so the next steps turn them less. Batch norm does not improve the best
# loss here: ten well initialized layers do not need it at a suitable rate, and at the
# smallest rates the network without it is ahead.
#
# ## Cost
#
# The forward and the backward pass of one layer on 256 rows, with batch norm and with
# a bias in its place. Multiplying $n$ rows by a matrix of $w^2$ weights takes work
# proportional to $n w^2$, and batch norm work proportional to $n w$: the wider a layer,
# the smaller the share of batch norm. XLA's count of operations shows this. The times
# (the shortest of 40) also include memory access, and vary on a busy machine.


# %%
import time


rng = np.random.default_rng(0)


def block(norm):
    """The gradient of a layer: product, batch norm or bias, ReLU."""

    def loss(x, w, p):
        return (jax.nn.relu(norm(x @ w, p)) ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2)))


def seconds(f, *args):
    start = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - start


print("layer, 256 rows   without        with   ratio   operations, ratio")
more_work = []
for width in (64, 1024):
    args = (
        jnp.asarray(rng.normal(size=(256, width)), jnp.float32),
        jnp.asarray(rng.normal(size=(width, width)) / width**0.5, jnp.float32),
        jbn.init(width)[0],
    )
    blocks = [block(norm).lower(*args).compile() for norm in (plain, normed)]
    # In turns, so that a machine that gets busy is so for both; the first warms up.
    times = np.array([[seconds(f, *args) for f in blocks] for _ in range(41)])[1:]
    without, with_ = 1e3 * times.min(0)
    operations = [f.cost_analysis()["flops"] for f in blocks]
    more_work.append(operations[1] / operations[0])
    print(
        f"width {width:5}{without:11.2f} ms{with_:9.2f} ms{with_ / without:8.2f}"
        f"{more_work[-1]:20.3f}"
    )
assert 1 < more_work[1] < more_work[0]


def saved(f):
    """Bytes per element saved for the backward pass, without the output."""
    z, p = jnp.ones((4096, 16)), jbn.init(16)[0]
    y, vjp = jax.vjp(jax.jit(f), z, p)
    leaves = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(vjp)}
    leaves.pop(y.unsafe_buffer_pointer(), None)
    return sum(leaf.nbytes for leaf in leaves.values() if leaf.size >= z.size) / z.size


SAVED = {
    "bias, ReLU": lambda z, p: jax.nn.relu(plain(z, p)),
    "batch norm by hand, ReLU": lambda z, p: jax.nn.relu(by_hand(z, *p)),
    "jbn, ReLU": lambda z, p: jax.nn.relu(normed(z, p)),
    "jbn, ReLU in the layer": lambda z, p: jbn.batch_norm(
        z, p, None, use_running_average=False, activation=jax.nn.relu
    )[0],
}
SAVED = {name: saved(f) for name, f in SAVED.items()}
print("\nbytes per element saved for the backward pass, float32")
for name, value in SAVED.items():
    print(f"    {name:26}{value:4.0f}")
assert SAVED["jbn, ReLU in the layer"] <= SAVED["bias, ReLU"] < SAVED["jbn, ReLU"]
assert SAVED["jbn, ReLU"] < SAVED["batch norm by hand, ReLU"]

# %% [markdown]
# For batch norm written by hand, autodiff saves several arrays of the size of the
# input. jbn's rule only saves the input, 4 bytes per element in float32, also with the
# ReLU in the layer. That is less than a ReLU after a bias saves.
#
# ## Dropout
#
# Dropout at rate $q$ divides the units that it keeps by $1-q$. This preserves the mean,
# but not the variance: in training, a unit of mean $m$ and variance $v$ has the
# variance
#
# $$\frac{v + m^2}{1-q} - m^2 .$$
#
# The running variance of a batch norm after it has this value. At inference there is no
# dropout, so the norm is applied to units of variance $v$ (Li et al.,
# [2018](https://arxiv.org/abs/1801.05134)). Three layers of product, ReLU and batch
# norm are trained on the digits, with dropout before each norm, or after the last one.


# %%
def forward(p, stats, x, *, train, momentum=0.9, key=None, rate=0.0, before=False):
    """Logits and running statistics. `before`: dropout before each norm."""
    keys = jax.random.split(jax.random.key(0) if key is None else key, 4)

    def dropout(h, key, here):
        keep = jax.random.bernoulli(key, 1 - rate, h.shape)
        return jnp.where(here, jnp.where(keep, h / (1 - rate), 0), h)

    def layer(x, p):
        w, norm_params, stats, key = p
        h = dropout(jax.nn.relu(x @ w), key, before)
        return jbn.batch_norm(
            h, norm_params, stats, use_running_average=not train, momentum=momentum
        )

    x, stats = jax.lax.scan(layer, x, (p["w"], p["norm"], stats, keys[1:]))
    return dropout(x, keys[0], jnp.logical_not(before)) @ p["out"], stats


@jax.jit
def with_dropout(p, rate, before, rows):
    """Accuracies, and the variance in training by that without dropout."""

    def step(carry, inputs):
        p, stats = carry
        rows, key = inputs

        def loss_fn(p):
            logits, new = forward(
                p, stats, X[rows], train=True, key=key, rate=rate, before=before
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return loss.mean(), new

        grads, stats = jax.grad(loss_fn, has_aux=True)(p)
        return (sgd(p, grads, 0.1), stats), None

    start = p, jbn.init((3, WIDTH))[1]
    keys = jax.random.split(jax.random.key(1), len(rows))
    (p, stats), _ = jax.lax.scan(step, start, (rows, keys))
    # Recalibrated: all training images as one batch, without dropout.
    _, fresh = forward(p, stats, X, train=True, momentum=0.0)

    def accuracy(stats):
        logits, _ = forward(p, stats, X_test, train=False)
        return (logits.argmax(1) == labels_test).mean()

    found = jax.lax.map(accuracy, jax.tree.map(lambda *s: jnp.stack(s), stats, fresh))
    h = jax.nn.relu(X @ p["w"][0])
    mean, var = h.mean(0), h.var(0)
    formula = ((var + mean**2) / (1 - rate) - mean**2).sum() / var.sum()
    return found, stats.var.sum(1) / fresh.var.sum(1), formula


print(
    "                                variance, training / inference      test accuracy"
)
print(f"{'dropout':24}rate   layer 1 (formula)  layer 2  layer 3   as is  recalibrated")
shallow = init(jax.random.key(0), depth=3)
rows = batches_of(0, 330)
for before in (False, True):
    for rate in (0.25, 0.5, 0.75):
        (as_is, fresh), shift, formula = with_dropout(shallow, rate, before, rows)
        where = "before each norm" if before else "after the last norm"
        formula = formula if before else 1.0
        print(
            f"{where:22}{rate:6}{shift[0]:10.2f} ({formula:.2f})"
            f"{shift[1]:12.2f}{shift[2]:9.2f}{as_is:9.1%}{fresh:14.1%}"
        )
        np.testing.assert_allclose(shift[0], formula, rtol=0.2)
        if before:
            assert shift.min() > 1.05
        else:
            np.testing.assert_allclose(shift, 1, atol=0.15)

# %% [markdown]
# The shift occurs in each layer, and in the first it agrees with the formula. Its cost
# depends on the rate: almost nothing at a quarter, almost everything at three quarters.
# Recalibration without dropout (`jbn.tools.recalibrate`) recovers part of it. After the
# last norm, dropout shifts nothing and costs no accuracy here at any rate: put it
# there.
#
# ## Weight decay
#
# Batch norm removes the scale of its input. If the weights before it are multiplied by
# $a > 0$, the loss does not change, and its gradient is divided by $a$. It follows (van
# Laarhoven, [2017](https://arxiv.org/abs/1706.05350)) that a step changes the direction
# of $w$, with an effective learning rate of $\eta / \|w\|^2$. Weight decay, which
# shrinks $w$, does not make the function simpler: it keeps the effective rate high.
#
# How high follows from lengths alone. The gradient is orthogonal to $w$, since the
# loss does not change along $w$, so a step of $\eta g$ makes $\|w\|^2$ larger by
# $\eta^2\|g\|^2$; decay $\lambda$ makes it smaller by $2\eta\lambda\|w\|^2$. Where
# the two are in balance, a step turns $w$ by the angle
# $\eta\|g\| / \|w\| = \sqrt{2\eta\lambda}$, whatever the loss.

# %%
a = 8.0
longer = p | {"w": p["w"].at[1].multiply(a)}
# A power of two scales without rounding; ten layers amplify what epsilon changes.
loss, grads = value_and_grad(p, *batch, normed)
loss_longer, grads_longer = value_and_grad(longer, *batch, normed)
w, g, g_longer = (np.asarray(t["w"][1]) for t in (p, grads, grads_longer))
norm = np.linalg.norm
difference = norm(g - a * g_longer) / norm(g)
cosine = (w * g).sum() / (norm(w) * norm(g))
print(
    f"loss {loss:.5f}; with the second layer's weights times {a:.0f}: {loss_longer:.5f}"
)
print(f"gradient: {a:.0f} times that of the longer weights, to {difference:.1%}")
print(f"cosine of weights and gradient: {cosine:.0e}")
np.testing.assert_allclose(loss, loss_longer, rtol=1e-3)
assert difference < 0.05
assert abs(cosine) < 1e-3


@jax.jit
def with_decay(p, decay, rows, rate=0.1):
    """Length of the second layer's weights, and how far each step turns them."""

    def step(p, rows):
        new = sgd(p, jax.grad(loss_fn)(p, X[rows], labels[rows], normed), rate)
        new["w"] -= rate * decay * p["w"]
        length = jnp.linalg.norm(p["w"][1])
        turn = p["w"][1] / length - new["w"][1] / jnp.linalg.norm(new["w"][1])
        return new, (length, jnp.linalg.norm(turn))

    return jax.lax.scan(step, p, rows)[1]


rows = batches_of(0, 1000)
fig, axes = plt.subplots(1, 2)
for decay, color in ((0.0, GREEN), (0.01, BLUE), (0.05, ORANGE)):
    length, turn = (np.asarray(v) for v in with_decay(shallow, decay, rows))
    balance = (2 * 0.1 * decay) ** 0.5
    axes[0].plot(length, color=color, label=f"decay {decay:g}")
    axes[1].semilogy(np.convolve(turn, np.ones(20) / 20, "valid"), color=color)
    print(
        f"decay {decay:<5g} length {length[0]:.2f} to {length[-1]:.2f};"
        f" turn a step at the end {turn[-200:].mean():.4f}, in balance {balance:.4f}"
    )
    if decay == 0:
        assert np.all(np.diff(length) > -1e-5)
axes[1].axhline(balance, color=ORANGE, lw=1, ls="--")
np.testing.assert_allclose(turn[-200:].mean(), balance, rtol=0.4)
axes[0].set(xlabel="step", ylabel="length of the weights", ylim=0)
axes[0].legend(loc="upper right", bbox_to_anchor=(1, 0.95))
axes[1].set(xlabel="step", ylabel="turn in a step (radians)")
plt.show()

# %% [markdown]
# Without decay the weights never get shorter, and each step turns them less. A decay of
# 0.05 shortens them until the angle is near the balance (dashed), about a hundred times
# that without decay. A decay of 0.01 does not reach it in 1,000 steps: this takes on
# the order of $1/(\eta\lambda)$ steps. All this does not apply to biases, scales and
# the output layer, which have no norm after them; here they do not decay.
