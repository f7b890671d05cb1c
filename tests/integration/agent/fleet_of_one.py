"""One real agent daemon, one real broker, and a coordinator that signs what a test tells it to."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import msgspec

from cloud_coordinator.broker import BrokerPlan, start_broker
from edge_agent.data_registry import DataEntry, DataRegistry
from edge_agent.enrolment import _load_or_create_node_key
from edge_agent.privacy.policy import POLICY_FILE
from shared.child import Child
from shared.enrolment import REPLY_PAYLOAD_TYPE, EnrolmentReply
from shared.listening import free_port
from shared.messages import (
    ALL_DEVICES,
    Ack,
    AnyBody,
    Body,
    CoordinatorPresence,
    Envelope,
    coordinator_subscriptions,
    decode,
    delivery_of,
    encode,
    new_envelope,
    topic_of,
    utc_now,
)
from shared.mqtt import MqttSession, Outgoing
from shared.signing import SigningKey, seal
from shared.tasks.spec import TaskSpec
from tests.repository_simulator import RepositorySimulator

DEVICE = "edge-1"
FLEET = "main"
TIME_LIMIT_S = 60.0  # on a machine that does much else
DIGITS = TaskSpec("digits", "image-classification")


def make_home(
    home: Path, *, command_key: SigningKey, mqtt_url: str, api_url: str = "http://127.0.0.1:1"
) -> SigningKey:
    """Write what enrolment leaves behind; return the device's identity."""
    identity = SigningKey.load_or_create(home / "identity.pem")
    _load_or_create_node_key(home / "node.pem")
    reply = EnrolmentReply(
        device_id=DEVICE,
        fleet=FLEET,
        command_key=str(command_key.public),
        model_key=str(command_key.public),
        api_url=api_url,
        mqtt_url=mqtt_url,
        superlink_ca_pem="",
        fleet_key=str(command_key.public),
        root_metadata=RepositorySimulator().root,
    )
    (home / POLICY_FILE).write_text("individual_updates = true\n")
    (home / "command-key-id").write_text(command_key.public.key_id)
    (home / "enrolment.json").write_bytes(
        seal(msgspec.json.encode(reply), payload_type=REPLY_PAYLOAD_TYPE, key=command_key)
    )
    return identity


def add_data(home: Path, task: TaskSpec, *, train_rows: int = 100) -> None:
    """Register data for ``task`` as ``shoal-agent data add`` would."""
    DataRegistry(home).add(
        DataEntry(
            name=task.name,
            path=str(home),
            task=task,
            usable_rows=train_rows,
            skipped={},
            train_rows=train_rows,
            held_out_rows=0,
            digest="0" * 64,
            checked_at=datetime(2026, 11, 23, tzinfo=UTC),
        )
    )


@contextlib.asynccontextmanager
async def api_without_models() -> AsyncIterator[str]:
    """Serve an HTTP API that answers every request with 404; yield its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


class Broker:
    """The embedded broker on one port, over restarts."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._plan = BrokerPlan("embedded", "127.0.0.1", free_port())
        self._child: Child | None = None
        self.url = self._plan.url

    async def start(self) -> None:
        self._child = await start_broker(self._plan, home=self._home)

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop()
            self._child = None


class _Impatient(random.Random):
    """Comes back soon."""

    def uniform(self, a: float, b: float) -> float:
        return a + min(0.1, b - a)


class Coordinator:
    """Keeps all that the device says, acknowledges on request, and sends anything."""

    def __init__(self, url: str, identity: SigningKey, key: SigningKey) -> None:
        self.key = key
        self.heard: list[Envelope] = []
        self.acknowledges = True
        self._trusted = {identity.public.key_id: identity.public}
        self._changed = asyncio.Condition()
        self._session = MqttSession(
            url,
            client_id="coordinator",
            subscriptions=coordinator_subscriptions(fleet=FLEET),
            will=None,
            on_message=self._take,
            on_connect=self._nothing,
            rng=_Impatient(),
        )

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[Self]:
        task = asyncio.create_task(self._session.run())
        try:
            async with asyncio.timeout(TIME_LIMIT_S):
                await self._session.connected.wait()
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def come_back(self) -> None:
        """Reconnect after a broker restart and say so, as the real one does on each connect."""
        async with asyncio.timeout(TIME_LIMIT_S):
            await self._session.connected.wait()
        await self.send(CoordinatorPresence(state="ready", epoch="same"))

    async def until_disconnected(self) -> None:
        async with asyncio.timeout(TIME_LIMIT_S):
            while self._session.connected.is_set():  # noqa: ASYNC110 only "connected" is an event
                await asyncio.sleep(0.01)

    async def _nothing(self) -> None:
        pass

    async def _take(self, topic: str, payload: bytes) -> None:
        envelope = decode(payload, device=DEVICE, trusted=self._trusted, now=utc_now())
        assert topic == topic_of(envelope.body, fleet=FLEET, device=DEVICE)
        async with self._changed:
            self.heard.append(envelope)
            self._changed.notify_all()
        if delivery_of(envelope.body).durable and self.acknowledges:
            await self.send(Ack(ids=(envelope.id,)))

    def bodies(self, kind: type[Body]) -> list[Any]:
        return [envelope.body for envelope in self.heard if isinstance(envelope.body, kind)]

    async def until(self, condition: Callable[[Self], bool]) -> None:
        async with asyncio.timeout(TIME_LIMIT_S), self._changed:
            await self._changed.wait_for(lambda: condition(self))

    async def until_heard(self, kind: type[Body], **fields: object) -> Any:
        """Wait for a message of this kind whose fields have these values; return the latest."""

        def matching() -> list[Any]:
            return [
                body
                for body in self.bodies(kind)
                if all(getattr(body, name) == value for name, value in fields.items())
            ]

        await self.until(lambda _: bool(matching()))
        return matching()[-1]

    def sign(
        self,
        body: AnyBody,
        *,
        device: str = DEVICE,
        age: timedelta = timedelta(),
        lifetime: timedelta | None = None,
        key: SigningKey | None = None,
    ) -> bytes:
        envelope = new_envelope(body, device=device, now=utc_now() - age, lifetime=lifetime)
        return encode(envelope, key or self.key)

    async def send(self, body: AnyBody, *, device: str = DEVICE) -> None:
        if topic_of(body, fleet=FLEET, device=DEVICE).split("/")[3] != "d":
            device = ALL_DEVICES
        await self.send_raw(body, self.sign(body, device=device))

    async def send_raw(self, topic_for: AnyBody, payload: bytes) -> None:
        """Publish ``payload`` where ``topic_for`` would travel."""
        delivery = delivery_of(topic_for)
        await self._session.publish(
            Outgoing(
                topic_of(topic_for, fleet=FLEET, device=DEVICE),
                payload,
                qos=delivery.qos,
                retain=delivery.retain,
            )
        )


class Daemon:
    """``shoal-agent run`` as a process."""

    def __init__(self, process: asyncio.subprocess.Process, home: Path) -> None:
        self.process, self.home = process, home

    @property
    def log(self) -> str:
        return (self.home / "daemon.log").read_text()

    async def ended(self) -> int:
        async with asyncio.timeout(TIME_LIMIT_S):
            return await self.process.wait()

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        self.process.kill()
        await self.ended()


@contextlib.asynccontextmanager
async def daemon(
    home: Path, *options: str, env: Mapping[str, str] | None = None
) -> AsyncIterator[Daemon]:
    """Start ``shoal-agent run`` and see to it that it ends."""
    with (home / "daemon.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *agent_command("run", home),
            "--inference-port=0",
            *options,
            stderr=log,
            env={**os.environ, **(env or {})},
        )
    try:
        yield Daemon(process, home)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def agent_command(command: str, home: Path) -> tuple[str, ...]:
    return (sys.executable, "-m", "edge_agent", command, "--home", str(home))


async def read_status(home: Path) -> dict[str, Any]:
    """Return what ``shoal-agent status --json`` says."""
    process = await asyncio.create_subprocess_exec(
        *agent_command("status", home), "--json", stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    status: dict[str, Any] = json.loads(printed)
    return status


def children_of(pid: int) -> set[int]:
    """Return the direct children of a process, from /proc."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.update(int(child) for child in (task / "children").read_text().split())
    return found


async def until_gone(pids: Iterable[int]) -> None:
    """Wait until none of these processes runs."""
    async with asyncio.timeout(TIME_LIMIT_S):
        while any(_runs(pid) for pid in pids):  # noqa: ASYNC110 a foreign process has no event
            await asyncio.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
