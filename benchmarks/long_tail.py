"""Which normalization helps the rare classes of a long-tailed training set?

    python benchmarks/long_tail.py [--data=../shared/data/cifar10/cifar10_jpeg.npz]

Prints a Markdown table; adds the results to docs/evidence/long_tail.json and draws all
that are there. A `resnet8` is trained on a part of the training set in which the rarest
class has a hundredth of the images of the largest, and is tested on all classes alike.
The first 30 % of the classes are the head, the last 30 % are rare. Each seed has its
own order of the classes, and its own images. Methods:

- batch norm,
- recalibrated: the same networks; statistics of the training set, taken again, in which
  classes count the same,
- class-weighted: in each batch, all classes that it has count the same,
- class-weighted, tau: these, shrunk towards the running statistics,
- soft domains: each layer has a gate, learned, that shares an image among domains,
- soft domains, tau: each domain's statistics are shrunk towards the pool of all,
- group norm: no statistics of a batch,
- adjusted loss: the logarithm of the shares of the classes is added to the logits in
  the loss (Menon et al., 2021), with batch norm and with the best of the norms.

A class is predicted by the largest logit, or by the largest adjusted logit: less the
logarithm of the shares (same paper). A multiple of it moves accuracy from head to rare
classes, so methods are also compared on rare classes at equal head accuracy.

The rate, the number of domains and `tau` are chosen on images held out of the training
set, as many of each class, with another seed; soft domains have batch norm's rate.
`--data` is an archive of JPEG images with `{train,test}_{jpeg,offsets,labels}`; by
default the embedded digits.
"""

import argparse
import functools
import itertools
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import long_tail_table

import jbn
from jbn import tools
from jbn.linen import BatchNorm
from jbn.models import resnet8


SEEDS, CHOOSING = range(5), 99
IMBALANCE, HELD = 100, 0.1
STEPS, BATCH, MOMENTUM, DECAY = 600, 64, 0.95, 5e-4
# Adjusted logits are less so many times the logarithm of the shares of the classes.
STRENGTHS = np.round(np.arange(-1, 2.51, 0.1), 1)
ZERO, ONE = (int(np.flatnonzero(STRENGTHS == v)[0]) for v in (0, 1))
COLORS = "BLACK", "YELLOW", "SKY", "BLUE", "ORANGE", "RED", "GREEN", "BLACK", "PURPLE"

# ---- Data ---------------------------------------------------------------------------


class Split(NamedTuple):
    """Images in the classes 0, 1, ..., from the largest to the rarest."""

    images: Any
    labels: Any


def cut(train, test, seed):
    """A long-tailed training set, a balanced one held out of it, and the test set."""
    rng, classes = np.random.default_rng(seed), int(train.labels.max()) + 1
    order = rng.permutation(classes)
    # The images held out are the same for all seeds.
    rows = [np.flatnonzero(train.labels == c) for c in order]
    held = int(HELD * min(map(len, rows)))
    largest = min(map(len, rows)) - held
    ranks = np.arange(classes) / (classes - 1)
    counts = np.maximum(1, np.round(largest * IMBALANCE**-ranks)).astype(int)
    chosen = [
        rng.choice(r[held:], n, replace=False)
        for r, n in zip(rows, counts, strict=True)
    ]
    rank = np.argsort(order).astype(np.int32)
    take = lambda split, i: Split(split.images[i], rank[split.labels[i]])
    return (
        take(train, np.concatenate(chosen)),
        take(train, np.concatenate([r[:held] for r in rows])),
        take(test, np.arange(len(test.labels))),
        counts,
    )


def changed(x, key):
    """Color images, some mirrored, all moved by up to two pixels."""
    if x.shape[-1] == 1:
        return x
    (n, h, w, c), (one, two) = x.shape, jax.random.split(key)
    flipped = jax.random.bernoulli(one, shape=(n, 1, 1, 1))
    x = jnp.pad(jnp.where(flipped, x[:, :, ::-1], x), ((0, 0), (2, 2), (2, 2), (0, 0)))
    start = jax.random.randint(two, (n, 2), 0, 5)
    part = lambda x, s: jax.lax.dynamic_slice(x, (s[0], s[1], 0), (h, w, c))
    return jax.vmap(part)(x, start)


# ---- Network ------------------------------------------------------------------------


class SoftDomains(nn.Module):
    """Statistics of several domains, among which a learned gate shares each image.

    `tau` is a multiple of the rows of the batch. At inference the running statistics
    are shrunk in the same way.
    """

    domains: int
    tau: Any
    scale_init: Any

    @nn.compact
    def __call__(self, x, use_running_average):
        """Normalizes `x`."""
        shape = self.domains, x.shape[-1]
        shares = nn.softmax(nn.Dense(self.domains, name="gate")(x.mean((1, 2))))
        stats = self.variable("batch_stats", "stats", lambda: jbn.init(shape)[1])
        # The part of the rows that each domain has, and how many rows that is worth.
        equal = lambda: jnp.full((2, self.domains), 1 / self.domains)
        part = self.variable("batch_stats", "part", equal)
        known = stats.value
        if use_running_average:
            known = shrunk(known, *part.value[..., None], self.tau)
        params = jbn.Params(
            self.param("scale", self.scale_init, shape[1:]),
            self.param("bias", nn.initializers.zeros, shape[1:]),
        )
        y, new = jbn.domain_batch_norm(
            x,
            params,
            known,
            use_running_average=use_running_average,
            domain=shares[:, None, None],
            momentum=MOMENTUM,
            tau=self.tau * (x.size // x.shape[-1]),
            shrink_to="pooled",
        )
        if not (use_running_average or self.is_initializing()):
            mean = shares.mean(0)
            now = jnp.stack([mean, mean**2 / (shares**2).mean(0)])
            part.value = MOMENTUM * part.value + (1 - MOMENTUM) * now
            stats.value = new
        return y


def shrunk(stats, weight, effective_weight, tau):
    """The statistics of domains, shrunk towards those of all domains."""
    each = jbn.Moments(weight, stats.mean, stats.var)
    pool = jbn.merge(*map(jbn.Moments, *each))
    new = jbn.shrink(each, pool, tau=tau, effective_weight=effective_weight)
    return jbn.BatchStats(new.mean, new.var)


class Norm(nn.Module):
    """The norm layer of a method. The weights of images come as the mask."""

    kind: str
    domains: int
    tau: Any
    scale_init: Any = nn.initializers.ones

    @nn.compact
    def __call__(self, x, use_running_average, mask=None):
        """Normalizes `x`."""
        options = {"scale_init": self.scale_init}
        if self.kind == "group":
            return nn.GroupNorm(num_groups=4, **options)(x)
        if self.kind == "soft":
            layer = SoftDomains(self.domains, self.tau, **options)
            return layer(x, use_running_average)
        layer = BatchNorm(use_running_average, momentum=MOMENTUM, **options)
        return layer(x, weights=mask, tau=self.tau * (x.size // x.shape[-1]))


class Task(NamedTuple):
    """What a network is made of; hashable, for `jit`."""

    classes: int
    kind: str
    domains: int

    def network(self, tau):
        """The network."""
        norm = functools.partial(Norm, self.kind, self.domains, tau)
        return resnet8(num_classes=self.classes, widths=(8, 16, 32), norm=norm)


def patched(x):
    """Images of about 8 by 8 squares of pixels: a square is a pixel of more colors."""
    n, h, w, c = x.shape
    side = max(1, h // 8)
    x = x[:, : h // side * side, : w // side * side]
    x = x.reshape(n, h // side, side, w // side, side, c).swapaxes(2, 3)
    return x.reshape(n, h // side, w // side, side * side * c) - 0.5


# ---- Methods ------------------------------------------------------------------------


class Method(NamedTuple):
    """A norm, what is tried with it, and the method whose other settings it takes."""

    kind: str = "batch"
    weighted: bool = False
    grid: Mapping = MappingProxyType({})
    base: str | None = None
    adjusted: bool = False


RATES, TAUS = {"rate": (0.1, 0.3, 1.0)}, {"tau": (0.1, 1.0)}
METHODS = {
    "batch norm": Method(grid=RATES),
    "class-weighted": Method(weighted=True, grid=RATES),
    "class-weighted, tau": Method(weighted=True, grid=TAUS, base="class-weighted"),
    "soft domains": Method("soft", grid={"domains": (2, 4)}, base="batch norm"),
    "soft domains, tau": Method("soft", grid=TAUS, base="soft domains"),
    "group norm": Method("group", grid=RATES),
}
PLAIN = {"rate": 0.0, "tau": 0.0, "domains": 1}

# ---- Training -----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 1))
def step(task, weighted, variables, slope, images, labels, key, rate, tau, prior):
    """A step of SGD with momentum and weight decay; `prior` is added to the logits."""
    model = task.network(tau)
    weights = jbn.group_weights(labels, task.classes) if weighted else None
    x = patched(changed(images, key))

    def loss(params):
        logits, new = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mask=weights,
            mutable=["batch_stats"],
        )
        ce = optax.softmax_cross_entropy_with_integer_labels
        return ce(logits + prior, labels).mean(), new

    params = variables["params"]
    grads, new = jax.grad(loss, has_aux=True)(params)
    slope = jax.tree.map(lambda s, g, p: 0.9 * s + g + DECAY * p, slope, grads, params)
    params = jax.tree.map(lambda p, s: p - rate * s, params, slope)
    return {**variables, "params": params, **new}, slope


@functools.partial(jax.jit, static_argnums=0)
def start(task, key, images):
    """Variables to start with."""
    return task.network(0.0).init(key, patched(images), train=False)


@functools.partial(jax.jit, static_argnums=0)
def predict(task, variables, images, tau):
    """Logits."""
    return task.network(tau).apply(variables, patched(images), train=False)


def train(task, method, data, seed, steps, setting, prior):
    """The variables after all steps."""
    rate, tau = setting["rate"], np.float32(setting["tau"])
    variables = {
        "batch_stats": {},
        **start(task, jax.random.key(seed), data.images[:1]),
    }
    slope = jax.tree.map(jnp.zeros_like, variables["params"])
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    epoch = lambda: rng.permutation(len(data.labels))
    size = min(BATCH, len(data.labels))
    order = np.concatenate(
        [epoch() for _ in range(steps * size // len(data.labels) + 1)]
    )
    for i, rows in enumerate(order[: steps * size].reshape(steps, size)):
        now = rate * min(1, 10 * i / steps) * (1 + np.cos(np.pi * i / steps)) / 2
        variables, slope = step(
            task,
            method.weighted,
            variables,
            slope,
            data.images[rows],
            data.labels[rows],
            jax.random.fold_in(key, i),
            np.float32(now),
            tau,
            np.float32(prior),
        )
        # Steps that wait in a queue keep their arguments.
        jax.block_until_ready(slope)
    return variables


def recalibrator(task, counts):
    """A function that takes statistics of all training images by classes alike."""
    model, weights = task.network(0.0), jnp.float32(1 / counts)
    return tools.recalibrator(
        lambda variables, data: model.apply(
            variables,
            patched(data.images),
            train=True,
            mask=weights[data.labels],
            mutable=["batch_stats"],
        )
    )


def score(task, variables, tau, split, prior):
    """Accuracies (strengths, classes), with so much of `prior` taken from logits."""
    starts = range(0, len(split.labels), 500)
    run = functools.partial(predict, task, variables)
    logits = [np.asarray(run(split.images[i : i + 500], tau)) for i in starts]
    logits, found = np.concatenate(logits), []
    for strength in STRENGTHS:
        right = (logits - strength * prior).argmax(-1) == split.labels
        found.append([right[split.labels == c].mean() for c in range(task.classes)])
    return np.array(found)


# ---- Measurement --------------------------------------------------------------------


def parts(values):
    """Means over head, middle and rare classes, and over all; classes come last."""
    classes = values.shape[-1]
    some = round(0.3 * classes)
    cuts = {"head": (0, some), "middle": (some, classes - some)}
    cuts |= {"rare": (classes - some, classes), "balanced": (0, classes)}
    return {name: values[..., a:b].mean(-1) for name, (a, b) in cuts.items()}


def settings_of(about, chosen):
    """All settings to try: those of the base, with what is in the grid."""
    start = {**PLAIN, **chosen.get(about.base, {})}
    for values in itertools.product(*about.grid.values()):
        yield {**start, **dict(zip(about.grid, values, strict=True))}


def measure(sets, steps, seeds):
    """Chooses the settings of each method, and tests them."""
    train_set, test_set = sets
    splits = {seed: cut(train_set, test_set, seed) for seed in (CHOOSING, *seeds)}
    counts = splits[CHOOSING][-1]
    prior = np.log(counts / counts.sum())
    task_of = lambda about, setting: Task(len(counts), about.kind, setting["domains"])

    def trained(about, setting, seed):
        added = about.adjusted * prior
        return train(
            task_of(about, setting), about, splits[seed][0], seed, steps, setting, added
        )

    def scored(about, setting, variables, split):
        tau = np.float32(setting["tau"])
        return score(task_of(about, setting), variables, tau, split, prior)

    def choose(name, about, chosen):
        tried = []
        for setting in settings_of(about, chosen):
            variables = trained(about, setting, CHOOSING)
            found = parts(scored(about, setting, variables, splits[CHOOSING][1])[ZERO])
            tried.append({**setting, **found})
            evidence.log(f"{name}, {setting}: {shown(found)}")
        best = max(tried, key=lambda entry: entry["balanced"])
        return {key: best[key] for key in PLAIN}, tried

    methods, chosen, results = dict(METHODS), {}, {}
    for name, about in METHODS.items():
        chosen[name], tried = choose(name, about, chosen)
        results[name] = {"chosen": chosen[name], "tried": tried}
    held = lambda name: max(entry["balanced"] for entry in results[name]["tried"])
    best = max([name for name in METHODS if name != "batch norm"], key=held)
    for name in ("batch norm", best):
        loss = f"{name}, adjusted loss"
        methods[loss] = METHODS[name]._replace(adjusted=True)
        chosen[loss] = chosen[name]
        results[loss] = {"chosen": chosen[name], "tried": []}
    again = recalibrator(task_of(methods["batch norm"], PLAIN), counts)
    curves = {name: [] for name in ("batch norm", "recalibrated", *methods)}
    for seed, (name, about) in itertools.product(seeds, methods.items()):
        variables = trained(about, chosen[name], seed)
        run = functools.partial(scored, about, chosen[name], split=splits[seed][2])
        curves[name].append(run(variables))
        if name == "batch norm":
            variables = again(variables, [splits[seed][0]])
            curves["recalibrated"].append(run(variables))
        evidence.log(f"seed {seed}, {name}: {shown(parts(curves[name][-1][ZERO]))}")
    results["recalibrated"] = {"chosen": chosen["batch norm"], "tried": []}
    curves = {name: parts(np.array(values)) for name, values in curves.items()}
    return counts, [
        {"method": name, **results[name], **compared(values, curves, name)}
        for name, values in curves.items()
    ]


def compared(found, curves, name):
    """Accuracies by decision, and differences to batch norm with the same decision."""
    loss = name.endswith("adjusted loss")
    reference = curves["batch norm, adjusted loss" if loss else "batch norm"]
    decisions = {"adjusted loss": ZERO}
    if not loss:
        decisions = {"logits": ZERO, "adjusted logits": ONE}
    about = {}
    for decision, place in decisions.items():
        ours, theirs = (
            {part: accuracy[:, place] for part, accuracy in each.items()}
            for each in (found, reference)
        )
        for each, values in ((found, ours), (reference, theirs)):
            seeds = zip(each["head"], each["rare"], theirs["head"], strict=True)
            values["rare at equal head"] = np.array([rare_at(*seed) for seed in seeds])
        about[decision] = {
            **ours,
            "differences": {p: difference(v, theirs[p]) for p, v in ours.items()},
        }
    curve = {part: found[part].mean(0) for part in ("head", "rare")}
    return {"decisions": about, "curve": curve}


def rare_at(head, rare, wanted):
    """The accuracy on rare classes where that on head classes is `wanted`.

    `head` and `rare` have one entry for each of `STRENGTHS`.
    """
    # Head accuracies fall with the strength, apart from noise.
    head = np.maximum.accumulate(head[::-1])
    return np.interp(wanted, head, rare[::-1])


def difference(ours, theirs):
    """The mean of paired differences, and its interval of 95 %."""
    paired = np.asarray(ours) - np.asarray(theirs)
    return [paired.mean(), *(evidence.student(paired) if paired.any() else (0, 0))]


def shown(found):
    """Accuracies in percent."""
    return ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items())


# ---- Reports ------------------------------------------------------------------------


def draw(results):
    """For each data set, rare against head accuracy, and gains at equal head accuracy.

    The gains are those of adjusted logits, or of the adjusted loss.
    """
    plt = evidence.style()
    figure, panels = plt.subplots(
        len(results), 2, figsize=(11, 4.4 * len(results)), squeeze=False
    )
    colors = [getattr(evidence, name) for name in COLORS]
    for (left, right), (data, found) in zip(panels, results.items(), strict=True):
        methods = found["methods"]
        for i, (about, color) in enumerate(zip(methods, colors, strict=False)):
            loss = "adjusted loss" in about["method"]
            curve = [100 * np.array(about["curve"][part]) for part in ("head", "rare")]
            left.plot(*curve, "--" if loss else "-", color=color, label=about["method"])
            for place, marker in ((ZERO, "o"), (ONE, "s")):
                if place == ZERO or not loss:
                    left.plot(*[v[place] for v in curve], marker, color=color)
            decided = about["decisions"]["adjusted loss" if loss else "adjusted logits"]
            gained = decided["differences"]["rare at equal head"]
            middle, low, high = (100 * v for v in gained)
            bars = [[middle - low], [high - middle]]
            right.errorbar([middle], [-i], xerr=bars, fmt="o", color=color)
        left.set(title=data, xlabel="head classes, %", ylabel="rare classes, %")
        left.legend(fontsize=8)
        right.axvline(0, color=evidence.BLACK, lw=1)
        right.set_yticks(-np.arange(len(methods)), [a["method"] for a in methods])
        right.set_title("rare classes at equal head accuracy, adjusted")
        right.set_xlabel("points above batch norm, 95 % interval")
        right.grid(axis="y", visible=False)
    return figure


def main():
    """Measures, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an archive of JPEG images")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tenth of the steps, two seeds; writes nothing",
    )
    args = parser.parse_args()
    name, *sets = evidence.load(args.data)
    sets = [Split(*split) for split in sets]
    steps, seeds = (STEPS // 10, SEEDS[:2]) if args.quick else (STEPS, SEEDS)
    counts, methods = measure(sets, steps, seeds)
    about = {
        "command": evidence.command(),
        "images of each class": counts,
        "steps": steps,
        "strengths of the curves": STRENGTHS,
        "methods": methods,
        "cpu_seconds": round(time.process_time()),
    }
    known = {} if args.quick else evidence.known("long_tail")
    results = {**known, name: about}
    evidence.report(
        "long_tail",
        __doc__.splitlines()[0],
        seeds,
        results,
        long_tail_table(results),
        draw(results),
        folder=None if args.quick else evidence.EVIDENCE,
    )


if __name__ == "__main__":
    main()
