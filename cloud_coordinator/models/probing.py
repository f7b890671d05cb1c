"""The two ends of a calibration: the file that devices are asked about, and what they answered."""

import hashlib
import logging
from collections.abc import Sequence

import numpy as np
import onnx

from cloud_coordinator.models.calibration import (
    RangePlan,
    Ranges,
    Tensors,
    float_tensors,
    plan_ranges,
    ranges_from,
    steps_for,
    with_outputs,
)
from cloud_coordinator.models.parity import open_session
from cloud_coordinator.models.pipeline_messages import Calibration
from shared.errors import UnfitModelError
from shared.statistics.probes import Probe
from shared.tasks.task import Task

logger = logging.getLogger(__name__)

_ROWS = 32  # drawn to find where a range lies


def make_probe(model: onnx.ModelProto, task: Task, seed: int) -> tuple[Probe, bytes]:
    """Return what to ask devices, and the file that it is about.

    Raises:
        UnfitModelError: its ranges cannot be measured.
    """
    columns = _plan(model, task, seed).columns
    tensors = tuple(dict.fromkeys(column.tensor for column in columns))
    content: bytes = with_outputs(model, tensors).SerializeToString(deterministic=True)
    digest = hashlib.sha256(content).hexdigest()
    return Probe(model_sha256=digest, columns=columns), content


def ranges_by_step(
    model: onnx.ModelProto, task: Task, seed: int, calibration: Calibration
) -> dict[str, Ranges]:
    """Return the range of every float tensor, by the name of the step that reads them.

    Raises:
        UnfitModelError: another model was asked about, or noise hides the answers.
    """
    plan = _plan(model, task, seed)
    asked = {column.feature for column in calibration.probe.columns}
    if unasked := [column.feature for column in plan.columns if column.feature not in asked]:
        raise UnfitModelError(
            f"the devices were not asked about {unasked[0]!r}: the model is exported otherwise now"
        )
    answers = calibration.answers
    return {step.name: ranges_from(answers, plan, step) for step in steps_for(answers)}


def _plan(model: onnx.ModelProto, task: Task, seed: int) -> RangePlan:
    try:
        return plan_ranges(model, _drawn(model, task, seed), task.contract)
    except UnfitModelError:
        raise
    except Exception as error:  # onnx and ONNX Runtime raise whatever they stumble over
        logger.exception("the ranges cannot be found")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnfitModelError(f"its ranges cannot be found: {reason}") from error


def _drawn(model: onnx.ModelProto, task: Task, seed: int) -> Tensors:
    """Return every float tensor, shape (b, …), on inputs drawn from the contract."""
    inputs = np.asarray(task.example_inputs(np.random.default_rng(seed), _ROWS), np.float32)
    names: Sequence[str] = float_tensors(model)
    session = open_session(with_outputs(model, names).SerializeToString(), {})
    values = session.run(None, {model.graph.input[0].name: np.ascontiguousarray(inputs)})
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
