"""How many bytes does a norm cost three bottleneck blocks on one TPU chip?

    pip install -e ".[train,tpu]"
    python benchmarks/tpu_blocks.py          two CPU minutes

Compiles for TPU v5e, where there is none; nothing is run. Blocks of a ResNet-50 at
56x56, 256 images, bfloat16: forward, and forward and backward. What the compiler plans
to read and write, and temporary memory, in inputs of a block.

The second pass over a batch that is far from its running mean is left out: it is in a
branch that is seldom taken, and the compiler counts the larger of two branches.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from evidence import table
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jbn
from jbn import summary
from jbn.training.ahead import topology_devices


SHAPE, WIDTH, DEPTH = (256, 56, 56, 256), 64, 3
NORMS = {
    "flax.linen, ReLU and addition behind it": (nn.BatchNorm, False),
    "jbn, behind it": (jbn.BatchNorm, False),
    "jbn, in it": (jbn.BatchNorm, True),
}


class Blocks(nn.Module):
    """Bottlenecks (He et al. 2016) with identity shortcuts."""

    norm: type
    fused: bool

    @nn.compact
    def __call__(self, x):
        """Of the shape of `x`."""
        conv = functools.partial(nn.Conv, use_bias=False, dtype=jnp.bfloat16)
        make = functools.partial(
            self.norm, use_running_average=False, momentum=0.9, dtype=jnp.bfloat16
        )

        def norm(y, residual=None):
            if self.fused:
                kept = {} if residual is None else {"residual": residual}
                return make(activation=nn.relu)(y, **kept)
            y = make()(y)
            return nn.relu(y if residual is None else y + residual)

        for _ in range(DEPTH):
            y = norm(conv(WIDTH, (1, 1))(x))
            y = norm(conv(WIDTH, (3, 3))(y))
            x = norm(conv(SHAPE[-1], (1, 1))(y), x)
        return x


def compiled(blocks, mesh, backward):
    """For a described chip."""

    def forward(variables, x):
        return blocks.apply(variables, x, mutable=["batch_stats"])

    def gradient(variables, x, ct):
        def loss(params, x):
            y, updated = forward(variables | {"params": params}, x)
            return (y.astype(jnp.float32) * ct).sum(), updated

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    everywhere = NamedSharding(mesh, P())
    shards = {"in_shardings": everywhere, "out_shardings": everywhere}
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    with jax.set_mesh(mesh):
        one = jax.ShapeDtypeStruct((1, *SHAPE[1:]), jnp.bfloat16)
        variables = jax.eval_shape(lambda one: blocks.init(jax.random.key(0), one), one)
        if backward:
            return jax.jit(gradient, **shards).lower(variables, x, x).compile()
        return jax.jit(forward, **shards).lower(variables, x).compile()


def main():
    """Prints a table."""
    devices = np.asarray(topology_devices("tpu", "v5e:1x1"))
    mesh = Mesh(devices, ("batch",), axis_types=(AxisType.Auto,))
    size, rows = 2 * math.prod(SHAPE), []
    summary._again = lambda first, *_: first
    for name, (norm, fused) in NORMS.items():
        forward, both = (compiled(Blocks(norm, fused), mesh, b) for b in (False, True))
        counts = (
            forward.cost_analysis()["bytes accessed"],
            both.cost_analysis()["bytes accessed"],
            both.memory_analysis().temp_size_in_bytes,
        )
        rows.append([name, *(f"{count / size:.1f}" for count in counts)])
    header = ["", "bytes, forward", "forward and backward", "temporary memory"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
