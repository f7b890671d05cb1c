"""A broker whose wire is tapped: everything published goes through here, one message at a time.

While a hook runs, nothing moves on any connection: what it kills is dead before the message that it
saw is delivered, and what it publishes comes before that message.
"""

import asyncio
import base64
import contextlib
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cloud_coordinator.broker import plan_broker, start_broker
from shared.listening import free_port

_PUBLISH = 3
_START_DEADLINE_S = 30.0
PROGRAMS = "/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin"


@dataclass(frozen=True, slots=True)
class Published:
    """One message on its way to the broker."""

    topic: str
    payload: bytes

    @property
    def envelope(self) -> Mapping[str, Any]:
        """What was signed; empty where it is none of ours."""
        try:
            sealed = msgspec.json.decode(self.payload)
            envelope: Mapping[str, Any] = msgspec.json.decode(base64.b64decode(sealed["payload"]))
        except (msgspec.DecodeError, ValueError, KeyError, TypeError):
            return {}
        return envelope

    @property
    def body(self) -> Mapping[str, Any]:
        """The message itself."""
        body: Mapping[str, Any] = self.envelope.get("body", {})
        return body

    @property
    def kind(self) -> str:
        """Its type and, of a stage of a secure sum, the stage."""
        return " ".join(filter(None, (self.body.get("type"), self.body.get("stage"))))


Hook = Callable[[Published], Iterable[Published]]


class MqttTap:
    """The tapped broker; `hook` sees each message and says what to publish before it."""

    def __init__(self, home: Path) -> None:
        self.port = free_port()
        self.published: list[Published] = []
        self.hook: Hook = lambda _: ()
        self.failure: BaseException | None = None  # of the hook
        self._home, self._broker_port = home, free_port()
        self._loop = asyncio.new_event_loop()
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._run()])
        self._thread.start()
        assert self._ready.wait(_START_DEADLINE_S)

    @property
    def url(self) -> str:
        """Where coordinator and devices meet."""
        return f"mqtt://127.0.0.1:{self.port}"

    def close(self) -> None:
        """End the broker."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        kind = "mosquitto" if shutil.which("mosquitto", path=PROGRAMS) else "embedded"
        plan = plan_broker(kind, host="127.0.0.1", port=self._broker_port)
        broker = await start_broker(plan, home=self._home)
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self._ready.set()
        await self._stop.wait()
        server.close()
        await broker.stop()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._broker_port)
        back = asyncio.ensure_future(_copy(to_reader, writer))
        try:
            while True:
                head, packet = await _next_packet(reader)
                if head >> 4 == _PUBLISH:
                    for forged in self._note(_read_publish(head, packet)):
                        to_writer.write(_publish_packet(forged))
                to_writer.write(bytes([head]) + _length(len(packet)) + packet)
                await to_writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            back.cancel()
            for one in (writer, to_writer):
                one.close()
                with contextlib.suppress(ConnectionError):
                    await one.wait_closed()

    def _note(self, message: Published) -> Iterable[Published]:
        self.published.append(message)
        try:
            return tuple(self.hook(message))
        except BaseException as error:  # noqa: BLE001  # the test asks for it
            self.failure = error
            return ()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while content := await reader.read(1 << 16):
            writer.write(content)
            await writer.drain()
        writer.close()


async def _next_packet(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readexactly(1))[0]
    length = shift = 0
    while True:
        (byte,) = await reader.readexactly(1)
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return head, await reader.readexactly(length)


def _read_publish(head: int, packet: bytes) -> Published:
    end = 2 + int.from_bytes(packet[:2], "big")
    topic = packet[2:end].decode()
    start = end + (2 if head & 0b110 else 0)
    properties = shift = 0
    while True:
        byte = packet[start]
        start += 1
        properties |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return Published(topic, packet[start + properties :])


def _publish_packet(message: Published) -> bytes:
    """Return a PUBLISH of QoS 0, MQTT 5, without properties."""
    topic = message.topic.encode()
    packet = len(topic).to_bytes(2, "big") + topic + b"\0" + message.payload
    return bytes([_PUBLISH << 4]) + _length(len(packet)) + packet


def _length(value: int) -> bytes:
    encoded = bytearray()
    while True:
        value, byte = divmod(value, 128)
        encoded.append(byte | (128 if value else 0))
        if not value:
            return bytes(encoded)
