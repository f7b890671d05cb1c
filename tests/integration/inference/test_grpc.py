"""The Open Inference Protocol over gRPC, spoken to a real server process by Triton's client."""

import asyncio
import importlib.util
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from edge_agent.inference import oip_messages
from edge_agent.inference.supervisor import InferenceServer
from shared.errors import ConfigError, UnavailableError
from tests.integration.inference.conftest import RNG, running
from tests.integration.inference.tiny_models import FEATURES, Floats, linear
from tests.integration.inference.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
VERSION = linear()
triton: Any = tritonclient.grpc  # it has no types
theirs: Any = service_pb2
ROWS = np.arange(2 * FEATURES, dtype=np.float32).reshape(2, FEATURES)
WANTED = ROWS @ VERSION.weights


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InferenceServer]:
    home = tmp_path_factory.mktemp("home")
    async with running(InferenceServer(home, "127.0.0.1", 0, rng=RNG, grpc_port=0)) as server:
        await server.activate(VERSION.put_into(home / "a"))
        yield server


async def ask(serving: InferenceServer, question: Callable[[Any], Any]) -> Any:
    """Ask with Triton's client, which blocks, in a thread of its own."""

    def asking() -> Any:
        with triton.InferenceServerClient(serving.serving.grpc_address) as client:
            return question(client)

    return await asyncio.wait_for(asyncio.to_thread(asking), 30)


def tensor(values: Floats, name: str = "x") -> Any:
    described = triton.InferInput(name, list(values.shape), "FP32")
    described.set_data_from_numpy(values)
    return described


async def test_triton_sees_a_live_and_ready_server_and_model(serving: InferenceServer) -> None:
    assert await ask(serving, lambda c: c.is_server_live())
    assert await ask(serving, lambda c: c.is_server_ready())
    assert await ask(serving, lambda c: c.is_model_ready("tiny"))
    assert await ask(serving, lambda c: c.is_model_ready("tiny", VERSION.digest))
    assert not await ask(serving, lambda c: c.is_model_ready("other"))


async def test_triton_reads_the_metadata(serving: InferenceServer) -> None:
    assert (await ask(serving, lambda c: c.get_server_metadata())).name == "shoal-agent"
    model = await ask(serving, lambda c: c.get_model_metadata("tiny"))
    assert (model.name, list(model.versions)) == ("tiny", [VERSION.digest])
    assert [(t.name, t.datatype, list(t.shape)) for t in model.inputs] == [("x", "FP32", [-1, 4])]
    assert [(t.name, t.datatype, list(t.shape)) for t in model.outputs] == [("y", "FP32", [-1, 3])]
    index = await ask(serving, lambda c: c.get_model_repository_index())
    assert [(row.name, row.version, row.state) for row in index.models] == [
        ("tiny", VERSION.digest, "READY")
    ]


async def test_triton_gets_the_models_answer_and_its_id(serving: InferenceServer) -> None:
    outputs = [triton.InferRequestedOutput("y")]
    answer = await ask(
        serving, lambda c: c.infer("tiny", [tensor(ROWS)], outputs=outputs, request_id="mine")
    )
    np.testing.assert_allclose(answer.as_numpy("y"), WANTED, rtol=1e-5)
    assert answer.get_response().id == "mine"
    assert answer.get_response().model_version == VERSION.digest
    compressed = await ask(
        serving, lambda c: c.infer("tiny", [tensor(ROWS)], compression_algorithm="gzip")
    )
    np.testing.assert_allclose(compressed.as_numpy("y"), WANTED, rtol=1e-5)


async def test_numbers_may_come_in_typed_contents_instead_of_bytes(
    serving: InferenceServer,
) -> None:
    request = theirs.ModelInferRequest(model_name="tiny")
    described = request.inputs.add(name="x", datatype="FP32", shape=[2, 4])
    described.contents.fp32_contents.extend(ROWS.ravel().tolist())
    answer = await ask(serving, lambda c: c._client_stub.ModelInfer(request))
    got = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(2, 3)
    np.testing.assert_allclose(got, WANTED, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "inputs", "status", "complaint"),
    [
        ("other", [tensor(ROWS)], "NOT_FOUND", "other is not served here"),
        ("tiny", [tensor(ROWS[:, :2])], "INVALID_ARGUMENT", r"wants shape \[-1, 4\].*\[2, 2\]"),
        ("tiny", [tensor(ROWS, "z")], "INVALID_ARGUMENT", "no input 'z'; it has x"),
        ("tiny", [], "INVALID_ARGUMENT", "input 'x' is missing"),
        ("tiny", [tensor(ROWS), tensor(ROWS)], "INVALID_ARGUMENT", "given twice"),
    ],
)
async def test_triton_understands_our_refusals(
    serving: InferenceServer, model: str, inputs: list[Any], status: str, complaint: str
) -> None:
    with pytest.raises(InferenceServerException, match=complaint) as refusal:
        await ask(serving, lambda c: c.infer(model, inputs))
    error: Any = refusal.value
    assert error.status() == f"StatusCode.{status}"


@pytest.mark.parametrize(
    ("changes", "raw", "complaint"),
    [
        ({"shape": [10**9]}, bytes(32), "takes 4000000000 bytes, declares 32"),
        ({"shape": [-1, 4]}, bytes(32), "a shape that no array can have"),
        ({"shape": [1] * 17}, bytes(4), "a shape that no array can have"),
        ({"datatype": "BYTES"}, bytes(32), "has type 'BYTES'; known are BOOL"),
        ({"datatype": "BYTES"}, None, "has type 'BYTES'; known are BOOL"),
        ({}, None, r"declares shape \[2, 4\] and holds 0 values"),
    ],
)
async def test_a_tensor_that_contradicts_itself_is_refused(
    serving: InferenceServer, changes: dict[str, Any], raw: bytes | None, complaint: str
) -> None:
    request = theirs.ModelInferRequest(model_name="tiny")
    request.inputs.add(**{"name": "x", "datatype": "FP32", "shape": [2, 4], **changes})
    if raw is not None:
        request.raw_input_contents.append(raw)
    with pytest.raises(Exception, match=complaint):
        await ask(serving, lambda c: c._client_stub.ModelInfer(request))


async def test_loading_and_too_much_at_once_are_refused(serving: InferenceServer) -> None:
    with pytest.raises(InferenceServerException, match="deployed by the coordinator"):
        await ask(serving, lambda c: c.load_model("tiny"))
    with pytest.raises(InferenceServerException, match="deployed by the coordinator"):
        await ask(serving, lambda c: c.unload_model("tiny"))
    much = np.zeros((300_000, FEATURES), np.float32)
    with pytest.raises(InferenceServerException, match="larger than max"):
        await ask(serving, lambda c: c.infer("tiny", [tensor(much)]))


async def test_both_doors_lead_to_the_same_counts_and_labels(serving: InferenceServer) -> None:
    base = f"http://{serving.serving.address}"
    before = serving.serving.requests
    answer = await ask(serving, lambda c: c.infer("tiny", [tensor(ROWS)]))
    number = answer.get_response().parameters["shoal_answer"].int64_param
    labels = WANTED.argmax(axis=1).tolist()
    async with httpx.AsyncClient(base_url=base, timeout=20) as client:
        labelled = {"answers": [{"answer": number, "labels": labels}]}
        receipt = (await client.post("/v1/feedback", json=labelled)).json()
    assert receipt == {"labelled": 2, "correct": 2, "unknown": 0}
    await until(lambda: serving.serving.requests > before)


async def test_grpc_answers_at_the_same_address_after_a_crash(serving: InferenceServer) -> None:
    address, pid = serving.serving.grpc_address, serving.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: serving.serving.version is None)
    await until(lambda: serving.serving.version == VERSION.digest)
    assert serving.serving.grpc_address == address
    answer = await ask(serving, lambda c: c.infer("tiny", [tensor(ROWS)]))
    np.testing.assert_allclose(answer.as_numpy("y"), WANTED, rtol=1e-5)


async def test_a_grpc_port_in_use_and_a_missing_package_are_refused_in_a_sentence(
    serving: InferenceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(str(serving.serving.grpc_address).split(":")[1])
    with pytest.raises(UnavailableError, match=f"port {port} on 127.0.0.1 is in use.*--grpc-port"):
        InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG, grpc_port=port)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'shoal\[grpc\]'"):
        InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG, grpc_port=0)


def fields_of(message: Any) -> dict[str, tuple[int, int, bool]]:
    return {f.name: (f.number, f.type, f.is_repeated) for f in message.DESCRIPTOR.fields}


@pytest.mark.parametrize("name", sorted(oip_messages._MESSAGES))
async def test_our_messages_have_the_names_and_numbers_of_tritons(name: str) -> None:
    nested = {
        "TensorMetadata": theirs.ModelMetadataResponse,
        "InferInputTensor": theirs.ModelInferRequest,
        "InferRequestedOutputTensor": theirs.ModelInferRequest,
        "InferOutputTensor": theirs.ModelInferResponse,
        "ModelIndex": theirs.RepositoryIndexResponse,
    }
    wanted = fields_of(getattr(nested.get(name, theirs), name))
    assert fields_of(oip_messages.message(name)).items() <= wanted.items()
