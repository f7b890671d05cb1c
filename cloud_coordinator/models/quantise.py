"""Smaller variants of an exported model, made from its weights alone.

Static int8 needs ranges that only devices can measure (static_int8.py).
Measured on a 205 k-parameter CNN (ONNX Runtime 1.32, batch 1, one thread, against fp32):

* ``fp16``: half the bytes, same speed; computes in half precision between float32 ends.
* ``int8-weights``: a quarter of the bytes, same speed *if* ONNX Runtime folds the weights back to
  float32 when it loads, which it does under `FOLD_WEIGHTS`; without that setting it unpacks them
  for every request and takes 1.8 times as long.
* ``int8-dynamic``: a quarter of the bytes, 7 times slower on convolutions; so it is built for
  networks without any.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import QuantType
from onnxruntime.quantization.quantize import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from cloud_coordinator.models.pipeline_messages import FP32
from shared.errors import UnfitModelError

FOLD_WEIGHTS: Mapping[str, str] = {"session.disable_quant_qdq": "1"}
_LARGEST_INT8 = 127  # symmetric: -128 is not used
_NODE_BYTES = 120  # about what one DequantizeLinear and its names add to the file


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to make a model smaller."""

    name: str
    convert: Callable[[onnx.ModelProto], onnx.ModelProto]
    max_relative_error: float  # see parity.py
    session_config: Mapping[str, str] = field(default_factory=dict)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store and compute in half precision; inputs and outputs stay float32."""
    # Both have no types; the converter takes over tensors of its input, which must stay as it is.
    half, graph_of = cast("Any", convert_float_to_float16), cast("Any", ONNXModel)
    converted = graph_of(half(copy.deepcopy(model), keep_io_types=True))
    converted.topological_sort()  # its new casts stand at the end
    result: onnx.ModelProto = converted.model
    return result


def to_int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store the weights of Conv, Gemm and MatMul as int8 with one scale per output channel.

    Raises:
        UnfitModelError: no weight is large enough to gain anything.
    """
    result = copy.deepcopy(model)
    graph = result.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    unpacking = []
    for name, axis in _channel_axes(graph).items():
        weight = numpy_helper.to_array(weights[name])
        if not _pays(weight, axis):
            continue
        quantised, scales = quantise_per_channel(weight, axis)
        graph.initializer.remove(weights[name])
        graph.initializer.extend(
            [
                numpy_helper.from_array(quantised, f"{name}.int8"),
                numpy_helper.from_array(scales, f"{name}.scale"),
            ]
        )
        unpacking.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=axis
            )
        )
    if not unpacking:
        raise UnfitModelError("the model has no weights that int8 would make smaller")
    nodes = [*unpacking, *graph.node]  # a graph's nodes stand in the order of computing
    graph.ClearField("node")
    graph.node.extend(nodes)
    return result


def to_int8_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Compute in int8 with ranges taken from each request.

    Raises:
        UnfitModelError: the model has no operator that ONNX Runtime can run so.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        quantize_dynamic(copy.deepcopy(model), path, per_channel=True, weight_type=QuantType.QInt8)
        result = onnx.load(path)
    if not any(node.op_type.endswith("Integer") for node in result.graph.node):
        raise UnfitModelError("the model has no operator that runs on dynamic int8")
    return result


def quantise_per_channel(
    weight: NDArray[np.float32], axis: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round ``weight`` to int8, symmetric around 0, with a scale per index of ``axis``.

    Returns:
        The integers in [-127, 127], shaped as ``weight``, and the scales, shape (channels,).
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    steps = np.where(largest > 0, largest / _LARGEST_INT8, 1).astype(np.float32)
    quantised = np.clip(np.rint(weight / steps), -_LARGEST_INT8, _LARGEST_INT8)
    return quantised.astype(np.int8), steps.ravel()


def _channel_axes(graph: Any) -> dict[str, int]:
    """Return the axis of output channels of each weight that only Conv, Gemm or MatMul reads."""
    floats = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    axes: dict[str, set[int | None]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in floats:
                axes.setdefault(name, set()).add(_channel_axis(node, position, name, graph))
    agreed = {name: found.pop() for name, found in axes.items() if len(found) == 1}
    return {name: axis for name, axis in agreed.items() if axis is not None}


def _channel_axis(node: Any, position: int, name: str, graph: Any) -> int | None:
    if position != 1:
        return None
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        return 0 if transposed else 1
    if node.op_type == "MatMul":
        dimensions = next(len(t.dims) for t in graph.initializer if t.name == name)
        return dimensions - 1 if dimensions >= 2 else None
    return None


def _pays(weight: NDArray[np.float32], axis: int) -> bool:
    return bool(3 * weight.size > 4 * weight.shape[axis] + _NODE_BYTES)


def variants_for(model: onnx.ModelProto) -> tuple[Variant, ...]:
    """Return the variants to build from weights alone; each that does not pass is left out."""
    # Tolerances are relative errors as parity.py defines them. float32 in another order of
    # summation stays below 1e-5 for networks of a few dozen layers. Half precision rounds to 2**-11
    # at each layer and int8 weights to about 1/250 of a channel's largest weight: 0.001 and 0.003
    # measured on CNNs, and an order of magnitude is left for depth. Agreement of decisions is
    # checked besides.
    variants = (
        Variant(FP32, lambda model: model, 1e-4),
        Variant("fp16", to_fp16, 0.02),
        Variant("int8-weights", to_int8_weights, 0.05, FOLD_WEIGHTS),
    )
    if any(node.op_type == "Conv" for node in model.graph.node):
        return variants
    return (*variants, Variant("int8-dynamic", to_int8_dynamic, 0.05))
