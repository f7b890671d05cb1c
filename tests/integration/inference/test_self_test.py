import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edge_agent.inference.messages import SelfTestRefusal, SelfTestResult
from edge_agent.inference.trial import run_self_test
from edge_agent.slot_files import MODEL
from shared.errors import UnavailableError, UnfitModelError
from shared.manifest import TensorSpec
from tests.integration.inference.tiny_models import (
    FEATURES,
    Version,
    endless,
    gigantic,
    linear,
    not_finite,
    version_of,
)
from tests.integration.inference.trying import answer_of, tried
from tests.integration.inference.waiting import until


def trials() -> list[int]:
    """Return the self-tests that this process started and that still run."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(encoding="ascii")
    return [
        int(pid)
        for pid in children.split()  # other tests' servers may be among them
        if b"edge_agent.inference.self_test" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def refusal(version: Version, slot: Path) -> str:
    """Return why the model is refused, in this process: quicker than in one of its own."""
    answer = answer_of(version.put_into(slot))
    assert isinstance(answer, SelfTestRefusal)
    return answer.cause


async def test_a_good_model_passes_and_is_measured(tmp_path: Path) -> None:
    result = await tried(linear().put_into(tmp_path / "a"))
    assert result.version == linear().digest
    assert result.artifact == linear().artifact.sha256
    assert result.provider == "CPUExecutionProvider"
    assert 0 < result.p50_ms < 1000
    assert result.largest_difference < 1e-4
    assert 10 < result.peak_memory_bytes / 1024**2 < 150  # and not the size of this process


async def test_a_refused_model_says_why(tmp_path: Path) -> None:
    with pytest.raises(UnfitModelError, match="holds NaN or infinity on the golden batch"):
        await tried(not_finite().put_into(tmp_path / "a"))


async def test_a_model_that_hangs_is_stopped_in_time(tmp_path: Path) -> None:
    slot = endless().put_into(tmp_path / "a")
    with pytest.raises(UnfitModelError, match="did not finish its self-test within 2 seconds"):
        await tried(slot, time_limit_s=2)
    assert not trials()


async def test_a_model_that_eats_memory_fails_alone(tmp_path: Path) -> None:
    with pytest.raises(
        UnfitModelError, match=r"the model (failed|does not load|needs more memory)"
    ):
        await tried(gigantic().put_into(tmp_path / "a"))


async def test_a_model_that_crashes_its_process_is_named_with_the_signal(tmp_path: Path) -> None:
    slot = endless().put_into(tmp_path / "a")
    trial = asyncio.create_task(tried(slot, time_limit_s=30))

    await until(trials)
    os.kill(trials()[0], signal.SIGSEGV)
    with pytest.raises(UnfitModelError, match="the process was killed by SIGSEGV"):
        await trial


async def test_one_of_several_that_ends_the_process_is_the_only_one_refused(
    tmp_path: Path,
) -> None:
    slots = [
        version.put_into(tmp_path / name)
        for name, version in (("a", linear(1)), ("b", endless()), ("c", not_finite()))
    ]
    good, hangs, wrong = await run_self_test(slots, time_limit_s=3)
    assert isinstance(good, SelfTestResult)
    assert good.version == linear(1).digest
    assert "did not finish its self-test" in str(hangs)
    assert "NaN or infinity" in str(wrong)
    assert not trials()


async def test_a_self_test_that_cannot_start_is_no_fault_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-such-python"))
    with pytest.raises(UnavailableError, match="cannot start the self-test"):
        await tried(linear().put_into(tmp_path / "a"))


def test_a_file_that_is_not_the_one_that_was_signed_is_refused(tmp_path: Path) -> None:
    slot = linear().put_into(tmp_path / "a")
    content = bytearray(linear().content)
    content[-1] ^= 1
    (slot / MODEL).write_bytes(content)
    answer = answer_of(slot)
    assert isinstance(answer, SelfTestRefusal)
    assert "has digest" in answer.cause
    (slot / MODEL).unlink()
    answer = answer_of(slot)
    assert isinstance(answer, SelfTestRefusal)
    assert "No such file" in answer.cause


def test_a_signed_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    ones = np.ones((1, FEATURES), np.float32)
    for number, content in enumerate([b"not a model", linear().content[:-20]]):
        version = version_of(content, ones, ones[:, :3])
        assert "the model does not load" in refusal(version, tmp_path / str(number))


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (TensorSpec("x", "FP32", (-1, 5)), r"x: tensor\(float\)\[-1, 4\].*promises.*\[-1, 5\]"),
        (TensorSpec("x", "FP32", (8, 4)), r"promises x: tensor\(float\)\[8, 4\]"),
        (TensorSpec("x", "INT64", (-1, 4)), r"promises x: tensor\(int64\)"),
        (TensorSpec("image", "FP32", (-1, 4)), "promises image"),
        (TensorSpec("x", "BYTES", (-1, 4)), "type 'BYTES' cannot be served"),
    ],
)
def test_a_model_with_another_signature_is_refused(
    tmp_path: Path, spec: TensorSpec, complaint: str
) -> None:
    cause = refusal(linear().changed(inputs=(spec,)), tmp_path / "a")
    assert re.search(complaint, cause), cause


def test_results_off_the_golden_batch_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(8, FEATURES)).astype(np.float32)
    wrong = version_of(linear().content, inputs, inputs @ linear(2).weights)
    assert "more than the tolerance of 0.0001" in refusal(wrong, tmp_path / "a")
    short = version_of(linear().content, inputs[:4], inputs @ linear().weights)
    assert "golden outputs do not have the shape [4, 3]" in refusal(short, tmp_path / "b")
    empty = version_of(linear().content, inputs[:0], inputs[:0, :3])
    assert "golden inputs do not have the shape [0, 4]" in refusal(empty, tmp_path / "c")


def test_a_model_with_two_inputs_is_refused_in_plain_words(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "z"], ["y"])],
        "two",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 3]) for n in ("x", "z")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    ones = np.ones((1, 3), np.float32)
    version = version_of(model.SerializeToString(), ones, ones)
    both = (TensorSpec("x", "FP32", (-1, 3)), TensorSpec("z", "FP32", (-1, 3)))
    cause = refusal(version.changed(inputs=both), tmp_path / "a")
    assert cause.endswith("this agent serves models with one of each")


def test_an_artifact_is_held_to_a_tolerance_of_its_own(tmp_path: Path) -> None:
    content, inputs = linear().content, np.ones((2, FEATURES), np.float32)
    off = (inputs @ linear().weights + np.float32(0.5)).astype(np.float32)
    loose = version_of(content, inputs, off, tolerance=0.6)
    assert not isinstance(answer_of(loose.put_into(tmp_path / "loose")), SelfTestRefusal)
    tight = version_of(content, inputs, off, tolerance=0.4)
    assert "more than the tolerance of 0.4" in refusal(tight, tmp_path / "tight")
