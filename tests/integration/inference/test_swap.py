"""What clients see while models are exchanged, refused, or take the server down."""

import asyncio
import ctypes
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from edge_agent.inference import supervisor
from edge_agent.inference.supervisor import ADDRESS_FILE, InferenceServer
from edge_agent.slot_files import MODEL
from shared.child import Child
from shared.errors import ConfigError, UnavailableError, UnfitModelError
from tests.integration.inference.conftest import RNG, running
from tests.integration.inference.tiny_models import (
    FEATURES,
    Version,
    endless,
    linear,
    not_finite,
    version_of,
)
from tests.integration.inference.waiting import until

ROW = np.ones((1, FEATURES), np.float32)
MIB = 1024 * 1024


@pytest.fixture
async def client(server: InferenceServer) -> AsyncIterator[httpx.AsyncClient]:
    base = f"http://{server.serving.address}"
    async with httpx.AsyncClient(base_url=base, timeout=30) as client:
        yield client


async def served(client: httpx.AsyncClient) -> tuple[str, list[float]]:
    """Return the version that answered, and its answer to `ROW`."""
    body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 1, 1, 1]}]}
    response = await client.post("/v2/models/tiny/infer", json=body)
    assert response.status_code == 200, response.text
    document = response.json()
    return document["model_version"], document["outputs"][0]["data"]


def right(version: Version, answer: tuple[str, list[float]]) -> bool:
    return answer[0] == version.digest and bool(
        np.allclose(answer[1], (ROW @ version.weights)[0], rtol=1e-4)
    )


def resident_bytes(pid: int | None) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_before_any_model_the_server_lives_and_is_not_ready(
    client: httpx.AsyncClient,
) -> None:
    assert (await client.get("/v2/health/live")).status_code == 200
    ready = await client.get("/v2/health/ready")
    assert (ready.status_code, ready.json()) == (400, {"ready": False})
    assert (await client.get("/v2/models/tiny")).status_code == 404
    answer = await client.post("/v2/models/tiny/infer", json={"inputs": []})
    assert answer.status_code == 404
    assert "no model is served yet" in answer.json()["error"]


async def test_a_swap_under_load_drops_no_request_and_mixes_no_models(
    server: InferenceServer, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    first, second = linear(1), linear(2)
    slots = [first.put_into(tmp_path / "a"), second.put_into(tmp_path / "b")]
    await server.activate(slots[0])
    stop = asyncio.Event()
    answers: list[tuple[str, list[float]]] = []

    async def load() -> None:
        while not stop.is_set():
            answers.append(await served(client))

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(load())
        for number in range(1, 7):
            await server.activate(slots[number % 2])
            asked = len(answers)
            await until(lambda asked=asked: len(answers) > asked + 16)  # type: ignore[misc]
        stop.set()
    assert all(right(first, answer) or right(second, answer) for answer in answers)
    assert {version for version, _ in answers} == {first.digest, second.digest}
    assert server.serving.version == first.digest


async def swap_and_measure(server: InferenceServer, folder: Path, swaps: int) -> tuple[int, int]:
    """Return resident memory after the first ten swaps and after the last, in bytes."""
    megabytes = 8
    slots = [
        linear(seed, padding=megabytes * MIB // 4).put_into(folder / name)
        for seed, name in enumerate("ab")
    ]
    early = 0
    for number in range(swaps):
        await server.activate(slots[number % 2])
        if number == 10:
            early = resident_bytes(server.pid)
    return early, resident_bytes(server.pid)


def has_malloc_trim() -> bool:
    return hasattr(ctypes.CDLL(None), "malloc_trim")


@pytest.mark.skipif(not has_malloc_trim(), reason="this C library keeps freed memory")
async def test_memory_stays_flat_over_fifty_swaps(server: InferenceServer, tmp_path: Path) -> None:
    early, late = await swap_and_measure(server, tmp_path, 50)
    assert late < early * 1.05


@pytest.mark.slow
@pytest.mark.skipif(not has_malloc_trim(), reason="this C library keeps freed memory")
async def test_memory_stays_flat_over_two_hundred_swaps(
    server: InferenceServer, tmp_path: Path
) -> None:
    early, late = await swap_and_measure(server, tmp_path, 200)
    assert late < early * 1.05


async def test_a_model_that_is_refused_leaves_the_old_one_serving(
    server: InferenceServer, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    good = linear(1)
    await server.activate(good.put_into(tmp_path / "good"))
    tampered = linear(2).put_into(tmp_path / "tampered")
    (tampered / MODEL).write_bytes(linear(3).content)
    ones = np.ones((1, 3), np.float32)
    refused = {
        "has digest": tampered,
        "cannot read": tmp_path / "missing",
        "holds NaN": not_finite().put_into(tmp_path / "nan"),
        "does not load": version_of(b"no model", ROW, ones).put_into(tmp_path / "broken"),
        "more than the tolerance": version_of(linear(1).content, ROW, ones).put_into(
            tmp_path / "wrong"
        ),
    }
    for complaint, slot in refused.items():
        with pytest.raises(UnfitModelError, match=complaint):
            await server.activate(slot)
        assert server.serving.version == good.digest
        assert right(good, await served(client))


async def test_a_killed_server_comes_back_by_itself_at_the_same_address(
    server: InferenceServer, client: httpx.AsyncClient, tmp_path: Path
) -> None:
    await server.activate(linear(1).put_into(tmp_path / "a"))
    answer, address = await served(client), server.serving.address
    await until(lambda: server.serving.requests == 1)
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(lambda: server.serving.version is None)
    # A connection made meanwhile waits in the daemon's own listener instead of being refused.
    assert (await client.get("/v2/health/live")).status_code == 200
    await until(lambda: server.serving.version == linear(1).digest)
    assert server.pid != pid
    assert server.serving.address == address
    assert await served(client) == answer
    await until(lambda: server.serving.requests == 2)  # counted on, not anew


async def test_a_model_that_a_fresh_server_refuses_is_reported_as_lost(tmp_path: Path) -> None:
    lost = asyncio.Event()
    server = InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG, on_loss=lost.set)
    async with running(server):
        slot = linear(1).put_into(tmp_path / "a")
        await server.activate(slot)
        (slot / MODEL).write_bytes(b"damaged since")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        await asyncio.wait_for(lost.wait(), 20)
        assert server.serving.version is None
        await server.activate(linear(2).put_into(tmp_path / "b"))
        assert server.serving.version == linear(2).digest


async def test_a_server_that_dies_while_it_loads_blames_the_model_and_serves_the_old_one(
    server: InferenceServer, tmp_path: Path
) -> None:
    await server.activate(linear(1).put_into(tmp_path / "a"))
    pid = server.pid
    assert pid is not None
    idle_s = cpu_s(pid)
    loading = asyncio.create_task(server.activate(endless().put_into(tmp_path / "b")))
    await until(lambda: cpu_s(pid) > idle_s + 0.1)
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(UnfitModelError, match="was killed by SIGSEGV while it loaded the model"):
        await asyncio.wait_for(loading, 20)
    await until(lambda: server.serving.version == linear(1).digest)


async def test_a_model_that_hangs_on_loading_is_given_up(
    server: InferenceServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.activate(linear(1).put_into(tmp_path / "a"))
    monkeypatch.setattr("edge_agent.inference.supervisor._ACTIVATE_TIMEOUT_S", 0.5)
    with pytest.raises(UnfitModelError, match=r"did not start serving within 0.5 seconds"):
        await server.activate(endless().put_into(tmp_path / "b"))
    await until(lambda: server.serving.version == linear(1).digest)


async def test_a_server_that_hangs_before_it_is_ready_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG)
    start, lives = server._start, [0]

    async def start_mute_first() -> Child:
        lives[0] += 1
        monkeypatch.setattr(supervisor, "_BIRTH_TIMEOUT_S", 0.1 if lives[0] == 1 else 60.0)
        if lives[0] > 1:
            return await start()
        return await Child.start(["sleep", "60"], name="mute", log_path=tmp_path / "log")

    monkeypatch.setattr(server, "_start", start_mute_first)
    async with running(server):
        await server.activate(linear().put_into(tmp_path / "a"))
        assert lives == [2]


async def test_without_a_server_activation_fails_as_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.inference.supervisor._START_TIMEOUT_S", 0.05)
    server = InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG)
    with pytest.raises(UnavailableError, match=r"does not start; see .*inference\.log"):
        await server.activate(tmp_path)
    server.close()


async def test_who_waits_for_a_server_that_is_stopped_is_told_at_once(tmp_path: Path) -> None:
    async with running(InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG)) as server:
        waiting = asyncio.create_task(server.activate(linear(1).put_into(tmp_path / "a")))
        await until(lambda: server.pid)
    with pytest.raises(UnavailableError, match="was stopped; start the agent again"):
        await asyncio.wait_for(waiting, 5)


async def test_the_address_is_on_file_while_the_server_runs(tmp_path: Path) -> None:
    async with running(InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG)) as server:
        await until(lambda: server.pid)
        written = (tmp_path / ADDRESS_FILE).read_text(encoding="ascii")
        assert written == f"{server.serving.address}\n"
    assert not (tmp_path / ADDRESS_FILE).exists()


async def test_a_port_in_use_and_a_public_address_are_refused_in_a_sentence(
    server: InferenceServer, tmp_path: Path
) -> None:
    port = int(server.serving.address.split(":")[1])
    with pytest.raises(UnavailableError, match=f"port {port} on 127.0.0.1 is in use"):
        InferenceServer(tmp_path, "127.0.0.1", port, rng=random.Random(1))  # noqa: S311 - jitter
    with pytest.raises(ConfigError, match="serves this machine only"):
        InferenceServer(tmp_path, "0.0.0.0", 0, rng=RNG)  # noqa: S104 - it is refused


async def test_the_server_process_loads_no_training_or_web_framework(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    async with running(InferenceServer(tmp_path, "127.0.0.1", 0, rng=RNG)) as server:
        await server.activate(linear(1).put_into(tmp_path / "a"))
        base = f"http://{server.serving.address}"
        async with httpx.AsyncClient(base_url=base, timeout=30) as client:
            assert right(linear(1), await served(client))
            assert (await client.get("/v2")).status_code == 200
            assert (await client.get("/metrics")).status_code == 200
    log = (tmp_path / "logs" / "inference.log").read_text(encoding="utf-8")
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in log.splitlines()
        if line.startswith("import time:")
    }
    assert {"onnxruntime", "uvicorn", "starlette"} <= imported
    forbidden = {
        "torch",
        "onnx",
        "flwr",
        "sqlalchemy",
        "fastapi",
        "pydantic",
        "pandas",
        "scipy",
        "grpc",
    }
    assert not imported & forbidden
