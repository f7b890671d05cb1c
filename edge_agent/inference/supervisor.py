"""The daemon's end of the inference server: keeps the child alive and tells it what to serve.

The daemon listens on the port itself and lends the socket to each child. So a port that is taken is
known before anything starts, the port stays the same over restarts, and connections that arrive
while a child restarts wait for the next one instead of being refused. A restarted child is given
the slot that was served, by itself.
"""

import asyncio
import contextlib
import importlib.util
import logging
import random
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edge_agent.inference.messages import (
    RESTORING,
    Activate,
    Activated,
    FromServer,
    Refused,
    ServerReady,
    Stats,
)
from edge_agent.inference.trial import CHILD_ENV, describe_exit
from shared.child import Child
from shared.errors import (
    ConfigError,
    PeerError,
    ShoalError,
    UnavailableError,
    UnfitModelError,
)
from shared.files import write_atomic
from shared.listening import require_free_port, require_loopback
from shared.messages import ServedFigures

ADDRESS_FILE = "inference-address"  # in the agent's home while the server runs: host:port
_BACKLOG = 1024
_START_TIMEOUT_S = 60.0  # for a child to say that it is ready
_ACTIVATE_TIMEOUT_S = 120.0  # for a model to load, pass its golden batch and take over
_BIRTH_TIMEOUT_S = _START_TIMEOUT_S + _ACTIVATE_TIMEOUT_S  # until a fresh child has its model back
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 30.0
_STEADY_S = 60.0  # a child that lived so long starts the back-off anew

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServingFacts:
    """What is true now. Counts run on over restarts of the child."""

    address: str  # host:port
    grpc_address: str | None = None  # host:port, where gRPC is served
    version: str | None = None  # digest of the manifest that is served; None: nothing is
    artifact: str | None = None  # digest of the file
    variant: str = ""  # what its manifest calls the file
    requests: int = 0
    errors: int = 0
    p50_ms: float | None = None
    figures: ServedFigures | None = None  # of the version that was served last
    figures_before: ServedFigures | None = None  # of the one before, when it was replaced
    labelled: int = 0  # rows for which a label came back, of this version in this child
    correct: int = 0


@dataclass(frozen=True, slots=True)
class _Pending:
    ticket: int
    answer: "asyncio.Future[Activated]"


class InferenceServer:
    """One inference server, whatever becomes of its process. `run` is a long-lived job."""

    def __init__(
        self,
        home: Path,
        host: str,
        port: int,
        *,
        rng: random.Random,
        grpc_port: int | None = None,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        """Listen.

        Args:
            home: the agent's state folder.
            host: a loopback address.
            port: 0 picks a free one; see `serving`.
            rng: spreads restarts.
            grpc_port: where to serve gRPC, too; 0 picks a free one, None serves none.
            on_loss: told when a fresh child refuses the model that was served: nothing is, then.

        Raises:
            ConfigError: ``host`` is not a loopback address, or gRPC is wanted and not installed.
            UnavailableError: the port is in use.
        """
        self._home, self._rng, self._on_loss = home, rng, on_loss
        self._listener = _listen(host, port)
        try:
            self._grpc = None if grpc_port is None else _reserve_grpc(host, grpc_port)
        except ShoalError:
            self._listener.close()
            raise
        self._facts = ServingFacts(
            _address(host, self._listener),
            None if self._grpc is None else _address(host, self._grpc),
        )
        self._before = (0, 0)  # requests and errors of children that are gone
        self._before_of_version = (0, 0)  # likewise, since the served version took over
        self._slot: Path | None = None
        self._child: Child | None = None
        self._up = asyncio.Event()  # a child is ready, and has its model back
        self._activating = asyncio.Lock()
        self._ticket = RESTORING
        self._pending: _Pending | None = None

    @property
    def serving(self) -> ServingFacts:
        """What is served now, and how well."""
        return self._facts

    @property
    def pid(self) -> int | None:
        """Process id of the child; None between two lives."""
        return None if self._child is None else self._child.pid

    async def run(self) -> None:
        """Keep a child alive until cancelled; then stop it within its deadline."""
        address_path = self._home / ADDRESS_FILE
        write_atomic(address_path, f"{self._facts.address}\n".encode())
        loop = asyncio.get_running_loop()
        delays = self._delays()
        try:
            while True:
                born = loop.time()
                await self._live()
                if loop.time() - born > _STEADY_S:
                    delays = self._delays()
                await asyncio.sleep(next(delays))
        finally:
            address_path.unlink(missing_ok=True)
            self.close()
            self._up.set()  # nobody shall wait for a child any more; see `_ready_child`

    def close(self) -> None:
        """Stop listening; `run` does it at its end."""
        self._listener.close()
        if self._grpc is not None:
            self._grpc.close()

    async def activate(self, slot: Path) -> None:
        """Serve the version in ``slot``; returns when every request goes to it.

        Raises:
            UnfitModelError: it does not work here; the one before goes on serving.
            UnavailableError: no inference server is up to take it.
        """
        async with self._activating:
            child = await self._ready_child()
            self._ticket += 1
            answer: asyncio.Future[Activated] = asyncio.get_running_loop().create_future()
            self._pending = _Pending(self._ticket, answer)
            try:
                async with asyncio.timeout(_ACTIVATE_TIMEOUT_S):
                    await child.send(Activate(ticket=self._ticket, slot=str(slot)))
                    await answer
            except TimeoutError as error:
                self._up.clear()
                child.kill()  # it may hang in the model; a fresh one gets the old model
                raise UnfitModelError(
                    f"the model did not start serving within {_ACTIVATE_TIMEOUT_S:g} seconds"
                ) from error
            finally:
                self._pending = None
            self._slot = slot

    async def _ready_child(self) -> Child:
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._up.wait()
        except TimeoutError as error:
            raise UnavailableError(
                f"the inference server does not start; see {self._log_path}"
            ) from error
        if self._child is None:
            raise UnavailableError("the inference server was stopped; start the agent again")
        return self._child

    async def _live(self) -> None:
        """One life of a child, from start to end, whatever ends it."""
        try:
            self._child = child = await self._start()
        except UnavailableError as error:
            logger.error("%s; trying again", error)  # noqa: TRY400 - the sentence is enough
            return
        ending = "the inference server stopped"
        try:
            async with asyncio.timeout(_BIRTH_TIMEOUT_S) as patience:
                async for message in child.messages(FromServer):
                    await self._hear(child, message)
                    if self._up.is_set():
                        patience.reschedule(None)
                status = await child.wait()
            ending = f"the inference server {describe_exit(status)}"
            logger.error("%s; starting it again; its last words: %s", ending, child.log_tail())
        except TimeoutError:
            ending = "the inference server hung"
            logger.error("%s before it was ready; starting it again", ending)  # noqa: TRY400
        except PeerError:
            logger.exception("the inference server is confused; starting it again")
        finally:
            self._lose_child(ending)
            await child.stop()

    async def _start(self) -> Child:
        number = self._listener.fileno()
        argv = [sys.executable, "-m", "edge_agent.inference.server", f"--fd={number}"]
        if self._facts.grpc_address is not None:
            argv.append(f"--grpc={self._facts.grpc_address}")
        return await Child.start(
            argv,
            name="inference server",
            log_path=self._log_path,
            env=CHILD_ENV,
            pass_fds=[number],
        )

    async def _hear(self, child: Child, message: FromServer) -> None:
        match message:
            case ServerReady():
                if self._slot is None:
                    self._up.set()
                else:
                    await child.send(Activate(ticket=RESTORING, slot=str(self._slot)))
            case Activated():
                self._note_served(message)
                self._up.set()
                self._answer(message)
            case Refused(cause=cause):
                if message.ticket == RESTORING:
                    logger.error("the inference server cannot serve its model again: %s", cause)
                    self._slot = None
                    self._on_loss()
                self._up.set()
                self._answer(message)
            case Stats():
                self._note_stats(message)

    def _note_served(self, activated: Activated) -> None:
        """Count anew for a version that is new; a fresh child may just have its model back."""
        version, artifact = activated.version, activated.artifact
        facts = replace(self._facts, version=version, artifact=artifact, variant=activated.variant)
        known = facts.figures
        if known is None or (known.version, known.artifact) != (version, artifact):
            self._before_of_version = (0, 0)
            fresh = ServedFigures(version=version, artifact=artifact)
            facts = replace(facts, figures=fresh, figures_before=known)
        self._facts = facts

    def _note_stats(self, stats: Stats) -> None:
        requests, errors = self._before
        facts = replace(
            self._facts,
            requests=requests + stats.requests,
            errors=errors + stats.errors,
            p50_ms=stats.p50_ms,
            labelled=stats.labelled,
            correct=stats.correct,
        )
        figures = facts.figures
        if figures is not None and figures.version == stats.version:
            requests, errors = self._before_of_version
            figures = msgspec.structs.replace(
                figures,
                requests=requests + stats.version_requests,
                errors=errors + stats.version_errors,
                p50_ms=stats.p50_ms,
                p95_ms=stats.p95_ms,
            )
        self._facts = replace(facts, figures=figures)

    def _answer(self, message: Activated | Refused) -> None:
        """Wake whoever waits for this answer, if anybody still does."""
        pending = self._pending
        if pending is None or pending.ticket != message.ticket or pending.answer.done():
            return
        if isinstance(message, Activated):
            pending.answer.set_result(message)
        else:
            pending.answer.set_exception(UnfitModelError(message.cause))

    def _lose_child(self, ending: str) -> None:
        """Note that nothing is served, and that nobody will answer."""
        self._child = None
        self._up.clear()
        self._before = (self._facts.requests, self._facts.errors)
        figures = self._facts.figures
        if figures is not None:
            self._before_of_version = (figures.requests, figures.errors)
            if self._pending is None:  # else it died of the model that it was to load
                figures = msgspec.structs.replace(figures, crashes=figures.crashes + 1)
        self._facts = replace(
            self._facts,
            version=None,
            artifact=None,
            variant="",
            p50_ms=None,
            labelled=0,
            correct=0,
            figures=figures,
        )
        if self._pending is not None and not self._pending.answer.done():
            cause = f"{ending} while it loaded the model"
            self._pending.answer.set_exception(UnfitModelError(cause))

    def _delays(self) -> Iterator[float]:
        """Yield seconds to wait before each restart: doubling, with jitter, bounded."""
        ceiling = _FIRST_DELAY_S
        while True:
            yield self._rng.uniform(ceiling / 2, ceiling)
            ceiling = min(2 * ceiling, _LONGEST_DELAY_S)

    @property
    def _log_path(self) -> Path:
        return self._home / "logs" / "inference.log"


def _address(host: str, bound: socket.socket) -> str:
    port: int = bound.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reserve_grpc(host: str, port: int) -> socket.socket:
    """Bind the port without listening: our children may listen there, other users' programs not."""
    if importlib.util.find_spec("grpc") is None:
        raise ConfigError("gRPC is not installed; pip install 'shoal[grpc]', or unset its port")
    require_free_port(host, port, purpose="the gRPC server", option="--grpc-port")
    reserved = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind((host, port))
    return reserved


def _listen(host: str, port: int) -> socket.socket:
    require_loopback(host, purpose="the inference server")
    require_free_port(host, port, purpose="the inference server", option="--inference-port")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        undo.pop_all()
    return listener
