"""Runs the measurements of speed and memory, and writes their tables.

    python -m benchmarks [op memory network first_step scale variance groups gpu job
        epoch]
    python -m benchmarks tables

Each question is a script of its own, run in a process of its own; the results are in
`docs/benchmarks/*.json` with a figure each. From these the tables in `README.md` and
`docs/benchmarks.md` are written, between marks; no figure there is typed. Without a
GPU, `gpu` is left out.
"""

import argparse
import subprocess
import sys
from pathlib import Path


QUESTIONS = (
    "memory",
    "op",
    "network",
    "first_step",
    "scale",
    "variance",
    "groups",
    "gpu",
    "job",
    "epoch",
)


def main():
    """Runs what is asked for, and then writes the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "questions", nargs="*", choices=(*QUESTIONS, "tables"), help="all by default"
    )
    parser.add_argument(
        "--manual-dir",
        help="folder of MNIST's four files, for `job`, which is left out without it",
    )
    parser.add_argument(
        "--cifar10", help="an .npz file of JPEGs, for `epoch`, left out without it"
    )
    args = parser.parse_args()
    here = Path(__file__).parent
    for name in args.questions or QUESTIONS:
        options = []
        needed = {
            "job": ("--manual-dir", "--manual-dir", args.manual_dir),
            "epoch": ("--cifar10", "--data", args.cifar10),
        }
        if name in needed:
            ours, its, value = needed[name]
            if value is None:
                print(f"{name}: left out, needs {ours}", file=sys.stderr)
                continue
            options = [f"{its}={value}"]
        if name != "tables":
            print(f"\n# {name}\n", flush=True)
            subprocess.run([sys.executable, here / f"{name}.py", *options], check=True)
    subprocess.run([sys.executable, here / "tables.py"], check=True)


if __name__ == "__main__":
    main()
