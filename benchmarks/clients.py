"""By which statistics should clients normalize, if each has data of two classes?

    python benchmarks/clients.py [--data=../shared/data/mnist] [--quick]

Prints a Markdown table; adds the results to docs/evidence/clients.json and draws all
that are there. Ten clients train one network. In each round every client takes 1 or 5
steps of SGD, and the server averages their parameters; the steps of a client are as
many in either case. The methods differ in what clients normalize by, and in what
becomes of the statistics:

- centralized: one batch of all clients' rows for each step, batch norm,
- averaged: each client by its own batch; statistics averaged (FedAvg),
- merged: the same; statistics merged,
- FedBN: each client by its own batch; norm layers stay with the client,
- FixBN: as merged, and in the second half by the statistics of all, which are fixed,
- tau: each client by its own batch and the statistics of all, which count as `tau`
  times its rows; the server merges the moments of the rows of the round,
- group norm: no statistics of a batch.

The rate of each method, and `tau`, are chosen on images held out of the training set,
with another seed. `--data` is a folder of MNIST's four files or an archive of JPEG
images with `{train,test}_{jpeg,offsets,labels}`; by default the embedded digits. Gray
images get a multilayer perceptron, others a small convolutional network.
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
from tables import clients_table

import jbn
from jbn import tools
from jbn.linen import BatchNorm
from jbn.models import MLP


CLIENTS, LOCAL, SEEDS, CHOOSING = 10, (1, 5), range(5), 99
MOMENTUM = 0.9  # a step

# ---- Data ---------------------------------------------------------------------------


def deal(labels, seed):
    """The classes of each client, and its rows: each class is shared by some clients.

    Of ten classes each client gets two, and half of the rows of each.
    """
    rng, classes = np.random.default_rng(seed), int(labels.max()) + 1
    order, each = rng.permutation(classes), max(2, 2 * classes // CLIENTS)
    start = [k * classes // CLIENTS for k in range(CLIENTS)]
    own = [{int(order[(s + j) % classes]) for j in range(each)} for s in start]
    rows = [[] for _ in own]
    for c in range(classes):
        holders = [k for k in range(CLIENTS) if c in own[k]]
        found = rng.permutation(np.flatnonzero(labels == c))
        for k, part in zip(holders, np.array_split(found, len(holders)), strict=True):
            rows[k].append(part)
    return own, [np.concatenate(parts) for parts in rows]


# ---- Network ------------------------------------------------------------------------


class Norm(nn.Module):
    """The norm layer of a method; `tau` is a multiple of the rows of the batch."""

    group: bool
    options: tuple
    tau: Any
    momentum: Any

    @nn.compact
    def __call__(self, x, use_running_average, mask=None):
        """Normalizes `x`."""
        if self.group:
            return nn.GroupNorm(num_groups=8)(x)
        layer = BatchNorm(
            use_running_average, momentum=self.momentum, **dict(self.options)
        )
        return layer(x, tau=self.tau * (x.size // x.shape[-1]))


class Task(NamedTuple):
    """What differs between data sets; hashable, for `jit`."""

    gray: bool
    classes: int
    steps: int
    batch: int

    def network(self, method, tau, momentum):
        """The network with the norm of a method."""
        norm = functools.partial(
            Norm, method == "group norm", METHODS[method].options, tau, momentum
        )
        network = MLP if self.gray else evidence.ConvNet
        return network(num_classes=self.classes, norm=norm)


# ---- Methods ------------------------------------------------------------------------


def averaged(clients, momentum):
    """One of all clients: everything is averaged."""
    return [tools.average(clients)] * len(clients)


def merged(clients, momentum):
    """One of all clients: parameters averaged, statistics merged."""
    params = tools.average([c["params"] for c in clients])
    stats = tools.merge([c["batch_stats"] for c in clients])
    return [{"params": params, "batch_stats": stats}] * len(clients)


def committed(clients, momentum):
    """The same, but all rows of the round update the statistics once."""
    (new, *_) = merged(clients, momentum)
    stats = jbn.commit(new["batch_stats"], momentum=momentum, second_moment=True)
    return [{**new, "batch_stats": stats}] * len(clients)


def own_norms(clients, momentum):
    """One for each client, which keeps its norm layers."""
    return [
        tools.fed_bn(new, own)
        for new, own in zip(merged(clients, momentum), clients, strict=True)
    ]


class Method(NamedTuple):
    """The server's rule, options of the layer, and what differs in training."""

    server: Callable
    options: tuple = ()
    taus: tuple = (0.0,)
    pooled: bool = False
    freeze: bool = False


RATES = 0.1, 0.3, 0.6
EXACT = (("second_moment", True),)
METHODS = {
    "centralized": Method(averaged, pooled=True),
    "averaged": Method(averaged),
    "merged": Method(merged, EXACT),
    "FedBN": Method(own_norms),
    "FixBN": Method(merged, EXACT, freeze=True),
    "tau": Method(committed, (("accumulate", True),), (0.5, 2.0)),
    "group norm": Method(averaged),
}

# ---- Training -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def visit(task, method, variables, images, labels, rows, rate, tau, momentum):
    """A client's steps of SGD, on rows (steps, batch)."""
    model = task.network(method, tau, momentum)

    def step(variables, rows):
        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                images[rows],
                train=True,
                mutable=["batch_stats"],
            )
            ce = optax.softmax_cross_entropy_with_integer_labels
            return ce(logits, labels[rows]).mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        down = lambda p, g: p - rate * g
        params = jax.tree.map(down, variables["params"], grads)
        return {**variables, "params": params, **updated}, None

    return jax.lax.scan(step, variables, rows)[0]


@functools.partial(jax.jit, static_argnums=0)
def serve(method, clients, momentum):
    """The server's part of a round."""
    return METHODS[method].server(clients, momentum)


@functools.partial(jax.jit, static_argnums=(0, 1))
def predict(task, method, variables, images):
    """Classes of images."""
    model = task.network(method, 0.0, MOMENTUM)
    run = lambda x: model.apply(variables, x[None], train=False)[0].argmax(-1)
    return jax.lax.map(run, images, batch_size=500)


def train(task, method, local, data, parts, seed, rate, tau):
    """The variables of each client after all rounds."""
    about, rng = METHODS[method], np.random.default_rng(seed)
    model = task.network(method, 0.0, MOMENTUM)
    start = model.init(jax.random.key(seed), data[0][:1], train=False)
    clients = [start] * (1 if about.pooled else CLIENTS)
    rounds = task.steps // local
    for r in range(rounds):
        rows = [rng.choice(part, (local, task.batch)) for part in parts]
        if about.pooled:
            rows = [np.concatenate(rows, 1)]
        frozen = about.freeze and 2 * r >= rounds
        setting = (
            rate * (1 + np.cos(np.pi * r / rounds)) / 2,
            np.inf if frozen else tau,
            1.0 if frozen else MOMENTUM,
        )
        setting = [np.float32(value) for value in setting]
        clients = [
            visit(task, method, variables, *data, own, *setting)
            for variables, own in zip(clients, rows, strict=True)
        ]
        clients = serve(method, clients, np.float32(MOMENTUM**local))
    return clients


def score(task, method, clients, own, images, labels):
    """Accuracy on all images, and of each client on its classes; means over clients."""
    found = {}
    for k, classes in enumerate(own):
        variables = clients[k % len(clients)]
        if id(variables) not in found:
            right = np.asarray(predict(task, method, variables, images)) == labels
            found[id(variables)] = right
        right = found[id(variables)]
        mine = np.isin(labels, list(classes))
        yield right.mean(), right[mine].mean()


def measure(task, splits):
    """Chooses the settings of each method, and tests them."""
    train_set, held, test = splits
    data = tuple(map(jnp.asarray, train_set))

    def accuracy(method, local, seed, split, **setting):
        own, parts = deal(train_set[1], seed)
        clients = train(task, method, local, data, parts, seed, **setting)
        return np.mean([*score(task, method, clients, own, *split)], 0).tolist()

    results = []
    for local, (method, about) in itertools.product(LOCAL, METHODS.items()):
        if about.pooled and results:  # It knows no rounds.
            results.append({**results[0], "local steps": local})
            continue
        tried = []
        for rate, tau in itertools.product(RATES, about.taus):
            setting = {"rate": rate, "tau": tau}
            found = accuracy(method, local, CHOOSING, held, **setting)
            # FedBN's clients are made for their own classes.
            tried.append((found[method == "FedBN"], setting))
        chosen = max(tried, key=lambda pair: pair[0])[1]
        values = [accuracy(method, local, seed, test, **chosen) for seed in SEEDS]
        results.append(
            {
                "local steps": local,
                "method": method,
                "chosen": chosen,
                "all": [value for value, _ in values],
                "own": [value for _, value in values],
                "tried": [[*s.values(), value] for value, s in tried],
            }
        )
        evidence.log(f"{local} steps, {method}, {chosen}: {np.mean(values, 0)}")
    return results


# ---- Reports ------------------------------------------------------------------------


def draw(results):
    """A panel for each data set: accuracy on all test images."""
    plt = evidence.style()
    figure, panels = plt.subplots(
        1, len(results), figsize=(5 * len(results), 3.6), squeeze=False
    )
    looks = dict(
        zip(LOCAL, ((evidence.BLUE, "D"), (evidence.ORANGE, "o")), strict=True)
    )
    for panel, (name, found) in zip(panels[0], results.items(), strict=True):
        value = {(r["method"], r["local steps"]): r["all"] for r in found["methods"]}
        values_of = lambda method, local, value=value: value[method, local]
        evidence.draw_dots(panel, list(METHODS), values_of, looks)
        panel.set(title=name, xlabel="accuracy on all test images (%), range of seeds")
        panel.set_ylim(-0.6, len(METHODS) - 0.4)
    handles, _ = panels[0, 0].get_legend_handles_labels()
    named = [f"{k} local step" + "s" * (k > 1) for k in LOCAL]
    panels[0, 0].legend(handles, named, loc="lower left")
    return figure


def main():
    """Measures, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="MNIST's folder, or an archive of JPEG images")
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the steps; writes nothing"
    )
    args = parser.parse_args()
    name, (images, labels), test = evidence.load(args.data)
    gray, count = images.shape[-1] == 1, len(labels) // 10
    steps, batch = (500, 32) if gray else (300, 8)
    if args.quick:
        steps //= 10
    task = Task(gray, int(labels.max()) + 1, steps, batch)
    rest, held_out = evidence.held_out(images, labels, count)
    splits = rest, held_out, test
    about = {
        "command": evidence.command(),
        "steps": steps,
        "rows of a client in a step": batch,
        "methods": measure(task, splits),
        "cpu_seconds": round(time.process_time()),
    }
    known = {} if args.quick else evidence.known("clients")
    results = {**known, name: about}
    evidence.report(
        "clients",
        __doc__.splitlines()[0],
        SEEDS,
        results,
        clients_table(results),
        draw(results),
        folder=None if args.quick else evidence.EVIDENCE,
    )


if __name__ == "__main__":
    main()
