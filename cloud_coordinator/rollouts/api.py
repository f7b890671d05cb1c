"""Routes for rollouts: start one, see how far it is, pause it, go on, turn it back."""

from datetime import datetime
from typing import Annotated, Any, cast

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict

from cloud_coordinator.devices.authentication import require_admin
from cloud_coordinator.rollouts.decision import Member, Wait
from cloud_coordinator.rollouts.records import RolloutDetails
from cloud_coordinator.rollouts.service import RolloutService
from cloud_coordinator.rollouts.tables import RolloutRow
from cloud_coordinator.runs.service import RunService
from shared.messages import ServedFigures
from shared.rollout_plan import plan_of

router = APIRouter(prefix="/v1/rollouts", tags=["rollouts"], dependencies=[Depends(require_admin)])


class NewRollout(BaseModel):
    """What to roll out, and how; without a plan to all devices at once."""

    model_config = ConfigDict(extra="forbid")

    version: str
    plan: dict[str, Any] | None = None  # with the keys of the TOML file


class FiguresView(BaseModel):
    """How a version is served by one device, in its own signed words."""

    model_config = ConfigDict(from_attributes=True)

    version: str
    requests: int
    errors: int
    crashes: int
    p50_ms: float | None
    p95_ms: float | None
    self_test_ms: float | None


class MemberView(BaseModel):
    """One device of a rollout."""

    device_id: str
    wave: int
    standing: str
    told_at: datetime
    serving_since: datetime | None
    cause: str
    served: FiguresView | None
    before: FiguresView | None


class RolloutView(BaseModel):
    """One rollout; ``waiting`` says what an unfinished one waits for, ``until`` when at most."""

    rollout_id: str
    task: str
    version: str
    previous_version: str | None
    state: str
    cause: str
    gate: str
    wave: int
    waves: int
    waiting: str
    until: datetime | None
    created_at: datetime
    ended_at: datetime | None


class RolloutDetailsView(RolloutView):
    """One rollout with its plan and devices."""

    plan: dict[str, Any]
    devices: list[MemberView]


def _runs(request: Request) -> RunService:
    return cast("RunService", request.app.state.runs)


def _rollouts(request: Request) -> RolloutService:
    return cast("RolloutService", request.app.state.rollouts)


Rollouts = Annotated[RolloutService, Depends(_rollouts)]


@router.post("")
async def start_rollout(
    asked: NewRollout, runs: Annotated[RunService, Depends(_runs)], rollouts: Rollouts
) -> RolloutDetailsView:
    """Let every device with data for the version's task serve it, wave by wave."""
    task = await runs.task_of_version(asked.version)
    plan = None if asked.plan is None else plan_of(asked.plan)
    rollout_id = await rollouts.deploy(
        task_name=task, model_version=asked.version, plan=plan, again=True
    )
    return await show_rollout(rollout_id, rollouts)


@router.get("")
async def list_rollouts(rollouts: Rollouts) -> list[RolloutView]:
    """Return all rollouts, the newest first."""
    return [_view(row, rollouts.wait_of(row.rollout_id)) for row in await rollouts.rows()]


@router.get("/{rollout_id}")
async def show_rollout(rollout_id: str, rollouts: Rollouts) -> RolloutDetailsView:
    """Return one rollout, with where each of its devices stands."""
    return _details_view(await rollouts.details(rollout_id), rollouts.wait_of(rollout_id))


@router.post("/{rollout_id}/pause")
async def pause_rollout(rollout_id: str, rollouts: Rollouts) -> RolloutDetailsView:
    """Open no further wave; what is served stays, and is still watched."""
    await rollouts.pause(rollout_id)
    return await show_rollout(rollout_id, rollouts)


@router.post("/{rollout_id}/resume")
async def resume_rollout(rollout_id: str, rollouts: Rollouts) -> RolloutDetailsView:
    """Go on with a paused rollout where it stopped."""
    await rollouts.resume(rollout_id)
    return await show_rollout(rollout_id, rollouts)


@router.post("/{rollout_id}/abort")
async def abort_rollout(rollout_id: str, rollouts: Rollouts) -> RolloutDetailsView:
    """Drop a planned rollout; turn one back that has begun."""
    await rollouts.abort(rollout_id)
    return await show_rollout(rollout_id, rollouts)


def _view(row: RolloutRow, wait: Wait | None) -> RolloutView:
    return RolloutView(
        rollout_id=row.rollout_id,
        task=row.task_name,
        version=row.model_version,
        previous_version=row.previous_version,
        state=row.state,
        cause=row.cause,
        gate=row.gate,
        wave=row.wave_number,
        waves=len(row.plan["waves"]),
        waiting="" if wait is None else wait.why,
        until=None if wait is None else wait.until,
        created_at=row.created_at,
        ended_at=row.ended_at,
    )


def _details_view(details: RolloutDetails, wait: Wait | None) -> RolloutDetailsView:
    return RolloutDetailsView(
        **_view(details.row, wait).model_dump(),
        plan=details.row.plan,
        devices=[_member(member) for member in details.members],
    )


def _member(member: Member) -> MemberView:
    return MemberView(
        device_id=member.device_id,
        wave=member.wave,
        standing=member.standing.value,
        told_at=member.told_at,
        serving_since=member.serving_since,
        cause=member.cause,
        served=_figures(member.served),
        before=_figures(member.before),
    )


def _figures(figures: ServedFigures | None) -> FiguresView | None:
    return None if figures is None else FiguresView.model_validate(figures)
