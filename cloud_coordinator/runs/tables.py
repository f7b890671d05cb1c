"""Rows of runs, their rounds, who took part in each, and what became of every invitation."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, ForeignKeyConstraint, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from cloud_coordinator.database import Base


class RunRow(Base):
    """One run. ``state`` moves by compare-and-set along `lifecycle.TRANSITIONS`."""

    __tablename__ = "runs"

    run_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    name: Mapped[str] = mapped_column(String(63))
    state: Mapped[str] = mapped_column(String(16), index=True)
    cause: Mapped[str] = mapped_column(Text, default="")  # of a failure or a stop
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)  # resolved: every default is written out
    plan_digest: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None] = mapped_column(default=None)
    model_version: Mapped[str | None] = mapped_column(String(64), default=None)


class RoundRow(Base):
    """One closed round; number 0 is the initial model."""

    __tablename__ = "rounds"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    state: Mapped[str] = mapped_column(String(16))
    cause: Mapped[str] = mapped_column(Text, default="")
    started_at: Mapped[datetime]
    closed_at: Mapped[datetime]
    metrics: Mapped[dict[str, float]] = mapped_column(JSON)
    training_sums: Mapped[dict[str, float]] = mapped_column(JSON)
    parameters_sha256: Mapped[str | None] = mapped_column(String(64), default=None)
    optimizer_sha256: Mapped[str | None] = mapped_column(String(64), default=None)
    # Each a `shared.statistics.vectors.Answer`; NULL where the round trained.
    answers: Mapped[list[dict[str, Any]] | None] = mapped_column(
        JSON(none_as_null=True), default=None
    )
    # `worker_messages.Secrecy`; NULL where the coordinator saw each device's update.
    secrecy: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True), default=None)


class ParticipationRow(Base):
    """One selected device's part in a round, and why it has none if so."""

    __tablename__ = "participations"
    __table_args__ = (
        ForeignKeyConstraint(["run_id", "round_number"], ["rounds.run_id", "rounds.round_number"]),
    )

    run_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    round_number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"), primary_key=True)
    outcome: Mapped[str] = mapped_column(String(16))
    cause: Mapped[str] = mapped_column(Text, default="")
    num_examples: Mapped[int] = mapped_column(default=0)
    seconds: Mapped[float | None] = mapped_column(default=None)
    bytes_down: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_up: Mapped[int] = mapped_column(BigInteger, default=0)
    # Each a `shared.judging.CandidateFacts`; NULL where the device judged no files.
    facts: Mapped[list[dict[str, Any]] | None] = mapped_column(
        JSON(none_as_null=True), default=None
    )


class InvitationRow(Base):
    """The last that is known of one device's invitation to one run."""

    __tablename__ = "invitations"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"), primary_key=True)
    session_id: Mapped[str] = mapped_column(String(128))
    state: Mapped[str] = mapped_column(String(16))  # see recruitment.InvitationState
    reason: Mapped[str] = mapped_column(Text, default="")
    changed_at: Mapped[datetime]
