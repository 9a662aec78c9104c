"""How often does a norm pass over memory on a GPU? Compiled for one; none is needed.

    pip install --no-deps jax-cuda13-plugin==JAX jax-cuda13-pjrt==JAX   (its version)
    python benchmarks/gpu_passes.py          half a minute

What kernels read and write, in inputs of a layer in bfloat16, forward and in training
(forward and backward, the cotangent coming of the output), as `gpu.py` measures it, and
the least that is possible. Compiled for an H200, as `h200.txt` describes it.
"""

import argparse
import math
import os
import re


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JBN_BENCHMARK"] = "1"

import gpu
import jax
import jax.numpy as jnp
import numpy as np
from evidence import table
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from jbn.training.ahead import topology_devices


SHAPE = 256, 56, 56, 256
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
# `name = shape operation(operands), attributes` of compiled HLO.
LINE = re.compile(r"\s*(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)")


def card():
    """A mesh of one GPU that is not there."""
    devices = topology_devices("gpu", f"{os.path.dirname(__file__)}/h200.txt:1x1")
    return Mesh(np.asarray(devices), ("gpu",), axis_types=(AxisType.Auto,))


def compiled(f, mesh, *args):
    """For that GPU, of arguments that are arrays or shapes."""
    everywhere = NamedSharding(mesh, P())
    like = lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype)
    with jax.set_mesh(mesh):
        run = jax.jit(f, in_shardings=everywhere, out_shardings=everywhere)
        return run.lower(*jax.tree.map(like, args)).compile()


def traffic(program):
    """Bytes that each kernel reads and writes, by its name; libraries' left out."""
    text = program.as_text()
    shapes, tuples, same = {}, {}, {}

    def origin(name):
        return same.get(name, name)

    found = {}
    for line in text[text.index("\nENTRY") :].splitlines():
        match = LINE.match(re.sub(r"/\*index=\d+\*/", "", line))
        if not match:
            continue
        name, shape, operation, operands, rest = match.groups()
        shapes[name] = shape
        read = re.findall(r"%([\w.-]+)", operands)
        if operation in ("tuple", "opt-barrier"):
            tuples[name] = read if operation == "tuple" else tuples.get(read[0])
        elif operation == "bitcast":
            same[name] = origin(read[0])
        elif operation == "get-tuple-element" and tuples.get(read[0]):
            index = re.search(r"index=(\d+)", rest)
            same[name] = origin(tuples[read[0]][int(index[1])]) if index else name
        elif operation in ("fusion", "copy", "convert", "reduce", "transpose"):
            # An array that comes in twice is read once.
            read = [shapes[v] for v in dict.fromkeys(map(origin, read))]
            found[name] = size(shape) + sum(map(size, read))
    return found


def size(shape):
    """Bytes of an array, or of those of a tuple, as HLO writes it."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    counts = [math.prod(int(n) for n in dims.split(",") if n) for _, dims in arrays]
    kinds = [BYTES.get(kind, 8) for kind, _ in arrays]
    return sum(map(int.__mul__, counts, kinds))


def passes(layer, form, mesh):
    """Arrays of the input's size, forward and in training."""
    x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    residual = x if form.startswith("residual") else None
    with jax.default_device(jax.devices("cpu")[0]):
        apply, params = layer(SHAPE[-1], x.dtype, form)
    run, args = gpu.functions(apply), (params, x, residual)
    programs = (
        compiled(run["forward"], mesh, *args),
        compiled(run["training"], mesh, *args, x),
    )
    unit = 2 * math.prod(SHAPE)
    counts = [sum(traffic(program).values()) / unit for program in programs]
    # The rows that a shift is taken from count as the whole array that they are of.
    return [count - (layer is gpu.jbn_layer) for count in counts]


def main():
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    mesh = card()
    rows = []
    for form in gpu.FORMS:
        found = [
            f"{count:.1f}"
            for layer in (gpu.jbn_layer, gpu.flax_layer)
            for count in passes(layer, form, mesh)
        ]
        least = (gpu.PASSES[what][form] for what in ("forward", "training"))
        rows.append([form, *found, *least])
    header = ["", "jbn, forward", "training", "flax.linen, forward", "training"]
    print(table([*header, "least, forward", "training"], rows))


if __name__ == "__main__":
    main()
