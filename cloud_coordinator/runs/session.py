"""One session of a run: one life of its worker beside one life of the SuperLink.

All that happens (the worker speaks or ends, a device answers, joins, replies or vanishes, somebody
asks to stop) comes through one mailbox and is handled one after the other. The worker decides and
computes; here is what it may not do: write the database and speak MQTT. The session ends when
either process does, and nothing of it but the database counts for the next one.
"""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from cloud_coordinator.control_link import ControlLink
from cloud_coordinator.devices.service import Device, DeviceService
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    DeviceAnswered,
    DeviceLeft,
    FromWorker,
    NudgeDevices,
    ReplyWaits,
    RoundClosed,
    RoundProgress,
    RoundRecord,
    RoundSaved,
    RoundStarted,
    RunFailed,
    RunFinished,
    SignConfigs,
    StartRun,
    StopRun,
    ToWorker,
    WaitingForDevices,
    WorkerReady,
)
from cloud_coordinator.runs.lifecycle import RunEvent
from cloud_coordinator.runs.progress import Progress
from cloud_coordinator.runs.records import RunRecords
from cloud_coordinator.runs.recruitment import Invitation as Invited
from cloud_coordinator.runs.recruitment import InvitationState, Recruitment
from cloud_coordinator.runs.session_events import (
    BrokerBack,
    DeviceSaid,
    DeviceSeen,
    DeviceWord,
    Interrupted,
    Post,
    RoundsDone,
    RunBroken,
    SessionEnd,
    StopAsked,
    Stopped,
)
from cloud_coordinator.runs.sum_relay import KnowsMembers, SumRelay
from cloud_coordinator.supervisor import Handle, Life
from shared.child import Child
from shared.errors import ConfigError, PeerError, UnavailableError
from shared.files import make_folder
from shared.messages import (
    DismissFromRun,
    Invitation,
    InvitationAnswer,
    JoinedRun,
    LeftRun,
    Nudge,
    ReplyWaiting,
    SumAnswer,
    as_text,
)
from shared.run_plan import RunPlan

logger = logging.getLogger(__name__)

_RUN_IS_OVER = 1  # exit status of a worker whose run cannot go on; others may be tried again
_WORKER_FAREWELL_S = 15.0


class SuperLinkHandle(Handle, Protocol):
    """What a session needs of a running SuperLink; see flower/superlink.py."""

    ca_pem: str
    secrets_path: Path

    @property
    def public_address(self) -> str:
        """Where devices reach it, ``host:port``."""
        ...

    @property
    def private_address(self) -> str:
        """Where workers reach it, ``host:port``."""
        ...

    async def register_node(self, public_key_pem: str, name: str) -> int:
        """Let a node key in and return its node id; the same one if it is in already."""
        ...


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How long a session waits for what."""

    answer_time: timedelta
    join_time: timedelta
    lease_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionParts:
    """What all sessions of a coordinator share."""

    records: RunRecords
    devices: DeviceService
    link: ControlLink
    start_worker: Callable[[str], Awaitable[Child]]  # by run id
    blobs: Path
    scratch: Path  # a folder for each run, for sums that are not finished
    fleet: str
    membership: KnowsMembers
    sign_config: Callable[[bytes], bytes]  # seals what a secure sum is about
    settings: SessionSettings
    clock: Callable[[], datetime]


@dataclass(frozen=True, slots=True)
class _WorkerSaid:
    message: FromWorker


@dataclass(frozen=True, slots=True)
class _WorkerEnded:
    status: int


@dataclass(frozen=True, slots=True)
class _SuperLinkEnded:
    pass


_Event = Post | _WorkerSaid | _WorkerEnded | _SuperLinkEnded


class RunSession:
    """Make one, feed it with `post`, and await `run`."""

    def __init__(
        self, run_id: str, plan: RunPlan, parts: SessionParts, life: Life[SuperLinkHandle]
    ) -> None:
        self.session_id = uuid.uuid4().hex
        self.progress = Progress(doing="starting", since=parts.clock())
        self._run_id, self._plan = run_id, plan
        self._parts, self._life = parts, life
        self._superlink = life.handle
        self._mailbox: asyncio.Queue[_Event] = asyncio.Queue()
        self._nodes: dict[str, int] = {}  # by device id
        self._worker: Child | None = None
        self._worker_ready = False
        self._worker_failure = ""
        self._committed = False
        self._rounds_run = False  # whether the run's state is `running`
        self._renew_at = parts.clock() + self._renewal_interval()
        self._sums = SumRelay(
            run_id=run_id,
            session_id=self.session_id,
            link=parts.link,
            membership=parts.membership,
            sign=parts.sign_config,
            clock=parts.clock,
        )
        self._recruitment = Recruitment(
            task=plan.task.name,
            answer_time=parts.settings.answer_time,
            join_time=parts.settings.join_time,
        )

    def post(self, event: Post) -> None:
        """Let the session know; words about another session are dropped."""
        if isinstance(event, DeviceSaid) and event.body.session_id != self.session_id:
            logger.debug("%s spoke of an older session", event.device_id)
            return
        self._mailbox.put_nowait(event)

    async def run(self) -> SessionEnd:
        """Work until one of the two processes ends or somebody asks to stop."""
        self._worker = await self._parts.start_worker(self._run_id)
        end: SessionEnd | None = None
        watchers = [
            asyncio.create_task(self._read_worker(), name=f"worker-{self._run_id}"),
            asyncio.create_task(self._watch_superlink(), name=f"superlink-{self._run_id}"),
        ]
        try:
            await self._begin()
            while end is None:
                end = await self._next()
            return end
        finally:
            for watcher in watchers:
                watcher.cancel()
            if isinstance(end, RoundsDone | RunBroken | Stopped):
                await self._part_in_peace(end)
            await self._worker.stop(timeout_s=_WORKER_FAREWELL_S)

    async def _begin(self) -> None:
        start = await asyncio.to_thread(self._parts.records.starting_point, self._run_id)
        scratch = self._parts.scratch / self._run_id
        await asyncio.to_thread(make_folder, scratch)
        await self._tell(
            StartRun(
                run_id=self._run_id,
                session_id=self.session_id,
                fleet=self._parts.fleet,
                plan=self._plan,
                resume=start.resume,
                next_round=start.next_round,
                times_selected=start.times_selected,
                blobs=str(self._parts.blobs),
                scratch=str(scratch),
                superlink_address=self._superlink.private_address,
                superlink_ca_pem=self._superlink.ca_pem,
                superlink_secrets_path=str(self._superlink.secrets_path),
            )
        )
        await self._move(RunEvent.DEVICES_LACKING)
        await self._tend_invitations()

    async def _next(self) -> SessionEnd | None:
        """Handle one event, or what is due when none comes in time."""
        try:
            event = await asyncio.wait_for(self._mailbox.get(), self._seconds_to_next_duty())
        except TimeoutError:
            await self._tend_invitations()
            await self._renew_leases()
            return None
        return await self._handle(event)

    async def _handle(self, event: _Event) -> SessionEnd | None:
        match event:
            case _WorkerSaid(message):
                return await self._hear_worker(message)
            case DeviceSaid(device_id, body):
                await self._hear_device(device_id, body)
            case DeviceSeen(device):
                await self._see_device(device)
            case BrokerBack():
                await self._tend_invitations()
                await self._nudge(tuple(self._recruitment.joined))  # some may have missed theirs
            case _WorkerEnded(status):
                return self._judge_end(status)
            case _SuperLinkEnded():
                return self._interrupted("the SuperLink ended", worker_crashed=False)
            case StopAsked(cause):
                await self._tell(StopRun(cause))
                return Stopped(cause)
        return None

    async def _hear_worker(self, message: FromWorker) -> SessionEnd | None:
        match message:
            case WorkerReady():
                self._worker_ready = True
                for device_id in sorted(self._recruitment.joined):
                    await self._tell(self._sums.joined(device_id, self._nodes[device_id]))
            case WaitingForDevices():
                await self._note_waiting(message)
            case RoundStarted():
                await self._note_round(message)
            case RoundProgress():
                self._note_progress(message)
            case NudgeDevices() | SignConfigs() | AskDevices():
                await self._serve(message)
            case RoundClosed(record):
                await self._save(record)
            case RunFinished():
                return RoundsDone()
            case RunFailed(cause):
                self._worker_failure = cause
        return None

    async def _serve(self, message: NudgeDevices | SignConfigs | AskDevices) -> None:
        match message:
            case NudgeDevices(device_ids):
                await self._nudge(device_ids)
            case SignConfigs():
                await self._tell(self._sums.sign(message))
            case AskDevices():
                await self._sums.ask(message, self._recruitment.joined)

    async def _save(self, record: RoundRecord) -> None:
        await asyncio.to_thread(self._parts.records.save_round, self._run_id, record)
        self._committed = True
        logger.info(
            "run %s: round %d %s%s", self._run_id, record.round_number, record.state,
            _figures(record),
            extra={"run_id": self._run_id, "round_number": record.round_number},
        )  # fmt: skip
        await self._tell(RoundSaved(record.round_number))

    async def _hear_device(self, device_id: str, body: DeviceWord) -> None:
        now = self._parts.clock()
        match body:
            case InvitationAnswer(accepted=accepted, reason=reason):
                await self._note(
                    self._recruitment.answer(device_id, accepted=accepted, reason=reason, now=now)
                )
            case JoinedRun() if device_id in self._nodes:
                await self._let_in(device_id)
            case LeftRun(cause=cause):
                await self._lose(device_id, cause)
            case ReplyWaiting(message_id=message_id) if device_id in self._recruitment.joined:
                await self._tell(ReplyWaits(message_id))
            case SumAnswer(answer=answer) if device_id in self._recruitment.joined:
                await self._tell(DeviceAnswered(device_id, answer))
            case _:
                logger.debug("%s spoke without having been let in", device_id)

    async def _let_in(self, device_id: str) -> None:
        changed = self._recruitment.join(device_id)
        await self._note(changed)
        if changed and self._worker_ready:
            await self._tell(self._sums.joined(device_id, self._nodes[device_id]))

    async def _see_device(self, device: Device) -> None:
        if not device.online:
            await self._lose(device.device_id, "went offline")
        elif device.device_id in self._recruitment.joined:  # it was away, and may have missed one
            await self._nudge((device.device_id,))
        await self._tend_invitations()

    async def _lose(self, device_id: str, cause: str) -> None:
        was_joined = device_id in self._recruitment.joined
        now = self._parts.clock()
        await self._note(self._recruitment.leave(device_id, cause=cause, now=now))
        if was_joined and self._worker_ready:
            await self._tell(DeviceLeft(device_id, cause))

    async def _tend_invitations(self) -> None:
        """Give up on those who are late, and ask everybody who may be asked now."""
        now = self._parts.clock()
        await self._note(self._recruitment.expire(now))
        if not self._parts.link.connected:
            return
        everybody = await self._parts.devices.devices()
        due = self._recruitment.whom_to_invite(everybody, now)
        if due and self._is_secure:
            due = await self._members_of(due, now)
        for device in due:
            if not await self._invite(device, now):
                break

    async def _members_of(self, due: list[Device], now: datetime) -> list[Device]:
        """Return the devices that may be in a sum; the others are asked once that has changed."""
        await self._sums.read_members()
        for device_id in self._recruitment.joined:
            if reason := self._sums.why_not(device_id):  # it was revoked
                await self._lose(device_id, reason)
        for device in due:
            if reason := self._sums.why_not(device.device_id):
                name = device.device_id
                self._recruitment.invite(name, now)
                no = self._recruitment.answer(name, accepted=False, reason=reason, now=now)
                await self._note(no)
        return [device for device in due if not self._sums.why_not(device.device_id)]

    async def _invite(self, device: Device, now: datetime) -> bool:
        """Ask one device; return False where asking others now would fail too."""
        name = device.device_id
        changed = self._recruitment.invite(name, now)
        try:
            self._nodes[name] = await self._superlink.register_node(device.node_key_pem, name)
            sent = await self._parts.link.try_send(
                self._invitation(), device=name, lifetime=self._parts.settings.answer_time
            )
        except ConfigError as error:  # the key itself is of no use
            changed = self._recruitment.answer(name, accepted=False, reason=str(error), now=now)
            sent = True
        except UnavailableError as error:  # its end is about to be reported
            logger.warning("%s cannot be invited: %s", name, error)
            changed = self._recruitment.leave(name, cause=str(error), now=now)
            sent = False
        await self._note(changed)
        return sent

    @property
    def _is_secure(self) -> bool:
        return self._plan.privacy.mode == "secure"

    def _invitation(self) -> Invitation:
        return Invitation(
            run_id=self._run_id,
            session_id=self.session_id,
            task=self._plan.task,
            min_examples=self._plan.cohort.min_examples,
            superlink_address=self._superlink.public_address,
            lease_s=self._parts.settings.lease_s,
            mode=self._plan.privacy.mode,
            min_survivors=self._plan.layout().min_survivors if self._is_secure else 0,
        )

    async def _note_waiting(self, message: WaitingForDevices) -> None:
        since = self.progress.since if self.progress.doing == "waiting" else self._parts.clock()
        self.progress = Progress(
            doing="waiting",
            since=since,
            until=message.until,
            joined=message.joined,
            wanted=message.wanted,
        )
        if self._rounds_run:
            await self._move(RunEvent.DEVICES_LACKING)
        await self._tend_invitations()

    async def _note_round(self, message: RoundStarted) -> None:
        self.progress = Progress(
            doing="train",
            since=self._parts.clock(),
            until=message.deadline_at,
            round_number=message.round_number,
            joined=self._recruitment.count(InvitationState.JOINED),
            asked=len(message.cohort),
        )
        if not self._rounds_run:
            await self._move(RunEvent.ROUND_STARTED)

    def _note_progress(self, message: RoundProgress) -> None:
        self.progress = replace(
            self.progress,
            doing=message.stage,
            round_number=message.round_number,
            replied=message.replied,
            asked=message.cohort,
            until=message.until or self.progress.until,
        )

    async def _move(self, event: RunEvent) -> None:
        await asyncio.to_thread(self._parts.records.move, self._run_id, event)
        self._rounds_run = event is RunEvent.ROUND_STARTED

    async def _note(self, changed: list[Invited]) -> None:
        if not changed:
            return
        for invitation in changed:
            logger.info(
                "run %s: %s %s%s", self._run_id, invitation.device_id, invitation.state,
                f" ({invitation.reason})" if invitation.reason else "",
            )  # fmt: skip
        self.progress = replace(
            self.progress, joined=self._recruitment.count(InvitationState.JOINED)
        )
        await asyncio.to_thread(
            self._parts.records.note_invitations, self._run_id, self.session_id, changed
        )

    async def _nudge(self, device_ids: tuple[str, ...]) -> None:
        nudge = Nudge(run_id=self._run_id, session_id=self.session_id)
        await asyncio.gather(
            *(self._parts.link.try_send(nudge, device=device_id) for device_id in device_ids)
        )

    async def _renew_leases(self) -> None:
        """Nudge those who joined now and then, so that none takes us for dead."""
        now = self._parts.clock()
        if now >= self._renew_at:
            self._renew_at = now + self._renewal_interval()
            await self._nudge(tuple(self._recruitment.joined))

    def _renewal_interval(self) -> timedelta:
        return timedelta(seconds=self._parts.settings.lease_s / 3)

    def _seconds_to_next_duty(self) -> float:
        due = min(self._recruitment.next_deadline() or self._renew_at, self._renew_at)
        return max(0.05, (due - self._parts.clock()).total_seconds())

    async def _part_in_peace(self, end: RoundsDone | RunBroken | Stopped) -> None:
        """Dismiss the devices, and let the worker tidy up at the SuperLink."""
        cause = "the last round is committed" if isinstance(end, RoundsDone) else end.cause
        dismissal = DismissFromRun(
            run_id=self._run_id, session_id=self.session_id, cause=as_text(cause)
        )
        await asyncio.gather(
            *(
                self._parts.link.try_send(dismissal, device=device_id)
                for device_id in self._recruitment.present
            )
        )
        assert self._worker is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._worker.wait(), _WORKER_FAREWELL_S)

    def _judge_end(self, status: int) -> SessionEnd:
        if status == _RUN_IS_OVER and self._worker_failure:
            return RunBroken(self._worker_failure)
        assert self._worker is not None
        last_words = self._worker_failure or self._worker.log_tail(1) or "no last words"
        cause = f"the worker ended with status {status} ({last_words})"
        return self._interrupted(cause, worker_crashed=True)

    def _interrupted(self, cause: str, *, worker_crashed: bool) -> Interrupted:
        # A worker that lost its SuperLink is not to blame for its end.
        blame = worker_crashed and not self._life.ended.is_set()
        return Interrupted(cause, worker_crashed=blame, committed=self._committed)

    async def _tell(self, message: ToWorker) -> None:
        assert self._worker is not None
        await self._worker.send(message)

    async def _read_worker(self) -> None:
        assert self._worker is not None
        try:
            async for message in self._worker.messages(FromWorker):
                self._mailbox.put_nowait(_WorkerSaid(message))
        except PeerError as error:
            logger.warning("stopping the worker of run %s: %s", self._run_id, error)
            self._worker.kill()
        self._mailbox.put_nowait(_WorkerEnded(await self._worker.wait()))

    async def _watch_superlink(self) -> None:
        await self._life.ended.wait()
        self._mailbox.put_nowait(_SuperLinkEnded())


def _figures(record: RoundRecord) -> str:
    """Say in a log line's rest what a round gave, and whose it was."""
    figures = "".join(f" {name}={value:.4f}" for name, value in record.metrics.items())
    if not record.participations:  # the initial model is nobody's
        return figures
    replied = sum(part.outcome == "replied" for part in record.participations)
    return f" with {replied} of {len(record.participations)} devices{figures}"
