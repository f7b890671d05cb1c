"""A coordinator that runs in the test's own loop, with fake heavy parts and a real broker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from cloud_coordinator.app import Coordinator
from cloud_coordinator.settings import choose_ports, write_service
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from shared.tasks.spec import TaskSpec
from tests.integration.coordinator.fake_device import DeviceKeys, FakeDevice, open_reply
from tests.integration.coordinator.fake_parts import fake_parts, quick_settings

T = TypeVar("T")
TIME_LIMIT_S = 60.0
POLL_S = 0.05
ENDED = {"finished", "failed", "stopped"}


def plan(name: str = "nightly", *, rounds: int = 3, quorum: int = 1, size: int = 5) -> RunPlan:
    return RunPlan(
        name=name,
        task=TaskSpec("digits", "image-classification"),
        rounds=rounds,
        cohort=CohortPlan(size=size, quorum=quorum),
        privacy=PrivacyPlan(mode="plain"),
    )


def secure_plan(*, rounds: int = 1) -> RunPlan:
    """Of sums of five devices."""
    secure = PrivacyPlan(at_least=4)
    shape = plan(rounds=rounds)
    cohort = msgspec.structs.replace(shape.cohort, size=5, quorum=5)
    return msgspec.structs.replace(shape, cohort=cohort, privacy=secure)


async def until(what: str, probe: Callable[[], Awaitable[T | None]]) -> T:
    """Ask ``probe`` until it returns something true."""
    try:
        async with asyncio.timeout(TIME_LIMIT_S):
            while not (found := await probe()):  # noqa: ASYNC110  # what is asked has no event
                await asyncio.sleep(POLL_S)
            return found
    except TimeoutError as error:
        raise AssertionError(f"gave up waiting for {what}") from error


class Live:
    """A coordinator, its API, and the folder of requests to its fake worker."""

    def __init__(self, coordinator: Coordinator, client: httpx.AsyncClient, requests: Path) -> None:
        self.coordinator, self.client, self.requests = coordinator, client, requests

    def ask(self, request: str) -> None:
        (self.requests / request).touch()

    def unask(self, request: str) -> None:
        (self.requests / request).unlink()

    @property
    def starts(self) -> list[str]:
        """One line for each life of a worker: session id and first round."""
        path = self.requests / "starts"
        return path.read_text().splitlines() if path.exists() else []

    async def get(self, path: str) -> Any:
        answer = await self.client.get(path)
        answer.raise_for_status()
        return answer.json()

    async def enrol(self, device_id: str) -> FakeDevice:
        create_token = self.coordinator.enrolment.create_token
        token = await asyncio.to_thread(create_token, uses=1, lifetime=timedelta(hours=1))
        keys = DeviceKeys()
        content = msgspec.json.encode(keys.request(token, device_id))
        answer = await self.client.post("/v1/enroll", content=content)
        answer.raise_for_status()
        return FakeDevice(keys, open_reply(answer.content))

    async def start(self, plan: RunPlan) -> str:
        answer = await self.client.post("/v1/runs", json=msgspec.to_builtins(plan))
        answer.raise_for_status()
        return str(answer.json()["run_id"])

    async def run_until(self, run_id: str, what: str, is_so: Callable[[Any], object]) -> Any:
        async def probe() -> Any:
            run = await self.get(f"/v1/runs/{run_id}")
            return run if is_so(run) else None

        return await until(what, probe)

    async def ended(self, run_id: str) -> Any:
        return await self.run_until(run_id, "the run to end", lambda run: run["state"] in ENDED)

    async def in_round(self, run_id: str, number: int) -> Any:
        return await self.run_until(
            run_id, f"round {number}", lambda run: f"round {number}:" in run["doing"]
        )


@contextlib.asynccontextmanager
async def live(folder: Path, **given: Any) -> AsyncIterator[Live]:
    """Run a coordinator whose home lies in ``folder``; it goes on where the last one was."""
    requests = folder / "requests"
    requests.mkdir(exist_ok=True)
    settings = choose_ports(quick_settings(folder / "home", **given))
    coordinator = Coordinator(settings, fake_parts(requests))
    transport = httpx.ASGITransport(coordinator.api())
    headers = {"Authorization": f"Bearer {coordinator.keys.admin_token}"}
    async with (
        coordinator.running(),
        httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client,
    ):
        async with asyncio.timeout(TIME_LIMIT_S):
            await coordinator.link.wait_connected()
        write_service(settings)  # the next one comes back at the same addresses
        yield Live(coordinator, client, requests)
