"""Small networks as ONNX graphs, and what they compute inside."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from cloud_coordinator.models.calibration import Ranges, float_tensors, with_outputs
from cloud_coordinator.models.parity import open_session

Floats = NDArray[np.float32]


def graph(
    nodes: list[Any], weights: dict[str, Floats], *, shape: tuple[int, ...], output: str
) -> onnx.ModelProto:
    """Return a model from x (b, …) to ``output``."""
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", *shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return onnx.shape_inference.infer_shapes(model)


def convolutional() -> onnx.ModelProto:
    """Return Mul, Conv, Relu, MaxPool, a residual Conv and Gemm: (b, 1, 8, 8) to (b, 3)."""
    rng = np.random.default_rng(0)
    weights = {
        "scale": np.array(1 / 255, np.float32),
        "w1": rng.normal(0, 0.5, (4, 1, 3, 3)).astype(np.float32),
        "w2": rng.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32),
        "w3": rng.normal(0, 0.3, (3, 64)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"], name="scale"),
        helper.make_node("Conv", ["scaled", "w1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node(
            "MaxPool", ["r1"], ["p1"], name="pool", kernel_shape=[2, 2], strides=[2, 2]
        ),
        helper.make_node("Conv", ["p1", "w2"], ["c2"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "p1"], ["sum"], name="residual"),
        helper.make_node("Flatten", ["sum"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "w3"], ["y"], name="head", transB=1),
    ]
    return graph(nodes, weights, shape=(1, 8, 8), output="y")


def pictures(rows: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).uniform(0, 255, (rows, 1, 8, 8)).astype(np.float32)


def inner(model: onnx.ModelProto, inputs: Floats) -> dict[str, NDArray[Any]]:
    """Return every float tensor of the model, by name."""
    names = float_tensors(model)
    session = open_session(with_outputs(model, names).SerializeToString(), {})
    values = session.run(None, {model.graph.input[0].name: inputs})
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


def seen_ranges(model: onnx.ModelProto, inputs: Floats) -> Ranges:
    found = inner(model, inputs)
    return {name: (float(v.min()), float(v.max())) for name, v in found.items()}
