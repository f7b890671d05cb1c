"""The trainer's end of measuring a model that came with a message, in a process that may die."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.inference.measure import Loaded, Order
from edge_agent.inference.trial import BASE_ALLOWANCE_BYTES, CHILD_ENV, COPIES, describe_exit
from shared.errors import PeerError, StoppedError, UnavailableError, UnfitModelError
from shared.statistics.probes import Probe

TIME_LIMIT_S = 300.0
_POLL_S = 0.5
_MEASURE = (sys.executable, "-m", "edge_agent.inference.measure")


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
    out, status = _run(asked, time_limit_s=time_limit_s, should_stop=should_stop)
    return _found(out, status, shape=(len(rows), len(probe.columns)))


def _run(
    asked: bytes, *, time_limit_s: float, should_stop: Callable[[], bool]
) -> tuple[bytes, int | None]:
    """Return what the process wrote and how it ended; it is gone in any case."""
    try:
        process = subprocess.Popen(
            _MEASURE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **CHILD_ENV},
            start_new_session=True,
        )
    except OSError as error:
        raise UnavailableError(f"cannot start measuring: {error}; free some memory") from error
    deadline = time.monotonic() + time_limit_s
    given: bytes | None = asked
    try:
        while time.monotonic() < deadline:
            if should_stop():
                raise StoppedError("measuring was stopped")
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, _ = process.communicate(given, timeout=_POLL_S)
                return out, process.returncode
            given = None  # it is taken from the first call
    finally:
        _end(process)
    raise UnfitModelError(f"the model computed for more than {time_limit_s:g} seconds")


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left in it goes nowhere
                pipe.close()


def _found(out: bytes, status: int | None, *, shape: tuple[int, int]) -> NDArray[np.float32]:
    first, _, rest = out.partition(b"\n")
    try:
        loaded = msgspec.json.decode(first, type=Loaded)
    except msgspec.DecodeError:
        raise PeerError(
            f"the model did not survive being loaded here: the process {describe_exit(status)}"
        ) from None
    if loaded.refusal:
        raise PeerError(loaded.refusal)
    try:
        found: NDArray[np.float32] = np.load(io.BytesIO(rest), allow_pickle=False)
    except (ValueError, EOFError):
        raise UnfitModelError(f"the model failed: the process {describe_exit(status)}") from None
    if found.shape != shape or found.dtype != np.float32:
        raise UnfitModelError(f"the model gave {found.dtype}{list(found.shape)}")
    return found
