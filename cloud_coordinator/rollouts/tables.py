"""Rows of what should be served: rollouts, targets by task, and, resolved from both, by device."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from cloud_coordinator.database import Base


class TargetRow(Base):
    """The last version known to be good for a task: every device with data serves it in the end."""

    __tablename__ = "rollout_targets"

    task_name: Mapped[str] = mapped_column(String(63), primary_key=True)
    model_version: Mapped[str] = mapped_column(String(64))
    set_at: Mapped[datetime]


class RolloutRow(Base):
    """One rollout. ``state`` moves by compare-and-set along `lifecycle.TRANSITIONS`."""

    __tablename__ = "rollouts"

    rollout_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    task_name: Mapped[str] = mapped_column(String(63), index=True)
    model_version: Mapped[str] = mapped_column(String(64))
    previous_version: Mapped[str | None] = mapped_column(String(64), default=None)  # to go back to
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)  # a `RolloutPlan`, resolved
    state: Mapped[str] = mapped_column(String(16), index=True)
    cause: Mapped[str] = mapped_column(Text, default="")  # of a halt or an end
    gate: Mapped[str] = mapped_column(String(32), default="")  # that was broken; empty: a person
    wave_number: Mapped[int] = mapped_column(default=0)  # the last that was opened
    created_at: Mapped[datetime]
    ended_at: Mapped[datetime | None] = mapped_column(default=None)
    # The task while the rollout is active, else NULL: so a task has one active rollout at most.
    active_task: Mapped[str | None] = mapped_column(String(63), unique=True, default=None)


class RolloutDeviceRow(Base):
    """One device of a rollout; its wave never changes."""

    __tablename__ = "rollout_devices"

    rollout_id: Mapped[str] = mapped_column(ForeignKey("rollouts.rollout_id"), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"), primary_key=True)
    wave_number: Mapped[int]
    told_version: Mapped[int]  # of the desired state that first named the rollout's version
    told_at: Mapped[datetime]
    serving_since: Mapped[datetime | None] = mapped_column(default=None)


class DesiredRow(Base):
    """The desired state of one device; ``version`` only grows, and the device obeys the highest."""

    __tablename__ = "desired_states"

    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"), primary_key=True)
    version: Mapped[int]
    model_version: Mapped[str] = mapped_column(String(64))
    set_at: Mapped[datetime]
    watch_s: Mapped[float] = mapped_column(default=0.0, server_default="0")
