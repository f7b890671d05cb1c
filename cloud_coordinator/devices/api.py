"""Routes for devices: joining, join tokens, and what is known of each device."""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated, Any, cast

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from cloud_coordinator.devices.authentication import read_body, require_admin
from cloud_coordinator.devices.enrolment import Enrolment
from cloud_coordinator.devices.membership import Membership
from cloud_coordinator.devices.membership_api import membership_of
from cloud_coordinator.devices.service import DeviceService
from cloud_coordinator.devices.tables import DeviceRow, JoinTokenRow
from cloud_coordinator.rollouts.service import RolloutService
from cloud_coordinator.rollouts.tables import DesiredRow
from shared.enrolment import EnrolmentRequest
from shared.errors import PeerError
from shared.membership import MAX_OWNER_LENGTH, OWNER_PATTERN
from shared.messages import PresenceState
from shared.untrusted import NOT_JSON

SealReply = Callable[[str], bytes]  # from a device id to the sealed enrolment reply
router = APIRouter(prefix="/v1", tags=["devices"])


class TokenRequest(BaseModel):
    """What a new join token may do."""

    model_config = ConfigDict(extra="forbid")

    uses: int = Field(default=1, ge=1, le=100_000, description="Devices that may join with it.")
    ttl_s: float = Field(
        default=3600, gt=0, le=30 * 24 * 3600, description="Seconds until it expires."
    )
    owner: str = Field(
        default="",
        max_length=MAX_OWNER_LENGTH,
        pattern=OWNER_PATTERN,
        description="Whose the devices are that join with it; other devices read it in the list.",
    )


class TokenView(BaseModel):
    """A join token without its secret."""

    model_config = ConfigDict(from_attributes=True)

    token_id: str
    uses_left: int
    owner: str
    created_at: datetime
    expires_at: datetime


class NewTokenView(BaseModel):
    """A join token as it is shown once."""

    token_id: str
    token: str
    uses: int


class DesiredView(BaseModel):
    """What a device should serve."""

    model_config = ConfigDict(from_attributes=True)

    version: int
    model_version: str
    set_at: datetime


class DeviceView(BaseModel):
    """All that is known of a device; ``reported`` is what it says is true.

    ``listed``: it may be in a sum; false while it waits for the membership list or is revoked.
    """

    device_id: str
    online: bool
    presence: str
    tasks: list[str]
    enrolled_at: datetime
    owner: str
    listed: bool
    revoked_at: datetime | None
    last_seen_at: datetime | None
    hello: dict[str, Any] | None
    telemetry: dict[str, Any] | None
    telemetry_lost: int
    reported: dict[str, Any] | None
    health: dict[str, Any] | None  # while its version is watched, as the last rollout asked
    desired: DesiredView | None


def _enrolment(request: Request) -> Enrolment:
    return cast("Enrolment", request.app.state.enrolment)


def _devices(request: Request) -> DeviceService:
    return cast("DeviceService", request.app.state.devices)


def _rollouts(request: Request) -> RolloutService:
    return cast("RolloutService", request.app.state.rollouts)


@router.post("/enroll")
async def enroll(
    request: Request, enrolment: Annotated[Enrolment, Depends(_enrolment)]
) -> Response:
    """Bind a device id to an identity key and a node key; answers with a sealed reply."""
    try:
        asked = msgspec.json.decode(await read_body(request), type=EnrolmentRequest)
    except NOT_JSON as error:
        raise PeerError(f"not an enrolment request: {error}") from error
    device_id = await asyncio.to_thread(enrolment.enrol, asked)
    seal_reply = cast("SealReply", request.app.state.seal_reply)
    return Response(await asyncio.to_thread(seal_reply, device_id), media_type="application/json")


@router.post("/tokens", dependencies=[Depends(require_admin)])
async def create_token(
    asked: TokenRequest, enrolment: Annotated[Enrolment, Depends(_enrolment)]
) -> NewTokenView:
    """Make a join token; its secret is in this answer and nowhere else."""
    token = await asyncio.to_thread(
        enrolment.create_token,
        uses=asked.uses,
        lifetime=timedelta(seconds=asked.ttl_s),
        owner=asked.owner,
    )
    return NewTokenView(token_id=token.token_id, token=str(token), uses=asked.uses)


@router.get("/tokens", dependencies=[Depends(require_admin)])
async def list_tokens(
    enrolment: Annotated[Enrolment, Depends(_enrolment)],
) -> list[TokenView]:
    """Return all join tokens, newest first."""
    rows: list[JoinTokenRow] = await asyncio.to_thread(enrolment.tokens)
    return [TokenView.model_validate(row) for row in rows]


@router.get("/devices", dependencies=[Depends(require_admin)])
async def list_devices(
    devices: Annotated[DeviceService, Depends(_devices)],
    rollouts: Annotated[RolloutService, Depends(_rollouts)],
    membership: Annotated[Membership, Depends(membership_of)],
) -> list[DeviceView]:
    """Return all devices by name."""
    desired, rows = await rollouts.desired(), await devices.rows()
    listed = await asyncio.to_thread(membership.listed, rows)
    return [_view(row, desired.get(row.device_id), listed=row.device_id in listed) for row in rows]


@router.get("/devices/{device_id}", dependencies=[Depends(require_admin)])
async def show_device(
    device_id: str,
    devices: Annotated[DeviceService, Depends(_devices)],
    rollouts: Annotated[RolloutService, Depends(_rollouts)],
    membership: Annotated[Membership, Depends(membership_of)],
) -> DeviceView:
    """Return one device."""
    row = await devices.row(device_id)
    listed = await asyncio.to_thread(membership.listed, [row])
    return _view(row, (await rollouts.desired()).get(device_id), listed=device_id in listed)


def _view(row: DeviceRow, desired: DesiredRow | None, *, listed: bool) -> DeviceView:
    return DeviceView(
        device_id=row.device_id,
        online=row.presence == PresenceState.READY.value,
        presence=row.presence,
        tasks=list((row.hello or {}).get("tasks", ())),
        enrolled_at=row.enrolled_at,
        owner=row.owner,
        listed=listed,
        revoked_at=row.revoked_at,
        last_seen_at=row.last_seen_at,
        hello=row.hello,
        telemetry=row.telemetry,
        telemetry_lost=row.telemetry_lost,
        reported=row.reported,
        health=row.health,
        desired=DesiredView.model_validate(desired) if desired else None,
    )
