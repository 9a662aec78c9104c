"""Does training with quantized folded weights keep the accuracy of the float network?

    python benchmarks/quantization.py

Prints a Markdown table; writes docs/evidence/quantization.{json,png}. `resnet8` on the
embedded digits, the same initial weights and batches for all: trained in float, and
trained with all kernels fake-quantized as they are after folding (`tools.quantizer`),
with one scale per output feature and 8 or 4 bits. The last quarter of a quantized
training has its statistics frozen. The float network is also folded and then quantized
without training. "deployed" is the trained network after `tools.fold`, with its kernels
rounded to the quantized values again. It must predict what the trained network does.
"""

import functools

import evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jbn.linen import BatchNorm, FrozenBatchNorm
from jbn.models import resnet8
from jbn.tools import convert, fold, quantizer


SEEDS = range(3)
EPOCHS, BATCH, RATE = 8, 64, 0.05
BITS = 8, 4
MODEL = resnet8(norm=functools.partial(BatchNorm, momentum=0.9))
TRAINED, ROUNDED = "trained quantized", "float, then quantized"


def quantize(bits, kernel):
    """The nearest of `2**bits - 1` values for each output feature; straight through."""
    axes = tuple(range(kernel.ndim - 1))
    step = abs(kernel).max(axes, keepdims=True) / (2 ** (bits - 1) - 1)
    step = jnp.where(step == 0, 1, step)
    return kernel + lax.stop_gradient(jnp.round(kernel / step) * step - kernel)


@jax.jit
def infer(variables, images):
    """Logits by the running statistics."""
    return MODEL.apply(variables, images, train=False)


@functools.cache
def optimizer(steps):
    """SGD with momentum, and a learning rate that decays to zero."""
    return optax.sgd(optax.cosine_decay_schedule(RATE, steps), 0.9, nesterov=True)


@functools.partial(jax.jit, static_argnames=("frozen", "prepare", "steps"))
def step(variables, opt_state, images, labels, *, frozen, prepare, steps):
    """One step of training."""
    freeze = functools.partial(convert, to=FrozenBatchNorm, freeze_affine=False)
    model = freeze(MODEL) if frozen else MODEL

    def loss(params):
        given = prepare({**variables, "params": params})
        logits, new = model.apply(given, images, train=True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
    updates, opt_state = optimizer(steps).update(grads, opt_state)
    params = optax.apply_updates(variables["params"], updates)
    return {"params": params, "batch_stats": stats}, opt_state


def train(seed, variables, splits, prepare, freezes):
    """The variables after `EPOCHS`."""
    (images, labels), _ = splits
    rng = np.random.default_rng(seed)
    count = len(labels) // BATCH
    steps = EPOCHS * count
    opt_state = optimizer(steps).init(variables["params"])
    for epoch in range(EPOCHS):
        frozen = freezes and epoch >= 0.75 * EPOCHS
        order = rng.permutation(len(labels))
        for i in range(count):
            rows = order[i * BATCH : (i + 1) * BATCH]
            variables, opt_state = step(
                variables,
                opt_state,
                images[rows],
                labels[rows],
                frozen=frozen,
                prepare=prepare,
                steps=steps,
            )
    return variables


def accuracy(logits, labels):
    """The share that is right."""
    return float((np.argmax(logits, -1) == labels).mean())


def deployed(variables, bits, images):
    """Logits of the folded network, with kernels of quantized values."""
    folded = fold(MODEL, variables, images, train=False)
    new = jax.tree_util.tree_map_with_path(
        lambda path, v: quantize(bits, v) if path[-1].key == "kernel" else v,
        folded.variables,
    )
    return jax.jit(lambda v, x: folded.apply(v, x, train=False))(new, images)


def as_is(variables):
    """Quantizes nothing."""
    return variables


@functools.cache
def prepare_for(bits):
    """The quantizer, made once, so that no seed compiles again."""
    images = jnp.zeros((1, 8, 8, 1))
    variables = MODEL.init(jax.random.key(0), images, train=False)
    rounding = functools.partial(quantize, bits)
    return quantizer(MODEL, variables, images, train=False, quantize=rounding)


def measure(seed, splits):
    """Accuracies of one seed, and how far the deployed networks are off."""
    _, (images, labels) = splits
    variables = jax.jit(functools.partial(MODEL.init, train=False))(
        jax.random.key(seed), images[:1]
    )
    float_ = train(seed, variables, splits, as_is, False)
    found = {"float": accuracy(infer(float_, images), labels)}
    for bits in BITS:
        prepare = prepare_for(bits)
        rounded = infer(prepare(float_), images)
        found[f"{ROUNDED}, {bits}"] = accuracy(rounded, labels)
        trained = train(seed, variables, splits, prepare, True)
        logits = np.asarray(infer(prepare(trained), images))
        served = np.asarray(deployed(prepare(trained), bits, images))
        found[f"{TRAINED}, {bits}"] = accuracy(logits, labels)
        found[f"deployed, {bits}"] = accuracy(served, labels)
        found[f"difference, {bits}"] = abs(served - logits).max() / abs(logits).max()
    return found


def draw(found):
    """Accuracy by bits."""
    plt = evidence.style()
    figure, panel = plt.subplots(figsize=(6, 3.2))
    best = 100 * np.mean(found["float"])
    panel.axhline(best, color=evidence.BLACK, label="float")
    for name, color in ((TRAINED, evidence.BLUE), (ROUNDED, evidence.ORANGE)):
        values = 100 * np.array([found[f"{name}, {bits}"] for bits in BITS])
        panel.plot(BITS, values.mean(1), "o-", color=color, label=name)
        panel.fill_between(BITS, values.min(1), values.max(1), color=color, alpha=0.2)
    panel.set(xlabel="bits of each weight", ylabel="test accuracy, %", xticks=BITS)
    panel.legend()
    return figure


def text(found):
    """The table."""
    rows = [["32 (float)", evidence.percent(found["float"]), "", "", ""]]
    for bits in BITS:
        names = ROUNDED, TRAINED, "deployed"
        cells = [evidence.percent(found[f"{name}, {bits}"]) for name in names]
        rows.append([bits, *cells, f"{max(found[f'difference, {bits}']):.0e}"])
    header = ["bits", ROUNDED, TRAINED, "the latter, deployed", "largest difference"]
    return evidence.table(header, rows)


def main():
    """Measures, and reports."""
    splits = [(x[..., None], y.astype(np.int32)) for x, y in evidence.digits()]
    all_ = [measure(seed, splits) for seed in SEEDS]
    found = {name: [one[name] for one in all_] for name in all_[0]}
    question = __doc__.splitlines()[0]
    evidence.report("quantization", question, SEEDS, found, text(found), draw(found))


if __name__ == "__main__":
    main()
