"""What both sides rely on in MQTT, checked against the embedded broker and against mosquitto."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cloud_coordinator.broker import BrokerKind, BrokerPlan, start_broker
from shared.child import Child
from shared.errors import ConfigError, UnavailableError
from shared.listening import free_port
from shared.messages import MAX_MESSAGE_BYTES
from shared.mqtt import MAX_PACKET_BYTES, MqttSession, Outgoing
from tests.system_packages import require_program

TIME_LIMIT_S = 15.0


class RunningBroker:
    """The broker as the coordinator starts it."""

    def __init__(self, kind: BrokerKind, home: Path) -> None:
        self._plan = BrokerPlan(kind, "127.0.0.1", free_port())
        self._home = home
        self._child: Child | None = None
        self.url = self._plan.url

    async def start(self) -> None:
        self._child = await start_broker(self._plan, home=self._home)

    async def stop(self) -> None:
        assert self._child is not None
        await self._child.stop()


@pytest.fixture(params=["embedded", "mosquitto"])
async def broker(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RunningBroker]:
    if request.param == "mosquitto":
        require_program("mosquitto", package="mosquitto")
    started = RunningBroker(request.param, tmp_path)
    await started.start()
    yield started
    await started.stop()


class Peer:
    """A session and all that reached it; conditions instead of sleeps."""

    def __init__(
        self, url: str, name: str, *subscriptions: str, will: Outgoing | None = None
    ) -> None:
        self.received: list[tuple[str, bytes]] = []
        self.connects = 0
        self._changed = asyncio.Condition()
        self.session = MqttSession(
            url,
            client_id=name,
            subscriptions=subscriptions,
            will=will,
            on_message=self._keep,
            on_connect=self._count,
            rng=random.Random(1),  # noqa: S311 jitter, not a secret
        )

    async def _keep(self, topic: str, payload: bytes) -> None:
        if payload == b"poison":
            raise RuntimeError("a handler with a bug")
        async with self._changed:
            self.received.append((topic, payload))
            self._changed.notify_all()

    async def _count(self) -> None:
        async with self._changed:
            self.connects += 1
            self._changed.notify_all()

    async def until(self, condition: Callable[["Peer"], bool]) -> None:
        async with asyncio.timeout(TIME_LIMIT_S), self._changed:
            await self._changed.wait_for(lambda: condition(self))

    async def until_disconnected(self) -> None:
        async with asyncio.timeout(TIME_LIMIT_S):
            while self.session.connected.is_set():  # noqa: ASYNC110 only "connected" is an event
                await asyncio.sleep(0.01)

    def payloads(self) -> list[bytes]:
        return [payload for _, payload in self.received]

    def cut_the_wire(self) -> None:
        assert self.session._client is not None
        self.session.cut()


@contextlib.asynccontextmanager
async def connected(
    url: str, name: str, *subscriptions: str, will: Outgoing | None = None
) -> AsyncIterator[Peer]:
    peer = Peer(url, name, *subscriptions, will=will)
    task = asyncio.create_task(peer.session.run())
    try:
        await peer.until(lambda p: p.connects > 0)
        yield peer
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_messages_arrive_once_and_in_order(broker: RunningBroker) -> None:
    async with connected(broker.url, "ear", "t/+") as ear, connected(broker.url, "mouth") as mouth:
        for number in range(200):
            await mouth.session.publish(Outgoing("t/x", b"%d" % number))
        await ear.until(lambda p: len(p.received) >= 200)

        assert ear.payloads() == [b"%d" % number for number in range(200)]


async def test_many_publishers_at_once_share_one_session(broker: RunningBroker) -> None:
    async with connected(broker.url, "ear", "t/+") as ear, connected(broker.url, "mouth") as mouth:
        async with asyncio.TaskGroup() as group:
            for number in range(500):
                group.create_task(mouth.session.publish(Outgoing(f"t/{number}", b"x")))
        await ear.until(lambda p: len(p.received) >= 500)

        assert {topic for topic, _ in ear.received} == {f"t/{number}" for number in range(500)}


async def test_a_retained_message_greets_who_comes_later(broker: RunningBroker) -> None:
    async with connected(broker.url, "mouth") as mouth:
        await mouth.session.publish(Outgoing("t/desired", b"old", retain=True))
        await mouth.session.publish(Outgoing("t/desired", b"new", retain=True))

    async with connected(broker.url, "ear", "t/+") as ear:
        await ear.until(lambda p: bool(p.received))
        assert ear.received == [("t/desired", b"new")]


async def test_the_last_will_is_said_when_the_wire_is_cut(broker: RunningBroker) -> None:
    will = Outgoing("t/presence", b"lost", retain=True, expiry_s=600)
    async with (
        connected(broker.url, "ear", "t/+") as ear,
        connected(broker.url, "device", will=will) as device,
    ):
        device.cut_the_wire()
        await ear.until(lambda p: p.payloads() == [b"lost"])
        await device.until(lambda p: p.connects == 2)


async def test_a_clean_goodbye_says_no_last_will(broker: RunningBroker) -> None:
    will = Outgoing("t/presence", b"lost")
    async with connected(broker.url, "ear", "t/+") as ear:
        async with connected(broker.url, "device", will=will) as device:
            await device.session.publish(Outgoing("t/presence", b"stopped"))
        async with connected(broker.url, "device") as device:
            await device.session.publish(Outgoing("t/presence", b"ready"))
        await ear.until(lambda p: len(p.received) == 2)

        assert ear.payloads() == [b"stopped", b"ready"]


async def test_a_message_is_forgotten_when_it_expires(broker: RunningBroker) -> None:
    async with connected(broker.url, "mouth") as mouth:
        await mouth.session.publish(Outgoing("t/short", b"x", retain=True, expiry_s=1))
        await mouth.session.publish(Outgoing("t/long", b"x", retain=True, expiry_s=600))

        async def topics_for_a_newcomer(number: int) -> set[str]:
            async with connected(broker.url, f"newcomer-{number}", "t/+") as newcomer:
                await mouth.session.publish(Outgoing("t/marker", b"x"))
                await newcomer.until(lambda p: {"t/long", "t/marker"} <= {t for t, _ in p.received})
                return {topic for topic, _ in newcomer.received}

        async with asyncio.timeout(TIME_LIMIT_S):
            number = 0
            while "t/short" in await topics_for_a_newcomer(number):
                number += 1


async def test_what_is_said_during_a_short_drop_is_not_lost(broker: RunningBroker) -> None:
    async with connected(broker.url, "ear", "t/+") as ear, connected(broker.url, "mouth") as mouth:
        ear.session.next_connect_within(0.5)
        ear.cut_the_wire()
        for number in range(20):
            await mouth.session.publish(Outgoing("t/x", b"%d" % number, expiry_s=60))
        await ear.until(lambda p: p.connects == 2 and len(set(p.payloads())) == 20)


async def test_after_a_broker_restart_everything_is_as_before(broker: RunningBroker) -> None:
    async with connected(broker.url, "ear", "t/+") as ear, connected(broker.url, "mouth") as mouth:
        for peer in (ear, mouth):
            peer.session.next_connect_within(0.5)
        await broker.stop()
        await broker.start()
        await ear.until(lambda p: p.connects == 2)
        await mouth.until(lambda p: p.connects == 2)

        await mouth.session.publish(Outgoing("t/x", b"again"))
        await ear.until(lambda p: b"again" in p.payloads())


async def test_publishing_without_a_broker_fails_at_once(broker: RunningBroker) -> None:
    async with connected(broker.url, "mouth") as mouth:
        mouth.session.next_connect_within(60)
        await broker.stop()
        await mouth.until_disconnected()
        with pytest.raises(UnavailableError, match="is away"):
            await mouth.session.publish(Outgoing("t/x", b"x"))


async def test_the_largest_message_passes_and_a_larger_one_is_refused_here(
    broker: RunningBroker,
) -> None:
    async with connected(broker.url, "ear", "t/+") as ear, connected(broker.url, "mouth") as mouth:
        with pytest.raises(ValueError, match="is over"):
            await mouth.session.publish(Outgoing("t/x", b"x" * (MAX_MESSAGE_BYTES + 1)))
        await mouth.session.publish(Outgoing("t/x", b"x" * MAX_MESSAGE_BYTES))
        await ear.until(lambda p: len(p.received) == 1)


async def test_a_larger_message_of_somebody_else_never_arrives(broker: RunningBroker) -> None:
    async with connected(broker.url, "ear", "t/+") as ear, connected(broker.url, "rude") as rude:
        assert rude.session._client is not None
        with contextlib.suppress(Exception):  # the broker may cut the wire or acknowledge
            await rude.session._client.publish("t/x", b"x" * (2 * MAX_PACKET_BYTES), 1, timeout=1)
        async with connected(broker.url, "mouth") as mouth:
            await mouth.session.publish(Outgoing("t/x", b"fine"))
        await ear.until(lambda p: bool(p.received))

        assert ear.payloads() == [b"fine"]
        assert ear.connects == 1


async def test_a_handler_with_a_bug_does_not_end_the_link(
    broker: RunningBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(broker.url, "ear", "t/+") as ear, connected(broker.url, "mouth") as mouth:
        await mouth.session.publish(Outgoing("t/x", b"poison"))
        await mouth.session.publish(Outgoing("t/x", b"fine"))
        await ear.until(lambda p: p.payloads() == [b"fine"])

    assert "a handler with a bug" in caplog.text


async def test_a_second_session_of_the_same_name_throws_out_the_first(
    broker: RunningBroker,
) -> None:
    async with connected(broker.url, "device") as first:
        first.session.next_connect_within(60)
        async with connected(broker.url, "device"):
            await first.until_disconnected()


def test_an_address_of_another_kind_is_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match="write mqtt://host:port"):
        Peer("http://127.0.0.1:1", "x")


def test_the_back_off_grows_to_a_minute_and_has_full_jitter() -> None:
    session = Peer("mqtt://127.0.0.1:1", "x").session
    for failures, largest in [(0, 1), (3, 8), (6, 60), (5000, 60)]:
        delays = [session._draw_delay(failures) for _ in range(300)]
        assert 0 <= min(delays) < 0.1 * largest
        assert 0.9 * largest < max(delays) <= largest


def test_an_announced_restart_sets_the_next_delay_only() -> None:
    session = Peer("mqtt://127.0.0.1:1", "x").session
    session.next_connect_within(1000)
    assert session._draw_delay(0) > 1
    assert session._draw_delay(0) <= 1
