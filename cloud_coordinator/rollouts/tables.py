"""Rows of what should be served: by task, and, resolved from that, by device."""

from datetime import datetime

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from cloud_coordinator.database import Base


class TargetRow(Base):
    """The version that every device with data for a task should serve, now or once it comes."""

    __tablename__ = "rollout_targets"

    task_name: Mapped[str] = mapped_column(String(63), primary_key=True)
    model_version: Mapped[str] = mapped_column(String(64))
    set_at: Mapped[datetime]


class DesiredRow(Base):
    """The desired state of one device; ``version`` only grows, and the device obeys the highest."""

    __tablename__ = "desired_states"

    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"), primary_key=True)
    version: Mapped[int]
    model_version: Mapped[str] = mapped_column(String(64))
    set_at: Mapped[datetime]
