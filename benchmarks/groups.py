"""How much more does it cost to normalize by group than by batch?

    python benchmarks/groups.py [--quick]

Domains are measured on (65,536, 256) in 16 domains, by ids and by shares; packed rows
on a million rows of 64 features in 10,000 segments, in random order and sorted. Each is
compared with `jbn.batch_norm` on the same array, in training. "Gradient" is taken
with respect to the input, scale and bias and, in the rows that say so, the shares.
Temporary memory of the compiled program is given as a multiple of the input's size.
"""

import timing


timing.prepare()

import argparse
import functools
from typing import Any

import evidence
import jax
import jax.numpy as jnp
import numpy as np
from evidence import BLUE, ORANGE, SKY
from tables import groups_rows, table

import jbn


DOMAINS = dict(rows=65_536, features=256, groups=16)
SEGMENTS = dict(rows=1_000_000, features=64, groups=10_000)
QUICK = 32  # Fewer rows, and fewer segments, by so much.
TRAIN: Any = {"use_running_average": False}
PLAIN = "batch norm"


def gradient(f, of):
    """The gradient of `f`'s output along a cotangent, in so many of its arguments."""
    loss = lambda ct, *args: (f(*args) * ct).sum()
    return jax.grad(loss, tuple(range(1, of + 1)))


def domain_cases(rng, rows, features, groups):
    """Functions with their arguments, by measurement and kind of statistics."""
    x, ct = (rng.normal(size=(rows, features)).astype(np.float32) for _ in range(2))
    shares = rng.dirichlet(np.full(groups, 0.3), rows).astype(np.float32)
    ids = shares.argmax(1).astype(np.int32)
    params, stats = jbn.init(features)
    _, each = jbn.init((groups, features))
    plain = lambda x, p: jbn.batch_norm(x, p, stats, **TRAIN)[0]
    norm = functools.partial(jbn.domain_batch_norm, batch_stats=each, **TRAIN)
    by_ids = lambda x, p, d: norm(x, p, domain=d)[0]
    found = {
        "forward": {PLAIN: (plain, (x, params)), "ids": (by_ids, (x, params, ids))},
        "gradient": {
            PLAIN: (gradient(plain, 2), (ct, x, params)),
            "ids": (gradient(by_ids, 2), (ct, x, params, ids)),
        },
    }
    for mix in ("output", "stats"):
        soft = lambda x, p, w, mix=mix: norm(x, p, domain=w, mix=mix)[0]
        name = f"shares, {mix}"
        found["forward"][name] = soft, (x, params, shares)
        args = ct, x, params, shares
        found["gradient"][name] = gradient(soft, 2), args
        found["gradient"][f"{name}, and of the shares"] = gradient(soft, 3), args
    return found


def segment_cases(rng, rows, features, groups):
    """The same, of packed rows."""
    x, ct = (rng.normal(size=(rows, features)).astype(np.float32) for _ in range(2))
    params, stats = jbn.init(features)
    share = jnp.full(features, 0.7)
    plain = lambda x, p: jbn.batch_norm(x, p, stats, **TRAIN)[0]
    moments = lambda x, ids: jbn.moments(x, segment_ids=ids, num_segments=groups)

    def graph(x, p, share, ids):
        given = dict(segment_ids=ids, num_segments=groups)
        return jbn.graph_norm(x, p, mean_scale=share, **given)

    found = {
        "moments": {"of all rows": (lambda x: jbn.moments(x), (x,))},
        "forward": {PLAIN: (plain, (x, params))},
        "gradient": {PLAIN: (gradient(plain, 2), (ct, x, params))},
    }
    drawn = rng.integers(0, groups, rows).astype(np.int32)
    for order, ids in (("random order", drawn), ("sorted", np.sort(drawn))):
        found["moments"][f"segments, {order}"] = moments, (x, ids)
        args = x, params, share, ids
        found["forward"][f"graph norm, {order}"] = graph, args
        found["gradient"][f"graph norm, {order}"] = gradient(graph, 3), (ct, *args)
    return found


def measure(cases, rounds):
    """Times and temporary memory, each with its ratio to the first."""
    size = max(v.nbytes for _, args in cases.values() for v in jax.tree.leaves(args))
    compiled, calls = {}, {}
    for name, (function, args) in cases.items():
        args = jax.device_put(args)
        compiled[name] = jax.jit(function).lower(*args).compile()
        calls[name] = functools.partial(compiled[name], *args)
    times = timing.interleaved(calls, rounds=rounds, wait=jax.block_until_ready)
    base = next(iter(cases))
    return {
        name: {
            "milliseconds": 1e3 * float(np.median(times[name])),
            "ratio": timing.ratio(times, name, base),
            "temporary": program.memory_analysis().temp_size_in_bytes / size,
        }
        for name, program in compiled.items()
    }


def draw(results):
    """Times relative to batch norm: one panel for domains, one for packed rows."""
    plt = evidence.style()
    figure, panels = plt.subplots(1, len(results), figsize=(11, 4.2))
    colors = {"moments": SKY, "forward": BLUE, "gradient": ORANGE}
    for panel, (kind, found) in zip(panels, results.items(), strict=True):
        bars = [
            (f"{name}: {what}", cell["ratio"], colors[what])
            for what, cells in found["cases"].items()
            for name, cell in list(cells.items())[1:]
        ][::-1]
        names, ratios, of = zip(*bars, strict=True)
        panel.barh(range(len(bars)), ratios, 0.7, color=of)
        panel.set_yticks(range(len(bars)), names, fontsize=8)
        panel.set_title(f"{kind}: {found['rows']:,} x {found['features']}")
        panel.set_xlabel("time / time without groups")
        panel.grid(axis="y", visible=False)
    return figure


def main():
    """Measures, prints a table, writes JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    args = parser.parse_args()
    results = {}
    for kind, sizes, make in (
        ("domains", DOMAINS, domain_cases),
        ("packed rows", SEGMENTS, segment_cases),
    ):
        if args.quick:
            sizes = sizes | {"rows": sizes["rows"] // QUICK}
        cases = make(np.random.default_rng(0), **sizes)
        found = {w: measure(c, 3 if args.quick else 7) for w, c in cases.items()}
        results[kind] = {**sizes, "cases": found}
    evidence.report(
        "groups",
        __doc__.splitlines()[0],
        [0],
        results,
        table(*groups_rows(results)),
        draw(results),
        folder=None if args.quick else evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
