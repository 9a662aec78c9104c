"""By what should a graph network normalize, if graphs are padded and differ in size?

    python benchmarks/graphs.py [--data=../shared/data/graphs] [--quick]

Prints Markdown tables; adds the results to docs/evidence/graphs.json and draws all that
are there. A graph isomorphism network (GIN-0, Xu et al., 2019) classifies graphs. A
batch is 32 graphs, their nodes one after the other, padded to a static number of nodes
and edges. The methods differ in the norm layers only:

- no mask: batch norm, for which padding counts,
- masked: batch norm, for which each real node counts once,
- by graph: batch norm, for which each graph counts once (`jbn.group_weights`),
- graph norm: each graph by its own statistics (`jbn.graph_norm`),
- layer norm: each node by its own,
- none.

Each of ten stratified folds is the test set once, with 5 seeds. Each seed holds out
another one of the nine remaining folds, to validate. For each test fold, rate and
dropout are chosen by validation with the first seed, and the number of steps by
validation with all.

`--data` is a file or a folder of files, plain or gzip: first the number of graphs, then
for each graph a line `nodes label`, and a line `tag degree neighbor ...` for each node.
"""

import argparse
import functools
import gzip
import itertools
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from tables import graphs_padding_table, graphs_table

import jbn
from jbn.linen import BatchNorm, GraphNorm


FOLDS, SEEDS = 10, range(5)
BATCH, WIDTH, LAYERS, MOMENTUM = 32, 32, 3, 0.9
STEPS, EVERY = 200, 20  # steps, and steps from one check to the next
SETTINGS = {"rate": 0.01, "dropout": 0.5}, {"rate": 0.003, "dropout": 0.0}
METHODS = "no mask", "masked", "by graph", "graph norm", "layer norm", "none"
WIDER = 4  # How much more padding there is in another evaluation.

# ---- Data ---------------------------------------------------------------------------


class Graphs(NamedTuple):
    """A data set, with the nodes and the edges of all graphs concatenated."""

    labels: np.ndarray  # of graphs
    nodes: np.ndarray  # number, by graph
    edges: np.ndarray  # number, by graph
    tags: np.ndarray  # of nodes
    senders: np.ndarray  # of edges: a node
    receivers: np.ndarray


class Shape(NamedTuple):
    """What a batch is padded to."""

    graphs: int
    nodes: int
    edges: int


class Batch(NamedTuple):
    """Packed graphs."""

    rows: Any  # of each node: its index in the data set
    ids: Any  # of each node: the position of its graph in the batch
    senders: Any  # of each edge: the position of a node in the batch
    receivers: Any
    graphs: Any  # of each graph: its index in the data set


def read(path):
    """A data set. If all tags are equal, a node's tag is its degree, as in Xu et al."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt") as file:
        lines = iter(file.read().splitlines())
    labels, nodes, edges, tags, degrees, senders = ([] for _ in range(6))
    for _ in range(int(next(lines))):
        size, label = map(int, next(lines).split())
        start = len(tags)
        for _ in range(size):
            tag, degree, *rest = next(lines).split()
            tags.append(int(tag))
            degrees.append(int(degree))
            senders += [start + int(node) for node in rest[: int(degree)]]
        labels.append(label)
        nodes.append(size)
        edges.append(sum(degrees[start:]))
    if len(set(tags)) == 1:
        tags = degrees
    classes, kinds = (np.unique(v, return_inverse=True)[1] for v in (labels, tags))
    receivers = np.repeat(np.arange(len(tags)), degrees)
    nodes, edges, senders = map(np.array, (nodes, edges, senders))
    return Graphs(classes, nodes, edges, kinds, senders, receivers)


def tables(data):
    """Inputs of the network: sums over neighborhoods, and over graphs, of tags.

    The first layer's sum over neighbors is of data, and so taken once. Padding is the
    last row of each.
    """
    near = np.eye(data.tags.max() + 1, dtype=np.float32)[data.tags]
    of = np.repeat(np.arange(len(data.labels)), data.nodes)
    total = np.zeros((len(data.labels) + 1, near.shape[1]), np.float32)
    np.add.at(total, of, near)
    rows = np.concatenate([near, np.zeros_like(near[:1])])
    np.add.at(rows, data.receivers, near[data.senders])
    return jnp.asarray(rows), jnp.asarray(total)


def pack(data, graphs, shape):
    """The batch of some graphs, padded."""

    def take(counts):
        """Indices, and by how much they move."""
        n, first = counts[graphs], (np.cumsum(counts) - counts)[graphs]
        moved = np.cumsum(n) - n - first
        return np.arange(n.sum()) - np.repeat(moved, n), n, moved

    def fill(values, size, value):
        padded = np.full(size, value, np.int32)
        padded[: len(values)] = values
        return padded

    rows, n, moved = take(data.nodes)
    edges, m, _ = take(data.edges)
    moved = np.repeat(moved, m)
    return Batch(
        fill(rows, shape.nodes, len(data.tags)),
        fill(np.repeat(np.arange(len(graphs)), n), shape.nodes, shape.graphs),
        fill(data.senders[edges] + moved, shape.edges, 0),
        fill(data.receivers[edges] + moved, shape.edges, shape.nodes),  # nowhere
        fill(graphs, shape.graphs, len(data.labels)),
    )


def least_shape(data, batches, step=64):
    """The smallest shape that each of the batches fits into, in multiples of `step`."""
    largest = lambda counts: max(counts[graphs].sum() for graphs in batches)
    up = lambda number: int(-(-number // step) * step)
    sizes = (up(largest(counts)) for counts in (data.nodes, data.edges))
    return Shape(max(map(len, batches)), *sizes)


def split(data):
    """The fold of each graph; classes are spread over folds."""
    rng, fold = np.random.default_rng(0), np.empty_like(data.labels)
    shuffled = rng.permutation(len(fold))
    order = shuffled[np.argsort(data.labels[shuffled], kind="stable")]
    fold[order] = np.arange(len(fold)) % FOLDS
    return fold


def draw_batches(fold, test, seed, steps):
    """Training batches, of random graphs; graphs to validate by, and to test."""
    held = (test + 1 + seed) % FOLDS
    rng = np.random.default_rng([test, seed])
    own = np.flatnonzero((fold != test) & (fold != held))
    epochs = -(-steps * BATCH // len(own))
    order = rng.permuted(np.tile(own, (epochs, 1)), axis=1).ravel()
    batches = order[: steps * BATCH].reshape(steps, BATCH)
    return batches, np.flatnonzero(fold == held), np.flatnonzero(fold == test)


# ---- Network ------------------------------------------------------------------------


class Norm(nn.Module):
    """The norm layer of a method."""

    method: str

    @nn.compact
    def __call__(self, x, ids, num_graphs, train):
        """Normalizes nodes `x`."""
        if self.method == "none":
            return x
        if self.method == "layer norm":
            return nn.LayerNorm()(x)
        if self.method == "graph norm":
            return GraphNorm()(x, ids, num_graphs)
        call = {}
        if self.method == "masked":
            call["mask"] = (ids < num_graphs)[:, None]
        if self.method == "by graph":
            call["weights"] = jbn.group_weights(ids, num_graphs)[:, None]
        return BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x, **call)


class GIN(nn.Module):
    """Logits are sums over graphs of the input and of each layer, by a linear map."""

    method: str
    classes: int

    @nn.compact
    def __call__(self, batch, tables, train, keep=1.0):
        """Returns logits of each graph. `keep` is the share that dropout keeps."""
        rows, total = tables
        x, num_graphs = rows[batch.rows], len(batch.graphs)

        def readout(pooled):
            logits = nn.Dense(self.classes)(pooled)
            if not train or self.is_initializing():
                return logits
            kept = jax.random.bernoulli(self.make_rng("dropout"), keep, logits.shape)
            return jnp.where(kept, logits / keep, 0)

        logits = readout(total[batch.graphs])
        for i in range(LAYERS):
            if i:
                sent = x[batch.senders]
                x += jax.ops.segment_sum(sent, batch.receivers, len(x))
            for _ in range(2):
                x = nn.Dense(WIDTH)(x)
                x = nn.relu(Norm(self.method)(x, batch.ids, num_graphs, train))
            logits += readout(jax.ops.segment_sum(x, batch.ids, num_graphs))
        return logits


# ---- Training -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def fit(model, tables, labels, batches, held, seed, rate, dropout):
    """Variables at the end, and the classes of held-out graphs at each check.

    Batches have two leading axes: checks, and steps in between. The rate is halved
    after each fifth of the steps.
    """
    checks, between, _ = batches.rows.shape
    halved = optax.exponential_decay(1.0, checks * between // 5, 0.5, staircase=True)
    optimizer = optax.scale_by_adam()
    key, start = jax.random.split(jax.random.key(seed))
    variables = model.init(start, held, tables, train=False)

    def step(carry, batch):
        variables, state, i = carry

        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                batch,
                tables,
                train=True,
                keep=1 - dropout,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, i)},
            )
            ce = optax.softmax_cross_entropy_with_integer_labels
            return ce(logits, labels[batch.graphs]).mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimizer.update(grads, state)
        down = lambda p, u: p - rate * halved(i) * u
        params = jax.tree.map(down, variables["params"], updates)
        return ({**variables, "params": params, **updated}, state, i + 1), None

    def stretch(carry, batches):
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, model.apply(carry[0], held, tables, train=False).argmax(-1)

    start = variables, optimizer.init(variables["params"]), 0
    (variables, *_), found = jax.lax.scan(stretch, start, batches)
    return variables, found


@functools.partial(jax.jit, static_argnums=0)
def predict(model, variables, tables, batches):
    """Logits of each batch of graphs, by running statistics and by batch statistics.

    The latter are what a network sees in training, and what `recalibrate` merges.
    """
    run = lambda batch, keep_stats: model.apply(
        variables,
        batch,
        tables,
        train=not keep_stats,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
    )[0]
    return [[run(batch, kept) for batch in batches] for kept in (True, False)]


class Setup(NamedTuple):
    """A data set as the network gets it."""

    data: Graphs
    tables: tuple
    labels: Any
    shape: Shape  # of training batches
    held: Shape  # of the batch of held-out graphs
    draws: dict  # by test fold and seed

    def run(self, method, test, seed, rate, dropout):
        """Shares of right classes at each check, by validation and test; variables."""
        batches, *held = self.draws[test, seed]
        packed = [pack(self.data, graphs, self.shape) for graphs in batches]
        stack = lambda *v: np.stack(v).reshape(-1, EVERY, *v[0].shape)
        variables, found = fit(
            self.model(method),
            self.tables,
            self.labels,
            jax.tree.map(stack, *packed),
            pack(self.data, np.concatenate(held), self.held),
            seed,
            rate,
            dropout,
        )
        validated, tested = self.right(np.asarray(found), *held)
        return validated, tested, variables

    def model(self, method):
        """The network of a method."""
        return GIN(method, int(self.data.labels.max()) + 1)

    def right(self, found, *held):
        """Shares of right classes for each part of the held-out graphs."""
        ends = np.cumsum([len(graphs) for graphs in held])
        right = found[..., : ends[-1]] == self.data.labels[np.concatenate(held)]
        parts = np.split(right, ends[:-1], axis=-1)
        return [part.mean(-1) for part in parts]

    def pad(self, method, test, variables):
        """What changes if the held-out graphs of a fold come with more padding."""
        _, *held = self.draws[test, 0]
        graphs = np.concatenate(held)
        wide = Shape(self.held.graphs, WIDER * self.held.nodes, self.held.edges)
        batches = [pack(self.data, graphs, shape) for shape in (self.held, wide)]
        result = predict(self.model(method), variables, self.tables, batches)
        logits = np.asarray(result)[:, :, : len(graphs)]
        found = logits.argmax(-1)
        apart = np.abs(logits[:, 1] - logits[:, 0]).max((1, 2))
        return {
            "test": self.right(found, *held)[1],
            "changed": (found[:, 1] != found[:, 0]).mean(-1),
            "apart": apart / logits[:, 0].std((1, 2)),
        }


def prepare(data, tests, seeds, steps):
    """Draws all batches of all runs, and finds the shapes that they fit into."""
    fold = split(data)
    draws = {
        (test, seed): draw_batches(fold, test, seed, steps)
        for test, seed in itertools.product(tests, seeds)
    }
    training = [graphs for batches, *_ in draws.values() for graphs in batches]
    held = [np.concatenate(held) for _, *held in draws.values()]
    shapes = (least_shape(data, batches) for batches in (training, held))
    labels = jnp.asarray(np.append(data.labels, 0))
    return Setup(data, tables(data), labels, *shapes, draws)


def measure(name, setup, tests, seeds):
    """Trains each method on each fold; chooses, and tests."""
    results = []
    for method in METHODS:
        folds, chosen, habit, padded = [], [], [], []
        for test in tests:
            runs = [setup.run(method, test, seeds[0], **s) for s in SETTINGS]
            best = int(np.argmax([validated.max() for validated, *_ in runs]))
            padded.append(setup.pad(method, test, runs[best][2]))
            runs = [runs[best][:2]] + [
                setup.run(method, test, seed, **SETTINGS[best])[:2]
                for seed in seeds[1:]
            ]
            validated, tested = np.swapaxes(runs, 0, 1)
            check = int(validated.mean(0).argmax())
            folds.append(tested[:, check])
            chosen.append([best, EVERY * (check + 1)])
            habit.append(tested.mean(0))
        padding = {k: np.mean([p[k] for p in padded], 0) for k in padded[0]}
        results.append(
            {
                "method": method,
                "test": np.array(folds),
                "chosen": chosen,
                # The number of steps that is best for all test folds.
                "best on test": np.mean(habit, 0).max(),
                "padding": padding,
            }
        )
        evidence.log(f"{name}, {method}: {np.mean(folds):.3f}")
    (base,) = (r["test"].mean(1) for r in results if r["method"] == "masked")
    for r in results:
        if r["method"] != "masked":
            r["to masked"] = interval(r["test"].mean(1) - base)
    return results


def interval(differences):
    """The mean of differences by fold, and a 95 % interval.

    Training sets of folds overlap; this is the correction of Nadeau and Bengio (2003).
    """
    n, mean = len(differences), differences.mean()
    variance = differences.var(ddof=1) * (1 / n + 1 / (FOLDS - 2))
    half = stats.t.ppf(0.975, n - 1) * variance**0.5
    return [mean, mean - half, mean + half]


# ---- Reports ------------------------------------------------------------------------


def draw(results):
    """Differences to masked batch norm, and what more padding does to predictions."""
    plt = evidence.style()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.6), sharey=True, width_ratios=(3, 2)
    )
    colors = evidence.BLUE, evidence.ORANGE, evidence.GREEN, evidence.PURPLE
    others = evidence.SKY, evidence.RED, evidence.BLACK, evidence.YELLOW
    looks = zip(itertools.cycle(colors + others), itertools.cycle("Dos^"))
    places = np.arange(len(METHODS))[::-1]
    zero = [0, 0, 0]
    space = 0.8 / max(4, len(results))
    for k, ((name, found), (color, marker)) in enumerate(
        zip(results.items(), looks, strict=False)
    ):
        y = places + space * ((len(results) - 1) / 2 - k)
        mean, low, high = (
            100 * np.array([r.get("to masked", zero) for r in found["methods"]]).T
        )
        look = dict(fmt=marker, color=color, markersize=6)
        left.errorbar(mean, y, xerr=[mean - low, high - mean], label=name, **look)
        changed = [100 * r["padding"]["changed"][1] for r in found["methods"]]
        right.errorbar(changed, y, **look)
    left.axvline(0, color=evidence.BLACK, linewidth=0.8)
    left.set_yticks(places, METHODS)
    left.set(title="Test accuracy", xlabel="difference to masked (points), 95 %")
    right.set_title(f"The same graphs with {WIDER} times the rows")
    right.set_xlabel("predictions that change, by batch statistics (%)")
    for panel in (left, right):
        panel.grid(axis="y", visible=False)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def main():
    """Measures, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        default="../shared/data/graphs",
        help="a file, or a folder of files *.txt or *.txt.gz",
    )
    parser.add_argument(
        "--quick", action="store_true", help="two folds, few steps; writes nothing"
    )
    args = parser.parse_args()
    given = Path(args.data)
    files = [given] if given.is_file() else [*given.glob("*.txt"), *given.glob("*.gz")]
    if not files:
        parser.error(f"--data: no files *.txt or *.txt.gz in {given}")
    sets = {path.name.split(".")[0]: read(path) for path in files}
    path = evidence.EVIDENCE / "graphs.json"
    results = {}
    if path.is_file() and not args.quick:
        results = json.loads(path.read_text())["results"]
    for name, data in sorted(sets.items(), key=lambda pair: len(pair[1].tags)):
        started = time.process_time()
        seeds, tests, steps = SEEDS, range(FOLDS), STEPS
        if args.quick:
            seeds, tests, steps = seeds[:1], tests[:2], 2 * EVERY
        setup = prepare(data, tests, seeds, steps)
        real = data.nodes.mean() * BATCH / setup.shape.nodes
        results[name] = {
            "command": evidence.command(),
            "graphs": len(data.labels),
            "nodes": len(data.tags),
            "seeds": len(seeds),
            "steps": steps,
            "real share of nodes": real,
            "methods": measure(name, setup, tests, seeds),
            "cpu_seconds": round(time.process_time() - started),
        }
        results = evidence.plain(results)
        evidence.report(
            "graphs",
            __doc__.splitlines()[0],
            SEEDS,
            results,
            f"{graphs_table(results)}\n\n{graphs_padding_table(results)}",
            draw(results),
            folder=None if args.quick else evidence.EVIDENCE,
        )


if __name__ == "__main__":
    main()
