"""``shoal-sim bench serving``: what the device's inference server costs, under load by wrk.

The server is the agent's own process, kept by its supervisor; the reference is the same model
behind FastAPI and pydantic, asked the same JSON in turns. Load and servers share this machine.
"""

import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from edge_agent.inference.supervisor import InferenceServer
from edge_agent.inference.trial import CHILD_ENV
from edge_agent.slot_files import MODEL
from shared.child import Child
from shared.errors import ConfigError, UnavailableError
from shared.listening import free_port
from simulations.benchmarks.report import Row, row_at_least, row_at_most
from simulations.benchmarks.serving_model import NAME, binary_request, json_request, put_version
from simulations.benchmarks.wrk import Load, post, require_wrk

Progress = Callable[[str], None]
_CLIENTS = 32
_HEAVY = ("torch", "onnx", "pandas", "scipy")
_EARLY_SWAPS = 10  # until memory has its size
_START_S = 60.0
_MB = 1_000_000
_BINARY_HEADER = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class _Bench:
    """A running server with a model, and what measurements need beside it."""

    server: InferenceServer
    folder: Path
    slots: tuple[Path, Path]
    quick: bool

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.server.pid)

    @property
    def seconds(self) -> float:
        return 2 if self.quick else 5

    async def load_binary(self, clients: int, *, seconds: float | None = None) -> Load:
        body, head = binary_request()
        headers = {_BINARY_HEADER: str(head)}
        return await self.load(
            self.server.serving.address, body, headers, clients=clients, seconds=seconds
        )

    async def load(
        self,
        address: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        clients: int,
        seconds: float | None = None,
    ) -> Load:
        url = f"http://{address}/v2/models/{NAME}/infer"
        return await post(
            url,
            body,
            headers,
            folder=self.folder,
            clients=clients,
            seconds=self.seconds if seconds is None else seconds,
        )

    def rss_bytes(self) -> int:
        size: int = self.process.memory_info().rss
        return size


def run(*, only: str | None, quick: bool, progress: Progress) -> list[Row]:
    """Measure all rows, or the one named ``only``.

    Args:
        only: name of a row.
        quick: shorter loads and fewer swaps.
        progress: is told what is being measured.

    Raises:
        ConfigError: there is no such row.
        UnavailableError: wrk is missing, or a server did not come up.
    """
    if only is not None and only not in MEASUREMENTS:
        raise ConfigError(f"there is no row {only!r}; choose one of: {'; '.join(MEASUREMENTS)}")
    require_wrk()
    names = list(MEASUREMENTS) if only is None else [only]
    return asyncio.run(_measure(names, quick=quick, progress=progress))


async def _measure(names: list[str], *, quick: bool, progress: Progress) -> list[Row]:
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        progress("exporting and quantising two models …")
        slots = put_version(folder / "a", 1), put_version(folder / "b", 2)
        for name in names:
            progress(f"measuring {name} …")
            home = Path(tempfile.mkdtemp(dir=folder))
            async with _server(home, slots[0]) as server:  # each row, a fresh process
                rows.append(await MEASUREMENTS[name](name, _Bench(server, folder, slots, quick)))
    return rows


@contextlib.asynccontextmanager
async def _server(home: Path, slot: Path) -> AsyncIterator[InferenceServer]:
    server = InferenceServer(home, "127.0.0.1", 0, rng=random.Random(0))  # noqa: S311 - jitter
    job = asyncio.create_task(server.run(), name="inference-server")
    try:
        await server.activate(slot)
        yield server
    finally:
        job.cancel()
        await asyncio.wait([job])


@contextlib.asynccontextmanager
async def _fastapi(folder: Path, model: Path) -> AsyncIterator[tuple[str, psutil.Process]]:
    """Start the reference; yield its address and process."""
    port = free_port()
    child = await Child.start(
        [
            sys.executable,
            "-m",
            "simulations.benchmarks.fastapi_serving",
            str(model),
            f"--port={port}",
        ],
        name="FastAPI",
        log_path=folder / "fastapi.log",
        env=CHILD_ENV,
    )
    try:
        await _until_listening(port, child)
        yield f"127.0.0.1:{port}", psutil.Process(child.pid)
    finally:
        child.kill()
        await child.stop()


async def _until_listening(port: int, child: Child) -> None:
    try:
        async with asyncio.timeout(_START_S):
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise UnavailableError(f"FastAPI does not start: {child.log_tail()}") from None


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    spent: float = times.user + times.system
    return spent


async def _latency(name: str, bench: _Bench) -> Row:
    await bench.load_binary(1, seconds=1)
    loads = [await bench.load_binary(1) for _ in range(3)]
    return row_at_most(name, statistics.median(each.p50_ms for each in loads), "ms", limit=0.35)


async def _rate(name: str, bench: _Bench) -> Row:
    """Requests of a second of the server's own CPU time: what one core would answer."""
    await bench.load_binary(_CLIENTS, seconds=1)
    rates = []
    for _ in range(3):
        before = _cpu_s(bench.process)
        load = await bench.load_binary(_CLIENTS)
        rates.append(load.requests / (_cpu_s(bench.process) - before))
    value = round(statistics.median(rates))
    return Row(
        name=name,
        value=value,
        unit="requests",
        reference=None,
        ratio=None,
        target=">= 5000 requests",
        ok=value >= 5000,
    )


async def _against_fastapi(name: str, bench: _Bench, *, binary: bool, least: float) -> Row:
    """Compare with FastAPI on JSON, the one form that its pydantic models take."""
    ours: list[float] = []
    theirs: list[float] = []
    body, headers = json_request(), {"content-type": "application/json"}
    async with _fastapi(bench.folder, bench.slots[0] / MODEL) as (address, process):
        sides = [
            (ours, bench.server.serving.address, bench.process),
            (theirs, address, process),
        ]
        for _ in range(2 if bench.quick else 4):
            for costs, where, whose in sides:
                before = _cpu_s(whose)
                if binary and costs is ours:
                    load = await bench.load_binary(_CLIENTS)
                else:
                    load = await bench.load(where, body, headers, clients=_CLIENTS)
                if load.failed:
                    raise UnavailableError(f"{load.failed} requests to {where} failed")
                costs.append((_cpu_s(whose) - before) / load.requests * 1e6)
    # The first turn of each warms it up.
    return row_at_least(
        name,
        statistics.median(ours[1:]),
        "us",
        reference=statistics.median(theirs[1:]),
        least=least,
    )


async def _idle_memory(name: str, bench: _Bench) -> Row:
    return row_at_most(name, bench.rss_bytes() / _MB, "MB", limit=90)


async def _heavy_libraries(name: str, bench: _Bench) -> Row:
    mapped = {entry.path for entry in bench.process.memory_maps()}
    loaded = [name for name in _HEAVY if any(f"/{name}/" in path for path in mapped)]
    return row_at_most(name, len(loaded), "libraries", limit=0)


async def _failures_while_swapping(name: str, bench: _Bench) -> Row:
    swaps = 10 if bench.quick else 50
    load = asyncio.create_task(bench.load_binary(_CLIENTS, seconds=8 if bench.quick else 30))
    for number in range(1, swaps + 1):
        await bench.server.activate(bench.slots[number % 2])
    if load.done():
        raise UnavailableError("the swaps took longer than the load; the machine is too busy")
    return row_at_most(name, (await load).failed, "requests", limit=0)


async def _memory_over_swaps(name: str, bench: _Bench) -> Row:
    early = 0
    for number in range(1, (40 if bench.quick else 200) + 1):
        await bench.server.activate(bench.slots[number % 2])
        if number == _EARLY_SWAPS:
            early = bench.rss_bytes()
    limit = 1.05 * early / _MB
    return row_at_most(
        name,
        bench.rss_bytes() / _MB,
        "MB",
        limit=limit,
        reference=early / _MB,
        target="<= 1.05 x the reference",
    )


MEASUREMENTS: Mapping[str, Callable[[str, _Bench], Awaitable[Row]]] = {
    "p50 at concurrency 1, binary": _latency,
    "requests per CPU second at concurrency 32, binary": _rate,
    "CPU per request at concurrency 32, binary": partial(_against_fastapi, binary=True, least=3),
    "CPU per request at concurrency 32, JSON": partial(_against_fastapi, binary=False, least=1),
    "idle memory": _idle_memory,
    "heavy libraries loaded": _heavy_libraries,
    "failed requests while models are swapped": _failures_while_swapping,
    "memory after all swaps, against ten": _memory_over_swaps,
}
