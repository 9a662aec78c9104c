"""Whose statistics, where domains or long sequences are far from the rest?

    python benchmarks/domains.py

Prints two Markdown tables; writes docs/evidence/domains.{json,png}. First, digits of
three domains, 90, 9 and 1 % of the training images, tested on all test images in each
domain. Second, digits as packed points (row, column, ink), of which 3 % are of another
distribution and 20 times as long: does each point count once, or each digit?
"""

import functools
import sys

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jbn
from jbn.linen import BatchNorm, DomainBatchNorm


SEEDS = range(5)
SHARES = (0.9, 0.09, 0.01)
# A shift that statistics can undo, and one that they cannot: inverted is not scaled.
SHIFTS = {
    "scaled": ("plain, 90 %", "faint, 9 %", "bright and noisy, 1 %"),
    "inverted": ("plain, 90 %", "inverted, 9 %", "bright and noisy, 1 %"),
}
STEPS, BATCH, MOMENTUM = 1500, 100, 0.99


# ---- Domains -----------------------------------------------------------------------


def shifted(kind, images, domain, rng):
    """Images as they look in each one's domain."""
    noise = rng.normal(size=images.shape)
    second = 0.5 + 0.3 * images if kind == "scaled" else 0.5 - 0.5 * images
    looks = [images, second, 2 + 2 * images + 0.3 * noise]
    domain = domain[:, None, None]
    return np.select([domain == k for k in range(3)], looks).astype(np.float32)


class Network(nn.Module):
    """Twice dense, norm, ReLU; dense."""

    norm: functools.partial
    by_domain: bool

    @nn.compact
    def __call__(self, x, domain, *, train):
        """Logits."""
        x = x.reshape(len(x), -1)
        for _ in range(2):
            kwargs = {"domain": domain} if self.by_domain else {}
            x = nn.Dense(64, use_bias=False)(x)
            x = self.norm(momentum=MOMENTUM)(x, use_running_average=not train, **kwargs)
            x = nn.relu(x)
        return nn.Dense(10)(x)


def by_domain(**options):
    """A norm with statistics for each domain."""
    return functools.partial(DomainBatchNorm, 3, **options)


METHODS = {
    "shared": functools.partial(BatchNorm),
    "by domain": by_domain(),
    "by domain, second_moment": by_domain(second_moment=True),
    "by domain, min_weight=1": by_domain(min_weight=1.0),
    "by domain, tau=2, second_moment": by_domain(tau=2.0, second_moment=True),
    "by domain, own_affine, tau=2, second_moment": by_domain(
        own_affine=True, tau=2.0, second_moment=True
    ),
}


def train_domains(method, images, labels, domain, tests, rows, seed):
    """Accuracy in each domain at inference, and the statistics of the first norm."""
    model = Network(METHODS[method], method != "shared")
    variables = model.init(jax.random.key(seed), images[:2], domain[:2], train=False)
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.03, STEPS), momentum=0.9)

    def loss(params, stats, rows):
        out, updated = model.apply(
            {"params": params, "batch_stats": stats},
            images[rows],
            domain[rows],
            train=True,
            mutable=["batch_stats"],
        )
        each = optax.softmax_cross_entropy_with_integer_labels(out, labels[rows])
        return each.mean(), updated["batch_stats"]

    def step(carry, rows):
        params, stats, opt = carry
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, rows)
        updates, opt = optimizer.update(grads, opt)
        return (optax.apply_updates(params, updates), stats, opt), None

    params, stats = variables["params"], variables["batch_stats"]
    carry = params, stats, optimizer.init(params)
    (params, stats, _), _ = jax.lax.scan(step, carry, rows)

    def accuracy(test):
        x, y, d = test
        variables = {"params": params, "batch_stats": stats}
        out = model.apply(variables, x, d, train=False)
        return (out.argmax(-1) == y).mean()

    # The running variance of the first norm over that of all the domain's rows.
    first = stats[next(iter(stats))]
    kernel = params["Dense_0"]["kernel"]
    want = jnp.stack([(x.reshape(len(x), -1) @ kernel).var(0) for x, _, _ in tests])
    ratio = jnp.exp(jnp.log(first["var"] / want).mean(-1))
    return jnp.stack([accuracy(test) for test in tests]), ratio


def run_domains(kind, train, test):
    """Accuracy by method, domain and seed."""
    data = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        # Exactly so many of each; of the rare domain these are 14 images.
        n = len(train[1])
        sizes = [round(n * share) for share in SHARES[1:]]
        domain = np.repeat([0, 1, 2], [n - sum(sizes), *sizes]).astype(np.int32)
        domain = rng.permutation(domain)
        tests = []
        for k in range(3):
            d = np.full(len(test[1]), k, np.int32)
            tests.append((shifted(kind, test[0], d, rng), test[1], d))
        rows = np.array([rng.choice(n, BATCH, replace=False) for _ in range(STEPS)])
        images = shifted(kind, train[0], domain, rng)
        data.append((images, train[1], domain, tests, rows, seed))
    stacked = jax.tree.map(lambda *v: np.stack(v), *data)
    results = {}
    for method in METHODS:
        print(f"{kind}: {method}", file=sys.stderr, flush=True)
        function = jax.jit(jax.vmap(functools.partial(train_domains, method)))
        accuracy, ratio = jax.device_get(function(*stacked))
        results[method] = {"accuracy": accuracy.T, "variance ratio": ratio.T}
    return results


# ---- Ragged sequences --------------------------------------------------------------

RAGGED_STEPS, DIGITS, WIDTH, LONG, RARE = 400, 32, 32, 20, 0.03
RAGGED_MOMENTUM = 0.95
COUNTED = ("each point", "each digit")


NOTES = [
    "Tried with other seeds on a validation part of the training set, scaled shift:"
    " momentum 0.9, where the rare domain had 73 % by domain, 76 to 81 % with tau 1, 2"
    " or 8, and 87 % with min_weight=1; and 0.99, where it had 82, 87 to 90 and 90 %."
    " Shared statistics had 86 %. The learning rate was not tuned.",
    "Ragged: in a first trial, with long digits scaled by 3 and moved by 5, neither way"
    " to count trained to more than 35 % in 400 steps at momentum 0.99. Three milder"
    " shifts were then compared on a validation part: by digit the short ones gained 5,"
    " 9 and 48 points, the long ones lost 2, lost 6 and gained 2. The second is used.",
]


def long_one(rng, points):
    """A digit of another distribution: 20 times the points, jittered, larger, moved."""
    many = np.repeat(points, LONG, 0)
    many = many + rng.normal(size=many.shape) * [0.3, 0.3, 0.1]
    return many * 1.5 + [2, 0, 0.3]


def ragged_batches(rng, points, labels):
    """Packed batches: points, ids, labels, lengths; and the padded number of rows."""
    rows = DIGITS * 42 + 4 * LONG * 42
    found = []
    for _ in range(RAGGED_STEPS):
        chosen = rng.choice(len(labels), DIGITS, replace=False)
        # More than four would not fit, and come once in 350 batches.
        is_long = np.arange(DIGITS) < min(rng.binomial(DIGITS, RARE), 4)
        digits = [
            long_one(rng, points[i]) if more else points[i]
            for i, more in zip(chosen, is_long, strict=True)
        ]
        lengths = np.array([len(d) for d in digits])
        x = np.zeros((rows, 3), np.float32)
        x[: lengths.sum()] = np.concatenate(digits)
        ids = np.asarray(jbn.segment_ids(lengths, num_rows=rows))
        found.append((x, ids, labels[chosen], lengths))
    return tuple(map(np.stack, zip(*found, strict=True)))


def network(params, stats, x, ids, lengths, counted, train):
    """Norm, twice (dense, norm, ReLU), the mean over points, norm, dense."""
    weights = None
    if train:
        weights = jbn.group_weights(ids, len(lengths))
        if counted == "each point":
            weights = (weights > 0).astype(jnp.float32)
    norm = functools.partial(
        jbn.batch_norm, use_running_average=not train, momentum=RAGGED_MOMENTUM
    )
    new = [None] * 4
    h, new[0] = norm(x, params["norm"][0], stats[0], weights=weights)
    for k in range(2):
        h = h @ params["dense"][k]
        h, new[k + 1] = norm(h, params["norm"][k + 1], stats[k + 1], weights=weights)
        h = jax.nn.relu(h)
    h = jax.ops.segment_sum(h, ids, len(lengths)) / lengths[:, None]
    h, new[3] = norm(h, params["norm"][3], stats[3])
    return h @ params["dense"][2] + params["bias"], new


def train_ragged(counted, batches, tests, seed):
    """Accuracy on short and long digits, and the first norm's statistics by step."""
    rng = np.random.default_rng(seed)
    sizes = [(3, WIDTH), (WIDTH, WIDTH), (WIDTH, 10)]
    layers = [jbn.init(features) for features in (3, WIDTH, WIDTH, WIDTH)]
    params = {
        "dense": [
            jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]), jnp.float32) for s in sizes
        ],
        "bias": jnp.zeros(10),
        "norm": [p for p, _ in layers],
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, RAGGED_STEPS))

    def loss(params, stats, x, ids, labels, lengths):
        out, stats = network(params, stats, x, ids, lengths, counted, True)
        each = optax.softmax_cross_entropy_with_integer_labels(out, labels)
        return each.mean(), stats

    def step(carry, batch):
        params, stats, opt = carry
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, *batch)
        updates, opt = optimizer.update(grads, opt)
        carry = optax.apply_updates(params, updates), stats, opt
        return carry, (stats[0].mean, stats[0].var)

    @jax.jit
    def train(batches, tests):
        carry = params, [s for _, s in layers], optimizer.init(params)
        (trained, stats, _), curves = jax.lax.scan(step, carry, batches)
        accuracies = []
        for x, ids, labels, lengths in tests:
            out, _ = network(trained, stats, x, ids, lengths, counted, False)
            accuracies.append((out.argmax(-1) == labels).mean())
        return jnp.stack(accuracies), curves

    return jax.device_get(train(batches, tests))


def pack_tests(rng, points, labels):
    """The test digits, packed: all of them short, and all of them long."""
    tests = []
    for make in (lambda p: p, lambda p: long_one(rng, p)):
        digits = [make(p) for p in points]
        lengths = np.array([len(d) for d in digits])
        ids = np.asarray(jbn.segment_ids(lengths, num_rows=lengths.sum()))
        x = np.concatenate(digits).astype(np.float32)
        tests.append((x, ids, labels, lengths))
    return tests


def run_ragged(train, test):
    """Both ways to count, by seed."""
    points, test_points = evidence.points(train[0]), evidence.points(test[0])
    results = {counted: [] for counted in COUNTED}
    every = np.concatenate(points)
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        batches = ragged_batches(rng, points, train[1])
        tests = pack_tests(rng, test_points, test[1])
        for counted in COUNTED:
            print(f"ragged: {counted}, seed {seed}", file=sys.stderr, flush=True)
            accuracy, (mean, var) = train_ragged(counted, batches, tests, seed)
            half = RAGGED_STEPS // 2
            results[counted].append(
                {
                    "short": accuracy[0],
                    "long": accuracy[1],
                    # Of the mean row of the points, in the short digits' deviations.
                    "mean": (mean[:, 0] - every[:, 0].mean()) / every[:, 0].std(),
                    "var": var[:, 0] / every[:, 0].var(),
                    "unrest": mean[half:, 0].std() / every[:, 0].std(),
                }
            )
    return {
        counted: {key: np.array([f[key] for f in found]) for key in found[0]}
        for counted, found in results.items()
    }


# ---- Report ------------------------------------------------------------------------


def main():
    """Runs both parts."""
    train, test = evidence.digits()
    results = {kind: run_domains(kind, train, test) for kind in SHIFTS}
    results["ragged"] = run_ragged(train, test)
    evidence.report(
        "domains",
        __doc__.splitlines()[0],
        SEEDS,
        results,
        describe(results),
        draw_figure(results),
        NOTES,
    )


def describe(results):
    """The tables."""
    rows = []
    for kind, domains in SHIFTS.items():
        rows.append([f"**{kind}**", *domains, *domains])
        for method, found in results[kind].items():
            accuracies = map(evidence.percent, found["accuracy"])
            ratios = [f"{ratio.mean():.2g}" for ratio in found["variance ratio"]]
            if method == "shared":
                ratios = ["one for all", "", ""]
            rows.append([method, *accuracies, *ratios])
    header = ["statistics", "test accuracy, %", "", "", "running variance / true"]
    text = evidence.table([*header, "", ""], rows)
    rows = [
        [
            counted,
            evidence.percent(found["short"]),
            evidence.percent(found["long"]),
            f"{found['mean'][:, -1].mean():.2f}",
            f"{found['var'][:, -1].mean():.2f}",
            f"{found['unrest'].mean():.3f}",
        ]
        for counted, found in results["ragged"].items()
    ]
    header = "counts once, accuracy on short, on long, running mean, running variance"
    header = [*header.split(", "), "unrest of the running mean"]
    return text + "\n\n" + evidence.table(header, rows)


def draw_figure(results):
    """Above accuracy by domain, below statistics and accuracy of ragged digits."""
    plt = evidence.style()
    figure = plt.figure(figsize=(10, 8.2))
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    colors = evidence.BLUE, evidence.ORANGE, evidence.RED
    for axes, (kind, domains) in zip(
        top.subplots(1, 2, sharey=True), SHIFTS.items(), strict=True
    ):
        methods = list(results[kind])
        for k, (name, color) in enumerate(zip(domains, colors, strict=True)):
            values = 100 * np.array([results[kind][m]["accuracy"][k] for m in methods])
            mean = values.mean(1)
            axes.errorbar(
                mean,
                np.arange(len(methods)) + (k - 1) * 0.2,
                xerr=[mean - values.min(1), values.max(1) - mean],
                fmt="os^"[k],
                color=color,
                capsize=3,
                label=name,
            )
        axes.set_yticks(range(len(methods)))
        axes.set_yticklabels([m.replace(", ", ",\n", 1) for m in methods], fontsize=10)
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.set(xlabel="test accuracy at inference, %", xlim=(45, 101))
        axes.set_title(f"the 9 % are {domains[1].split(',')[0]}")
    shares = ("plain, 90 %", "faint or inverted, 9 %", "bright and noisy, 1 %")
    handles = axes.get_legend_handles_labels()[0]
    top.legend(handles, shares, loc="outside lower center", ncols=3)
    left, middle, right = bottom.subplots(1, 3)
    looks = {"each point": evidence.BLACK, "each digit": evidence.BLUE}
    steps = np.arange(1, RAGGED_STEPS + 1)
    for counted, color in looks.items():
        found = results["ragged"][counted]
        for axes, key in ((left, "mean"), (middle, "var")):
            v = found[key]
            axes.plot(steps, v.mean(0), color=color, label=counted)
            axes.fill_between(
                steps, v.min(0), v.max(0), color=color, alpha=0.2, linewidth=0
            )
            axes.set_xlabel("training step")
        for k, key in enumerate(("short", "long")):
            v = 100 * found[key]
            side = -0.1 if counted == "each point" else 0.1
            axes = right
            axes.errorbar(
                k + side,
                v.mean(),
                yerr=[[v.mean() - v.min()], [v.max() - v.mean()]],
                fmt="o",
                color=color,
                capsize=3,
            )
    left.set_title("running mean of the row,\nin deviations of short digits")
    middle.set_title("running variance of the row,\nover that of short digits")
    left.legend(title="counts once")
    left.set_ylabel("ragged digits, mean and range")
    right.set_title("test accuracy at inference, %")
    right.set(xticks=[0, 1], xlim=(-0.5, 1.5), ylim=(0, 100))
    right.set_xticklabels(["short, 97 %", "long, 3 %"])
    return figure


if __name__ == "__main__":
    main()
