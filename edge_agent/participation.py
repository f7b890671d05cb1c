"""This device's part in runs: it answers invitations, and owns the trainer that then works.

One job reads a mailbox, so everything that happens to the trainer (invited, nudged, dismissed,
joined, replied, ended) happens one at a time; the decision itself is in eligibility.py.
A device takes part in one run at once. A run that goes on in a new session finds its trainer warm:
secrets of a sum that is not finished live in that process alone, so it moves and does not end.
After a restart of the daemon nothing is resumed: the coordinator misses the device and invites it
again.
"""

import asyncio
import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edge_agent.eligibility import DataFacts, KnowsData, No, Yes, decide
from edge_agent.privacy.policy import POLICY_FILE, OwnerPolicy, read_policy
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
from shared.errors import ConfigError, DataError, PeerError, UnavailableError
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
    as_text,
)
from shared.tasks.spec import TaskSpec

logger = logging.getLogger(__name__)

TRAINER = (sys.executable, "-m", "edge_agent.trainer")
_FAREWELL_S = 5.0  # how long a trainer may take to leave the SuperLink by itself


class Sends(Protocol):
    """`ControlLink.send`."""

    async def __call__(self, body: UpBody, *, reply_to: str | None = None) -> None:
        """Say ``body`` to the coordinator, now or later."""
        ...


@dataclass(frozen=True, slots=True)
class _Invited:
    invitation: Invitation
    message_id: str


@dataclass(frozen=True, slots=True)
class _Asked:
    question: SumQuestion
    message_id: str


@dataclass(frozen=True, slots=True)
class _Said:
    trainer: Child
    message: FromTrainer


@dataclass(frozen=True, slots=True)
class _Ended:
    trainer: Child
    status: int


@dataclass(frozen=True, slots=True)
class _Stop:
    cause: str
    done: asyncio.Event


_Post = _Invited | Nudge | _Asked | DismissFromRun | _Said | _Ended | _Stop


@dataclass(slots=True)
class _Part:
    """One trainer at work for one session of one run."""

    run_id: str
    session_id: str
    trainer: Child
    joined: bool = False
    doing: str = "starting"
    failure: str = ""


class Participation:
    """Owns the trainer child. Its methods only post to the mailbox that `run` works off."""

    def __init__(
        self,
        *,
        home: Path,
        node_key_path: Path,
        superlink_ca_pem: str,
        data: KnowsData,
        send: Sends,
        trainer: Sequence[str] = TRAINER,
        trainer_env: Mapping[str, str] | None = None,
    ) -> None:
        """Describe the part.

        Args:
            home: the agent's state folder; the trainer's log goes below it.
            node_key_path: of the key with which the trainer signs at the SuperLink.
            superlink_ca_pem: what the SuperLink's certificate must be signed by.
            data: the owner's registry.
            send: `ControlLink.send`.
            trainer: the child's command line.
            trainer_env: variables for the child on top of our own.
        """
        self._home = home
        self._node_key_path = node_key_path
        self._superlink_ca_pem = superlink_ca_pem
        self._data = data
        self._send = send
        self._trainer = trainer
        self._trainer_env = trainer_env
        self._part: _Part | None = None
        self._mailbox: asyncio.Queue[_Post] = asyncio.Queue()

    @property
    def doing(self) -> str:
        """For the owner: the run this device is in and what its trainer does; empty when idle."""
        part = self._part
        return "" if part is None else f"{part.run_id}: {part.doing}"

    def invite(self, invitation: Invitation, *, message_id: str) -> None:
        """Have an invitation answered; ``message_id`` is its envelope's, for the answer."""
        self._mailbox.put_nowait(_Invited(invitation, message_id))

    def nudge(self, nudge: Nudge) -> None:
        """A message waits at the SuperLink."""
        self._mailbox.put_nowait(nudge)

    def ask(self, question: SumQuestion, *, message_id: str) -> None:
        """Have the trainer answer a stage of a secure sum; without one nothing is said."""
        self._mailbox.put_nowait(_Asked(question, message_id))

    def dismiss(self, dismissal: DismissFromRun) -> None:
        """The run is over for this device."""
        self._mailbox.put_nowait(dismissal)

    def stop_training(self, cause: str) -> asyncio.Event:
        """Leave whatever run there is; the event is set when that is done."""
        done = asyncio.Event()
        self._mailbox.put_nowait(_Stop(cause, done))
        return done

    async def run(self) -> None:
        """Work off the mailbox until cancelled; no trainer outlives this."""
        try:
            async with asyncio.TaskGroup() as listeners:
                while True:
                    await self._handle(await self._mailbox.get(), listeners)
        finally:
            if self._part is not None:
                self._part.trainer.kill()
                await self._part.trainer.wait()

    async def _handle(self, post: _Post, listeners: asyncio.TaskGroup) -> None:
        match post:
            case _Invited(invitation=invitation, message_id=message_id):
                await self._answer(invitation, message_id, listeners)
            case _Stop(cause=cause, done=done):
                await self._leave(cause)
                done.set()
            case _ if self._part is not None and _is_about(post, self._part):
                await self._go_on(post, self._part)
            case _:
                logger.debug("too late: %s", type(post).__name__)

    async def _go_on(self, post: _Post, part: _Part) -> None:
        match post:
            case Nudge():
                await part.trainer.send(MessageWaits())
            case _Asked(question=asked, message_id=message_id):
                await part.trainer.send(
                    StageQuestion(
                        message_id=message_id,
                        session=asked.session,
                        stage=asked.stage,
                        question=asked.question,
                    )
                )
            case DismissFromRun(cause=cause):
                await self._leave(cause)
            case _Said(message=message):
                await self._hear(part, message)
            case _Ended(status=status):
                await self._forget(part, self._cause_of_end(part, status))

    async def _answer(
        self, invitation: Invitation, message_id: str, listeners: asyncio.TaskGroup
    ) -> None:
        part = self._part
        decision = decide(
            invitation,
            self._find(invitation.task),
            self._allowed(),
            busy_with=part.run_id if part is not None else None,
        )
        if isinstance(decision, Yes):
            try:
                await self._take_part(invitation, decision, listeners)
            except UnavailableError as error:
                decision = No(str(error))
        reason = decision.reason if isinstance(decision, No) else ""
        logger.info(
            "invited to run %s: %s", invitation.run_id, f"no, {reason}" if reason else "yes"
        )
        answer = InvitationAnswer(
            run_id=invitation.run_id,
            session_id=invitation.session_id,
            accepted=isinstance(decision, Yes),
            reason=as_text(reason),
        )
        await self._send(answer, reply_to=message_id)
        part = self._part
        if part is not None and part.joined and part.session_id == invitation.session_id:
            await self._say_joined(part)  # it lost us for a while; our trainer never left

    def _find(self, task: TaskSpec) -> DataFacts | No:
        try:
            return self._data.find(task)
        except DataError as error:
            return No(str(error))

    def _allowed(self) -> OwnerPolicy | No:
        try:
            return read_policy(self._home)
        except ConfigError as error:
            logger.warning("%s", error)
            return No(
                f"this device's {POLICY_FILE} cannot be read; "
                "its owner sees why with `shoal-agent policy check`"
            )

    async def _take_part(
        self, invitation: Invitation, decision: Yes, listeners: asyncio.TaskGroup
    ) -> None:
        """Start a trainer, or move the one that is there to the run's new session."""
        if self._part is not None:
            if self._part.session_id != invitation.session_id:
                await self._move(self._part, invitation)
            return
        trainer = await Child.start(
            self._trainer,
            name="trainer",
            log_path=self._home / "logs" / "trainer.log",
            env=self._trainer_env,
        )
        self._part = _Part(invitation.run_id, invitation.session_id, trainer)
        listeners.create_task(self._listen(trainer), name="trainer-listener")
        await trainer.send(
            StartTraining(
                run_id=invitation.run_id,
                session_id=invitation.session_id,
                task=invitation.task,
                data_name=decision.data_name,
                home=str(self._home),
                superlink_address=invitation.superlink_address,
                superlink_ca_pem=self._superlink_ca_pem,
                node_key_path=str(self._node_key_path),
                lease_s=invitation.lease_s,
            )
        )

    async def _move(self, part: _Part, invitation: Invitation) -> None:
        logger.info("run %s goes on in a new session", part.run_id)
        part.session_id, part.joined = invitation.session_id, False
        part.doing = "joining the run's new session"
        await part.trainer.send(
            RejoinTraining(
                session_id=invitation.session_id,
                superlink_address=invitation.superlink_address,
                superlink_ca_pem=self._superlink_ca_pem,
                lease_s=invitation.lease_s,
            )
        )

    async def _listen(self, trainer: Child) -> None:
        """Post all that ``trainer`` says, and its end, to the mailbox."""
        try:
            async for message in trainer.messages(FromTrainer):
                self._mailbox.put_nowait(_Said(trainer, message))
        except PeerError as error:
            logger.warning("stopping the trainer: %s", error)
            cause = "the trainer said what is no message; the agent's log on the device says more"
            self._mailbox.put_nowait(_Said(trainer, TrainerFailed(cause)))
            trainer.kill()
        self._mailbox.put_nowait(_Ended(trainer, await trainer.wait()))

    async def _hear(self, part: _Part, message: FromTrainer) -> None:
        match message:
            case TrainerJoined(session_id=session_id) | TrainerReplied(session_id=session_id) if (
                session_id != part.session_id
            ):
                logger.debug("too late: %s", message)
            case TrainerJoined():
                part.joined, part.doing = True, "waiting for work"
                logger.info("joined run %s", part.run_id)
                await self._say_joined(part)
            case TrainerReplied(message_id=message_id):
                part.doing = "waiting for work"
                await self._send(
                    ReplyWaiting(
                        run_id=part.run_id, session_id=part.session_id, message_id=message_id
                    )
                )
            case StageAnswered(message_id=question_id, stage=stage, answer=answer):
                await self._send(
                    SumAnswer(
                        run_id=part.run_id, session_id=part.session_id, stage=stage, answer=answer
                    ),
                    reply_to=question_id,
                )
            case TrainerProgress(doing=doing):
                part.doing = doing
                logger.debug("run %s: %s", part.run_id, doing)
            case TrainerFailed(cause=cause):
                part.failure = cause

    async def _say_joined(self, part: _Part) -> None:
        await self._send(JoinedRun(run_id=part.run_id, session_id=part.session_id))

    async def _leave(self, cause: str) -> None:
        """End the trainer, if there is one, and say so."""
        if self._part is not None:
            await _end(self._part.trainer, cause)
            await self._forget(self._part, cause)

    async def _forget(self, part: _Part, cause: str) -> None:
        self._part = None
        logger.info("left run %s: %s", part.run_id, cause)
        await self._send(
            LeftRun(run_id=part.run_id, session_id=part.session_id, cause=as_text(cause))
        )

    @staticmethod
    def _cause_of_end(part: _Part, status: int) -> str:
        if part.failure:
            return part.failure
        if status == 0:
            return "the trainer heard nothing any more and ended"
        # Its last words may quote the owner's rows; they stay in its log.
        return f"the trainer ended with status {status}; its log on the device says more"


def _is_about(post: _Post, part: _Part) -> bool:
    """Whether ``post`` is about this very trainer, and not one that came before it."""
    match post:
        case (
            Nudge(session_id=session_id)
            | DismissFromRun(session_id=session_id)
            | _Asked(question=SumQuestion(session_id=session_id))
        ):
            return session_id == part.session_id
        case _Said(trainer=trainer) | _Ended(trainer=trainer):
            return trainer is part.trainer
        case _:
            return False


async def _end(trainer: Child, cause: str) -> None:
    """Let ``trainer`` leave by itself, and see to it that it is gone."""
    await trainer.send(StopTraining(cause))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(trainer.wait(), _FAREWELL_S)
    await trainer.stop(timeout_s=_FAREWELL_S)
