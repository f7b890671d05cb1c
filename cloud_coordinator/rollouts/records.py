"""Rollouts in the database: what `decide` says is carried out here, a transaction at a time.

Everything here blocks; callers run it in a thread. Nothing of a rollout is kept elsewhere, so a
coordinator that was killed at any moment reads the rows and decides the same.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_coordinator.database import Database
from cloud_coordinator.devices.tables import DeviceRow
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from cloud_coordinator.rollouts.decision import (
    Finish,
    Halt,
    Member,
    OpenWave,
    Rollout,
    Standing,
    TurnBack,
    Wait,
    decide,
)
from cloud_coordinator.rollouts.desired import resolve
from cloud_coordinator.rollouts.lifecycle import (
    ACTIVE,
    UNFINISHED,
    RolloutEvent,
    RolloutState,
    next_state,
)
from cloud_coordinator.rollouts.membership import Known, check_waves, member_of, wave_members
from cloud_coordinator.rollouts.tables import DesiredRow, RolloutDeviceRow, RolloutRow, TargetRow
from shared.errors import ConflictError, NotFoundError
from shared.rollout_plan import RolloutPlan, plan_of

_UNFINISHED = [state.value for state in UNFINISHED]


class MovesVersions(Protocol):
    """The model service, as far as rollouts need it; each works in the caller's transaction."""

    def begin_rollout(self, session: Session, version: str) -> None:
        """Note that its first devices get a version.

        Raises:
            NotFoundError: there is no such version, or its files were tidied away.
            IllegalTransitionError: it is not fit to be rolled out.
        """
        ...

    def widen_rollout(self, session: Session, version: str) -> None:
        """Note that a version goes beyond its first wave."""
        ...

    def make_current(self, session: Session, version: str) -> None:
        """Note that a version is what devices of its model should serve."""
        ...

    def turn_back(self, session: Session, version: str, cause: str) -> None:
        """Note that a version did not do well."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """What one look at a rollout came to."""

    said: tuple[DesiredRow, ...]  # desired states that devices should hear
    wait: Wait | None  # what it waits for; None: it has ended


@dataclass(frozen=True, slots=True)
class RolloutDetails:
    """One rollout, and where each of its devices stands."""

    row: RolloutRow
    members: Sequence[Member]


class RolloutRecords:
    """Reads and writes rollouts."""

    def __init__(
        self, database: Database, models: MovesVersions, *, clock: Callable[[], datetime]
    ) -> None:
        self._database, self._models, self._clock = database, models, clock

    def create(self, *, task_name: str, model_version: str, plan: RolloutPlan, again: bool) -> str:
        """Store a rollout and return its id; a planned one of the same task is dropped for it.

        Args:
            task_name: of the task.
            model_version: what to roll out.
            plan: how.
            again: also a version that had a rollout before.

        Raises:
            NotFoundError: there is no such version.
            ConflictError: it is current already, or on its way, or was rolled out before.
            ConfigError: a wave matches no device.
        """
        with self._database.transaction() as session:
            run_of = select(ModelVersionRow.run_id).where(ModelVersionRow.version == model_version)
            if session.scalar(run_of) is None:
                raise NotFoundError(
                    f"there is no model version {model_version[:80]!r}; 'shoal model list' shows "
                    "all of them"
                )
            self._require_new(session, task_name, model_version, again=again)
            check_waves(plan, _devices_with(session, task_name), task=task_name)
            planned = select(RolloutRow).where(
                RolloutRow.task_name == task_name, RolloutRow.state == RolloutState.PLANNED.value
            )
            for older in session.scalars(planned).all():
                self._move(older, RolloutEvent.GIVEN_UP, cause="a newer one was planned")
            row = RolloutRow(
                rollout_id=secrets.token_hex(4),
                task_name=task_name,
                model_version=model_version,
                plan=msgspec.to_builtins(plan),
                state=RolloutState.PLANNED.value,
                created_at=self._clock(),
            )
            session.add(row)
            return row.rollout_id

    def unfinished(self) -> list[str]:
        """Return the ids of rollouts that have not ended, the oldest first."""
        wanted = (
            select(RolloutRow.rollout_id)
            .where(RolloutRow.state.in_(_UNFINISHED))
            .order_by(RolloutRow.created_at)
        )
        with self._database.transaction() as session:
            return list(session.scalars(wanted))

    def all(self) -> list[RolloutRow]:
        """Return all rollouts, the newest first."""
        with self._database.transaction() as session:
            newest = select(RolloutRow).order_by(RolloutRow.created_at.desc())
            return list(session.scalars(newest))

    def details(self, rollout_id: str) -> RolloutDetails:
        """Return one rollout with its devices; raise NotFoundError for an unknown one."""
        with self._database.transaction() as session:
            row = _existing(session, rollout_id)
            return RolloutDetails(row, self._members(session, row))

    def step(self, rollout_id: str) -> Step:
        """Look at a rollout, and do what is due until it has to wait."""
        said: dict[str, DesiredRow] = {}
        with self._database.transaction() as session:
            row = _existing(session, rollout_id)
            while True:
                changed: list[DesiredRow] = []
                members = self._members(session, row)
                match decide(self._picture(session, row), members, self._clock()):
                    case Wait() | None as wait:
                        return Step(tuple(said.values()), wait)
                    case OpenWave(number):
                        changed = self._open(session, row, number)
                    case Halt(gate, cause):
                        self._move(row, RolloutEvent.HALTED, cause=cause, gate=gate)
                    case TurnBack(gate, cause):
                        changed = self._turn_back(session, row, cause=cause, gate=gate)
                    case Finish(event):
                        changed = self._finish(session, row, event)
                said |= {desired.device_id: desired for desired in changed}

    def move_by_hand(self, rollout_id: str, event: RolloutEvent, *, cause: str) -> Step:
        """Let a person's ``event`` happen, then look what follows from it.

        Raises:
            NotFoundError: there is no such rollout.
            IllegalTransitionError: it cannot happen in this state.
        """
        said: list[DesiredRow] = []
        with self._database.transaction() as session:
            row = _existing(session, rollout_id)
            if event is RolloutEvent.TURNED_BACK:
                said += self._turn_back(session, row, cause=cause)
            else:
                self._move(row, event, cause=cause)
        step = self.step(rollout_id)
        return Step((*said, *step.said), step.wait)

    def admit(self, device_id: str) -> DesiredRow | None:
        """Resolve one device that introduced itself; it may join a wave that is open to all."""
        with self._database.transaction() as session:
            device = session.get_one(DeviceRow, device_id)
            tasks = _tasks_of(device)
            joins = select(RolloutRow).where(
                RolloutRow.task_name.in_(tasks), RolloutRow.state == RolloutState.ROLLING.value
            )
            for row in session.scalars(joins).all():
                wave = plan_of(row.plan).waves[row.wave_number - 1]
                new = session.get(RolloutDeviceRow, (row.rollout_id, device_id)) is None
                if wave.percent == 100 and new:
                    return self._tell(session, row, device)
            return resolve(session, device_id, tasks, now=self._clock())

    def desired(self) -> list[DesiredRow]:
        """Return every desired state."""
        with self._database.transaction() as session:
            return list(session.scalars(select(DesiredRow)))

    def versions_in_use(self) -> set[str]:
        """Return every version that a device serves, should serve, or may go back to."""
        with self._database.transaction() as session:
            wanted = set(session.scalars(select(DesiredRow.model_version)))
            targets = set(session.scalars(select(TargetRow.model_version)))
            unfinished = session.scalars(
                select(RolloutRow).where(RolloutRow.state.in_(_UNFINISHED))
            )
            rolled = {v for row in unfinished for v in (row.model_version, row.previous_version)}
            devices = list(session.execute(select(DeviceRow.reported, DeviceRow.health)))
        served = {report["serving_version"] for report, _ in devices if report}
        before = {
            health["before"]["version"] for _, health in devices if (health or {}).get("before")
        }
        return {v for v in wanted | targets | rolled | served | before if v is not None}

    # --- one step ---------------------------------------------------------------------------------

    def _picture(self, session: Session, row: RolloutRow) -> Rollout:
        return Rollout(
            state=RolloutState(row.state),
            plan=plan_of(row.plan),
            wave=row.wave_number,
            can_return=row.previous_version is not None,
            waits_for=self._obstacle(session, row) if row.state == RolloutState.PLANNED else "",
        )

    @staticmethod
    def _obstacle(session: Session, row: RolloutRow) -> str:
        active = session.scalar(select(RolloutRow).where(RolloutRow.active_task == row.task_name))
        return "" if active is None else f"rollout {active.rollout_id} is {active.state}"

    def _members(self, session: Session, row: RolloutRow) -> list[Member]:
        """Return where the devices stand, and note since when each serves the version."""
        found = session.execute(
            select(RolloutDeviceRow, DeviceRow)
            .join(DeviceRow, DeviceRow.device_id == RolloutDeviceRow.device_id)
            .where(RolloutDeviceRow.rollout_id == row.rollout_id)
            .order_by(RolloutDeviceRow.wave_number, RolloutDeviceRow.device_id)
        ).all()
        turned = row.state in (RolloutState.ROLLING_BACK, RolloutState.ROLLED_BACK)
        back = row.previous_version if turned else None
        known = Known(row.model_version, back, _artifacts(session))
        members = []
        for place, device in found:
            standing = member_of(place, device, known).standing
            if RolloutState(row.state) not in ACTIVE:
                pass  # what comes later is no part of it
            elif standing not in (Standing.SERVING, Standing.AWAY):
                place.serving_since = None
            elif standing is Standing.SERVING and place.serving_since is None:
                place.serving_since = self._clock()
            members.append(member_of(place, device, known))
        return members

    def _open(self, session: Session, row: RolloutRow, number: int) -> list[DesiredRow]:
        if number == 1:
            target = session.get(TargetRow, row.task_name)
            row.previous_version = None if target is None else target.model_version
            self._models.begin_rollout(session, row.model_version)
        elif number == 2:
            self._models.widen_rollout(session, row.model_version)
        self._move(row, RolloutEvent.WAVE_OPENED)
        row.wave_number = number
        devices = _devices_with(session, row.task_name)
        of_this = select(RolloutDeviceRow.device_id).where(
            RolloutDeviceRow.rollout_id == row.rollout_id
        )
        taken = set(session.scalars(of_this))
        names = wave_members(
            plan_of(row.plan).waves[number - 1], devices, taken=taken, seed=row.rollout_id
        )
        session.flush()
        return [self._tell(session, row, device) for device in devices if device.device_id in names]

    def _tell(self, session: Session, row: RolloutRow, device: DeviceRow) -> DesiredRow:
        """Let a device join the wave that is open."""
        place = RolloutDeviceRow(
            rollout_id=row.rollout_id,
            device_id=device.device_id,
            wave_number=row.wave_number,
            told_version=0,
            told_at=self._clock(),
        )
        session.add(place)
        session.flush()
        desired = resolve(session, device.device_id, _tasks_of(device), now=self._clock())
        assert desired is not None  # the rollout desires something
        place.told_version = desired.version
        return desired

    def _turn_back(
        self, session: Session, row: RolloutRow, *, cause: str, gate: str = ""
    ) -> list[DesiredRow]:
        self._move(row, RolloutEvent.TURNED_BACK, cause=cause, gate=gate)
        self._models.turn_back(session, row.model_version, cause)
        session.flush()
        return self._resolve_members(session, row)

    def _finish(self, session: Session, row: RolloutRow, event: RolloutEvent) -> list[DesiredRow]:
        if event is RolloutEvent.RETURNED:
            self._move(row, event, cause=row.cause, gate=row.gate)
            return []
        self._move(row, event)
        self._models.make_current(session, row.model_version)
        session.merge(
            TargetRow(
                task_name=row.task_name, model_version=row.model_version, set_at=self._clock()
            )
        )
        session.flush()
        return self._resolve_members(session, row)

    def _resolve_members(self, session: Session, row: RolloutRow) -> list[DesiredRow]:
        """Resolve everybody with data for the task: members, and who comes under a new target."""
        resolved = [
            resolve(session, device.device_id, _tasks_of(device), now=self._clock())
            for device in _devices_with(session, row.task_name)
        ]
        return [desired for desired in resolved if desired is not None]

    def _move(
        self, row: RolloutRow, event: RolloutEvent, *, cause: str = "", gate: str = ""
    ) -> None:
        state = next_state(RolloutState(row.state), event)
        row.state, row.cause, row.gate = state.value, cause, gate
        row.active_task = row.task_name if state in ACTIVE else None
        row.ended_at = None if state in UNFINISHED else self._clock()

    @staticmethod
    def _require_new(session: Session, task_name: str, version: str, *, again: bool) -> None:
        earlier = select(RolloutRow).where(RolloutRow.model_version == version)
        if not again and (row := session.scalars(earlier).first()) is not None:
            raise ConflictError(f"rollout {row.rollout_id} of this version was there before")
        target = session.get(TargetRow, task_name)
        active = session.scalar(select(RolloutRow).where(RolloutRow.active_task == task_name))
        if active is not None and active.model_version == version:
            raise ConflictError(
                f"rollout {active.rollout_id} of this version is {active.state}; "
                f"'shoal rollout show {active.rollout_id}' shows how far it is"
            )
        if active is None and target is not None and target.model_version == version:
            raise ConflictError(
                f"version {version[:12]} is what devices with data for {task_name!r} should serve "
                "already; roll out another one"
            )


def _existing(session: Session, rollout_id: str) -> RolloutRow:
    row = session.get(RolloutRow, rollout_id)
    if row is None:
        raise NotFoundError(
            f"there is no rollout {rollout_id[:80]!r}; 'shoal rollout list' shows all of them"
        )
    return row


def _artifacts(session: Session) -> dict[str, set[str]]:
    """Return the files of every version there is."""
    found = session.execute(
        select(ModelVersionRow.version, VariantRow.sha256)
        .join(VariantRow, VariantRow.run_id == ModelVersionRow.run_id)
        .where(ModelVersionRow.version.is_not(None), VariantRow.sha256.is_not(None))
    )
    artifacts: dict[str, set[str]] = {}
    for version, sha256 in found:
        assert version is not None  # of both the query leaves the others out
        assert sha256 is not None
        artifacts.setdefault(version, set()).add(sha256)
    return artifacts


def _devices_with(session: Session, task_name: str) -> list[DeviceRow]:
    """Return the devices that have data for a task, whether they are online or not."""
    rows = session.scalars(select(DeviceRow).order_by(DeviceRow.device_id))
    return [row for row in rows if task_name in _tasks_of(row)]


def _tasks_of(device: DeviceRow) -> frozenset[str]:
    return frozenset((device.hello or {}).get("tasks", ()))
