import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from cloud_coordinator.models.parity import compare, open_session, run
from cloud_coordinator.models.quantise import (
    FOLD_WEIGHTS,
    quantise_per_channel,
    to_int8_weights,
)
from shared.errors import UnfitModelError


def matmul_model(weight: np.ndarray, *, readers: int = 1) -> onnx.ModelProto:
    """Return x @ w, summed over `readers` nodes that share w."""
    nodes = [helper.make_node("MatMul", ["x", "w"], [f"y{i}"]) for i in range(readers)]
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(readers)], ["y"]))
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@given(seed=st.integers(0, 2**32 - 1), axis=st.integers(0, 3), magnitude=st.floats(1e-6, 1e6))
def test_each_weight_is_off_by_at_most_half_a_step_of_its_channel(
    seed: int, axis: int, magnitude: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(3, 4, 2, 5)) * magnitude).astype(np.float32)
    integers, steps = quantise_per_channel(weight, axis)
    shape = [1] * 4
    shape[axis] = -1
    off = np.abs(integers * steps.reshape(shape) - weight)
    assert steps.shape == (weight.shape[axis],)
    assert np.abs(integers.astype(int)).max() == 127
    assert (off <= steps.reshape(shape) * (0.5 + 1e-3)).all()


def test_a_channel_of_zeros_stays_zero() -> None:
    integers, steps = quantise_per_channel(np.zeros((2, 3), np.float32), 0)
    assert not integers.any()
    assert np.isfinite(steps).all()


def test_int8_weights_are_a_quarter_and_compute_nearly_the_same() -> None:
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(256, 64)).astype(np.float32)
    model = matmul_model(weight)
    small = to_int8_weights(model)
    onnx.checker.check_model(small, full_check=True)
    inputs = rng.normal(size=(9, 256)).astype(np.float32)
    outputs = run(open_session(small.SerializeToString(), FOLD_WEIGHTS), inputs)
    assert compare(outputs, inputs @ weight, classes=False).relative_error < 0.01
    assert small.ByteSize() < model.ByteSize() / 3.5


def test_the_original_model_stays_what_it_was() -> None:
    model = matmul_model(np.ones((64, 64), np.float32))
    before = model.SerializeToString(deterministic=True)
    to_int8_weights(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_weight_with_two_readers_is_stored_once() -> None:
    weight = np.random.default_rng(2).normal(size=(64, 64)).astype(np.float32)
    small = to_int8_weights(matmul_model(weight, readers=2))
    unpacking = [node for node in small.graph.node if node.op_type == "DequantizeLinear"]
    assert len(unpacking) == 1
    onnx.checker.check_model(small, full_check=True)


def test_a_model_too_small_to_gain_is_left_alone() -> None:
    with pytest.raises(UnfitModelError, match="no weights that int8 would make smaller"):
        to_int8_weights(matmul_model(np.ones((3, 2), np.float32)))
