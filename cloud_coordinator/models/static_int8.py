"""Static int8: weights and activations in 8 bits, with ranges that are given, not measured here.

ONNX Runtime's quantiser takes given ranges as a calibration cache, so no rows are needed and the
bytes are the same each time. Three kinds are made, since processors multiply 8-bit numbers in
different ways:

* ``int8-vnni``: unsigned activations; right and fast on x86 with VNNI instructions;
* ``int8-x86``: the same with 7-bit weights, as older x86 saturates on sums of two products of 8
  bits; it is right everywhere;
* ``int8-arm``: signed and symmetric, in the portable QDQ form.
"""

import copy
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization.calibrate import (
    CalibrationMethod,
    TensorData,
    TensorsData,
    save_tensors_data,
)
from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
from onnxruntime.quantization.quantize import quantize_static

from cloud_coordinator.models.calibration import Ranges, float_tensors
from shared.errors import UnfitModelError

_HEAVY = ("Conv", "Gemm", "MatMul")  # what gains from 8 bits
_MOST_LEFT_OUT = 8  # nodes that stay in float before a kind is given up
_MOST_COMPARED = 16  # nodes whose sensitivity is measured: the first and the last ones


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to compute in int8."""

    name: str
    qdq: bool = False  # the portable form; otherwise QOperator, which runs as it stands
    symmetric: bool = False  # signed activations around 0
    reduce_range: bool = False  # weights of 7 bits
    needs: tuple[str, ...] = ()  # of the processor, as in `Artifact.needs`


KINDS = (
    Kind("int8-vnni", needs=("vnni",)),
    Kind("int8-x86", reduce_range=True),
    Kind("int8-arm", qdq=True, symmetric=True, needs=("arm64",)),
)


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of one attempt."""

    objection: str  # empty: it may be shipped
    relative_error: float


@dataclass(frozen=True, slots=True)
class Fit:
    """A model in int8 that may be shipped, and how it came about."""

    model: onnx.ModelProto
    step: str


def to_static_int8(
    model: onnx.ModelProto, ranges: Ranges, kind: Kind, *, exclude: Collection[str] = ()
) -> onnx.ModelProto:
    """Compute in int8 with one scale per output channel.

    Args:
        model: in float32.
        ranges: of every float tensor.
        kind: how.
        exclude: names of nodes that stay in float.

    Raises:
        UnfitModelError: an operator cannot be quantised or a range is missing; names it.
    """
    if not (names := heavy_nodes(model)):
        found = ", ".join(sorted({node.op_type for node in model.graph.node}))
        raise UnfitModelError(f"no operator gains from static int8: the model has {found} only")
    if missing := [name for name in float_tensors(model) if name not in ranges]:
        raise UnfitModelError(f"tensor {missing[0]!r} has no range; calibrate it as well")
    try:
        result = _quantised(model, ranges, kind, exclude)
    except Exception as error:  # the quantiser raises whatever it stumbles over
        raise UnfitModelError(
            f"ONNX Runtime cannot quantise this graph: {type(error).__name__}: {error}"
        ) from error
    left = [
        node for node in result.graph.node if node.name not in exclude and _is_float(node, result)
    ]
    if left:
        raise UnfitModelError(
            f"operator {left[0].op_type} (node {left[0].name!r}) cannot be computed in int8"
        )
    if not set(names) - set(exclude):
        raise UnfitModelError("nothing is left to compute in int8")
    return result


def heavy_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the names of the nodes that gain from int8, in order; only those with weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _HEAVY and weights & set(node.input)
    ]


def first_fit(
    model: onnx.ModelProto,
    ranges_by_step: Mapping[str, Ranges],
    kind: Kind,
    judge: Callable[[onnx.ModelProto], Trial],
) -> Fit:
    """Try one reading of the ranges after the other, then leave out the most sensitive nodes.

    Args:
        model: in float32.
        ranges_by_step: by the name of their step, the first to be tried first.
        kind: how.
        judge: compares an attempt with float32.

    Raises:
        UnfitModelError: an operator cannot be quantised, or nothing was good enough; says how far
            the last attempt was off.
    """
    best, best_error, objection = "", float("inf"), "there are no ranges"
    for step, ranges in ranges_by_step.items():
        attempt = to_static_int8(model, ranges, kind)
        trial = judge(attempt)
        if not trial.objection:
            return Fit(attempt, step)
        objection = trial.objection
        if trial.relative_error < best_error:
            best, best_error = step, trial.relative_error
    if not best:
        raise UnfitModelError(f"static int8 is not good enough: {objection}")
    ranges = ranges_by_step[best]
    left_out: list[str] = []
    for name in most_sensitive(model, ranges, kind, judge):
        left_out.append(name)
        attempt = to_static_int8(model, ranges, kind, exclude=left_out)
        trial = judge(attempt)
        if not trial.objection:
            nodes = "1 node" if len(left_out) == 1 else f"{len(left_out)} nodes"
            return Fit(attempt, f"{best}, {nodes} in float")
        objection = trial.objection
    raise UnfitModelError(
        f"static int8 is not good enough, also with {len(left_out)} nodes in float: {objection}"
    )


def most_sensitive(
    model: onnx.ModelProto,
    ranges: Ranges,
    kind: Kind,
    judge: Callable[[onnx.ModelProto], Trial],
) -> list[str]:
    """Return the nodes whose absence from int8 helps, the one that helps most first.

    At most `_MOST_LEFT_OUT` of them, and never all that there are.
    """
    names = heavy_nodes(model)
    errors = {
        name: judge(to_static_int8(model, ranges, kind, exclude=[name])).relative_error
        for name in _ends(names)
        if len(names) > 1
    }
    ranked = sorted(errors, key=lambda name: errors[name])
    return ranked[: min(_MOST_LEFT_OUT, len(names) - 1)]


def _ends(names: Sequence[str]) -> Sequence[str]:
    if len(names) <= _MOST_COMPARED:
        return names
    half = _MOST_COMPARED // 2
    return [*names[:half], *names[-half:]]


def _quantised(
    model: onnx.ModelProto, ranges: Ranges, kind: Kind, exclude: Collection[str]
) -> onnx.ModelProto:
    make: Any = TensorData  # it has no types
    data = TensorsData(
        CalibrationMethod.MinMax,
        {
            name: make(lowest=np.float32(low), highest=np.float32(high))
            for name, (low, high) in ranges.items()
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        cache, out = Path(folder) / "ranges.json", Path(folder) / "int8.onnx"
        save_tensors_data(data, cache)
        quantize_static(
            copy.deepcopy(model),
            out,
            None,
            calibration_cache_path=cache,
            calibrate_method=CalibrationMethod.MinMax,
            quant_format=QuantFormat.QDQ if kind.qdq else QuantFormat.QOperator,
            per_channel=True,
            reduce_range=kind.reduce_range,
            activation_type=QuantType.QInt8 if kind.symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(exclude),
            extra_options={"ActivationSymmetric": kind.symmetric},
        )
        return onnx.load(out)


def _is_float(node: Any, model: onnx.ModelProto) -> bool:
    """Return whether a node still reads its weights as they were; int8 ones have other names."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return node.op_type in _HEAVY and bool(weights & set(node.input))
