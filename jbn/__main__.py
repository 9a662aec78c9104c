"""Tools for trained networks: `python -m jbn --help`."""

import sys
from typing import Any


def main() -> int:
    """Runs the command line; returns the exit status."""
    try:
        from jbn.training.commands import main
    except ModuleNotFoundError as error:
        text = f'python -m jbn needs {error.name}: pip install "jbn[train]"'
        print(f"error: {text}", file=sys.stderr)
        return 2

    sys.unraisablehook = _unless_closed
    return main()


def _unless_closed(unraisable: Any) -> None:
    # Where a checkpoint cannot be read, Orbax leaves other reads behind, which complain
    # below the message that says so.
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.exit(main())
