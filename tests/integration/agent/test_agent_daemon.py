"""The real daemon against a real broker and a coordinator that a test speaks through."""

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from edge_agent.outbox import Outbox, Waiting
from edge_agent.state import AgentState
from shared.messages import (
    CoordinatorPresence,
    DeploymentState,
    Desired,
    Hello,
    Invitation,
    InvitationAnswer,
    LeftRun,
    Notice,
    Nudge,
    Presence,
    PresenceState,
    Reported,
    Telemetry,
    encode,
    new_envelope,
    topic_of,
    utc_now,
)
from shared.signing import SigningKey
from tests.integration.agent.fleet_of_one import (
    DEVICE,
    DIGITS,
    FLEET,
    TIME_LIMIT_S,
    Broker,
    Coordinator,
    Daemon,
    add_data,
    agent_command,
    api_without_models,
    children_of,
    daemon,
    make_home,
    read_status,
    until_gone,
)

MODEL = "a" * 64


@dataclass(frozen=True)
class World:
    """What stands around one agent."""

    home: Path
    broker: Broker
    coordinator: Coordinator
    identity: SigningKey


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    broker = Broker(tmp_path / "coordinator")
    await broker.start()
    home = tmp_path / "home"
    home.mkdir()
    key = SigningKey.generate()
    try:
        async with api_without_models() as api_url:
            identity = make_home(home, command_key=key, mqtt_url=broker.url, api_url=api_url)
            coordinator = Coordinator(broker.url, identity, key)
            async with coordinator.connected():
                yield World(home, broker, coordinator, identity)
    finally:
        await broker.stop()


@pytest.fixture
async def agent(world: World) -> AsyncIterator[Daemon]:
    async with daemon(world.home) as started:
        await world.coordinator.until_heard(Reported)
        yield started


def invitation(**changes: object) -> Invitation:
    fields = {
        "run_id": "run-1",
        "session_id": "s1",
        "task": DIGITS,
        "min_examples": 1,
        "superlink_address": "127.0.0.1:1",
        "lease_s": 60.0,
    }
    return Invitation(**{**fields, **changes})  # type: ignore[arg-type]


async def test_an_agent_says_who_it_is_and_its_will_speaks_when_it_is_killed(
    world: World,
) -> None:
    add_data(world.home, DIGITS)
    async with daemon(world.home, "--telemetry-interval-s=0.2") as agent:
        hello = await world.coordinator.until_heard(Hello)
        ready = await world.coordinator.until_heard(Presence, state=PresenceState.READY)
        reported = await world.coordinator.until_heard(Reported)
        first = await world.coordinator.until_heard(Telemetry)
        assert hello.tasks == ("digits",)
        assert hello.cpu_count >= 1
        assert hello.memory_bytes > first.memory_bytes > 0
        assert hello.boot == ready.boot == reported.boot == first.boot
        assert reported.deployment is DeploymentState.IDLE
        assert reported.serving_version is None
        await world.coordinator.until_heard(Telemetry, seq=first.seq + 1)
        children = children_of(agent.process.pid)
        assert children  # the inference server at least

        await agent.kill()
        lost = await world.coordinator.until_heard(Presence, state=PresenceState.LOST)
        assert lost.boot == ready.boot
        await until_gone(children)


async def test_a_stopped_agent_says_goodbye_and_leaves_no_child(
    world: World, agent: Daemon
) -> None:
    children = children_of(agent.process.pid)
    assert await agent.stop() == 0
    await world.coordinator.until_heard(Presence, state=PresenceState.STOPPED)
    await until_gone(children)
    states = [presence.state for presence in world.coordinator.bodies(Presence)]
    assert states == [PresenceState.READY, PresenceState.STOPPED]
    assert "Traceback" not in agent.log


async def test_an_invitation_without_data_for_it_is_answered_no_with_the_reason(
    world: World,
    agent: Daemon,
) -> None:
    await world.coordinator.send(invitation())
    answer = await world.coordinator.until_heard(InvitationAnswer)
    assert not answer.accepted
    assert answer.reason == "no data for task 'digits'"
    assert "invited to run run-1: no, no data for task" in agent.log


async def test_a_command_that_arrives_twice_acts_once(world: World, agent: Daemon) -> None:
    del agent
    signed = world.coordinator.sign(invitation())
    for _ in range(3):
        await world.coordinator.send_raw(invitation(), signed)
    await world.coordinator.send(invitation(session_id="s2"))
    await world.coordinator.until_heard(InvitationAnswer, session_id="s2")
    sessions = [answer.session_id for answer in world.coordinator.bodies(InvitationAnswer)]
    assert sessions == ["s1", "s2"]


async def test_only_a_fresh_desired_state_of_our_coordinator_for_this_device_counts(
    world: World, agent: Daemon
) -> None:
    cloud, five = world.coordinator, Desired(version=5)
    replay = cloud.sign(Desired(version=4, model_version=MODEL))
    await cloud.send(five)
    await cloud.until_heard(Reported, desired_version=5)

    bad = Desired(version=9, model_version=MODEL)
    refused = {
        "expired": cloud.sign(bad, age=timedelta(hours=2), lifetime=timedelta(hours=1)),
        "message for 'edge-2'": cloud.sign(bad, device="edge-2"),
        "must name one device": cloud.sign(bad, device="*"),
        "no key that is trusted": cloud.sign(bad, key=SigningKey.generate()),
        "not a signed envelope": b'{"type": "desired", "version": 9}',
        "is over 131072": b"x" * 131_073,
        "does not belong on this topic": cloud.sign(Nudge(run_id="r", session_id="s")),
        "refused desired state 4": replay,
    }
    for payload in refused.values():
        await cloud.send_raw(five, payload[:131_072])
    await cloud.send(Desired(version=6))
    await cloud.until_heard(Reported, desired_version=6)

    assert {body.desired_version for body in cloud.bodies(Reported)} == {0, 5, 6}
    refused["not a signed envelope"] = refused.pop("is over 131072")  # we cannot send so much
    for reason in refused:
        assert reason in agent.log, reason
    assert "Traceback" not in agent.log


async def test_what_is_desired_outlives_a_restart_and_a_failure_names_its_cause(
    world: World,
) -> None:
    async with daemon(world.home) as agent:
        await world.coordinator.until_heard(Hello)
        await world.coordinator.send(Desired(version=3, model_version=MODEL))
        await world.coordinator.until_heard(
            Reported, desired_version=3, deployment=DeploymentState.DOWNLOADING
        )
        await agent.kill()
    world.coordinator.heard.clear()
    async with daemon(world.home):
        await world.coordinator.until_heard(Reported, desired_version=3)
        failed = await world.coordinator.until_heard(Reported, deployment=DeploymentState.FAILED)
        assert "the coordinator has no /v1/tuf/" in failed.cause
        assert failed.serving_version is None


async def test_after_a_broker_restart_the_agent_comes_back_by_itself(
    world: World, agent: Daemon
) -> None:
    await world.coordinator.send(Notice(kind="restarting", window_s=0.5))
    await world.broker.stop()
    await world.coordinator.until_disconnected()
    world.coordinator.heard.clear()
    await world.broker.start()
    await world.coordinator.come_back()
    await world.coordinator.until_heard(Presence, state=PresenceState.READY)
    await world.coordinator.until_heard(Hello)
    await world.coordinator.until_heard(Reported)
    await world.coordinator.send(Desired(version=1))
    await world.coordinator.until_heard(Reported, desired_version=1)
    assert agent.process.returncode is None


async def test_a_restarted_coordinator_is_greeted_again(world: World, agent: Daemon) -> None:
    del agent
    await world.coordinator.send(CoordinatorPresence(state="ready", epoch="one"))
    await world.coordinator.until(lambda c: len(c.bodies(Hello)) == 2)
    await world.coordinator.send(CoordinatorPresence(state="stopped", epoch="one"))
    await world.coordinator.send(CoordinatorPresence(state="ready", epoch="two"))
    await world.coordinator.until(lambda c: len(c.bodies(Hello)) == 3)
    assert len(world.coordinator.bodies(Presence)) == 3


async def test_data_added_while_the_agent_runs_are_announced(world: World, agent: Daemon) -> None:
    del agent
    add_data(world.home, DIGITS)
    await world.coordinator.until_heard(Hello, tasks=("digits",))


async def test_a_damaged_data_registry_is_said_and_does_not_end_the_agent(
    world: World,
) -> None:
    add_data(world.home, DIGITS)
    async with daemon(world.home) as agent:
        await world.coordinator.until_heard(Hello, tasks=("digits",))
        (world.home / "data.json").write_text("{")
        await world.coordinator.until_heard(Hello, tasks=())
        await world.coordinator.send(invitation())
        answer = await world.coordinator.until_heard(InvitationAnswer)
        assert not answer.accepted
        assert agent.log.count("is damaged") < 4


async def test_an_event_is_repeated_over_restarts_until_it_is_acknowledged(world: World) -> None:
    body = LeftRun(run_id="run-0", session_id="s0", cause="killed long ago")
    envelope = new_envelope(body, device=DEVICE, now=utc_now())
    with AgentState(world.home / "state.db") as state:
        Outbox(state).add(
            Waiting(
                envelope.id,
                topic_of(body, fleet=FLEET, device=DEVICE),
                encode(envelope, world.identity),
                envelope.expires_at,
            )
        )
    world.coordinator.acknowledges = False
    async with daemon(world.home) as agent:
        await world.coordinator.until_heard(LeftRun)
        await agent.kill()
    world.coordinator.acknowledges = True
    async with daemon(world.home) as agent:
        await world.coordinator.until(lambda c: len(c.bodies(LeftRun)) == 2)
        with AgentState(world.home / "state.db") as state:
            async with asyncio.timeout(TIME_LIMIT_S):
                while len(Outbox(state)):  # noqa: ASYNC110 another process empties it
                    await asyncio.sleep(0.02)
        await agent.stop()
    ids = {envelope.id for envelope in world.coordinator.heard if envelope.body == body}
    assert ids == {envelope.id}


async def test_the_owner_sees_how_the_agent_is(world: World) -> None:
    assert (await read_status(world.home))["snapshot"] is None
    add_data(world.home, DIGITS)
    assert (await read_status(world.home))["tasks"] == ["digits"]  # though no daemon runs
    async with daemon(world.home) as agent:
        async with asyncio.timeout(TIME_LIMIT_S):
            while True:
                status = await read_status(world.home)
                if status["snapshot"] is not None and status["snapshot"]["online"]:
                    break
        assert status["device_id"] == DEVICE
        assert status["running"]
        assert status["inference_url"].startswith("http://127.0.0.1:")
        assert status["snapshot"]["pid"] == agent.process.pid
        await agent.stop()
    (world.home / "data.json").write_text("{")
    status = await read_status(world.home)
    assert not status["running"]
    assert status["inference_url"] is None
    assert "data.json is damaged" in status["data_problem"]


async def test_without_a_broker_the_agent_waits_for_it(world: World) -> None:
    await world.broker.stop()
    await world.coordinator.until_disconnected()
    async with daemon(world.home) as agent:
        async with asyncio.timeout(TIME_LIMIT_S):
            while "is away" not in agent.log:  # noqa: ASYNC110 a log file has no event
                await asyncio.sleep(0.05)
        await world.broker.start()
        await world.coordinator.come_back()
        await world.coordinator.until_heard(Hello)


async def run_and_fail(*command: str) -> str:
    """Run a command that must fail; return what it says on standard error."""
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    async with asyncio.timeout(TIME_LIMIT_S):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert b"Traceback" not in said
    return said.decode().strip()


async def test_a_second_daemon_on_the_same_home_is_refused(world: World, agent: Daemon) -> None:
    del agent
    said = await run_and_fail(*agent_command("run", world.home), "--inference-port=0")
    assert said == f"shoal-agent: a shoal-agent is running on {world.home} already; stop it first"


async def test_a_taken_inference_port_is_said_in_a_sentence(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = await run_and_fail(*agent_command("run", world.home), f"--inference-port={port}")
    assert said.startswith(f"shoal-agent: port {port} on 127.0.0.1 is in use")


async def test_an_agent_that_is_not_enrolled_is_told_what_to_run(tmp_path: Path) -> None:
    said = await run_and_fail(*agent_command("run", tmp_path))
    assert "is not enrolled; run 'shoal-agent enroll" in said
