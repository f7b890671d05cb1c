"""One model tried in a process that may die: ``python -m edge_agent.inference.self_test SLOT``.

A model that crashes, hangs or eats memory must do it here and not in the server that answers
requests. Prints one JSON line (`SelfTestAnswer`) and ends with status 0, whatever the verdict; no
line means that the process did not survive, and `trial` in the parent says how.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from pathlib import Path

import msgspec

from edge_agent.inference.engine import Array, Engine, has_accelerator
from edge_agent.inference.messages import SelfTestAnswer, SelfTestRefusal, SelfTestResult
from edge_agent.inference.model import golden_inputs, load_model
from shared.child import die_with_parent
from shared.errors import UnfitModelError, UntrustedModelError

_WARM_UP_RUNS = 5
_TIMED_RUNS = 50
_TIMED_S = 2.0  # a slow model is timed over fewer runs


def main() -> None:
    """Test the model in a slot and print the answer."""
    die_with_parent()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("slot", type=Path)
    parser.add_argument(
        "--memory-bytes", type=int, help="address space the model may take on top of the runtime's"
    )
    arguments = parser.parse_args()
    if arguments.memory_bytes is not None and not has_accelerator():
        _limit_memory(arguments.memory_bytes)
    answer = self_test(arguments.slot)
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")


def self_test(slot: Path) -> SelfTestAnswer:
    """Load the model as the server would, check it, and measure it."""
    started = time.perf_counter()
    try:
        model = load_model(slot)
        load_ms = (time.perf_counter() - started) * 1000
        one_row = {name: batch[:1] for name, batch in golden_inputs(model.manifest).items()}
        p50_ms = _median_ms(model.engine, one_row)
    except (UnfitModelError, UntrustedModelError) as error:
        return SelfTestRefusal(str(error))
    return SelfTestResult(
        version=model.version,
        artifact=model.manifest.shipped.sha256,
        provider=model.engine.provider,
        load_ms=load_ms,
        p50_ms=p50_ms,
        largest_difference=model.largest_difference,
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _median_ms(engine: Engine, feeds: dict[str, Array]) -> float:
    """Return the median time of one run, in milliseconds."""
    for _ in range(_WARM_UP_RUNS):
        engine.run(feeds)
    times: list[float] = []
    while len(times) < _TIMED_RUNS and sum(times) < _TIMED_S:
        started = time.perf_counter()
        engine.run(feeds)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1000


def _peak_memory_bytes() -> int:
    """Return this program's largest resident memory.

    Not ``getrusage``, which also counts the parent's size at the fork.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _limit_memory(allowance_bytes: int) -> None:
    """Let this process grow by so much; what the runtime has mapped by now is not counted.

    Not for accelerators: their drivers reserve far more address space than there is memory.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + allowance_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    main()
