"""What a throwaway process measures of itself, and how it is kept from taking the whole machine."""

import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name", int, str)

_WARM_UP_RUNS = 5
_TURNS, _BURST = 10, 5  # the first run after another model's finds the caches full of that
_TIMED_S = 0.8  # of each model at most; a slow one is timed over fewer runs


def medians_ms(runs: Mapping[Name, Callable[[], object]]) -> dict[Name, float]:
    """Time all ``runs`` in turns; return the median time of one run of each, in milliseconds."""
    return {name: statistics.median(times) for name, times in times_ms(runs).items()}


def times_ms(
    runs: Mapping[Name, Callable[[], object]], *, turns: int = _TURNS
) -> dict[Name, list[float]]:
    """Time all ``runs`` in turns; return how long each of its runs took, in milliseconds."""
    for run in runs.values():
        started = time.perf_counter()
        for _ in range(_WARM_UP_RUNS):
            run()
            if time.perf_counter() - started > _TIMED_S / 2:
                break
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            for _ in range(_BURST):
                if sum(times[name]) > _TIMED_S * 1000:
                    break
                started = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - started) * 1000)
    return times


def peak_memory_bytes() -> int:
    """Return this program's largest resident memory.

    Not ``getrusage``, which also counts the parent's size at the fork.
    """
    return _status_bytes("VmHWM:")


def resident_bytes() -> int:
    """Return how much of this program is in memory now."""
    return _status_bytes("VmRSS:")


def limit_memory(allowance_bytes: int) -> None:
    """Let this process grow by so much; what it has mapped by now is not counted.

    Not for accelerators: their drivers reserve far more address space than there is memory.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + allowance_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _status_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
