"""The coordinator's end of the control plane: MQTT in, typed and proven messages out, and back.

Every message is checked against the identity key of the device in whose topic it came; what fails
is counted by reason, logged and dropped. A durable message is acknowledged only after its handler
has stored it.
"""

import logging
import random
import uuid
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from cloud_coordinator.devices.authentication import KnowsDevices
from shared.errors import NotFoundError, PeerError, UnavailableError
from shared.messages import (
    ALL_DEVICES,
    Ack,
    CoordinatorPresence,
    DownBody,
    Envelope,
    Notice,
    coordinator_subscriptions,
    decode,
    delivery_of,
    device_of_topic,
    encode,
    new_envelope,
    topic_of,
)
from shared.mqtt import MqttSession, Outgoing
from shared.signing import SigningKey

logger = logging.getLogger(__name__)

Handler = Callable[[Envelope], Awaitable[None]]

_MOST_REMEMBERED = 100_000  # messages, some 20 MB; a device chooses how long its own are valid


class ControlLink:
    """Keeps the link up (`run`), hands over what devices say, and sends what they should hear."""

    def __init__(
        self,
        url: str,
        *,
        fleet: str,
        key: SigningKey,
        devices: KnowsDevices,
        on_message: Handler,
        on_connect: Callable[[], Awaitable[None]],
        clock: Callable[[], datetime],
        rng: random.Random,
        ca_pem: str = "",
    ) -> None:
        """Describe the link.

        Args:
            url: ``mqtt://host:port``, or ``mqtts://host:port`` for TLS.
            fleet: part of every topic.
            key: the command key.
            devices: knows whose key must have signed.
            on_message: stores or carries out one message; a durable one is acknowledged after it.
            on_connect: called after each connect, once our presence is out.
            clock: returns aware UTC.
            rng: draws the back-off.
            ca_pem: see `MqttSession`.
        """
        self.epoch = uuid.uuid4().hex  # a new one asks agents to introduce themselves again
        self.received: Counter[str] = Counter()  # by type of message
        self.refused: Counter[str] = Counter()  # by reason
        self._fleet, self._key, self._clock = fleet, key, clock
        self._devices = devices
        self._taken = _Taken()
        self._handle = on_message
        self._after_connect = on_connect
        self._session = MqttSession(
            url,
            client_id=f"shoal-coordinator-{fleet}",
            subscriptions=coordinator_subscriptions(fleet=fleet),
            will=self._seal(CoordinatorPresence("stopped", self.epoch), ALL_DEVICES, None),
            on_message=self._take,
            on_connect=self._greet,
            rng=rng,
            ca_pem=ca_pem,
        )

    @property
    def connected(self) -> bool:
        """Whether a broker is there now."""
        return self._session.connected.is_set()

    async def wait_connected(self) -> None:
        """Wait until a broker is there."""
        await self._session.connected.wait()

    async def run(self) -> None:
        """Stay connected until cancelled."""
        await self._session.run()

    async def send(
        self,
        body: DownBody,
        *,
        device: str,
        lifetime: timedelta | None = None,
        reply_to: str | None = None,
    ) -> None:
        """Sign and publish ``body``; raise UnavailableError while no broker is there."""
        await self._session.publish(self._seal(body, device, lifetime, reply_to))

    async def try_send(
        self, body: DownBody, *, device: str, lifetime: timedelta | None = None
    ) -> bool:
        """As `send`, for what is said again anyway; return whether the broker has it."""
        try:
            await self.send(body, device=device, lifetime=lifetime)
        except UnavailableError as error:
            logger.warning("%s for %s not sent: %s", type(body).__name__, device, error)
            return False
        return True

    async def say_goodbye(self, window_s: float) -> None:
        """Tell everybody that we come back, and to spread over ``window_s`` when we do."""
        await self.try_send(Notice("restarting", window_s), device=ALL_DEVICES)
        await self.try_send(CoordinatorPresence("stopped", self.epoch), device=ALL_DEVICES)

    async def _greet(self) -> None:
        await self.try_send(CoordinatorPresence("ready", self.epoch), device=ALL_DEVICES)
        await self._after_connect()

    async def _take(self, topic: str, payload: bytes) -> None:
        try:
            envelope = await self._open(topic, payload)
        except NotFoundError as error:
            self._refuse("unknown-device", topic, error)
        except PeerError as error:
            self._refuse("bad-message", topic, error)
        else:
            self.received[type(envelope.body).__name__] += 1
            delivery = delivery_of(envelope.body)
            # What is retained says how things are, and is true again after each reconnect.
            if delivery.retain or self._taken.is_new(envelope, self._clock()):
                await self._handle(envelope)
                self._taken.add(envelope)
            if delivery.durable:
                await self.try_send(Ack((envelope.id,)), device=envelope.device)

    async def _open(self, topic: str, payload: bytes) -> Envelope:
        device = device_of_topic(topic)
        key = await self._devices.identity_key(device)
        trusted = {key.key_id: key}
        envelope = decode(payload, device=device, trusted=trusted, now=self._clock())
        if topic != topic_of(envelope.body, fleet=self._fleet, device=device):
            raise PeerError(f"{type(envelope.body).__name__} does not belong on {topic}")
        if envelope.sent_at.tzinfo is None:
            raise PeerError(f"{device} says when without saying in which time zone")
        if envelope.device != device:
            raise PeerError(f"a message for everybody came from {device}")
        return envelope

    def _refuse(self, reason: str, topic: str, error: Exception) -> None:
        self.refused[reason] += 1
        logger.warning("message on %s refused: %s", topic, error, extra={"reason": reason})

    def _seal(
        self,
        body: DownBody,
        device: str,
        lifetime: timedelta | None,
        reply_to: str | None = None,
    ) -> Outgoing:
        envelope = new_envelope(
            body, device=device, now=self._clock(), lifetime=lifetime, reply_to=reply_to
        )
        delivery = delivery_of(body)
        return Outgoing(
            topic=topic_of(body, fleet=self._fleet, device=device),
            payload=encode(envelope, self._key),
            qos=delivery.qos,
            retain=delivery.retain,
            expiry_s=int((lifetime or delivery.expiry).total_seconds()),
        )


class _Taken:
    """Which messages were handled already, so that one that arrives twice has one effect.

    An id is remembered until its message is expired, or too many others came after it. What must
    have one effect over a restart, too, is stored by its handler under its id.
    """

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[str, str], datetime] = OrderedDict()

    def is_new(self, envelope: Envelope, now: datetime) -> bool:
        """Say whether it was not handled yet, and forget what can come no more."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        return (envelope.device, envelope.id) not in self._until

    def add(self, envelope: Envelope) -> None:
        """Remember a message that was handled."""
        self._until[envelope.device, envelope.id] = envelope.expires_at
        if len(self._until) > _MOST_REMEMBERED:
            self._until.popitem(last=False)
