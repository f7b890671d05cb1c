"""Models tried in a process that may die: ``python -m edge_agent.inference.self_test SLOT …``.

A model that crashes, hangs or eats memory must do it here and not in the server that answers
requests. Prints one JSON line (`SelfTestAnswer`) for each slot and ends with status 0, whatever the
verdicts; lines that are missing mean that the process did not survive, and `trial` in the parent
says how. Several models are timed in turns, so that a busy machine is busy for each of them alike.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from edge_agent.inference.engine import has_accelerator
from edge_agent.inference.figures import limit_memory, medians_ms, peak_memory_bytes
from edge_agent.inference.messages import SelfTestAnswer, SelfTestRefusal, SelfTestResult
from edge_agent.inference.model import Model, golden_inputs, load_model
from shared.child import die_with_parent
from shared.errors import UnfitModelError, UntrustedModelError


def main() -> None:
    """Test the model in each slot and print an answer for each."""
    die_with_parent()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("slots", type=Path, nargs="+")
    parser.add_argument(
        "--memory-bytes", type=int, help="address space the models may take on top of the runtime's"
    )
    arguments = parser.parse_args()
    if arguments.memory_bytes is not None and not has_accelerator():
        limit_memory(arguments.memory_bytes)
    for answer in self_test(arguments.slots):
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")


def self_test(slots: Sequence[Path]) -> list[SelfTestAnswer]:
    """Load each model as the server would, check it, and measure all of them in turns."""
    loaded = [_load(slot) for slot in slots]
    models = {n: answer for n, answer in enumerate(loaded) if isinstance(answer, _Loaded)}
    medians = _time(models)
    answers: list[SelfTestAnswer] = []
    for number, answer in enumerate(loaded):
        if isinstance(answer, SelfTestRefusal):
            answers.append(answer)
        elif isinstance(median := medians[number], SelfTestRefusal):
            answers.append(median)
        else:
            answers.append(_result(answer, median))
    return answers


@dataclass(frozen=True, slots=True)
class _Loaded:
    model: Model
    load_ms: float


def _load(slot: Path) -> _Loaded | SelfTestRefusal:
    started = time.perf_counter()
    try:
        model = load_model(slot)
    except (UnfitModelError, UntrustedModelError) as error:
        return SelfTestRefusal(str(error))
    return _Loaded(model, (time.perf_counter() - started) * 1000)


def _time(models: Mapping[int, _Loaded]) -> dict[int, float | SelfTestRefusal]:
    """Return the median time of one row, in ms; one that fails on it is refused."""
    runs: dict[int, Callable[[], object]] = {}
    failed: dict[int, float | SelfTestRefusal] = {}
    for number, loaded in models.items():
        engine = loaded.model.engine
        batch = golden_inputs(loaded.model.manifest)
        run = partial(engine.run, {name: rows[:1] for name, rows in batch.items()})
        try:
            run()
        except UnfitModelError as error:
            failed[number] = SelfTestRefusal(str(error))
        else:
            runs[number] = run
    return {**medians_ms(runs), **failed}


def _result(loaded: _Loaded, median_ms: float) -> SelfTestResult:
    model = loaded.model
    return SelfTestResult(
        version=model.version,
        artifact=model.artifact.sha256,
        provider=model.engine.provider,
        load_ms=loaded.load_ms,
        p50_ms=median_ms,
        largest_difference=model.largest_difference,
        peak_memory_bytes=peak_memory_bytes(),
    )


if __name__ == "__main__":
    main()
