"""What does the trainer add to an epoch? CIFAR-10 by `resnet8`, against a bare loop.

    python benchmarks/epoch.py --data=../shared/data/cifar10/cifar10_jpeg.npz

The loop of `train.py` (masks, metrics, checks of every step for non-finite values,
reports) and a loop that does nothing but step, in one process, one epoch of each in
turn: the same network, images, optimizer and batches, without augmentation. The
trainer leaves masks out from 100 steps an epoch on, so fewer images take longer each.
"""

import timing


timing.prepare()

import argparse
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import evidence
import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from jbn.training.batches import permutation
from jbn.training.build import make_optimizer
from jbn.training.checkpoint import Checkpoints
from jbn.training.config import parse_config
from jbn.training.hosts import Preemption
from jbn.training.journal import Journal
from jbn.training.loop import Loop
from jbn.training.report import Profile
from jbn.training.setup import prepare


def as_arrays(path, folder, count):
    """An `.npz` file with the first images, decoded."""
    with np.load(path, allow_pickle=False) as archive:
        found = {}
        for split, most in (("train", count), ("test", 100)):
            data, offsets = archive[f"{split}_jpeg"], archive[f"{split}_offsets"]
            found[f"{split}_images"] = np.stack(
                [
                    np.asarray(Image.open(io.BytesIO(data[start:stop].tobytes())))
                    for start, stop in itertools.pairwise(offsets[: most + 1])
                ]
            )
            found[f"{split}_labels"] = archive[f"{split}_labels"][:most]
    np.savez(Path(folder) / "cifar10.npz", allow_pickle=False, **found)
    return Path(folder) / "cifar10.npz"


class Bare:
    """Steps, and nothing else."""

    def __init__(self, setup):
        self.setup, self.model = setup, setup.task.local_model
        self.optimizer = make_optimizer(setup.config, setup.steps_per_epoch)
        state = setup.initial_state()
        self.state = state.params, state.batch_stats, state.opt_state
        self.step = jax.jit(self._step, donate_argnums=0)
        self.state = jax.block_until_ready(self.step(self.state, *self._batch([0])))

    def _step(self, state, images, labels):
        params, batch_stats, opt_state = state

        def loss(params):
            logits, updated = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    def _batch(self, rows):
        data = self.setup.dataset.train
        rows = np.resize(rows, self.setup.config.batch_size)
        return data.image[rows], data.label[rows]

    def epoch(self, number):
        """One pass over the training data."""
        size = self.setup.config.batch_size
        order = permutation(0, number, len(self.setup.dataset.train))
        for start in range(0, len(order), size):
            batch = self._batch(order[start : start + size])
            self.state = self.step(self.state, *batch)
        jax.block_until_ready(self.state)


class Timed(Loop):
    """The trainer's loop. Before or after each epoch, the bare loop trains one too."""

    def __init__(self, setup, *others):
        super().__init__(setup, *others)
        self.bare, self.times = Bare(setup), {"trainer": [], "bare": []}

    def _train_until(self, stop):
        number = len(self.times["bare"])
        cases = {
            "trainer": lambda: super(Timed, self)._train_until(stop),
            "bare": lambda: self.bare.epoch(number + 1),
        }
        for name in list(cases) if number % 2 else list(reversed(cases)):
            start = time.process_time()
            cases[name]()
            self.times[name].append(time.process_time() - start)


def main():
    """Measures, prints a table, writes JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="an .npz file of JPEGs")
    parser.add_argument("--images", type=int, default=6400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = as_arrays(args.data, folder, args.images)
        config = parse_config(
            [
                *("--model=resnet8", f"--dataset={data}", "--shift=0"),
                *(f"--epochs={args.rounds}", "--accelerator=cpu", "--num-devices=1"),
            ]
        )
        setup, workdir = prepare(config), Path(folder)
        with (
            Checkpoints(workdir / "checkpoints") as checkpoints,
            Preemption() as preemption,
            Journal(setup, workdir, 0) as journal,
        ):
            loop = Timed(setup, checkpoints, journal, preemption, Profile(None))
            loop.run(setup.initial_state(), 0, {})
    times = loop.times
    ratios = [t / b for t, b in zip(times["trainer"], times["bare"], strict=True)]
    medians = {name: statistics.median(t) for name, t in times.items()}
    row = [f"{t:.2f} s" for t in medians.values()] + [
        f"{statistics.median(ratios):.3f}"
    ]
    plt = evidence.style()
    figure, panel = plt.subplots(figsize=(7, 1.8))
    panel.plot(ratios, np.zeros(len(ratios)), "o", color=evidence.BLUE)
    panel.axvline(1.0, color="black", linewidth=0.8)
    panel.set_yticks([])
    panel.set_xlabel("processor time of an epoch, trainer / bare loop")
    evidence.report(
        "epoch",
        __doc__.splitlines()[0],
        [0],
        {"seconds": times, "ratio": statistics.median(ratios), "images": args.images},
        evidence.table(["train.py", "bare loop", "ratio"], [row]),
        figure,
        folder=evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
