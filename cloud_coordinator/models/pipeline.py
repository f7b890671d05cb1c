"""The model pipeline: a child process that turns parameters into measured, shippable files.

Run as ``python -m cloud_coordinator.models.pipeline``; it loads torch and onnx, so that the
coordinator need not, and gives the memory back when it ends.
"""

import hashlib
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession

from cloud_coordinator.models.export import TrainedModel, without_traces
from cloud_coordinator.models.parity import (
    Outputs,
    choose,
    compare,
    median_latencies_us,
    objection,
    open_session,
    run,
    spread,
)
from cloud_coordinator.models.pipeline_messages import (
    BuildFailed,
    BuildProgress,
    BuildVersion,
    Built,
    VariantReport,
)
from cloud_coordinator.models.quantise import VARIANTS, Variant
from cloud_coordinator.models.trial import try_out, write_array
from shared.child import ParentLink, die_with_parent
from shared.errors import ShoalError, UnfitModelError, UntrustedModelError
from shared.files import write_atomic
from shared.manifest import GoldenBatch
from shared.parameters import load_parameters
from shared.tasks.registry import load_task
from shared.tasks.task import Task

logger = logging.getLogger(__name__)

_PARITY_ROWS = 256
_PARITY_BYTES = 64 * 1024 * 1024  # of inputs; large images are compared on fewer rows
_GOLDEN_ROWS = 16
_GOLDEN_BYTES = 32 * 1024  # of inputs; the signed manifest is some 1.8 times as large
_LARGEST_GOLDEN_ROW_BYTES = 2 * 1024 * 1024  # one row fits below MAX_MANIFEST_BYTES

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Batch:
    """What all variants are compared on."""

    inputs: Path  # .npy file of shape (b, …), drawn from the contract
    truth: Outputs  # (b, …), by torch
    classes: bool  # the columns of the truth compete


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A variant's report so far and, if it runs, its session."""

    report: VariantReport
    session: InferenceSession | None = None


def build(order: BuildVersion, *, say: Say, clock: Callable[[], float]) -> Built | BuildFailed:
    """Export, compress, measure and choose.

    Args:
        order: what to build.
        say: told what happens now, for people.
        clock: monotonic seconds, for latencies.

    Raises:
        ShoalError: nothing could be built; UnfitModelError and UntrustedModelError blame the
            parameters or the task, every other class something that may be mended.
    """
    task = load_task(order.task)
    trained = TrainedModel(task, load_parameters(Path(order.parameters_path)))
    say("exporting to ONNX")
    model = trained.to_onnx(np.random.default_rng(order.seed))
    inputs = _draw(task, order.seed, max(8, min(_PARITY_ROWS, _PARITY_BYTES // _row_bytes(task))))
    folder = Path(order.folder)
    batch = _Batch(folder / "inputs.npy", trained.outputs(inputs), classes=bool(task.labels))
    write_array(batch.inputs, inputs)
    candidates = {}
    for variant in VARIANTS:
        say(f"building and checking {variant.name}")
        candidates[variant.name] = _examine(variant, model, folder, batch)
    say("measuring latencies")
    reports = _time(list(candidates.values()), inputs[:1], clock)
    try:
        ship = choose(reports)
        golden = _draw_golden(trained, order.seed + 1)
    except UnfitModelError as error:
        return BuildFailed(cause=str(error), rejected=True, variants=reports)
    reports = tuple(_with_tolerance(candidates[r.variant], r, golden) for r in reports)
    shipped = next(report for report in reports if report.variant == ship)
    assert shipped.tolerance is not None  # what passed has run
    return Built(
        variants=reports,
        ship=ship,
        inputs=(task.input,),
        outputs=(task.output,),
        labels=task.labels,
        golden=golden.batch(shipped.tolerance),
    )


def _examine(
    variant: Variant,
    model: onnx.ModelProto,
    folder: Path,
    batch: _Batch,
) -> _Candidate:
    """Build one variant, write its file and compare it with torch."""
    report = VariantReport(variant=variant.name, passed=False)
    path = folder / f"{variant.name}.onnx"
    try:
        content = _convert(variant, model)
        write_atomic(path, content)
        report = msgspec.structs.replace(
            report,
            size_bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            session_config=dict(variant.session_config),
        )
        outputs = try_out(path, variant.session_config, batch.inputs)
        parity = compare(outputs, batch.truth, classes=batch.classes)
    except UnfitModelError as error:
        return _Candidate(msgspec.structs.replace(report, cause=str(error)))
    cause = objection(parity, max_relative_error=variant.max_relative_error)
    report = msgspec.structs.replace(
        report, passed=not cause, cause=cause, file="" if cause else path.name, **asdict(parity)
    )
    return _Candidate(report, open_session(content, variant.session_config))


def _convert(variant: Variant, model: onnx.ModelProto) -> bytes:
    """Return the variant's file; raise UnfitModelError whatever the converter stumbled over."""
    try:
        converted = without_traces(variant.convert(model))
        onnx.checker.check_model(converted, full_check=True)
    except UnfitModelError:
        raise
    except Exception as error:  # a converter's bug costs its own variant only
        logger.exception("%s cannot be built", variant.name)
        raise UnfitModelError(f"the converter failed: {error}") from error
    content: bytes = converted.SerializeToString(deterministic=True)
    return content


def _time(
    candidates: Sequence[_Candidate], row: Outputs, clock: Callable[[], float]
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


@dataclass(frozen=True, slots=True)
class _Golden:
    """The batch of the self-test; its outputs are torch's."""

    inputs: Outputs
    truth: Outputs

    def tolerance(self, session: InferenceSession) -> float:
        """Return what one variant is allowed: twice what it is off here.

        A thousandth of the outputs' spread comes on top, for processors that sum in another order.
        """
        off = compare(run(session, self.inputs), self.truth, classes=False).max_difference
        return 2 * off + 1e-3 * spread(self.truth)

    def batch(self, tolerance: float) -> GoldenBatch:
        """Return it as a manifest holds it."""
        return GoldenBatch(
            inputs=self.inputs.astype("<f4").tobytes(),
            outputs=self.truth.astype("<f4").tobytes(),
            rows=len(self.inputs),
            tolerance=tolerance,
        )


def _draw_golden(trained: TrainedModel, seed: int) -> _Golden:
    """Draw the batch; raise UnfitModelError where a signed manifest cannot hold even one row."""
    task = trained.task
    if _row_bytes(task) > _LARGEST_GOLDEN_ROW_BYTES:
        raise UnfitModelError(
            f"one input takes {_row_bytes(task)} bytes, more than the "
            f"{_LARGEST_GOLDEN_ROW_BYTES} that a signed self-test can hold; use smaller inputs"
        )
    inputs = _draw(task, seed, max(1, min(_GOLDEN_ROWS, _GOLDEN_BYTES // _row_bytes(task))))
    return _Golden(inputs, trained.outputs(inputs))


def _with_tolerance(candidate: _Candidate, report: VariantReport, golden: _Golden) -> VariantReport:
    if candidate.session is None or not report.passed:
        return report
    return msgspec.structs.replace(report, tolerance=golden.tolerance(candidate.session))


def _draw(task: Task, seed: int, rows: int) -> Outputs:
    drawn = task.example_inputs(np.random.default_rng(seed), rows)
    return np.ascontiguousarray(drawn, dtype=np.float32)


def _row_bytes(task: Task) -> int:
    return 4 * math.prod(task.input.shape[1:])


def main() -> int:
    """Serve one order of the parent and return the exit status."""
    die_with_parent()
    link: ParentLink[BuildVersion] = ParentLink(BuildVersion)
    order = link.incoming.get()
    if order is None:
        return 1
    try:
        result = build(
            order, say=lambda doing: link.send(BuildProgress(doing)), clock=time.perf_counter
        )
    except (UnfitModelError, UntrustedModelError) as error:
        result = BuildFailed(cause=str(error), rejected=True)
    except ShoalError as error:
        result = BuildFailed(cause=str(error), rejected=False)
    link.send(result)
    return 0 if isinstance(result, Built) else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(main())
