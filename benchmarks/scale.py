"""How does the cost of a norm grow: with rows, with features, with devices?

    python benchmarks/scale.py

Time of forward and backward against flax.linen's, on one core; and what XLA makes of a
layer on 1 to 64 virtual devices: all-reduces and their bytes, under plain `jit` on a
sharded batch and under `shard_map`. For TPUs see `pod.py`.
"""

import timing


timing.prepare()

import functools

import evidence
import jax


jax.config.update("jax_num_cpu_devices", 64)

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import jbn
from jbn.training.ahead import find_collectives


SIZES = [(256, 64), (4096, 64), (65536, 64), (4096, 8), (4096, 512), (4096, 4096)]
DEVICES = (1, 2, 4, 8, 16, 32, 64)
FEATURES = 64


def op(norm):
    """Forward and backward, compiled as one, of (variables, x, ct)."""

    @jax.jit
    def run(variables, x, ct):
        def apply(params, x):
            variables_ = {"params": params, "batch_stats": variables["batch_stats"]}
            return norm.apply(variables_, x, mutable=["batch_stats"])

        y, vjp, updated = jax.vjp(apply, variables["params"], x, has_aux=True)
        return y, vjp(ct), updated

    return run


def times():
    """By shape."""
    results = []
    device = jax.devices()[0]
    for shape in SIZES:
        with jax.set_mesh(Mesh([device], "one")):
            keys = jax.random.split(jax.random.key(0))
            x, ct = (jax.random.normal(key, shape) for key in keys)
            cases = {}
            for name, norm in {
                "jbn": jbn.BatchNorm(use_running_average=False),
                "flax.linen": nn.BatchNorm(use_running_average=False),
            }.items():
                variables = norm.init(jax.random.key(0), x)
                cases[name] = functools.partial(op(norm), variables, x, ct)
            found = timing.interleaved(cases, wait=jax.block_until_ready)
        results.append(
            {
                "rows": shape[0],
                "features": shape[1],
                "microseconds": 1e6 * float(np.median(found["jbn"])),
                "flax": timing.ratio(found, "jbn", "flax.linen"),
            }
        )
        print(results[-1], flush=True)
    return results


def collectives(norm, devices, by):
    """How many a forward and backward pass have, and their bytes, a device."""
    mesh = Mesh(np.array(jax.devices()[:devices]), "data")
    x = jax.ShapeDtypeStruct((64 * 8, FEATURES), jnp.float32)
    variables = jax.eval_shape(
        norm(None).init, jax.random.key(0), jnp.zeros((2, FEATURES))
    )
    # (Scale and bias are left alone: their gradients have an all-reduce in any case.)
    params = variables["params"]

    def run(stats, x, ct):
        def apply(x):
            constants = jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), params)
            return norm("data" if by == "shard_map" else None).apply(
                {"params": constants, "batch_stats": stats}, x, mutable=["batch_stats"]
            )

        y, vjp, updated = jax.vjp(apply, x, has_aux=True)
        return y, vjp(ct)[0], updated

    rows = NamedSharding(mesh, P("data"))
    if by == "shard_map":
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=(P("data"), P("data"), P()),
        )
    with jax.set_mesh(mesh):
        step = jax.jit(run, in_shardings=(NamedSharding(mesh, P()), rows, rows))
        text = step.lower(variables["batch_stats"], x, x).compile().as_text()
    found = find_collectives(text)
    return {
        "count": len(found),
        "kinds": sorted({c.kind for c in found}),
        "bytes_a_feature": sum(c.bytes for c in found) / FEATURES,
    }


def main():
    """Measures, prints two tables, writes JSON and a figure."""
    by_size = times()
    norms = {
        "jbn": lambda axis_name: jbn.BatchNorm(
            use_running_average=False, axis_name=axis_name
        ),
        "flax.linen": lambda axis_name: nn.BatchNorm(
            use_running_average=False, axis_name=axis_name
        ),
    }
    by_devices = []
    for by in ("jit", "shard_map"):
        for devices in DEVICES:
            for name, norm in norms.items():
                found = collectives(norm, devices, by)
                line = {"by": by, "devices": devices, "norm": name}
                by_devices.append(line | found)
    first = evidence.table(
        ["rows", "features", "jbn, us", "jbn / flax.linen"],
        [
            [r["rows"], r["features"], f"{r['microseconds']:.0f}", f"{r['flax']:.2f}"]
            for r in by_size
        ],
    )
    second = evidence.table(
        ["by", "devices", "norm", "collectives", "kinds", "bytes a feature"],
        [
            [
                r["by"],
                r["devices"],
                r["norm"],
                r["count"],
                ", ".join(r["kinds"]),
                f"{r['bytes_a_feature']:.0f}",
            ]
            for r in by_devices
        ],
    )
    plt = evidence.style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    labels = [f"{r['rows']}x{r['features']}" for r in by_size]
    left.bar(range(len(labels)), [r["flax"] for r in by_size], color=evidence.BLUE)
    left.axhline(1, color=evidence.ORANGE, lw=1)
    left.set_xticks(range(len(labels)), labels, rotation=20, fontsize=8)
    left.set_ylabel("time / flax.linen's")
    left.set_title("Forward and backward, float32, one core")
    for name, color in (("jbn", evidence.BLUE), ("flax.linen", evidence.ORANGE)):
        chosen = [r for r in by_devices if r["norm"] == name and r["by"] == "jit"]
        right.plot(
            [r["devices"] for r in chosen],
            [r["bytes_a_feature"] for r in chosen],
            "o-",
            color=color,
            label=f"{name} ({max(r['count'] for r in chosen)} all-reduces at most)",
        )
    right.set_xscale("log", base=2)
    right.set_xlabel("devices")
    right.set_ylabel("bytes a feature")
    right.set_title("All-reduced by a layer, forward and backward, plain jit")
    right.legend(fontsize=8)
    evidence.report(
        "scale",
        __doc__.splitlines()[0],
        [0],
        {"size": by_size, "devices": by_devices},
        f"{first}\n\n{second}",
        figure,
        folder=evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
