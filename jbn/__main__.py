"""The program `jbn`: `python -m jbn --help`."""

import logging
import sys
from collections.abc import Sequence
from typing import Any

from jbn.training import cli


def main(
    args: Sequence[str] | None = None,
    *,
    prog: str = "jbn",
    default: str | None = None,
) -> int:
    """Runs the command line; see `jbn.training.cli.main`."""
    quiet_reads()
    return cli.main(args, prog=prog, default=default)


def quiet_reads() -> None:
    """Silences secondary errors when a checkpoint cannot be read.

    Orbax does not await the reads of the other arrays, which fail as well and would
    print errors below our message when they are garbage-collected.
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
