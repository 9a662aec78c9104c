"""The program `jbn`: `python -m jbn --help`."""

import atexit
import gc
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
    if args is None:  # This process is for the command alone.
        collect_rarely()
    return cli.main(args, prog=prog, default=default)


def collect_rarely() -> None:
    """Has Python look for cyclic garbage less often, and not at exit.

    Imports and traces make many objects, nearly all of which stay. Looking through them
    again and again takes a seventh of the time of a short run.
    """
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)


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
