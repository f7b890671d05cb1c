"""What a throwaway process measures of itself, and how it is kept from taking the whole machine."""

import os
import resource
import statistics
import time
from pathlib import Path

from edge_agent.inference.engine import Array, Engine

_WARM_UP_RUNS = 5
_TIMED_RUNS = 50
_TIMED_S = 2.0  # a slow model is timed over fewer runs


def median_ms(engine: Engine, feeds: dict[str, Array]) -> float:
    """Return the median time of one run, in milliseconds."""
    for _ in range(_WARM_UP_RUNS):
        engine.run(feeds)
    times: list[float] = []
    while len(times) < _TIMED_RUNS and sum(times) < _TIMED_S:
        started = time.perf_counter()
        engine.run(feeds)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def peak_memory_bytes() -> int:
    """Return this program's largest resident memory.

    Not ``getrusage``, which also counts the parent's size at the fork.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def limit_memory(allowance_bytes: int) -> None:
    """Let this process grow by so much; what it has mapped by now is not counted.

    Not for accelerators: their drivers reserve far more address space than there is memory.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + allowance_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
