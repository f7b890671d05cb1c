"""One model tried in a process that may die: ``python -m edge_agent.inference.self_test SLOT``.

A model that crashes, hangs or eats memory must do it here and not in the server that answers
requests. Prints one JSON line (`SelfTestAnswer`) and ends with status 0, whatever the verdict; no
line means that the process did not survive, and `trial` in the parent says how.
"""

import argparse
import sys
import time
from pathlib import Path

import msgspec

from edge_agent.inference.engine import has_accelerator
from edge_agent.inference.figures import limit_memory, median_ms, peak_memory_bytes
from edge_agent.inference.messages import SelfTestAnswer, SelfTestRefusal, SelfTestResult
from edge_agent.inference.model import golden_inputs, load_model
from shared.child import die_with_parent
from shared.errors import UnfitModelError, UntrustedModelError


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
        limit_memory(arguments.memory_bytes)
    answer = self_test(arguments.slot)
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")


def self_test(slot: Path) -> SelfTestAnswer:
    """Load the model as the server would, check it, and measure it."""
    started = time.perf_counter()
    try:
        model = load_model(slot)
        load_ms = (time.perf_counter() - started) * 1000
        one_row = {name: batch[:1] for name, batch in golden_inputs(model.manifest).items()}
        p50_ms = median_ms(model.engine, one_row)
    except (UnfitModelError, UntrustedModelError) as error:
        return SelfTestRefusal(str(error))
    return SelfTestResult(
        version=model.version,
        artifact=model.manifest.shipped.sha256,
        provider=model.engine.provider,
        load_ms=load_ms,
        p50_ms=p50_ms,
        largest_difference=model.largest_difference,
        peak_memory_bytes=peak_memory_bytes(),
    )


if __name__ == "__main__":
    main()
