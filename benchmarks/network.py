"""What does the norm cost a whole network? A ResNet's step, with ours and with Flax's.

    python benchmarks/network.py

The same ResNet, optimizer and data. Flax's norm has ReLU and residual behind it, as its
users write it; ours has them in it. Images of 64x64, batches of 16, one core, and
bfloat16, which a CPU only emulates, compiled but not run. For a GPU: `gpu.py`.
"""

import timing


timing.prepare()

import functools

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbn
from jbn.models import resnet18, resnet50


BATCH, SIZE = 16, 64
MODELS = {"ResNet-18": resnet18, "ResNet-50": resnet50}
DTYPES = "bfloat16", "float32"


def step(make, norm, dtype, batch=BATCH, size=SIZE):
    """A compiled step, with the state that it starts from."""
    model = make(num_classes=1000, norm=norm, dtype=dtype)
    optimizer = optax.sgd(0.1, momentum=0.9)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.standard_normal((batch, size, size, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 1000, batch))
    variables = jax.jit(functools.partial(model.init, train=False))(
        jax.random.key(0), images[:1]
    )
    params, stats = variables["params"], variables["batch_stats"]

    def run(params, stats, momentum, images, labels):
        def loss_of(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, momentum = optimizer.update(grads, momentum, params)
        return optax.apply_updates(params, updates), new, momentum, loss

    args = (params, stats, optimizer.init(params), images, labels)
    return jax.jit(run).lower(*args).compile(), args


def time_of(cases):
    """What each step takes, and the loss that it gives."""
    times = timing.interleaved(cases, rounds=7, wait=jax.block_until_ready)
    return {
        norm: {
            "loss": float(case()[-1]),
            "seconds": float(np.median(times[norm])),
            "flax": timing.ratio(times, norm, "flax.linen"),
        }
        for norm, case in cases.items()
    }


def share(result, what):
    """Ours over Flax's."""
    return result["jbn"][what] / result["flax.linen"][what]


def draw(results):
    """Time, memory and bytes, in those of Flax's."""
    plt = evidence.style()
    figure, panel = plt.subplots(figsize=(7, 3.4))
    for i, (label, values) in enumerate(
        {
            "time": [r["jbn"].get("flax", 0) for r in results],
            "temporary memory": [share(r, "temporary_bytes") for r in results],
            "bytes accessed": [share(r, "bytes_accessed") for r in results],
        }.items()
    ):
        color = (evidence.BLUE, evidence.SKY, evidence.GREEN)[i]
        places = np.arange(len(results)) + (i - 1) * 0.25
        panel.bar(places, values, 0.25, label=label, color=color)
    panel.axhline(1, color=evidence.ORANGE, lw=1)
    names = [f"{r['model']}, {r['dtype']}" for r in results]
    panel.set_xticks(range(len(results)), names)
    panel.set_ylim(0, 1.4)
    panel.set_ylabel("jbn / flax.linen")
    panel.set_title(f"A training step, batch {BATCH} of {SIZE}x{SIZE}")
    panel.legend(fontsize=8, loc="upper center", ncols=3)
    return figure


def main():
    """Measures, prints a table, writes JSON and a figure."""
    norms = {"flax.linen": nn.BatchNorm, "jbn": jbn.BatchNorm}
    results = []
    for name, make in MODELS.items():
        for dtype in DTYPES:
            timed = dtype == "float32"
            cases, about = {}, {}
            for norm, cls in norms.items():
                cls = functools.partial(cls, dtype=jnp.dtype(dtype))
                compiled, args = step(make, cls, jnp.dtype(dtype))
                cases[norm] = functools.partial(compiled, *args)
                memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
                about[norm] = {
                    "temporary_bytes": memory.temp_size_in_bytes,
                    "bytes_accessed": cost["bytes accessed"],
                }
            if timed:
                for norm, times in time_of(cases).items():
                    about[norm] |= times
            results.append({"model": name, "dtype": dtype, **about})
            print(results[-1], flush=True)
    rows = [
        [
            f"{r['model']}, {r['dtype']}",
            *(
                f"{value:.3f}" if value is not None else "not run"
                for value in (
                    r["flax.linen"].get("seconds"),
                    r["jbn"].get("seconds"),
                    r["jbn"].get("flax"),
                )
            ),
            f"{share(r, 'temporary_bytes'):.2f}",
            f"{share(r, 'bytes_accessed'):.2f}",
        ]
        for r in results
    ]
    header = ["step", "flax.linen, s", "jbn, s", "time", "temporary memory", "bytes"]
    evidence.report(
        "network",
        __doc__.splitlines()[0],
        [0],
        results,
        evidence.table(header, rows),
        draw(results),
        [f"batch {BATCH}, images {SIZE}x{SIZE}", jax.devices()[0].device_kind],
        folder=evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
