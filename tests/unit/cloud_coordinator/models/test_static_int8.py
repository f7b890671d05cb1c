"""Static int8 from given ranges, and what happens where it is not good enough."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime.quantization.quantize import quantize_static

from cloud_coordinator.models import static_int8
from cloud_coordinator.models.export import without_traces
from cloud_coordinator.models.parity import Outputs, compare, open_session, run
from cloud_coordinator.models.static_int8 import (
    KINDS,
    Kind,
    Trial,
    first_fit,
    heavy_nodes,
    most_sensitive,
    to_static_int8,
)
from edge_agent.inference.engine import Engine
from shared.errors import UnfitModelError
from shared.manifest import TensorSpec
from tests.unit.cloud_coordinator.models.graphs import (
    convolutional,
    graph,
    pictures,
    seen_ranges,
)

MODEL = convolutional()
INPUTS = pictures(64)
RANGES = seen_ranges(MODEL, INPUTS)
VNNI = KINDS[0]


def outputs_of(model: onnx.ModelProto, inputs: Outputs = INPUTS) -> Outputs:
    return run(open_session(model.SerializeToString(), {}), inputs)


TRUTH = outputs_of(MODEL)


def error_of(model: onnx.ModelProto) -> float:
    return compare(outputs_of(model), TRUTH, classes=False).relative_error


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_each_kind_computes_nearly_what_float32_does(kind: Kind) -> None:
    made = to_static_int8(MODEL, RANGES, kind)
    assert 1e-4 < error_of(made) < 0.05
    types = {node.op_type for node in made.graph.node}
    assert ("QLinearConv" in types) is not kind.qdq
    assert ("Conv" in types) is kind.qdq


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_bytes_are_the_same_each_time_and_the_agent_serves_them(kind: Kind) -> None:
    contents = [
        without_traces(to_static_int8(MODEL, RANGES, kind)).SerializeToString(deterministic=True)
        for _ in range(2)
    ]
    assert contents[0] == contents[1]
    onnx.checker.check_model(onnx.load_from_string(contents[0]), full_check=True)
    for leak in (b"torch", b".py", b"onnx.quantize", b"stack_trace", b"/tmp"):
        assert leak not in contents[0]
    engine = Engine(
        contents[0],
        inputs=[TensorSpec("x", "FP32", (-1, 1, 8, 8))],
        outputs=[TensorSpec("y", "FP32", (-1, 3))],
        session_config={},
    )
    for rows in (1, 2, 7):
        assert engine.run({"x": INPUTS[:rows]})[0].shape == (rows, 3)


def test_weights_of_the_reduced_kind_have_seven_bits() -> None:
    def largest(kind: Kind) -> int:
        made = to_static_int8(MODEL, RANGES, kind)
        weights = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in made.graph.initializer
            if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
        ]
        return max(int(np.abs(weight.astype(int)).max()) for weight in weights)

    by_name = {kind.name: kind for kind in KINDS}
    assert largest(by_name["int8-vnni"]) == 127
    assert largest(by_name["int8-x86"]) <= 64


def test_a_given_range_is_the_range_that_is_used() -> None:
    made = to_static_int8(MODEL, {**RANGES, "x": (0.0, 510.0)}, VNNI)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    first = next(node for node in made.graph.node if node.op_type == "QuantizeLinear")
    assert tensors[first.input[1]] == pytest.approx(2.0)  # 510 in 255 steps
    assert tensors[first.input[2]] == 0


def test_excluded_nodes_stay_in_float() -> None:
    made = to_static_int8(MODEL, RANGES, VNNI, exclude=["conv2"])
    assert [node.name for node in made.graph.node if node.op_type == "Conv"] == ["conv2"]


def test_a_range_that_is_missing_is_named() -> None:
    lacking = {name: value for name, value in RANGES.items() if name != "sum"}
    with pytest.raises(UnfitModelError, match="tensor 'sum' has no range"):
        to_static_int8(MODEL, lacking, VNNI)


def test_a_model_with_nothing_to_gain_names_its_operators() -> None:
    model = graph([helper.make_node("Sin", ["x"], ["y"])], {}, shape=(4,), output="y")
    with pytest.raises(UnfitModelError, match=r"no operator gains from static int8: .* Sin only"):
        to_static_int8(model, {"x": (0.0, 1.0), "y": (0.0, 1.0)}, VNNI)


def trial(model: onnx.ModelProto, limit: float) -> Trial:
    error = error_of(model)
    return Trial("" if error <= limit else f"off by {error:.3f}", error)


NARROW = {name: (low / 50, high / 50) for name, (low, high) in RANGES.items()}


def test_the_first_ranges_that_are_good_enough_are_taken() -> None:
    tried: list[float] = []

    def judged(model: onnx.ModelProto) -> Trial:
        found = trial(model, 0.05)
        tried.append(found.relative_error)
        return found

    steps = {"narrow": NARROW, "seen": RANGES, "never": NARROW}
    assert first_fit(MODEL, steps, VNNI, judged).step == "seen"
    assert len(tried) == 2


def test_nodes_stay_in_float_until_it_is_good_enough() -> None:
    errors = sorted(
        error_of(to_static_int8(MODEL, RANGES, VNNI, exclude=[name])) for name in heavy_nodes(MODEL)
    )
    limit = errors[0] * 1.001  # what leaving out the most sensitive node gives
    assert error_of(to_static_int8(MODEL, RANGES, VNNI)) > limit
    fit = first_fit(MODEL, {"seen": RANGES}, VNNI, lambda model: trial(model, limit))
    assert fit.step == "seen, 1 node in float"


def test_the_most_sensitive_node_comes_first_and_never_all_of_them() -> None:
    names = most_sensitive(MODEL, RANGES, VNNI, lambda model: trial(model, 0))
    errors = [error_of(to_static_int8(MODEL, RANGES, VNNI, exclude=[name])) for name in names]
    assert errors == sorted(errors)
    assert len(names) == len(heavy_nodes(MODEL)) - 1


def test_what_never_gets_good_enough_says_how_far_it_was_off() -> None:
    with pytest.raises(UnfitModelError, match=r"also with 2 nodes in float: off by 0\.\d+"):
        first_fit(MODEL, {"seen": RANGES}, VNNI, lambda model: trial(model, 1e-9))
    with pytest.raises(UnfitModelError, match="not good enough: it crashed"):
        first_fit(MODEL, {"seen": RANGES}, VNNI, lambda _: Trial("it crashed", float("inf")))


def test_an_operator_that_stays_in_float_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any, **options: Any) -> None:
        quantize_static(*args, **{**options, "nodes_to_exclude": ["conv2"]})

    monkeypatch.setattr(static_int8, "quantize_static", forgetful)
    for kind in KINDS:
        with pytest.raises(UnfitModelError, match=r"operator Conv \(node 'conv2'\) cannot be"):
            to_static_int8(MODEL, RANGES, kind)


def test_what_the_quantiser_stumbles_over_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stumble(*_: Any, **__: Any) -> None:
        raise KeyError("y_scale")

    monkeypatch.setattr(static_int8, "quantize_static", stumble)
    with pytest.raises(UnfitModelError, match="cannot quantise this graph: KeyError: 'y_scale'"):
        to_static_int8(MODEL, RANGES, VNNI)
