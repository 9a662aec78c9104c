"""Writes the tables of README.md, benchmarks.md and evidence.md from saved results.

    python benchmarks/tables.py [--check]

Each stands between two marks, `<!-- table NAME -->` and `<!-- end -->`. With `--check`
nothing is written, and what is out of date is an error.
"""

import argparse
import functools
import json
import re
import statistics
import sys
from pathlib import Path
from statistics import mean


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "benchmarks"
EVIDENCE = ROOT / "docs" / "evidence"
FILES = tuple(
    ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/evidence.md")
)
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TORCH = "PyTorch, channels last", "PyTorch, channels first"
GPU_TORCH = "PyTorch", "PyTorch, channels first"  # the first: channels last
FIRST_STEP = ["program", "what", "jbn", "Flax", "jbn / Flax", "reach"]


def load(name, folder=FOLDER):
    """The results of a script."""
    return json.loads((folder / f"{name}.json").read_text())


def dumped(content, depth=0, width=160):
    """Formats JSON with short records and lists of numbers on one line each."""
    line = json.dumps(content, allow_nan=False)
    nested = isinstance(content, dict) or any(
        isinstance(value, dict | list)
        for value in (content if isinstance(content, list) else ())
    )
    if not content or not nested or (depth and len(line) <= width):
        return line
    if isinstance(content, dict):
        parts = [
            f"{json.dumps(key)}: {dumped(value, depth + 1, width)}"
            for key, value in content.items()
        ]
    else:
        parts = [dumped(value, depth + 1, width) for value in content]
    opening, closing = "{}" if isinstance(content, dict) else "[]"
    inner = ",\n".join(" " * (depth + 1) + part for part in parts)
    return f"{opening}\n{inner}\n{' ' * depth}{closing}"


def table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def about(content, *packages):
    """Command, machine, versions and date."""
    versions = content["versions"]
    named = ", ".join(f"{p} {versions[p]}" for p in packages)
    return (
        f"`{content['command']}`, {content['platform']}, Python {versions['python']},"
        f" {named}, {content['date'][:10]}."
    )


def ratio(cell):
    """A ratio, or nothing where it was not measured."""
    return "" if cell is None else f"{cell:.2f}"


def better_torch(what):
    """PyTorch's better layout, in times of flax.linen's."""
    found = [what[name]["flax"] for name in TORCH if name in what]
    return min(found) if found else None


def op(whats, name="op"):
    """Each row a shape; times as shares of flax.linen's."""
    content = load(name)
    cells = [r[what] for r in content["results"] for what in whats]
    own = ["jbn", "jbn.linen", "jbn.nnx"]
    others = ["flax.nnx", "Haiku", "Equinox", "Keras"]
    others = [n for n in others if any(n in cell for cell in cells)]
    with_torch = any(better_torch(cell) is not None for cell in cells)
    several = len(whats) > 1
    rows = []
    for r in content["results"]:
        for what in whats:
            cell = r[what]
            torch = better_torch(cell)
            row = [r["shape"], r["dtype"], *([what] if several else [])]
            row += [ratio(cell.get(n, {}).get("flax")) for n in own + others]
            row += [ratio(torch)] if with_torch else []
            row += [ratio(cell["floor"]["flax"])]
            if with_torch:
                row.append(
                    ratio(None if torch is None else cell["jbn"]["flax"] / torch)
                )
            rows.append([*row, ratio(cell["jbn"]["floor"])])
    header = ["shape", "dtype", *(["what"] if several else []), *own, *others]
    header += ["PyTorch", "copying", "jbn / PyTorch"] if with_torch else ["copying"]
    header += ["jbn / copying"]
    packages = ["jax", "flax", "dm-haiku", "equinox", "keras", "torch"]
    packages = [p for p in packages if content["versions"][p] != "not installed"]
    return f"{table(header, rows)}\n\n{about(content, *packages)}"


def op_short():
    """Forward and backward, ours against three others."""
    content = load("op")
    rows = []
    for r in content["results"]:
        cells = r["training"]
        own, torch = cells["jbn"], better_torch(cells)
        rows.append(
            [
                r["shape"],
                r["dtype"],
                f"{own['microseconds'] / 1e3:.2f} ms",
                ratio(own["flax"]),
                ratio(own["flax"] / cells["flax.nnx"]["flax"]),
                ratio(None if torch is None else own["flax"] / torch),
                ratio(own["floor"]),
            ]
        )
    header = ["shape", "dtype", "jbn", "/ flax.linen", "/ flax.nnx"]
    header += ["/ PyTorch, its better layout", "/ copying"]
    return f"{table(header, rows)}\n\n{about(content, 'jax', 'flax', 'torch')}"


def memory_kept():
    """Bytes an element."""
    content = load("memory")
    kept = content["results"]["kept"]
    whats = list(next(iter(kept.values())))
    rows = [[n, *(f"{v[w]:.1f}" for w in whats)] for n, v in kept.items()]
    header = ["kept for the backward pass, bytes an element", *whats]
    return f"{table(header, rows)}\n\n{about(content, 'jax', 'flax', 'keras')}"


def memory_stack():
    """Temporary memory, bytes accessed and time."""
    content = load("memory")
    rows, base = [], {}
    for r in content["results"]["stack"]:
        if r["norm"] == "flax.linen":
            base = r
        rows.append(
            [
                f"{r['dtype']}, {'scan' if r['scanned'] else 'unrolled'}",
                r["norm"],
                f"{r['temporary']:.1f}",
                ratio(r["temporary"] / base["temporary"]),
                f"{r['accessed']:.0f}",
                ratio(r["accessed"] / base["accessed"]),
                ratio(r.get("flax")),
            ]
        )
    header = ["eight blocks", "norm", "temporary memory, inputs", "/ Flax's"]
    header += ["bytes accessed, inputs", "/ Flax's", "time, / Flax's"]
    return f"{table(header, rows)}\n\n{about(content, 'jax', 'flax')}"


def network():
    """A step of a ResNet."""
    content = load("network")
    rows = []
    for r in content["results"]:
        own, flax = r["jbn"], r["flax.linen"]
        shares = (own[k] / flax[k] for k in ("temporary_bytes", "bytes_accessed"))
        times = ["compiled only", "", ""]
        if "seconds" in own:
            times = [f"{v['seconds']:.3f} s" for v in (flax, own)] + [
                ratio(own["flax"])
            ]
        name = f"{r['model']}, {r['dtype']}"
        rows.append([name, *times, *map(ratio, shares)])
    header = ["step", "flax.linen", "jbn", "time, jbn / Flax", "temporary memory"]
    header += ["bytes accessed"]
    text = about(content, "jax", "flax")
    return f"{table(header, rows)}\n\n{content['notes'][0].capitalize()}. {text}"


def scale_size():
    """Time by rows and features."""
    content = load("scale")
    rows = [
        [r["rows"], r["features"], f"{r['microseconds']:.0f} us", ratio(r["flax"])]
        for r in content["results"]["size"]
    ]
    header = ["rows", "features", "jbn", "jbn / flax.linen"]
    return f"{table(header, rows)}\n\n{about(content, 'jax', 'flax')}"


def scale_devices():
    """Collectives by devices."""
    content = load("scale")
    rows = [
        [
            r["by"],
            r["devices"],
            r["norm"],
            r["count"],
            ", ".join(r["kinds"]) or "none",
            f"{r['bytes_a_feature']:.0f}",
        ]
        for r in content["results"]["devices"]
    ]
    header = ["by", "devices", "norm", "collectives", "kinds", "bytes a feature"]
    return f"{table(header, rows)}\n\n{about(content, 'jax', 'flax')}"


def variance():
    """Errors of the variance, cold; the largest change that warmth makes."""
    content = load("variance")
    peers = list(content["results"][0]["error"])
    rows = [
        [
            "x".join(map(str, r["shape"])),
            f"{r['ratio']:g}",
            r["is"],
            *(f"{r['error'][p]:.0e}" if p in r["error"] else "" for p in peers),
        ]
        for r in content["results"]
        if r["is"] == "cold"
    ]
    packages = ("jax", "flax", "dm-haiku", "equinox", "keras", "torch")
    header = ["shape", "mean/std", "layer", *peers]
    return f"{table(header, rows)}\n\n{about(content, *packages)}"


def amount(value, unit):
    """Seconds in the unit that suits them, or a count."""
    if unit == "count":
        return f"{value:.0f}"
    for scale, name in ((1, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{value * scale:.2f} {name}"
    return f"{value * 1e6:.0f} us"


def first_step_rows(results):
    """Times and sizes, ours and Flax's, and the ratio that we aim at."""
    return [
        [
            r["part"],
            r["what"],
            amount(r["jbn"], r["unit"]),
            amount(r["flax"], r["unit"]),
            ratio(r["ratio"]),
            ratio(r["reach"]),
        ]
        for r in results
    ]


def first_step(name="first_step"):
    """The first step, calls without jit, and sizes of programs."""
    content = load(name)
    text = about(content, "jax", "flax")
    rows = first_step_rows(content["results"])
    notes = "; ".join(content["notes"][:2])
    return f"{table(FIRST_STEP, rows)}\n\n{notes}. {text}"


def job():
    """MNIST in five epochs."""
    content = load("job")
    medians = content["results"]["medians"]
    own = medians["jbn, train.py"]
    rows = [
        [
            name,
            f"{100 * m['accuracy']:.2f} %",
            f"{m['fit']:.1f} s",
            ratio(own["fit"] / m["fit"]),
            f"{m['whole']:.1f} s",
            ratio(own["whole"] / m["whole"]),
        ]
        for name, m in medians.items()
    ]
    header = ["job", "test accuracy", "training", "ours / it", "process", "ours / it"]
    return f"{table(header, rows)}\n\n{about(content, 'jax', 'keras')}"


def epoch():
    """An epoch by the trainer and by a bare loop."""
    content = load("epoch")
    times = content["results"]["seconds"]
    seconds = [f"{statistics.median(t):.2f} s" for t in times.values()]
    rows = [[*seconds, ratio(content["results"]["ratio"])]]
    header = ["train.py", "bare loop", "median of ratios"]
    images = f"{content['results']['images']:,} training images"
    return f"{table(header, rows)}\n\n{images}. {about(content, 'jax', 'flax')}"


def groups_rows(results):
    """Header and rows: times and memory of statistics by group."""
    rows = [
        [
            f"{kind}, {found['rows']:,} x {found['features']}",
            what,
            name,
            f"{cell['milliseconds']:.0f} ms",
            ratio(cell["ratio"]),
            f"{cell['temporary']:.1f}",
        ]
        for kind, found in results.items()
        for what, cells in found["cases"].items()
        for name, cell in cells.items()
    ]
    header = ["array", "what", "statistics", "time", "/ of all rows"]
    return [*header, "temporary memory, inputs"], rows


def groups():
    """Statistics by group, against those of all rows."""
    content = load("groups")
    return f"{table(*groups_rows(content['results']))}\n\n{about(content, 'jax')}"


def gpu_op():
    """On a GPU: shares of the card's copy speed, and times of others."""
    content = load("gpu")
    rows = []
    for r in content["results"]["op"]:
        for form, spent in r["microseconds"]["training"].items():
            evaluation = r["microseconds"]["evaluation"][form]
            rows.append(
                [
                    r["shape"],
                    r["dtype"],
                    form,
                    *(
                        ratio(r["floors"][what][form] / by_form[form]["jbn"])
                        for what, by_form in r["microseconds"].items()
                    ),
                    f"{spent['jbn']:.0f} us",
                    *shares(spent),
                    ratio(evaluation["jbn"] / evaluation["flax.linen"]),
                ]
            )
    header = ["shape", "dtype", "form"]
    header += [
        f"{what}, of copy speed" for what in content["results"]["op"][0]["floors"]
    ]
    header += ["training", "/ flax.linen", "/ PyTorch", "/ PyTorch, compiled"]
    header += ["evaluation / flax.linen"]
    return f"{table(header, rows)}\n\n{about_gpu(content)}"


def gpu_step():
    """A step of ResNet-50 on a GPU."""
    content = load("gpu")
    rows = []
    for r in content["results"]["steps"]:
        own = r["by"]["jbn"]
        for who, found in r["by"].items():
            rows.append(
                [
                    r["dtype"],
                    who,
                    f"{1e3 * found['seconds']:.1f} ms",
                    ratio(own["seconds"] / found["seconds"]),
                    f"{found['temporary_bytes'] / 1e9:.1f} GB",
                    ratio(own["temporary_bytes"] / found["temporary_bytes"]),
                ]
            )
    header = ["dtype", "by", "a step", "ours / it", "memory beside state", "ours / it"]
    return f"{table(header, rows)}\n\n{about_gpu(content)}"


def about_gpu(content):
    """Likewise, with the card."""
    return f"{content['notes'][0]}: {about(content, 'jax', 'flax', 'torch')}"


def shares(spent):
    """Our time over Flax's, PyTorch's in its better layout, and compiled PyTorch's."""
    eager = [spent[name] for name in GPU_TORCH if name in spent]
    others = spent["flax.linen"], min(eager, default=None)
    others += (spent.get("PyTorch, compiled"),)
    return [ratio(other and spent["jbn"] / other) for other in others]


def gpu_short():
    """With ReLU, in bfloat16."""
    content = load("gpu")
    rows = []
    for r in content["results"]["op"]:
        if r["dtype"] != "bfloat16":
            continue
        spent = {what: by_form["ReLU"] for what, by_form in r["microseconds"].items()}
        rows.append(
            [
                r["shape"],
                *(
                    ratio(r["floors"][what]["ReLU"] / spent[what]["jbn"])
                    for what in ("forward", "backward")
                ),
                f"{spent['training']['jbn']:.0f} us",
                *shares(spent["training"]),
            ]
        )
    header = ["shape", "forward, of copy speed", "backward", "both", "/ flax.linen"]
    header += ["/ PyTorch, its better layout", "/ PyTorch, compiled"]
    return f"{table(header, rows)}\n\n{about_gpu(content)}"


def gains():
    """What changes when `nn.BatchNorm` becomes `jbn.BatchNorm`: the README's table."""
    errors = [r["error"] for r in load("variance")["results"] if r["ratio"] == 1e4]
    theirs = [error["flax.linen, default"] for error in errors]
    kept = load("memory")["results"]["kept"]
    layers = {}
    for name in ("op", "op-newest"):
        content = load(name)
        images = [r for r in content["results"] if r["shape"].count("x") == 3]
        found = [r["training"]["jbn.linen"]["flax"] for r in images]
        version = ".".join(content["versions"]["jax"].split(".")[:2])
        layers[version] = f"{min(found):.2f} to {max(found):.2f}"
    spent = [
        r["microseconds"]["training"]["ReLU"]
        for r in load("gpu")["results"]["op"]
        if r["dtype"] == "bfloat16"
    ]
    gpu = [times["jbn"] / times["flax.linen"] for times in spent]
    steps = load("gpu")["results"]["steps"]
    step = next(r["by"] for r in steps if r["dtype"] == "bfloat16")
    rows = [
        [
            "variance at mean / std of 10,000, float32: relative error",
            f"{min(theirs):.0f} to {max(theirs):.0f}",
            f"{max(error['jbn'] for error in errors):.0e}",
            "benchmarks/variance.py",
        ],
        *(
            [
                f"{name}, bfloat16: saved for the backward pass, bytes an element",
                f"{kept['flax.linen'][what]:.0f}",
                f"{kept['jbn'][what]:.0f}",
                "benchmarks/memory.py",
            ]
            for name, what in (("layer", "norm"), ("layer with ReLU", "norm, ReLU"))
        ),
        *(
            [
                f"image layers, one CPU core, JAX {version}: forward and backward time",
                "1",
                times,
                "benchmarks/op.py",
            ]
            for version, times in layers.items()
        ),
        [
            "layer with ReLU, bfloat16, H200: forward and backward time",
            "1",
            f"{min(gpu):.2f} to {max(gpu):.2f}",
            "benchmarks/gpu.py",
        ],
        [
            "training step of ResNet-50, bfloat16, H200",
            "1",
            ratio(step["jbn"]["seconds"] / step["flax.linen"]["seconds"]),
            "benchmarks/gpu.py",
        ],
    ]
    rows = [[*row[:3], f"`python {row[3]}`"] for row in rows]
    return table(["", "Flax 0.12", "jbn", "command"], rows)


def clients_table(results):
    """Accuracies of methods by data set and local steps, means and ranges of seeds."""
    rows = []
    for name, found in results.items():
        methods = found["methods"]
        reach = {
            r["local steps"]: mean(r["all"])
            for r in methods
            if r["method"] == "centralized"
        }
        for r in methods:
            low, high = (f"{100 * f(r['all']):.1f}" for f in (min, max))
            behind = mean(r["all"]) - reach[r["local steps"]]
            rate, tau = (r["chosen"][key] for key in ("rate", "tau"))
            rows.append(
                [
                    name,
                    r["local steps"],
                    r["method"],
                    f"rate {rate:g}" + (f", tau {tau:g} n" if tau else ""),
                    f"{100 * mean(r['all']):.1f} ({low} to {high})",
                    f"{100 * behind:+.1f}" if behind else "",
                    f"{100 * mean(r['own']):.1f}",
                ]
            )
    header = ["data", "local steps", "method", "chosen", "all test images, %"]
    return table([*header, "to centralized", "own classes, %"], rows)


KINDS = {
    "two": "2 images",
    "class": "16 images of one class",
    "large": "large",
}


def spread(values):
    """The mean of accuracies with the smallest and largest, in percent."""
    low, middle, high = (f"{100 * f(values):.1f}" for f in (min, mean, max))
    return f"{middle} ({low} to {high})"


def small_batches_table(results):
    """Test accuracy by kind of batch, method and data set."""
    found = {
        (r["kind"], r["method"], name): r
        for name, about in results.items()
        for r in about["methods"]
    }
    pairs = list(dict.fromkeys(key[:2] for key in found))
    rows = []
    for kind, method in pairs:
        cells = [found[kind, method, name] for name in results]
        tests = [spread(r["test"]) for r in cells]
        taus = ", ".join(f"{r['chosen']['tau']:g}" for r in cells)
        rows.append([KINDS[kind], method, *tests, taus if method == "tau" else ""])
    return table(["batch", "method", *results, "tau"], rows)


def domains_table(results):
    """Test accuracy by data set, shift, method and domain."""
    rows = []
    for name, about in results.items():
        for shift, found in about["shifts"].items():
            rows.append([f"**{name}, {shift}**", *[""] * 5])
            for r in found:
                rate, tau = (r["chosen"][key] for key in ("rate", "tau"))
                *_, rare = r["variance ratio"] or [""]
                rows.append(
                    [
                        r["method"],
                        f"rate {rate:g}" + (f", tau {tau:g}" if tau else ""),
                        *map(spread, r["accuracy"]),
                        rare and f"{mean(rare):.2g}",
                    ]
                )
    header = ["statistics", "chosen", "plain, 90 %", "faint, inverted or restyled, 9 %"]
    header += ["bright and noisy, 1 %", "running / true variance, 1 %"]
    return table(header, rows)


def ragged_table(results):
    """Accuracy on short and long digits, and the statistics at the end."""
    rows = [
        [
            counted,
            spread(found["short"]),
            spread(found["long"]),
            f"{mean(v[-1] for v in found['mean']):.2f}",
            f"{mean(v[-1] for v in found['var']):.2f}",
            f"{mean(found['unrest']):.3f}",
        ]
        for counted, found in results["digits"]["ragged"].items()
    ]
    header = "counts once, accuracy on short, on long, running mean, running variance"
    return table([*header.split(", "), "unrest of the running mean"], rows)


def long_tail_table(results):
    """Accuracies by data set, decision and method, and differences to batch norm."""

    def points(difference):
        middle, low, high = (f"{100 * v:+.1f}" for v in difference)
        return f"{middle} ({low} to {high})" if any(difference) else ""

    rows, shown = [], ("rare", "balanced", "rare at equal head")
    for name, found in results.items():
        for decision in ("logits", "adjusted logits", "adjusted loss"):
            for r in found["methods"]:
                if decision not in r["decisions"]:
                    continue
                about, chosen = r["decisions"][decision], r["chosen"]
                setting = [f"rate {chosen['rate']:g}"]
                setting += [f"K {chosen['domains']}"] * (chosen["domains"] > 1)
                setting += [f"tau {chosen['tau']:g} n"] * (chosen["tau"] > 0)
                gained = about["differences"]
                rows.append(
                    [
                        name,
                        decision,
                        r["method"].removesuffix(", adjusted loss"),
                        ", ".join(setting),
                        *(f"{100 * mean(about[p]):.1f}" for p in ("head", "middle")),
                        *(
                            "{:.1f} ({:.1f} to {:.1f})".format(
                                *(100 * f(about[part]) for f in (mean, min, max))
                            )
                            for part in ("rare", "balanced")
                        ),
                        *map(points, (gained[part] for part in shown)),
                    ]
                )
    header = ["data", "decided by", "method", "chosen", "head, %", "middle, %"]
    header += ["rare, %", "balanced, %", "rare, to batch norm"]
    header += ["balanced, to batch norm", "rare at equal head, to batch norm"]
    return table(header, rows)


def graphs_table(results):
    """Accuracies of methods by data set, and differences to masked batch norm."""
    rows = []
    for name, found in results.items():
        for r in found["methods"]:
            folds = [mean(values) for values in r["test"]]
            apart = "{:+.1f} ({:+.1f} to {:+.1f})"
            rows.append(
                [
                    name,
                    r["method"],
                    f"{100 * mean(folds):.1f}",
                    f"{100 * statistics.stdev(folds):.1f}",
                    apart.format(*(100 * v for v in r["to masked"]))
                    if "to masked" in r
                    else "",
                    f"{100 * r['best on test']:.1f}",
                ]
            )
    header = ["data", "method", "test, %", "deviation of folds", "to masked (95 %)"]
    return table([*header, "steps chosen on test folds, %"], rows)


def graphs_padding_table(results):
    """Accuracies, and predictions that change, with more padding."""
    rows = []
    for name, found in results.items():
        for r in found["methods"]:
            padding, row = r["padding"], [name, r["method"]]
            for i in range(2):
                row += [f"{100 * v:.1f}" for v in padding["test"][i]]
                row += [f"{100 * padding['changed'][i]:.1f}"]
            rows.append([*row, f"{padding['apart'][1]:.0e}"])
    by = "running statistics: test, %", "batch statistics: test, %"
    header = ["data", "method"]
    for what in by:
        header += [what, "4 times the rows", "predictions changed, %"]
    return table([*header, "largest change of logits"], rows)


def learned(results):
    """Returns of two agents, and the interval of the difference."""

    def interval(row, name):
        low, high = (100 * v / row["gain"] for v in row[name])
        return f"{low:+.0f} to {high:+.0f}"

    rows = []
    for name, task in results["learning"].items():
        for what, row in task["differences"].items():
            low, high = row["t"]
            worse, better = "ours is worse", "ours is better"
            verdict = worse if high < 0 else better if low > 0 else "none found"
            rows.append(
                [
                    f"{name}, {len(task['seeds'])} seeds",
                    what,
                    f"{row['sbx']:.0f}",
                    f"{row['jbn']:.0f}",
                    f"{100 * row['difference'] / row['gain']:+.0f}",
                    interval(row, "t"),
                    interval(row, "bootstrap"),
                    verdict,
                ]
            )
    header = ["task", "mean return", "sbx", "jbn", "jbn - sbx, % of what sbx learns"]
    header += ["95 %, Student", "95 %, bootstrap", "difference"]
    return table(header, rows)


def updated(results):
    """Distances of two agents after the same batches."""
    found = results["updates"]
    rows = [
        [row["phase"], row["agent"], *(f"{v:.0e}" for v in row["distance"])]
        for row in found["rows"]
    ]
    header = ["phase", "layer", *(f"updates: {n}" for n in found["updates"])]
    return table(header, rows)


def delayed(results):
    """Times of acting and updating."""
    rows = [
        [
            row["what"],
            *(amount(row["microseconds"][side] / 1e6, "s") for side in ("sbx", "jbn")),
            ratio(statistics.median(row["ratios"])),
            f"{min(row['ratios']):.2f} to {max(row['ratios']):.2f}",
        ]
        for row in results["latency"]
    ]
    return table(["call", "sbx", "jbn", "jbn / sbx", "range of rounds"], rows)


REINFORCEMENT = {"learning": learned, "updates": updated, "latency": delayed}


def reinforcement(name):
    """One of the tables about reinforcement learning, from the saved results."""
    content = load("reinforcement", EVIDENCE)
    packages = ("jax", "flax", "sbx-rl", "gymnasium", "mujoco")
    text = REINFORCEMENT[name](content["results"])
    return f"{text}\n\n{about(content, *packages)}"


TABLES = {
    "clients": lambda: clients_table(load("clients", EVIDENCE)["results"]),
    "domains": lambda: domains_table(load("domains", EVIDENCE)["results"]),
    "ragged": lambda: ragged_table(load("domains", EVIDENCE)["results"]),
    "small-batches": lambda: small_batches_table(
        load("small_batches", EVIDENCE)["results"]
    ),
    "graphs": lambda: graphs_table(load("graphs", EVIDENCE)["results"]),
    "graphs-padding": lambda: graphs_padding_table(load("graphs", EVIDENCE)["results"]),
    "gains": gains,
    "long-tail": lambda: long_tail_table(load("long_tail", EVIDENCE)["results"]),
    "gpu-short": gpu_short,
    "gpu-op": gpu_op,
    "gpu-step": gpu_step,
    "op-short": op_short,
    "op": lambda: op(("training",)),
    "op-newest": lambda: op(("forward", "backward", "evaluation"), "op-newest"),
    "op-all": lambda: op(("forward", "backward", "evaluation")),
    "memory-kept": memory_kept,
    "memory-stack": memory_stack,
    "network": network,
    "scale-size": scale_size,
    "scale-devices": scale_devices,
    "variance": variance,
    "first-step": first_step,
    "first-step-newest": lambda: first_step("first_step-newest"),
    "job": job,
    "epoch": epoch,
    "groups": groups,
    **{
        f"reinforcement-{name}": functools.partial(reinforcement, name)
        for name in REINFORCEMENT
    },
}


def filled(text):
    """The text with its tables written again."""

    def fill(match):
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def main():
    """Writes, or checks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    for path in FILES:
        text = path.read_text()
        new = filled(text)
        if args.check and new != text:
            print(f"{path}: out of date; run python benchmarks/tables.py")
            return 1
        if not args.check:
            path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
