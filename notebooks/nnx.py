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
# # Batch norm in Flax NNX
#
# `jbn.nnx.BatchNorm` replaces `flax.nnx.BatchNorm`. This notebook trains a network with
# both, moves its state from one to the other and into a pure function, and imports
# weights from PyTorch and Keras.
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jbn-team/jbn/blob/main/notebooks/nnx.ipynb)
#
# ![Loss and accuracy of the two networks](https://raw.githubusercontent.com/jbn-team/jbn/main/docs/notebooks/nnx.png)

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
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn.nnx
from jbn.training.data import load_dataset


# All devices are to compute in full float32.
jax.config.update("jax_default_matmul_precision", "highest")

with TemporaryDirectory() as folder:
    digits = load_dataset("digits", data_dir=Path(folder))
train_x, test_x = (
    split.image.reshape(-1, 64).astype(np.float32) / 255
    for split in (digits.train, digits.test)
)
train_y, test_y = digits.train.label, digits.test.label
print(f"{len(train_x):,} training and {len(test_x)} test images of 64 pixels")

# %% [markdown]
# ## A network, and its training
#
# The layer is used like Flax's: constructed with the number of features and `rngs`, and
# called with a mask. Here its class is an argument, so that it can be either.


# %%
from functools import partial


class Net(nnx.Module):
    """Two hidden layers, the second with a skip connection."""

    def __init__(self, norm, *, rngs):
        self.dense1 = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
        self.norm1 = norm(64, rngs=rngs)
        self.dense2 = nnx.Linear(64, 64, use_bias=False, rngs=rngs)
        self.norm2 = norm(64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, mask=None):
        skip = nnx.relu(self.norm1(self.dense1(x), mask=mask))
        y = self.norm2(self.dense2(skip), mask=mask)
        return self.head(nnx.relu(y + skip))


model = Net(partial(jbn.nnx.BatchNorm, momentum=0.9), rngs=nnx.Rngs(0))
flax_model = Net(partial(nnx.BatchNorm, momentum=0.9), rngs=nnx.Rngs(0))

# %% [markdown]
# Training is plain NNX. `model.train()` makes the layers normalize by the batch and
# update their statistics in place, `model.eval()` normalize by these. The last batch of
# an epoch has 29 images. It is padded to 64 rows, and the mask excludes the padding
# from the statistics, the loss and the gradient.


# %%
import optax


def batches(epoch, batch_size=64):
    order = np.random.default_rng(epoch).permutation(len(train_x))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        mask = np.arange(batch_size) < len(rows)
        rows = np.pad(rows, (0, batch_size - len(rows)))
        yield train_x[rows], train_y[rows], mask


def mean_loss(logits, labels, mask):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses, where=mask) / jnp.sum(mask)


@nnx.jit
def train_step(model, optimizer, x, labels, mask):
    def loss_fn(model):
        return mean_loss(model(x, mask[:, None]), labels, mask)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def predict(model, x):
    return model(x).argmax(-1)


def train(model, epochs=10):
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    losses, accuracies = [], []
    for epoch in range(epochs):
        model.train()
        losses += [train_step(model, optimizer, *batch) for batch in batches(epoch)]
        model.eval()
        accuracies.append(float(np.mean(predict(model, test_x) == test_y)))
    return np.array(losses), np.array(accuracies)


losses, accuracies = train(model)
flax_losses, flax_accuracies = train(flax_model)
print(f"test accuracy: jbn {accuracies[-1]:.1%}, Flax {flax_accuracies[-1]:.1%}")
print(f"largest difference of a loss: {np.abs(losses - flax_losses).max():.1e}")
np.testing.assert_allclose(losses, flax_losses, atol=1e-2)
assert accuracies[-1] > 0.95

# %%
import matplotlib.pyplot as plt


BLUE, ORANGE = "#0072B2", "#D55E00"
plt.rcParams.update({"figure.dpi": 80, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False})
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
steps, epochs = np.arange(len(losses)) + 1, np.arange(len(accuracies)) + 1
left.plot(steps, flax_losses, color=ORANGE, lw=4, alpha=0.5, label="flax.nnx")
left.plot(steps, losses, color=BLUE, lw=1, label="jbn.nnx")
left.set(title="Training loss", xlabel="step", yscale="log")
left.legend()
right.plot(epochs, 100 * flax_accuracies, color=ORANGE, lw=6, alpha=0.5)
right.plot(epochs, 100 * accuracies, "o-", color=BLUE, ms=4)
right.set(title="Test accuracy", xlabel="epoch", ylabel="%")
plt.show()

# %% [markdown]
# Up to rounding the two are equal. They differ where Flax's layer loses accuracy, with
# NaN under a mask, and with an empty mask:

# %%
rng = np.random.default_rng(0)
far = (10_000 + rng.standard_normal((4096, 1))).astype(np.float32)
padded = rng.standard_normal((6, 1)).astype(np.float32)
padded[4:] = np.nan
mask = np.arange(6)[:, None] < 4


def loss_fn(layer):
    y = layer(padded, mask=mask)
    return jnp.sum(np.arange(6.0)[:, None] * y, where=mask)


def three_numbers(cls):
    layer = cls(1, momentum=0.0, rngs=nnx.Rngs(0))
    layer(far)
    variance = layer.var[0]
    dscale = nnx.grad(loss_fn)(cls(1, rngs=nnx.Rngs(0))).scale[0]
    layer = cls(1, rngs=nnx.Rngs(0))
    layer(padded, mask=np.zeros_like(mask))
    return np.array([variance, dscale, layer.mean[0]])


theirs, ours = three_numbers(nnx.BatchNorm), three_numbers(jbn.nnx.BatchNorm)
valid = padded[:4].astype(np.float64)
normalized = (valid - valid.mean()) / np.sqrt(valid.var() + 1e-5)
exact = [far.astype(np.float64).var(), np.sum(np.arange(4.0)[:, None] * normalized), 0]
print(f"{'':41} {'Flax':>7} {'jbn':>7} {'exact':>7}")
for name, *values in zip(
    (
        "variance of 4,096 numbers around 10,000",
        "gradient of the scale, NaN under the mask",
        "running mean after a mask of nothing",
    ),
    *(theirs, ours, exact),
    strict=True,
):
    print(f"{name:41} {values[0]:7.4f} {values[1]:7.4f} {values[2]:7.4f}")
np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)

# %% [markdown]
# ## Activation and residual in the layer
#
# `relu(norm(x) + residual)` can be one layer. It has the same variables. Its backward
# pass computes the slope of the ReLU from the inputs, so nothing is saved for it.


# %%
class FusedNet(Net):
    def __call__(self, x, mask=None):
        skip = self.norm1(self.dense1(x), mask=mask)
        return self.head(self.norm2(self.dense2(skip), mask=mask, residual=skip))


make_norm = partial(jbn.nnx.BatchNorm, momentum=0.9, activation=nnx.relu)
fused = FusedNet(make_norm, rngs=nnx.Rngs(1))
nnx.update(fused, nnx.state(model))
fused.eval()
np.testing.assert_allclose(fused(test_x), model(test_x), rtol=1e-5, atol=1e-5)


def bytes_saved(layer, function):
    """Bytes per element of a bfloat16 batch that are saved for the backward pass."""
    graphdef, state = nnx.split(layer)
    x, skip = jax.random.normal(jax.random.key(0), (2, 1024, 64), jnp.bfloat16)
    run = lambda state, x, skip: function(nnx.merge(graphdef, state), x, skip)
    _, backward = jax.vjp(run, state, x, skip)
    saved = {id(x): x for x in jax.tree.leaves(backward) if x.size >= skip.size}
    return sum(x.nbytes for x in saved.values()) / skip.size


after = lambda norm, x, skip: nnx.relu(norm(x) + skip)
within = lambda norm, x, skip: norm(x, residual=skip)
saved = {
    "Flax": bytes_saved(nnx.BatchNorm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), after),
    "jbn, ReLU after it": bytes_saved(jbn.nnx.BatchNorm(64, rngs=nnx.Rngs(0)), after),
    "jbn, ReLU in it": bytes_saved(make_norm(64, rngs=nnx.Rngs(0)), within),
}
for name, count in saved.items():
    print(f"{name:20} {count:4.1f} bytes per element")
assert saved["jbn, ReLU in it"] == 4  # `x` and the residual, of two bytes each

# %% [markdown]
# These are the arrays that the derivative needs. In float32 without loops, the compiler
# removes some of them; in 16 bits, or in `lax.scan`, it does not
# ([measurements](https://github.com/jbn-team/jbn/blob/main/docs/benchmarks.md)).

# %% [markdown]
# ## From Flax's layer to ours, and back
#
# The variables have the same names, kinds and shapes, so the state of one model fits
# the other: `nnx.split` one, and `nnx.merge` with the graph of the other. Checkpoints
# can be exchanged in the same way.

# %%
graphdef, state = nnx.split(model)
flax_graphdef, flax_state = nnx.split(flax_model)
to_ours = nnx.merge(graphdef, flax_state)
to_flax = nnx.merge(flax_graphdef, state)
for moved, original in ((to_ours, flax_model), (to_flax, model)):
    print(type(original.norm1).__module__, "->", type(moved.norm1).__module__)
    np.testing.assert_allclose(moved(test_x), original(test_x), rtol=1e-4, atol=1e-4)
for name, variable in state.norm1.items():
    print(f"{name:5} {type(variable).__name__:9} {variable.shape}")

# %% [markdown]
# An existing model need not be edited. `convert` replaces its norms, keeps their
# arguments and variables, and can also select another method:

# %%
from jbn import tools


converted = tools.convert(flax_model)
ghost = tools.convert(flax_model, jbn.nnx.GhostBatchNorm, where="norm2", num_groups=4)
for name, net in (
    ("flax_model", flax_model),
    ("converted", converted),
    ("ghost", ghost),
):
    kinds = [f"{type(n).__module__}.{type(n).__name__}" for n in (net.norm1, net.norm2)]
    print(f"{name:11}", *kinds)
    np.testing.assert_allclose(net(test_x), flax_model(test_x), rtol=1e-4, atol=1e-4)
print("momentum, taken along:", converted.norm1.momentum)

# %% [markdown]
# The other tools also take NNX models, and return new ones. Here a model has the
# trained parameters, but statistics that were never updated: `inspect` reports this,
# `recalibrate` takes new ones from the data, and `fold` then removes the norms.


# %%
def accuracy(model):
    return float(np.mean(predict(model, test_x) == test_y))


careless = Net(partial(jbn.nnx.BatchNorm, momentum=0.9), rngs=nnx.Rngs(0))
nnx.update(careless, nnx.state(model, nnx.Param))
careless.eval()
print(f"fresh statistics  {accuracy(careless):.1%}")

careless.train()  # The tools look at what training sees.
apply = lambda model, x: model(x)
data = np.split(train_x[:1408], 22)
for finding in tools.inspect(apply, careless, data).findings:
    print(f"  {finding.layer}: {finding.kind} ({finding.severity})")
mended = tools.recalibrate(apply, careless, data)
mended.eval()
folded = tools.fold(mended, test_x)
for name, net in (("recalibrated", mended), ("folded", folded)):
    kinds = nnx.Param, nnx.BatchStat
    sizes = [sum(x.size for x in jax.tree.leaves(nnx.state(net, k))) for k in kinds]
    print(f"{name:16}  {accuracy(net):.1%}", end=" ")
    print("with {:,} parameters, {} statistics".format(*sizes))
np.testing.assert_allclose(folded(test_x), mended(test_x), rtol=1e-4, atol=1e-4)
assert accuracy(mended) > 0.95

# %% [markdown]
# ## The functional view
#
# `nnx.split` takes a model apart into its graph, its parameters and its running
# statistics. A step is then a pure function with `(params, batch_stats)` as argument
# and result, like `jbn.batch_norm` itself. All of JAX applies to it, such as `lax.scan`
# over the steps of an epoch.


# %%
fresh = Net(partial(jbn.nnx.BatchNorm, momentum=0.9), rngs=nnx.Rngs(0))
graphdef, params, batch_stats = nnx.split(fresh, nnx.Param, nnx.BatchStat)
optimizer = optax.adam(2e-3)


def pure_step(carry, batch):
    params, batch_stats, opt_state = carry
    x, labels, mask = batch

    def loss_fn(params):
        # A copy, whose statistics may be written within this trace.
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        loss = mean_loss(model(x, mask[:, None]), labels, mask)
        return loss, nnx.state(model, nnx.BatchStat)

    (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), new_stats, opt_state), loss


run_epoch = jax.jit(lambda carry, batches: jax.lax.scan(pure_step, carry, batches))
carry, pure_losses = (params, batch_stats, optimizer.init(params)), []
for epoch in range(10):
    stacked = [np.stack(parts) for parts in zip(*batches(epoch), strict=True)]
    carry, epoch_losses = run_epoch(carry, stacked)
    pure_losses.append(epoch_losses)

pure_losses = np.concatenate(pure_losses)
trained = nnx.merge(graphdef, *carry[:2])
trained.eval()
print(
    f"test accuracy {accuracy(trained):.1%}; of the first section {accuracy(model):.1%}"
)
print(f"largest difference of a loss: {np.abs(pure_losses - losses).max():.1e}")
np.testing.assert_allclose(pure_losses, losses, atol=1e-2)

# %% [markdown]
# ## Coming from PyTorch and Keras
#
# The libraries differ in the definition of momentum and in the default epsilon. These
# settings reproduce their running statistics:
#
# | | Flax | PyTorch | Keras |
# |---|---|---|---|
# | `momentum` | as there (0.99) | 1 minus theirs (0.9) | as there (0.99) |
# | `epsilon` | as there (1e-5) | as there (1e-5) | as there (1e-3) |
# | `unbiased` | `False` | `True` | `False` |
# | `scale` | scale | weight | gamma |
# | `bias` | bias | bias | beta |
# | `mean` | mean | running_mean | moving_mean |
# | `var` | var | running_var | moving_variance |
#
# `tools.torch_options` and `tools.keras_options` read these settings from a layer;
# `from_torch` and `from_keras` convert the arrays. Here the network is trained briefly
# in PyTorch, with the same names of layers, then converted. It gives the same outputs,
# and the same statistics after one more batch.


# %%
def check_outputs(net, expected):
    net.eval()
    found = net(test_x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    there = np.mean(np.argmax(expected, -1) == test_y)
    print(f"test accuracy there {there:.1%}, here {accuracy(net):.1%}")
    print(f"largest difference of a logit {np.abs(found - expected).max():.1e}")


def check_statistics(net, mean, var):
    net.train()
    net(train_x[:64])
    np.testing.assert_allclose(net.norm2.mean[...], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net.norm2.var[...], var, rtol=1e-4, atol=1e-5)
    print("after one more batch, running statistics are the same")


if importlib.util.find_spec("torch") is None:
    print("PyTorch is not installed: skipped.")
else:
    import torch

    class TorchNet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense1 = torch.nn.Linear(64, 64, bias=False)
            self.norm1 = torch.nn.BatchNorm1d(64)
            self.dense2 = torch.nn.Linear(64, 64, bias=False)
            self.norm2 = torch.nn.BatchNorm1d(64)
            self.head = torch.nn.Linear(64, 10)

        def forward(self, x):
            skip = torch.relu(self.norm1(self.dense1(x)))
            return self.head(torch.relu(self.norm2(self.dense2(skip)) + skip))

    torch.manual_seed(0)
    module = TorchNet()
    torch_optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    for epoch in range(5):
        for x, labels, mask in batches(epoch):
            logits = module(torch.tensor(x[mask]))
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(labels[mask]).long()
            )
            torch_optimizer.zero_grad()
            loss.backward()
            torch_optimizer.step()

    options = tools.torch_options(module.norm1)
    print(options)
    net = Net(partial(jbn.nnx.BatchNorm, **options), rngs=nnx.Rngs(0))
    net = tools.from_torch(module, net)
    with torch.no_grad():
        check_outputs(net, module.eval()(torch.tensor(test_x)).numpy())
        module.train()(torch.tensor(train_x[:64]))
    norm = module.norm2
    check_statistics(net, norm.running_mean.numpy(), norm.running_var.numpy())

# %% [markdown]
# The same from Keras, trained by `fit`, with its own defaults:

# %%
import os


if importlib.util.find_spec("keras") is None:
    print("Keras is not installed: skipped.")
else:
    os.environ["KERAS_BACKEND"] = "jax"  # read by `import keras`
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    inputs = keras.Input((64,))
    y = layers.Dense(64, use_bias=False, name="dense1")(inputs)
    skip = layers.ReLU()(layers.BatchNormalization(name="norm1")(y))
    y = layers.Dense(64, use_bias=False, name="dense2")(skip)
    y = layers.add([layers.BatchNormalization(name="norm2")(y), skip])
    outputs = layers.Dense(10, name="head")(layers.ReLU()(y))
    keras_model = keras.Model(inputs, outputs)
    keras_model.compile(
        keras.optimizers.Adam(2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    keras_model.fit(train_x, train_y, batch_size=64, epochs=10, verbose=0)

    norm = keras_model.get_layer("norm2")
    options = tools.keras_options(norm)
    print(options)
    net = Net(partial(jbn.nnx.BatchNorm, **options), rngs=nnx.Rngs(0))
    net = tools.from_keras(keras_model, net)
    check_outputs(net, np.asarray(keras_model(test_x, training=False)))
    keras_model(train_x[:64], training=True)
    check_statistics(
        net, np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)
    )

# %% [markdown]
# `to_torch` and `to_keras` convert back. All tools are described in
# [docs/tools.md](https://github.com/jbn-team/jbn/blob/main/docs/tools.md).
