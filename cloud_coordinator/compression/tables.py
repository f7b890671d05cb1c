"""Rows of what compressions have done so far."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from cloud_coordinator.database import Base


class CompressionStepRow(Base):
    """One step that is done; the run that it belongs to says what became of the whole."""

    __tablename__ = "compression_steps"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.run_id"), primary_key=True)
    step: Mapped[str] = mapped_column(String(32), primary_key=True)  # see steps.Step
    result: Mapped[dict[str, Any]] = mapped_column(JSON)  # a `steps.StepResult`
    done_at: Mapped[datetime]
