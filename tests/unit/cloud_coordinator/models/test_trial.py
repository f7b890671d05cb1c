import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from cloud_coordinator.models.trial import try_out, write_array
from shared.errors import UnavailableError, UnfitModelError


def doubling_model() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(doubling_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    write_array(tmp_path / "inputs.npy", np.arange(45, dtype=np.float32).reshape(15, 3))
    return tmp_path / "inputs.npy"


def python_that_does(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trials run ``script`` in place of Python."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))


def test_a_model_is_computed_in_another_process_and_leaves_no_file(
    model: Path, inputs: Path
) -> None:
    np.testing.assert_array_equal(try_out(model, {}, inputs), 2 * np.load(inputs))
    assert sorted(path.name for path in model.parent.iterdir()) == ["inputs.npy", "model.onnx"]


def test_a_model_that_onnx_runtime_refuses_is_unfit(model: Path, inputs: Path) -> None:
    model.write_bytes(b"broken")
    with pytest.raises(UnfitModelError, match="ONNX Runtime cannot load it"):
        try_out(model, {}, inputs)


def test_inputs_of_another_shape_are_refused_by_the_model(model: Path, inputs: Path) -> None:
    write_array(inputs, np.zeros((2, 5), np.float32))
    with pytest.raises(UnfitModelError, match="ONNX Runtime cannot run it"):
        try_out(model, {}, inputs)


def test_a_crash_of_the_runtime_costs_the_model_only(
    model: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_that_does("kill -SEGV $$", tmp_path, monkeypatch)
    with pytest.raises(UnfitModelError, match=r"crashed on it \(SIGSEGV\)"):
        try_out(model, {}, inputs)


def test_a_model_that_computes_for_ever_is_ended(
    model: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_that_does("exec sleep 600", tmp_path, monkeypatch)
    with pytest.raises(UnfitModelError, match="computed for more than"):
        try_out(model, {}, inputs, deadline=timedelta(seconds=0.2))


def test_a_full_disk_is_not_the_models_fault(
    model: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_that_does("echo no space left on the disk; exit 4", tmp_path, monkeypatch)
    with pytest.raises(UnavailableError, match="no space left"):
        try_out(model, {}, inputs)
