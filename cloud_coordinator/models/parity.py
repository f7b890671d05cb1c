"""Whether a variant computes what was trained, how fast it is, and which one devices get.

The measure of a difference is the outputs' spread: their standard deviation over rows and columns
of the batch. A class decision is made by differences between columns and a regression says
something only as far as its rows differ, so an error is small or large against that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession

from cloud_coordinator.models.pipeline_messages import FP32, VariantReport
from shared.errors import UnfitModelError

MIN_AGREEMENT = 0.98  # of the rows that torch decides with a margin
MARGIN = 0.1  # between the best two classes, in spreads; closer rows are coin tosses
MAX_SLOWDOWN = 1.5  # of the shipped variant against the fastest
_TURNS, _BURST = 25, 8
_TIMING_S = 10.0  # a model so slow that this is over gets fewer turns
_CHUNKS = (1, 2, 7)  # a batch size that was baked into the graph shows here
_CHUNK_ROWS = 32
_ORT_ERRORS = (  # they have no common base below Exception
    ort.EPFail,
    ort.Fail,
    ort.InvalidArgument,
    ort.InvalidGraph,
    ort.InvalidProtobuf,
    ort.NotImplemented,
    ort.RuntimeException,
)

Outputs = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a variant is from torch on one batch."""

    max_difference: float  # in units of the output
    relative_error: float  # root mean square error over the spread
    agreement: float | None  # share of clearly decided rows with the same class; None: regression


def spread(outputs: Outputs) -> float:
    """Return the standard deviation of ``outputs``, shape (b, …); never zero.

    Where outputs hardly differ from a large constant, float32 itself allows no finer scale than a
    thousandth of that constant.
    """
    return max(float(outputs.std()), 1e-3 * float(np.abs(outputs).max()), 1e-12)


def compare(outputs: Outputs, truth: Outputs, *, classes: bool) -> Parity:
    """Compare a variant's ``outputs`` with torch's ``truth``, both of shape (b, …)."""
    difference = outputs.astype(np.float64) - truth
    return Parity(
        max_difference=float(np.abs(difference).max()),
        relative_error=float(np.sqrt(np.mean(difference**2))) / spread(truth),
        agreement=_agreement(outputs, truth) if classes else None,
    )


def objection(parity: Parity, *, max_relative_error: float) -> str:
    """Return why a variant must not be served, in one sentence; empty when it may be."""
    if not np.isfinite(parity.max_difference):
        return "its outputs hold NaN or infinity"
    if parity.relative_error > max_relative_error:
        return (
            f"its outputs are off by {parity.relative_error:.2%} of their spread, "
            f"more than {max_relative_error:.2%}"
        )
    if parity.agreement is not None and parity.agreement < MIN_AGREEMENT:
        return (
            f"it names the same class for {parity.agreement:.1%} of the clearly decided rows, "
            f"fewer than {MIN_AGREEMENT:.0%}"
        )
    return ""


def choose(reports: Sequence[VariantReport]) -> str:
    """Return the variant to ship: the smallest that passed and is not much slower than the fastest.

    Variants that not every processor computes right or fast are not for all devices.

    Raises:
        UnfitModelError: fp32 did not pass, so the export itself is wrong and nothing may be served.
    """
    passed = {
        r.variant: r for r in reports if r.passed and r.latency_p50_us is not None and not r.needs
    }
    if FP32 not in passed:
        cause = next((r.cause for r in reports if r.variant == FP32), "it was not built")
        raise UnfitModelError(f"the exported model does not compute what was trained: {cause}")
    fastest = min(_latency(report) for report in passed.values())
    quick = [r for r in passed.values() if _latency(r) <= MAX_SLOWDOWN * fastest]
    return min(quick, key=lambda r: (r.size_bytes, _latency(r))).variant


def open_session(content: bytes, session_config: Mapping[str, str]) -> InferenceSession:
    """Load a model as a device would: on the CPU, one thread that does not spin.

    Raises:
        UnfitModelError: ONNX Runtime cannot run it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in session_config.items():
        options.add_session_config_entry(name, value)
    try:
        return InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except _ORT_ERRORS as error:
        raise UnfitModelError(f"ONNX Runtime cannot load it: {_first_line(error)}") from error


def run(session: InferenceSession, inputs: Outputs) -> Outputs:
    """Compute ``inputs``, shape (b, …), in batches of several sizes.

    Raises:
        UnfitModelError: ONNX Runtime refuses the inputs, or fails on them.
    """
    name = session.get_inputs()[0].name
    try:
        parts = [np.asarray(session.run(None, {name: chunk})[0]) for chunk in _chunks(inputs)]
    except _ORT_ERRORS as error:
        raise UnfitModelError(f"ONNX Runtime cannot run it: {_first_line(error)}") from error
    result: Outputs = np.concatenate(parts)
    return result


def median_latencies_us(
    calls: Mapping[str, Callable[[], object]], *, clock: Callable[[], float]
) -> dict[str, float]:
    """Time all ``calls`` in turns, so that a busy machine is busy for each of them alike.

    A turn is a burst: the first call after another model's finds the caches full of that.

    Args:
        calls: what to time, by name.
        clock: monotonic seconds.

    Returns:
        The median time of one call, in microseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop_at = clock() + _TIMING_S
    for turn in range(_TURNS):
        if turn > 0 and clock() > stop_at:
            break
        for name, call in calls.items():
            for _ in range(_BURST):
                began = clock()
                call()
                times[name].append(clock() - began)
    return {name: float(np.median(values)) * 1e6 for name, values in times.items()}


def _agreement(outputs: Outputs, truth: Outputs) -> float:
    ranked = np.sort(truth, axis=1)
    decided = ranked[:, -1] - ranked[:, -2] >= MARGIN * spread(truth)
    if not decided.any():
        return 1.0
    same = outputs.argmax(axis=1) == truth.argmax(axis=1)
    return float(same[decided].mean())


def _latency(report: VariantReport) -> float:
    assert report.latency_p50_us is not None
    return report.latency_p50_us


def _chunks(inputs: Outputs) -> Iterator[Outputs]:
    start = 0
    sizes = iter(_CHUNKS)
    while start < len(inputs):
        stop = start + next(sizes, _CHUNK_ROWS)
        yield inputs[start:stop]
        start = stop


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
