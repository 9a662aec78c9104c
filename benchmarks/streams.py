"""What adapts a network to a stream whose batches are no sample of the data?

    python benchmarks/streams.py [--data=../shared/data/cifar10/cifar10_jpeg.npz]

Prints Markdown tables; writes docs/evidence/streams.{json,png}. A network is trained on
images as they are. Then it classifies corrupted test images in batches of 16, one pass
over each stream, in random order or sorted by class, by

- source: the running statistics of training,
- target: the statistics of each batch,
- TENT: those, and scale and bias trained on the entropy of each batch, one step each,
- stream: `jbn.tools.stream`.

TENT's rate, and momentum and `tau` of `stream`, are chosen on other images, which were
held out of the training set, in other corruptions and clean: the best mean of those
settings that lose at most one point in any of these streams, or of all settings if
none does. There are a multilayer perceptron on the embedded digits and, with `--data`,
a `resnet8` on an archive of JPEG images with `{train,test}_{jpeg,offsets,labels}`.
"""

import argparse
import functools
import io
import itertools

import evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from jbn.linen import BatchNorm
from jbn.models import MLP, resnet8
from jbn.tools import kinds, stream


BATCH = 16
ORDERS = ("random", "by class")
MOMENTUM, RATES = (0.9, 0.95, 0.98, 0.99), (1e-5, 1e-4)
# Without one, `tau` follows from the distance to the source.
TAU = ({}, {"tau": 0.0}, {"tau": 500.0})
MOST_LOST = 0.01  # of accuracy, in any held-out stream
norm = functools.partial(BatchNorm, momentum=0.9)

# ---- Data ---------------------------------------------------------------------------


def blurred(x, times, _):
    """Smoothed by (1, 2, 1) / 4 each way."""
    for axis in (1, 2) * times:
        width = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        p = np.moveaxis(np.pad(x, width, mode="edge"), axis, 0)
        x = np.moveaxis((p[:-2] + 2 * p[1:-1] + p[2:]) / 4, 0, axis)
    return x


def pixelated(x, size, _):
    """Squares of `size` pixels have one color."""
    n, h, w, c = x.shape
    blocks = x.reshape(n, h // size, size, w // size, size, c).mean((2, 4))
    return blocks.repeat(size, 1).repeat(size, 2)


def compressed(x, quality, _):
    """As JPEG."""
    found = []
    for image in np.uint8(255 * x + 0.5):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        found.append(np.asarray(Image.open(file), np.float32) / 255)
    return np.stack(found)


def impulse(x, share, rng):
    """Black and white pixels."""
    hit, white = rng.random((2, *x.shape[:3], 1))
    return np.where(hit < share, white < 0.5, x)


def fog(x, amount, rng):
    """Mixed with white, more in some places than in others."""
    n, h, w, _ = x.shape
    coarse = rng.random((n, 4, 4, 1)).repeat(h // 4, 1).repeat(w // 4, 2)
    field = amount * (0.5 + blurred(coarse, h // 4, rng))
    return (1 - field) * x + field


CORRUPTIONS = {
    "noise": lambda x, v, rng: x + v * rng.standard_normal(x.shape),
    "blur": blurred,
    "contrast": lambda x, v, _: 0.5 + v * (x - 0.5),
    "brightness": lambda x, v, _: x + v,
    "saturation": lambda x, v, _: v * x + (1 - v) * x.mean(-1, keepdims=True),
    "pixels": pixelated,
    "fog": fog,
    "JPEG": compressed,
    # To choose by.
    "gamma": lambda x, v, _: np.clip(x, 0, 1) ** v,
    "impulse": impulse,
    "gain": lambda x, v, _: v * x,
}
REPORTED = {
    "digits": {
        "noise": (0.1, 0.2, 0.3),
        "blur": (1, 2, 3),
        "contrast": (0.5, 0.3, 0.15),
        "brightness": (0.3, 0.6, 1.0),
    },
    "images": {
        "noise": (0.03, 0.06, 0.12),
        "blur": (1, 2, 4),
        "contrast": (0.6, 0.4, 0.2),
        "brightness": (0.1, 0.2, 0.35),
        "saturation": (0.5, 0.25, 0.0),
        "pixels": (2, 4, 8),
        "fog": (0.3, 0.5, 0.7),
        "JPEG": (25, 15, 7),
    },
}
CHOSEN_BY = {"gamma": (0.5, 2, 3), "impulse": (0.03, 0.06, 0.12), "gain": (0.4, 0.7)}


def corrupted(x, kind, amount, seed):
    """Images (n, height, width, channels) from 0 to 1, changed."""
    if kind == "clean":
        return x
    rng = np.random.default_rng(seed)
    return np.float32(CORRUPTIONS[kind](x, amount, rng))


def streams(x, labels, order):
    """Batches of a stream, of full size."""
    if order == "by class":
        index = np.argsort(labels, kind="stable")
        x, labels = x[index], labels[index]
    steps = len(x) // BATCH
    cut = lambda v: v[: steps * BATCH].reshape(steps, BATCH, *v.shape[1:])
    return jnp.asarray(cut(x)), cut(labels)


# ---- Training -----------------------------------------------------------------------


def train(model, images, labels, seed, epochs, flip):
    """Variables after some epochs of Adam, its rate brought down to zero."""
    steps = len(images) // 64
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * steps))
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    @jax.jit
    def step(variables, state, rows, flipped):
        x = images[rows]
        x = jnp.where(flipped[:, None, None, None], x[:, :, ::-1], x)

        def loss(params):
            logits, new = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            ce = optax.softmax_cross_entropy_with_integer_labels
            return ce(logits, labels[rows]).mean(), new

        params = variables["params"]
        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        return {"params": optax.apply_updates(params, updates), **new}, state

    variables = model.init(jax.random.key(seed), images[:1], train=False)
    state, rng = optimizer.init(variables["params"]), np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))[: steps * 64].reshape(steps, 64)
        for rows in order:
            flipped = flip & (rng.random(64) < 0.5)
            variables, state = step(variables, state, rows, flipped)
        jax.block_until_ready(state)
    return variables


# ---- Methods ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def by_source(model, variables, batches, setting):
    """Logits by the running statistics."""
    return jax.lax.map(lambda x: model.apply(variables, x, train=False), batches)


@functools.partial(jax.jit, static_argnums=0)
def by_target(model, variables, batches, setting):
    """Logits by the statistics of each batch."""
    run = lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    return jax.lax.map(run, batches)


def tent(variables, rate):
    """TENT's optimizer, which updates only scale and bias of the norms."""
    still = optax.set_to_zero()
    transforms = {"norm": optax.adam(rate), "weight": still, "bias": still}
    return optax.multi_transform(transforms, kinds(variables))


@functools.partial(jax.jit, static_argnums=0)
def tent_step(model, variables, params, state, x, rate):
    """Parameters and state after a step down the entropy of a batch; its logits."""

    def entropy(params):
        logits, _ = model.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        log = jax.nn.log_softmax(logits)
        return -(jnp.exp(log) * log).sum(-1).mean(), logits

    grads, logits = jax.grad(entropy, has_aux=True)(params)
    updates, state = tent(variables, rate).update(grads, state, params)
    return optax.apply_updates(params, updates), state, logits


def by_tent(model, variables, batches, setting):
    """As `by_target`, with a step down the entropy of each batch afterwards."""
    rate, params, found = setting["rate"], variables["params"], []
    state = tent(variables, rate).init(params)
    # In a loop of XLA the gradients take seven times as long on a CPU.
    for x in batches:
        params, state, logits = tent_step(model, variables, params, state, x, rate)
        found.append(logits)
    return np.stack(found)


@functools.partial(jax.jit, static_argnums=0)
def by_stream(model, variables, batches, setting):
    """Logits of `jbn.tools.stream`."""
    run = lambda v, x: model.apply(v, x, train=False, mutable=["batch_stats"])
    adapter = stream(run, **setting)
    start = adapter.init(variables, batches[0])
    return jax.lax.scan(adapter.step, start, batches)[1]


METHODS = {
    "source": (by_source, [{}], evidence.BLACK, "s"),
    "target": (by_target, [{}], evidence.ORANGE, "o"),
    "TENT": (by_tent, [{"rate": r} for r in RATES], evidence.GREEN, "^"),
    "stream": (
        by_stream,
        [{"momentum": m, **t} for m, t in itertools.product(MOMENTUM, TAU)],
        evidence.BLUE,
        "D",
    ),
}


def accuracy(method, setting, model, variables, batches, labels):
    """Of one stream."""
    setting = {name: jnp.float32(value) for name, value in setting.items()}
    logits = METHODS[method][0](model, variables, batches, setting)
    return float((np.asarray(logits).argmax(-1) == labels).mean())


def cases_of(kinds_):
    """Pairs of a corruption and an amount."""
    return [(kind, amount) for kind, all_ in kinds_.items() for amount in all_]


def choose(model, variables, images, labels):
    """The setting of each method with the best mean, if possible one that loses little.

    A method with one setting is not run.
    """
    cases = itertools.product([("clean", 0), *cases_of(CHOSEN_BY)], ORDERS)
    grids = {name: grid for name, (_, grid, *_) in METHODS.items() if len(grid) > 1}
    gains = {name: [[] for _ in grid] for name, grid in grids.items()}
    for case, order in cases:
        data = streams(corrupted(images, *case, seed=7), labels, order)
        base = accuracy("source", {}, model, variables, *data)
        for name, found in gains.items():
            for setting, of_setting in zip(grids[name], found, strict=True):
                value = accuracy(name, setting, model, variables, *data)
                of_setting.append(value - base)
    score = lambda gains: (min(gains) >= -MOST_LOST, np.mean(gains))
    chosen = {name: METHODS[name][1][0] for name in METHODS}
    return chosen | {
        name: grids[name][max(range(len(found)), key=lambda i: score(found[i]))]
        for name, found in gains.items()
    }


def measure(name, model, splits, seeds, epochs, flip, reported):
    """Accuracy by order, corruption, amount and method, a list over seeds."""
    for _, some in splits[1:]:
        if set(some) != set(splits[0][1]):
            raise ValueError(
                f"{name}: {sorted(map(int, set(some)))} are not all classes."
            )
    found, settings = {}, []
    cases = [("clean", 0), *cases_of(reported)]
    (images, labels), (held, held_labels), (test, answers) = splits
    for seed in seeds:
        variables = train(model, images, labels, seed, epochs, flip)
        evidence.log(f"{name}, seed {seed}: trained")
        if not settings:
            settings.append(choose(model, variables, held, held_labels))
            evidence.log(f"chosen: {settings[0]}")
        index = np.random.default_rng(seed).permutation(len(test))
        for case, order in itertools.product(cases, ORDERS):
            x = corrupted(test[index], *case, seed=100 + seed)
            data = streams(x, answers[index], order)
            for method, setting in settings[0].items():
                value = accuracy(method, setting, model, variables, *data)
                found.setdefault((order, *case), {}).setdefault(method, []).append(
                    value
                )
        evidence.log(f"{name}, seed {seed}: measured")
    return found, settings[0]


# ---- Reports ------------------------------------------------------------------------


def by_kind(found, order, kind, method):
    """Accuracies of the seeds, means over severities."""
    values = [v[method] for (o, k, _), v in found.items() if (o, k) == (order, kind)]
    return np.mean(values, 0)


def text_of(name, found, settings):
    """A table, and the distance from the source."""
    rows, notes = [], []
    kinds_ = list(dict.fromkeys(kind for _, kind, _ in found))
    for order in ORDERS:
        for kind in kinds_:
            values = [by_kind(found, order, kind, method) for method in METHODS]
            rows.append([order, kind, *map(evidence.percent, values)])
        mean = [
            np.mean([by_kind(found, order, k, m) for k in kinds_[1:]], 0)
            for m in METHODS
        ]
        rows.append([order, "mean of corruptions", *map(evidence.percent, mean)])
        for method in ("target", "TENT", "stream"):
            below, case = min(
                (100 * (np.mean(v[method]) - np.mean(v["source"])), f"{kind} {amount}")
                for (o, kind, amount), v in found.items()
                if o == order
            )
            notes.append(f"{order}, {method}: {below:+.1f} at {case}")
    text = evidence.table([f"{name}: order", "images", *METHODS], rows)
    worst = "; ".join(notes)
    return f"{text}\n\nChosen: {settings}. Least against source: {worst}."


def draw(results):
    """A panel for each data set and order."""
    plt = evidence.style()
    figure, panels = plt.subplots(
        len(results), 2, figsize=(10, 4.2 * len(results)), squeeze=False
    )
    looks = {name: (color, marker) for name, (_, _, color, marker) in METHODS.items()}
    for row, (name, (found, _)) in zip(panels, results.items(), strict=True):
        kinds_ = list(dict.fromkeys(kind for _, kind, _ in found))
        for panel, order in zip(row, ORDERS, strict=True):
            values = functools.partial(by_kind, found, order)
            evidence.draw_dots(panel, kinds_, values, looks)
            panel.set_title(f"{name}, {order}")
    panels[0, 0].legend(loc="lower left", handletextpad=0.2)
    return figure


def main():
    """Measures, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="an archive of JPEG images")
    parser.add_argument("--epochs", type=int, default=3, help="of `resnet8`")
    parser.add_argument("--seeds", type=int, default=3, help="of `resnet8`")
    parser.add_argument("--images", type=int, default=1000, help="to classify")
    args = parser.parse_args()
    (images, labels), test = evidence.digits()
    images, test = images[..., None], (test[0][..., None], test[1])
    splits = (images[360:], labels[360:]), (images[:360], labels[:360]), test
    model, reported = MLP(norm=norm), REPORTED["digits"]
    results = {
        "digits": measure("digits", model, splits, range(3), 20, False, reported)
    }
    if args.data:
        images, labels = evidence.load_images(args.data, "train")
        test = evidence.load_images(args.data, "test", args.images)
        held = 1000
        splits = (images[held:], labels[held:]), (images[:held], labels[:held]), test
        model = resnet8(num_classes=int(labels.max()) + 1, norm=norm)
        results["images"] = measure(
            "images",
            model,
            splits,
            range(args.seeds),
            args.epochs,
            True,
            REPORTED["images"],
        )
    text = "\n\n".join(text_of(name, *found) for name, found in results.items())
    kept = {
        name: {
            "settings": settings,
            "accuracy": [
                {"order": order, "images": kind, "amount": amount, **values}
                for (order, kind, amount), values in found.items()
            ],
        }
        for name, (found, settings) in results.items()
    }
    question = __doc__.splitlines()[0]
    notes = [
        f"images: {args.seeds} seed(s), {args.epochs} epochs, {args.images} images"
    ]
    evidence.report(
        "streams",
        question,
        range(3),
        kept,
        text,
        draw(results),
        notes if args.data else (),
    )


if __name__ == "__main__":
    main()
