"""The coordinator's hand on its SuperLink child: start, let node keys in and out, stop.

Free of Flower: the child alone imports it. A SuperLink has one life; after its end (`wait`) make a
new one, register the keys again and begin a new session of every run.
"""

import asyncio
import contextlib
import itertools
import logging
import secrets
import sys
from pathlib import Path
from typing import Any

import msgspec

from cloud_coordinator.flower.superlink_messages import (
    QUIET_FLOWER,
    FromSuperLink,
    NodeRefused,
    NodeRegistered,
    NodeUnregistered,
    RegisterNode,
    StartSuperLink,
    SuperLinkReady,
    SuperLinkSecrets,
    ToSuperLink,
    UnregisterNode,
)
from cloud_coordinator.flower.tls import TlsFiles, ensure_tls
from shared.child import Child
from shared.errors import ConfigError, PeerError, UnavailableError
from shared.files import write_private
from shared.listening import require_free_port
from shared.messages import utc_now

logger = logging.getLogger(__name__)
_HOST = "127.0.0.1"
_START_DEADLINE_S = 60.0
_ANSWER_DEADLINE_S = 10.0


class SuperLink:
    """A running SuperLink. Make one with `SuperLink.start`."""

    def __init__(self, child: Child, *, ca_pem: str, secrets_path: Path) -> None:
        self.ca_pem = ca_pem
        self.secrets_path = secrets_path
        self._child = child
        self._ready: asyncio.Future[SuperLinkReady] = asyncio.get_running_loop().create_future()
        self._requests = itertools.count()
        self._waiting: dict[int, asyncio.Future[FromSuperLink]] = {}
        self._reader = asyncio.create_task(self._read(), name="superlink-messages")

    @classmethod
    async def start(cls, home: Path, *, public_port: int = 0) -> "SuperLink":
        """Start the child and wait until both listeners accept.

        Args:
            home: the coordinator's state folder; TLS files and secrets lie in its ``flower``.
            public_port: of the Fleet API; 0 takes any free one.

        Raises:
            UnavailableError: the port is in use, or the child did not come up in time.
        """
        folder = home / "flower"
        if public_port:
            require_free_port(_HOST, public_port, purpose="the Fleet API", option="--fleet-port")
        tls = ensure_tls(folder, now=utc_now())
        secrets_path = _write_secrets(folder / "secrets.json")
        child = await Child.start(
            [sys.executable, "-m", "cloud_coordinator.flower.superlink_process"],
            name="SuperLink",
            log_path=home / "logs" / "superlink.log",
            env={
                **QUIET_FLOWER,
                "FLWR_LOG_LEVEL": "WARNING",
                # glibc would keep a heap per thread; one heap serves large uploads with less.
                "MALLOC_ARENA_MAX": "1",
                "FLWR_HOME": str(folder / "flwr-home"),
            },
        )
        superlink = cls(child, ca_pem=tls.ca.read_text(), secrets_path=secrets_path)
        await superlink._come_up(tls, public_port)
        return superlink

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._child.pid

    @property
    def public_address(self) -> str:
        """Where devices reach the Fleet API, ``host:port``."""
        return f"{_HOST}:{self._ready.result().public_port}"

    @property
    def private_address(self) -> str:
        """Where run workers reach everything, ``host:port``."""
        return f"{_HOST}:{self._ready.result().private_port}"

    async def register_node(self, public_key_pem: str, name: str) -> int:
        """Let a node key in and return its node id; the same one if it is in already.

        Raises:
            ConfigError: the key is no key on a NIST curve, or was unregistered in this life.
            UnavailableError: the SuperLink is gone or does not answer.
        """
        answer = await self._ask(RegisterNode(next(self._requests), public_key_pem, name))
        match answer:
            case NodeRegistered(node_id=node_id):
                return node_id
            case NodeRefused(cause=cause):
                raise ConfigError(cause)
            case _:
                raise PeerError(f"SuperLink answered a registration with {answer}")

    async def unregister_node(self, node_id: int) -> None:
        """Shut a node out at once; its key stays out for this life of the SuperLink."""
        await self._ask(UnregisterNode(next(self._requests), node_id))

    async def wait(self) -> int:
        """Wait for the child's end and return its exit status."""
        return await self._child.wait()

    async def stop(self) -> None:
        """End the child within a deadline."""
        await self._child.stop()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader

    async def _come_up(self, tls: TlsFiles, public_port: int) -> None:
        start = StartSuperLink(
            public_port=public_port,
            certificate_path=str(tls.certificate),
            key_path=str(tls.key),
            secrets_path=str(self.secrets_path),
        )
        await self._child.send(start)
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), _START_DEADLINE_S)
        except (TimeoutError, UnavailableError) as error:
            await self.stop()
            raise UnavailableError(
                f"the SuperLink did not come up; see {self._child.log_path}: "
                f"{self._child.log_tail(1)}"
            ) from error
        logger.info("SuperLink is up, Fleet API at %s", self.public_address)

    async def _ask(self, message: ToSuperLink) -> FromSuperLink:
        assert not isinstance(message, StartSuperLink)
        if self._reader.done():
            raise _gone()
        answer: asyncio.Future[FromSuperLink] = asyncio.get_running_loop().create_future()
        self._waiting[message.request] = answer
        try:
            await self._child.send(message)
            return await asyncio.wait_for(answer, _ANSWER_DEADLINE_S)
        except TimeoutError as error:
            raise _gone() from error
        finally:
            del self._waiting[message.request]

    async def _read(self) -> None:
        try:
            async for message in self._child.messages(FromSuperLink):
                self._take(message)
        finally:
            unanswered: list[asyncio.Future[Any]] = [self._ready, *self._waiting.values()]
            for future in unanswered:
                if not future.done():
                    future.set_exception(_gone())
                    future.exception()  # whether or not anybody waits for it

    def _take(self, message: FromSuperLink) -> None:
        match message:
            case SuperLinkReady():
                self._ready.set_result(message)
            case (
                NodeRegistered(request=number)
                | NodeUnregistered(request=number)
                | NodeRefused(request=number)
            ):
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message)


def _write_secrets(path: Path) -> Path:
    fresh = SuperLinkSecrets(control=secrets.token_hex(32), superexec=secrets.token_hex(32))
    write_private(path, msgspec.json.encode(fresh))
    return path


def _gone() -> UnavailableError:
    return UnavailableError("the SuperLink is gone; start it again")
