"""How long does a whole job take? MNIST in five epochs, against Keras's `fit`.

    python benchmarks/job.py --manual-dir=../shared/data/mnist

The same network (784-64-64-10: Dense, ReLU, batch norm), Adam at 1e-3, batches of 64,
each job in a process of its own, in turn. Keras runs on JAX and, where it is installed,
on TensorFlow, and is warmed up on one batch of each size before its `fit` is timed;
`train.py` compiles before it starts its clock, too. Neither evaluates while it is.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import evidence


ROOT = Path(__file__).parents[1]
EPOCHS, BATCH = 5, 64


def keras_job(folder):
    """Trains with Keras, in a process of its own; prints seconds and accuracy."""
    import keras

    keras.utils.set_random_seed(0)
    train, test = (
        (
            evidence.load_idx(folder, f"{split}-images")
            .reshape(-1, 784)
            .astype("float32")
            / 255,
            evidence.load_idx(folder, f"{split}-labels").astype("int32"),
        )
        for split in ("train", "t10k")
    )
    layers = [keras.Input((784,))]
    for _ in range(2):
        layers += [
            keras.layers.Dense(64, activation="relu"),
            keras.layers.BatchNormalization(),
        ]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    model.compile(
        keras.optimizers.Adam(1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    weights = model.get_weights()
    last = BATCH + len(train[0]) % BATCH
    model.fit(train[0][:last], train[1][:last], batch_size=BATCH, verbose=0)
    model.set_weights(weights)
    start = time.perf_counter()
    model.fit(*train, batch_size=BATCH, epochs=EPOCHS, verbose=0)
    seconds = time.perf_counter() - start
    _, accuracy = model.evaluate(*test, batch_size=1000, verbose=0)
    print(json.dumps({"fit": seconds, "accuracy": accuracy}))


def ours(folder, data):
    """Trains with `train.py`; data are prepared before the first time."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--dataset=mnist",
            f"--manual-dir={folder}",
            f"--data-dir={data}",
            f"--epochs={EPOCHS}",
            f"--workdir={workdir}/run",
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        lines = Path(workdir, "run", "metrics.jsonl").read_text().splitlines()
    found = re.search(r"([\d,]+) training", run.stdout)
    assert found
    rows = int(found[1].replace(",", ""))
    epochs = [json.loads(line) for line in lines]
    fit = sum(rows / line["examples_per_second"] for line in epochs)
    return {"fit": fit, "accuracy": epochs[-1]["test_accuracy"]}


def theirs(folder, backend):
    """Trains with Keras on a backend."""
    command = [sys.executable, __file__, f"--manual-dir={folder}", "--as-keras"]
    environment = os.environ | {
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    """Measures, prints a table, writes JSON and a figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--manual-dir", required=True, help="folder of MNIST's files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--as-keras", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_keras:
        keras_job(args.manual_dir)
        return
    with tempfile.TemporaryDirectory() as data:
        jobs = {"jbn, train.py": lambda: ours(args.manual_dir, data)}
        for backend, package in (("jax", "JAX"), ("tensorflow", "TensorFlow")):
            known = subprocess.run(
                [sys.executable, "-c", f"import keras, {backend}"], capture_output=True
            )
            if known.returncode:
                print(f"Keras on {package}: not installed, left out", file=sys.stderr)
                continue
            jobs[f"Keras on {package}"] = lambda backend=backend: theirs(
                args.manual_dir, backend
            )
        next(iter(jobs.values()))()  # prepares the data
        results = {name: [] for name in jobs}
        for _ in range(args.rounds):
            for name, job in jobs.items():
                start = time.perf_counter()
                found = job()
                whole = time.perf_counter() - start
                results[name].append(found | {"whole": whole})
                print(name, results[name][-1], flush=True)
    medians = {
        name: {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        for name, runs in results.items()
    }
    own = medians["jbn, train.py"]
    rows = [
        [
            name,
            f"{100 * m['accuracy']:.2f} %",
            f"{m['fit']:.1f}",
            f"{own['fit'] / m['fit']:.2f}",
            f"{m['whole']:.1f}",
            f"{own['whole'] / m['whole']:.2f}",
        ]
        for name, m in medians.items()
    ]
    header = [
        "job",
        "test accuracy",
        "training, s",
        "ours / it",
        "process, s",
        "ours / it",
    ]
    plt = evidence.style()
    figure, panel = plt.subplots(figsize=(7, 2.6))
    names = list(reversed(medians))
    whole = [medians[n]["whole"] for n in names]
    panel.barh(names, whole, color=evidence.SKY, label="the whole process")
    fit = [medians[n]["fit"] for n in names]
    panel.barh(names, fit, color=evidence.BLUE, height=0.4, label="training")
    panel.set_xlabel("seconds")
    panel.set_title("MNIST, five epochs")
    panel.legend(fontsize=8)
    evidence.report(
        "job",
        __doc__.splitlines()[0],
        [0],
        {"medians": medians, "runs": results},
        evidence.table(header, rows),
        figure,
        folder=evidence.BENCHMARKS,
    )


if __name__ == "__main__":
    main()
