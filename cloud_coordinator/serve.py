"""The process behind `shoal serve`: the API on its socket, and an orderly end on a signal."""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
from collections.abc import Generator
from pathlib import Path

import uvicorn

from cloud_coordinator.app import Coordinator, Parts
from cloud_coordinator.settings import Settings, choose_ports, write_service
from shared.errors import ShoalError, UnavailableError, innermost
from shared.files import make_folder
from shared.listening import require_free_port

logger = logging.getLogger(__name__)

_FAREWELL_S = 5  # for requests in flight
_BACKLOG = 2048


def run_service(settings: Settings, parts: Parts | None = None) -> None:
    """Serve until SIGTERM or SIGINT; all children have ended when this returns.

    Raises:
        ShoalError: the service cannot be started, in one sentence.
    """
    make_folder(settings.home)
    with _only_one(settings.home):
        chosen = choose_ports(settings)
        require_free_port(chosen.host, chosen.port, purpose="the API", option="--port")
        coordinator = Coordinator(chosen, parts or Parts())
        try:
            asyncio.run(_serve(coordinator))
        except* ShoalError as group:
            raise innermost(group) from group


async def _serve(coordinator: Coordinator) -> None:
    stop = asyncio.Event()
    starting = asyncio.current_task()
    assert starting is not None
    ready = asyncio.Event()

    def end() -> None:
        stop.set()
        if not ready.is_set():  # nobody waits for `stop` yet
            starting.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    try:
        async with coordinator.running():
            ready.set()
            await _serve_api(coordinator, stop)
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    logger.info("the coordinator has ended; start it again on the same home and it goes on")


async def _serve_api(coordinator: Coordinator, stop: asyncio.Event) -> None:
    settings = coordinator.settings
    config = uvicorn.Config(
        coordinator.api(),
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=_FAREWELL_S,
    )
    server = _Server(config)
    listener = _listen(settings.host, settings.port)
    serving = asyncio.create_task(server.serve([listener]), name="api")
    try:
        await asyncio.to_thread(write_service, settings)
        logger.info("the coordinator serves at %s, home %s", settings.api_url, settings.home)
        stopping = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        server.should_exit = True
        await serving
    finally:
        serving.cancel()
        listener.close()


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again once it has ended."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@contextlib.contextmanager
def _only_one(home: Path) -> Generator[None, None, None]:
    """Hold the home; the kernel lets go of it when this process ends, however that happens."""
    with (home / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UnavailableError(
                f"another coordinator (process {lock.read().strip()}) serves {home}; "
                "stop it or choose another --home"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)
