"""Rows of signed TUF metadata, and of the files that the delegated roles list."""

from datetime import datetime

from sqlalchemy import BigInteger, String
from sqlalchemy.orm import Mapped, mapped_column

from cloud_coordinator.database import Base


class TufMetadataRow(Base):
    """One signed metadata file, never changed. A role's newest has no ``replaced_at``."""

    __tablename__ = "tuf_metadata"

    role: Mapped[str] = mapped_column(String(16), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    content: Mapped[bytes]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    replaced_at: Mapped[datetime | None] = mapped_column(default=None)


class TufTargetRow(Base):
    """One file of the model version of a run that a role lists; versions may share a file."""

    __tablename__ = "tuf_targets"

    run_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    path: Mapped[str] = mapped_column(String(200), primary_key=True)
    role: Mapped[str] = mapped_column(String(16), index=True)
    length: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
