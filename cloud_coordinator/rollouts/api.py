"""The route that sends a model version to devices."""

from typing import Annotated, cast

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from cloud_coordinator.devices.authentication import require_admin
from cloud_coordinator.rollouts.service import RolloutService
from cloud_coordinator.runs.service import RunService

router = APIRouter(prefix="/v1/models", tags=["rollouts"], dependencies=[Depends(require_admin)])


class RolloutView(BaseModel):
    """What was set: devices with data for ``task`` should serve ``version``."""

    version: str
    task: str
    devices: int  # that know of it now; others follow when they come


def _runs(request: Request) -> RunService:
    return cast("RunService", request.app.state.runs)


def _rollouts(request: Request) -> RolloutService:
    return cast("RolloutService", request.app.state.rollouts)


@router.post("/{version}/deploy")
async def deploy(
    version: str,
    runs: Annotated[RunService, Depends(_runs)],
    rollouts: Annotated[RolloutService, Depends(_rollouts)],
) -> RolloutView:
    """Let every device with data for the version's task serve it, now and later."""
    task = await runs.task_of_version(version)
    await rollouts.deploy(task_name=task, model_version=version)
    desired = (await rollouts.desired()).values()
    count = sum(row.model_version == version for row in desired)
    return RolloutView(version=version, task=task, devices=count)
