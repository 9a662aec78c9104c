"""Does padded, packed or unevenly sharded training equal training without padding?

    python benchmarks/uneven_training.py

Prints a Markdown table; writes docs/evidence/uneven_training.{json,png}. A digit is the
set of its inked pixels, some 30 points of (row, column, ink). The network: norm; twice
dense, norm, SiLU; the mean over the points; norm; dense. Each library is compared with
itself on the same points without padding on one device; those that are not installed
are left out.
"""

import functools
import sys

import evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jbn


SEEDS = range(3)
STEPS, BATCH, WIDTH, MOMENTUM = 100, 64, 64, 0.9
LONGEST = 64
# Digits on each of four devices: uneven, and with one that has none.
UNEVEN, EMPTY = (32, 16, 12, 4), (32, 20, 12, 0)
HOSTILE = 1e6
SETTINGS = {
    "padded": "padded, mask",
    "hostile": "padding of 1e6",
    "nan": "padding of NaN",
    "packed": "packed rows",
    "uneven": "4 devices, uneven",
    "empty": "4 devices, one empty",
    "jit": "4 devices, plain jit",
}


# ---- Data --------------------------------------------------------------------------


def draw(rng, lengths, total):
    """Indices of a batch of digits that have `total` points together.

    So that the reference, which has no padding, needs one shape and compiles once.
    """
    while True:
        some = rng.choice(len(lengths), BATCH - 1, replace=False)
        rest = np.setdiff1d(
            np.flatnonzero(lengths == total - lengths[some].sum()), some
        )
        if len(rest):
            return rng.permutation(np.append(some, rng.choice(rest)))


def pack(digits, labels, rows, segments, fill=0.0):
    """Points one after the other, padded: x, ids, labels, counts (0 for padding)."""
    lengths = np.array([len(d) for d in digits] + [0] * (segments - len(digits)))
    x = np.full((rows, 3), fill)
    if digits:
        x[: lengths.sum()] = np.concatenate(digits)
    ids = np.asarray(jbn.segment_ids(lengths, num_rows=rows))
    label = np.zeros(segments, np.int32)
    label[: len(digits)] = labels
    return x, ids, label, lengths


def pad(digits, labels, fill=0.0):
    """Points of a digit in a row of their own, padded to the longest there can be."""
    lengths = np.array([len(d) for d in digits])
    x = np.full((len(digits), LONGEST, 3), fill)
    for row, d in zip(x, digits, strict=True):
        row[: len(d)] = d
    there = np.arange(LONGEST) < lengths[:, None]
    ids = np.where(there, np.arange(len(digits))[:, None], len(digits))
    return x, ids.astype(np.int32), np.asarray(labels, np.int32), lengths


def lay_out(setting, digits, labels, step):
    """One batch as `setting` wants it."""
    total = sum(map(len, digits))
    if setting == "reference":
        return pack(digits, labels, total, BATCH)
    if setting in ("padded", "hostile", "nan"):
        fill = {"padded": 0.0, "hostile": HOSTILE, "nan": np.nan}[setting]
        return pad(digits, labels, fill)
    if setting in ("packed", "jit"):
        # Half as much again: under plain jit the last device has padding alone.
        return pack(digits, labels, -(-total * 3 // 8) * 4, BATCH)
    counts = EMPTY if setting == "empty" and step % 4 == 3 else UNEVEN
    ends = np.cumsum(counts)
    most = max(*UNEVEN, *EMPTY)
    shards = [
        pack(digits[e - n : e], labels[e - n : e], most * 40, most)
        for e, n in zip(ends, counts, strict=True)
    ]
    return tuple(map(np.stack, zip(*shards, strict=True)))


# ---- Model -------------------------------------------------------------------------


def init(norm, seed, dtype):
    """Parameters and state of the network; the same weights for every library."""
    rng = np.random.default_rng(seed)
    sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)]
    dense = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), dtype) for s in sizes]
    layers = [norm.init(features, dtype) for features in (3, WIDTH, WIDTH, WIDTH)]
    params = {"dense": dense, "bias": jnp.zeros(10, dtype)}
    params["norm"] = [p for p, _ in layers]
    return params, [s for _, s in layers]


def logits(norm, params, state, x, ids, counts, masked, train, axis_name=None):
    """Logits of each digit, and the new state."""
    segments = len(counts)
    there = ids < segments
    new = []

    def apply(h, mask):
        k = len(new)
        h, s = norm.apply(
            params["norm"][k],
            state[k],
            h,
            train=train,
            mask=mask if masked else None,
            axis_name=axis_name,
        )
        new.append(s)
        return h

    h = apply(x, there)
    for k in range(2):
        h = jax.nn.silu(apply(h @ params["dense"][k], there))
    # What is padding has no part in the mean, whatever the norm made of it.
    h = jnp.where(there[..., None], h, 0).reshape(-1, WIDTH)
    h = jax.ops.segment_sum(h, ids.ravel(), segments)
    h = apply(h / jnp.maximum(counts, 1)[:, None], counts > 0)
    return h @ params["dense"][2] + params["bias"], new


def loss(norm, has_padding, axis_name, params, state, x, ids, labels, counts):
    """The device's part of the mean loss of a whole batch, and the new state."""
    labels, counts = labels.ravel(), counts.ravel()
    masked = has_padding and norm.has_mask
    out, new = logits(norm, params, state, x, ids, counts, masked, True, axis_name)
    each = optax.softmax_cross_entropy_with_integer_labels(out, labels)
    # One entry a device.
    return jnp.where(counts > 0, each, 0).sum(keepdims=True) / BATCH, new


def mesh():
    """Four devices."""
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def trainer(norm, setting):
    """A compiled function that trains over stacked batches."""
    sharded = setting in ("uneven", "empty")
    function = functools.partial(
        loss, norm, setting != "reference", "data" if sharded else None
    )
    if sharded:
        function = jax.shard_map(
            function,
            mesh=mesh(),
            in_specs=(P(), P(), *[P("data")] * 4),
            out_specs=(P("data"), P()),
            # Equinox names an axis of `vmap` and one of devices in one `pmean`, which
            # `shard_map` refuses when it checks.
            check_vma=norm.name != "Equinox",
        )
    # Not Adam, which makes whole steps of the rounding of gradients that are zero: the
    # first norm's bias has one, as the next norm takes any shift out again.
    optimizer = optax.sgd(0.02, momentum=0.9)

    def total(params, state, batch):
        losses, state = function(params, state, *batch)
        return losses.sum(), state

    def step(carry, batch):
        params, state, opt = carry
        (value, state), grads = jax.value_and_grad(total, has_aux=True)(
            params, state, batch
        )
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), state, opt), value

    @jax.jit
    def train(params, state, batches):
        carry, losses = jax.lax.scan(
            step, (params, state, optimizer.init(params)), batches
        )
        return carry[0], carry[1], losses

    return train


@functools.partial(jax.jit, static_argnums=0)
def evaluate(norm, params, state, batch):
    """Accuracy at inference."""
    x, ids, labels, counts = batch
    out, _ = logits(norm, params, state, x, ids, counts, False, False)
    return (out.argmax(-1) == labels).mean()


# ---- Comparison --------------------------------------------------------------------


def offered(norm, setting):
    """What a library has for a setting: yes, no, or with the padding counted."""
    if setting in ("uneven", "empty") and not norm.has_axis_name:
        return "no"
    if setting == "reference" or norm.has_mask:
        return "yes"
    return "no" if setting in ("hostile", "nan") else "counted"


def run(norm, setting, batches, test, dtype):
    """Losses, parameters, statistics and test accuracy of each seed."""
    cast = lambda v: v.astype(dtype) if v.dtype == np.float64 else v
    train = trainer(norm, setting)
    found = []
    for seed in SEEDS:
        stacked = [
            lay_out(setting, *batch, step) for step, batch in enumerate(batches[seed])
        ]
        stacked = tuple(cast(np.stack(v)) for v in zip(*stacked, strict=True))
        if setting == "jit":
            spread = P(None, "data"), P(None, "data"), P(), P()
            stacked = tuple(
                jax.device_put(v, NamedSharding(mesh(), spec))
                for v, spec in zip(stacked, spread, strict=True)
            )
        params, state, losses = train(*init(norm, seed, dtype), stacked)
        params, state, losses = jax.device_get((params, state, losses))
        accuracy = evaluate(norm, params, state, tuple(map(cast, test)))
        stats = [norm.stats(s) for s in state]
        found.append((losses, jax.tree.leaves(params), stats, float(accuracy)))
    return found


def deviation(got, want):
    """The largest difference of loss, parameters, running mean and variance."""
    largest = lambda pairs: max(np.abs(a - b).max() for a, b in pairs)
    pairs = list(zip(got[2], want[2], strict=True))
    return {
        "loss": np.abs(got[0] - want[0]).max(),
        "params": largest(zip(got[1], want[1], strict=True)),
        # In standard deviations, and relative.
        "mean": max(np.abs((g[0] - w[0]) / np.sqrt(w[1])).max() for g, w in pairs),
        "var": max(np.abs(g[1] / w[1] - 1).max() for g, w in pairs),
    }


def main():
    """Trains every library in every setting."""
    jax.config.update("jax_num_cpu_devices", 4)
    (images, labels), (test_images, test_labels) = evidence.digits()
    digits, lengths = evidence.points(images), (images > 0).sum((1, 2))
    total = int(lengths.mean() * BATCH)
    batches = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        chosen = [draw(rng, lengths, total) for _ in range(STEPS)]
        batches.append([([digits[i] for i in c], labels[c]) for c in chosen])
    test = pad(evidence.points(test_images), test_labels)

    results, curves = {}, {}
    libraries = [(norm.name, norm, np.float32) for norm in evidence.norms(MOMENTUM)]
    libraries.insert(0, ("jbn, float64", evidence.Jbn(MOMENTUM), np.float64))
    for name, norm, dtype in libraries:
        with jax.enable_x64(dtype == np.float64):
            reference = run(norm, "reference", batches, test, dtype)
            results[name] = {"reference": {"accuracy": [r[3] for r in reference]}}
            for setting in SETTINGS:
                how = offered(norm, setting)
                results[name][setting] = {"offered": how}
                if how == "no":
                    continue
                got = run(norm, setting, batches, test, dtype)
                each = [deviation(g, w) for g, w in zip(got, reference, strict=True)]
                results[name][setting] |= {
                    key: [e[key] for e in each] for key in each[0]
                } | {"accuracy": [g[3] for g in got]}
                curves[name, setting] = np.array(
                    [abs(g[0] - w[0]) for g, w in zip(got, reference, strict=True)]
                )
                print(f"{name}: {setting}", file=sys.stderr, flush=True)
    names = [name for name, _, _ in libraries]
    evidence.report(
        "uneven_training",
        __doc__.splitlines()[0],
        SEEDS,
        results,
        describe(names, results),
        draw_figure(names, results, curves),
    )


def describe(names, results):
    """The table: the worst seed of each deviation, and the accuracies."""
    keys = ["loss", "params", "mean", "var"]
    rows = []
    for name in names:
        accuracy = evidence.percent(results[name]["reference"]["accuracy"])
        rows.append(["no padding", name, *["reference"] * 4, accuracy])
    for setting, title in SETTINGS.items():
        for name in names:
            found = results[name][setting]
            if found["offered"] == "no":
                rows.append([title, name, *["not offered"] * 4, ""])
                continue
            note = " (no mask)" if found["offered"] == "counted" else ""
            worst = [evidence.show(np.max(found[key])) for key in keys]
            accuracy = evidence.percent(found["accuracy"])
            rows.append([title, name + note, *worst, accuracy])
    header = "setting, library, loss, parameters, running mean, running variance"
    return evidence.table([*header.split(", "), "test accuracy, %"], rows)


def draw_figure(names, results, curves):
    """Above the worst deviation of the loss, below three of its curves."""
    plt = evidence.style()
    figure = plt.figure(figsize=(10, 8.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1])
    axes = top.subplots()
    nan, limits = 1e3, (1e-16, 1e4)
    markers = dict(zip(names, "Dosv^P", strict=False))
    for j, name in enumerate(names):
        for i, setting in enumerate(SETTINGS):
            found = results[name][setting]
            if found["offered"] == "no":
                continue
            worst = np.max(found["loss"])
            axes.plot(
                i + (j - (len(names) - 1) / 2) * 0.11,
                worst if np.isfinite(worst) else nan,
                markers[name],
                color=evidence.COLORS[name],
                fillstyle="none" if found["offered"] == "counted" else "full",
                markersize=8,
                label=name if setting == "padded" else None,
            )
    axes.set(yscale="log", ylim=limits, ylabel="largest deviation of the loss")
    axes.axhline(30, color="#888888", linewidth=0.8)
    axes.set_yticks([1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1, nan])
    axes.set_yticklabels(
        [*[f"$10^{{{e}}}$" for e in (-15, -12, -9, -6, -3)], "1", "NaN"]
    )
    axes.minorticks_off()
    axes.set_xticks(range(len(SETTINGS)))
    axes.set_xticklabels([t.replace(", ", ",\n") for t in SETTINGS.values()])
    axes.grid(axis="x", visible=False)
    for i in range(1, len(SETTINGS)):
        axes.axvline(i - 0.5, color="#DDDDDD", linewidth=0.6)
    axes.set_title(
        "Distance from the same library's training without padding, on one device"
        " (hollow: it has no mask,\nso padding counts; no marker: not offered)"
    )
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=6
    )
    shown = ["padded", "uneven", "empty"]
    for axes, setting in zip(bottom.subplots(1, 3, sharey=True), shown, strict=True):
        for name in names:
            if (name, setting) not in curves:
                continue
            values = np.maximum.accumulate(curves[name, setting], 1)
            finite = np.isfinite(values).all(0)
            steps, values = np.arange(1, STEPS + 1)[finite], values[:, finite]
            color = evidence.COLORS[name]
            line = "--" if name == "Equinox" else "-"  # as far as Haiku, and on top
            axes.plot(steps, values.mean(0), line, color=color, linewidth=1.6)
            axes.fill_between(
                steps,
                np.maximum(values.min(0), 1e-17),
                values.max(0),
                color=color,
                alpha=0.25,
                linewidth=0,
            )
            if not finite.all():
                last = steps[-1], values.mean(0)[-1]
                axes.plot(*last, "x", color=color, markersize=9, markeredgewidth=2)
                axes.annotate(
                    f"{name}: NaN from step {steps[-1] + 1} on",
                    last,
                    (8, 30),
                    textcoords="offset points",
                )
        axes.set(yscale="log", ylim=(1e-17, 1e3), xlabel="training step")
        axes.set_title(SETTINGS[setting])
        if setting == shown[0]:
            axes.set_ylabel("largest deviation so far\n(mean and range of 3 seeds)")
    return figure


if __name__ == "__main__":
    main()
