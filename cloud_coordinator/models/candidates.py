"""One variant after the other: converted, run in a process that may crash, compared and timed."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import onnx
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession

from cloud_coordinator.models.calibration import Ranges
from cloud_coordinator.models.export import without_traces
from cloud_coordinator.models.parity import (
    Outputs,
    Parity,
    compare,
    median_latencies_us,
    objection,
    open_session,
)
from cloud_coordinator.models.pipeline_messages import VariantReport
from cloud_coordinator.models.quantise import Variant
from cloud_coordinator.models.static_int8 import Fit, Kind, Trial, first_fit
from cloud_coordinator.models.trial import try_out
from shared.errors import UnfitModelError
from shared.files import write_atomic

logger = logging.getLogger(__name__)

_STATIC_LIMIT = 0.05  # relative error; 0.02 to 0.03 measured on CNNs


@dataclass(frozen=True, slots=True)
class Batch:
    """What all variants are compared on, and where their files go."""

    folder: Path
    inputs: Path  # .npy file of shape (b, …), drawn from the contract
    truth: Outputs  # (b, …), by torch
    classes: bool  # the columns of the truth compete


@dataclass(frozen=True, slots=True)
class Candidate:
    """A variant's report so far and, if it runs, its session."""

    report: VariantReport
    session: InferenceSession | None = None


def examine(variant: Variant, model: onnx.ModelProto, batch: Batch) -> Candidate:
    """Build one variant, write its file and compare it with torch."""
    report = VariantReport(variant=variant.name, passed=False)
    path = batch.folder / f"{variant.name}.onnx"
    try:
        content = _convert(variant, model)
        report = msgspec.structs.replace(
            report,
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            session_config=dict(variant.session_config),
        )
        parity = _parity(content, variant.session_config, path, batch)
    except UnfitModelError as error:
        return Candidate(msgspec.structs.replace(report, cause=str(error)))
    cause = objection(parity, max_relative_error=variant.max_relative_error)
    report = msgspec.structs.replace(
        report, passed=not cause, cause=cause, file="" if cause else path.name, **asdict(parity)
    )
    return Candidate(report, open_session(content, variant.session_config))


def examine_static(
    kind: Kind, model: onnx.ModelProto, ranges_by_step: Mapping[str, Ranges], batch: Batch
) -> Candidate:
    """Find ranges with which this kind of static int8 computes what torch does, and examine it."""

    def judge(attempt: onnx.ModelProto) -> Trial:
        try:
            path = batch.folder / f"{kind.name}.onnx"
            parity = _parity(_serialised(attempt), {}, path, batch)
        except UnfitModelError as error:
            return Trial(str(error), float("inf"))
        cause = objection(parity, max_relative_error=_STATIC_LIMIT)
        return Trial(cause, parity.relative_error)

    def convert(float_model: onnx.ModelProto) -> onnx.ModelProto:
        fits.append(first_fit(float_model, ranges_by_step, kind, judge))
        return fits[-1].model

    fits: list[Fit] = []
    made = examine(Variant(kind.name, convert, _STATIC_LIMIT), model, batch)
    step = fits[-1].step if fits else ""
    return replace(made, report=msgspec.structs.replace(made.report, step=step, needs=kind.needs))


def time_all(
    candidates: Sequence[Candidate], row: Outputs, clock: Callable[[], float]
) -> tuple[VariantReport, ...]:
    """Return the reports, with the latency of each candidate that runs."""
    calls = {
        c.report.variant: partial(c.session.run, None, {c.session.get_inputs()[0].name: row})
        for c in candidates
        if c.session is not None
    }
    latencies = median_latencies_us(calls, clock=clock)
    return tuple(
        msgspec.structs.replace(c.report, latency_p50_us=latencies.get(c.report.variant))
        for c in candidates
    )


def _convert(variant: Variant, model: onnx.ModelProto) -> bytes:
    """Return the variant's file; raise UnfitModelError whatever the converter stumbled over."""
    try:
        return _serialised(variant.convert(model))
    except UnfitModelError:
        raise
    except Exception as error:  # a converter's bug costs its own variant only
        logger.exception("%s cannot be built", variant.name)
        raise UnfitModelError(f"the converter failed: {error}") from error


def _serialised(model: onnx.ModelProto) -> bytes:
    clean = without_traces(model)
    onnx.checker.check_model(clean, full_check=True)
    content: bytes = clean.SerializeToString(deterministic=True)
    return content


def _parity(content: bytes, session_config: Mapping[str, str], path: Path, batch: Batch) -> Parity:
    """Write the file, run it in a process of its own, and compare what comes out."""
    write_atomic(path, content)
    outputs = try_out(path, session_config, batch.inputs)
    return compare(outputs, batch.truth, classes=batch.classes)
