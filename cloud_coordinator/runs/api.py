"""Routes for runs: start, watch and stop them."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, cast

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict

from cloud_coordinator.devices.authentication import read_body, require_admin
from cloud_coordinator.runs.progress import Progress
from cloud_coordinator.runs.records import RunDetails
from cloud_coordinator.runs.service import RunService
from cloud_coordinator.runs.tables import ParticipationRow, RoundRow, RunRow
from shared.errors import ConfigError
from shared.run_plan import plan_from
from shared.untrusted import NOT_JSON

router = APIRouter(prefix="/v1/runs", tags=["runs"], dependencies=[Depends(require_admin)])
STOPPED_BY_OPERATOR = "stopped by the operator"


class RunView(BaseModel):
    """One run in a list; ``doing`` and ``waiting`` are sentences, empty where there is nothing."""

    run_id: str
    name: str
    state: str
    cause: str
    created_at: datetime
    ended_at: datetime | None
    model_version: str | None
    purpose: Literal["train", "statistics", "judge"]
    doing: str  # right now, as a sentence
    waiting: str  # the same, while it waits for devices


class ParticipationView(BaseModel):
    """One device's part in a round, and why it has none if so."""

    model_config = ConfigDict(from_attributes=True)

    device_id: str
    outcome: str
    cause: str
    num_examples: int | None  # null where nobody but the device knows, as in secure rounds
    seconds: float | None
    bytes_down: int
    bytes_up: int


class RoundView(BaseModel):
    """One closed round; number 0 is the initial model."""

    round_number: int
    state: str
    cause: str
    started_at: datetime
    closed_at: datetime
    seconds: float
    metrics: dict[str, float]
    training_sums: dict[str, float]
    parameters_sha256: str | None
    answers: list[dict[str, Any]]  # of a run that asks for statistics, as `Answer`
    secrecy: dict[str, Any] | None  # of secure sums; null where each device's update was seen
    participations: list[ParticipationView]


class InvitationView(BaseModel):
    """The last that is known of one device's invitation."""

    model_config = ConfigDict(from_attributes=True)

    device_id: str
    state: str
    reason: str
    changed_at: datetime


class RunDetailsView(RunView):
    """One run with its plan and all its rounds."""

    plan: dict[str, Any]
    plan_digest: str
    rounds: list[RoundView]
    invitations: list[InvitationView]


def _runs(request: Request) -> RunService:
    return cast("RunService", request.app.state.runs)


Runs = Annotated[RunService, Depends(_runs)]


@router.post("")
async def start_run(request: Request, runs: Runs) -> RunView:
    """Start a run from a plan (JSON, the same keys as the TOML file)."""
    try:
        document = msgspec.json.decode(await read_body(request))
    except NOT_JSON as error:
        raise ConfigError(f"the plan is not valid JSON: {error}; mend it") from error
    row = await runs.start_run(plan_from(document, source="the plan"))
    return _view(row, runs.progress(row.run_id))


@router.get("")
async def list_runs(runs: Runs) -> list[RunView]:
    """Return all runs, newest first."""
    return [_view(row, runs.progress(row.run_id)) for row in await runs.rows()]


@router.get("/{run_id}")
async def show_run(run_id: str, runs: Runs) -> RunDetailsView:
    """Return one run with its rounds, who took part in each, and why others did not."""
    return _details_view(await runs.details(run_id), runs.progress(run_id))


@router.post("/{run_id}/stop")
async def stop_run(run_id: str, runs: Runs) -> RunView:
    """End a run; what it committed stays."""
    await runs.stop_run(run_id, STOPPED_BY_OPERATOR)
    return _view((await runs.details(run_id)).run, runs.progress(run_id))


def _view(row: RunRow, progress: Progress | None) -> RunView:
    doing = progress.sentence if progress else ""
    return RunView(
        run_id=row.run_id,
        name=row.name,
        state=row.state,
        cause=row.cause,
        created_at=row.created_at,
        ended_at=row.ended_at,
        model_version=row.model_version,
        purpose=_purpose_of(row.plan),
        doing=doing,
        waiting=doing if progress and progress.doing == "waiting" else "",
    )


def _purpose_of(plan: Mapping[str, Any]) -> Literal["train", "statistics", "judge"]:
    if plan.get("statistics"):
        return "statistics"
    return "judge" if plan.get("judgement") else "train"


def _details_view(details: RunDetails, progress: Progress | None) -> RunDetailsView:
    by_round: dict[int, list[ParticipationRow]] = {}
    for part in details.participations:
        by_round.setdefault(part.round_number, []).append(part)
    return RunDetailsView(
        **_view(details.run, progress).model_dump(),
        plan=details.run.plan,
        plan_digest=details.run.plan_digest,
        rounds=[_round_view(row, by_round.get(row.round_number, ())) for row in details.rounds],
        invitations=[InvitationView.model_validate(row) for row in details.invitations],
    )


def _round_view(row: RoundRow, parts: Iterable[ParticipationRow]) -> RoundView:
    return RoundView(
        round_number=row.round_number,
        state=row.state,
        cause=row.cause,
        started_at=row.started_at,
        closed_at=row.closed_at,
        seconds=(row.closed_at - row.started_at).total_seconds(),
        metrics=row.metrics,
        training_sums=row.training_sums,
        parameters_sha256=row.parameters_sha256,
        answers=row.answers or [],
        secrecy=row.secrecy,
        participations=[_participation_view(part) for part in parts],
    )


def _participation_view(row: ParticipationRow) -> ParticipationView:
    view = ParticipationView.model_validate(row)
    return view.model_copy(update={"num_examples": row.num_examples or None})
