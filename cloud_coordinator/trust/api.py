"""Routes for TUF metadata, and for whoever watches over them."""

from datetime import datetime
from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict

from cloud_coordinator.devices.authentication import device_or_admin, require_admin
from cloud_coordinator.trust.repository import TrustRepository


class RoleView(BaseModel):
    """One role's metadata in force."""

    model_config = ConfigDict(from_attributes=True)

    role: str
    version: int
    expires_at: datetime
    key_id: str
    files: int


class TrustView(BaseModel):
    """What devices believe; ``root_fingerprint`` is what one that enrols now may pin."""

    root_fingerprint: str
    roles: list[RoleView]


def trust_repository(request: Request) -> TrustRepository:
    """Return the repository that `app.py` put into ``app.state.trust``."""
    return cast("TrustRepository", request.app.state.trust)


Trust = Annotated[TrustRepository, Depends(trust_repository)]
router = APIRouter(prefix="/v1", tags=["trust"])


@router.get("/tuf/{name}", dependencies=[Depends(device_or_admin)])
def download_metadata(name: str, trust: Trust) -> Response:
    """Return one signed metadata file, byte for byte."""
    return Response(trust.metadata(name), media_type="application/json")


@router.get("/trust", dependencies=[Depends(require_admin)])
def show_trust(trust: Trust) -> TrustView:
    """Return which metadata are in force, until when, and by which keys."""
    roles = [RoleView.model_validate(role) for role in trust.status()]
    return TrustView(root_fingerprint=trust.root_fingerprint(), roles=roles)
