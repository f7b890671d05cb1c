"""Many devices of secure sums in one process: ``python -m …light_sums``, over pipes.

Each has what a device has towards the outside: a node at the SuperLink, an MQTT session with
messages signed by its own key, and a `SumClient`. It has no data and no disk: its vector is drawn
from a seed, so that whoever knows the seed can add up the plain ones, and no ledger is kept.
"""

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode

from edge_agent.flower_node import FlowerNode
from edge_agent.secure_messages import reply_with, sealed_config_in, stage_question_in
from shared.child import ParentLink, die_with_parent
from shared.errors import PeerError, ShoalError
from shared.logs import configure_logging
from shared.membership import Member
from shared.messages import (
    JoinedRun,
    Nudge,
    Presence,
    PresenceState,
    ReplyWaiting,
    SumAnswer,
    SumQuestion,
    UpBody,
    decode,
    delivery_of,
    device_subscriptions,
    encode,
    new_envelope,
    topic_of,
    utc_now,
)
from shared.mqtt import MqttSession, Outgoing
from shared.secure_sum import messages as sums
from shared.secure_sum.client import SumClient
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE, SumConfig, decode_config, digest_of
from shared.secure_sum.masking import Lanes
from shared.signing import SigningKey, VerifyingKey, open_sealed
from simulations.benchmarks.probe_apps import TASK
from simulations.benchmarks.secure_session import random_lanes

logger = logging.getLogger(__name__)
RUN = SESSION = "bench"
_START_DEADLINE_S = 60.0
_THREADS = 8  # for what blocks: the rest is one core's work anyway
_LARGEST_EXACT = 1000


class LightDevice(msgspec.Struct, frozen=True, kw_only=True):
    """One device, with its private keys: they are of this benchmark alone."""

    device_id: str
    place: int  # what its vectors are drawn from
    identity: bytes  # raw
    node_key: str  # in OpenSSH form


class StartDevices(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First line to the child."""

    fleet: str
    devices: tuple[LightDevice, ...]
    identities: dict[str, str]  # of the whole fleet: base64 by device id
    command_key: str  # base64
    superlink_address: str
    superlink_ca_pem: str
    mqtt_url: str
    mqtt_ca_pem: str


class BeginRound(msgspec.Struct, frozen=True, tag="begin"):
    """Come back, all of you, and be lost when your stage is asked for."""

    number: int
    lost_at: dict[str, sums.Stage]  # by device id


ToDevices = StartDevices | BeginRound


class DevicesReady(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """All are connected, and have spent so much since the start."""

    protocol_s: float  # processor time within the protocol: keys, shares, masks, signatures
    processor_s: float  # of the whole process, with Flower, MQTT and TLS


def drawn_lanes(config: SumConfig, *, place: int) -> Lanes:
    """Draw what the device at ``place`` contributes in this round."""
    rng = np.random.default_rng([config.round_number, place])
    lanes = random_lanes(config, rng)
    lanes.exact[:] = rng.integers(0, _LARGEST_EXACT, len(lanes.exact))
    return lanes


class _Stopwatch:
    """Adds up the processor time that threads spend on the protocol."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        begun = time.thread_time()
        try:
            yield
        finally:
            spent = time.thread_time() - begun
            with self._lock:
                self.spent_s += spent


class _Sums:
    """The part of one device in the sum of the round, whatever carries the questions."""

    def __init__(self, device: LightDevice, start: StartDevices, watch: _Stopwatch) -> None:
        self.identity = SigningKey(Ed25519PrivateKey.from_private_bytes(device.identity))
        self._device, self._watch = device, watch
        command = VerifyingKey.from_text(start.command_key)
        self._trusted = {command.key_id: command}
        now = utc_now()
        self._members = {
            device_id: Member(device_id, VerifyingKey.from_text(text), now)
            for device_id, text in start.identities.items()
        }
        self._lock = threading.Lock()
        self._client: SumClient | None = None
        self._session = b""
        self._lanes: Lanes | None = None

    def advertise(self, sealed_config: bytes) -> bytes:
        """S0: what a device does before it trains, and after."""
        with self._lock:
            with self._watch.running():
                payload = open_sealed(
                    sealed_config, payload_type=CONFIG_PAYLOAD_TYPE, trusted=self._trusted
                )
                config = decode_config(payload)
            self._lanes, self._session = drawn_lanes(config, place=self._device.place), b""
            with self._watch.running():
                self._client = SumClient(
                    config,
                    digest_of(payload),
                    device_id=self._device.device_id,
                    identity=self.identity,
                    members=self._members,
                )
                self._session = config.session
                return sums.encode(self._client.advertise())

    def mask(self, session: bytes, question: bytes) -> tuple[bytes, Lanes]:
        """S2."""
        with self._lock, self._watch.running():
            client, lanes = self._client_of(session), self._lanes
            assert lanes is not None
            return sums.encode(client.mask(sums.decode(question, sums.Boxes), lanes)), lanes

    def answer(self, session: bytes, stage: str, question: bytes) -> bytes:
        """S1, S2c and S3."""
        with self._lock, self._watch.running():
            client = self._client_of(session)
            match stage:
                case "share":
                    said = client.share(sums.decode(question, sums.Roster))
                case "consent":
                    said = client.consent(sums.decode(question, sums.Survivors))
                case _:
                    said = client.reveal(sums.decode(question, sums.Unmask))
            return sums.encode(said)

    def _client_of(self, session: bytes) -> SumClient:
        if self._client is None or session != self._session:
            raise PeerError("no such session was opened on this device")
        return self._client


class _Device:
    """One light device; its questions are answered in the threads of ``pool``."""

    def __init__(
        self,
        device: LightDevice,
        start: StartDevices,
        *,
        watch: _Stopwatch,
        pool: ThreadPoolExecutor,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.device_id, self._fleet = device.device_id, start.fleet
        self._pool, self._loop = pool, loop
        self._sums = _Sums(device, start, watch)
        command = VerifyingKey.from_text(start.command_key)
        self._trusted = {command.key_id: command}
        self._node = _node(start, device, self._app())
        self._working = threading.Lock()
        self._lost_at: sums.Stage | None = None
        self._is_lost, self._has_advertised = True, False
        self._back_at = utc_now()
        self._running: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Future[None]] = set()
        self._session = MqttSession(
            start.mqtt_url,
            client_id=self.device_id,
            subscriptions=device_subscriptions(fleet=self._fleet, device=self.device_id),
            will=self._sealed(Presence(state=PresenceState.LOST, boot=RUN)),
            on_message=self._take,
            on_connect=self._say_joined,
            rng=random.Random(),  # noqa: S311  # jitter
            ca_pem=start.mqtt_ca_pem,
        )

    def join(self) -> None:
        """Join the SuperLink."""
        self._node.join()

    async def come_back(self, lost_at: sums.Stage | None) -> None:
        """Connect where it is not connected, and be lost at the given stage."""
        while self._tasks:  # the round was over before they were
            await asyncio.wait(self._tasks)
        if self._is_lost:
            if self._running is not None:
                await asyncio.wait({self._running})
            await asyncio.to_thread(lambda: list(self._node.work()))  # of a round that is over
            self._running = asyncio.create_task(self._session.run(), name=self.device_id)
            await self._session.connected.wait()
        self._is_lost, self._has_advertised, self._lost_at = False, False, lost_at
        self._back_at = utc_now()

    async def _say_joined(self) -> None:
        await self._say(JoinedRun(run_id=RUN, session_id=SESSION))

    async def _take(self, topic: str, payload: bytes) -> None:
        if self._is_lost:
            return
        envelope = decode(payload, device=self.device_id, trusted=self._trusted, now=utc_now())
        if topic != topic_of(envelope.body, fleet=self._fleet, device=self.device_id):
            raise PeerError("a message came on another's topic")
        if envelope.sent_at < self._back_at:  # it waited at the broker since another round
            return
        match envelope.body:
            case Nudge():
                self._do(self._work)
            case SumQuestion() as question:
                self._do(lambda: self._answer(question, envelope.id))
            case _:
                pass

    def _do(self, work: Callable[[], None]) -> None:
        """Do what takes a while in another thread."""
        task = self._loop.run_in_executor(self._pool, self._logged, work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _work(self) -> None:
        if self._loses_itself("mask" if self._has_advertised else "advertise"):
            return
        with self._working:
            for message_id in self._node.work():
                self._publish(ReplyWaiting(run_id=RUN, session_id=SESSION, message_id=message_id))

    def _answer(self, question: SumQuestion, question_id: str) -> None:
        if self._loses_itself(question.stage):
            return
        answer = self._sums.answer(question.session, question.stage, question.question)
        self._publish(
            SumAnswer(run_id=RUN, session_id=SESSION, stage=question.stage, answer=answer),
            reply_to=question_id,
        )

    def _app(self) -> ClientApp:
        app = ClientApp()
        app.train()(self._handler(self._train))
        app.query("mask")(self._handler(self._mask))
        return app

    def _handler(self, work: Callable[[Message], Message]) -> Callable[[Message, Context], Message]:
        return lambda message, _: work(message)

    def _train(self, message: Message) -> Message:
        sealed = sealed_config_in(message.content)
        if self._is_lost or sealed is None:
            return _no(message)
        self._has_advertised = True
        return Message(reply_with(self._sums.advertise(sealed)), reply_to=message)

    def _mask(self, message: Message) -> Message:
        if self._is_lost:
            return _no(message)
        answer, lanes = self._sums.mask(*stage_question_in(message.content))
        return Message(reply_with(answer, lanes), reply_to=message)

    def _loses_itself(self, stage: sums.Stage) -> bool:
        """Vanish, if it is time: the connection breaks, and nothing is said any more."""
        if stage == self._lost_at and not self._is_lost:
            self._is_lost = True
            asyncio.run_coroutine_threadsafe(self._vanish(), self._loop).result()
        return self._is_lost

    async def _vanish(self) -> None:
        assert self._running is not None
        self._session.cut()
        while self._session.connected.is_set():  # noqa: ASYNC110  # only "connected" is an event
            await asyncio.sleep(0.001)
        self._running.cancel()

    def _publish(self, body: UpBody, *, reply_to: str | None = None) -> None:
        """Sign in this thread, and have it sent."""
        message = self._sealed(body, reply_to=reply_to)
        asyncio.run_coroutine_threadsafe(self._session.publish(message), self._loop).result()

    async def _say(self, body: UpBody) -> None:
        await self._session.publish(self._sealed(body))

    def _sealed(self, body: UpBody, *, reply_to: str | None = None) -> Outgoing:
        envelope = new_envelope(body, device=self.device_id, now=utc_now(), reply_to=reply_to)
        delivery = delivery_of(body)
        return Outgoing(
            topic_of(body, fleet=self._fleet, device=self.device_id),
            encode(envelope, self._sums.identity),
            qos=delivery.qos,
            retain=delivery.retain,
            expiry_s=int(delivery.expiry.total_seconds()),
        )

    def _logged(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ShoalError as error:
            logger.warning("%s: %s", self.device_id, error)
        except Exception:
            logger.exception("%s failed", self.device_id)


def _no(message: Message) -> Message:
    """Answer what was asked in a round that is over."""
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "too late"), reply_to=message)


def _node(start: StartDevices, device: LightDevice, app: ClientApp) -> FlowerNode:
    key = load_ssh_private_key(device.node_key.encode(), password=None)
    assert isinstance(key, EllipticCurvePrivateKey)
    return FlowerNode(
        address=start.superlink_address,
        ca_pem=start.superlink_ca_pem,
        private_key=key,
        app=app,
        task=TASK,
        node_config={},
    )


async def _serve(link: ParentLink[Any], start: StartDevices) -> None:
    watch, loop = _Stopwatch(), asyncio.get_running_loop()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="device") as pool:
        devices = [
            _Device(device, start, watch=watch, pool=pool, loop=loop) for device in start.devices
        ]
        await asyncio.gather(*(asyncio.to_thread(device.join) for device in devices))
        while (message := await asyncio.to_thread(link.incoming.get)) is not None:
            assert isinstance(message, BeginRound)
            await _come_back(devices, message.lost_at)
            link.send(DevicesReady(protocol_s=watch.spent_s, processor_s=time.process_time()))


async def _come_back(devices: list[_Device], lost_at: Mapping[str, sums.Stage]) -> None:
    await asyncio.gather(*(device.come_back(lost_at.get(device.device_id)) for device in devices))


def main() -> None:
    """Serve until the parent closes the pipe."""
    die_with_parent()
    configure_logging("WARNING")
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    logging.getLogger("shared.mqtt").setLevel(logging.ERROR)  # connections are cut on purpose
    link: ParentLink[ToDevices] = ParentLink(ToDevices)
    start = link.incoming.get(timeout=_START_DEADLINE_S)
    assert isinstance(start, StartDevices)
    asyncio.run(_serve(link, start))


if __name__ == "__main__":
    main()
