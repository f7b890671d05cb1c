"""Desired state: from "this version for this task" to one signed word for each device.

Level-triggered: a device is told what it should serve whenever it introduces itself or the broker
comes back, and does nothing where that is so already. What it really serves is in its report.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_coordinator.control_link import ControlLink
from cloud_coordinator.database import Database
from cloud_coordinator.devices.service import Device, DeviceService
from cloud_coordinator.devices.tables import DeviceRow
from cloud_coordinator.rollouts.tables import DesiredRow, TargetRow
from shared.messages import Desired

logger = logging.getLogger(__name__)


class MarksCurrent(Protocol):
    """The model service, as far as rollouts need it."""

    def make_current(self, session: Session, version: str) -> None:
        """Note inside this transaction that devices should serve ``version``."""
        ...


class RolloutService:
    """Resolves targets into desired states and says them."""

    def __init__(
        self,
        database: Database,
        devices: DeviceService,
        models: MarksCurrent,
        link: ControlLink,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        self._database, self._devices, self._models = database, devices, models
        self._link = link
        self._clock = clock

    async def deploy(self, *, task_name: str, model_version: str) -> None:
        """Let every device with data for the task serve this version, now and later.

        Raises:
            NotFoundError: there is no such version, or its files were tidied away.
        """
        devices = await self._devices.devices()
        changed = await asyncio.to_thread(self._set_target, task_name, model_version, devices)
        logger.info(
            "version %s goes to %d devices", model_version[:12], len(changed),
            extra={"model_version": model_version},
        )  # fmt: skip
        for desired in changed:
            await self._say(desired)

    async def converge(self, device: Device) -> None:
        """Tell one device, which has just introduced itself, what it should serve."""
        desired = await asyncio.to_thread(self._resolve_one, device)
        if desired is not None:
            await self._say(desired)

    async def say_all(self) -> None:
        """Say every desired state again: the broker may have forgotten them."""
        for desired in await asyncio.to_thread(self._all):
            await self._say(desired)

    async def desired(self) -> dict[str, DesiredRow]:
        """Return all desired states by device id."""
        return {row.device_id: row for row in await asyncio.to_thread(self._all)}

    def versions_in_use(self) -> set[str]:
        """Return every version that a device serves or should serve; blocks."""
        with self._database.transaction() as session:
            wanted = {row.model_version for row in session.scalars(select(DesiredRow))}
            targets = {row.model_version for row in session.scalars(select(TargetRow))}
            reports = list(session.scalars(select(DeviceRow.reported)))
        served = {report["serving_version"] for report in reports if report}
        return (wanted | targets | served) - {None}

    async def _say(self, row: DesiredRow) -> None:
        body = Desired(version=row.version, model_version=row.model_version)
        await self._link.try_send(body, device=row.device_id)

    def _set_target(
        self, task_name: str, model_version: str, devices: list[Device]
    ) -> list[DesiredRow]:
        with self._database.transaction() as session:
            self._models.make_current(session, model_version)
            session.merge(
                TargetRow(task_name=task_name, model_version=model_version, set_at=self._clock())
            )
            session.flush()
            concerned = [device for device in devices if task_name in device.tasks]
            resolved = [self._resolve(session, device) for device in concerned]
            return [row for row in resolved if row is not None]

    def _resolve_one(self, device: Device) -> DesiredRow | None:
        with self._database.transaction() as session:
            return self._resolve(session, device)

    def _resolve(self, session: Session, device: Device) -> DesiredRow | None:
        """Bring a device's desired state in line with the newest target among its tasks."""
        row = session.get(DesiredRow, device.device_id)
        target = session.scalars(
            select(TargetRow)
            .where(TargetRow.task_name.in_(device.tasks))
            .order_by(TargetRow.set_at.desc())
        ).first()
        if target is None or (row and row.model_version == target.model_version):
            return row
        if row is None:
            row = DesiredRow(device_id=device.device_id, version=0)
            session.add(row)
        row.version += 1
        row.model_version, row.set_at = target.model_version, self._clock()
        session.flush()
        return row

    def _all(self) -> list[DesiredRow]:
        with self._database.transaction() as session:
            return list(session.scalars(select(DesiredRow)))
