"""What do an outlier and an empty shard do to a training that is under way?

    python benchmarks/outlier.py

Prints a Markdown table; writes docs/evidence/outlier.{json,png}. An MLP on the embedded
digits, the same for all libraries: SGD with momentum, gradients clipped to a norm of 1.
After 150 steps comes one bad batch, then 150 good ones. Libraries that are not
installed are left out.
"""

import functools
import sys
import textwrap

import evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec as P


SEEDS = range(3)
HALF, BATCH, RATE, MOMENTUM = 150, 64, 0.05, 0.9
LATER = (-1, 0, 10, 50, 150)  # steps after the event, of the table
EVENTS = {
    "outlier": "one pixel of 1e6",
    "shard": "one of four devices has no rows",
    "mask": "a mask without rows",
    "rows": "a batch of 0 rows",
}


def weights(seed):
    """The weights to start from, NumPy."""
    rng = np.random.default_rng(seed)
    sizes = [(64, 64), (64, 64), (64, 10)]
    return [(rng.normal(size=s) * np.sqrt(2 / s[0])).astype(np.float32) for s in sizes]


def data(seed, images, labels):
    """Batches before and after, and the one between, which is still good."""
    rng = np.random.default_rng(seed)
    rows = np.array(
        [rng.choice(len(labels), BATCH, replace=False) for _ in range(2 * HALF + 1)]
    )
    x, y = images.reshape(-1, 64)[rows], labels[rows].astype(np.int32)
    mask = np.ones(y.shape, bool)
    batches = x, y, mask
    take = lambda rows: tuple(v[rows] for v in batches)
    return take(slice(HALF)), take(HALF), take(slice(HALF + 1, None))


def spoil(event, batch):
    """The bad batch."""
    x, y, mask = (v.copy() for v in batch)
    if event == "outlier":
        x[0, 36] = 1e6  # a pixel in the middle
    elif event == "shard":
        mask[-BATCH // 4 :] = False
    elif event == "mask":
        mask[:] = False
    else:
        x, y, mask = x[:0], y[:0], mask[:0]
    return x, y, mask


# ---- JAX ---------------------------------------------------------------------------


def offered(norm, event):
    """Whether a library has what the event needs."""
    if event == "shard":
        return norm.has_mask and norm.has_axis_name
    return norm.has_mask or event != "mask"


class Training:
    """The training of one library, compiled once: on one device, or on four."""

    def __init__(self, norm, test, masked, devices):
        self.norm, self.test, self.masked = norm, test, masked
        self.axis_name = "data" if devices > 1 else None
        self.loss = self.local_loss
        if devices > 1:
            self.loss = jax.shard_map(
                self.local_loss,
                mesh=jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,)),
                in_specs=(P(), P(), P("data"), P("data"), P("data")),
                out_specs=(P("data"), P()),
            )
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.sgd(RATE, momentum=0.9)
        )
        self.step = jax.jit(self._step)
        self.run = jax.jit(functools.partial(jax.lax.scan, self._step))

    def start(self, seed):
        """What the first step begins with."""
        norms = [self.norm.init(64, np.float32) for _ in range(2)]
        params = {
            "dense": list(map(jnp.asarray, weights(seed))),
            "bias": jnp.zeros(10),
            "norm": [p for p, _ in norms],
        }
        return params, [s for _, s in norms], self.optimizer.init(params)

    def logits(self, params, state, x, mask, train):
        """Twice dense, norm, ReLU; dense."""
        new = []
        for k in range(2):
            x, s = self.norm.apply(
                params["norm"][k],
                state[k],
                x @ params["dense"][k],
                train=train,
                mask=mask if self.masked else None,
                axis_name=self.axis_name,
            )
            new.append(s)
            x = jax.nn.relu(x)
        return x @ params["dense"][2] + params["bias"], new

    def local_loss(self, params, state, x, y, mask):
        """The device's part of the sum of the losses, and the new state."""
        out, state = self.logits(params, state, x, mask, True)
        each = optax.softmax_cross_entropy_with_integer_labels(out, y)
        return jnp.where(mask, each, 0).sum(keepdims=True), state

    def _step(self, carry, batch):
        params, state, opt = carry

        def total(params):
            losses, new = self.loss(params, state, *batch)
            return losses.sum() / jnp.maximum(batch[2].sum(), 1), new

        grads, state = jax.grad(total, has_aux=True)(params)
        updates, opt = self.optimizer.update(grads, opt)
        params = optax.apply_updates(params, updates)
        x, y = self.test
        out, _ = self.logits(params, state, x, None, False)
        return (params, state, opt), ((out.argmax(-1) == y).mean(), state[0])

    def stats(self, state):
        """The largest running mean and variance of the first norm."""
        mean, var = self.norm.stats(jax.device_get(state))
        return float(np.abs(mean).max()), float(np.max(var))


def with_jax(norm, images, labels, test):
    """Accuracies and states, by event and seed."""
    found = {event: [] for event in EVENTS if offered(norm, event)}
    for masked, devices, events in [
        (False, 1, ["outlier", "rows"]),
        (True, 1, ["mask"]),
        (True, 4, ["shard"]),
    ]:
        events = [event for event in events if event in found]
        if not events:
            continue
        training = Training(norm, test, masked, devices)
        for seed in SEEDS:
            before, batch, after = data(seed, images, labels)
            carry, (early, _) = training.run(training.start(seed), before)
            for event in events:
                bad, (middle, state) = training.step(carry, spoil(event, batch))
                _, (late, _) = training.run(bad, after)
                found[event].append(
                    {
                        "before": training.stats(carry[1][0]),
                        "after": training.stats(state),
                        "accuracy": np.concatenate([early, [middle], late]),
                    }
                )
    return found


# ---- PyTorch -----------------------------------------------------------------------


def with_torch(images, labels, test):
    """The same in PyTorch."""
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(1)
    test_x, test_y = map(torch.from_numpy, (test[0], test[1].astype(np.int64)))

    def run(seed, event):
        dense = [torch.from_numpy(w).requires_grad_() for w in weights(seed)]
        bias = torch.zeros(10, requires_grad=True)
        norms = [torch.nn.BatchNorm1d(64, momentum=1 - MOMENTUM) for _ in range(2)]
        params = [*dense, bias, *(p for n in norms for p in n.parameters())]
        optimizer = torch.optim.SGD(params, RATE, momentum=0.9)

        def logits(x, train):
            for w, norm in zip(dense[:2], norms, strict=True):
                norm.train(train)
                x = F.relu(norm(x @ w))
            return x @ dense[2] + bias

        def stats():
            mean, var = norms[0].running_mean, norms[0].running_var
            return float(mean.abs().max()), float(var.max())

        before, batch, after = data(seed, images, labels)
        batches = [*zip(*before, strict=True), spoil(event, batch)]
        batches += zip(*after, strict=True)
        found = {"accuracy": []}
        for k, (x, y, _) in enumerate(batches):
            if k == HALF:
                found["before"] = stats()
            out = logits(torch.from_numpy(x), True)
            loss = F.cross_entropy(out, torch.from_numpy(y).long(), reduction="sum")
            optimizer.zero_grad()
            (loss / max(len(y), 1)).backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            if k == HALF:
                found["after"] = stats()
            with torch.no_grad():
                hits = logits(test_x, False).argmax(-1) == test_y
            found["accuracy"].append(float(hits.float().mean()))
        found["accuracy"] = np.array(found["accuracy"])
        return found

    return {e: [run(seed, e) for seed in SEEDS] for e in ("outlier", "rows")}


# ---- Report ------------------------------------------------------------------------


def main():
    """Trains all, and reports."""
    jax.config.update("jax_num_cpu_devices", 4)
    (images, labels), (test_images, test_labels) = evidence.digits()
    test = test_images.reshape(-1, 64), test_labels
    trimmed = evidence.Jbn(MOMENTUM, trim=5.0)
    trimmed.name = "jbn, trim=5"
    results = {}
    for norm in evidence.norms(MOMENTUM, trimmed):
        print(norm.name, file=sys.stderr, flush=True)
        results[norm.name] = with_jax(norm, images, labels, test)
    try:
        results["PyTorch"] = with_torch(images, labels, test)
    except ImportError:
        print("PyTorch: not installed, left out", file=sys.stderr)
    evidence.report(
        "outlier",
        __doc__.splitlines()[0],
        SEEDS,
        results,
        describe(results),
        draw_figure(results),
    )


def describe(results):
    """The table."""
    rows = []
    for event, title in EVENTS.items():
        for name, events in results.items():
            if event not in events:
                continue
            found = events[event]
            first = found[0]
            pairs = zip(first["before"], first["after"], strict=True)
            states = [" → ".join(map(evidence.show, pair)) for pair in pairs]
            accuracy = 100 * np.mean([f["accuracy"] for f in found], 0)
            moments = [accuracy[HALF + k] for k in LATER]
            rows.append([title, name, *states, *[f"{a:.1f}" for a in moments]])
    header = ["event", "library", "largest running mean", "largest running variance"]
    when = ["test accuracy, %: before", "just after"]
    when += [f"after {k} steps" for k in LATER[2:]]
    return evidence.table([*header, *when], rows)


def alike(curves):
    """The names of curves that coincide, within 1 % on average, in groups."""
    groups = []
    for name, values in curves.items():
        for group in groups:
            if np.abs(curves[group[0]] - values).mean() < 1:
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def draw_figure(results):
    """Test accuracy by step, a panel for each of three events."""
    plt = evidence.style()
    figure, panels = plt.subplots(1, 3, figsize=(10, 4.4), sharey=True)
    steps = np.arange(2 * HALF + 1) - HALF
    for axes, event in zip(panels, ("outlier", "shard", "rows"), strict=True):
        curves = {
            name: 100 * np.mean([f["accuracy"] for f in events[event]], 0)
            for name, events in results.items()
            if event in events
        }
        for group in alike(curves):
            # What coincides is one line, named in words.
            values = curves[group[0]]
            good = values[-1] > 90
            color = evidence.BLUE if good else evidence.RED
            axes.plot(steps, values, "-" if good else "--", color=color, linewidth=2.2)
            text = "; ".join(n.replace(" ", "\N{NO-BREAK SPACE}") for n in group)
            axes.text(
                8,
                93 if good else 14,
                textwrap.fill(text, 20),
                color=color,
                va="top" if good else "bottom",
            )
        axes.axvline(0, color="#888888", linewidth=0.8)
        axes.set(xlabel="steps after the event", xlim=(-50, HALF), ylim=(0, 102))
        axes.set_title(EVENTS[event])
    panels[0].set_ylabel("test accuracy at inference, %\n(mean of 3 seeds)")
    return figure


if __name__ == "__main__":
    main()
