"""The route that tells how the coordinator and its children are; it needs no token."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from typing import Literal, cast

from fastapi import APIRouter, Request
from pydantic import BaseModel

from cloud_coordinator.control_link import ControlLink
from cloud_coordinator.supervisor import ChildStatus, Supervisor

router = APIRouter(prefix="/v1", tags=["health"])


class ChildView(BaseModel):
    """One supervised child process."""

    state: str
    pid: int | None
    since: datetime
    restarts: int
    last_cause: str


class HealthView(BaseModel):
    """How the service is; ``degraded`` while a child or the broker is away."""

    status: Literal["ok", "degraded"]
    version: str
    children: dict[str, ChildView]
    broker_connected: bool
    messages_received: Mapping[str, int]  # by type, since the start
    messages_refused: Mapping[str, int]  # by reason, since the start


@router.get("/health")
async def health(request: Request) -> HealthView:
    """Return how the coordinator is."""
    link = cast("ControlLink", request.app.state.link)
    supervisors = cast("Sequence[Supervisor]", request.app.state.supervisors)  # type: ignore[type-arg]  # of any child
    well = link.connected and all(s.status.state == "running" for s in supervisors)
    return HealthView(
        status="ok" if well else "degraded",
        version=version("shoal"),
        children={s.name: _view(s.status) for s in supervisors},
        broker_connected=link.connected,
        messages_received=dict(link.received),
        messages_refused=dict(link.refused),
    )


def _view(status: ChildStatus) -> ChildView:
    return ChildView(**asdict(status))
