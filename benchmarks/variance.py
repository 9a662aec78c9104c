"""How wrong is the variance of a batch? Relative error by mean/std, in float32.

    python benchmarks/variance.py

The worst feature, against float64 NumPy. Cold is the first batch of a fresh layer, warm
the fourth. Peers that are not installed are left out.
"""

import sys

import evidence
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jbn


SHAPES = [(4096, 8), (64, 56, 56, 64)]
RATIOS = [0.0, 1e2, 1e3, 1e4]
CALLS = {"cold": 1, "warm": 4}


def of_evidence(make):
    """The running variance after updates that forget the old one."""

    def variance(x, calls):
        norm = make(0.0)
        params, state = norm.init(x.shape[-1], jnp.float32)
        train = jax.jit(lambda state, x: norm.apply(params, state, x, train=True)[1])
        for _ in range(calls):
            state = train(state, x)
        return norm.stats(state)[1]

    return variance


def ours(x, calls):
    """The variance that `jbn` normalizes by, which no state enters."""
    params, stats = jbn.init(x.shape[-1])
    train = jax.jit(
        lambda stats, x: jbn.batch_norm(
            x, params, stats, use_running_average=False, momentum=0.0
        )[1]
    )
    for _ in range(calls):
        stats = train(stats, x)
    return stats.var


def flax_two_passes(x, calls):
    """As `of_evidence`."""
    from flax import linen as nn

    layer = nn.BatchNorm(
        use_running_average=False, momentum=0.0, use_fast_variance=False
    )
    variables = layer.init(jax.random.key(0), x)
    train = jax.jit(lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[1])
    for _ in range(calls):
        variables = {**variables, **train(variables, x)}
    return variables["batch_stats"]["var"]


def flax_nnx(x, calls):
    """Likewise."""
    layer = nnx.BatchNorm(x.shape[-1], momentum=0.0, rngs=nnx.Rngs(0))
    for _ in range(calls):
        nnx.jit(lambda layer, x: layer(x))(layer, x)
    return layer.var[...]


def torch(x, calls):
    """Likewise, with PyTorch's correction for the sample size taken out."""
    import torch

    channels_first = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    running, mean = torch.ones(x.shape[-1]), torch.zeros(x.shape[-1])
    for _ in range(calls):
        torch.nn.functional.batch_norm(
            channels_first, mean, running, training=True, momentum=1.0
        )
    rows = x.size // x.shape[-1]
    return running.numpy() * (rows - 1) / rows


PEERS = {
    "jbn": ours,
    "flax.linen, default": of_evidence(evidence.FlaxLinen),
    "flax.linen, use_fast_variance=False": flax_two_passes,
    "flax.nnx, default": flax_nnx,
    "Haiku": of_evidence(evidence.Haiku),
    "Equinox": of_evidence(evidence.Equinox),
    "Keras 3 on JAX": of_evidence(evidence.Keras),
    "PyTorch": torch,
}
COLORS = dict(
    zip(
        PEERS,
        (
            evidence.BLUE,
            evidence.ORANGE,
            evidence.YELLOW,
            evidence.SKY,
            evidence.GREEN,
            evidence.PURPLE,
            evidence.RED,
            evidence.BLACK,
        ),
        strict=True,
    )
)


def draw(results):
    """Error by ratio, one panel a shape."""
    plt = evidence.style()
    figure, panels = plt.subplots(1, len(SHAPES), figsize=(10, 3.6), sharey=True)
    for panel, shape in zip(panels, SHAPES, strict=True):
        chosen = [r for r in results if r["shape"] == list(shape) and r["is"] == "cold"]
        for name, color in COLORS.items():
            errors = [r["error"].get(name) for r in chosen]
            if None not in errors:
                panel.plot(range(len(RATIOS)), errors, "o-", color=color, label=name)
        panel.axhline(1e-5, color="k", ls=":", lw=1)
        panel.set_yscale("log")
        panel.set_xticks(range(len(RATIOS)), [f"{r:g}" for r in RATIOS])
        panel.set_xlabel("mean / standard deviation")
        panel.set_title(f"{'x'.join(map(str, shape))}, float32")
    panels[0].set_ylabel("relative error of the variance")
    panels[0].legend(fontsize=7)
    return figure


def main():
    """Measures, prints a table, writes JSON and a figure."""
    results = []
    for shape in SHAPES:
        for ratio in RATIOS:
            x = np.random.default_rng(0).standard_normal(shape) + ratio
            x = x.astype(np.float32)
            want = x.astype(np.float64).var(tuple(range(x.ndim - 1)))
            for name, calls in CALLS.items():
                error = {}
                for peer, variance in PEERS.items():
                    try:
                        found = np.asarray(variance(x, calls), np.float64)
                    except ImportError as missing:
                        print(f"{peer}: left out, {missing}", file=sys.stderr)
                        continue
                    error[peer] = float(np.abs(found / want - 1).max())
                line = {"shape": list(shape), "ratio": ratio, "is": name}
                results.append(line | {"error": error})
    rows = [
        [
            "x".join(map(str, r["shape"])),
            f"{r['ratio']:g}",
            r["is"],
            *(f"{r['error'][p]:.0e}" if p in r["error"] else "" for p in PEERS),
        ]
        for r in results
    ]
    evidence.report(
        "variance",
        __doc__.splitlines()[0],
        [0],
        results,
        evidence.table(["shape", "mean/std", "layer", *PEERS], rows),
        draw(results),
        folder=evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
