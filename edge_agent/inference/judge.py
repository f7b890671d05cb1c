"""Files of a version run on the owner's rows in a process that may die: ``python -m …judge``.

What it is asked comes on standard input: one line of JSON (`Order`), the files, then rows drawn
from the task's contract and the owner's rows, both as ``.npy``. It says on standard output what it
is about to do before it does it, so that a parent whose child died knows which file it was. What
a file costs this machine is measured on the drawn rows, before the owner's are read at all.
"""

import io
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.inference.engine import EngineOptions, has_accelerator, open_session
from edge_agent.inference.figures import limit_memory, resident_bytes, times_ms
from edge_agent.inference.onnx_file import require_self_contained
from shared.child import die_with_parent
from shared.errors import UnfitModelError
from shared.judging import Candidate, CandidateFacts

_BATCH = 32  # rows
_TURNS = 40  # enough calls for a percentile
_LONGEST_CAUSE = 300


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, and how many bytes of the input belong to what."""

    candidates: tuple[Candidate, ...]
    sizes: tuple[int, ...]  # bytes of each one's file
    drawn_bytes: int
    rows_bytes: int
    memory_bytes: int  # address space that the models may take on top of what is mapped


class Trying(msgspec.Struct, frozen=True, tag="trying"):
    """This file is loaded, and computes drawn rows, from now on."""

    name: str


class Tried(msgspec.Struct, frozen=True, tag="tried"):
    """What all files that were given cost this machine."""

    facts: tuple[CandidateFacts, ...]


class Computing(msgspec.Struct, frozen=True, tag="computing"):
    """This file computes the owner's rows from now on."""

    name: str


class Computed(msgspec.Struct, frozen=True, tag="computed"):
    """So many bytes follow: an ``.npy`` file of its outputs; none where it failed on the rows."""

    name: str
    nbytes: int


Said = Trying | Tried | Computing | Computed


def main() -> None:
    """Serve one order."""
    die_with_parent()
    read = sys.stdin.buffer.read
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    files = [read(size) for size in order.sizes]
    drawn = _array(read(order.drawn_bytes))
    if not has_accelerator():
        limit_memory(order.memory_bytes)
    runs = _try_all(order.candidates, files, drawn)
    rows = _array(read(order.rows_bytes))
    for name, session in runs.items():
        _say(Computing(name))
        content = _outputs(session, rows)
        _say(Computed(name, len(content)))
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


def _try_all(
    candidates: Sequence[Candidate], files: Sequence[bytes], drawn: NDArray[np.float32]
) -> Mapping[str, Any]:
    """Load and time the files in turns, tell what they cost, and return those that run."""
    sessions: dict[str, Any] = {}
    facts: dict[str, CandidateFacts] = {}
    for candidate, content in zip(candidates, files, strict=True):
        _say(Trying(candidate.name))
        before, started = resident_bytes(), time.perf_counter()
        try:
            session = _open(content, candidate)
            took_ms = (time.perf_counter() - started) * 1000
            _run(session, drawn)
        except UnfitModelError as error:
            cause = str(error)[:_LONGEST_CAUSE]
            facts[candidate.name] = CandidateFacts(name=candidate.name, failure=cause)
            continue
        sessions[candidate.name] = session
        grew = max(0, resident_bytes() - before)
        facts[candidate.name] = CandidateFacts(
            name=candidate.name, load_ms=took_ms, memory_bytes=grew
        )
    times = times_ms({n: partial(_run, s, drawn[:1]) for n, s in sessions.items()}, turns=_TURNS)
    for name, each in times.items():
        p50, p95 = np.percentile(each, (50, 95))
        facts[name] = msgspec.structs.replace(facts[name], p50_ms=float(p50), p95_ms=float(p95))
    _say(Tried(tuple(facts.values())))
    return sessions


def _open(content: bytes, candidate: Candidate) -> Any:
    require_self_contained(content)
    session = open_session(content, candidate.session_config, EngineOptions())
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise UnfitModelError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs, not one of each"
        )
    return session


def _run(session: Any, batch: NDArray[np.float32]) -> NDArray[Any]:
    """Compute one batch; raise UnfitModelError whatever ONNX Runtime says of it."""
    try:
        outputs: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: batch})[0]
    except Exception as error:  # ONNX Runtime's have no common base
        raise UnfitModelError(
            f"the model failed: {next(iter(str(error).splitlines()), '')}"
        ) from error
    return outputs


def _outputs(session: Any, rows: NDArray[np.float32]) -> bytes:
    """Return the outputs as an ``.npy`` file; nothing where the model failed on the rows."""
    try:
        parts = [_run(session, rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
    except UnfitModelError:
        return b""
    if not parts:
        return b""
    content = io.BytesIO()
    np.save(content, np.concatenate(parts).astype(np.float32))
    return content.getvalue()


def _array(content: bytes) -> NDArray[np.float32]:
    loaded = np.load(io.BytesIO(content), allow_pickle=False)
    array: NDArray[np.float32] = np.ascontiguousarray(loaded, np.float32)
    return array


def _say(word: Said) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(word) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
