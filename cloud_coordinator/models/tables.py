"""Rows of model versions, of every variant that was built, and of what people noted."""

from datetime import datetime

from sqlalchemy import JSON, BigInteger, ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column, relationship

from cloud_coordinator.database import Base


class ModelVersionRow(Base):
    """One version of a model. ``state`` moves by compare-and-set along `lifecycle.TRANSITIONS`."""

    __tablename__ = "model_versions"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    version: Mapped[str | None] = mapped_column(
        String(64), unique=True, default=None
    )  # once signed
    model: Mapped[str] = mapped_column(String(63), index=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    cause: Mapped[str] = mapped_column(Text, default="")  # of a rejection
    created_at: Mapped[datetime]
    signed_at: Mapped[datetime | None] = mapped_column(default=None)
    rounds: Mapped[int]
    parameters_sha256: Mapped[str] = mapped_column(String(64))
    parent: Mapped[str | None] = mapped_column(String(64), default=None)
    built: Mapped[bytes | None] = mapped_column(default=None)  # JSON of what a manifest will say
    sealed: Mapped[bytes | None] = mapped_column(default=None)  # the signed manifest
    judgement: Mapped[bytes | None] = mapped_column(default=None)  # JSON; NULL: nobody judged it

    variants: Mapped[list["VariantRow"]] = relationship(
        order_by="VariantRow.position", cascade="all, delete-orphan", lazy="selectin"
    )


class VariantRow(Base):
    """One variant of a version: what it measured, and the blob that holds it if it passed."""

    __tablename__ = "model_variants"

    run_id: Mapped[str] = mapped_column(ForeignKey("model_versions.run_id"), primary_key=True)
    variant: Mapped[str] = mapped_column(String(63), primary_key=True)
    position: Mapped[int]
    shipped: Mapped[bool]
    passed: Mapped[bool]
    cause: Mapped[str] = mapped_column(Text, default="")
    step: Mapped[str] = mapped_column(Text, default="", server_default="")  # of calibration
    sha256: Mapped[str | None] = mapped_column(String(64), index=True, default=None)
    size_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    session_config: Mapped[dict[str, str]] = mapped_column(JSON)
    latency_p50_us: Mapped[float | None] = mapped_column(default=None)
    max_difference: Mapped[float | None] = mapped_column(default=None)
    relative_error: Mapped[float | None] = mapped_column(default=None)
    agreement: Mapped[float | None] = mapped_column(default=None)


class VersionNoteRow(Base):
    """What somebody wrote about a version; notes are added and never changed."""

    __tablename__ = "version_notes"

    note_id: Mapped[int] = mapped_column(primary_key=True)
    run_id: Mapped[str] = mapped_column(ForeignKey("model_versions.run_id"), index=True)
    written_at: Mapped[datetime]
    author: Mapped[str] = mapped_column(String(63))
    text: Mapped[str] = mapped_column(Text)
