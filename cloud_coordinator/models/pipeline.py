"""The model pipeline: a child process that turns parameters into measured, shippable files.

Run as ``python -m cloud_coordinator.models.pipeline``; it loads torch and onnx, so that the
coordinator need not, and gives the memory back when it ends.
"""

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession

from cloud_coordinator.models.candidates import (
    Batch,
    Candidate,
    examine,
    examine_static,
    time_all,
)
from cloud_coordinator.models.export import TrainedModel
from cloud_coordinator.models.parity import Outputs, choose, compare, run, spread
from cloud_coordinator.models.pipeline_messages import (
    BuildFailed,
    BuildProgress,
    BuildVersion,
    Built,
    MakeProbe,
    ProbeMade,
    Result,
    ToPipeline,
    VariantReport,
)
from cloud_coordinator.models.probing import make_probe, ranges_by_step
from cloud_coordinator.models.quantise import variants_for
from cloud_coordinator.models.static_int8 import KINDS, Kind
from cloud_coordinator.models.trial import write_array
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

_PROBE = "probe.onnx"

Say = Callable[[str], None]


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
    trained = _trained(order)
    task = trained.task
    say("exporting to ONNX")
    model = trained.to_onnx(np.random.default_rng(order.seed))
    inputs = _draw(task, order.seed, max(8, min(_PARITY_ROWS, _PARITY_BYTES // _row_bytes(task))))
    folder = Path(order.folder)
    batch = Batch(folder, folder / "inputs.npy", trained.outputs(inputs), classes=bool(task.labels))
    write_array(batch.inputs, inputs)
    candidates = []
    for variant in variants_for(model):
        say(f"building and checking {variant.name}")
        candidates.append(examine(variant, model, batch))
    candidates += _static(model, task, batch, order, say)
    say("measuring latencies")
    reports = time_all(candidates, inputs[:1], clock)
    try:
        ship = choose(reports)
        golden = _draw_golden(trained, order.seed + 1)
    except UnfitModelError as error:
        return BuildFailed(cause=str(error), rejected=True, variants=reports)
    reports = tuple(
        _with_tolerance(candidate, report, golden)
        for candidate, report in zip(candidates, reports, strict=True)
    )
    shipped = next(report for report in reports if report.variant == ship)
    assert shipped.tolerance is not None  # what passed has run
    return Built(
        variants=reports,
        ship=ship,
        inputs=(task.input,),
        outputs=(task.output,),
        labels=task.labels,
        golden=golden.batch(shipped.tolerance),
        student=order.student,
    )


def probe(order: MakeProbe, *, say: Say) -> ProbeMade:
    """Export, and say which ranges inside the model devices have to measure; raises as `build`."""
    trained = _trained(order)
    say("exporting to ONNX")
    model = trained.to_onnx(np.random.default_rng(order.seed))
    asked, content = make_probe(model, trained.task, order.seed)
    write_atomic(Path(order.folder) / _PROBE, content)
    return ProbeMade(probe=asked, file=_PROBE)


def _trained(order: ToPipeline) -> TrainedModel:
    task = load_task(order.task)
    if order.student:
        task = task.student(order.student)
    return TrainedModel(task, load_parameters(Path(order.parameters_path)))


def _static(
    model: onnx.ModelProto, task: Task, batch: Batch, order: BuildVersion, say: Say
) -> list[Candidate]:
    """Return the variants in static int8; none where nobody measured ranges."""
    if order.calibration is None:
        return []
    try:
        ranges = ranges_by_step(model, task, order.seed, order.calibration)
    except UnfitModelError as error:
        return [_refused(kind, str(error)) for kind in KINDS]
    made = []
    for kind in KINDS:
        say(f"building and checking {kind.name}")
        made.append(examine_static(kind, model, ranges, batch))
    return made


def _refused(kind: Kind, cause: str) -> Candidate:
    return Candidate(VariantReport(variant=kind.name, passed=False, cause=cause, needs=kind.needs))


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


def _with_tolerance(candidate: Candidate, report: VariantReport, golden: _Golden) -> VariantReport:
    if candidate.session is None or not report.passed:
        return report
    return msgspec.structs.replace(report, tolerance=golden.tolerance(candidate.session))


def _draw(task: Task, seed: int, rows: int) -> Outputs:
    drawn = task.example_inputs(np.random.default_rng(seed), rows)
    return np.ascontiguousarray(drawn, dtype=np.float32)


def _row_bytes(task: Task) -> int:
    return 4 * math.prod(task.input.shape[1:])


def _result(order: ToPipeline, say: Say) -> Result:
    if isinstance(order, MakeProbe):
        return probe(order, say=say)
    return build(order, say=say, clock=time.perf_counter)


def main() -> int:
    """Serve one order of the parent and return the exit status."""
    die_with_parent()
    link: ParentLink[ToPipeline] = ParentLink(ToPipeline)
    order = link.incoming.get()
    if order is None:
        return 1
    try:
        result = _result(order, lambda doing: link.send(BuildProgress(doing)))
    except (UnfitModelError, UntrustedModelError) as error:
        result = BuildFailed(cause=str(error), rejected=True)
    except ShoalError as error:
        result = BuildFailed(cause=str(error), rejected=False)
    link.send(result)
    return 1 if isinstance(result, BuildFailed) else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    sys.exit(main())
