"""How much memory does a norm layer take in training? By what XLA compiled.

    python benchmarks/memory.py

What is kept for the backward pass, in bytes an element of a bfloat16 input, and the
temporary memory and bytes accessed of eight blocks of convolution, norm and ReLU, one
after the other or in a `lax.scan`: none of which depends on how busy a machine is. And
the time of those blocks, one after the other. (In a loop, XLA on CPU has a slow kernel
for convolutions, and would take minutes.)
"""

import timing


timing.prepare()

import functools
import sys

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peers

import jbn


SHAPE, DEPTH = (32, 32, 32, 64), 8
BLUE, ORANGE, SKY = evidence.BLUE, evidence.ORANGE, evidence.SKY


# ---- What is kept ------------------------------------------------------------------


def ours(x, residual, activation):
    """All of it in the norm."""
    params, _ = jbn.init(x.shape[-1])
    return lambda params, x, r: jbn.batch_norm(
        x,
        params,
        None,
        use_running_average=False,
        residual=r if residual else None,
        activation=activation,
    )[0], params


def behind(make, x, residual, activation):
    """The residual and the activation behind the norm."""
    norm, params, state = make(x.shape[-1], x.dtype)

    def apply(params, x, r):
        y, _ = norm(params, state, x, True)
        y = y + r.astype(y.dtype) if residual else y
        return y if activation is None else activation(y)

    return apply, params


NORMS = {
    "jbn": ours,
    "jbn, behind it": functools.partial(behind, peers.NORMS["jbn"]),
} | {
    name: functools.partial(behind, peers.NORMS[name])
    for name in ("flax.linen", "flax.nnx", "Haiku", "Equinox", "Keras")
}
WHAT = {
    "norm": (False, None),
    "norm, ReLU": (False, nn.relu),
    "norm, add, ReLU": (True, nn.relu),
}


def kept(make, residual, activation):
    """Bytes an element that the forward pass keeps, beyond what belongs to a feature.

    What the norm is given counts, the output does not: the next layer keeps that.
    """
    x, r = jnp.zeros((2, 4096, 16), jnp.bfloat16)
    apply, params = make(x, residual, activation)
    y, vjp = jax.vjp(jax.jit(apply), params, x, r)
    leaves = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(vjp)}
    leaves.pop(y.unsafe_buffer_pointer(), None)
    return sum(v.nbytes for v in leaves.values() if v.size >= x.size) / x.size


# ---- A stack -----------------------------------------------------------------------


def stack(norm, activation, dtype, scanned):
    """The gradient of a stack, compiled, and what to call it with."""
    features = SHAPE[-1]
    x, ct = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    x = x.astype(dtype)
    variables = norm.init(jax.random.key(0), x)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, features, features)) / 17
    stacked = jax.tree.map(
        lambda v: jnp.broadcast_to(v, (DEPTH, *v.shape)), (kernel, variables)
    )

    def block(x, weights):
        kernel, variables = weights
        x = jax.lax.conv_general_dilated(
            x,
            kernel.astype(dtype),
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y, _ = norm.apply(variables, x, mutable=["batch_stats"])
        return activation(y), None

    def loss(weights, x, ct):
        if scanned:
            x, _ = jax.lax.scan(block, x, weights)
        else:
            for i in range(DEPTH):
                x, _ = block(x, jax.tree.map(lambda v, i=i: v[i], weights))
        return (x.astype(jnp.float32) * ct).sum()

    args = stacked, x, ct
    return jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile(), args


def compare(dtype, scanned):
    """Time, and temporary memory and bytes accessed in inputs, of a stack by norm."""
    found, cases = {}, {}
    for name, (norm, activation) in stacks(dtype).items():
        compiled, args = stack(norm, activation, dtype, scanned)
        size = args[1].nbytes
        found[name] = {
            "temporary": compiled.memory_analysis().temp_size_in_bytes / size,
            "accessed": compiled.cost_analysis()["bytes accessed"] / size,
        }
        cases[name] = functools.partial(compiled, *args)
    if not scanned:
        times = timing.interleaved(cases, rounds=5, wait=jax.block_until_ready)
        for name, of_norm in found.items():
            of_norm["flax"] = timing.ratio(times, name, "flax.linen")
    return found


def stacks(dtype):
    """A norm with ReLU behind it, and the fused form."""
    identity = lambda y: y
    train = {"use_running_average": False}
    return {
        "flax.linen": (nn.BatchNorm(**train, dtype=dtype), nn.relu),
        "jbn, ReLU behind it": (jbn.BatchNorm(**train), nn.relu),
        "jbn": (jbn.BatchNorm(**train, activation=nn.relu), identity),
    }


def draw(bytes_kept, stacked):
    """What is kept on the left, stacks on the right."""
    plt = evidence.style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    names = list(bytes_kept)
    for i, (what, color) in enumerate(zip(WHAT, (ORANGE, SKY, BLUE), strict=True)):
        places = np.arange(len(names)) + (i - 1) * 0.27
        left.bar(
            places, [bytes_kept[n][what] for n in names], 0.27, label=what, color=color
        )
    left.set_xticks(range(len(names)), names, fontsize=8, rotation=20)
    left.set_ylabel("bytes an element")
    left.set_title("Kept for the backward pass, bfloat16")
    left.legend(fontsize=8)
    cases = list(dict.fromkeys((r["dtype"], r["scanned"]) for r in stacked))
    labels = list(dict.fromkeys(r["norm"] for r in stacked))
    for i, (label, color) in enumerate(zip(labels, (ORANGE, SKY, BLUE), strict=True)):
        heights = [r["temporary"] for r in stacked if r["norm"] == label]
        places = np.arange(len(cases)) + (i - 1) * 0.27
        right.bar(places, heights, 0.27, label=label, color=color)
    ticks = [f"{d}\n{'scan' if s else 'unrolled'}" for d, s in cases]
    right.set_xticks(range(len(cases)), ticks, fontsize=8)
    right.set_ylabel("inputs")
    right.set_title("Temporary memory of 8 blocks of convolution, norm, ReLU")
    right.legend(fontsize=8)
    return figure


def main():
    """Compiles, prints two tables, writes JSON and a figure."""
    bytes_kept = {}
    for name, make in NORMS.items():
        try:
            bytes_kept[name] = {k: kept(make, *v) for k, v in WHAT.items()}
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
    stacked = []
    for dtype in ("bfloat16", "float32"):
        for scanned in (False, True):
            line = {"dtype": dtype, "scanned": scanned}
            found = compare(jnp.dtype(dtype), scanned)
            stacked += [line | {"norm": name} | of for name, of in found.items()]
    first = evidence.table(
        ["kept, bytes an element", *WHAT],
        [[n, *(f"{v[w]:.1f}" for w in WHAT)] for n, v in bytes_kept.items()],
    )
    second = evidence.table(
        ["8 blocks", "norm", "temporary memory, inputs", "bytes", "time, / Flax's"],
        [
            [
                f"{r['dtype']}, {'scan' if r['scanned'] else 'unrolled'}",
                r["norm"],
                f"{r['temporary']:.1f}",
                f"{r['accessed']:.0f}",
                "" if r["scanned"] else f"{r['flax']:.2f}",
            ]
            for r in stacked
        ],
    )
    evidence.report(
        "memory",
        __doc__.splitlines()[0],
        [],
        {"kept": bytes_kept, "stack": stacked},
        f"{first}\n\n{second}",
        draw(bytes_kept, stacked),
        folder=evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
