"""Steps of compressions in the database. Everything here blocks; callers run it in a thread."""

from collections.abc import Callable
from datetime import datetime

import msgspec
from sqlalchemy import select

from cloud_coordinator.compression.steps import ProbeMade, Step, StepResult
from cloud_coordinator.compression.tables import CompressionStepRow
from cloud_coordinator.database import Database
from cloud_coordinator.runs.lifecycle import RunState
from cloud_coordinator.runs.tables import RunRow
from shared.config import convert


class StepRecords:
    """Reads and writes what is done."""

    def __init__(self, database: Database, *, clock: Callable[[], datetime]) -> None:
        self._database, self._clock = database, clock

    def done(self, run_id: str) -> dict[Step, StepResult]:
        """Return the results of a run's steps, in the order in which they were done."""
        with self._database.transaction() as session:
            rows = session.scalars(
                select(CompressionStepRow)
                .where(CompressionStepRow.run_id == run_id)
                .order_by(CompressionStepRow.done_at)
            ).all()
            return {Step(row.step): _result(row) for row in rows}

    def save(self, run_id: str, step: Step, result: StepResult) -> None:
        """Store a result; one that is there already stays as it is."""
        with self._database.transaction() as session:
            if session.get(CompressionStepRow, (run_id, step.value)) is None:
                session.add(
                    CompressionStepRow(
                        run_id=run_id,
                        step=step.value,
                        result=msgspec.to_builtins(result),
                        done_at=self._clock(),
                    )
                )

    def blobs_in_use(self) -> set[str]:
        """Return the digests of the models that devices are still asked about."""
        asked = (
            select(CompressionStepRow)
            .join(RunRow, RunRow.run_id == CompressionStepRow.run_id)
            .where(
                RunRow.state == RunState.EXPORTING.value,
                CompressionStepRow.step == Step.PROBE.value,
            )
        )
        with self._database.transaction() as session:
            results = [_result(row) for row in session.scalars(asked)]
        return {r.probe.model_sha256 for r in results if isinstance(r, ProbeMade)}


def _result(row: CompressionStepRow) -> StepResult:
    result: StepResult = convert(
        row.result,
        StepResult,  # type: ignore[arg-type]  # mypy takes a union for no type
        source=f"step {row.step} of run {row.run_id}",
    )
    return result
