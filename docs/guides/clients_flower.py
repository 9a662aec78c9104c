"""Trains on clients with Flower: ten clients with two digits each, on one machine.

    pip install "jbn[train]" "flwr[simulation]"
    python clients_flower.py
    PLAIN=1 python clients_flower.py

With `PLAIN` the two lines that bring in jbn are left out. The guide "Train on clients"
explains them.
"""

import functools
import os

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

import jbn
from jbn import tools
from jbn.training.data import load_dataset


CLIENTS, ROUNDS, STEPS, BATCH, RATE = 10, 40, 5, 32, 0.1
PLAIN = "PLAIN" in os.environ


def to_record(variables):
    """Flower's record of variables."""
    flat = flatten_dict(variables, sep="/")
    return ArrayRecord({name: Array(np.asarray(v)) for name, v in flat.items()})


def from_record(record):
    """Variables of a record."""
    return unflatten_dict({name: v.numpy() for name, v in record.items()}, sep="/")


class Merged(FedAvg):
    """Averages parameters, and merges statistics."""

    def aggregate_train(self, server_round, replies):
        """As of `FedAvg`, but for the statistics."""
        replies = [reply for reply in replies if reply.has_content()]
        arrays, metrics = super().aggregate_train(server_round, replies)
        rows = [reply.content["metrics"]["num-examples"] for reply in replies]
        stats = [
            from_record(reply.content["arrays"])["batch_stats"] for reply in replies
        ]
        merged = tools.merge(stats, weights=rows)
        new = {**from_record(arrays), "batch_stats": merged}
        return to_record(new), metrics


# The two lines.
Norm = functools.partial(jbn.BatchNorm, tau=2 * BATCH, second_moment=True)
Strategy = Merged
if PLAIN:
    Norm, Strategy = nn.BatchNorm, FedAvg


class Model(nn.Module):
    """A multilayer perceptron."""

    @nn.compact
    def __call__(self, x, train):
        """Returns logits."""
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
            x = Norm(use_running_average=not train, momentum=0.9)(x)
        return nn.Dense(10)(x)


def rows_of(split):
    """Images as rows from 0 to 1, and labels."""
    return split.image.reshape(len(split.label), -1) / np.float32(255), split.label


model, digits = Model(), load_dataset("digits")
train_set, test_set = rows_of(digits.train), rows_of(digits.test)
del digits


@jax.jit
def train(variables, batches):
    """Some steps of SGD."""

    def step(variables, batch):
        images, labels = batch

        def loss(params):
            logits, updated = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return each.mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - RATE * g, variables["params"], grads)
        return {"params": params, **updated}, None

    return jax.lax.scan(step, variables, batches)[0]


client = ClientApp()


@client.train()
def fit(message, context):
    """A client's part of a round."""
    images, labels = train_set
    k = context.node_config["partition-id"]
    own = np.flatnonzero((labels == k) | (labels == (k + 1) % 10))
    seed = k, message.content["config"]["server-round"]
    rows = np.random.default_rng(seed).choice(own, (STEPS, BATCH))
    new = train(from_record(message.content["arrays"]), (images[rows], labels[rows]))
    content = {
        "arrays": to_record(new),
        "metrics": MetricRecord({"num-examples": rows.size}),
    }
    return Message(content=RecordDict(content), reply_to=message)


server = ServerApp()


@server.main()
def main(grid, context):
    """All rounds, and a test."""
    images, labels = test_set
    variables = model.init(jax.random.key(0), images[:1], train=False)
    strategy = Strategy(fraction_evaluate=0.0)  # tested below, on the server
    result = strategy.start(grid, to_record(variables), num_rounds=ROUNDS)
    logits = model.apply(from_record(result.arrays), images, train=False)
    print(f"test accuracy: {100 * (logits.argmax(-1) == labels).mean():.1f} %")


if __name__ == "__main__":
    # From the file: `__main__` would be pickled, and compiled again, for each message.
    from clients_flower import client, server

    run_simulation(server, client, num_supernodes=CLIENTS)
