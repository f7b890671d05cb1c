"""Drives one run to its end: session after session until the rounds are done, then the export.

Whatever dies, the next session begins at the last commit. Only a worker that crashes again and
again without committing anything ends the run.
"""

import asyncio
import contextlib
import itertools
import logging
import random
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

from cloud_coordinator.compression.service import Compressions, Job, PerformsRuns
from cloud_coordinator.runs.lifecycle import ACTIVE, RunEvent, RunState
from cloud_coordinator.runs.progress import Progress
from cloud_coordinator.runs.session import RunSession, SessionParts, SuperLinkHandle
from cloud_coordinator.runs.session_events import (
    Interrupted,
    Post,
    RoundsDone,
    RunBroken,
    SessionEnd,
    StopAsked,
    Stopped,
)
from cloud_coordinator.supervisor import Supervisor, back_off_s
from shared.errors import ConfigError, ConflictError, ShoalError, UnavailableError
from shared.rollout_plan import RolloutPlan
from shared.run_plan import RunPlan

logger = logging.getLogger(__name__)
T = TypeVar("T")


class BuildsVersions(Protocol):
    """The model service, as far as runs need it."""

    async def build_version(
        self,
        *,
        run_id: str,
        plan: RunPlan,
        parameters_sha256: str,
        rounds: int,
        say: Callable[[str], None],
    ) -> str:
        """Export, check and sign; return the version. Called again it returns the same one.

        Raises:
            UnfitModelError: the model cannot be exported, with the reason.
            UnavailableError: something is away; try again.
        """
        ...


class Deploys(Protocol):
    """The rollout service, as far as runs need it."""

    async def deploy(
        self, *, task_name: str, model_version: str, plan: RolloutPlan | None
    ) -> object:
        """Let every device with data for the task serve this version, wave by wave.

        Raises:
            ConflictError: that was begun before.
            ConfigError: its waves fit no device.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverParts:
    """What all drivers of a coordinator share."""

    session: SessionParts
    superlink: Supervisor[SuperLinkHandle]
    models: BuildsVersions
    compressions: Compressions
    rollouts: Deploys
    most_crashes: int  # in a row, without a commit
    rng: random.Random


class RunDriver:
    """One run, as long as it is active."""

    def __init__(
        self,
        run_id: str,
        plan: RunPlan,
        state: RunState,
        parts: DriverParts,
        *,
        runs: PerformsRuns,
    ) -> None:
        self.run_id, self._plan, self._state = run_id, plan, state
        self.ended = asyncio.Event()  # set by who drives, when this run is in its last state
        self._runs = runs
        self._parts = parts
        self._session: RunSession | None = None
        self._progress = Progress(doing="starting", since=parts.session.clock())
        self._stop: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def progress(self) -> Progress:
        """What the run does right now."""
        return self._session.progress if self._session else self._progress

    def post(self, event: Post) -> None:
        """Hand an event to the session, if there is one; a new session asks everybody anew."""
        if self._session is not None:
            self._session.post(event)

    def stop(self, cause: str) -> None:
        """Ask the run to end; asked twice, the first cause counts."""
        if not self._stop.done():
            self._stop.set_result(cause)
        self.post(StopAsked(cause))

    async def drive(self) -> None:
        """Bring the run to its end, whatever that is, and store it."""
        try:
            end: SessionEnd = RoundsDone()
            if self._state is not RunState.EXPORTING:
                end = await self._all_rounds()
            await self._settle(end)
        except ShoalError as error:
            logger.warning("run %s failed: %s", self.run_id, error)
            await self._move(RunEvent.BROKE, cause=str(error))

    async def _settle(self, end: SessionEnd) -> None:
        match end:
            case RunBroken(cause):
                await self._move(RunEvent.BROKE, cause=cause)
            case Stopped(cause):
                await self._move(RunEvent.STOP_ASKED, cause=cause)
            case _ if self._plan.asks or not self._plan.export:
                await self._move(RunEvent.ANSWERED)
            case _:
                await self._export()

    async def _all_rounds(self) -> SessionEnd:
        crashes = 0
        while not await self._is_answered():
            end = await self._one_session()
            if not isinstance(end, Interrupted):
                return end
            logger.warning("run %s was interrupted: %s", self.run_id, end.cause)
            crashes = (0 if end.committed else crashes) + end.worker_crashed
            if crashes >= self._parts.most_crashes:
                return RunBroken(f"gave up after {crashes} crashes in a row: {end.cause}")
            if end.worker_crashed:
                await self._pause(back_off_s(crashes, self._parts.rng), end.cause)
        return RoundsDone()

    async def _is_answered(self) -> bool:
        """Return whether the run only asks, and an earlier session got the answers."""
        if not self._plan.asks:
            return False
        start = await asyncio.to_thread(self._parts.session.records.starting_point, self.run_id)
        return start.rounds_committed > 0

    async def _one_session(self) -> SessionEnd:
        life = await self._unless_stopped(self._parts.superlink.up())
        if life is None:
            return Stopped(self._stop.result())
        self._session = RunSession(self.run_id, self._plan, self._parts.session, life)
        if self._stop.done():
            self._session.post(StopAsked(self._stop.result()))
        try:
            return await self._session.run()
        except UnavailableError as error:  # the worker cannot be started
            return Interrupted(str(error), worker_crashed=True, committed=False)
        finally:
            self._session = None

    async def _pause(self, seconds: float, cause: str) -> None:
        now = self._parts.session.clock()
        self._progress = Progress(
            doing="pausing", since=now, until=now + timedelta(seconds=seconds), note=cause
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self._stop), seconds)

    async def _export(self) -> None:
        records = self._parts.session.records
        if self._state is not RunState.EXPORTING:
            await self._move(RunEvent.ROUNDS_DONE)
        self._note_export()
        start = await asyncio.to_thread(records.starting_point, self.run_id)
        assert start.resume is not None  # rounds were committed, or this state was not reached
        version = await self._unless_stopped(
            self._build(start.resume.parameters_sha256, start.rounds_committed)
        )
        if version is None:
            cause = self._stop.result()
            await self._parts.compressions.stop(self.run_id, cause, self._runs)
            await self._move(RunEvent.STOP_ASKED, cause=cause)
            return
        cause = await self._deploy(version) if self._plan.deploy else ""
        await self._move(RunEvent.MODEL_BUILT, cause=cause, model_version=version)

    async def _deploy(self, version: str) -> str:
        """Start the rollout; return why there is none where its plan fits no device."""
        try:
            await self._parts.rollouts.deploy(
                task_name=self._plan.task.name, model_version=version, plan=self._plan.rollout
            )
        except ConflictError as error:  # an earlier life of this driver did it
            logger.info("run %s: %s", self.run_id, error)
        except ConfigError as error:
            return f"not rolled out: {error}"
        return ""

    async def _build(self, parameters_sha256: str, rounds: int) -> str:
        """Build the model version; what is merely away now is tried again a few times."""
        job = Job(
            run_id=self.run_id,
            plan=self._plan,
            parameters_sha256=parameters_sha256,
            rounds=rounds,
            runs=self._runs,
            say=self._note_export,
        )
        for attempt in itertools.count(1):
            try:
                if self._plan.compression is not None or self._plan.judge is not None:
                    return await self._parts.compressions.conduct(job)
                return await self._parts.models.build_version(
                    run_id=job.run_id,
                    plan=job.plan,
                    parameters_sha256=job.parameters_sha256,
                    rounds=job.rounds,
                    say=job.say,
                )
            except UnavailableError as error:
                if attempt >= self._parts.most_crashes:
                    raise
                logger.warning("run %s: export to be tried again: %s", self.run_id, error)
                await self._pause(back_off_s(attempt, self._parts.rng), str(error))
        raise AssertionError  # the loop above has no end

    def _note_export(self, doing: str = "") -> None:
        now = self._parts.session.clock()
        self._progress = Progress(doing="exporting", since=now, note=doing)

    async def _move(
        self, event: RunEvent, *, cause: str = "", model_version: str | None = None
    ) -> None:
        self._state = await asyncio.to_thread(
            self._parts.session.records.move,
            self.run_id,
            event,
            cause=cause,
            model_version=model_version,
        )
        logger.info("run %s is %s", self.run_id, self._state, extra={"run_id": self.run_id})
        if self._state not in ACTIVE:
            scratch = self._parts.session.scratch / self.run_id
            await asyncio.to_thread(shutil.rmtree, scratch, ignore_errors=True)

    async def _unless_stopped(self, work: Awaitable[T]) -> T | None:
        """Return what ``work`` returns, or None as soon as the run is asked to stop."""
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._stop}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return await task if task.done() else None
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
