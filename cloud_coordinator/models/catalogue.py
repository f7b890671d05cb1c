"""What is on record of versions beside their files: where they come from, and what people noted.

Everything here is read from rows of the version, its run and that run's rounds; nothing is kept
twice but the notes. Methods block on the database.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from cloud_coordinator.database import Database
from cloud_coordinator.models.descriptions import judgement_in
from cloud_coordinator.models.judgement import Judgement
from cloud_coordinator.models.tables import ModelVersionRow, VersionNoteRow
from cloud_coordinator.runs.records import COMMITTED, REPLIED
from cloud_coordinator.runs.tables import ParticipationRow, RoundRow, RunRow
from shared.errors import NotFoundError
from shared.messages import utc_now
from shared.secure_sum.accounting import gaussian_rdp

_EXAMPLES = "examples"  # the training statistic that counts rows


class Note(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody wrote about a version."""

    written_at: datetime
    author: str
    text: str


class PrivacySpent(msgspec.Struct, frozen=True, kw_only=True):
    """What the training of a version cost a device that was in each round of it."""

    mode: Literal["secure", "plain"]
    noise: Literal["none", "distributed", "central"]
    epsilon: float | None  # of its training rows; None: exact sums, no bound is promised
    delta: float | None
    rounds: int  # whose sums are counted


class VariantFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a version."""

    variant: str
    shipped: bool
    passed: bool
    cause: str  # why it did not pass
    size_bytes: int
    latency_p50_us: float | None
    relative_error: float | None


class VersionFacts(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one version."""

    version: str
    model: str
    state: str
    cause: str
    created_at: datetime
    parent: str | None
    run_id: str
    rounds: int
    plan: Mapping[str, Any]  # resolved
    plan_digest: str
    devices: int  # that took part in some committed round
    examples: float | None  # counted in the last round; None: only the devices know
    metrics: Mapping[str, float]  # on held-out rows, after the last round that was measured
    privacy: PrivacySpent
    variants: tuple[VariantFacts, ...]
    judgement: Judgement | None  # of devices; None: nobody judged it
    notes: tuple[Note, ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two versions, and the keys of their plans that differ, as ``training.epochs``."""

    first: VersionFacts
    second: VersionFacts
    plan: Mapping[str, tuple[Any, Any]]


class Catalogue:
    """Finds, describes and annotates versions."""

    def __init__(self, database: Database, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database, self._clock = database, clock

    def search(
        self, *, model: str | None = None, state: str | None = None, text: str | None = None
    ) -> list[ModelVersionRow]:
        """Return the versions that fit all that is given, the newest first, with their variants.

        Args:
            model: name of a model.
            state: of `VersionState`.
            text: begins the version's digest, or is part of its run's name or of a note.
        """
        found = select(ModelVersionRow).order_by(ModelVersionRow.created_at.desc())
        if model is not None:
            found = found.where(ModelVersionRow.model == model)
        if state is not None:
            found = found.where(ModelVersionRow.state == state)
        if text:
            noted = select(VersionNoteRow.run_id).where(
                VersionNoteRow.text.icontains(text, autoescape=True)
            )
            found = found.where(
                or_(
                    ModelVersionRow.version.startswith(text, autoescape=True),
                    ModelVersionRow.run_id.icontains(text, autoescape=True),
                    ModelVersionRow.run_id.in_(noted),
                )
            )
        with self._database.transaction() as session:
            return list(session.scalars(found))

    def facts(self, version: str) -> VersionFacts:
        """Return all that is known of a version; raise NotFoundError for an unknown one."""
        with self._database.transaction() as session:
            return _facts(session, _existing(session, version))

    def compare(self, first: str, second: str) -> Comparison:
        """Return two versions side by side; raise NotFoundError where one is unknown."""
        one, other = self.facts(first), self.facts(second)
        flat, other_flat = _flat(one.plan), _flat(other.plan)
        differing = {
            key: (flat.get(key), other_flat.get(key))
            for key in sorted(flat.keys() | other_flat.keys())
            if flat.get(key) != other_flat.get(key)
        }
        return Comparison(first=one, second=other, plan=differing)

    def add_note(self, version: str, *, author: str, text: str) -> Note:
        """Keep what ``author`` says of a version; raise NotFoundError for an unknown one."""
        note = Note(written_at=self._clock(), author=author, text=text)
        with self._database.transaction() as session:
            run_id = _existing(session, version).run_id
            session.add(VersionNoteRow(run_id=run_id, **msgspec.structs.asdict(note)))
        return note


def _existing(session: Session, version: str) -> ModelVersionRow:
    row = session.scalar(select(ModelVersionRow).where(ModelVersionRow.version == version))
    if row is None:
        raise NotFoundError(
            f"there is no model version {version[:80]!r}; 'shoal model list' shows all of them"
        )
    return row


def _facts(session: Session, row: ModelVersionRow) -> VersionFacts:
    assert row.version is not None  # it was found by that
    run = session.get_one(RunRow, row.run_id)
    rounds = session.scalars(
        select(RoundRow)
        .where(
            RoundRow.run_id == row.run_id, RoundRow.state == COMMITTED, RoundRow.round_number > 0
        )
        .order_by(RoundRow.round_number)
    ).all()
    devices = session.scalars(
        select(ParticipationRow.device_id)
        .where(ParticipationRow.run_id == row.run_id, ParticipationRow.outcome == REPLIED)
        .distinct()
    ).all()
    notes = session.scalars(
        select(VersionNoteRow)
        .where(VersionNoteRow.run_id == row.run_id)
        .order_by(VersionNoteRow.note_id)
    )
    return VersionFacts(
        version=row.version,
        model=row.model,
        state=row.state,
        cause=row.cause,
        created_at=row.created_at,
        parent=row.parent,
        run_id=row.run_id,
        rounds=row.rounds,
        plan=run.plan,
        plan_digest=run.plan_digest,
        devices=len(devices),
        examples=rounds[-1].training_sums.get(_EXAMPLES) if rounds else None,
        metrics=next((r.metrics for r in reversed(rounds) if r.metrics), {}),
        privacy=_privacy(rounds),
        variants=tuple(
            msgspec.convert(variant, VariantFacts, from_attributes=True) for variant in row.variants
        ),
        judgement=judgement_in(row),
        notes=tuple(msgspec.convert(note, Note, from_attributes=True) for note in notes),
    )


def _privacy(rounds: Sequence[RoundRow]) -> PrivacySpent:
    """Add up what the rounds' sums say of themselves; one exact sum leaves no bound."""
    sums = [row.secrecy for row in rounds if row.secrecy is not None]
    if not sums or len(sums) < len(rounds):
        return PrivacySpent(mode="plain", noise="none", epsilon=None, delta=None, rounds=0)
    last = sums[-1]
    epsilon = None
    if last["noise"] != "none":
        curve = gaussian_rdp(last["noise_multiplier"]).times(len(sums))
        epsilon = curve.epsilon(last["delta"])
    return PrivacySpent(
        mode="secure",
        noise=last["noise"],
        epsilon=epsilon,
        delta=last["delta"] if epsilon is not None else None,
        rounds=len(sums),
    )


def _flat(document: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{above}{key}.")
        else:
            leaves[above + key] = value
    return leaves
