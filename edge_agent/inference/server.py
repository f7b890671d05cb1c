"""The inference server's process: ``python -m edge_agent.inference.server --fd N``.

It answers on a socket that its parent listens on, so that the port stays the same over restarts and
connections made meanwhile wait instead of failing. Commands come as lines on standard input. It
imports none of torch, onnx, flwr, SQLAlchemy, FastAPI, pandas or scipy.
"""

import argparse
import asyncio
import contextlib
import importlib
import logging
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from edge_agent.inference.answering import Answering
from edge_agent.inference.app import InferenceApp
from edge_agent.inference.feedback import Feedback
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
    parser.add_argument("--grpc", metavar="HOST:PORT", help="serve gRPC there, too")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    link: ParentLink[Activate] = ParentLink(Activate)
    uvloop.run(_serve(link, socket.socket(fileno=arguments.fd), arguments.grpc))


async def _serve(link: ParentLink[Activate], listener: socket.socket, grpc: str | None) -> None:
    metrics = Metrics()
    live = LiveModel(metrics)
    answering = Answering(live, Feedback(metrics.registry))
    server = uvicorn.Server(
        uvicorn.Config(
            InferenceApp(answering, metrics),
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
    async with contextlib.AsyncExitStack() as doors, asyncio.TaskGroup() as group:
        if grpc is not None:
            # Imported here alone: without gRPC, a server shall not carry its memory.
            module = importlib.import_module("edge_agent.inference.grpc_server")
            grpc_server = await module.start_grpc(answering, metrics, grpc)
            doors.push_async_callback(grpc_server.stop, _DRAIN_S)
        obey = _obey(_commands(link), live, link.send, server)
        jobs = [
            group.create_task(obey, name="obey"),
            group.create_task(_report(answering, metrics, link.send), name="report"),
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
        artifact=served.artifact.sha256,
        variant=served.artifact.variant,
    )


async def _report(answering: Answering, metrics: Metrics, say: Say) -> None:
    """Tell the parent the counts whenever they changed, at most every `_STATS_EVERY_S`."""
    said: Stats | None = None
    while True:
        await asyncio.sleep(_STATS_EVERY_S)
        if (stats := _stats(answering, metrics)) != said:
            said = stats
            say(stats)


def _stats(answering: Answering, metrics: Metrics) -> Stats:
    # Not inlined: a local variable would keep a replaced model in memory while its caller sleeps.
    now = answering.live.now
    counts = metrics.now
    labels = answering.feedback.counts(None if now is None else now.version)
    return Stats(
        requests=metrics.requests,
        errors=metrics.errors,
        version=counts.version,
        version_requests=counts.requests,
        version_errors=counts.errors,
        p50_ms=counts.p50_ms,
        p95_ms=counts.p95_ms,
        labelled=labels.labelled,
        correct=labels.correct,
    )


if __name__ == "__main__":
    main()
