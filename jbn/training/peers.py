"""Replaces messages of JAX's runtime about other processes by one line each.

When another process is gone, the runtime ends this one from C++ with a stack trace. Its
error output goes through this script, which runs in a separate process:
`python peers.py ID COUNT SECONDS`. It does not import this package.
"""

import re
import sys
from collections.abc import Iterable, Iterator


# A log line of C++; following lines belong to it, up to the next such line.
_LOG = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ ([\w.]+):\d+\] ")
_ABOUT_PEERS = re.compile(r"coordination_service|preemption_sync|client\.h|Terminating")
_REASONS = (
    (
        r"(?:/task:)?(\d+) unexpectedly tried to connect with a different incarnation",
        "process {0} was started twice, or again",
    ),
    (
        r"stopped sending heartbeats\):?\s+(?:/job:\S*?/task:)?(\d+)",
        "process {0} has ended, or gave no sign of life for {seconds} s",
    ),
    (r"RegisterTask", "not all processes have started within {seconds} s"),
    (r"Barrier timed out", "not all processes have started within {seconds} s"),
    (
        r"Socket closed|Connection reset|Connection refused|failed to connect",
        "process 0 has ended",
    ),
    (r"another task died|Polled an error", "another process has ended"),
)
_ERROR = "error: "


def explain(text: str, seconds: str) -> str | None:
    """Finds why the runtime ends this process.

    Args:
        text: The output of the runtime.
        seconds: The time limit.

    Returns:
        The reason, or `None` if the text has none.
    """
    for pattern, reason in _REASONS:
        found = re.search(pattern, text)
        if found is not None:
            return reason.format(*found.groups(), seconds=seconds)
    return None


def replaced(lines: Iterable[str], who: str, seconds: str) -> Iterator[str]:
    """Removes the lines of the runtime about other processes.

    Args:
        lines: The error output of this process and its libraries.
        who: Names this process.
        seconds: The time limit.

    Yields:
        The other lines; and, if the runtime ended this process, one with the reason.
    """
    dropped, dropping, said = "", False, False
    for line in lines:
        log = _LOG.match(line)
        if log is not None:
            dropping = _ABOUT_PEERS.search(line) is not None
        if dropping or line.startswith(("terminate called", "  what():")):
            dropped += line
            dropping = True
        elif not line.startswith(_ERROR):
            yield line
        elif not said:  # The process has detected it by itself.
            yield line
            said = True
    # The first error names the process; later ones follow from it.
    reason = explain(dropped, seconds)
    ended = any(word in dropped for word in ("Terminating process", "terminate called"))
    if ended and not said and reason is not None:
        yield (
            f"{_ERROR}{who} ends: {reason}. Start all of them, with --resume and "
            "--workdir=FOLDER to go on after the last checkpoint.\n"
        )


if __name__ == "__main__":
    _, number, count, limit = sys.argv
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    for text in replaced(sys.stdin, f"process {number} of {count}", limit):
        print(text, end="", file=sys.stderr, flush=True)
