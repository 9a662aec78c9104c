"""Several processes as one run, on JAX's own runtime."""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np

from jbn.training.config import Config
from jbn.training.errors import UsageError


_SHUTDOWN_SECONDS = 30
# The others may still be starting.
_START_SECONDS = 60


def connect(config: Config) -> None:
    """Joins the other processes, if there are any. To be called before all else.

    Args:
        config: With the flags on processes.

    Raises:
        UsageError: If the others are not found.
    """
    given = config.coordinator is not None
    if not given and not config.distributed:
        return
    arguments: dict[str, Any] = {}
    if given:
        arguments = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
        }
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=max(config.peer_timeout, _START_SECONDS),
            heartbeat_timeout_seconds=config.peer_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except Exception as error:  # JAX raises anything here.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        how = "--coordinator" if given else "--distributed"
        raise UsageError(
            f"{how}: the other processes were not found ({line}). Give all of them the "
            "same --coordinator=HOST:PORT, which process 0 must be able to open, and "
            "--num-processes, and each its own --process-id."
        ) from error


def is_first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def from_first(text: str) -> str:
    """What the first process has for `text`, at most 4096 bytes."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.zeros(4096, np.uint8)
    encoded = text.encode()
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return bytes(found).rstrip(b"\0").decode()


def end_at_once(run: Callable[[], int]) -> int:
    """Runs something that, if it fails, must not wait for processes that are gone.

    Where there are others, an exception is printed and ends the process at once: JAX
    would wait for the others for minutes, each for the others. They are told by the
    coordinator, or miss this one's sign of life.

    Args:
        run: Returns the exit status.

    Returns:
        It.
    """
    try:
        status = run()
    except BaseException:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        status = 1
    if status and jax.distributed.is_initialized():
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} ends. "
            "Start all of them again with --resume and --workdir=FOLDER to go on after "
            "the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(status)
    return status


class Preemption:
    """Notices that the process is to end soon: SIGTERM, to it or to any other.

    A second SIGTERM ends it as usual.
    """

    def __init__(self) -> None:
        self._asked, self._calls = False, 0
        self._old: Any = None

    def __enter__(self) -> "Preemption":
        here = threading.current_thread() is threading.main_thread()
        # With several processes JAX has a handler of its own, and tells all of them.
        if jax.process_count() == 1 and here:
            self._old = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._old is not None:
            signal.signal(signal.SIGTERM, self._old)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(number, self._old)

    def reached(self) -> bool:
        """Whether to save and end now; the same in all, which must ask as often."""
        if jax.process_count() == 1:
            return self._asked
        from jax.experimental import multihost_utils

        # JAX picks the next number that no process has had yet: they must count by one.
        self._calls += 1
        return multihost_utils.reached_preemption_sync_point(self._calls)
