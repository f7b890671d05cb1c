"""Rows of enrolled devices, the tokens they join with, their membership, messages handled."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, ForeignKey, LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from cloud_coordinator.database import Base


class JoinTokenRow(Base):
    """One join token; of its secret only the hash is here."""

    __tablename__ = "join_tokens"

    token_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    secret_hash: Mapped[str] = mapped_column(String(64))
    uses_left: Mapped[int]
    owner: Mapped[str] = mapped_column(String(128), default="")  # of the devices that join with it
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime]


class DeviceRow(Base):
    """One enrolled device: its keys, and the last it said of itself."""

    __tablename__ = "devices"

    device_id: Mapped[str] = mapped_column(String(63), primary_key=True)
    identity_key: Mapped[str] = mapped_column(String(64), unique=True)  # base64, raw Ed25519
    node_key_pem: Mapped[str] = mapped_column(String(1000), unique=True)
    token_id: Mapped[str] = mapped_column(ForeignKey("join_tokens.token_id"))
    enrolled_at: Mapped[datetime]
    owner: Mapped[str] = mapped_column(String(128), default="")
    revoked_at: Mapped[datetime | None] = mapped_column(default=None)  # no sum may have it since

    presence: Mapped[str] = mapped_column(String(16), default="lost")
    boot: Mapped[str | None] = mapped_column(String(128), default=None)
    presence_at: Mapped[datetime | None] = mapped_column(default=None)
    last_seen_at: Mapped[datetime | None] = mapped_column(default=None)
    hello: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    telemetry: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    telemetry_lost: Mapped[int] = mapped_column(default=0)  # gaps in seq, summed
    reported: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    reported_sent_at: Mapped[datetime | None] = mapped_column(default=None)
    health: Mapped[dict[str, Any] | None] = mapped_column(JSON, default=None)
    health_sent_at: Mapped[datetime | None] = mapped_column(default=None)


class HandledMessageRow(Base):
    """A durable message whose effect is stored; a second copy changes nothing.

    ``message_id`` is the digest of its device and its id, see `DeviceService.first_time`.
    """

    __tablename__ = "handled_messages"

    message_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    device_id: Mapped[str] = mapped_column(ForeignKey("devices.device_id"))
    forget_at: Mapped[datetime] = mapped_column(index=True)  # no valid copy can arrive after that


class MembershipListRow(Base):
    """The newest signed membership list: it holds all that earlier ones said, so they go."""

    __tablename__ = "membership_lists"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    issued_at: Mapped[datetime]
    sealed: Mapped[bytes] = mapped_column(LargeBinary)  # a DSSE envelope by the fleet key
