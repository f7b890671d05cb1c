"""Conducts compressions: does one step after the other, and stores each result before the next.

Everything that asks devices is a run of its own, with its invitations, floors and receipts. Its
name follows from the run that it is for, so after a crash the same one goes on.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from cloud_coordinator.compression.judging import ask_about, judgement_of
from cloud_coordinator.compression.records import StepRecords
from cloud_coordinator.compression.steps import (
    Calibrated,
    Judged,
    LeftOut,
    ProbeMade,
    Signed,
    Step,
    StepResult,
    StudentTrained,
    VariantsBuilt,
    next_step,
)
from cloud_coordinator.models.descriptions import judgement_in
from cloud_coordinator.models.judgement import Judgement
from cloud_coordinator.models.lifecycle import VersionState
from cloud_coordinator.models.pipeline_messages import Built, Calibration
from cloud_coordinator.models.service import ModelService
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from cloud_coordinator.runs.lifecycle import RunState
from cloud_coordinator.runs.records import COMMITTED, RunDetails
from shared.errors import ConfigError, ConflictError, NotFoundError, UnfitModelError
from shared.judging import JudgeQuestion
from shared.run_plan import RunPlan
from shared.statistics.probes import Probe
from shared.statistics.questions import Mean, Quantiles, Statistic, StatisticsQuestion
from shared.statistics.vectors import Answer
from shared.student_plan import SCORE, Distillation, StudentPlan

logger = logging.getLogger(__name__)

_QUANTILES = (0.9, 0.99, 0.999)  # of rows' extremes, where sums are exact
_LEVELS = 8  # steps of 1/32 octave


class PerformsRuns(Protocol):
    """The run service, as far as compressions need it."""

    async def perform(self, plan: RunPlan, *, run_id: str) -> RunDetails:
        """Start the run of this name, or go on with it, and return it when it has ended."""
        ...

    async def stop_run(self, run_id: str, cause: str) -> None:
        """Ask a run to end; raise NotFoundError or ConflictError where there is none to end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One compression."""

    run_id: str  # of the run that trained the parameters
    plan: RunPlan  # with a table ``[compression]`` or ``[judge]``
    parameters_sha256: str
    rounds: int
    runs: PerformsRuns
    say: Callable[[str], None]


class Compressions:
    """All compressions of a coordinator."""

    def __init__(self, records: StepRecords, models: ModelService) -> None:
        self._records, self._models = records, models

    async def conduct(self, job: Job) -> str:
        """Do what is left of a job; safe to call again after any crash.

        Returns:
            The version that was signed.

        Raises:
            UnfitModelError: the parameters can become no version, or no variant is good enough.
            UnavailableError: something is away; try again.
        """
        done = await self.done(job.run_id)
        while (step := next_step(job.plan, done)) is not None:
            job.say(step.value)
            done[step] = await self._perform(step, job, done)
            await asyncio.to_thread(self._records.save, job.run_id, step, done[step])
            logger.info("run %s: %s: %s", job.run_id, step, done[step].words)
        signed = done[Step.SIGN]
        assert isinstance(signed, Signed)  # no other result ends a job
        return signed.version

    async def stop(self, run_id: str, cause: str, runs: PerformsRuns) -> None:
        """End the run that a stopped job waits for, if there is one."""
        students = (student_run(run_id, step) for step in (Step.DISTIL, Step.SCRATCH))
        for asking in (*students, calibration_run(run_id), judging_run(run_id)):
            with contextlib.suppress(NotFoundError, ConflictError):  # not begun, or ended
                await runs.stop_run(asking, cause)

    async def done(self, run_id: str) -> dict[Step, StepResult]:
        """Return the results of the steps that a run's job has done."""
        return await asyncio.to_thread(self._records.done, run_id)

    async def judgement(self, run_id: str) -> Judgement | None:
        """Return what devices found of what was built of a run."""
        try:
            row = await asyncio.to_thread(self._models.built_of, run_id)
        except NotFoundError:
            return None
        return judgement_in(row)

    async def _perform(self, step: Step, job: Job, done: Mapping[Step, StepResult]) -> StepResult:
        match step:
            case Step.DISTIL | Step.SCRATCH:
                return await self._train_student(job, step)
            case Step.PROBE:
                return await self._probe(job, done)
            case Step.CALIBRATE:
                return await self._calibrate(job, done[Step.PROBE])
            case Step.BUILD:
                return await self._build(job, done)
            case Step.JUDGE:
                return await self._judge(job)
            case Step.SIGN:
                return Signed(version=await self._models.sign(job.run_id, job.plan))

    async def _train_student(self, job: Job, step: Step) -> StepResult:
        """Have devices train a student, in a run like that which trained its teacher."""
        assert job.plan.compression is not None
        plan = job.plan.compression.distil
        assert plan is not None  # or this step is not wanted
        distil = None
        if step is Step.DISTIL:
            distil = Distillation(
                teacher=await self._models.base_digest(job.parameters_sha256),
                parameters_sha256=job.parameters_sha256,
                temperature=plan.temperature,
                weight=plan.weight,
            )
        student = StudentPlan(network=plan.student, distil=distil)
        studying = job.plan.studying(student, suffix=step.value, rounds=plan.rounds)
        run_id = student_run(job.run_id, step)
        job.say(f"training {plan.student}: see run {run_id}")
        details = await job.runs.perform(studying, run_id=run_id)
        if details.run.state != RunState.FINISHED:
            return LeftOut(cause=f"run {run_id} {details.run.state}: {details.run.cause}")
        committed = [row for row in details.rounds if row.state == COMMITTED]
        last = committed[-1]
        return StudentTrained(
            run_id=run_id,
            network=plan.student,
            parameters_sha256=last.parameters_sha256 or "",
            rounds=sum(row.round_number > 0 for row in committed),
            metrics=next((row.metrics for row in reversed(committed) if row.metrics), {}),
        )

    async def _probe(self, job: Job, done: Mapping[Step, StepResult]) -> StepResult:
        result = _network(job, done)
        try:
            probe = await self._models.make_probe(
                plan=job.plan,
                parameters_sha256=result.parameters_sha256,
                student=result.network,
                say=job.say,
            )
        except UnfitModelError as error:  # building says whether anything else can be made
            return LeftOut(cause=str(error))
        return ProbeMade(probe=probe)

    async def _calibrate(self, job: Job, made: StepResult) -> StepResult:
        assert isinstance(made, ProbeMade)  # or this step is not wanted
        run_id = calibration_run(job.run_id)
        try:
            plan = job.plan.calibration(question_about(made.probe, job.plan))
        except ConfigError as error:
            return LeftOut(cause=str(error))
        job.say(f"calibrating: see run {run_id}")
        details = await job.runs.perform(plan, run_id=run_id)
        if details.run.state != RunState.FINISHED:
            return LeftOut(cause=f"run {run_id} {details.run.state}: {details.run.cause}")
        return Calibrated(run_id=run_id, answers=answers_of(details))

    async def _build(self, job: Job, done: Mapping[Step, StepResult]) -> StepResult:
        calibration: Calibration | None = None
        match done.get(Step.PROBE), done.get(Step.CALIBRATE):
            case ProbeMade(probe=probe), Calibrated(answers=answers):
                calibration = Calibration(probe=probe, answers=answers)
            case _:
                pass
        result = _network(job, done)
        await self._models.build(
            run_id=job.run_id,
            plan=job.plan,
            parameters_sha256=result.parameters_sha256,
            rounds=result.rounds,
            student=result.network,
            calibration=calibration,
            say=job.say,
        )
        variants = await asyncio.to_thread(self._variants, job.run_id)
        return VariantsBuilt(
            passed=sum(v.passed for v in variants),
            built=len(variants),
            trained_by=result.trained_by,
        )

    async def _judge(self, job: Job) -> StepResult:
        row = await asyncio.to_thread(self._models.built_of, job.run_id)
        if row.state == VersionState.REJECTED:  # by an earlier life, which ended before it said so
            raise UnfitModelError(row.cause)
        if (judgement := judgement_in(row)) is None:
            judgement = await self._ask_to_judge(job, row)
            await asyncio.to_thread(self._models.judge, job.run_id, judgement)
        return Judged(
            run_id=judgement.run_id,
            devices=judgement.devices,
            passed=sum(variant.passed for variant in judgement.variants),
            judged=len(judgement.variants),
        )

    async def _ask_to_judge(self, job: Job, row: ModelVersionRow) -> Judgement:
        plan, run_id = job.plan.judge, judging_run(job.run_id)
        assert plan is not None  # or this step is not wanted
        built = msgspec.json.decode(row.built or b"", type=Built)
        current = await asyncio.to_thread(self._models.current_of, row.model)
        asked = ask_about(built, current, plan)
        job.say(f"judging: see run {run_id}")
        details = await job.runs.perform(job.plan.judging(asked.question), run_id=run_id)
        if details.run.state != RunState.FINISHED:
            cause = f"not judged: run {run_id} {details.run.state}: {details.run.cause}"
            await asyncio.to_thread(self._models.refuse, job.run_id, cause)
            raise UnfitModelError(cause)
        # What they were really asked: an earlier life may have compared with another version.
        asked = msgspec.structs.replace(
            asked, question=msgspec.convert(details.run.plan["judgement"], JudgeQuestion)
        )
        return judgement_of(asked, built, plan, details)

    def _variants(self, run_id: str) -> Sequence[VariantRow]:
        return self._models.built_of(run_id).variants


@dataclass(frozen=True, slots=True)
class _Network:
    """What is made smaller: the parameters that a job is about, or its student's."""

    parameters_sha256: str
    rounds: int
    network: str = ""  # of the task's students; empty: its own
    trained_by: str = ""  # the run that trained it; empty: the job's own


def _network(job: Job, done: Mapping[Step, StepResult]) -> _Network:
    """Return the better student, the one with a teacher where nothing tells them apart."""
    students = [
        result
        for step in (Step.DISTIL, Step.SCRATCH)
        if isinstance(result := done.get(step), StudentTrained)
    ]
    if not students:
        return _Network(job.parameters_sha256, job.rounds)
    best = max(students, key=lambda student: student.metrics.get(SCORE, 0.0))
    return _Network(best.parameters_sha256, best.rounds, best.network, best.run_id)


def student_run(run_id: str, step: Step) -> str:
    """Return the name of the run in which devices train a student for another one."""
    return f"{run_id}-{step.value}"


def calibration_run(run_id: str) -> str:
    """Return the name of the run that measures ranges for another one."""
    return f"{run_id}-calibrate"


def judging_run(run_id: str) -> str:
    """Return the name of the run in which devices judge another one's result."""
    return f"{run_id}-judge"


def question_about(probe: Probe, plan: RunPlan) -> StatisticsQuestion:
    """Return what devices are asked: quantiles where sums are exact, else what noise leaves."""
    assert plan.compression is not None
    exact = plan.compression.calibration_noise == "none"
    asked: list[Statistic] = [
        Quantiles(feature=column.feature, at=_QUANTILES, levels=_LEVELS)
        if exact
        else Mean(feature=column.feature)
        for column in probe.columns
    ]
    max_rows = plan.compression.calibration_max_rows
    return StatisticsQuestion(of=tuple(asked), max_rows=max_rows, probe=probe)


def answers_of(details: RunDetails) -> tuple[Answer, ...]:
    """Return what a finished run that asked was answered."""
    answered = next(row.answers for row in reversed(details.rounds) if row.answers)
    return tuple(msgspec.convert(answer, Answer) for answer in answered)
