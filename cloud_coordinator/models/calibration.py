"""Which tensors of a graph need a range for static int8, and how a fleet's answers become ranges.

Many need none of their own: what only passes values on has the range of what it read, and what
feeds a ReLU is clipped by it anyway. The model's input has the range that the task's contract
promises. The rest is measured on devices (shared/statistics/probes.py).
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from shared.errors import UnfitModelError
from shared.statistics.probes import DEFAULT_REACH, MAX_COLUMNS, MOST_NOISE, ProbeColumn, Side
from shared.statistics.vectors import Answer
from shared.tasks.contract import DataContract

Range = tuple[float, float]
Ranges = Mapping[str, Range]  # by tensor: lowest and highest, in its own unit
Tensors = Mapping[str, NDArray[Any]]

_PASS_ON = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
_CLIPPERS = {"Relu", "Clip"}
_NEVER_NEGATIVE = {"Relu", "Sigmoid", "Softmax"}
_SMALLEST = 2.0**-24  # of a range: below it float32 outputs of order 1 do not change


@dataclass(frozen=True, slots=True)
class RangePlan:
    """Where the range of each float tensor comes from."""

    columns: tuple[ProbeColumn, ...]  # measured on devices
    known: Ranges  # from the contract, or of constants
    same_as: Mapping[str, str]  # the tensor whose range another one takes


@dataclass(frozen=True, slots=True)
class RangeStep:
    """One way to read ranges from answers."""

    name: str
    figure: str  # of an `Answer`
    octaves: float = 0.0  # on top of it


# Largest first: what is clipped is lost, and a range that is too wide loses digits.
EXACT_STEPS = tuple(RangeStep(f"q{at}", f"q{at}") for at in ("0.999", "0.99", "0.9"))
# Where noise hides quantiles a mean remains: rows' extremes lie within an octave of it (measured
# on Fashion-MNIST: accuracy as in float32 from 20 devices at a noise multiplier of 1).
NOISED_STEPS = tuple(RangeStep(f"mean+{o:g}", "mean", o) for o in (1.0, 1.5, 0.5))


def plan_ranges(model: onnx.ModelProto, drawn: Tensors, contract: DataContract) -> RangePlan:
    """Say where the range of each float tensor of ``model`` comes from.

    Args:
        model: exported; its batch is the first axis.
        drawn: every tensor of `float_tensors`, shape (b, …), on b inputs drawn from the contract.
        contract: of the task.

    Raises:
        UnfitModelError: a tensor mixes rows, or too many would have to be measured.
    """
    rows = len(drawn[model.graph.input[0].name])
    varying = _depends_on_input(model)
    known: dict[str, Range] = {}
    same_as: dict[str, str] = {}
    columns: list[ProbeColumn] = []
    makers = {name: node for node in model.graph.node for name in node.output}
    for name in float_tensors(model):
        values = drawn[name]
        if name not in varying:
            known[name] = (float(values.min()), float(values.max()))
        elif name == model.graph.input[0].name and (promised := _promised(contract)):
            known[name] = promised
        elif neighbour := _neighbour(model, makers.get(name), name):
            same_as[name] = neighbour
        elif values.shape[:1] != (rows,):
            raise UnfitModelError(
                f"tensor {name!r} of operator {makers[name].op_type} mixes rows, so no device can "
                "say what range it has; static int8 is not possible"
            )
        else:
            columns += _columns(name, makers.get(name), values)
    if len(columns) > MAX_COLUMNS:
        raise UnfitModelError(
            f"{len(columns)} ranges would have to be measured, more than the {MAX_COLUMNS} that "
            "one question holds; static int8 is not possible"
        )
    return RangePlan(tuple(columns), known, same_as)


def float_tensors(model: onnx.ModelProto) -> list[str]:
    """Return the graph's input and every float tensor that its nodes make, in order."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.value_info, *inferred.output)
    }
    made = [name for node in inferred.node for name in node.output]
    floats = [name for name in made if kinds.get(name) == TensorProto.FLOAT]
    return [inferred.input[0].name, *floats]


def with_outputs(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return the graph with ``tensors`` as its outputs, in that order, and no others."""
    result = copy.deepcopy(model)
    result.graph.ClearField("output")
    given = result.graph.input[0].name
    for name in tensors:
        output = f"{name}.out" if name == given else name  # no output may be an input
        if name == given:
            result.graph.node.append(helper.make_node("Identity", [name], [output]))
        result.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    return result


def steps_for(answers: Sequence[Answer]) -> tuple[RangeStep, ...]:
    """Return the ways to read these answers, the first to be tried first."""
    return EXACT_STEPS if all(a.kind == "quantiles" for a in answers) else NOISED_STEPS


def ranges_from(answers: Sequence[Answer], plan: RangePlan, step: RangeStep) -> dict[str, Range]:
    """Return the range of every float tensor.

    Args:
        answers: one for each of the plan's columns, in any order.
        plan: of the same model.
        step: how to read an answer.

    Raises:
        UnfitModelError: an answer is missing, or noise hides it.
    """
    octaves = {answer.feature: _octaves(answer, step) for answer in answers}
    if missing := [c.feature for c in plan.columns if c.feature not in octaves]:
        raise UnfitModelError(f"no device said what range {missing[0]!r} has")
    ranges = dict(plan.known)
    for column in plan.columns:
        low, high = ranges.get(column.tensor, (0.0, _SMALLEST))
        extreme = 2.0 ** octaves[column.feature]
        ranges[column.tensor] = (-extreme, high) if column.side == "low" else (low, extreme)
    for name, source in plan.same_as.items():
        ranges[name] = ranges[_origin(source, plan.same_as)]
    return ranges


def _octaves(answer: Answer, step: RangeStep) -> float:
    value = answer.values.get(step.figure)
    error = answer.standard_error.get(step.figure, 0.0)
    if value is None or not math.isfinite(value):
        raise UnfitModelError(f"the answer about {answer.feature!r} is lost in noise")
    if error > MOST_NOISE:
        raise UnfitModelError(
            f"noise of ±{error:.1f} octaves hides the range of {answer.feature!r}; ask "
            f"{error / MOST_NOISE:.1f} times as many devices, or allow exact sums"
        )
    return value + step.octaves + error


def _columns(name: str, maker: Any, values: NDArray[Any]) -> Iterator[ProbeColumn]:
    extremes: dict[Side, float] = {"high": float(values.max())}
    if maker is None or maker.op_type not in _NEVER_NEGATIVE:
        extremes["low"] = -float(values.min())
    # The smaller side of a tensor is looked for as far below the larger one as answers reach.
    least = max(_SMALLEST, *(extreme * 2.0**-DEFAULT_REACH for extreme in extremes.values()))
    for side, extreme in extremes.items():
        yield ProbeColumn(name, side, round(math.log2(max(extreme, least)), 3))


def _promised(contract: DataContract) -> Range | None:
    """Return the range of the model's input, where the contract says one."""
    if contract.image is not None:
        return 0.0, 255.0
    low = min((f.minimum for f in contract.features), default=-math.inf)
    high = max((f.maximum for f in contract.features), default=math.inf)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _neighbour(model: onnx.ModelProto, maker: Any, name: str) -> str:
    """Return the tensor whose range ``name`` takes; empty where it needs its own."""
    if maker is None:
        return ""
    if maker.op_type in _PASS_ON:
        return str(maker.input[0])
    readers = [node for node in model.graph.node if name in node.input]
    is_output = any(name == output.name for output in model.graph.output)
    if len(readers) == 1 and not is_output and readers[0].op_type in _CLIPPERS:
        return str(readers[0].output[0])
    return ""


def _origin(name: str, same_as: Mapping[str, str]) -> str:
    while name in same_as:
        name = same_as[name]
    return name


def _depends_on_input(model: onnx.ModelProto) -> set[str]:
    varying = {model.graph.input[0].name}
    for node in model.graph.node:  # in the order of computing
        if varying & set(node.input):
            varying |= set(node.output)
    return varying
