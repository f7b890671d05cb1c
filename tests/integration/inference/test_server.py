"""The Open Inference Protocol, spoken to a real server process by foreign clients."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.http
from tritonclient.utils import InferenceServerException

from edge_agent.inference.supervisor import InferenceServer
from tests.integration.inference.conftest import RNG, running
from tests.integration.inference.tiny_models import FEATURES, Floats, linear
from tests.integration.inference.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
VERSION = linear()
triton: Any = tritonclient.http  # it has no types
ROWS = np.arange(2 * FEATURES, dtype=np.float32).reshape(2, FEATURES)
WANTED = ROWS @ VERSION.weights


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[InferenceServer]:
    """Return a server that serves `VERSION`, shared by the tests of this file."""
    home = tmp_path_factory.mktemp("home")
    async with running(InferenceServer(home, "127.0.0.1", 0, rng=RNG)) as server:
        await server.activate(VERSION.put_into(home / "a"))
        yield server


@pytest_asyncio.fixture(loop_scope="module")
async def client(serving: InferenceServer) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{serving.serving.address}"
    async with httpx.AsyncClient(base_url=base, timeout=20) as client:
        yield client


async def ask_triton(serving: InferenceServer, question: Callable[[Any], Any]) -> Any:
    """Ask with Triton's client, which blocks, in a thread of its own."""

    def ask() -> Any:
        with triton.InferenceServerClient(serving.serving.address) as client:
            return question(client)

    return await asyncio.wait_for(asyncio.to_thread(ask), 30)


def tensor(values: Floats, *, binary: bool = True) -> Any:
    described = triton.InferInput("x", list(values.shape), "FP32")
    described.set_data_from_numpy(values, binary_data=binary)
    return described


def as_json(values: Floats, **changes: Any) -> dict[str, Any]:
    tensor = {"name": "x", "shape": values.shape, "datatype": "FP32", "data": values.tolist()}
    return {"inputs": [{**tensor, **changes}]}


async def test_triton_sees_a_live_and_ready_server_and_model(serving: InferenceServer) -> None:
    assert await ask_triton(serving, lambda c: c.is_server_live())
    assert await ask_triton(serving, lambda c: c.is_server_ready())
    assert await ask_triton(serving, lambda c: c.is_model_ready("tiny"))
    assert await ask_triton(serving, lambda c: c.is_model_ready("tiny", VERSION.digest))
    assert not await ask_triton(serving, lambda c: c.is_model_ready("tiny", "f" * 64))
    assert not await ask_triton(serving, lambda c: c.is_model_ready("other"))


async def test_triton_reads_the_metadata(serving: InferenceServer) -> None:
    about = await ask_triton(serving, lambda c: c.get_server_metadata())
    assert about["extensions"] == ["binary_tensor_data"]
    model = await ask_triton(serving, lambda c: c.get_model_metadata("tiny"))
    assert model["name"] == "tiny"
    assert model["versions"] == [VERSION.digest]
    assert model["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}]
    assert model["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}]
    assert model["parameters"]["artifact"] == VERSION.artifact.sha256
    assert model["parameters"]["labels"] == ["ant", "bee", "cat"]
    index = await ask_triton(serving, lambda c: c.get_model_repository_index())
    assert [(row["name"], row["state"]) for row in index] == [("tiny", "READY")]


@pytest.mark.parametrize("form", ["binary", "json"])
@pytest.mark.parametrize("packing", [None, "gzip", "deflate"])
async def test_triton_gets_the_models_answer_in_every_form(
    serving: InferenceServer, form: str, packing: str | None
) -> None:
    binary = form == "binary"
    outputs = [triton.InferRequestedOutput("y", binary_data=binary)]

    def infer(client: Any) -> Any:
        return client.infer(
            "tiny",
            [tensor(ROWS, binary=binary)],
            outputs=outputs,
            request_id="mine",
            request_compression_algorithm=packing,
            response_compression_algorithm=packing,
        )

    answer = await ask_triton(serving, infer)
    np.testing.assert_allclose(answer.as_numpy("y"), WANTED, rtol=1e-5)
    assert answer.get_response()["id"] == "mine"
    assert answer.get_response()["model_version"] == VERSION.digest


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
async def test_triton_unpacks_our_large_answers(serving: InferenceServer, packing: str) -> None:
    rows = np.ones((2000, FEATURES), np.float32)

    def infer(client: Any) -> Any:
        return client.infer("tiny", [tensor(rows)], response_compression_algorithm=packing)

    answer = await ask_triton(serving, infer)
    np.testing.assert_allclose(answer.as_numpy("y"), rows @ VERSION.weights, rtol=1e-5)


async def test_a_large_answer_travels_packed_to_who_accepts_it(client: httpx.AsyncClient) -> None:
    body = as_json(np.ones((2000, FEATURES), np.float32))
    packed = await client.post(
        "/v2/models/tiny/infer", json=body, headers={"accept-encoding": "gzip"}
    )
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < 10_000
    plain = await client.post(
        "/v2/models/tiny/infer", json=body, headers={"accept-encoding": "identity"}
    )
    assert "content-encoding" not in plain.headers
    assert plain.json() == packed.json()


async def test_triton_reads_the_configuration(serving: InferenceServer) -> None:
    config = await ask_triton(serving, lambda c: c.get_model_config("tiny", VERSION.digest))
    assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 4]}]
    assert config["output"] == [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1, 3]}]
    assert config["parameters"]["execution_provider"]["string_value"] == "CPUExecutionProvider"
    with pytest.raises(InferenceServerException, match="other is not served here"):
        await ask_triton(serving, lambda c: c.get_model_config("other"))


async def test_triton_gets_binary_outputs_when_it_names_none(serving: InferenceServer) -> None:
    answer = await ask_triton(
        serving, lambda c: c.infer("tiny", [tensor(ROWS)], model_version=VERSION.digest)
    )
    np.testing.assert_allclose(answer.as_numpy("y"), WANTED, rtol=1e-5)


async def test_triton_understands_our_refusals(serving: InferenceServer) -> None:
    with pytest.raises(InferenceServerException, match=r"wants shape \[-1, 4\].*got \[2, 2\]"):
        await ask_triton(serving, lambda c: c.infer("tiny", [tensor(ROWS[:, :2])]))
    with pytest.raises(InferenceServerException, match="other is not served here; this is tiny"):
        await ask_triton(serving, lambda c: c.infer("other", [tensor(ROWS)]))
    with pytest.raises(InferenceServerException, match="deployed by the coordinator"):
        await ask_triton(serving, lambda c: c.load_model("tiny"))


async def test_plain_json_gets_plain_json(client: httpx.AsyncClient) -> None:
    response = await client.post("/v2/models/tiny/infer", json=as_json(ROWS))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    output = response.json()["outputs"][0]
    assert output["shape"] == [2, 3]
    np.testing.assert_allclose(np.reshape(output["data"], (2, 3)), WANTED, rtol=1e-5)


@pytest.mark.parametrize(
    ("path", "status", "complaint"),
    [
        ("/v2/models/other/infer", 404, "other is not served here"),
        (f"/v2/models/tiny/versions/{'0' * 64}/infer", 404, "is not served here"),
        ("/v2/models/tiny/versions/1/infer", 404, "is not served here"),
        ("/v2/models/tiny/generate", 404, "Not Found"),
        ("/v2/health/live", 405, "Method Not Allowed"),
    ],
)
async def test_a_wrong_address_is_answered_as_the_protocol_wants(
    client: httpx.AsyncClient, path: str, status: int, complaint: str
) -> None:
    response = await client.post(path, json=as_json(ROWS))
    assert response.status_code == status
    assert complaint in response.json()["error"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"shape": [4, 2]}, "wants shape [-1, 4]"),
        ({"name": "z"}, "the model has no input 'z'; it has x"),
        ({"datatype": "INT64", "data": list(range(8))}, "wants FP32 and got INT64"),
        ({"data": "eight"}, "holds other values than FP32"),
    ],
)
async def test_a_wrong_tensor_is_a_clients_mistake(
    client: httpx.AsyncClient, changes: dict[str, Any], complaint: str
) -> None:
    response = await client.post("/v2/models/tiny/infer", json=as_json(ROWS, **changes))
    assert response.status_code == 400
    assert complaint in response.json()["error"]


async def test_a_body_over_the_limit_is_refused_however_it_comes(client: httpx.AsyncClient) -> None:
    too_much = bytes(64 * 1024 * 1024 + 1)
    declared = await client.post("/v2/models/tiny/infer", content=too_much)
    assert declared.status_code == 413
    assert "over the limit of 67108864 bytes" in declared.json()["error"]

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(65):
            yield too_much[: 1024 * 1024]

    streamed = await client.post("/v2/models/tiny/infer", content=pieces())
    assert streamed.status_code == 413
    packed = await client.post(
        "/v2/models/tiny/infer",
        content=gzip.compress(too_much, 1),
        headers={"content-encoding": "gzip"},
    )
    assert packed.status_code == 413
    assert (await client.get("/v2/health/ready")).status_code == 200


async def test_a_client_that_hangs_up_in_the_middle_disturbs_nobody(
    client: httpx.AsyncClient, serving: InferenceServer
) -> None:
    host, port = serving.serving.address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v2/models/tiny/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await client.post("/v2/models/tiny/infer", json=as_json(ROWS))).status_code == 200


async def test_metrics_tell_requests_errors_latency_and_what_is_served(
    client: httpx.AsyncClient, serving: InferenceServer
) -> None:
    before = serving.serving.requests
    await client.post("/v2/models/tiny/infer", json=as_json(ROWS))
    await client.post("/v2/models/tiny/infer", json=as_json(ROWS, name="z"))
    text = (await client.get("/metrics")).text
    assert f'artifact="{VERSION.artifact.sha256}",model="tiny",version="{VERSION.digest}"' in text
    assert 'shoal_inference_requests_total{status="200"}' in text
    assert 'shoal_inference_requests_total{status="400"}' in text
    assert "shoal_inference_errors_total 0.0" in text  # mistakes of clients are not ours
    assert 'shoal_inference_seconds_bucket{le="0.0002"}' in text
    assert "shoal_inference_run_rows_count" in text
    await until(lambda: serving.serving.requests >= before + 2)
    assert serving.serving.errors == 0
    assert serving.serving.p50_ms is not None


async def test_labels_that_come_back_are_counted_and_reported_to_the_daemon(
    client: httpx.AsyncClient, serving: InferenceServer
) -> None:
    predicted = WANTED.argmax(axis=1).tolist()
    await client.post("/v2/models/tiny/infer", json={**as_json(ROWS), "id": "part-1"})
    answer = await client.post("/v2/models/tiny/infer", json=as_json(ROWS))
    wrong = [(predicted[0] + 1) % 3, predicted[1]]
    labelled = [
        {"id": "part-1", "labels": predicted},
        {"answer": int(answer.headers["shoal-answer"]), "labels": wrong},
        {"id": "never asked", "labels": [0]},
    ]
    response = await client.post("/v1/feedback", json={"answers": labelled})
    assert response.json() == {"labelled": 4, "correct": 3, "unknown": 1}
    text = (await client.get("/metrics")).text
    assert f'shoal_feedback_labelled_total{{version="{VERSION.digest}"}} 4.0' in text
    assert f'shoal_feedback_correct_total{{version="{VERSION.digest}"}} 3.0' in text
    await until(lambda: serving.serving.labelled == 4)
    assert serving.serving.correct == 3


async def test_feedback_that_is_not_understood_or_endless_is_refused_in_json(
    client: httpx.AsyncClient,
) -> None:
    refused = await client.post("/v1/feedback", content=b"{")
    assert refused.status_code == 400
    assert "the feedback is not understood" in refused.json()["error"]
    endless = await client.post("/v1/feedback", content=bytes(1024 * 1024 + 1))
    assert endless.status_code == 413
    assert "over the limit of 1048576 bytes" in endless.json()["error"]


async def test_many_clients_at_once_all_get_their_own_answer(client: httpx.AsyncClient) -> None:
    async def ask(number: int) -> bool:
        values = np.full((1, FEATURES), number, np.float32)
        response = await client.post("/v2/models/tiny/infer", json=as_json(values))
        got = np.array(response.json()["outputs"][0]["data"])
        return np.allclose(got, (values @ VERSION.weights)[0], rtol=1e-4, atol=1e-4)

    assert all(await asyncio.gather(*(ask(number) for number in range(100))))
