"""How wrong is the variance of a batch? Relative error by mean/std, in float32.

    python benchmarks/variance.py

Prints a Markdown table. Peers that are not installed are left out.
"""

import os
import platform


os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np
from flax import linen as nn, nnx

import jbn


SHAPES = [(4096, 8), (64, 56, 56, 64)]
RATIOS = [0.0, 1e2, 1e3, 1e4]


def ours(x):
    """The variance that `jbn` normalizes by."""
    return jax.jit(jbn.moments)(x).var


def flax_linen(x, fast=True):
    """The running variance after one update that forgets the old one."""
    layer = nn.BatchNorm(
        use_running_average=False, momentum=0.0, use_fast_variance=fast
    )
    variables = layer.init(jax.random.key(0), x)
    apply = jax.jit(lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[1])
    return apply(variables, x)["batch_stats"]["var"]


def flax_nnx(x):
    """Likewise."""
    layer = nnx.BatchNorm(x.shape[-1], momentum=0.0, rngs=nnx.Rngs(0))
    nnx.jit(lambda layer, x: layer(x))(layer, x)
    return layer.var[...]


def keras(x):
    """Likewise."""
    import keras

    layer = keras.layers.BatchNormalization(momentum=0.0)
    layer(x, training=True)
    return np.asarray(layer.moving_variance)


def torch(x):
    """Likewise, with PyTorch's correction for the sample size taken out."""
    import torch

    channels_first = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    running = torch.ones(x.shape[-1])
    torch.nn.functional.batch_norm(
        channels_first, torch.zeros(x.shape[-1]), running, training=True, momentum=1.0
    )
    rows = x.size // x.shape[-1]
    return running.numpy() * (rows - 1) / rows


PEERS = {
    "jbn": ours,
    "flax.linen, default": flax_linen,
    "flax.linen, use_fast_variance=False": lambda x: flax_linen(x, fast=False),
    "flax.nnx, default": flax_nnx,
    "Keras 3 on JAX": keras,
    "PyTorch": torch,
}


def main():
    """Prints the table: the worst feature of each, against float64 NumPy."""
    versions = f"JAX {jax.__version__}, {jax.devices()[0].platform}"
    print(f"{platform.machine()}, {versions}\n")
    print("| shape | mean/std |", " | ".join(PEERS), "|")
    print("|---|---|" + "---|" * len(PEERS))
    for shape in SHAPES:
        for ratio in RATIOS:
            x = np.random.default_rng(0).standard_normal(shape) + ratio
            x = x.astype(np.float32)
            want = x.astype(np.float64).var(tuple(range(x.ndim - 1)))
            row = []
            for variance in PEERS.values():
                try:
                    error = np.abs(np.asarray(variance(x), np.float64) / want - 1)
                except ImportError:
                    row.append("not installed")
                else:
                    row.append(f"{error.max():.0e}")
            print(f"| {shape} | {ratio:g} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
