"""Trains a network with batch normalization: `python train.py --help`.

It is `jbn` with `train` as the command where none is named.
"""

import sys
from collections.abc import Sequence

import jbn.__main__


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line, or `args` in its place; returns the exit status."""
    return jbn.__main__.main(args, prog="train.py", default="train")


if __name__ == "__main__":
    sys.exit(main())
