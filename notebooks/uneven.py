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
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sparse and uneven data
#
# Batch norm assumes that a batch is a large, full, random sample of one population. In
# practice rows are padding, shards have different sizes, data come from several
# sources, batches are tiny or of one class, and the test data have shifted. Each
# section shows one of these problems in a few rows or on 8x8 digits, and what jbn does
# about it. The last section is a table of all of them.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jbn-team/jbn/blob/main/notebooks/uneven.ipynb)
#
# ![Padded sequences: normalized with padding, and without](https://raw.githubusercontent.com/jbn-team/jbn/main/docs/notebooks/uneven.png)

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
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jbn


# Some accelerators round the inputs of a matrix product, which would hide what is
# compared here.
jax.config.update("jax_default_matmul_precision", "highest")
plt.rc("figure", dpi=80)
plt.rc("figure.constrained_layout", use=True)
plt.rc("axes.spines", top=False, right=False)
plt.rc("legend", frameon=False)
# Colors that color-blind people tell apart (Okabe and Ito, 2008).
ORANGE, SKY, GREEN, BLUE, RED = "#E69F00 #56B4E9 #009E73 #0072B2 #D55E00".split()
rng = np.random.default_rng(0)
in_training = functools.partial(jbn.batch_norm, use_running_average=False)

# %% [markdown]
# ## 1. Padding: `mask`
#
# Six sequences of 4 to 24 steps are padded with zeros to one shape. Without a mask the
# padding counts, and draws the mean towards zero. With a mask it does not count.

# %%
lengths = np.array([24, 15, 11, 8, 6, 4])
mask = np.arange(24) < lengths[:, None]
x = np.where(mask, rng.normal(3.0, 1.0, mask.shape), 0.0).astype(np.float32)[..., None]
params, stats = jbn.init(1)

counted, _ = in_training(x, params, stats)
masked, _ = in_training(x, params, stats, mask=mask)

figure, panels = plt.subplots(1, 3, figsize=(8, 2.3), sharey=True)
colors = plt.get_cmap("PuOr").with_extremes(bad="#DDDDDD")
for ax, values, title in zip(
    panels,
    [x - 3, counted, masked],
    ["x, less 3", "padding counts", "mask"],
    strict=True,
):
    shown = np.where(mask, np.asarray(values)[..., 0], np.nan)
    image = ax.imshow(shown, cmap=colors, vmin=-3, vmax=3, aspect="auto")
    there = shown[mask]
    ax.set_title(
        f"{title}\nmean {abs(there.mean()):.2f}, std {there.std():.2f}", fontsize=11
    )
    ax.set_xlabel("step")
panels[0].set_ylabel("sequence")
figure.colorbar(image, ax=panels, label="value")
plt.show()

# %% [markdown]
# Padding may also hold NaN: the logarithm of zero, a division by a length of zero. A
# NaN times zero is NaN, so a mask applied by multiplication lets it through.
# `flax.linen` excludes it from the statistics, but the gradients are NaN. Ours are
# those without padding:


# %%
import flax.linen as nn


def by_jbn(scale, x, mask):
    return in_training(x, params._replace(scale=scale), stats, mask=mask)[0]


def by_flax(scale, x, mask):
    variables = {"params": {"scale": scale, "bias": params.bias}}
    variables["batch_stats"] = stats._asdict()
    layer = nn.BatchNorm(use_running_average=False)
    return layer.apply(variables, x, mask=mask[..., None], mutable=["batch_stats"])[0]


def gradient_of_scale(norm, x, mask):
    loss = lambda scale: jnp.where(mask, norm(scale, x, mask)[..., 0] ** 3, 0).sum()
    return jax.grad(loss)(params.scale)[0]


poisoned = np.where(mask[..., None], x, np.nan)
steps = x[mask][:, None]  # no padding: all steps in one row after the other
expected = gradient_of_scale(by_jbn, steps, np.ones(steps.shape[:2], bool))
found = {f.__name__: gradient_of_scale(f, poisoned, mask) for f in (by_jbn, by_flax)}
print(f"gradient of the scale without padding {expected:.3f}")
print(f"with NaN in the padding: jbn {found['by_jbn']:.3f}, Flax {found['by_flax']}")
np.testing.assert_allclose(found["by_jbn"], expected, rtol=1e-4)
assert np.isnan(found["by_flax"])

# %% [markdown]
# ## 2. Packed rows: `segment_ids` and `group_weights`
#
# Packing puts sequences one after the other and needs less padding. `segment_ids` says
# which sequence a row belongs to; the padding has a separate id. With a mask each step
# counts once, so a long sequence outweighs the short ones. With `group_weights` each
# sequence counts once. (`sample_weights` does the same for padded batches.)

# %%
packed = jnp.array([0, 0, 0, 4, 2, 6, 8, 16, jnp.nan, jnp.nan])[:, None]
ids = jbn.segment_ids(jnp.array([4, 2, 1, 1]), num_rows=10)
print("ids:                       ", ids)
w = jbn.group_weights(ids, 4)
print("weights:                   ", w)
_, by_step = in_training(packed, params, stats, mask=ids < 4, momentum=0.0)
_, by_sequence = in_training(packed, params, stats, weights=w, momentum=0.0)
print("each step counts once:     ", by_step.mean)
print("each sequence counts once: ", by_sequence.mean)
np.testing.assert_allclose(by_step.mean, 36 / 8)
np.testing.assert_allclose(by_sequence.mean, (1 + 4 + 8 + 16) / 4)

# %% [markdown]
# Neither is wrong: they are the means of two populations. Counting by sequence, the
# many short ones gain and the few long ones lose
# ([measured](https://github.com/jbn-team/jbn/blob/main/docs/evidence.md)).
#
# ## 3. Each graph by itself: `graph_norm`
#
# Packed rows may also be the nodes of graphs, whose sizes and scales differ. Batch norm
# has one mean and variance for all nodes. `graph_norm` normalizes each graph by its own
# nodes, in one call and for any sizes. `mean_scale`, which is learned, leaves a share
# of a graph's mean in the output.

# %%
sizes = np.array([20, 12, 6])
ids = jbn.segment_ids(sizes, num_rows=40)  # The last two rows are padding.
center, spread = np.repeat([[0.0, 5.0, 2.0], [1.0, 2.0, 0.3]], sizes, axis=1)
nodes = np.zeros((40, 1), np.float32)
nodes[:38, 0] = rng.normal(center, spread)

together, _ = in_training(nodes, params, stats, mask=ids < 3)
alone = jbn.graph_norm(nodes, segment_ids=ids, num_segments=3)
partly = jbn.graph_norm(
    nodes, segment_ids=ids, num_segments=3, mean_scale=jnp.array([0.5])
)

figure, panels = plt.subplots(1, 4, figsize=(9, 2.4), sharex=True)
titles = ["x", "batch norm", "graph norm", "graph norm,\nmean_scale 0.5"]
for ax, values, title in zip(
    panels, [nodes, together, alone, partly], titles, strict=True
):
    for k, color in enumerate([BLUE, ORANGE, GREEN]):
        rows = np.flatnonzero(np.asarray(ids) == k)
        ax.plot(rows, np.asarray(values)[rows, 0], ".", color=color)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("node")
panels[0].set_ylabel("value")
plt.show()

moments = jbn.moments(nodes, segment_ids=ids, num_segments=3)
print("nodes of each graph:", moments.weight.ravel())
print("mean of each graph: ", moments.mean.ravel().round(2))
np.testing.assert_allclose(
    jbn.normalize(nodes, moments, segment_ids=ids)[:38], alone[:38], atol=1e-5
)

# %% [markdown]
# ## 4. Uneven and empty shards
#
# A batch is spread over four devices, which have 5, 5, 1 and 1 valid rows. (`vmap` with
# an axis name runs the program of four devices on one.) A mean of the devices' means
# counts the single row of the third device as much as the five rows of the first.


# %%
def shards(counts):
    """Values by device, padded to five rows, and their mask."""
    mask = np.arange(5) < np.array(counts)[:, None]
    values = np.array([[0, 1, 2, 1, 0], [2, 1, 0, 2, 1], [5] * 5, [6] * 5], np.float32)
    return values[..., None], mask


def mean_of_flax(values, mask):
    layer = nn.BatchNorm(use_running_average=False, axis_name="data", momentum=0.0)
    variables = {"params": params._asdict(), "batch_stats": stats._asdict()}
    _, new = layer.apply(variables, values, mask=mask[:, None], mutable=["batch_stats"])
    return new["batch_stats"]["mean"][0]


def mean_of_jbn(values, mask):
    _, new = in_training(
        values, params, stats, mask=mask, axis_name="data", momentum=0.0
    )
    return new.mean[0]


found = {}
for counts in [(5, 5, 1, 1), (5, 5, 1, 0)]:
    values, mask = shards(counts)
    found[counts] = [
        jax.vmap(f, axis_name="data")(values, mask)[0]
        for f in (mean_of_flax, mean_of_jbn)
    ]
    rows = values[mask]
    text = "mean of all rows {:.2f}, flax.linen {:.2f}, jbn {:.2f}"
    print(f"rows on the devices {counts}:", text.format(rows.mean(), *found[counts]))
    np.testing.assert_allclose(found[counts][1], rows.mean(), rtol=1e-6)
assert np.isnan(found[5, 5, 1, 0][0])

figure, ax = plt.subplots(figsize=(6.5, 2.4))
values, mask = shards((5, 5, 1, 1))
for device in range(4):
    rows = values[device][mask[device], 0]
    ax.plot(device + 0.07 * np.arange(len(rows)), rows, "o", color="#777777")
    ax.plot([device - 0.15, device + 0.45], [rows.mean()] * 2, color=ORANGE)
for mean, color, text in zip(
    found[5, 5, 1, 1],
    [ORANGE, BLUE],
    ["flax.linen:\nmean of the means", "jbn:\nmean of the rows"],
    strict=True,
):
    ax.axhline(mean, color=color, linestyle="--")
    ax.text(3.7, mean, f"{text}, {mean:.2f}", color=color, va="center")
ax.set_xticks(np.arange(4) + 0.15, [f"device {k}" for k in range(4)])
ax.set(ylabel="value", xlim=(-0.3, 3.6))
plt.show()

# %% [markdown]
# A device without rows turns Flax's statistics into NaN for good. In jbn it has no
# effect.
# [distributed.ipynb](https://github.com/jbn-team/jbn/blob/main/notebooks/distributed.ipynb)
# has more on devices.
#
# ## 5. Domains in one batch: `domain_batch_norm`
#
# A batch has rows of two sources, such as two scanners. If they are normalized
# together, most of the remaining variation is between the scanners. `domain_batch_norm`
# uses separate statistics for each, in one call and for any mixture.

# %%
domain = (rng.random(1000) < 0.2).astype(np.int32)
scans = np.where(domain == 1, rng.normal(4, 0.5, 1000), rng.normal(0, 1, 1000))
scans = scans.astype(np.float32)[:, None]
_, two_stats = jbn.init((2, 1))  # statistics of two domains; scale and bias are shared
by_domain = functools.partial(jbn.domain_batch_norm, use_running_average=False)

shared, _ = in_training(scans, params, stats)
apart, two_stats = by_domain(scans, params, two_stats, domain=domain, momentum=0.0)

figure, panels = plt.subplots(1, 2, figsize=(8, 2.3), sharex=True, sharey=True)
bins = np.linspace(-3.5, 3.5, 40)
for ax, y, title in zip(panels, [shared, apart], ["shared", "by domain"], strict=True):
    for k, color in enumerate([BLUE, ORANGE]):
        part = np.asarray(y)[domain == k, 0]
        ax.hist(part, bins, color=color, alpha=0.7, label=f"scanner {k}")
        if title == "by domain":
            np.testing.assert_allclose([part.mean(), part.std()], [0, 1], atol=1e-3)
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("y")
panels[0].set_ylabel("rows")
panels[1].legend()
plt.show()

# %% [markdown]
# A rare domain may have a single row in a batch. The row equals its mean: the output is
# zero, and its variance of zero updates the running one. `min_weight=1` normalizes such
# a row by the running statistics, and does not update them. `tau=2` adds the running
# statistics of the domain, with the weight of two rows. With `shrink_to="pooled"` these
# are the statistics of the whole batch, for a start without any of the domain; later
# the domain's own are better. Whatever `tau` is, the running statistics are updated by
# the row alone.

# %%
rare = np.array([0, 0, 0, 1], np.int32)  # one row of domain 1
values = np.array([[-1.0], [0.0], [1.0], [5.0]], np.float32)
for options in [
    dict(),
    dict(min_weight=1),
    dict(tau=2.0),
    dict(tau=2.0, shrink_to="pooled"),
]:
    y, new = by_domain(values, params, two_stats, domain=rare, momentum=0.9, **options)
    named = ", ".join(f"{k}={v}" for k, v in options.items()) or "by domain"
    print(
        f"{named:26} y of the row {y[3, 0]:5.2f}, running variance"
        f" {two_stats.var[1, 0]:.3f} -> {new.var[1, 0]:.3f}"
    )
    assert (y[3, 0] == 0) == (not options)

# %% [markdown]
# Statistics by domain do not always help. A domain may be too rare, or its mean may be
# what tells the network which domain a row is of; a separate scale and bias for each
# domain (`own_affine=True` in a module) brings that back. All of this was measured on
# digits, MNIST and CIFAR-10
# ([evidence.md](https://github.com/jbn-team/jbn/blob/main/docs/evidence.md)).
#
# ## 6. Unknown domains: shares
#
# Often the source of a row is not known, but can be guessed: by a model, or by the
# distance to what is known of each domain. A floating `domain` holds each row's shares
# in all domains. In training, a row counts in the statistics of each domain by its
# share, and gradients reach the shares. Rows are normalized by each domain, and the
# outputs mixed (`mix="output"`, mode normalization), or by the mixture of the
# statistics (`mix="stats"`).


# %%
def shares_of(x):
    """Probabilities of both scanners, by their densities and frequencies."""
    mean, var = two_stats.mean[:, 0], two_stats.var[:, 0]
    log_density = -((x - mean) ** 2) / (2 * var) - jnp.log(var) / 2
    return jax.nn.softmax(log_density + jnp.log(jnp.array([0.8, 0.2])))


between = np.linspace(-2, 5.5, 300, dtype=np.float32)[:, None]
shares = shares_of(between)
figure, panels = plt.subplots(1, 2, figsize=(8, 2.5))
panels[0].plot(between, shares[:, 0], color=BLUE, label="scanner 0")
panels[0].plot(between, shares[:, 1], color=ORANGE, label="scanner 1")
panels[0].set(xlabel="x", ylabel="share of the row")
for name, given, mix, color in [
    ("the likelier domain", shares.argmax(-1), "output", RED),
    ('shares, mix="output"', shares, "output", GREEN),
    ('shares, mix="stats"', shares, "stats", SKY),
]:
    y, _ = jbn.domain_batch_norm(
        between, params, two_stats, use_running_average=True, domain=given, mix=mix
    )
    panels[1].plot(between, y, color=color, label=name)
panels[1].set(xlabel="x", ylabel="y")
for ax, place in zip(panels, ["center left", "upper left"], strict=True):
    ax.legend(fontsize=9, loc=place)
panels[1].set_ylim(-3, 5)
plt.show()

# Statistics of both scanners, from rows whose scanner nobody has recorded.
_, guessed = by_domain(scans, params, two_stats, domain=shares_of(scans), momentum=0.0)
print("means, domains known:  ", two_stats.mean.ravel().round(3))
print("means, domains guessed:", guessed.mean.ravel().round(3))
np.testing.assert_allclose(guessed.mean, two_stats.mean, atol=0.05)

# %% [markdown]
# ## 7. Tiny batches, and batches of one class: `tau`
#
# Statistics of two rows are mostly noise. Statistics of 16 rows of one class are those
# of the class: the mean that is subtracted contains what distinguishes the class. Two
# methods use the running statistics against this: batch renormalization (Ioffe, 2017),
# and `tau=32`, where the running statistics count as 32 more rows of the batch. With n
# rows, the batch has a share of n / (n + tau).
#
# A small network learns the package's 8x8 digits, three seeds. The learning rate of
# each bar is the best of four on a held-out fifth of the training set.

# %%
import optax
from jax import lax

from jbn.training.data import load_dataset


data = load_dataset("digits")
images, labels = data.train.image, data.train.label.astype(np.int32)
cut = len(labels) * 4 // 5
train_set = jnp.asarray(images[:cut]), jnp.asarray(labels[:cut])
held_out = jnp.asarray(images[cut:]), jnp.asarray(labels[cut:])
test_set = jnp.asarray(data.test.image), jnp.asarray(data.test.label, jnp.int32)
RATES, SEEDS = np.array([3e-4, 1e-3, 3e-3, 1e-2], np.float32), 3
KINDS = {"2 rows": 2000, "16 rows of one class": 1000}  # and how many steps
members = [np.flatnonzero(labels[:cut] == c) for c in range(10)]


def draw(kind, seed):
    """Rows of each batch: (steps, rows)."""
    rng = np.random.default_rng(seed)
    if kind == "2 rows":
        return rng.integers(cut, size=(KINDS[kind], 2))
    classes = rng.integers(10, size=KINDS[kind])
    return np.stack([rng.choice(members[c], 16, replace=False) for c in classes])


class Network(nn.Module):
    """Dense, norm, ReLU; dense."""

    norm: functools.partial

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(len(x), -1).astype(jnp.float32) / 255
        x = nn.Dense(64, use_bias=False)(x)
        # One name for all, so that they start from the same variables.
        x = self.norm(name="norm")(x, use_running_average=not train)
        return nn.Dense(10)(nn.relu(x))


def network(layer, **options):
    return Network(functools.partial(layer, **options))


def make_step(model, optimizer):
    """A training step `(carry, (images, labels)) -> carry`."""

    def step(carry, batch):
        variables, opt_state = carry
        x, y = batch

        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return each.mean(), new

        grads, new = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state)
        new_params = optax.apply_updates(variables["params"], updates)
        return {"params": new_params, **new}, opt_state

    return step


def accuracy(model, variables, examples):
    x, y = examples
    return jnp.mean(model.apply(variables, x, train=False).argmax(-1) == y)


def fit(model, order, variables, rate):
    """The variables after training on batches of these rows."""
    schedule = optax.cosine_decay_schedule(rate, len(order))
    optimizer = optax.sgd(schedule, momentum=0.9)
    step = make_step(model, optimizer)
    on_rows = lambda carry, rows: (step(carry, [v[rows] for v in train_set]), None)
    carry = variables, optimizer.init(variables["params"])
    return lax.scan(on_rows, carry, order)[0][0]


keys = jax.random.split(jax.random.key(0), SEEDS)
init = functools.partial(network(jbn.BatchNorm).init, train=False)
start = jax.jit(jax.vmap(init, (0, None)))(keys, images[:2])


def search(model, orders):
    """The best rate by the images held out, and its accuracies on the test images."""

    def both(order, variables, rate):
        trained = fit(model, order, variables, rate)
        return jnp.stack([accuracy(model, trained, e) for e in (held_out, test_set)])

    over_seeds = jax.vmap(both, (0, 0, None))
    over_rates = jax.vmap(over_seeds, (None, None, 0))
    found = np.asarray(jax.jit(over_rates)(orders, start, RATES))
    best = found[..., 0].mean(-1).argmax()
    return RATES[best], 100 * found[best, :, 1]


methods = {
    "batch norm": network(jbn.BatchNorm),
    "batch renorm": network(jbn.BatchRenorm),
    "tau=32": network(jbn.BatchNorm, tau=32.0),
}
figure, panels = plt.subplots(1, 2, figsize=(8, 2.3), sharex=True, sharey=True)
for ax, kind in zip(panels, KINDS, strict=True):
    orders = np.stack([draw(kind, seed) for seed in range(SEEDS)])
    means = []
    for place, (name, model) in enumerate(methods.items()):
        rate, values = search(model, orders)
        means.append(values.mean())
        ax.barh(-place, values.mean(), color=[ORANGE, SKY, BLUE][place], alpha=0.6)
        ax.plot(values, [-place] * SEEDS, "o", color="black", markersize=4)
        ax.text(102, -place, f"{values.mean():.0f} %", va="center")
        print(f"{kind:22}{name:14}rate {rate:<7.0e}{values.mean():5.1f} %")
    assert means == sorted(means)
    ax.set_title(f"batches of {kind}", fontsize=11)
    ax.set(xlabel="test accuracy, %", xlim=(0, 100))
panels[0].set_yticks([0, -1, -2], list(methods))
plt.show()

# %% [markdown]
# `tau` appears in all that follows: it is the weight, in rows, of what was known before
# the batch. It may be a number, one per feature, a schedule, or learned;
# [a page](https://github.com/jbn-team/jbn/blob/main/docs/guides/tau.md) lists the rules
# of seven papers for this one number.
#
# ## 8. An outlier: `trim`
#
# The same network in batches of 64. In one image of one batch, one pixel is a million
# times too bright, as from a broken sensor or a wrong unit. Gradients are clipped, so
# the parameters survive, but the running statistics do not. `trim=5` excludes elements
# that are more than five running standard deviations from the mean.

# %%
GOOD, AFTER = 100, 100
rows = rng.integers(cut, size=(GOOD + 1 + AFTER, 64))
spoiled = images[rows].astype(np.float32)
spoiled[GOOD, 0, 4, 4] = 255e6


def watch(trim):
    """Test accuracy after each step."""
    model = network(jbn.BatchNorm, momentum=0.9, trim=trim)
    clip = optax.clip_by_global_norm(1.0)
    optimizer = optax.chain(clip, optax.sgd(0.05, momentum=0.9))
    step = make_step(model, optimizer)

    def and_test(carry, batch):
        carry = step(carry, batch)
        return carry, accuracy(model, carry[0], test_set)

    first = jax.tree.map(lambda v: v[0], start)
    carry = first, optimizer.init(first["params"])
    return lax.scan(and_test, carry, (spoiled, labels[rows]))[1]


trims = np.array([np.inf, 5.0], np.float32)  # an infinite limit trims nothing
untrimmed, trimmed = 100 * np.asarray(jax.jit(jax.vmap(watch))(trims))
figure, ax = plt.subplots(figsize=(7, 2.4))
for name, curve, color in [("trim=5", trimmed, BLUE), ("no trim", untrimmed, ORANGE)]:
    ax.plot(np.arange(-GOOD, AFTER + 1), curve, color=color, label=name)
    print(f"{name:8} before {curve[GOOD - 1]:.1f} %, just after {curve[GOOD]:.1f} %")
ax.axvline(0, color="#999999", linewidth=1, zorder=0)
ax.set(xlabel="steps after the outlier", ylabel="test accuracy, %", ylim=(0, 102))
ax.legend(loc=(0.2, 0.3))
plt.show()
assert trimmed[GOOD] > 90 > 30 > untrimmed[GOOD]

# %% [markdown]
# Without trimming the network is right for a tenth of the digits, as a guess would be,
# in other libraries as well as in ours.
#
# ## 9. A stream at test time: `tools.stream`
#
# A trained network meets brighter images, without labels. They come sorted by class, in
# batches of 16, so the statistics of a batch are those of a class or two. `stream`
# keeps running statistics of each class, moves those of the classes that an image is
# predicted to be of, and normalizes by the mixture of all: the further it is from the
# statistics of training, the more so.

# %%
from jbn import tools


model = network(jbn.BatchNorm, momentum=0.9)
order = rng.integers(cut, size=(400, 64))
first = jax.tree.map(lambda v: v[0], start)
trained = jax.jit(functools.partial(fit, model))(order, first, 0.03)

sorted_rows = np.argsort(data.test.label, kind="stable")[: 22 * 16]
answers = data.test.label[sorted_rows]
batches = data.test.image[sorted_rows].reshape(22, 16, 8, 8, 1).astype(np.float32)
apply = lambda v, x: model.apply(v, x, train=False, mutable=["batch_stats"])
adapter = tools.stream(apply, momentum=0.9)


by_running = lambda x: model.apply(trained, x, train=False)
by_batch = lambda x: model.apply(trained, x, train=True, mutable=["batch_stats"])[0]
methods = {
    "running statistics": lambda batches: lax.map(by_running, batches),
    "each batch": lambda batches: lax.map(by_batch, batches),
    "stream": lambda batches: lax.scan(
        adapter.step, adapter.init(trained, batches[0]), batches
    )[1],
}

figure, panels = plt.subplots(1, 2, figsize=(8, 2.3), sharex=True, sharey=True)
found = {}
for ax, (name, shift) in zip(panels, [("clean", 0), ("brighter", 127)], strict=True):
    for place, (method, predict) in enumerate(methods.items()):
        logits = np.asarray(jax.jit(predict)(batches + shift)).reshape(-1, 10)
        found[name, method] = value = 100 * (logits.argmax(-1) == answers).mean()
        ax.barh(-place, value, color=[ORANGE, SKY, BLUE][place], alpha=0.6)
        ax.text(102, -place, f"{value:.0f} %", va="center")
    ax.set_title(f"{name}, sorted by class", fontsize=11)
    ax.set(xlabel="accuracy on the stream, %", xlim=(0, 100))
panels[0].set_yticks([0, -1, -2], list(methods))
plt.show()
assert found["brighter", "stream"] > found["brighter", "running statistics"] + 10
assert found["clean", "stream"] > 90

# %% [markdown]
# On CIFAR-10 the gains are smaller, and clean images sorted by class lose
# ([measured](https://github.com/jbn-team/jbn/blob/main/docs/evidence.md)). Where the
# source is mostly wrong, nothing of this helps. More:
# [Adapt to shifted data](https://github.com/jbn-team/jbn/blob/main/docs/guides/shifted.md).
#
# ## 10. Clients with different data
#
# Ten clients train one network, and each has images of two digits. In each round a
# client takes five steps, and the server averages the parameters. If a client
# normalizes by its batch, it normalizes by two classes in training, and by ten at
# inference. With `tau` it normalizes by its batch *and* the statistics of all clients,
# which the server merges from the moments that the clients collect (`accumulate=True`).

# %%
ROUNDS, STEPS, BATCH = 40, 5, 32
own = [np.concatenate([members[k], members[(k + 1) % 10]]) for k in range(10)]
orders = np.stack(
    [[rng.choice(rows, (STEPS, BATCH)) for rows in own] for _ in range(ROUNDS)]
)


def average(clients):
    """Everything is averaged."""
    return tools.average(clients)


def commit(clients):
    """The moments of all rows of the round update the statistics once."""
    stats = tools.merge([c["batch_stats"] for c in clients])
    return {
        "params": tools.average([c["params"] for c in clients]),
        "batch_stats": jbn.commit(stats, momentum=0.6, second_moment=True),
    }


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_clients(server, options, orders):
    """The variables after rounds of rows (rounds, clients, steps, batch)."""
    model = network(jbn.BatchNorm, momentum=0.9, **dict(options))
    optimizer = optax.sgd(0.1)
    step = make_step(model, optimizer)
    on_rows = lambda carry, rows: (step(carry, [v[rows] for v in train_set]), None)

    def one_round(variables, rows):
        carry = variables, optimizer.init(variables["params"])
        visit = lambda rows: lax.scan(on_rows, carry, rows)[0][0]
        stacked = jax.vmap(visit)(rows)
        pick = lambda k: jax.tree.map(lambda v: v[k], stacked)
        return server([pick(k) for k in range(len(rows))]), None

    variables = model.init(jax.random.key(0), images[:2], train=False)
    return lax.scan(one_round, variables, orders)[0]


together = orders.transpose(0, 2, 1, 3).reshape(ROUNDS, 1, STEPS, 10 * BATCH)
shrunk = ("tau", 2.0 * BATCH), ("accumulate", True)
rules = {
    "all data in one place": (average, (), together),
    "clients, by batch": (average, (), orders),
    "clients, tau": (commit, shrunk, orders),
}
figure, ax = plt.subplots(figsize=(6, 2.1))
found = {}
for place, (name, (server, options, given)) in enumerate(rules.items()):
    variables = train_clients(server, options, given)
    # The collected moments are of no use at inference.
    found[name] = value = 100 * accuracy(network(jbn.BatchNorm), variables, test_set)
    ax.barh(-place, value, color=["#999999", ORANGE, BLUE][place], alpha=0.6)
    ax.text(102, -place, f"{value:.0f} %", va="center")
ax.set_yticks([0, -1, -2], list(rules))
ax.set(xlabel="test accuracy on all ten digits, %", xlim=(0, 100))
plt.show()
assert found["clients, tau"] > found["clients, by batch"]

# %% [markdown]
# Other rules (FedBN, FixBN) and data:
# [Train on clients](https://github.com/jbn-team/jbn/blob/main/docs/guides/clients.md).
#
# ## 11. Sparse features: `sparse_batch_norm`
#
# In word counts, clicks or one-hot codes, most entries are zero and not stored. Making
# the array dense to normalize it defeats the purpose, and normalizing only the stored
# entries is a different function. `sparse_batch_norm` computes the batch norm of the
# dense array. Its output has two parts: a sparse array, and the value of a zero in each
# feature. A dense layer takes both: `values @ w + background @ w`.

# %%
from jax.experimental.sparse import BCOO


ROWS, FEATURES, STORED = 512, 1000, 10
columns = np.stack(
    [np.sort(rng.choice(FEATURES, STORED, replace=False)) for _ in range(ROWS)]
)
indices = np.stack([np.repeat(np.arange(ROWS), STORED), columns.ravel()], axis=1)
counts = rng.poisson(3.0, len(indices)).astype(np.float32) + 1
w = rng.normal(size=(FEATURES, 8)).astype(np.float32) / 10
word_params, word_stats = jbn.init(FEATURES)


def sparse_layer(data, indices, shape, params, stats):
    x = BCOO((data, indices), shape=shape, indices_sorted=True, unique_indices=True)
    return jbn.sparse_batch_norm(x, params, stats, use_running_average=False)


def sparse_forward(data):
    y, _ = sparse_layer(data, indices, (ROWS, FEATURES), word_params, word_stats)
    return y.values @ w + y.background @ w


def dense_forward(data):
    x = jnp.zeros((ROWS, FEATURES)).at[indices[:, 0], indices[:, 1]].set(data)
    return in_training(x, word_params, word_stats)[0] @ w


a, b = sparse_forward(counts), dense_forward(counts)
error = np.abs(a - b).max() / np.abs(b).max()
print(f"sparse = dense, to {error:.0e} of the largest")
assert error < 1e-4


# %% [markdown]
# Memory of a forward pass on 16,384 rows of 50,000 features, with 100 stored per row,
# as reported by XLA (it is only compiled here):


# %%
def gigabytes(f, *args):
    """Of arguments, results and temporaries."""
    found = jax.jit(f).lower(*args).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        + found.temp_size_in_bytes
    ) / 1e9


shape, stored = (16_384, 50_000), 16_384 * 100
large_params, large_stats = jax.eval_shape(lambda: jbn.init(shape[1]))
entries = jax.ShapeDtypeStruct((stored,), jnp.float32)
where = jax.ShapeDtypeStruct((stored, 2), jnp.int32)


def large_sparse(data, where, params, stats):
    y, new = sparse_layer(data, where, shape, params, stats)
    return y.values.data, y.background, new


x_dense = jax.ShapeDtypeStruct(shape, jnp.float32)
dense_memory = gigabytes(in_training, x_dense, large_params, large_stats)
sparse_memory = gigabytes(large_sparse, entries, where, large_params, large_stats)
print(f"dense  {dense_memory:.3f} GB")
print(f"sparse {sparse_memory:.3f} GB")
assert sparse_memory < dense_memory / 20

# %% [markdown]
# ## 12. When to use which
#
# | data | use |
# |---|---|
# | padded sequences, images, point clouds | `mask` |
# | packed rows | `mask=ids < n`, `ids` from `segment_ids` |
# | long samples outweigh short ones | `weights=` `sample_weights`, `group_weights` |
# | graphs, or samples each by itself | `graph_norm`; `moments(segment_ids=)` |
# | shards of different sizes, empty shards | no option: results are exact |
# | several sources in one batch | `domain_batch_norm` |
# | sources that are guessed | a floating `domain` |
# | domains of a few rows | `min_weight=1`, or `tau=` with `second_moment=True` |
# | batches of a few rows, or of one class | `tau=32`, or `batch_renorm` |
# | outliers | `trim=5` |
# | shifted data without labels | `tools.stream`; large mixed batches: `tools.adapt` |
# | clients with different data | `tau=`, `accumulate=True`, `tools.merge`, `commit` |
# | sparse features with implicit zeros | `sparse_batch_norm` |
#
# All methods take `axis_name`. Most options can be combined; those that cannot
# (`batch_renorm` with `tau`, `sparse_batch_norm` with `trim`) raise an error. The
# figures behind these recommendations are in
# [evidence.md](https://github.com/jbn-team/jbn/blob/main/docs/evidence.md).
