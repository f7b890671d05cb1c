"""Routes for the membership list: devices and operators read it, operators bring a new one."""

import asyncio
from datetime import datetime
from typing import Annotated, cast

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from cloud_coordinator.devices.authentication import device_or_admin, read_body, require_admin
from cloud_coordinator.devices.membership import Membership
from cloud_coordinator.keys import FleetKeyPlace
from shared.membership import MAX_SEALED_BYTES

router = APIRouter(prefix="/v1", tags=["membership"])
_UPLOAD_BYTES = MAX_SEALED_BYTES + 1024  # a list that is a little too large gets our own sentence


class MembershipView(BaseModel):
    """How the list stands. ``version`` is 0 before the first one."""

    model_config = ConfigDict(from_attributes=True)

    fleet_key: FleetKeyPlace
    fleet_key_id: str  # what 'shoal-agent enroll --fleet-key' takes
    version: int
    issued_at: datetime | None
    members: int
    revoked: int
    waiting: list[str]


def membership_of(request: Request) -> Membership:
    """Return the service that `app.py` put into ``app.state.membership``."""
    return cast("Membership", request.app.state.membership)


Service = Annotated[Membership, Depends(membership_of)]


@router.get("/membership", dependencies=[Depends(device_or_admin)])
def download_list(membership: Service) -> Response:
    """Return the newest signed list, byte for byte."""
    return Response(membership.sealed(), media_type="application/json")


@router.post("/membership", dependencies=[Depends(require_admin)])
async def import_list(request: Request, membership: Service) -> MembershipView:
    """Take over a list that was signed where the fleet key is."""
    sealed = await read_body(request, limit_bytes=_UPLOAD_BYTES)
    await asyncio.to_thread(membership.take, sealed)
    return await asyncio.to_thread(_view, membership)


@router.get("/membership/status", dependencies=[Depends(require_admin)])
def show_membership(membership: Service) -> MembershipView:
    """Say which version is in force, where the fleet key is and who waits."""
    return _view(membership)


@router.get("/membership/next", dependencies=[Depends(require_admin)])
def export_list(membership: Service) -> Response:
    """Return the next version, unsigned, beside the newest signed one."""
    return Response(msgspec.json.encode(membership.unsigned()), media_type="application/json")


@router.post("/membership/revoked/{device_id}", dependencies=[Depends(require_admin)])
def revoke_member(device_id: str, membership: Service) -> MembershipView:
    """Keep a device out of all sums from the next version of the list on."""
    membership.revoke(device_id)
    return _view(membership)


def _view(membership: Membership) -> MembershipView:
    key, status = membership.key, membership.status()
    return MembershipView(
        fleet_key=key.place,
        fleet_key_id=key.public.key_id,
        version=status.version,
        issued_at=status.issued_at,
        members=status.members,
        revoked=status.revoked,
        waiting=list(status.waiting),
    )
