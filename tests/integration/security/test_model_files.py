"""A coordinator that went bad signs models which try to get at what a device holds."""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession

from edge_agent.inference.onnx_file import require_self_contained
from shared.errors import UnfitModelError
from tests.integration.inference.tiny_models import (
    CLASSES,
    FEATURES,
    Version,
    build,
    linear,
    version_of,
)
from tests.integration.inference.trying import answer_of, tried

SECRET = b"-----BEGIN KEY--"
REFUSAL = "takes data from another file"


def stealing(location: str) -> Any:
    """Return a tensor whose values are the first bytes of another file."""
    tensor = TensorProto(name="loot", data_type=TensorProto.UINT8, dims=[len(SECRET)])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(len(SECRET)))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def with_initializer(location: str) -> bytes:
    """Return a model that adds the loot's largest byte to its output."""
    nodes = [
        helper.make_node("Cast", ["loot"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["bytes"], ["byte"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "byte"], ["y"]),
    ]
    weights = numpy_helper.from_array(np.ones((FEATURES, CLASSES), np.float32), "w")
    return build(nodes, [weights, stealing(location)])


def with_constant(location: str) -> bytes:
    """Hide the loot in a node's attribute."""
    weights = numpy_helper.from_array(np.ones((FEATURES, CLASSES), np.float32), "w")
    nodes = [
        helper.make_node("Constant", [], ["loot"], value=stealing(location)),
        helper.make_node("Cast", ["loot"], ["bytes"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["bytes"], ["byte"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "byte"], ["y"]),
    ]
    return build(nodes, [weights])


def with_branch(location: str) -> bytes:
    """Hide the loot in a subgraph."""
    loot = helper.make_node("Constant", [], ["loot"], value=stealing(location))
    cast = helper.make_node("Cast", ["loot"], ["bytes"], to=TensorProto.FLOAT)
    out = helper.make_tensor_value_info("bytes", TensorProto.FLOAT, [len(SECRET)])
    branch = helper.make_graph([loot, cast], "branch", [], [out])
    nodes = [
        helper.make_node("If", ["yes"], ["some"], then_branch=branch, else_branch=branch),
        helper.make_node("ReduceMax", ["some"], ["byte"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Add", ["xw", "byte"], ["y"]),
    ]
    weights = numpy_helper.from_array(np.ones((FEATURES, CLASSES), np.float32), "w")
    return build(nodes, [weights, numpy_helper.from_array(np.array(1, bool), "yes")])


def signed(content: bytes) -> Version:
    inputs = np.ones((2, FEATURES), np.float32)
    return version_of(content, inputs, np.zeros((2, CLASSES), np.float32))


def test_the_runtime_itself_would_read_a_file_beside_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, ONNX Runtime got stricter; our own refusal stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "identity.pem").write_bytes(SECRET)
    session = InferenceSession(with_initializer("identity.pem"))
    (outputs,) = session.run(None, {"x": np.zeros((1, FEATURES), np.float32)})
    assert np.max(np.asarray(outputs)) == max(SECRET)


@pytest.mark.parametrize("hide", [with_initializer, with_constant, with_branch])
@pytest.mark.parametrize(
    "location", ["identity.pem", "/etc/passwd", "../../../../etc/passwd", "*/_ORT_MEM_ADDR_/*"]
)
def test_a_signed_model_that_names_another_file_is_refused(
    hide: Callable[[str], bytes], location: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "identity.pem").write_bytes(SECRET)
    answer = answer_of(signed(hide(location)).put_into(tmp_path / "a"))
    assert REFUSAL in getattr(answer, "cause", "")


async def test_the_throwaway_process_refuses_it_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    (tmp_path / "identity.pem").write_bytes(SECRET)
    slot = signed(with_initializer("identity.pem")).put_into(tmp_path / "a")
    with pytest.raises(UnfitModelError, match=REFUSAL):
        await asyncio.wait_for(tried(slot), 60)


def test_a_model_with_an_operator_of_an_unknown_library_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("RunShell", ["x"], ["y"], domain="evil.example")]
    answer = answer_of(signed(build(nodes, [])).put_into(tmp_path / "a"))
    assert "does not load" in getattr(answer, "cause", "")


def test_a_whole_model_passes() -> None:
    require_self_contained(linear(padding=1000).content)


@given(cut=st.integers(1, 200))
def test_a_cut_file_is_refused_or_merely_shorter(cut: int) -> None:
    """Cutting between two fields leaves a file that ONNX Runtime judges."""
    try:
        require_self_contained(linear().content[:-cut])
    except UnfitModelError:
        return


def test_a_field_number_that_another_parser_would_cut_is_refused() -> None:
    """Its lower 32 bits are those of the graph, which nobody would then look into."""
    graph = (7 << 3 | 2) + 2**32
    tag = bytes([graph & 0x7F | 0x80, 0x80, 0x80, 0x80, graph >> 28])
    with pytest.raises(UnfitModelError, match="no ONNX model"):
        require_self_contained(tag + b"\x00")


@given(content=st.binary(max_size=300))
def test_no_bytes_at_all_make_the_check_fail_otherwise(content: bytes) -> None:
    try:
        require_self_contained(content)
    except UnfitModelError:
        return
