"""The trainer child as the daemon sees it: what it says, when it ends, and with which status."""

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import ConfigRecord, Message, RecordDict

from cloud_coordinator.flower.grid import RunGrid, open_run
from edge_agent.flower_node import CLIENT_APP
from edge_agent.trainer_messages import (
    FromTrainer,
    MessageWaits,
    RejoinTraining,
    StageAnswered,
    StageQuestion,
    StartTraining,
    StopTraining,
    TrainerFailed,
    TrainerJoined,
    TrainerProgress,
    TrainerReplied,
)
from shared.child import Child
from shared.listening import free_port
from tests.contract.flower.conftest import DEADLINE_S, LiveSuperLink
from tests.contract.flower.flower_probe import TASK


class Trainer:
    """A trainer child, and what it said."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._said: AsyncIterator[Any] = child.messages(FromTrainer)

    async def next(self) -> Any:
        return await asyncio.wait_for(anext(self._said), DEADLINE_S)

    async def end(self) -> int:
        return await asyncio.wait_for(self.child.wait(), DEADLINE_S)


Start = Callable[..., Awaitable[Trainer]]


@pytest.fixture
def grid(superlink: LiveSuperLink) -> Iterator[RunGrid]:
    with open_run(**superlink.run_options(client_app=CLIENT_APP)) as opened:
        yield opened


@pytest.fixture
async def start(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, tmp_path: Path
) -> AsyncIterator[Start]:
    """Return a function that starts a trainer with the test's node key."""
    path = tmp_path / "node.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    trainers: list[Trainer] = []

    async def start_one(*, lease_s: float = 60.0) -> Trainer:
        child = await Child.start(
            [sys.executable, "-m", "tests.contract.flower.probe_trainer"],
            name="trainer",
            log_path=tmp_path / "trainer.log",
        )
        trainers.append(Trainer(child))
        await child.send(
            StartTraining(
                run_id="run-1",
                session_id="session-1",
                task=TASK,
                data_name="data",
                home=str(tmp_path),
                superlink_address=superlink.parent.public_address,
                superlink_ca_pem=superlink.parent.ca_pem,
                node_key_path=str(path),
                lease_s=lease_s,
            )
        )
        return trainers[-1]

    yield start_one
    for trainer in trainers:
        await trainer.child.stop(timeout_s=5)


async def ask(grid: RunGrid, node_id: int, kind: str) -> str:
    content = RecordDict({"q": ConfigRecord({"a": 1})})
    message = Message(content, node_id, kind, ttl=60.0, group_id="3")
    return (await asyncio.to_thread(grid.push_messages, [message]))[0]


async def test_it_joins_answers_when_nudged_and_leaves_when_told(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, grid: RunGrid, start: Start
) -> None:
    node_id = superlink.register(key)
    trainer = await start()
    assert await trainer.next() == TrainerJoined("session-1")
    assert node_id in grid.get_node_ids()
    message_id = await ask(grid, node_id, "query.count")

    await trainer.child.send(MessageWaits())

    assert await trainer.next() == TrainerProgress("query.count, round 3")
    assert await trainer.next() == TrainerReplied(message_id, "session-1")
    (reply,) = await asyncio.to_thread(grid.pull_messages, [message_id])
    assert reply.content.config_records["n"]["n"] == 1

    await trainer.child.send(StopTraining("the run is over"))
    assert await trainer.end() == 0
    assert node_id not in grid.get_node_ids()


async def test_it_leaves_at_once_even_in_the_middle_of_training(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, grid: RunGrid, start: Start
) -> None:
    node_id = superlink.register(key)
    trainer = await start()
    assert await trainer.next() == TrainerJoined("session-1")
    await ask(grid, node_id, "query.sleep")
    await trainer.child.send(MessageWaits())
    assert await trainer.next() == TrainerProgress("query.sleep, round 3")

    await trainer.child.send(StopTraining("the owner wants the machine"))

    assert await trainer.end() == 0
    assert node_id not in grid.get_node_ids()


async def test_it_ends_when_its_lease_is_over(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, start: Start
) -> None:
    superlink.register(key)
    trainer = await start(lease_s=0.2)
    assert await trainer.next() == TrainerJoined("session-1")
    assert await trainer.end() == 0


async def test_it_ends_in_order_with_its_daemon(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, start: Start
) -> None:
    superlink.register(key)
    trainer = await start()
    assert await trainer.next() == TrainerJoined("session-1")

    await trainer.child.stop(timeout_s=DEADLINE_S)

    assert trainer.child.returncode == 0


async def test_it_answers_stages_of_sums_in_the_middle_of_training(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, grid: RunGrid, start: Start
) -> None:
    node_id = superlink.register(key)
    trainer = await start()
    assert await trainer.next() == TrainerJoined("session-1")
    await ask(grid, node_id, "query.sleep")
    await trainer.child.send(MessageWaits())
    assert await trainer.next() == TrainerProgress("query.sleep, round 3")

    for session, content in ((bytes(32), b"of no sum"), (b"s" * 32, b"of a sum")):
        await trainer.child.send(
            StageQuestion(message_id="m", session=session, stage="share", question=content)
        )

    assert await trainer.next() == StageAnswered(
        message_id="m", stage="share", answer=b"of a sum"[::-1]
    )


async def test_a_run_s_new_session_is_joined_in_the_same_process_once_there_is_one(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, grid: RunGrid, start: Start
) -> None:
    node_id = superlink.register(key)
    trainer = await start()
    assert await trainer.next() == TrainerJoined("session-1")
    nowhere = f"127.0.0.1:{free_port()}"

    await trainer.child.send(moved(superlink, "session-2", address=nowhere))
    await trainer.child.send(
        StageQuestion(message_id="m", session=b"s" * 32, stage="reveal", question=b"who")
    )
    assert await trainer.next() == StageAnswered(message_id="m", stage="reveal", answer=b"ohw")
    await trainer.child.send(moved(superlink, "session-3"))

    assert await trainer.next() == TrainerJoined("session-3")
    message_id = await ask(grid, node_id, "query.count")
    await trainer.child.send(MessageWaits())
    assert await trainer.next() == TrainerProgress("query.count, round 3")
    assert await trainer.next() == TrainerReplied(message_id, "session-3")


async def test_what_an_older_session_works_on_does_not_keep_it_from_joining(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, grid: RunGrid, start: Start
) -> None:
    node_id = superlink.register(key)
    trainer = await start()
    assert await trainer.next() == TrainerJoined("session-1")
    await ask(grid, node_id, "query.sleep")
    await trainer.child.send(MessageWaits())
    assert await trainer.next() == TrainerProgress("query.sleep, round 3")

    await trainer.child.send(moved(superlink, "session-2"))

    assert await trainer.next() == TrainerJoined("session-2")
    await trainer.child.send(StopTraining("enough"))
    assert await trainer.end() == 0


def moved(
    superlink: LiveSuperLink, session_id: str, *, address: str | None = None
) -> RejoinTraining:
    return RejoinTraining(
        session_id=session_id,
        superlink_address=address or superlink.parent.public_address,
        superlink_ca_pem=superlink.parent.ca_pem,
        lease_s=60.0,
    )


async def test_it_says_in_one_sentence_why_it_cannot_join(start: Start) -> None:
    trainer = await start()

    said = await trainer.next()

    assert isinstance(said, TrainerFailed)
    assert "check that it is enrolled" in said.cause
    assert await trainer.end() == 1
