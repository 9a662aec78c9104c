"""Times calls against each other on a noisy machine.

On a CPU: one core, one thread for each library, and processor time, which other
processes do not count in. Every case runs in every round, in an order that turns around
with each, and what is compared are medians over the rounds of ratios within a round.
"""

import gc
import os
import statistics
import sys
import time


# Glibc gives large arrays back to the system when they are freed, and those of other
# threads in any case, so that each new one is paged in again: that is what would be
# measured. It reads these when it starts.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def prepare() -> None:
    """Starts this process anew, with an allocator that keeps memory, on one core.

    On the CPU, whatever else there is.

    To be called before anything else is imported.
    """
    if os.environ.get("JBN_BENCHMARK") == "1":
        return
    os.environ.update(_ALLOCATOR)
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    os.environ["JBN_BENCHMARK"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def interleaved(cases, *, rounds=9, least=0.02, clock=time.process_time, wait=None):
    """Times each case in each round.

    Args:
        cases: Functions by name; each runs what is timed, and returns what came of it.
        rounds: How many.
        least: Seconds that a case should take in a round, in repetitions of it.
        clock: Gives seconds.
        wait: Waits for what a case returned; in the time that is taken.

    Returns:
        Seconds of one call by name, one for each round.
    """
    wait = wait or (lambda value: value)
    counts = {}
    for name, case in cases.items():
        for _ in range(3):
            wait(case())
        start = clock()
        wait(case())
        counts[name] = max(1, round(least / max(clock() - start, 1e-7)))
    times = {name: [] for name in cases}
    for i in range(rounds):
        gc.collect()
        gc.disable()
        for name in list(cases) if i % 2 else list(reversed(cases)):
            start = clock()
            for _ in range(counts[name]):
                value = cases[name]()
            wait(value)
            times[name].append((clock() - start) / counts[name])
            del value
        gc.enable()
    return times


def ratio(times, of, to):
    """The median over the rounds of one case's time over another's."""
    pairs = zip(times[of], times[to], strict=True)
    return statistics.median(a / b for a, b in pairs)
