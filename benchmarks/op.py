"""How fast is a norm layer? Forward, backward and evaluation, against every peer.

    python benchmarks/op.py [--quick] [--name=op-newest]

Forward and backward are compiled apart, as other layers come between the two, and
backward is given the cotangent of the output. The floor is the time to copy as many
bytes as must be read and written: forward reads `x` twice (for its statistics, and to
normalize) and writes once, backward reads `x` and the cotangent twice and writes once,
evaluation reads and writes once. For a GPU: `gpu.py`.
"""

import timing


timing.prepare()

import argparse
import sys
from typing import Any

import evidence
import jax
import jax.numpy as jnp
import numpy as np
from evidence import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW
from peers import FLAX, NORMS, OURS


SHAPES = [(64, 64), (128, 784), (32, 32, 32, 64), (64, 56, 56, 64), (16, 14, 14, 1024)]
FLOOR = "floor"
TORCH = "PyTorch, channels last", "PyTorch, channels first"
# Copies of the input that take as long as what must be read and written.
FLOORS = {"forward": 1.5, "backward": 2.5, "training": 4.0, "evaluation": 1.0}
COLORS = {
    OURS: BLUE,
    "jbn.nnx": SKY,
    FLAX: ORANGE,
    "flax.nnx": YELLOW,
    "Haiku": GREEN,
    "Equinox": PURPLE,
    "Keras": RED,
    TORCH[0]: BLACK,
    TORCH[1]: "#777777",
}


# ---- What is timed -----------------------------------------------------------------


def jax_cases(make, x, ct):
    """Forward (with what backward needs), backward and evaluation, compiled."""
    apply, params, state = make(x.shape[-1], x.dtype)

    structure: Any = None

    @jax.jit
    def forward(params, state, x):
        nonlocal structure
        run = lambda params, x: apply(params, state, x, True)
        y, vjp, new = jax.vjp(run, params, x, has_aux=True)
        kept, structure = jax.tree.flatten(vjp)
        # What is kept as it came in would be copied on its way out of this program,
        # which it is not in a training step.
        return y, [None if leaf is x else leaf for leaf in kept], new

    @jax.jit
    def backward(kept, x, ct):
        kept = [x if leaf is None else leaf for leaf in kept]
        return jax.tree.unflatten(structure, kept)(ct)

    evaluate = jax.jit(lambda params, state, x: apply(params, state, x, False)[0])
    y, kept, _ = forward(params, state, x)
    ct = ct.astype(y.dtype)
    return {
        "forward": lambda: forward(params, state, x),
        "backward": lambda: backward(kept, x, ct),
        "evaluation": lambda: evaluate(params, state, x),
    }


def torch_cases(x, ct, channels_last):
    """Likewise, by PyTorch."""
    import torch

    torch.set_num_threads(1)
    images = x.ndim == 4
    layer = (torch.nn.BatchNorm2d if images else torch.nn.BatchNorm1d)(x.shape[-1])

    def tensor(v):
        v = torch.from_numpy(np.array(v, np.float32))
        if images:
            v = v.movedim(-1, 1)
        v = v.to(torch.bfloat16 if x.dtype == jnp.bfloat16 else torch.float32)
        if not images:
            return v.contiguous()
        last = torch.channels_last if channels_last else torch.contiguous_format
        return v.contiguous(memory_format=last)

    x, ct = tensor(x).requires_grad_(), tensor(ct)
    frozen = type(layer)(layer.num_features).eval()
    y = layer(x)
    inputs = (x, layer.weight, layer.bias)

    def evaluate():
        with torch.no_grad():
            return frozen(x)

    return {
        "forward": lambda: layer(x),
        "backward": lambda: torch.autograd.grad(y, inputs, ct, retain_graph=True),
        "evaluation": evaluate,
    }


def copy_case(x):
    """Copies the input."""
    source = np.array(x)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source)


def wait(value):
    """Until it is there; PyTorch's is."""
    return value if hasattr(value, "detach") else jax.block_until_ready(value)


# ---- The question ------------------------------------------------------------------


def measure(shape, dtype, rounds):
    """Seconds of each case by what is timed, and then by whom."""
    keys = jax.random.split(jax.random.key(0))
    x, ct = (jax.random.normal(key, shape, dtype) for key in keys)
    by_whom = {}
    for name, make in NORMS.items():
        try:
            by_whom[name] = jax_cases(make, x, ct)
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
    for name, channels_last in zip(TORCH, (True, False), strict=True):
        if channels_last and len(shape) < 4:
            continue
        try:
            by_whom[name] = torch_cases(x, ct, channels_last)
        except ImportError as error:
            print(f"{name}: left out, {error}", file=sys.stderr)
    copy = copy_case(x)
    found = {}
    for what in ("forward", "backward", "evaluation"):
        cases = {name: by_whom[name][what] for name in by_whom} | {FLOOR: copy}
        found[what] = timing.interleaved(cases, rounds=rounds, wait=wait)
        found[what][FLOOR] = [t * FLOORS[what] for t in found[what][FLOOR]]
    both = zip(found["forward"].items(), found["backward"].values(), strict=True)
    found["training"] = {
        name: [a + b for a, b in zip(forward, backward, strict=True)]
        for (name, forward), backward in both
    }
    return found


def draw(results):
    """Training, in times of Flax's: one panel a dtype."""
    plt = evidence.style()
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    figure, panels = plt.subplots(len(dtypes), 1, figsize=(9, 3.2 * len(dtypes)))
    for panel, dtype in zip(np.atleast_1d(panels), dtypes, strict=True):
        chosen = [r for r in results if r["dtype"] == dtype]
        names = [n for n in COLORS if any(n in r["training"] for r in chosen)]
        for i, name in enumerate(names):
            places = np.arange(len(chosen)) + (i - len(names) / 2) * 0.8 / len(names)
            heights = [r["training"].get(name, {}).get("flax", 0) for r in chosen]
            panel.bar(places, heights, 0.8 / len(names), color=COLORS[name], label=name)
        floors = [r["training"][FLOOR]["flax"] for r in chosen]
        for i, height in enumerate(floors):
            panel.plot([i - 0.45, i + 0.45], [height] * 2, color="k", lw=1, ls=":")
        panel.set_xticks(range(len(chosen)), [r["shape"] for r in chosen], fontsize=9)
        panel.set_ylim(0, 2)
        panel.set_ylabel("time / flax.linen's")
        panel.set_title(
            f"{dtype}: forward and backward (dotted: copying, bars cut at 2)"
        )
    np.atleast_1d(panels)[0].legend(ncols=4, fontsize=8, loc="upper left")
    return figure


def main():
    """Measures, prints a table, writes JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes, three rounds")
    parser.add_argument("--name", default="op", help="of the files that it writes")
    args = parser.parse_args()
    shapes = SHAPES[1:3] if args.quick else SHAPES
    results = []
    for dtype in ("float32", "bfloat16"):
        for shape in shapes:
            rounds = 3 if args.quick else 9
            found = measure(shape, jnp.dtype(dtype), rounds)
            line = {"shape": "x".join(map(str, shape)), "dtype": dtype}
            for what, times in found.items():
                line[what] = {
                    name: {
                        "microseconds": 1e6 * float(np.median(times[name])),
                        "flax": timing.ratio(times, name, FLAX),
                        "floor": timing.ratio(times, name, FLOOR),
                    }
                    for name in times
                }
            results.append(line)
            show = {n: f"{v['flax']:.2f}" for n, v in line["training"].items()}
            print(line["shape"], dtype, show, flush=True)
    header = ["shape", "dtype", *(n for n in COLORS), FLOOR]
    rows = [
        [
            r["shape"],
            r["dtype"],
            *(
                f"{r['training'][n]['flax']:.2f}" if n in r["training"] else ""
                for n in header[2:]
            ),
        ]
        for r in results
    ]
    evidence.report(
        args.name,
        __doc__.splitlines()[0],
        [0],
        results,
        evidence.table(header, rows),
        draw(results),
        [f"{jax.devices()[0].device_kind}"],
        folder=None if args.quick else evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
