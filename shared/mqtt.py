"""The MQTT link of both sides: one session that comes back for ever; the only door to aiomqtt.

What a caller may rely on is tested against two brokers (tests/contract/test_mqtt_link.py). What it
may not: a PUBACK says that the *broker* has a message, never that the other side acted on it, so
whatever matters is acknowledged by the receiver itself (see `Delivery.durable` in messages.py).

The broker keeps the session for an hour, so that a short drop loses no command; a message is
expired by the broker when nobody fetched it in time.
"""

import asyncio
import logging
import math
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from shared.errors import ConfigError, UnavailableError, innermost
from shared.messages import MAX_MESSAGE_BYTES

logger = logging.getLogger(__name__)

MAX_PACKET_BYTES = MAX_MESSAGE_BYTES + 1024  # room for topic and properties; set brokers to this
_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_LONGEST_BACK_OFF_S = 60.0
_STEADY_AFTER_S = 60.0  # a connection that lived so long resets the back-off
_CALL_TIMEOUT_S = 10.0  # for connecting, subscribing and the broker's acknowledgement
_KEEPALIVE_S = 30
_SESSION_EXPIRY_S = 3600
_IN_FLIGHT = 100
_REFUSED = 128  # reason codes from here on are failures


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One message to publish; ``expiry_s`` is how long a broker may keep it, None for ever."""

    topic: str
    payload: bytes
    qos: Literal[0, 1] = 1
    retain: bool = False
    expiry_s: int | None = None


class MqttSession:
    """A session that `run` keeps up; everything else may be called at any time."""

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        subscriptions: Sequence[str],
        will: Outgoing | None,
        on_message: Callable[[str, bytes], Awaitable[None]],
        on_connect: Callable[[], Coroutine[Any, Any, None]],
        rng: random.Random,
        ca_pem: str = "",
    ) -> None:
        """Describe the session; nothing is sent before `run`.

        Args:
            url: ``mqtt://host:port``, or ``mqtts://host:port`` for TLS.
            client_id: names the session at the broker; a second user of it throws out the first.
            subscriptions: topic filters, subscribed again (QoS 1) after each connect.
            will: what the broker publishes when the connection dies without a goodbye.
            on_message: gets topic and payload, one at a time; its errors are logged, never fatal.
            on_connect: called after each connect, beside the delivery of messages.
            rng: draws the back-off.
            ca_pem: what a TLS broker's certificate must be signed by; empty: a CA of the system.

        Raises:
            ConfigError: the URL is of another kind, or the CA is no PEM certificate.
        """
        scheme, self._host, self._port = _parse(url)
        self._tls = _tls_context(ca_pem) if scheme == "mqtts" else None
        self._client_id = client_id
        self._subscriptions = tuple(subscriptions)
        self._will = will
        self._on_message = on_message
        self._on_connect = on_connect
        self._rng = rng
        self._client: aiomqtt.Client | None = None
        self._announced_window_s: float | None = None
        self._waiting_calls: set[asyncio.Timeout] = set()
        self.connected = asyncio.Event()

    def next_connect_within(self, seconds: float) -> None:
        """After an announced restart: come back at a random moment of the next ``seconds``."""
        self._announced_window_s = seconds

    def cut(self) -> None:
        """Break the connection as a crash of this process would, for experiments and tests."""
        wire = self._client and self._client._client.socket()  # noqa: SLF001  # aiomqtt hides it
        if isinstance(wire, socket.socket):
            wire.shutdown(socket.SHUT_RDWR)

    async def publish(self, message: Outgoing) -> None:
        """Send one message; with QoS 1 wait until the broker has it.

        Raises:
            UnavailableError: not connected, or the connection went before the broker had it.
            ValueError: the payload is larger than brokers accept.
        """
        if len(message.payload) > MAX_MESSAGE_BYTES:
            raise ValueError(
                f"payload of {len(message.payload)} bytes for {message.topic} is over "
                f"{MAX_MESSAGE_BYTES}"
            )
        if self._client is None:
            raise self._away("not connected")
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S) as deadline:
                self._waiting_calls.add(deadline)
                try:
                    await self._client.publish(
                        message.topic,
                        message.payload,
                        message.qos,
                        message.retain,
                        _expiry(PacketTypes.PUBLISH, message.expiry_s),
                        timeout=math.inf,
                    )
                finally:
                    self._waiting_calls.discard(deadline)
        except (aiomqtt.MqttError, TimeoutError) as error:
            raise self._away(str(error) or "no acknowledgement") from error

    async def run(self) -> None:
        """Connect, serve, and connect again, until cancelled (which says a clean goodbye)."""
        clock = asyncio.get_running_loop().time
        failures, said = 0, ""
        while True:
            started, cause = clock(), "closed"
            try:
                await self._serve_one_connection()
            except* (aiomqtt.MqttError, UnavailableError) as group:
                cause = str(innermost(group))
            failures = 0 if clock() - started >= _STEADY_AFTER_S else failures + 1
            delay_s = self._draw_delay(failures)
            where = f"{self._host}:{self._port}"
            level = logging.DEBUG if cause == said else logging.WARNING
            said = cause
            logger.log(level, "broker at %s is away (%s), trying in %.1f s", where, cause, delay_s)
            await asyncio.sleep(delay_s)

    async def _serve_one_connection(self) -> None:
        """Hold one connection until it breaks, which raises MqttError."""
        client = self._new_client()
        async with client:
            try:
                await self._subscribe(client)
                self._client = client
                self.connected.set()
                logger.info("connected to the broker at %s:%d", self._host, self._port)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._on_connect(), name="mqtt-on-connect")
                    async for message in client.messages:
                        await self._hand_over(message)
            finally:
                self._forget_connection()

    async def _subscribe(self, client: aiomqtt.Client) -> None:
        for topic_filter in self._subscriptions:
            codes = await client.subscribe(topic_filter, qos=1)
            values = [code if isinstance(code, int) else code.value for code in codes]
            if max(values) >= _REFUSED:
                raise UnavailableError(f"the broker refused the subscription to {topic_filter}")

    async def _hand_over(self, message: aiomqtt.Message) -> None:
        payload = message.payload
        if not isinstance(payload, bytes):  # a retained message that was cleared
            return
        try:
            await self._on_message(str(message.topic), payload)
        except Exception:  # one bad message must not end the link
            logger.exception("message on %s could not be handled", message.topic)

    def _forget_connection(self) -> None:
        """Let every call that waits for the broker know at once that it waits in vain."""
        self._client = None
        self.connected.clear()
        now = asyncio.get_running_loop().time()
        for deadline in self._waiting_calls:
            if not deadline.expired():  # asyncio refuses to move one that has just passed
                deadline.reschedule(now)

    def _draw_delay(self, failures: int) -> float:
        """Return the seconds before the next attempt: full jitter, so that no fleet marches."""
        window_s = self._announced_window_s
        self._announced_window_s = None
        if window_s is None:
            window_s = min(_LONGEST_BACK_OFF_S, 2.0 ** min(failures, 10))
        return self._rng.uniform(0, window_s)

    def _new_client(self) -> aiomqtt.Client:
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = _SESSION_EXPIRY_S
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        client = aiomqtt.Client(
            self._host,
            self._port,
            identifier=self._client_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=False,
            properties=properties,
            will=_as_will(self._will),
            keepalive=_KEEPALIVE_S,
            timeout=_CALL_TIMEOUT_S,
            max_inflight_messages=_IN_FLIGHT,
            tls_context=self._tls,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        client.pending_calls_threshold = 10 * _IN_FLIGHT
        return client

    def _away(self, cause: str) -> UnavailableError:
        return UnavailableError(
            f"the broker at {self._host}:{self._port} is away ({cause}); is the coordinator up?"
        )


def _parse(url: str) -> tuple[str, str, int]:
    """Split ``mqtt://host:port`` or ``mqtts://…``; raise ConfigError for anything else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or parts.scheme not in _DEFAULT_PORTS:
        raise ConfigError(
            f"{url!r} is not an MQTT address; write mqtt://host:port, or mqtts:// for TLS"
        )
    return parts.scheme, host, port or _DEFAULT_PORTS[parts.scheme]


def _tls_context(ca_pem: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cadata=ca_pem or None)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            "the broker's CA is no certificate in PEM form; check the file that broker_ca names"
        ) from error


def _as_will(message: Outgoing | None) -> aiomqtt.Will | None:
    if message is None:
        return None
    return aiomqtt.Will(
        message.topic,
        message.payload,
        message.qos,
        message.retain,
        _expiry(PacketTypes.WILLMESSAGE, message.expiry_s),
    )


def _expiry(packet: int, expiry_s: int | None) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    if expiry_s is not None:
        properties.MessageExpiryInterval = expiry_s
    return properties
