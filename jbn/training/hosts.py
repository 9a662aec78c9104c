"""Several processes as one run, on JAX's own runtime."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax._src import distributed

from jbn.training.config import Config, flag
from jbn.training.errors import (
    NonFiniteLossError,
    StorageError,
    UsageError,
    one_line,
)


_SHUTDOWN_SECONDS = 30
# JAX adds a few seconds to the time limit for joining.
_JOIN_SECONDS = 5

# Flags that may differ between the processes of a run.
_OWN = ("process_id", "data_dir", "manual_dir", "num_devices", "accelerator")


def connect(config: Config) -> None:
    """Connects to the other processes, if any. Call it before anything else.

    Args:
        config: The configuration of this process.

    Raises:
        UsageError: If the others are not found, or have different flags.
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
        _check_address(config)
    _translate_errors(config)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=max(1, config.peer_timeout - _JOIN_SECONDS),
            heartbeat_timeout_seconds=config.peer_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except Exception as error:  # JAX raises anything here.
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        how = "--coordinator" if given else "--distributed"
        raise UsageError(
            f"{how}: the other processes were not found ({line}). {_HOW_TO_START}"
        ) from error
    _compare_flags(config)


_HOW_TO_START = (
    "Give all of them the same --coordinator=HOST:PORT, which process 0 must be able "
    "to open, and --num-processes, and each its own --process-id."
)


def _check_address(config: Config) -> None:
    """Tests the port of process 0, because JAX would end the process on failure."""
    host, _, port = str(config.coordinator).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(
            f"--coordinator={config.coordinator} must be HOST:PORT, as 10.0.0.1:1234."
        )
    if config.process_id == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise UsageError(
                f"--coordinator={config.coordinator}: port {port} is in use on this "
                f"machine ({error.strerror}): by another process 0, or another "
                "program. Choose another port."
            ) from error
        return
    end = time.monotonic() + config.peer_timeout
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection(
                (host.strip("[]"), int(port)), max(left, 1)
            ).close()
            return
        except OSError as error:
            if left <= 0:
                raise UsageError(
                    f"--coordinator={config.coordinator}: process 0 was not found "
                    f"there within {config.peer_timeout} s ({error}). {_HOW_TO_START}"
                ) from error
        time.sleep(min(0.2, max(left, 0.01)))


def _translate_errors(config: Config) -> None:
    """Filters the error output of C++ code through `peers.py`."""
    given = config.process_id is not None
    names = (config.process_id, config.num_processes) if given else ("?", "?")
    script = Path(__file__).with_name("peers.py")
    terminal = os.dup(2)
    sys.stderr = os.fdopen(terminal, "w", buffering=1)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", *map(str, (script, *names, config.peer_timeout))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # It must not receive Ctrl-C.
    )
    assert process.stdin is not None
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()


def _compare_flags(config: Config) -> None:
    """Ends all processes if the flags of one differ from those of process 0."""
    state: Any = distributed.global_state
    client = state.client
    flags = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in _OWN
    }
    milliseconds = 1000 * config.peer_timeout
    text = json.dumps(flags, default=str, sort_keys=True)
    client.key_value_set(f"jbn/flags/{state.process_id}", text)
    every = [
        json.loads(client.blocking_key_value_get(f"jbn/flags/{i}", milliseconds))
        for i in range(state.num_processes)
    ]
    for i, other in enumerate(every):
        for name in sorted(other):
            if other[name] != every[0][name]:
                jax.distributed.shutdown()  # Wait until all processes have compared.
                raise UsageError(
                    f"Process {i} was started with {flag(name)}={other[name]}, process "
                    f"0 with {every[0][name]}. Start all processes with the same flags."
                )


def agree(value: bool) -> bool:
    """The `value` of the first process."""
    return from_first(str(int(value))) == "1"


def is_first() -> bool:
    """Whether this process writes and prints."""
    # (`jax.process_index` would initialize the devices.)
    return distributed.global_state.process_id == 0


def from_first(text: str) -> str:
    """The `text` of the first process, at most 4096 bytes."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    data = np.zeros(4096, np.uint8)
    encoded = text.encode()
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(data))
    return bytes(found).rstrip(b"\0").decode()


def end_at_once(run: Callable[[], int]) -> int:
    """Runs a function; on failure, does not wait for processes that are gone.

    With several processes, an exception is printed and ends the process at once;
    otherwise all would wait for each other in JAX for minutes. The others learn of it
    from the coordinator, or from the missing heartbeat.

    Args:
        run: A function that returns the exit status.

    Returns:
        It.
    """
    try:
        status = run()
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        status, text = _explain(error)
        count, i = jax.process_count(), jax.process_index()
        # (Through `peers.py`, which only prints the first error.)
        message = (
            f"error: process {i} of {count} ends: {text} Start all of them, with "
            "--resume and --workdir=FOLDER to go on after the last checkpoint.\n"
        )
        os.write(2, message.encode())
    if status and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(status)
    return status


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit status and the message of an error."""
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, (NonFiniteLossError, StorageError)):
        return 1, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "it was interrupted."
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Usually a collective operation, when some devices are gone.
        return 1, f"another process has ended ({one_line(error)[:200]})."
    traceback.print_exception(error)
    return 1, f"{type(error).__name__}: {error}."


class Preemption:
    """Detects that the run should end: SIGTERM to any process, or Ctrl-C.

    A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._calls = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            # With several processes, JAX handles SIGTERM, and notifies all of them.
            numbers = [signal.SIGINT]
            numbers += [signal.SIGTERM] if jax.process_count() == 1 else []
            for number in numbers:
                self._old[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        # Not Python's own handler, which would clean up first.
        default = signal.SIG_DFL if number == signal.SIGINT else self._old[number]
        signal.signal(number, default)
        if number == signal.SIGINT:
            print("\nsaving; Ctrl-C again ends at once", file=sys.stderr, flush=True)
            if jax.process_count() > 1:
                signal.raise_signal(signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to save and end now. All processes must call it equally often."""
        if jax.process_count() == 1:
            return self.signal is not None
        from jax.experimental import multihost_utils

        # JAX picks the next number that no process has reached, so count by one.
        self._calls += 1
        reached = multihost_utils.reached_preemption_sync_point(self._calls)
        if reached and self.signal is None:
            self.signal = signal.SIGTERM
        return reached
