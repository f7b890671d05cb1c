"""What the coordinator knows of its devices, from what they say over MQTT.

An agent may be heard out of order and twice: retained messages come again after each connect, and a
last will may arrive after the birth that followed it. So each kind has a rule of its own for what
is newer, and durable messages are handled once, by id.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from cloud_coordinator.database import Database
from cloud_coordinator.devices.tables import DeviceRow, HandledMessageRow
from shared.errors import NotFoundError
from shared.messages import (
    Body,
    Envelope,
    Health,
    Hello,
    Presence,
    PresenceState,
    Reported,
    Telemetry,
)
from shared.signing import VerifyingKey

logger = logging.getLogger(__name__)

_SEEN_EVERY = timedelta(seconds=10)  # how exact `last_seen_at` is
_FRESH = timedelta(minutes=2)  # an older message waited at the broker and proves no presence


@dataclass(frozen=True, slots=True)
class Device:
    """What others need of a device to work with it."""

    device_id: str
    node_key_pem: str
    online: bool
    tasks: frozenset[str]


class DeviceService:
    """The registry of enrolled devices."""

    def __init__(self, database: Database, *, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock
        self._keys: dict[str, VerifyingKey] = {}

    async def identity_key(self, device_id: str) -> VerifyingKey:
        """Return a device's identity key; raise NotFoundError for an unknown device."""
        if device_id not in self._keys:
            row = await asyncio.to_thread(self._row, device_id)
            self._keys[device_id] = VerifyingKey.from_text(row.identity_key)
        return self._keys[device_id]

    async def rows(self) -> list[DeviceRow]:
        """Return all devices by name."""
        return await asyncio.to_thread(self._rows)

    async def row(self, device_id: str) -> DeviceRow:
        """Return one device; raise NotFoundError for an unknown one."""
        return await asyncio.to_thread(self._row, device_id)

    async def devices(self) -> list[Device]:
        """Return all devices as others see them."""
        return [_as_device(row) for row in await self.rows()]

    async def device(self, device_id: str) -> Device:
        """Return one device; raise NotFoundError for an unknown one."""
        return _as_device(await self.row(device_id))

    async def hear(self, envelope: Envelope) -> bool:
        """Take in what a device says of itself; return True if its presence or tasks changed."""
        return await asyncio.to_thread(self._hear, envelope)

    async def forget_presence(self) -> None:
        """Count everybody as gone: at a start, only those who speak up are there."""
        await asyncio.to_thread(self._forget_presence)

    def first_time(self, session: Session, envelope: Envelope) -> bool:
        """Note a durable message inside the transaction of its effect; False: it was handled."""
        # By device, or one that overhears another's id could have that message taken for a copy.
        name = hashlib.sha256(f"{envelope.device}/{envelope.id}".encode()).hexdigest()
        if session.get(HandledMessageRow, name) is not None:
            return False
        session.add(
            HandledMessageRow(
                message_id=name, device_id=envelope.device, forget_at=envelope.expires_at
            )
        )
        return True

    async def forget_handled(self) -> None:
        """Drop the ids of messages that have expired, whose copies are refused anyway."""
        await asyncio.to_thread(self._forget_handled)

    def _row(self, device_id: str) -> DeviceRow:
        with self._database.transaction() as session:
            row = session.get(DeviceRow, device_id)
        if row is None:
            raise NotFoundError(
                f"there is no device {device_id!r}; 'shoal device list' shows all of them"
            )
        return row

    def _rows(self) -> list[DeviceRow]:
        with self._database.transaction() as session:
            return list(session.scalars(select(DeviceRow).order_by(DeviceRow.device_id)))

    def _hear(self, envelope: Envelope) -> bool:
        with self._database.transaction() as session:
            row = session.get(DeviceRow, envelope.device)
            if row is None:
                return False
            before = _as_device(row)
            take_in(row, envelope, self._clock())
            return _as_device(row) != before or isinstance(envelope.body, Hello)

    def _forget_presence(self) -> None:
        with self._database.transaction() as session:
            session.execute(update(DeviceRow).values(presence=PresenceState.LOST.value))

    def _forget_handled(self) -> None:
        with self._database.transaction() as session:
            expired = HandledMessageRow.forget_at <= self._clock()
            session.execute(delete(HandledMessageRow).where(expired))


def take_in(row: DeviceRow, envelope: Envelope, now: datetime) -> None:
    """Change ``row`` by one message; what is older than what is known changes nothing."""
    body = envelope.body
    sent_at = min(envelope.sent_at, now)  # a clock that ran ahead must not outlive its correction
    if isinstance(body, Presence):
        _take_presence(row, body, sent_at)
        return
    if not _is_of_this_boot(row, body, sent_at):
        return
    if now - sent_at < _FRESH:
        row.presence = PresenceState.READY.value  # the dead do not speak; a late will was wrong
    match body:
        case Hello():
            row.hello = msgspec.to_builtins(body)
        case Telemetry():
            row.telemetry_lost += _gap(row.telemetry, body)
            row.telemetry = msgspec.to_builtins(body)
        case Reported() if row.reported_sent_at is None or row.reported_sent_at <= sent_at:
            row.reported = msgspec.to_builtins(body)
            row.reported_sent_at = sent_at
        case Health() if row.health_sent_at is None or row.health_sent_at <= sent_at:
            row.health = msgspec.to_builtins(body)
            row.health_sent_at = sent_at
        case _:
            pass
    if row.last_seen_at is None or now - row.last_seen_at >= _SEEN_EVERY:
        row.last_seen_at = now


def _take_presence(row: DeviceRow, body: Presence, sent_at: datetime) -> None:
    if body.state is PresenceState.READY:
        if row.presence_at is not None and sent_at < row.presence_at:
            return
        row.presence, row.boot, row.presence_at = body.state.value, body.boot, sent_at
    elif body.boot == row.boot:  # a goodbye or will of an older boot says nothing of this one
        row.presence = body.state.value


def _is_of_this_boot(row: DeviceRow, body: Body, sent_at: datetime) -> bool:
    """Tell whether the device that said ``body`` is the one that lives now."""
    boot = getattr(body, "boot", None)
    if boot is None or boot == row.boot:
        return True
    if row.presence_at is not None and sent_at < row.presence_at:
        return False
    row.boot, row.presence_at = boot, sent_at  # its birth is still on the way
    return True


def _gap(last: dict[str, Any] | None, body: Telemetry) -> int:
    if last is None or last["boot"] != body.boot:
        return 0
    return max(0, body.seq - int(last["seq"]) - 1)


def _as_device(row: DeviceRow) -> Device:
    return Device(
        device_id=row.device_id,
        node_key_pem=row.node_key_pem,
        online=row.presence == PresenceState.READY.value,
        tasks=frozenset((row.hello or {}).get("tasks", ())),
    )
