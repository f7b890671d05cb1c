"""The inference server's process: ``python -m edge_agent.inference.server --fd N``.

It answers on a socket that its parent listens on, so that the port stays the same over restarts and
connections made meanwhile wait instead of failing. Commands come as lines on standard input. It
imports none of torch, onnx, flwr, SQLAlchemy, FastAPI, pandas or scipy.
"""

import argparse
import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from edge_agent.inference.app import InferenceApp
from edge_agent.inference.live import LiveModel
from edge_agent.inference.messages import Activate, Activated, Refused, ServerReady, Stats
from edge_agent.inference.metrics import Metrics
from shared.child import ParentLink, die_with_parent
from shared.errors import UnfitModelError, UntrustedModelError

_STATS_EVERY_S = 1.0
_DRAIN_S = 5  # for requests in flight when the server is asked to end
_KEEP_ALIVE_S = 75  # clients pool connections; closing early would make them race

logger = logging.getLogger(__name__)
Say = Callable[[msgspec.Struct], None]


def main() -> None:
    """Serve until the parent closes the pipe or asks to end."""
    die_with_parent()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--fd", type=int, required=True, help="number of the listening socket")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    link: ParentLink[Activate] = ParentLink(Activate)
    uvloop.run(_serve(link, socket.socket(fileno=arguments.fd)))


async def _serve(link: ParentLink[Activate], listener: socket.socket) -> None:
    metrics = Metrics()
    live = LiveModel(metrics)
    server = uvicorn.Server(
        uvicorn.Config(
            InferenceApp(live, metrics),
            http="httptools",
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_DRAIN_S,
        )
    )
    async with asyncio.TaskGroup() as group:
        obey = _obey(_commands(link), live, link.send, server)
        jobs = [
            group.create_task(obey, name="obey"),
            group.create_task(_report(metrics, link.send), name="report"),
        ]
        await server.serve(sockets=[listener])
        for job in jobs:
            job.cancel()
    await live.close()


def _commands(link: ParentLink[Activate]) -> "asyncio.Queue[Activate | None]":
    """Hand the parent's lines over from the link's thread to the event loop."""
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[Activate | None] = asyncio.Queue()

    def pump() -> None:
        command: Activate | None = None
        with contextlib.suppress(RuntimeError):  # the loop is closed: this process ends
            while command := link.incoming.get():
                loop.call_soon_threadsafe(commands.put_nowait, command)
            loop.call_soon_threadsafe(commands.put_nowait, None)

    threading.Thread(target=pump, name="commands", daemon=True).start()
    return commands


async def _obey(
    commands: "asyncio.Queue[Activate | None]", live: LiveModel, say: Say, server: uvicorn.Server
) -> None:
    say(ServerReady())
    while command := await commands.get():
        say(await _activate(live, command))
    server.should_exit = True


async def _activate(live: LiveModel, command: Activate) -> Activated | Refused:
    try:
        served = await live.activate(Path(command.slot))
    except (UnfitModelError, UntrustedModelError) as error:
        logger.warning("refused %s: %s", command.slot, error)
        return Refused(ticket=command.ticket, cause=str(error))
    logger.info("serving %s version %s", served.manifest.model, served.version)
    return Activated(
        ticket=command.ticket,
        model=served.manifest.model,
        version=served.version,
        artifact=served.manifest.shipped.sha256,
    )


async def _report(metrics: Metrics, say: Say) -> None:
    """Tell the parent the counts whenever they changed, at most every `_STATS_EVERY_S`."""
    said = 0
    while True:
        await asyncio.sleep(_STATS_EVERY_S)
        if metrics.requests != said:
            said, now = metrics.requests, metrics.now
            say(
                Stats(
                    requests=said,
                    errors=metrics.errors,
                    version=now.version,
                    version_requests=now.requests,
                    version_errors=now.errors,
                    p50_ms=now.p50_ms,
                    p95_ms=now.p95_ms,
                )
            )


if __name__ == "__main__":
    main()
