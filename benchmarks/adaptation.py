"""When do the statistics of shifted data help a trained network, and when not?

    python benchmarks/adaptation.py

Prints Markdown tables; writes docs/evidence/adaptation.{json,png}. Two small networks
are trained on the embedded digits and never see a corrupted one. Then they classify the
360 test images, corrupted in six ways at three severities each, by

- source: the running statistics of training,
- target: those of the batch that is classified (`adapt` with `prior=0`),
- mixture: those of the batch and of a number of training images together (`prior`),
- TENT: `prior=0`, then scale and bias trained for ten steps on the entropy of the
  predictions, all other parameters fixed.

Norm layers of the convolutional network see 64 rows of each image, its pixels, so that
a prior of 16 images is `prior=16 * 64`; those of the dense one see one. To adapt to
thousands of batches in one compiled function networks are run in training mode with
`convert(model, tau=prior)`; that this is what `adapt` gives is checked on the way.
"""

import functools

import evidence
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jbn.linen import BatchNorm
from jbn.models import MLP
from jbn.tools import adapt, convert, kinds


SEEDS = range(3)
EPOCHS, BATCH = 20, 64
SIZES = [1, 4, 16, 64, 360]
PRIORS = [0, 1, 4, 16, 64, np.inf]
PRIOR = 16  # of the mixture in the first table
TENT_STEPS, TENT_RATE = 10, 3e-3
SEVERITIES = {
    "noise": [0.2, 0.35, 0.5],
    "blur": [1, 2, 3],
    "contrast": [0.5, 0.3, 0.15],
    "inversion": [0.6, 0.8, 1.0],
    "offset": [0.3, 0.6, 1.0],
    "shift": [1, 2, 3],
}
EXPLAINED = {
    "noise": "Gaussian noise of standard deviation",
    "blur": "times smoothed by (1, 2, 1) / 4 each way",
    "contrast": "distance from gray times",
    "inversion": "mixed with its negative, of which",
    "offset": "brighter by (white is 1)",
    "shift": "moved right by, in pixels of 8",
}


def corrupt(images, kind, amount, rng):
    """Images (n, 8, 8) from 0 to 1, changed; nothing is clipped."""
    if kind == "noise":
        return images + amount * rng.standard_normal(images.shape)
    if kind == "blur":
        for _ in range(amount):
            for axis in (1, 2):
                width = [(0, 0), (0, 0), (0, 0)]
                width[axis] = (1, 1)
                p = np.moveaxis(np.pad(images, width), axis, 0)
                images = np.moveaxis((p[:-2] + 2 * p[1:-1] + p[2:]) / 4, 0, axis)
        return images
    if kind == "contrast":
        return 0.5 + amount * (images - 0.5)
    if kind == "inversion":
        return (1 - amount) * images + amount * (1 - images)
    if kind == "offset":
        return images + amount
    return np.pad(images, ((0, 0), (0, 0), (amount, 0)))[:, :, :8]


# ---- Model and training -------------------------------------------------------------


class Net(nn.Module):
    """Two convolutions with norms, a maximum over 2x2, and a dense layer."""

    @nn.compact
    def __call__(self, x, *, train):
        """Logits of images (n, 8, 8)."""
        x = x[..., None]
        for width in (16, 32):
            x = nn.Conv(width, (3, 3))(x)
            x = nn.relu(BatchNorm(momentum=0.9)(x, use_running_average=not train))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


NETWORKS = {
    "convolutional": Net(),
    "dense": MLP(norm=functools.partial(BatchNorm, momentum=0.9)),
}
ROWS = {"convolutional": 64, "dense": 1}  # that a norm layer sees of each image


def train(network, images, labels, seed):
    """Variables after `EPOCHS` epochs of Adam."""
    model, optimizer = NETWORKS[network], optax.adam(3e-3)
    variables = model.init(jax.random.key(seed), images[:1], train=False)

    @jax.jit
    def epoch(variables, state, order):
        def step(carry, rows):
            variables, state = carry

            def loss(params):
                logits, new = model.apply(
                    {**variables, "params": params},
                    images[rows],
                    train=True,
                    mutable=["batch_stats"],
                )
                ce = optax.softmax_cross_entropy_with_integer_labels
                return ce(logits, labels[rows]).mean(), new

            params = variables["params"]
            grads, new = jax.grad(loss, has_aux=True)(params)
            updates, state = optimizer.update(grads, state, params)
            return (
                {"params": optax.apply_updates(params, updates), **new},
                state,
            ), None

        return jax.lax.scan(step, (variables, state), order)[0]

    state, rng = optimizer.init(variables["params"]), np.random.default_rng(seed)
    steps = len(images) // BATCH
    for _ in range(EPOCHS):
        order = rng.permutation(len(images))[: steps * BATCH].reshape(steps, BATCH)
        variables, state = epoch(variables, state, order)
    return variables


# ---- Adaptation ---------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("network", "size"))
def accuracy(network, variables, images, labels, prior, size):
    """Of each batch of `size` normalized by its mixture with `prior` images.

    The last batch is filled up with images of the first.
    """
    rows = np.resize(np.arange(len(images)), -(-len(images) // size) * size)
    tau = prior * ROWS[network]
    model = convert(NETWORKS[network], tau=tau, update_stats=False)
    run = lambda x: model.apply(variables, x, train=True)
    logits = jax.lax.map(run, images[rows].reshape(-1, size, *images.shape[1:]))
    right = logits.reshape(-1, 10).argmax(-1)[: len(labels)] == labels
    return right.mean()


@functools.partial(jax.jit, static_argnames="network")
def tent(network, variables, images, labels):
    """Accuracy after some steps down the entropy, of scale and bias alone."""
    model = convert(NETWORKS[network], update_stats=False)
    still = optax.set_to_zero()
    optimizer = optax.multi_transform(
        {"norm": optax.adam(TENT_RATE), "weight": still, "bias": still},
        kinds(variables),
    )

    def logits_of(params):
        return model.apply({**variables, "params": params}, images, train=True)

    def entropy(params):
        log = jax.nn.log_softmax(logits_of(params))
        return -(jnp.exp(log) * log).sum(-1).mean()

    params = variables["params"]
    state = optimizer.init(params)
    for _ in range(TENT_STEPS):
        updates, state = optimizer.update(jax.grad(entropy)(params), state, params)
        params = optax.apply_updates(params, updates)
    return (logits_of(params).argmax(-1) == labels).mean()


def check(network, variables, images, labels):
    """`adapt`, and inference by what it returns, give the same predictions."""
    model, size = NETWORKS[network], len(images)
    run = lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])
    new = adapt(run, variables, [images], prior=PRIOR * ROWS[network])
    right = model.apply(new, images, train=False).argmax(-1) == labels
    want = accuracy(network, variables, images, labels, float(PRIOR), size)
    assert abs(right.mean() - want) < 1.5 / size, network


def measure(network, splits):
    """Accuracies: whole test set by corruption; by size and prior, three data sets."""
    (images, labels), (test, answers) = splits
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    cases = [("clean", 0)]
    cases += [(kind, amount) for kind, all_ in SEVERITIES.items() for amount in all_]
    whole = {case: {method: [] for method in METHODS} for case in cases}
    grids = {"corrupted": [], "clean": [], "sorted": []}
    for seed in SEEDS:
        variables = train(network, images, labels, seed)
        rng = np.random.default_rng(100 + seed)
        order = rng.permutation(len(test))
        x, y = test[order], jnp.asarray(answers[order])
        sets = {
            case: jnp.asarray(x if case[0] == "clean" else corrupt(x, *case, rng))
            for case in cases
        }
        if seed == 0:
            check(network, variables, sets["noise", 0.35], y)
        score = functools.partial(accuracy, network, variables)
        for case, data in sets.items():
            found = whole[case]
            found["source"].append(float(score(data, y, np.inf, len(y))))
            found["target"].append(float(score(data, y, 0.0, len(y))))
            found["mixture"].append(float(score(data, y, float(PRIOR), len(y))))
            found["TENT"].append(float(tent(network, variables, data, y)))

        def grid(data, y, score=score):
            return [[float(score(data, y, float(p), n)) for p in PRIORS] for n in SIZES]

        corrupted = [grid(data, y) for case, data in sets.items() if case[0] != "clean"]
        grids["corrupted"].append(np.mean(corrupted, 0))
        grids["clean"].append(grid(sets["clean", 0], y))
        by_label = np.argsort(np.asarray(y), kind="stable")
        grids["sorted"].append(grid(sets["clean", 0][by_label], y[by_label]))
    return whole, {name: np.array(grid) for name, grid in grids.items()}


# ---- Reports ------------------------------------------------------------------------


METHODS = {
    "source": (evidence.BLACK, "s"),
    "target": (evidence.ORANGE, "o"),
    "mixture": (evidence.BLUE, "D"),
    "TENT": (evidence.GREEN, "^"),
}


COLORS = (
    evidence.ORANGE,
    evidence.RED,
    evidence.PURPLE,
    evidence.BLUE,
    evidence.SKY,
    evidence.BLACK,
)


def name(prior):
    """What a prior is called."""
    if prior == 0:
        return "target alone"
    if prior == np.inf:
        return "source alone"
    return "1 image" if prior == 1 else f"{prior} images"


def draw_corruptions(panel, whole):
    """How each corruption fares, as dots with the range of the seeds."""

    def values(kind, method):
        return np.mean([whole[c][method] for c in whole if c[0] == kind], 0)

    evidence.draw_dots(panel, ["clean", *SEVERITIES], values, METHODS)
    panel.legend(loc="upper left", handletextpad=0.2)


def draw_sizes(panel, grid, priors, style="-", **title):
    """Accuracy by the size of the batch, a line for each prior."""
    values = 100 * grid.mean(0)
    for j, (prior, color) in enumerate(zip(PRIORS, COLORS, strict=True)):
        if prior in priors:
            panel.plot(
                SIZES,
                values[:, j],
                style,
                marker="o",
                markersize=4,
                color=color,
                label=name(prior),
            )
    panel.set_xscale("log", base=2)
    panel.set_xticks(SIZES, [str(n) for n in SIZES])
    panel.minorticks_off()
    panel.set(xlabel="images in a batch", ylabel="accuracy (%)", **title)


def draw(found):
    """One figure of the three questions."""
    plt = evidence.style()
    figure, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(10, 8.4))
    whole, grids = found["convolutional"]
    draw_corruptions(a, whole)
    a.set_title("convolutional, all 360 images as one batch")
    title = "corrupted images, convolutional: 64 rows each"
    draw_sizes(b, grids["corrupted"], PRIORS, title=title, ylim=(0, 65))
    b.legend(loc="lower right", title="prior", ncols=2)
    grids = found["dense"][1]
    title = "corrupted images, dense: one row each"
    draw_sizes(c, grids["corrupted"], PRIORS, title=title, ylim=(0, 65))
    some = (0, 16, np.inf)
    title = "clean images, dense (dashed: sorted by label)"
    draw_sizes(d, grids["clean"], some, title=title, ylim=(0, 102))
    d.legend(loc="lower right", title="prior")
    draw_sizes(d, grids["sorted"], some, "--")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    return figure


def text(found):
    """The tables."""
    parts = []
    for network, (whole, _) in found.items():
        rows = []
        for (kind, amount), values in whole.items():
            label = kind if kind == "clean" else f"{kind} {amount}"
            rows.append([label, *map(evidence.percent, values.values())])
        parts.append(evidence.table([f"{network}, 360 at once", *METHODS], rows))
    titles = {
        "corrupted": "corrupted, mean of all",
        "clean": "clean, shuffled",
        "sorted": "clean, by label",
    }
    for network, (_, grids) in found.items():
        rows = [
            [title, n, *(f"{100 * v:.1f}" for v in row)]
            for kind, title in titles.items()
            for n, row in zip(SIZES, grids[kind].mean(0), strict=True)
        ]
        parts.append(evidence.table([network, "batch", *map(name, PRIORS)], rows))
    notes = [f"{k}: {what} {SEVERITIES[k]}" for k, what in EXPLAINED.items()]
    return "\n\n".join([*parts, "; ".join(notes) + "."])


def main():
    """Measures, and reports."""
    splits = evidence.digits()
    found = {network: measure(network, splits) for network in NETWORKS}
    results = {
        network: {
            "accuracy": [
                {"images": kind, "amount": amount, **values}
                for (kind, amount), values in whole.items()
            ],
            "by_batch": {
                "axes": "seed, batch, prior",
                "batches": SIZES,
                "priors": [name(p) for p in PRIORS],
                **grids,
            },
        }
        for network, (whole, grids) in found.items()
    }
    question = __doc__.splitlines()[0]
    evidence.report("adaptation", question, SEEDS, results, text(found), draw(found))


if __name__ == "__main__":
    main()
