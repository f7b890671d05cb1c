"""A coordinator as a real process over several lives, and the operator's commands."""

import asyncio
import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from cloud_coordinator.__main__ import main
from tests.integration.coordinator.live import ENDED, plan, until

TIME_LIMIT_S = 60.0
SERVE_WITH_FAKES = (sys.executable, "-m", "tests.integration.coordinator.fake_parts")


class Served:
    """A coordinator process on a home, over several lives."""

    def __init__(self, folder: Path) -> None:
        self.home, self.requests = folder / "home", folder / "requests"
        self.requests.mkdir(exist_ok=True)
        self.log = folder / "serve.log"
        self.process: asyncio.subprocess.Process

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *SERVE_WITH_FAKES, self.home, self.requests, stderr=log
            )
        await until("the service", self._is_up)

    async def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        async with asyncio.timeout(TIME_LIMIT_S):
            return await self.process.wait()

    @property
    def url(self) -> str:
        return str(self._service()["api_url"])

    @property
    def token(self) -> str:
        return (self.home / "admin-token").read_text().strip()

    async def get(self, path: str) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers) as client:
            answer = await client.get(path)
            answer.raise_for_status()
            return answer.json()

    async def start_run(self) -> str:
        headers = {"Authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers) as client:
            answer = await client.post("/v1/runs", json=msgspec.to_builtins(plan()))
            return str(answer.json()["run_id"])

    async def in_round_2(self, run_id: str) -> None:
        async def probe() -> bool:
            return "round 2:" in (await self.get(f"/v1/runs/{run_id}"))["doing"]

        await until("round 2", probe)

    async def ended(self, run_id: str) -> Any:
        async def probe() -> Any:
            run = await self.get(f"/v1/runs/{run_id}")
            return run if run["state"] in ENDED else None

        return await until("the run to end", probe)

    def children(self) -> set[int]:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return {int(pid) for pid in path.read_text().split()}

    async def _is_up(self) -> bool:
        assert self.process.returncode is None, self.log.read_text()
        if not (self.home / "service.json").exists():
            return False
        if self._service()["pid"] != self.process.pid:
            return False
        with contextlib.suppress(httpx.TransportError):
            return bool((await self.get("/v1/health"))["status"] == "ok")
        return False

    def _service(self) -> Any:
        return json.loads((self.home / "service.json").read_text())


async def shoal(*argv: str | Path) -> tuple[int, str, str]:
    """Run a command of ``shoal`` in a thread; return status, output and error output."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["shoal", *map(str, argv)])
        try:
            async with asyncio.timeout(TIME_LIMIT_S):
                await asyncio.to_thread(main)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()
