"""What the MQTT session does on its own; with brokers, see tests/contract/test_mqtt_link.py."""

import asyncio
import random
from typing import Any

import pytest

from shared import mqtt
from shared.errors import UnavailableError
from shared.mqtt import MqttSession, Outgoing


class SilentClient:
    """A connection whose broker never acknowledges."""

    async def publish(self, *_: Any, **__: Any) -> None:
        await asyncio.Event().wait()


async def nothing(*_: Any) -> None:
    pass


async def test_a_connection_may_break_in_the_moment_in_which_a_publish_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mqtt, "_CALL_TIMEOUT_S", 0.0)
    session = MqttSession(
        "mqtt://127.0.0.1:1",
        client_id="x",
        subscriptions=(),
        will=None,
        on_message=nothing,
        on_connect=nothing,
        rng=random.Random(1),  # noqa: S311 jitter, not a secret
    )
    monkeypatch.setattr(session, "_client", SilentClient())
    publishing = asyncio.create_task(session.publish(Outgoing("topic", b"")))
    async with asyncio.timeout(10):
        while not any(d.expired() for d in session._waiting_calls):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0)

    session._forget_connection()

    with pytest.raises(UnavailableError, match="no acknowledgement"):
        await asyncio.wait_for(publishing, 10)
