"""The coordinator's end of the control plane: one message has one effect."""

import random
from datetime import UTC, datetime, timedelta

import pytest

from cloud_coordinator import control_link
from cloud_coordinator.control_link import ControlLink
from shared.messages import (
    Envelope,
    LeftRun,
    Presence,
    PresenceState,
    UpBody,
    encode,
    new_envelope,
    topic_of,
)
from shared.signing import SigningKey, VerifyingKey

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DEVICE = SigningKey.generate()


class Coordinator:
    """The link, without a broker."""

    def __init__(self) -> None:
        self.now = NOW
        self.handled: list[Envelope] = []
        self.link = ControlLink(
            "mqtt://127.0.0.1:1",
            fleet="main",
            key=SigningKey.generate(),
            devices=self,
            on_message=self._handle,
            on_connect=self._connect,
            clock=lambda: self.now,
            rng=random.Random(1),  # noqa: S311  # jitter, no secret
        )

    async def identity_key(self, device_id: str) -> VerifyingKey:
        assert device_id == "edge-1"
        return DEVICE.public

    async def _handle(self, envelope: Envelope) -> None:
        self.handled.append(envelope)

    async def _connect(self) -> None: ...

    async def hear(self, envelope: Envelope) -> None:
        topic = topic_of(envelope.body, fleet="main", device="edge-1")
        await self.link._take(topic, encode(envelope, DEVICE))


def said(body: UpBody, *, after: timedelta = timedelta()) -> Envelope:
    return new_envelope(body, device="edge-1", now=NOW + after)


LEFT = LeftRun(run_id="r", session_id="s", cause="stopped")


async def test_a_message_that_a_broker_repeats_has_one_effect() -> None:
    coordinator = Coordinator()
    first, second = said(LEFT), said(LEFT)
    for envelope in (first, first, second, first):
        await coordinator.hear(envelope)
    assert coordinator.handled == [first, second]
    assert coordinator.link.received["LeftRun"] == 4


async def test_what_is_retained_is_heard_after_every_reconnect() -> None:
    coordinator = Coordinator()
    ready = said(Presence(state=PresenceState.READY, boot="b"))
    for _ in range(2):
        await coordinator.hear(ready)
    assert coordinator.handled == [ready, ready]


async def test_ids_are_forgotten_once_their_message_is_expired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinator = Coordinator()
    await coordinator.hear(said(LEFT))
    assert len(coordinator.link._taken._until) == 1
    coordinator.now += timedelta(days=30)
    await coordinator.hear(said(LEFT, after=timedelta(days=30)))
    assert len(coordinator.link._taken._until) == 1

    monkeypatch.setattr(control_link, "_MOST_REMEMBERED", 3)
    for _ in range(5):
        await coordinator.hear(said(LEFT, after=timedelta(days=30)))
    assert len(coordinator.link._taken._until) == 3
