"""Rollouts, carried out: decisions are stored first, then said to devices.

Level-triggered: a device is told what it should serve whenever it introduces itself or the broker
comes back, and does nothing where that is so already. What it really serves is in its report, and
every report makes the rollouts look again; so does the clock, for waits that end by themselves.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from datetime import datetime

from cloud_coordinator.control_link import ControlLink
from cloud_coordinator.database import Database
from cloud_coordinator.rollouts.decision import Wait
from cloud_coordinator.rollouts.lifecycle import RolloutEvent
from cloud_coordinator.rollouts.records import (
    MovesVersions,
    RolloutDetails,
    RolloutRecords,
    Step,
)
from cloud_coordinator.rollouts.tables import DesiredRow, RolloutRow
from shared.errors import ShoalError, UnavailableError
from shared.messages import Desired
from shared.rollout_plan import AT_ONCE, RolloutPlan

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0  # while a rollout is unfinished: bakes and deadlines end by the clock


class RolloutService:
    """Starts rollouts, looks after them, and tells devices what they should serve."""

    def __init__(
        self,
        database: Database,
        models: MovesVersions,
        link: ControlLink,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._records = RolloutRecords(database, models, clock=clock)
        self._link = link
        self._waits: dict[str, Wait] = {}  # by rollout, as of the last look
        self._seen = asyncio.Event()
        self._one_at_a_time = asyncio.Lock()

    async def run(self) -> None:
        """Look after unfinished rollouts until cancelled; a job of the coordinator."""
        while True:
            self._seen.clear()
            try:
                for rollout_id in await asyncio.to_thread(self._records.unfinished):
                    await self._look(rollout_id)
            except UnavailableError as error:  # the database is away
                logger.warning("rollouts have to wait: %s", error)
                await asyncio.sleep(_LOOK_EVERY_S)
                self.see()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._seen.wait(), _LOOK_EVERY_S if self._waits else None)

    def see(self) -> None:
        """Look again soon: a device said something on which a rollout may hang."""
        self._seen.set()

    async def deploy(
        self,
        *,
        task_name: str,
        model_version: str,
        plan: RolloutPlan | None = None,
        again: bool = False,
    ) -> str:
        """Roll a version out to every device with data for the task, now and later.

        Args:
            task_name: of the task.
            model_version: digest of its manifest.
            plan: waves and gates; None: all devices at once.
            again: also a version that had a rollout before, as people may wish.

        Returns:
            The id of the rollout; its first wave is open unless something else has to end first.

        Raises:
            NotFoundError: there is no such version, or its files were tidied away.
            ConflictError: devices should serve it already, or did before.
            ConfigError: a wave matches no device.
        """
        rollout_id = await asyncio.to_thread(
            self._records.create,
            task_name=task_name,
            model_version=model_version,
            plan=plan or AT_ONCE,
            again=again,
        )
        logger.info(
            "rollout %s of version %s is planned", rollout_id, model_version[:12],
            extra={"model_version": model_version},
        )  # fmt: skip
        try:
            await self._carry_out(rollout_id, self._records.step, rollout_id)
        except ShoalError as error:
            await self._by_hand(rollout_id, RolloutEvent.GIVEN_UP, str(error))
            raise
        self.see()
        return rollout_id

    async def pause(self, rollout_id: str) -> None:
        """Open no further wave; what is served stays, and is still watched."""
        await self._by_hand(rollout_id, RolloutEvent.HALTED, "paused by the operator")

    async def resume(self, rollout_id: str) -> None:
        """Go on with a paused rollout where it stopped."""
        await self._by_hand(rollout_id, RolloutEvent.RESUMED, "")

    async def abort(self, rollout_id: str) -> None:
        """Drop a planned rollout; turn one back that has begun."""
        details = await self.details(rollout_id)
        begun = details.row.wave_number > 0
        event = RolloutEvent.TURNED_BACK if begun else RolloutEvent.GIVEN_UP
        await self._by_hand(rollout_id, event, "aborted by the operator")

    async def rows(self) -> list[RolloutRow]:
        """Return all rollouts, the newest first."""
        return await asyncio.to_thread(self._records.all)

    async def details(self, rollout_id: str) -> RolloutDetails:
        """Return one rollout with its devices; raise NotFoundError for an unknown one."""
        return await asyncio.to_thread(self._records.details, rollout_id)

    def wait_of(self, rollout_id: str) -> Wait | None:
        """Return what an unfinished rollout waits for, as of the last look."""
        return self._waits.get(rollout_id)

    async def converge(self, device_id: str) -> None:
        """Tell one device, which has just introduced itself, what it should serve."""
        desired = await asyncio.to_thread(self._records.admit, device_id)
        if desired is not None:
            await self._say(desired)

    async def say_all(self) -> None:
        """Say every desired state again: the broker may have forgotten them."""
        for desired in await asyncio.to_thread(self._records.desired):
            await self._say(desired)

    async def desired(self) -> dict[str, DesiredRow]:
        """Return all desired states by device id."""
        return {row.device_id: row for row in await asyncio.to_thread(self._records.desired)}

    def versions_in_use(self) -> set[str]:
        """Return every version that a device serves, should serve, or may go back to; blocks."""
        return self._records.versions_in_use()

    async def _look(self, rollout_id: str) -> None:
        try:
            await self._carry_out(rollout_id, self._records.step, rollout_id)
        except UnavailableError:
            raise
        except ShoalError as error:  # a version whose files are gone must not end the service
            self._note(rollout_id, self._waits.get(rollout_id), Wait(str(error)))

    async def _by_hand(self, rollout_id: str, event: RolloutEvent, cause: str) -> None:
        await self._carry_out(
            rollout_id, self._records.move_by_hand, rollout_id, event, cause=cause
        )

    async def _carry_out(
        self, rollout_id: str, work: Callable[..., Step], *arguments: object, **named: object
    ) -> None:
        """Let the records change by ``work``, and tell the devices that it concerns."""
        async with self._one_at_a_time:
            before = self._waits.get(rollout_id)
            step = await asyncio.to_thread(work, *arguments, **named)
            self._note(rollout_id, before, step.wait)
        for desired in step.said:
            await self._say(desired)

    def _note(self, rollout_id: str, before: Wait | None, wait: Wait | None) -> None:
        if wait is None:
            self._waits.pop(rollout_id, None)
            logger.info("rollout %s has ended", rollout_id)
            return
        self._waits[rollout_id] = wait
        if before is None or before.why != wait.why:
            logger.info("rollout %s: %s", rollout_id, wait.why)

    async def _say(self, row: DesiredRow) -> None:
        body = Desired(version=row.version, model_version=row.model_version, watch_s=row.watch_s)
        await self._link.try_send(body, device=row.device_id)
