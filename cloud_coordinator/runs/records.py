"""Runs in the database. Everything here blocks; callers run it in a thread.

A round is committed in one transaction that names blobs which are on the disk already, so after a
crash either the whole round is there or nothing of it.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime

import msgspec
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from cloud_coordinator.database import Database, change_one
from cloud_coordinator.rounds.worker_messages import ResumePoint, RoundRecord
from cloud_coordinator.runs.lifecycle import ACTIVE, RunEvent, RunState, next_state
from cloud_coordinator.runs.recruitment import Invitation
from cloud_coordinator.runs.tables import InvitationRow, ParticipationRow, RoundRow, RunRow
from shared.errors import NotFoundError
from shared.run_plan import RunPlan

REPLIED = "replied"  # outcome of a participation whose vector counts
COMMITTED = "committed"
_KEPT_ROUNDS = 2  # committed rounds of each run whose blobs stay on the disk


@dataclass(frozen=True, slots=True)
class StartingPoint:
    """Where the next session of a run begins."""

    resume: ResumePoint | None
    next_round: int
    rounds_committed: int  # without round 0, which trains nothing
    times_selected: dict[str, int]


@dataclass(frozen=True, slots=True)
class RunDetails:
    """One run and everything that happened in it."""

    run: RunRow
    rounds: Sequence[RoundRow]
    participations: Sequence[ParticipationRow]
    invitations: Sequence[InvitationRow]


class RunRecords:
    """Reads and writes runs."""

    def __init__(self, database: Database, *, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    def create(self, plan: RunPlan, *, run_id: str | None = None) -> RunRow:
        """Store a new run with its whole plan, every default written out.

        With a ``run_id``, a run of that name that is there already stays as it is.
        """
        row = RunRow(
            run_id=run_id or f"{plan.name}-{secrets.token_hex(4)}",
            name=plan.name,
            state=RunState.PLANNED.value,
            plan=msgspec.to_builtins(plan),
            plan_digest=plan.digest,
            created_at=self._clock(),
        )
        with self._database.transaction() as session:
            if (existing := session.get(RunRow, row.run_id)) is not None:
                return existing
            session.add(row)
        return row

    def all(self) -> list[RunRow]:
        """Return all runs, newest first."""
        with self._database.transaction() as session:
            return list(session.scalars(select(RunRow).order_by(RunRow.created_at.desc())))

    def active(self) -> list[RunRow]:
        """Return the runs that have not ended, oldest first."""
        unfinished = RunRow.state.in_([state.value for state in ACTIVE])
        with self._database.transaction() as session:
            return list(
                session.scalars(select(RunRow).where(unfinished).order_by(RunRow.created_at))
            )

    def get(self, run_id: str) -> RunRow:
        """Return one run; raise NotFoundError for an unknown one."""
        with self._database.transaction() as session:
            return _existing(session, run_id)

    def run_of_version(self, version: str) -> RunRow:
        """Return the run whose result is ``version``; raise NotFoundError where none is."""
        with self._database.transaction() as session:
            row = session.scalars(select(RunRow).where(RunRow.model_version == version)).first()
        if row is None:
            raise NotFoundError(
                f"no run made a model version {version[:64]!r}; 'shoal model list' shows all"
            )
        return row

    def details(self, run_id: str) -> RunDetails:
        """Return one run with its rounds; raise NotFoundError for an unknown one."""
        with self._database.transaction() as session:
            return RunDetails(
                run=_existing(session, run_id),
                rounds=session.scalars(
                    select(RoundRow)
                    .where(RoundRow.run_id == run_id)
                    .order_by(RoundRow.round_number)
                ).all(),
                participations=session.scalars(
                    select(ParticipationRow)
                    .where(ParticipationRow.run_id == run_id)
                    .order_by(ParticipationRow.round_number, ParticipationRow.device_id)
                ).all(),
                invitations=session.scalars(
                    select(InvitationRow)
                    .where(InvitationRow.run_id == run_id)
                    .order_by(InvitationRow.device_id)
                ).all(),
            )

    def move(
        self, run_id: str, event: RunEvent, *, cause: str = "", model_version: str | None = None
    ) -> RunState:
        """Let ``event`` happen to a run and return its new state.

        Raises:
            IllegalTransitionError: the event cannot happen in this state.
            ConflictError: somebody else moved the run at the same moment.
        """
        with self._database.transaction() as session:
            row = _existing(session, run_id)
            old = RunState(row.state)
            new = next_state(old, event)
            change = (
                update(RunRow)
                .where(RunRow.run_id == run_id, RunRow.state == old.value)
                .values(
                    state=new.value,
                    cause=cause,
                    model_version=model_version or row.model_version,
                    ended_at=None if new in ACTIVE else self._clock(),
                )
            )
            change_one(session, change, what=f"run {run_id}")
        return new

    def save_round(self, run_id: str, record: RoundRecord) -> None:
        """Commit a closed round; one that is there already stays as it is."""
        with self._database.transaction() as session:
            if session.get(RoundRow, (run_id, record.round_number)) is not None:
                return
            session.add(_round_row(run_id, record))
            session.flush()
            session.add_all(
                ParticipationRow(
                    run_id=run_id,
                    round_number=record.round_number,
                    **{
                        **msgspec.structs.asdict(participation),
                        "facts": msgspec.to_builtins(participation.facts) or None,
                    },
                )
                for participation in record.participations
            )

    def starting_point(self, run_id: str) -> StartingPoint:
        """Return the last committed round and what else a new session must know."""
        with self._database.transaction() as session:
            rounds = session.scalars(
                select(RoundRow).where(RoundRow.run_id == run_id).order_by(RoundRow.round_number)
            ).all()
            selected = session.execute(
                select(ParticipationRow.device_id, func.count())
                .where(ParticipationRow.run_id == run_id, ParticipationRow.round_number > 0)
                .group_by(ParticipationRow.device_id)
            ).all()
        committed = [row for row in rounds if row.state == COMMITTED]
        models = [row for row in committed if row.parameters_sha256]  # statistics make none
        return StartingPoint(
            resume=_resume_point(models[-1]) if models else None,
            next_round=rounds[-1].round_number + 1 if rounds else 1,
            rounds_committed=sum(row.round_number > 0 for row in committed),
            times_selected={row[0]: row[1] for row in selected},
        )

    def note_invitations(
        self, run_id: str, session_id: str, invitations: Sequence[Invitation]
    ) -> None:
        """Store what became of invitations."""
        with self._database.transaction() as session:
            for invitation in invitations:
                session.merge(
                    InvitationRow(
                        run_id=run_id,
                        device_id=invitation.device_id,
                        session_id=session_id,
                        state=invitation.state.value,
                        reason=invitation.reason,
                        changed_at=self._clock(),
                    )
                )

    def blobs_in_use(self) -> set[str]:
        """Return the digests of all blobs that a run may still need."""
        with self._database.transaction() as session:
            rows = session.scalars(
                select(RoundRow)
                .where(RoundRow.state == COMMITTED, RoundRow.parameters_sha256.is_not(None))
                .order_by(RoundRow.run_id, RoundRow.round_number.desc())
            ).all()
        digests: set[str] = set()
        seen: dict[str, int] = {}
        for row in rows:
            seen[row.run_id] = seen.get(row.run_id, 0) + 1
            if seen[row.run_id] <= _KEPT_ROUNDS:
                digests |= {row.parameters_sha256 or "", row.optimizer_sha256 or ""}
        return digests - {""}


def _existing(session: Session, run_id: str) -> RunRow:
    row = session.get(RunRow, run_id)
    if row is None:
        raise NotFoundError(f"there is no run {run_id!r}; 'shoal run list' shows all of them")
    return row


def _round_row(run_id: str, record: RoundRecord) -> RoundRow:
    return RoundRow(
        run_id=run_id,
        round_number=record.round_number,
        state=record.state,
        cause=record.cause,
        started_at=record.started_at,
        closed_at=record.closed_at,
        metrics=record.metrics,
        training_sums=record.training_sums,
        parameters_sha256=record.parameters_sha256,
        optimizer_sha256=record.optimizer_sha256,
        answers=msgspec.to_builtins(record.answers) or None,
        secrecy=msgspec.to_builtins(record.secrecy),
    )


def _resume_point(row: RoundRow) -> ResumePoint:
    assert row.parameters_sha256 is not None  # of rounds with a model
    return ResumePoint(
        round_number=row.round_number,
        parameters_sha256=row.parameters_sha256,
        optimizer_sha256=row.optimizer_sha256,
    )
