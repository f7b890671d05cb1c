"""Events of an agent that is killed again and again, through a broker that restarts."""

import sys
from pathlib import Path

import pytest

from edge_agent.outbox import Outbox
from edge_agent.state import AgentState
from shared.child import Child
from shared.messages import LeftRun
from shared.signing import SigningKey
from tests.integration.agent.fleet_of_one import Broker, Coordinator, make_home

LIVES = 30
WRITER = """
import asyncio, itertools, random, sys
from pathlib import Path
from edge_agent.control_link import ControlLink
from edge_agent.enrolment import load_enrolment
from edge_agent.inbox import Inbox
from edge_agent.outbox import Outbox
from edge_agent.state import AgentState
from shared.messages import DeploymentState, Hello, LeftRun, Reported, utc_now

async def ignore(envelope):
    pass

async def main(home, life):
    with AgentState(home / "state.db") as state:
        outbox = Outbox(state)
        link = ControlLink(
            load_enrolment(home), boot=life, outbox=outbox, inbox=Inbox(state),
            hello=lambda: Hello(boot=life, agent_version="1", protocol_min=1, protocol_max=1,
                                cpu_count=1, memory_bytes=1),
            reported=lambda: Reported(boot=life, desired_version=0,
                                      deployment=DeploymentState.IDLE),
            receive=ignore, now=utc_now, rng=random.Random(),
        )
        async with asyncio.TaskGroup() as group:
            running = group.create_task(link.run())
            if life == "last":
                while len(outbox):
                    await asyncio.sleep(0.02)
                running.cancel()
                return
            for number in itertools.count():
                key = f"{life}-{number}"
                await link.send(LeftRun(run_id=key, session_id="s", cause="x" * 200))
                print(f'"{key}"', flush=True)
                await asyncio.sleep(0.002)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.slow
async def test_thirty_killed_agents_and_a_broker_restart_lose_no_event(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    home, key = tmp_path_factory.mktemp("home"), SigningKey.generate()
    broker = Broker(tmp_path_factory.mktemp("broker"))
    await broker.start()
    identity = make_home(home, command_key=key, mqtt_url=broker.url)
    kept: set[str] = set()
    try:
        async with Coordinator(broker.url, identity, key).connected() as coordinator:
            for life in range(LIVES):
                writer = await _start(home, f"life{life}")
                said = 0
                async for event in writer.messages(str):
                    kept.add(event)
                    said += 1
                    if said == 1 + 3 * life:
                        writer.kill()
                await writer.wait()
                if life == LIVES // 2:
                    await broker.stop()
                    await broker.start()
            writer = await _start(home, "last")
            assert await writer.wait() == 0, writer.log_tail()
            heard = {body.run_id for body in coordinator.bodies(LeftRun)}
            ids = {e.id for e in coordinator.heard if isinstance(e.body, LeftRun)}
    finally:
        await broker.stop()

    assert kept <= heard
    assert len(ids) == len(heard)  # copies carry the same id, so that their effect is not doubled
    with AgentState(home / "state.db") as state:
        assert len(Outbox(state)) == 0


async def _start(home: Path, life: str) -> Child:
    argv = [sys.executable, "-c", WRITER, str(home), life]
    return await Child.start(argv, name="writer", log_path=home / "writer.log")
