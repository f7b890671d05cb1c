"""A model run on the owner's rows in a process that may die: ``python -m …inference.measure``.

What it is asked comes on standard input: one line of JSON (`Order`), the model, and the rows as an
``.npy`` file. What it finds goes to standard output: a line as soon as the model is loaded, or why
it cannot be (`Loaded`), and an ``.npy`` file of each row's extremes. So nothing of the rows touches
the disk, and a parent that gets no second part knows that the model did not survive them.
"""

import io
import sys
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.inference.engine import EngineOptions, has_accelerator, open_session
from edge_agent.inference.figures import limit_memory
from edge_agent.inference.onnx_file import require_self_contained
from shared.child import die_with_parent
from shared.errors import UnfitModelError
from shared.statistics.probes import Probe, extremes_of

_BATCH = 32  # rows; every inner tensor of a batch is in memory at once


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What to do, and how many bytes of the input belong to what."""

    probe: Probe
    model_bytes: int
    rows_bytes: int
    memory_bytes: int  # address space that the model may take on top of what is mapped


class Loaded(msgspec.Struct, frozen=True):
    """The first line back."""

    refusal: str  # empty: the model is loaded


def main() -> None:
    """Serve one order."""
    die_with_parent()
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    model = sys.stdin.buffer.read(order.model_bytes)
    rows = np.load(io.BytesIO(sys.stdin.buffer.read(order.rows_bytes)), allow_pickle=False)
    if not has_accelerator():
        limit_memory(order.memory_bytes)
    try:
        session = _open(model, order.probe)
    except UnfitModelError as error:
        _say(Loaded(str(error)))
        return
    _say(Loaded(""))
    found = io.BytesIO()
    np.save(found, _measure(session, order.probe, rows))
    sys.stdout.buffer.write(found.getvalue())


def _open(model: bytes, probe: Probe) -> Any:
    require_self_contained(model)
    session = open_session(model, {}, EngineOptions())
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != len(probe.tensors):
        raise UnfitModelError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs for "
            f"{len(probe.tensors)} tensors that are asked about"
        )
    return session


def _measure(session: Any, probe: Probe, rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return each row's extremes, shape (n, columns)."""
    name = session.get_inputs()[0].name
    parts = [np.zeros((0, len(probe.columns)), np.float32)]
    for start in range(0, len(rows), _BATCH):
        batch = np.ascontiguousarray(rows[start : start + _BATCH], np.float32)
        outputs = session.run(None, {name: batch})
        parts.append(extremes_of(probe, dict(zip(probe.tensors, outputs, strict=True))))
    return np.concatenate(parts)


def _say(loaded: Loaded) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(loaded) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
