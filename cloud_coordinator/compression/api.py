"""Routes for compressions: watch and stop them. A run's plan starts them."""

import asyncio
from datetime import datetime
from typing import Annotated, Any, cast

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from cloud_coordinator.compression.report import report
from cloud_coordinator.compression.service import Compressions
from cloud_coordinator.devices.authentication import require_admin
from cloud_coordinator.models.catalogue import Catalogue
from cloud_coordinator.runs.api import STOPPED_BY_OPERATOR, Runs
from cloud_coordinator.runs.lifecycle import RunState
from cloud_coordinator.runs.service import RunService
from cloud_coordinator.runs.tables import RunRow
from shared.errors import ConflictError, NotFoundError

router = APIRouter(
    prefix="/v1/compressions", tags=["compressions"], dependencies=[Depends(require_admin)]
)


# What people noted or devices said is escaped, and could run nothing if it were not.
_NO_SCRIPTS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


class StepView(BaseModel):
    """One step that is done, and what came of it as a sentence."""

    step: str
    result: str


class CompressionView(BaseModel):
    """One compression, named by the run whose result it makes smaller."""

    run_id: str
    state: str  # of the run: its compression goes on while it is exporting
    cause: str
    doing: str
    created_at: datetime
    model_version: str | None
    steps: list[StepView]
    judgement: dict[str, Any] | None  # of devices, as `Judgement`; null before they judged


reports = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[Depends(require_admin)])


def _compressions(request: Request) -> Compressions:
    return cast("Compressions", request.app.state.compressions)


Jobs = Annotated[Compressions, Depends(_compressions)]


@router.get("")
async def list_compressions(jobs: Jobs, runs: Runs) -> list[CompressionView]:
    """Return the compressions of all runs whose plan wants one, newest first."""
    return [await _view(row, jobs, runs) for row in await runs.rows() if _compresses(row)]


@router.get("/{run_id}")
async def show_compression(run_id: str, jobs: Jobs, runs: Runs) -> CompressionView:
    """Return one compression with the steps that are done."""
    return await _view(await _row(run_id, runs), jobs, runs)


@router.post("/{run_id}/stop")
async def stop_compression(run_id: str, jobs: Jobs, runs: Runs) -> CompressionView:
    """End a compression that goes on, and its run with it; the trained parameters stay."""
    row = await _row(run_id, runs)
    if row.state != RunState.EXPORTING:
        raise ConflictError(
            f"run {run_id} is {row.state}, so nothing of it is being compressed; "
            f"'shoal run stop {run_id}' ends a run that trains"
        )
    await runs.stop_run(run_id, STOPPED_BY_OPERATOR)
    return await _view(await _row(run_id, runs), jobs, runs)


@reports.get("/{version}/report")
async def show_report(version: str, request: Request, jobs: Jobs) -> Response:
    """Return the report of a version: a page with sizes, times, judgement and lineage."""
    catalogue = cast("Catalogue", request.app.state.catalogue)
    facts = await asyncio.to_thread(catalogue.facts, version)
    done = await jobs.done(facts.run_id)
    page = report(facts, {step.value: result.words for step, result in done.items()})
    return Response(page, media_type="text/html", headers=_NO_SCRIPTS)


async def _row(run_id: str, runs: RunService) -> RunRow:
    row = (await runs.details(run_id)).run
    if not _compresses(row):
        raise NotFoundError(
            f"the plan of run {run_id!r} has no table [compression] or [judge]; "
            "'shoal compression list' shows the runs that have one"
        )
    return row


def _compresses(row: RunRow) -> bool:
    return any(row.plan.get(table) is not None for table in ("compression", "judge"))


async def _view(row: RunRow, jobs: Compressions, runs: RunService) -> CompressionView:
    progress = runs.progress(row.run_id)
    done = await jobs.done(row.run_id)
    return CompressionView(
        run_id=row.run_id,
        state=row.state,
        cause=row.cause,
        doing=progress.sentence if progress else "",
        created_at=row.created_at,
        model_version=row.model_version,
        judgement=msgspec.to_builtins(await jobs.judgement(row.run_id)),
        steps=[StepView(step=step.value, result=r.words) for step, r in done.items()],
    )
