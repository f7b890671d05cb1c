"""The agent's link while no broker is there: nothing that matters is lost, nothing raises."""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from edge_agent.control_link import ControlLink
from edge_agent.enrolment import Enrolment
from edge_agent.inbox import Inbox
from edge_agent.outbox import Outbox
from edge_agent.state import AgentState
from shared.messages import (
    DeploymentState,
    Desired,
    Envelope,
    Hello,
    JoinedRun,
    LeftRun,
    Notice,
    Nudge,
    ReplyWaiting,
    Reported,
    Telemetry,
    decode,
    encode,
    new_envelope,
    topic_of,
)
from shared.mqtt import Outgoing
from shared.signing import SigningKey

NOW = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
COMMAND_KEY = SigningKey.generate()
IDENTITY = SigningKey.generate()
ENROLMENT = Enrolment(
    device_id="edge-1",
    fleet="main",
    api_url="http://127.0.0.1:1",
    mqtt_url="mqtt://127.0.0.1:1",
    superlink_ca_pem="",
    node_key_path=Path("node.pem"),
    key=IDENTITY,
    command_keys={COMMAND_KEY.public.key_id: COMMAND_KEY.public},
    model_keys={},
)
HELLO = Hello(
    boot="b", agent_version="1", protocol_min=1, protocol_max=1, cpu_count=1, memory_bytes=1
)
REPORTED = Reported(boot="b", desired_version=0, deployment=DeploymentState.IDLE)


class Fixture:
    def __init__(self, state: AgentState) -> None:
        self.state = state
        self.outbox = Outbox(state)
        self.received: list[Envelope] = []
        self.link = ControlLink(
            ENROLMENT,
            boot="b",
            outbox=self.outbox,
            inbox=Inbox(state),
            hello=lambda: HELLO,
            reported=lambda: REPORTED,
            receive=self._keep,
            now=lambda: NOW,
            rng=random.Random(1),  # noqa: S311 jitter, not a secret
        )

    async def _keep(self, envelope: Envelope) -> None:
        self.received.append(envelope)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Fixture]:
    with AgentState(tmp_path / "state.db") as state:
        yield Fixture(state)


async def test_an_event_waits_in_the_outbox_signed_and_addressed(agent: Fixture) -> None:
    body = JoinedRun(run_id="r", session_id="s")
    await agent.link.send(body)
    (waiting,) = agent.outbox.waiting(NOW)
    trusted = {IDENTITY.public.key_id: IDENTITY.public}
    envelope = decode(waiting.payload, device="edge-1", trusted=trusted, now=NOW)
    assert (envelope.body, envelope.id) == (body, waiting.message_id)
    assert waiting.topic == "shoal/v1/main/d/edge-1/up/event"


async def test_what_still_matters_later_is_kept_and_the_rest_is_not(agent: Fixture) -> None:
    reply = ReplyWaiting(run_id="r", session_id="s", message_id="m")
    await agent.link.send(reply)
    await agent.link.send(REPORTED)
    await agent.link.send(
        Telemetry(boot="b", seq=1, cpu_percent=0, memory_bytes=0, disk_free_bytes=0)
    )
    await agent.link.say_hello()
    await agent.link.say_goodbye()
    topics = [message.topic.rpartition("/")[2] for _, message in agent.link._unsent]
    assert topics == ["announce"]
    assert len(agent.outbox) == 0


async def test_what_a_breaking_connection_cuts_off_is_said_after_the_next(
    agent: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await agent.link.send(ReplyWaiting(run_id="r", session_id="s", message_id="m"))
    publishing = asyncio.Event()

    async def hang(_: Outgoing) -> None:
        publishing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(agent.link._session, "publish", hang)
    greeting = asyncio.create_task(agent.link._send_unsent())
    await asyncio.wait_for(publishing.wait(), 10)
    greeting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await greeting
    assert len(agent.link._unsent) == 1


async def test_a_full_disk_is_logged_and_does_not_end_the_agent(
    agent: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    with agent.state.transaction() as connection:
        connection.execute("PRAGMA max_page_count = 1")
    for number in range(50):
        await agent.link.send(LeftRun(run_id=f"r{number}", session_id="s", cause="x" * 400))
    assert "not safe from a crash" in caplog.text


async def test_a_command_on_the_topic_of_another_kind_is_refused(
    agent: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    nudge = Nudge(run_id="r", session_id="s")
    sealed = encode(new_envelope(nudge, device="edge-1", now=NOW), COMMAND_KEY)
    desired_topic = topic_of(Desired(version=1), fleet="main", device="edge-1")
    await agent.link._take(desired_topic, sealed)
    assert agent.received == []
    assert agent.link.refused == 1
    assert "does not belong on this topic" in caplog.text


async def test_a_device_cannot_be_made_to_obey_an_upward_message(agent: Fixture) -> None:
    body = JoinedRun(run_id="r", session_id="s")
    sealed = encode(new_envelope(body, device="edge-1", now=NOW), COMMAND_KEY)
    await agent.link._take("shoal/v1/main/d/edge-1/up/event", sealed)
    assert agent.received == []
    assert agent.link.refused == 1


async def test_a_command_is_handed_over_once(agent: Fixture) -> None:
    nudge = Nudge(run_id="r", session_id="s")
    sealed = encode(new_envelope(nudge, device="edge-1", now=NOW), COMMAND_KEY)
    for _ in range(2):
        await agent.link._take(topic_of(nudge, fleet="main", device="edge-1"), sealed)
    assert [envelope.body for envelope in agent.received] == [nudge]


async def test_a_full_disk_keeps_nobody_from_obeying(
    agent: Fixture, caplog: pytest.LogCaptureFixture
) -> None:
    with agent.state.transaction() as connection:
        connection.execute("PRAGMA max_page_count = 1")
    nudge = Nudge(run_id="r", session_id="s")
    for _ in range(200):
        sealed = encode(new_envelope(nudge, device="edge-1", now=NOW), COMMAND_KEY)
        await agent.link._take(topic_of(nudge, fleet="main", device="edge-1"), sealed)
    assert len(agent.received) == 200
    assert "may be obeyed twice" in caplog.text


async def test_a_restart_that_was_announced_spreads_the_return(agent: Fixture) -> None:
    notice = Notice(kind="restarting", window_s=1000)
    sealed = encode(new_envelope(notice, device="*", now=NOW), COMMAND_KEY)
    await agent.link._take("shoal/v1/main/all/dn/notice", sealed)
    assert agent.link._session._draw_delay(0) > 1
    assert agent.received == []
