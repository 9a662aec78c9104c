"""Tools for trained networks: `python -m jbn --help`."""

import logging
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

    quiet_reads()
    return main()


def quiet_reads() -> None:
    """Leaves one message where a checkpoint cannot be read.

    Orbax leaves the reads of other arrays behind, which fail as well, and complain
    below the message that says so: as they are collected, in a loop that has ended or
    not.
    """
    sys.unraisablehook = _unless_closed
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )


def _unless_closed(unraisable: Any) -> None:
    if "Event loop is closed" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)


if __name__ == "__main__":
    sys.exit(main())
