"""All runs of a coordinator: starting and stopping them, and telling them what devices say."""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import get_args

from sqlalchemy import update
from sqlalchemy.orm import Session

from cloud_coordinator.database import Database
from cloud_coordinator.devices.service import Device, DeviceService
from cloud_coordinator.runs.driver import DriverParts, RunDriver
from cloud_coordinator.runs.lifecycle import ACTIVE, RunState
from cloud_coordinator.runs.progress import Progress
from cloud_coordinator.runs.records import RunDetails, RunRecords
from cloud_coordinator.runs.recruitment import InvitationState
from cloud_coordinator.runs.session_events import BrokerBack, DeviceSaid, DeviceSeen, DeviceWord
from cloud_coordinator.runs.tables import InvitationRow, RunRow
from shared.config import convert
from shared.errors import ConflictError
from shared.messages import Envelope, JoinedRun, LeftRun, delivery_of
from shared.run_plan import RunPlan

logger = logging.getLogger(__name__)

RUN_WORDS = get_args(DeviceWord)


class RunService:
    """Owns a driver for each active run; `run` is where they live."""

    def __init__(
        self,
        database: Database,
        records: RunRecords,
        devices: DeviceService,
        parts: DriverParts,
        *,
        tidy_up: Callable[[], None],
        clock: Callable[[], datetime],
    ) -> None:
        """Describe the service.

        Args:
            database: where runs are.
            records: reads and writes them.
            devices: knows who is there.
            parts: what drivers share.
            tidy_up: removes files that no run needs; called while no run is active.
            clock: returns aware UTC.
        """
        self._database, self._records, self._devices = database, records, devices
        self._parts = parts
        self._tidy_up = tidy_up
        self._clock = clock
        self._drivers: dict[str, RunDriver] = {}
        self._new: asyncio.Queue[RunDriver] = asyncio.Queue()

    async def run(self) -> None:
        """Resume what is active, then drive every run that is started, until cancelled."""
        active = await asyncio.to_thread(self._records.active)
        if not active:
            await asyncio.to_thread(self._tidy_up)
        for row in active:
            logger.info("run %s goes on (it was %s)", row.run_id, row.state)
            self._launch(row, _plan_of(row))
        async with asyncio.TaskGroup() as group:
            while True:
                driver = await self._new.get()
                group.create_task(self._drive(driver), name=f"run-{driver.run_id}")

    async def start_run(self, plan: RunPlan) -> RunRow:
        """Store a run and begin with it."""
        row = await asyncio.to_thread(self._records.create, plan)
        self._launch(row, plan)
        return row

    async def perform(self, plan: RunPlan, *, run_id: str) -> RunDetails:
        """Start the run of this name, or go on with it, and return it when it has ended."""
        if run_id not in self._drivers:
            row = await asyncio.to_thread(partial(self._records.create, plan, run_id=run_id))
            if RunState(row.state) in ACTIVE:
                self._launch(row, _plan_of(row))
        if driver := self._drivers.get(run_id):
            await driver.ended.wait()
        return await self.details(run_id)

    async def stop_run(self, run_id: str, cause: str) -> None:
        """Ask a run to end.

        Raises:
            NotFoundError: there is no such run.
            ConflictError: it has ended already.
        """
        row = await asyncio.to_thread(self._records.get, run_id)
        driver = self._drivers.get(run_id)
        if RunState(row.state) not in ACTIVE or driver is None:
            raise ConflictError(f"run {run_id} cannot be stopped: it is {row.state}")
        driver.stop(cause)

    async def rows(self) -> list[RunRow]:
        """Return all runs, newest first."""
        return await asyncio.to_thread(self._records.all)

    async def details(self, run_id: str) -> RunDetails:
        """Return one run with its rounds; raise NotFoundError for an unknown one."""
        return await asyncio.to_thread(self._records.details, run_id)

    async def task_of_version(self, version: str) -> str:
        """Return the name of the task that a version is for; raise NotFoundError without one."""
        row = await asyncio.to_thread(self._records.run_of_version, version)
        return _plan_of(row).task.name

    def progress(self, run_id: str) -> Progress | None:
        """Return what an active run does right now; None for any other."""
        driver = self._drivers.get(run_id)
        return driver.progress if driver else None

    async def hear(self, envelope: Envelope) -> None:
        """Take in what a device says of a run; what is durable is stored before this returns."""
        body = envelope.body
        assert isinstance(body, RUN_WORDS)
        if delivery_of(body).durable and not await asyncio.to_thread(self._store, envelope):
            return
        if driver := self._drivers.get(body.run_id):
            driver.post(DeviceSaid(envelope.device, body))

    def see(self, device: Device) -> None:
        """Tell all runs that a device's presence or tasks changed."""
        for driver in self._drivers.values():
            driver.post(DeviceSeen(device))

    def broker_is_back(self) -> None:
        """Have all runs look again whom they may invite."""
        for driver in self._drivers.values():
            driver.post(BrokerBack())

    def _launch(self, row: RunRow, plan: RunPlan) -> None:
        # A run that is started while the active ones are being read is found there as well.
        if row.run_id in self._drivers:
            return
        driver = RunDriver(row.run_id, plan, RunState(row.state), self._parts, runs=self)
        self._drivers[row.run_id] = driver
        self._new.put_nowait(driver)

    async def _drive(self, driver: RunDriver) -> None:
        await driver.drive()
        del self._drivers[driver.run_id]
        driver.ended.set()
        if not self._drivers:
            await asyncio.to_thread(self._tidy_up)

    def _store(self, envelope: Envelope) -> bool:
        """Store a durable message and its effect at once; False: it was stored before."""
        with self._database.transaction() as session:
            if not self._devices.first_time(session, envelope):
                return False
            self._note(session, envelope)
            return True

    def _note(self, session: Session, envelope: Envelope) -> None:
        match envelope.body:
            case JoinedRun(run_id, session_id):
                state, reason = InvitationState.JOINED, ""
            case LeftRun(run_id, session_id, reason):
                state = InvitationState.LEFT
            case _:
                return
        session.execute(
            update(InvitationRow)
            .where(
                InvitationRow.run_id == run_id,
                InvitationRow.device_id == envelope.device,
                InvitationRow.session_id == session_id,
            )
            .values(state=state.value, reason=reason, changed_at=self._clock())
        )


def _plan_of(row: RunRow) -> RunPlan:
    return convert(row.plan, RunPlan, source=f"the stored plan of run {row.run_id}")
