"""The agent's end of the control plane: everything it says is signed, all it hears is checked.

After each connect the agent says who it is and what is true on it (presence, hello, reported
state), then repeats whatever the coordinator has not acknowledged. A message that is altered,
expired, meant for another device or unknown is counted, logged and dropped; it never ends the link.
"""

import asyncio
import contextlib
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta

from edge_agent.enrolment import Enrolment
from edge_agent.inbox import Inbox
from edge_agent.outbox import Outbox, Waiting
from shared.errors import PeerError, UnavailableError
from shared.messages import (
    ALL_DEVICES,
    UP,
    Ack,
    Body,
    CoordinatorPresence,
    Desired,
    Envelope,
    Hello,
    Notice,
    Presence,
    PresenceState,
    Reported,
    Telemetry,
    UpBody,
    decode,
    delivery_of,
    device_subscriptions,
    encode,
    new_envelope,
    topic_of,
)
from shared.mqtt import MqttSession, Outgoing

logger = logging.getLogger(__name__)

_WILL_LIFETIME = timedelta(days=3650)  # signed at the start, said whenever the connection dies
_REPEAT_EVERY_S = 60.0  # between attempts to get unacknowledged messages acknowledged
_GREETING_JITTER_S = 2.0  # spreads a fleet's hellos after the coordinator's restart
_MAX_UNSENT = 200
# Said anew after each connect, or worthless later: these need not be kept while the broker is away.
_NOT_KEPT = (Presence, Hello, Reported, Telemetry)
# These may come any number of times; every other message acts once.
_REPEATABLE = (Ack, CoordinatorPresence, Desired)
_FOR_ALL = (CoordinatorPresence, Notice)


class ControlLink:
    """Signs, keeps, checks and sorts. `run` keeps it up; `send` may be called at any time."""

    def __init__(
        self,
        enrolment: Enrolment,
        *,
        boot: str,
        outbox: Outbox,
        inbox: Inbox,
        hello: Callable[[], Hello],
        reported: Callable[[], Reported],
        receive: Callable[[Envelope], Awaitable[None]],
        now: Callable[[], datetime],
        rng: random.Random,
    ) -> None:
        """Describe the link.

        Args:
            enrolment: who we are and whom we obey.
            boot: id of this life of the daemon; tells a late will from a living device.
            outbox: keeps durable messages.
            inbox: knows which commands were taken.
            hello: what to say of this machine, asked for at each connect.
            reported: what is true now, asked for at each connect.
            receive: gets each command that passed every check, one at a time.
            now: the wall clock, aware UTC.
            rng: draws all jitter.
        """
        self._enrolment = enrolment
        self._boot = boot
        self._outbox = outbox
        self._inbox = inbox
        self._hello = hello
        self._reported = reported
        self._receive = receive
        self._now = now
        self._rng = rng
        self._coordinators_greeting: str | None = None  # id of its latest presence message
        self._unsent: deque[tuple[datetime, Outgoing]] = deque(maxlen=_MAX_UNSENT)
        self._repeating = asyncio.Lock()
        self._greet_again = asyncio.Event()
        self.refused = 0  # messages dropped because a check failed
        will = Presence(state=PresenceState.LOST, boot=boot)
        self._session = MqttSession(
            enrolment.mqtt_url,
            client_id=enrolment.device_id,
            subscriptions=device_subscriptions(fleet=enrolment.fleet, device=enrolment.device_id),
            will=self._outgoing(self._envelope(will, lifetime=_WILL_LIFETIME)),
            on_message=self._take,
            on_connect=self._greet,
            rng=rng,
            ca_pem=enrolment.mqtt_ca_pem,
        )

    @property
    def online(self) -> bool:
        """Whether the broker is connected now."""
        return self._session.connected.is_set()

    async def run(self) -> None:
        """Keep the link up until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._session.run(), name="mqtt-session")
            group.create_task(self._repeat_for_ever(), name="outbox-repeat")
            group.create_task(self._greet_when_asked(), name="greet-again")

    async def send(self, body: UpBody, *, reply_to: str | None = None) -> None:
        """Say ``body`` now, or after the next connect where it still matters then."""
        envelope = self._envelope(body, reply_to=reply_to)
        message = self._outgoing(envelope)
        if delivery_of(body).durable:
            self._keep(envelope, message)
        try:
            await self._session.publish(message)
        except UnavailableError:
            if not delivery_of(body).durable and not isinstance(body, _NOT_KEPT):
                self._unsent.append((envelope.expires_at, message))

    def _keep(self, envelope: Envelope, message: Outgoing) -> None:
        try:
            self._outbox.forget_expired(self._now())
            self._outbox.add(
                Waiting(envelope.id, message.topic, message.payload, envelope.expires_at)
            )
        except UnavailableError as error:  # better said once than not at all
            logger.error("an event is not safe from a crash: %s", error)  # noqa: TRY400

    async def say_hello(self) -> None:
        """Tell the coordinator anew what this machine is and which tasks it has data for."""
        await self.send(self._hello())

    async def say_goodbye(self) -> None:
        """Replace the presence before a clean end, so that nobody waits for this device."""
        await self.send(Presence(state=PresenceState.STOPPED, boot=self._boot))

    async def _greet(self) -> None:
        """Say all that the coordinator has to know after a connect or a restart of its own."""
        await self.send(Presence(state=PresenceState.READY, boot=self._boot))
        await self.send(self._hello())
        await self.send(self._reported())
        await self._send_unsent()
        await self._repeat_unacknowledged()

    async def _send_unsent(self) -> None:
        while self._unsent:
            expires_at, message = self._unsent.popleft()
            if expires_at <= self._now():
                continue
            try:
                await self._session.publish(message)
            except (UnavailableError, asyncio.CancelledError):  # a broken connection cancels us
                self._unsent.appendleft((expires_at, message))
                raise

    async def _repeat_unacknowledged(self) -> None:
        async with self._repeating:
            for waiting in self._outbox.waiting(self._now()):
                lifetime_s = int((waiting.expires_at - self._now()).total_seconds())
                await self._session.publish(
                    Outgoing(waiting.topic, waiting.payload, expiry_s=max(1, lifetime_s))
                )

    async def _repeat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(_REPEAT_EVERY_S)
            with contextlib.suppress(UnavailableError):  # a connect will repeat them
                await self._repeat_unacknowledged()

    async def _greet_when_asked(self) -> None:
        while True:
            await self._greet_again.wait()
            self._greet_again.clear()
            await asyncio.sleep(self._rng.uniform(0, _GREETING_JITTER_S))
            with contextlib.suppress(UnavailableError):  # a connect will greet
                await self._greet()

    async def _take(self, topic: str, sealed: bytes) -> None:
        try:
            envelope = self._check(topic, sealed)
        except PeerError as error:
            self.refused += 1
            logger.warning("refused a message on %s: %s", topic, error)
            return
        if self._is_repeated(envelope):
            logger.debug("message %s was taken before", envelope.id)
            return
        match envelope.body:
            case Ack(ids=ids):
                self._outbox.acknowledge(ids)
            case CoordinatorPresence(state=state):
                self._notice_coordinator(state, envelope.id)
            case Notice(kind="restarting", window_s=window_s):
                self._session.next_connect_within(window_s)
            case _:
                await self._receive(envelope)

    def _notice_coordinator(self, state: str, message_id: str) -> None:
        """Greet a coordinator that connected after us: what we said before may not have reached it.

        It says "ready" anew whenever it connects; the broker repeats that to us unchanged.
        """
        if state == "ready" and message_id != self._coordinators_greeting:
            self._coordinators_greeting = message_id
            self._greet_again.set()

    def _check(self, topic: str, sealed: bytes) -> Envelope:
        """Return the message; raise PeerError unless the coordinator said it, to us, here."""
        envelope = decode(
            sealed,
            device=self._enrolment.device_id,
            trusted=self._enrolment.command_keys,
            now=self._now(),
        )
        body = envelope.body
        if envelope.device == ALL_DEVICES and not isinstance(body, _FOR_ALL):
            raise PeerError(f"{type(body).__name__} must name one device")
        if type(body) in UP or topic != self._topic(body):
            raise PeerError(f"{type(body).__name__} does not belong on this topic")
        return envelope

    def _is_repeated(self, envelope: Envelope) -> bool:
        if isinstance(envelope.body, _REPEATABLE):
            return False
        try:
            return not self._inbox.take(envelope.id, until=envelope.expires_at, now=self._now())
        except UnavailableError as error:  # to obey twice is harmless, not to is not
            logger.error("a command may be obeyed twice: %s", error)  # noqa: TRY400 - a sentence
            return False

    def _envelope(
        self, body: UpBody, *, lifetime: timedelta | None = None, reply_to: str | None = None
    ) -> Envelope:
        return new_envelope(
            body,
            device=self._enrolment.device_id,
            now=self._now(),
            lifetime=lifetime,
            reply_to=reply_to,
        )

    def _outgoing(self, envelope: Envelope) -> Outgoing:
        delivery = delivery_of(envelope.body)
        return Outgoing(
            self._topic(envelope.body),
            encode(envelope, self._enrolment.key),
            qos=delivery.qos,
            retain=delivery.retain,
            expiry_s=int(delivery.expiry.total_seconds()),
        )

    def _topic(self, body: Body) -> str:
        return topic_of(body, fleet=self._enrolment.fleet, device=self._enrolment.device_id)
