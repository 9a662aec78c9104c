"""What helps where batches are small, or each holds one class only?

    python benchmarks/small_batches.py [--data=../shared/data/mnist] [--quick]

Prints a Markdown table; adds the results to docs/evidence/small_batches.json and draws
all that are there. Batches are of 2 images, of 16 images of one class, or large.
Networks are trained by SGD with momentum and a cosine schedule. Learning rate, momentum
of the running statistics and `tau` (in images) are chosen for each method and kind of
batch on a part of the training set, with another seed. The whole grid is in the JSON.

`--data` is a folder of MNIST's four files or an archive of JPEG images with
`{train,test}_{jpeg,offsets,labels}`; by default the embedded digits. Gray images get a
multilayer perceptron, others a small convolutional network.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import small_batches_table

from jbn.linen import BatchNorm, BatchRenorm, GhostBatchNorm
from jbn.models import MLP


SEEDS, CHOOSING = range(5), 99
MISSING = [np.nan] * len(SEEDS)


class Kind(NamedTuple):
    """A kind of batch; rates are tried."""

    images: int
    steps: int
    rates: tuple
    momenta: tuple


GRAY = {
    "two": Kind(2, 6000, (3e-4, 1e-3, 3e-3, 1e-2), (0.99, 0.999)),
    "class": Kind(16, 3000, (3e-4, 1e-3, 3e-3, 1e-2), (0.99, 0.999)),
    "large": Kind(128, 1000, (1e-2, 3e-2, 1e-1), (0.9, 0.99)),
}
COLOR = {
    "two": Kind(2, 6000, (1e-3, 3e-3, 1e-2, 3e-2), (0.99,)),
    "class": Kind(16, 1500, (1e-3, 3e-3, 1e-2, 3e-2), (0.99,)),
    "large": Kind(64, 400, (3e-2, 1e-1, 3e-1), (0.9,)),
}


class Task(NamedTuple):
    """What differs between data sets; hashable, for `jit`."""

    gray: bool
    classes: int
    quick: bool

    def kind(self, name):
        """How batches are drawn."""
        kind = (GRAY if self.gray else COLOR)[name]
        return kind._replace(steps=kind.steps // 50) if self.quick else kind

    def network(self, method, kind, momentum, tau):
        """The network with the norm of a method."""
        make = METHODS[method].layer
        norm = make(momentum=momentum, tau=tau, steps=self.kind(kind).steps)
        network = MLP if self.gray else evidence.ConvNet
        return network(num_classes=self.classes, norm=norm)


# ---- Methods ------------------------------------------------------------------------


class Groups(nn.Module):
    """`flax.linen.GroupNorm`, called as a batch norm."""

    @nn.compact
    def __call__(self, x, *, use_running_average, mask=None):
        """Normalizes groups of eight features of each image."""
        return nn.GroupNorm(num_groups=8)(x)


class ByImages(nn.Module):
    """Batch norm with `tau` in images, since each pixel is a row."""

    tau: Any
    momentum: Any

    @nn.compact
    def __call__(self, x, *, use_running_average, mask=None):
        """Normalizes `x`."""
        rows = x[0, ..., 0].size
        layer = BatchNorm(use_running_average, momentum=self.momentum)
        return layer(x, tau=self.tau * rows)


def renorm(momentum, steps, **_):
    """Batch norm for a tenth of the steps, opened up to Ioffe's limits by half."""
    schedule = functools.partial(
        optax.linear_schedule,
        transition_begin=steps // 10,
        transition_steps=steps * 4 // 10,
    )
    return functools.partial(
        BatchRenorm, schedule(1.0, 3.0), schedule(0.0, 5.0), momentum=momentum
    )


class Method(NamedTuple):
    """Makes the layer; which of `tau` and whether momenta are tried."""

    layer: Callable
    taus: tuple = (0.0,)
    statistics: bool = True
    only: tuple = ("two", "class", "large")


METHODS = {
    "batch norm": Method(
        lambda momentum, **_: functools.partial(BatchNorm, momentum=momentum)
    ),
    "batch renorm": Method(renorm),
    "batch renorm, no schedule": Method(
        lambda momentum, **_: functools.partial(
            BatchRenorm, 3.0, 5.0, momentum=momentum
        )
    ),
    "tau": Method(
        lambda momentum, tau, **_: functools.partial(ByImages, tau, momentum),
        (2.0, 32.0, 128.0),
    ),
    "tau=inf": Method(
        lambda momentum, **_: functools.partial(
            BatchNorm, momentum=momentum, tau=float("inf")
        )
    ),
    "group norm": Method(lambda **_: Groups, statistics=False),
    # Groups of less than 16 images are no ghost of anything.
    "ghost, 8 groups": Method(
        lambda momentum, **_: functools.partial(GhostBatchNorm, 8, momentum=momentum),
        only=("large",),
    ),
}

# ---- Training -----------------------------------------------------------------------


def batches(name, kind, labels, seed):
    """Images of each batch: (steps, images)."""
    rng = np.random.default_rng(seed)
    if name == "class":
        by_class = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)]
        epochs = -(-kind.steps // len(by_class))
        order = [rng.permutation(len(by_class)) for _ in range(epochs)]
        order = np.concatenate(order)[: kind.steps]
        return np.stack(
            [rng.choice(by_class[c], kind.images, replace=False) for c in order]
        )
    epochs = -(-kind.steps * kind.images // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
    return order[: kind.steps * kind.images].reshape(kind.steps, kind.images)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(task, method, kind, data, split, order, seed, rate, momentum, tau):
    """Accuracy on a split after training once, and that of batches in the last tenth.

    The latter is of the training mode.
    """
    steps = task.kind(kind).steps
    images, labels = data
    model = task.network(method, kind, momentum, tau)
    variables = model.init(jax.random.key(seed), images[:2], train=False)
    stats = variables.get("batch_stats", {})
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)

    def loss(params, stats, x, y):
        out, updated = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        value = optax.softmax_cross_entropy_with_integer_labels(out, y).mean()
        return value, (updated.get("batch_stats", {}), (out.argmax(-1) == y).mean())

    def step(carry, rows):
        params, stats, opt = carry
        grads, (stats, accuracy) = jax.grad(loss, has_aux=True)(
            params, stats, images[rows], labels[rows]
        )
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), stats, opt), accuracy

    start = variables["params"], stats, optimizer.init(variables["params"])
    (params, stats, _), accuracy = jax.lax.scan(step, start, order)
    variables = {"params": params, "batch_stats": stats}
    predict = lambda x: model.apply(variables, x[None], train=False)[0].argmax(-1)
    x, y = split
    right = jax.lax.map(predict, x, batch_size=500) == y
    return right.mean(), accuracy[-(steps // 10) :].mean()


def measure(task, train, held, test):
    """Chooses the settings of each method and kind of batch, and tests them."""
    data, held, test = jax.tree.map(jnp.asarray, (train, held, test))
    results = []
    for kind, (method, about) in itertools.product(GRAY, METHODS.items()):
        if kind not in about.only:
            continue
        own = task.kind(kind)

        def accuracy(split, seed, entry, kind=kind, method=method, own=own):
            order = batches(kind, own, train[1], seed)
            entry = map(np.float32, entry)
            return jax.device_get(
                run(task, method, kind, data, split, order, seed, *entry)
            )

        momenta = own.momenta if about.statistics else (0.9,)
        grid = [*itertools.product(own.rates, momenta, about.taus)]
        tried = [float(accuracy(held, CHOOSING, entry)[0]) for entry in grid]
        best = grid[int(np.argmax(tried))]
        found, mode = np.transpose([accuracy(test, seed, best) for seed in SEEDS])
        results.append(
            {
                "kind": kind,
                "method": method,
                "chosen": dict(zip(("rate", "momentum", "tau"), best, strict=True)),
                "test": found,
                "training mode": mode,
                "tried": [[*e, value] for e, value in zip(grid, tried, strict=True)],
            }
        )
        evidence.log(
            f"{kind}, {method}, {results[-1]['chosen']}: {found.mean():.3f};"
            f" tried: {min(tried):.3f} to {max(tried):.3f}"
        )
    return results


# ---- Reports ------------------------------------------------------------------------


def draw(results):
    """A panel for each data set: accuracy on test images at inference."""
    plt = evidence.style()
    figure, panels = plt.subplots(
        1, len(results), figsize=(2 + 3 * len(results), 3.9), squeeze=False, sharey=True
    )
    looks = {
        "two": (evidence.BLUE, "D"),
        "class": (evidence.ORANGE, "o"),
        "large": (evidence.BLACK, "|"),
    }
    for panel, (name, found) in zip(panels[0], results.items(), strict=True):
        value = {(r["method"], r["kind"]): r["test"] for r in found["methods"]}
        values_of = lambda *key, value=value: value.get(key, MISSING)
        evidence.draw_dots(panel, list(METHODS), values_of, looks)
        panel.set(title=name, xlabel="test accuracy (%), range of seeds")
        panel.set_ylim(-0.6, len(METHODS) - 0.4)
    handles, _ = panels[0, 0].get_legend_handles_labels()
    named = "batches of 2 images", "16 images of one class", "large batches"
    figure.legend(handles, named, loc="outside lower center", ncols=3)
    return figure


def main():
    """Measures, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="MNIST's folder, or an archive of JPEG images")
    parser.add_argument(
        "--quick", action="store_true", help="a fiftieth of the steps; writes nothing"
    )
    args = parser.parse_args()
    name, (images, labels), test = evidence.load(args.data)
    gray, held = images.shape[-1] == 1, min(len(test[1]), len(labels) // 3)
    task = Task(gray, int(labels.max()) + 1, args.quick)
    rest, held_out = evidence.held_out(images, labels, held)
    about = {
        "command": evidence.command(),
        "kinds": {kind: task.kind(kind)._asdict() for kind in GRAY},
        "methods": measure(task, rest, held_out, test),
        "cpu_seconds": round(time.process_time()),
    }
    known = {} if args.quick else evidence.known("small_batches")
    results = {**known, name: evidence.plain(about)}
    evidence.report(
        "small_batches",
        __doc__.splitlines()[0],
        SEEDS,
        results,
        small_batches_table(results),
        draw(results),
        folder=None if args.quick else evidence.EVIDENCE,
    )


if __name__ == "__main__":
    main()
