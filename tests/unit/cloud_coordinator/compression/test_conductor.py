"""A compression from its first step to its last, through failures and crashes of everything."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import msgspec
import pytest

from cloud_coordinator.compression.records import StepRecords
from cloud_coordinator.compression.service import Compressions, Job, calibration_run
from cloud_coordinator.compression.steps import Calibrated, LeftOut, Step
from cloud_coordinator.database import Database
from cloud_coordinator.migrations.tables import METADATA
from cloud_coordinator.models.pipeline_messages import Calibration
from cloud_coordinator.models.service import ModelService
from cloud_coordinator.rounds.plan_explanation import explain
from cloud_coordinator.runs.records import RunDetails
from cloud_coordinator.runs.tables import RunRow
from shared.compression_plan import CompressionPlan, DistilPlan
from shared.errors import ConfigError, ConflictError, UnavailableError, UnfitModelError
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from shared.statistics.probes import Probe, ProbeColumn
from shared.statistics.questions import Count, Mean, Quantiles, StatisticsQuestion
from shared.statistics.vectors import Answer
from shared.student_plan import Distillation
from shared.tasks.spec import TaskSpec

PROBE = Probe(model_sha256="a" * 64, columns=(ProbeColumn("x", "high", 0.0),))
ANSWER = Answer("mean", "high x", {"mean": 1.0}, {"mean": 0.1})
PLAN = RunPlan(
    name="nightly",
    task=TaskSpec("digits", "image-classification"),
    cohort=CohortPlan(size=30),
    compression=CompressionPlan(),
)


class CrashedError(Exception):
    """Stands for ``kill -9``."""


@dataclass
class FakeModels:
    """Remembers what was asked of the registry; fails or crashes where told to."""

    calls: list[str] = field(default_factory=list)
    calibrations: list[Calibration | None] = field(default_factory=list)
    built: list[tuple[str, str]] = field(default_factory=list)
    fails: dict[str, Exception] = field(default_factory=dict)

    def called(self, what: str) -> None:
        self.calls.append(what)
        if (error := self.fails.pop(what, None)) is not None:
            raise error

    async def make_probe(self, **_: object) -> Probe:
        self.called("probe")
        return PROBE

    async def base_digest(self, parameters_sha256: str) -> str:
        return f"{parameters_sha256[0]}f" * 32

    async def build(
        self, *, calibration: Calibration | None, student: str, parameters_sha256: str, **_: object
    ) -> None:
        self.calibrations.append(calibration)
        self.built.append((student, parameters_sha256[0]))
        self.called("build")

    def built_of(self, _run_id: str) -> Any:
        return SimpleNamespace(variants=[SimpleNamespace(passed=True)] * 3)

    async def sign(self, run_id: str, _plan: RunPlan) -> str:
        self.called("sign")
        return f"version of {run_id}"


def committed(number: int, **fields: Any) -> Any:
    fixed = {"round_number": number, "state": "committed", "answers": None, "metrics": {}}
    return SimpleNamespace(**{**fixed, "parameters_sha256": None, **fields})


@dataclass
class FakeRuns:
    """Ends every run as told."""

    state: str = "finished"
    cause: str = ""
    scores: tuple[float, float] = (0.8, 0.7)  # of the student with a teacher, and without
    performed: list[tuple[str, RunPlan]] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)

    async def perform(self, plan: RunPlan, *, run_id: str) -> RunDetails:
        self.performed.append((run_id, plan))
        rounds = [
            committed(0),
            committed(1, parameters_sha256="e" * 64),
            committed(2, parameters_sha256="d" * 64),
            committed(3, answers=[msgspec.to_builtins(ANSWER)]),
        ]
        if plan.student is not None:
            taught = plan.student.distil is not None
            sha256, score = ("d", self.scores[0]) if taught else ("b", self.scores[1])
            rounds[2:] = [committed(2, parameters_sha256=sha256 * 64, metrics={"score": score})]
        run = SimpleNamespace(run_id=run_id, state=self.state, cause=self.cause)
        return cast("RunDetails", SimpleNamespace(run=run, rounds=rounds))

    async def stop_run(self, run_id: str, _cause: str) -> None:
        self.stopped.append(run_id)
        raise ConflictError("it has ended already")


@pytest.fixture
def records(tmp_path: Path) -> Iterator[StepRecords]:
    database = Database(f"sqlite:///{tmp_path / 'shoal.db'}")
    with database.connection() as connection:
        METADATA.create_all(connection)
    with database.transaction() as session:
        for run_id, state in (("run-1", "exporting"), ("run-2", "finished")):
            session.add(
                RunRow(
                    run_id=run_id,
                    name="nightly",
                    state=state,
                    plan={},
                    plan_digest="",
                    created_at=datetime(2026, 1, 1, tzinfo=UTC),
                )
            )
    ticks = iter(range(1000))
    yield StepRecords(
        database, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=next(ticks))
    )
    database.close()


def job(runs: FakeRuns, plan: RunPlan = PLAN, run_id: str = "run-1") -> Job:
    return Job(
        run_id=run_id,
        plan=plan,
        parameters_sha256="c" * 64,
        rounds=3,
        runs=runs,
        say=lambda _: None,
    )


def compressions(records: StepRecords, models: FakeModels) -> Compressions:
    return Compressions(records, cast("ModelService", models))


async def test_what_devices_answered_goes_into_the_build(records: StepRecords) -> None:
    models, runs = FakeModels(), FakeRuns()
    version = await compressions(records, models).conduct(job(runs))
    assert version == "version of run-1"
    assert models.calls == ["probe", "build", "sign"]
    assert models.calibrations == [Calibration(probe=PROBE, answers=(ANSWER,))]
    [(run_id, asked)] = runs.performed
    assert run_id == calibration_run("run-1")
    assert asked.statistics is not None
    assert asked.statistics.probe == PROBE
    assert asked.privacy.noise == "distributed"
    assert isinstance(asked.statistics.of[0], Mean)


async def test_exact_sums_are_asked_for_quantiles(records: StepRecords) -> None:
    compression = CompressionPlan(calibration_noise="none", calibration_max_rows=7)
    runs = FakeRuns()
    plan = msgspec.structs.replace(PLAN, compression=compression)
    await compressions(records, FakeModels()).conduct(job(runs, plan))
    [(_, asked)] = runs.performed
    assert asked.statistics is not None
    (statistic,) = asked.statistics.of
    assert isinstance(statistic, Quantiles)
    assert statistic.at == (0.9, 0.99, 0.999)
    assert asked.statistics.max_rows == 7
    assert asked.privacy.noise == "none"


async def test_devices_that_do_not_answer_cost_static_int8_only(records: StepRecords) -> None:
    models, runs = FakeModels(), FakeRuns(state="failed", cause="too few devices")
    await compressions(records, models).conduct(job(runs))
    assert models.calibrations == [None]
    done = records.done("run-1")
    assert done[Step.CALIBRATE] == LeftOut(cause="run run-1-calibrate failed: too few devices")
    assert list(done) == [Step.PROBE, Step.CALIBRATE, Step.BUILD, Step.SIGN]


DISTILLED = msgspec.structs.replace(
    PLAN, compression=CompressionPlan(distil=DistilPlan(student="small-cnn", rounds=2))
)


async def test_a_student_is_what_is_built_and_the_same_from_scratch_stands_beside(
    records: StepRecords,
) -> None:
    models, runs = FakeModels(), FakeRuns()
    await compressions(records, models).conduct(job(runs, DISTILLED))
    assert models.built == [("small-cnn", "d")]
    (distil, taught), (scratch, alone), _ = runs.performed
    assert (distil, scratch) == ("run-1-distil", "run-1-scratch")
    assert taught.student is not None
    assert alone.student is not None
    assert taught.student.distil == Distillation(
        teacher="cf" * 32, parameters_sha256="c" * 64, temperature=4.0, weight=0.8
    )
    assert alone.student.distil is None
    assert (taught.rounds, taught.export, taught.seed) == (2, False, PLAN.seed)
    assert records.done("run-1")[Step.DISTIL].words == (
        "small-cnn trained by run run-1-distil: score 0.8000"
    )


async def test_a_teacher_that_does_no_good_is_not_believed(records: StepRecords) -> None:
    models, runs = FakeModels(), FakeRuns(scores=(0.7, 0.8))
    await compressions(records, models).conduct(job(runs, DISTILLED))
    assert models.built == [("small-cnn", "b")]
    assert records.done("run-1")[Step.BUILD].words == (
        "3 of 3 variants compute what torch does, of what run run-1-scratch trained"
    )


async def test_a_student_that_nobody_trained_leaves_the_teacher_to_be_built(
    records: StepRecords,
) -> None:
    models, runs = FakeModels(), FakeRuns(state="failed", cause="too few devices")
    await compressions(records, models).conduct(job(runs, DISTILLED))
    assert models.built == [("", "c")]
    assert records.done("run-1")[Step.DISTIL] == LeftOut(
        cause="run run-1-distil failed: too few devices"
    )


async def test_a_model_that_cannot_be_probed_asks_no_device(records: StepRecords) -> None:
    models = FakeModels(fails={"probe": UnfitModelError("a tensor mixes rows")})
    runs = FakeRuns()
    await compressions(records, models).conduct(job(runs))
    assert runs.performed == []
    assert records.done("run-1")[Step.PROBE] == LeftOut(cause="a tensor mixes rows")


@pytest.mark.parametrize("where", ["probe", "build", "sign"])
@pytest.mark.parametrize("error", [CrashedError(), UnavailableError("the disk is full")])
async def test_after_a_crash_no_step_that_is_done_is_done_again(
    records: StepRecords, where: str, error: Exception
) -> None:
    models, runs = FakeModels(fails={where: error}), FakeRuns()
    with pytest.raises(type(error)):
        await compressions(records, models).conduct(job(runs))
    version = await compressions(records, models).conduct(job(runs))
    assert version == "version of run-1"
    assert sorted(models.calls) == sorted(["probe", "build", "sign", where])
    assert len(runs.performed) == 1
    assert isinstance(records.done("run-1")[Step.CALIBRATE], Calibrated)


async def test_parameters_that_become_no_version_say_so(records: StepRecords) -> None:
    models = FakeModels(fails={"build": UnfitModelError("its outputs hold NaN")})
    with pytest.raises(UnfitModelError, match="hold NaN"):
        await compressions(records, models).conduct(job(FakeRuns()))
    assert Step.BUILD not in records.done("run-1")


async def test_stopping_ends_the_run_that_asks_and_bears_that_it_has_ended(
    records: StepRecords,
) -> None:
    runs = FakeRuns()
    await compressions(records, FakeModels()).stop("run-1", "enough", runs)
    others = ("distil", "scratch", "calibrate", "judge")
    assert runs.stopped == [f"run-1-{each}" for each in others]


async def test_the_model_that_devices_are_asked_about_is_kept_as_long_as_its_job_goes_on(
    records: StepRecords,
) -> None:
    for run_id in ("run-1", "run-2"):
        await compressions(records, FakeModels()).conduct(job(FakeRuns(), run_id=run_id))
    assert records.blobs_in_use() == {PROBE.model_sha256}
    assert records.done("run-3") == {}


def test_a_plan_whose_devices_could_not_be_asked_is_refused_before_it_trains() -> None:
    with pytest.raises(
        ConfigError, match=r"\[compression\] int8 = true asks devices .* int8 = fal"
    ):
        msgspec.structs.replace(PLAN, privacy=PrivacyPlan(mode="plain"))
    plain = msgspec.structs.replace(
        PLAN, privacy=PrivacyPlan(mode="plain"), compression=CompressionPlan(int8=False)
    )
    assert plain.compression is not None


def test_a_run_with_noise_of_the_coordinators_asks_for_ranges_under_the_devices_own() -> None:
    privacy = PrivacyPlan(noise="central", weights="uniform", adaptive_clipping=True)
    plan = msgspec.structs.replace(PLAN, privacy=privacy)
    asked = plan.calibration(StatisticsQuestion(of=(Count(),)))
    assert asked.privacy.noise == "distributed"
    assert (asked.name, asked.compression) == ("nightly-calibrate", None)


@pytest.mark.parametrize(
    ("noise", "size", "words"),
    [
        ("none", 30, "exactly, so owners' policies must say exact_sums = true"),
        ("distributed", 200, r"noise moves each of 8 ranges by about ±0\.15 octaves$"),
        ("distributed", 18, r"±[\d.]+ octaves$"),
    ],
)
def test_who_starts_a_run_hears_what_ranges_cost(
    noise: Literal["none", "distributed"], size: int, words: str
) -> None:
    plan = msgspec.structs.replace(
        PLAN,
        cohort=CohortPlan(size=size),
        compression=CompressionPlan(calibration_noise=noise),
    )
    (line,) = [line for line in explain(plan) if line.startswith("ranges for static int8")]
    assert re.search(words, line), line


def test_who_starts_a_run_of_few_devices_hears_that_noise_leaves_no_ranges() -> None:
    privacy = PrivacyPlan(at_least=4)
    plan = msgspec.structs.replace(PLAN, cohort=CohortPlan(size=6), privacy=privacy)
    (line,) = [line for line in explain(plan) if line.startswith("ranges for static int8")]
    assert "octaves, more than the 1 that leave it any use" in line
