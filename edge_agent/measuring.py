"""The trainer's end of measuring a model that came with a message, in a process that may die."""

import io
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.inference.measure import Loaded, Order
from edge_agent.inference.trial import BASE_ALLOWANCE_BYTES, COPIES
from edge_agent.throwaway import TIME_LIMIT_S, Ended, run_apart
from shared.errors import PeerError, UnfitModelError
from shared.statistics.probes import Probe

_MEASURE = "edge_agent.inference.measure"


def measure_extremes(
    model: bytes,
    probe: Probe,
    rows: NDArray[Any],
    *,
    time_limit_s: float = TIME_LIMIT_S,
    should_stop: Callable[[], bool] = lambda: False,
) -> NDArray[np.float32]:
    """Return each row's extremes of the tensors that ``probe`` asks about.

    Args:
        model: the ONNX file that it is about.
        probe: what is asked.
        rows: shape (n, …), the model's inputs.
        time_limit_s: wall clock; the process is killed after it.
        should_stop: asked twice a second.

    Returns:
        Shape (n, columns).

    Raises:
        PeerError: the model does not load; says nothing about the rows.
        UnfitModelError: the model did not survive the rows, in some way.
        StoppedError: ``should_stop`` said so.
        UnavailableError: the process could not be started.
    """
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(rows))
    order = Order(
        probe=probe,
        model_bytes=len(model),
        rows_bytes=content.tell(),
        memory_bytes=BASE_ALLOWANCE_BYTES + COPIES * len(model),
    )
    asked = b"".join([msgspec.json.encode(order), b"\n", model, content.getvalue()])
    ended = run_apart(_MEASURE, asked, time_limit_s=time_limit_s, should_stop=should_stop)
    return _found(ended, shape=(len(rows), len(probe.columns)))


def _found(ended: Ended, *, shape: tuple[int, int]) -> NDArray[np.float32]:
    first, _, rest = ended.out.partition(b"\n")
    try:
        loaded = msgspec.json.decode(first, type=Loaded)
    except msgspec.DecodeError:
        raise PeerError(
            f"the model did not survive being loaded here: the process {ended.how}"
        ) from None
    if loaded.refusal:
        raise PeerError(loaded.refusal)
    try:
        found: NDArray[np.float32] = np.load(io.BytesIO(rest), allow_pickle=False)
    except (ValueError, EOFError):
        raise UnfitModelError(f"the model failed: the process {ended.how}") from None
    if found.shape != shape or found.dtype != np.float32:
        raise UnfitModelError(f"the model gave {found.dtype}{list(found.shape)}")
    return found
