"""The agent's part in runs, with a real child process in place of the trainer."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edge_agent.participation import Participation
from shared.errors import DataError
from shared.messages import (
    DismissFromRun,
    Invitation,
    InvitationAnswer,
    JoinedRun,
    LeftRun,
    Nudge,
    ReplyWaiting,
    SumAnswer,
    SumQuestion,
    UpBody,
)
from shared.tasks.spec import TaskSpec

TIME_LIMIT_S = 15.0
TRAINER = """
import json, sys

def say(**message):
    print(json.dumps(message), flush=True)

for line in sys.stdin:
    message = json.loads(line)
    if message["type"] == "start":
        session = message["session_id"]
        if session == "cannot-connect":
            say(type="failed", cause="the SuperLink refuses this node")
            sys.exit(1)
        if session == "confused":
            print("this is no message", flush=True)
        if session == "mute":
            sys.exit("last words of a crash")
        if session == "lease-ran-out":
            sys.exit(0)
        say(type="progress", doing="connecting to " + message["superlink_address"])
        say(type="joined", session_id=session)
    elif message["type"] == "rejoin":
        say(type="replied", message_id="too-late", session_id=session)
        session = message["session_id"]
        say(type="joined", session_id=session)
    elif message["type"] == "message-waits":
        say(type="replied", message_id="reply-in-" + session, session_id=session)
    elif message["type"] == "stage-question":
        about = {name: message[name] for name in ("message_id", "stage")}
        say(type="stage-answered", **about, answer=message["question"])
    elif message["type"] == "stop":
        sys.exit(0)
"""


@dataclass(frozen=True)
class Rows:
    name: str
    train_rows: int


class Registry:
    def find(self, task: TaskSpec) -> Rows:
        if task.name != "digits":
            raise DataError(f"no data for task {task.name!r}")
        return Rows("mine", 100)


class Fixture:
    """A participation and all that it said."""

    def __init__(self, home: Path, trainer: tuple[str, ...]) -> None:
        self.said: list[UpBody] = []
        self.replies: list[str | None] = []
        self._changed = asyncio.Condition()
        self.part = Participation(
            home=home,
            node_key_path=home / "node.pem",
            superlink_ca_pem="pem",
            data=Registry(),
            send=self._keep,
            trainer=trainer,
        )

    async def _keep(self, body: UpBody, *, reply_to: str | None = None) -> None:
        async with self._changed:
            self.said.append(body)
            self.replies.append(reply_to)
            self._changed.notify_all()

    async def until(self, *expected: UpBody) -> None:
        await self.until_that(lambda said: all(body in said for body in expected))

    async def until_that(self, condition: Callable[[list[UpBody]], bool]) -> None:
        async with asyncio.timeout(TIME_LIMIT_S), self._changed:
            await self._changed.wait_for(lambda: condition(self.said))

    def trainer_pid(self) -> int:
        assert self.part._part is not None
        return self.part._part.trainer.pid


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Fixture]:
    async with running(Fixture(tmp_path, (sys.executable, "-c", TRAINER))) as fixture:
        yield fixture


@contextlib.asynccontextmanager
async def running(fixture: Fixture) -> AsyncIterator[Fixture]:
    task = asyncio.create_task(fixture.part.run())
    try:
        yield fixture
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def invitation(
    run_id: str = "run-1", session_id: str = "s1", task: str = "digits", min_examples: int = 1
) -> Invitation:
    return Invitation(
        run_id=run_id,
        session_id=session_id,
        task=TaskSpec(task, "image-classification"),
        min_examples=min_examples,
        superlink_address="127.0.0.1:1",
        lease_s=60,
        mode="secure",
        min_survivors=18,
    )


def answer(accepted: bool, reason: str = "", **of: str) -> InvitationAnswer:  # noqa: FBT001
    about = {"run_id": "run-1", "session_id": "s1", **of}
    return InvitationAnswer(accepted=accepted, reason=reason, **about)


def joined(session_id: str = "s1") -> JoinedRun:
    return JoinedRun(run_id="run-1", session_id=session_id)


def left(cause: str, session_id: str = "s1") -> LeftRun:
    return LeftRun(run_id="run-1", session_id=session_id, cause=cause)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_an_invited_device_says_yes_joins_works_and_leaves(agent: Fixture) -> None:
    agent.part.invite(invitation(), message_id="invitation-1")
    await agent.until(answer(accepted=True), joined())
    assert agent.replies[agent.said.index(answer(accepted=True))] == "invitation-1"
    assert agent.part.doing == "run-1: waiting for work"

    agent.part.nudge(Nudge(run_id="run-1", session_id="s1"))
    await agent.until(ReplyWaiting(run_id="run-1", session_id="s1", message_id="reply-in-s1"))

    pid = agent.trainer_pid()
    agent.part.dismiss(DismissFromRun(run_id="run-1", session_id="s1", cause="the run is over"))
    await agent.until(left("the run is over"))
    assert not is_alive(pid)
    assert agent.part.doing == ""


async def test_a_device_without_data_says_no_with_the_reason(agent: Fixture) -> None:
    agent.part.invite(invitation(task="speech"), message_id="i")
    await agent.until(answer(accepted=False, reason="no data for task 'speech'"))
    assert agent.part.doing == ""


async def test_a_second_run_is_refused_while_the_first_goes_on(agent: Fixture) -> None:
    agent.part.invite(invitation(), message_id="i")
    await agent.until(joined())
    agent.part.invite(invitation("run-2"), message_id="j")
    await agent.until(
        answer(accepted=False, reason="this device already takes part in run run-1", run_id="run-2")
    )
    assert agent.part.doing.startswith("run-1")


async def test_the_trainer_moves_to_a_newer_session_of_its_run(agent: Fixture) -> None:
    agent.part.invite(invitation(), message_id="i")
    await agent.until(joined())
    pid = agent.trainer_pid()
    agent.part.invite(invitation(session_id="s2"), message_id="j")
    await agent.until(answer(accepted=True, session_id="s2"), joined("s2"))
    assert agent.trainer_pid() == pid
    agent.part.nudge(Nudge(run_id="run-1", session_id="s2"))
    await agent.until(ReplyWaiting(run_id="run-1", session_id="s2", message_id="reply-in-s2"))
    assert not any(isinstance(body, LeftRun) for body in agent.said)


async def test_what_the_trainer_said_of_an_older_session_is_not_announced(agent: Fixture) -> None:
    agent.part.invite(invitation(), message_id="i")
    agent.part.invite(invitation(session_id="s2"), message_id="j")
    await agent.until(joined("s2"))
    assert joined() not in agent.said
    assert not any(isinstance(body, ReplyWaiting) for body in agent.said)


async def test_a_stage_of_a_sum_is_answered_by_the_trainer(agent: Fixture) -> None:
    agent.part.invite(invitation(), message_id="i")
    agent.part.ask(question(), message_id="question-1")
    wanted = SumAnswer(run_id="run-1", session_id="s1", stage="consent", answer=b"survivors")
    await agent.until(wanted)
    assert agent.replies[agent.said.index(wanted)] == "question-1"


async def test_a_stage_of_another_session_or_without_a_trainer_is_not_answered(
    agent: Fixture,
) -> None:
    agent.part.ask(question(), message_id="too-early")
    agent.part.invite(invitation(), message_id="i")
    agent.part.ask(question("s0"), message_id="too-late")
    agent.part.ask(question(), message_id="now")
    await agent.until_that(lambda said: any(isinstance(body, SumAnswer) for body in said))
    about = zip(agent.said, agent.replies, strict=True)
    assert [to for body, to in about if isinstance(body, SumAnswer)] == ["now"]


def question(session_id: str = "s1") -> SumQuestion:
    return SumQuestion(
        run_id="run-1",
        session_id=session_id,
        session=bytes(32),
        stage="consent",
        question=b"survivors",
    )


async def test_a_repeated_invitation_keeps_the_trainer_and_says_joined_again(
    agent: Fixture,
) -> None:
    agent.part.invite(invitation(), message_id="i")
    await agent.until(joined())
    pid = agent.trainer_pid()
    agent.part.invite(invitation(), message_id="j")
    await agent.until_that(lambda said: said.count(joined()) == 2)
    assert agent.trainer_pid() == pid


async def test_words_about_another_session_are_ignored(agent: Fixture) -> None:
    agent.part.invite(invitation(), message_id="i")
    await agent.until(joined())
    agent.part.nudge(Nudge(run_id="run-1", session_id="s0"))
    agent.part.dismiss(DismissFromRun(run_id="run-1", session_id="s0", cause="old"))
    agent.part.nudge(Nudge(run_id="run-1", session_id="s1"))
    await agent.until_that(lambda said: any(isinstance(body, ReplyWaiting) for body in said))
    assert sum(isinstance(body, ReplyWaiting) for body in agent.said) == 1
    assert agent.part.doing


async def test_stop_training_leaves_the_run_and_says_when_that_is_done(agent: Fixture) -> None:
    agent.part.invite(invitation(), message_id="i")
    await agent.until(joined())
    async with asyncio.timeout(TIME_LIMIT_S):
        await agent.part.stop_training("maintenance").wait()
    assert left("maintenance") in agent.said


async def test_stop_training_without_a_run_says_nothing(agent: Fixture) -> None:
    async with asyncio.timeout(TIME_LIMIT_S):
        await agent.part.stop_training("maintenance").wait()
    assert agent.said == []


@pytest.mark.parametrize(
    ("session_id", "cause"),
    [
        ("cannot-connect", "the SuperLink refuses this node"),
        ("mute", "the trainer ended with status 1; its log on the device says more"),
        ("lease-ran-out", "the trainer heard nothing any more and ended"),
    ],
)
async def test_a_trainer_that_ended_is_reported_with_its_cause(
    agent: Fixture, session_id: str, cause: str
) -> None:
    agent.part.invite(invitation(session_id=session_id), message_id="i")
    await agent.until(left(cause, session_id))
    agent.part.invite(invitation("run-2"), message_id="j")
    await agent.until(answer(accepted=True, run_id="run-2"))


async def test_a_trainer_that_talks_nonsense_is_ended(agent: Fixture) -> None:
    agent.part.invite(invitation(session_id="confused"), message_id="i")
    await agent.until_that(
        lambda said: any(isinstance(b, LeftRun) and "what is no message" in b.cause for b in said)
    )


@pytest.mark.parametrize("session_id", ["mute", "confused"])
async def test_what_a_trainer_says_or_logs_is_not_passed_on_since_it_may_quote_data(
    agent: Fixture, session_id: str
) -> None:
    agent.part.invite(invitation(session_id=session_id), message_id="i")
    await agent.until_that(lambda said: any(isinstance(body, LeftRun) for body in said))
    for quoted in ("last words", "this is no message"):
        assert quoted not in str(agent.said)


async def test_an_owner_s_policy_is_asked_anew_for_each_invitation(
    agent: Fixture, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    for text, sentence in (
        ("min_cohort = 19", "min_cohort = 19 in policy.toml"),
        ("min_cohort = 'many'", "`shoal-agent policy check`"),
    ):
        policy.write_text(text)
        agent.part.invite(invitation(), message_id="i")
        await agent.until_that(lambda said, words=sentence: words in str(said))  # type: ignore[misc]
    policy.unlink()
    agent.part.invite(invitation(), message_id="k")
    await agent.until(joined())


async def test_a_trainer_that_cannot_start_is_a_no(tmp_path: Path) -> None:
    async with running(Fixture(tmp_path, ("/nowhere/python",))) as agent:
        agent.part.invite(invitation(), message_id="i")
        await agent.until_that(lambda said: len(said) == 1)
    (no,) = agent.said
    assert isinstance(no, InvitationAnswer)
    assert "cannot start trainer" in no.reason


async def test_no_trainer_outlives_the_participation(tmp_path: Path) -> None:
    async with running(Fixture(tmp_path, (sys.executable, "-c", TRAINER))) as agent:
        agent.part.invite(invitation(), message_id="i")
        await agent.until(joined())
        pid = agent.trainer_pid()
    assert not is_alive(pid)
