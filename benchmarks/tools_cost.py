"""What do the tools cost on a network of ResNet-50's size?

    python benchmarks/tools_cost.py

Prints a Markdown table, in seconds, the best of three repetitions where it takes few.
Tools that run the network (`recalibrate` and `adapt` are `population` and some small
change) are timed with one batch, which is mostly compilation, and by the next ones.
"""

import datetime
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

import jbn.linen
from jbn.models.resnet import resnet50, torchvision_name
from jbn.tools import (
    average,
    convert,
    decays,
    fold,
    freeze,
    from_torch,
    inspect,
    kinds,
    merge,
    population,
)


BATCH, SIZE, TREES = 16, 64, 8


def best(function, repetitions=3):
    """The least time of some calls, in seconds."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return min(times)


def streamed(function, batch, number=5):
    """Seconds for the first of some batches, and for each after it."""
    asked = []

    def batches():
        for _ in range(number):
            asked.append(time.perf_counter())
            yield batch

    jax.block_until_ready(function(batches()))
    end = time.perf_counter()
    return asked[1] - asked[0], (end - asked[1]) / (number - 1)


def main():
    """Times everything, and prints."""
    model = resnet50()
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)), jnp.uint8)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))()
    params, stats = variables["params"], variables["batch_stats"]
    numbers = sum(v.size for v in jax.tree.leaves(params))
    norms = len(jax.tree.leaves(stats, is_leaf=lambda node: "mean" in node))
    run = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    frozen = convert(model, jbn.linen.FrozenBatchNorm)
    trace = lambda m: jax.make_jaxpr(lambda v, x: m.apply(v, x, train=False))
    rows = []

    def row(what, seconds):
        rows.append((what, seconds))
        print(f"{what}: {seconds:.4f} s", flush=True)

    row("`convert`, the call", best(lambda: convert(model)))
    row(
        "tracing the model",
        best(lambda: trace(model)(variables, images).jaxpr.eqns[:0]),
    )
    row(
        "tracing the model converted",
        best(lambda: trace(frozen)(variables, images).jaxpr.eqns[:0]),
    )
    jitted = jax.jit(run)
    row(
        "one batch forward in training mode, compilation",
        best(lambda: jax.jit(lambda v, x: run(v, x))(variables, images), 1),
    )
    jax.block_until_ready(jitted(variables, images))
    row("the same, compiled", best(lambda: jitted(variables, images)))
    first, further = streamed(
        lambda batches: population(run, variables, batches), images
    )
    row("`population`, one batch", first)
    row("`population`, each further batch", further)
    looked_at = lambda batches: inspect(run, variables, batches).num_batches
    row(
        "`inspect`, each further batch, with the findings",
        streamed(looked_at, images)[1],
    )
    row(f"`merge`, {TREES} `batch_stats`", best(lambda: merge([stats] * TREES)))
    row(f"`average`, {TREES} `params`", best(lambda: average([params] * TREES)))
    labels = lambda f: jax.tree.leaves(f()) and None
    row("`freeze`", best(lambda: labels(lambda: freeze(variables, "stage*"))))
    row("`kinds`", best(lambda: labels(lambda: kinds(variables))))
    row("`decays`", best(lambda: labels(lambda: decays(variables))))
    fold_all = lambda: fold(model, variables, images[:1], train=False).variables
    row("`fold`", best(fold_all, 1))
    state = torch_state(variables)
    row(
        "`from_torch`",
        best(lambda: from_torch(state, variables, names=torchvision_name)),
    )
    print(
        f"\nResNet-50: {numbers / 1e6:.1f} M parameters, {norms} norm layers;"
        f" batches of {BATCH} images of {SIZE}x{SIZE}."
        f" {platform.system()} {platform.machine()}, {os.cpu_count()} cores,"
        f" JAX {jax.__version__}, {datetime.date.today().isoformat()}.\n"
    )
    print("| what | seconds |\n|---|---|")
    for what, seconds in rows:
        print(f"| {what} | {seconds:.2g} |")


def torch_state(variables):
    """A state dict as of torchvision's ResNet-50, of arrays."""
    names = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    names |= {"mean": "running_mean", "var": "running_var"}
    state = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        _, *layer, name = (key.key for key in path)
        value = np.asarray(leaf)
        if name == "kernel":
            value = value.transpose((3, 2, 0, 1) if value.ndim == 4 else (1, 0))
        state[f"{torchvision_name('/'.join(layer))}.{names[name]}"] = value
    return state


if __name__ == "__main__":
    main()
