"""What devices' answers do to a version: signed, held back in part, or rejected."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from sqlalchemy import select

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.compression.judging import CURRENT
from cloud_coordinator.compression.records import StepRecords
from cloud_coordinator.compression.service import Compressions, Job, judging_run
from cloud_coordinator.compression.steps import Step, VariantsBuilt
from cloud_coordinator.database import Database
from cloud_coordinator.migrations.tables import METADATA
from cloud_coordinator.models.listing import Listing
from cloud_coordinator.models.pipeline_messages import Built, VariantReport
from cloud_coordinator.models.service import ModelService
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from cloud_coordinator.runs.records import RunDetails
from cloud_coordinator.runs.tables import RunRow
from cloud_coordinator.trust.keys import load_trust_keys
from cloud_coordinator.trust.repository import TrustRepository
from cloud_coordinator.trust.tables import TufTargetRow
from shared.errors import UnfitModelError
from shared.judge_plan import JudgePlan
from shared.judging import GAIN, MEAN, SCORE, WORST_DECILE, CandidateFacts
from shared.manifest import GoldenBatch, TensorSpec
from shared.run_plan import CohortPlan, RunPlan
from shared.signed_manifest import open_manifest
from shared.signing import SigningKey
from shared.statistics.vectors import Answer
from shared.tasks.spec import TaskSpec

NOW = datetime(2026, 3, 1, tzinfo=UTC)
PLAN = RunPlan(
    name="nightly",
    task=TaskSpec("fashion", "image-classification"),
    cohort=CohortPlan(size=20),
    judge=JudgePlan(noise="none", min_devices=2),
)
FILES = {"fp32": b"f" * 400, "int8-weights": b"w" * 100, "int8-vnni": b"v" * 110}
KEY = SigningKey.generate()


class CrashedError(Exception):
    """Stands for ``kill -9``."""


@dataclass
class FakeRuns:
    """Devices that say of each file what they are told to."""

    gains: Mapping[str, float] = field(default_factory=dict)
    state: str = "finished"
    crashes: bool = False
    asked: list[RunPlan] = field(default_factory=list)

    async def perform(self, plan: RunPlan, *, run_id: str) -> RunDetails:
        self.asked.append(plan)
        if self.crashes:
            raise CrashedError
        question = self.asked[0].judgement  # a run that is there already was asked that
        assert question is not None
        answers = [
            Answer(SCORE, c.name, self._figures(c.name, question.reference), {})
            for c in question.candidates
        ]
        facts = [CandidateFacts(name=c.name, p50_ms=1.0, p95_ms=2.0) for c in question.candidates]
        round_ = SimpleNamespace(round_number=1, answers=msgspec.to_builtins(answers))
        parts = [
            SimpleNamespace(
                round_number=1,
                device_id=name,
                outcome=outcome,
                facts=msgspec.to_builtins(facts),
            )
            for name, outcome in (("a", "replied"), ("b", "replied"), ("c", "dropped"))
        ]
        stored = msgspec.to_builtins(self.asked[0])
        run = SimpleNamespace(run_id=run_id, state=self.state, cause="too few devices", plan=stored)
        return cast("RunDetails", SimpleNamespace(run=run, rounds=[round_], participations=parts))

    def _figures(self, name: str, reference: str) -> dict[str, float]:
        found = {MEAN: 0.9} if name == reference else {GAIN: self.gains.get(name, 0.0)}
        return {**found, WORST_DECILE: 0.8}

    async def stop_run(self, run_id: str, cause: str) -> None:
        raise AssertionError(f"nobody stops {run_id} here: {cause}")


class CrashingRecords(StepRecords):
    """Dies once, before the step is on record."""

    crashes_at: Step | None = None

    def save(self, run_id: str, step: Step, result: Any) -> None:
        if step is self.crashes_at:
            self.crashes_at = None
            raise CrashedError
        super().save(run_id, step, result)


@dataclass
class World:
    """A coordinator with one version that is built, and nothing judged."""

    database: Database
    models: ModelService
    records: CrashingRecords
    blobs: BlobStore

    def add(self, run_id: str, *, files: Mapping[str, bytes] = FILES, **fields: Any) -> None:
        """Store what was built of a run."""
        reports = tuple(
            VariantReport(
                variant=name,
                passed=True,
                file=f"{name}.onnx",
                sha256=self.blobs.put(content),
                size_bytes=len(content),
                needs=("vnni",) if "vnni" in name else (),
            )
            for name, content in files.items()
        )
        pixels = TensorSpec("pixels", "FP32", (-1, 1, 28, 28))
        built = Built(
            variants=reports,
            ship="int8-weights",
            inputs=(pixels,),
            outputs=(TensorSpec("logits", "FP32", (-1, 2)),),
            labels=("shirt", "shoe"),
            golden=GoldenBatch(inputs=b"", outputs=b"", rows=0, tolerance=0.0),
        )
        with self.database.transaction() as session:
            run = {"name": "nightly", "state": "exporting", "plan": {}, "plan_digest": ""}
            session.add(RunRow(run_id=run_id, created_at=NOW, **run))
            session.flush()
            session.add(
                ModelVersionRow(
                    run_id=run_id,
                    model="fashion",
                    created_at=NOW,
                    rounds=3,
                    parameters_sha256="0" * 64,
                    built=msgspec.json.encode(built),
                    variants=[
                        VariantRow(
                            variant=report.variant,
                            position=position,
                            shipped=report.variant == built.ship,
                            passed=True,
                            sha256=report.sha256,
                            size_bytes=report.size_bytes,
                            session_config={},
                        )
                        for position, report in enumerate(reports)
                    ],
                    **{"state": "compressed", **fields},
                )
            )
        self.records.save(run_id, Step.BUILD, VariantsBuilt(passed=3, built=3))

    async def conduct(self, runs: FakeRuns, run_id: str = "run-1") -> str:
        """Do what is left of the job."""
        job = Job(
            run_id=run_id,
            plan=PLAN,
            parameters_sha256="0" * 64,
            rounds=3,
            runs=runs,
            say=lambda _: None,
        )
        return await Compressions(self.records, self.models).conduct(job)

    def row(self, run_id: str = "run-1") -> ModelVersionRow:
        """Return the version's row."""
        return self.models.built_of(run_id)

    def candidates(self) -> int:
        """Return how many files TUF lists as candidates."""
        with self.database.transaction() as session:
            found = session.scalars(select(TufTargetRow).where(TufTargetRow.role == "candidates"))
            return len(found.all())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    database = Database(f"sqlite:///{tmp_path / 'shoal.db'}")
    with database.connection() as connection:
        METADATA.create_all(connection)
    trust = TrustRepository(database, load_trust_keys(tmp_path / "trust"), clock=lambda: NOW)
    trust.renew()
    blobs = BlobStore(tmp_path / "blobs")
    listing = Listing(database, trust)
    models = ModelService(database, blobs, KEY, listing, tmp_path, clock=lambda: NOW)
    yield World(database, models, CrashingRecords(database, clock=lambda: NOW), blobs)
    database.close()


async def test_what_no_gate_holds_back_is_signed_and_the_rest_is_never_listed(
    world: World,
) -> None:
    world.add("run-1")
    version = await world.conduct(FakeRuns({"int8-weights": -0.2}))
    row = world.row()
    assert (row.state, row.version) == ("signed", version)
    assert row.sealed is not None
    trusted = {KEY.public.key_id: KEY.public}
    manifest = open_manifest(row.sealed, trusted=trusted, version=version).manifest
    assert [a.variant for a in manifest.artifacts] == ["fp32", "int8-vnni"]
    assert manifest.ship == "fp32"  # the other one needs a processor that not every device has
    by_name = {v.variant: v for v in row.variants}
    assert by_name["int8-weights"].sha256 is None
    assert by_name["int8-weights"].cause.startswith("score: it loses 0.2000 of a mean score of 0.9")
    assert [v.variant for v in row.variants if v.shipped] == ["fp32"]
    assert world.candidates() == 2


async def test_where_nothing_passes_the_version_is_rejected_with_every_reason(
    world: World,
) -> None:
    world.add("run-0", state="current", version="c" * 64, files={**FILES, "fp32": b"g" * 400})
    world.add("run-1")
    runs = FakeRuns(dict.fromkeys(FILES, -0.2))
    with pytest.raises(UnfitModelError, match="compared with version cccccccccccc: fp32: score"):
        await world.conduct(runs)
    row = world.row()
    assert (row.state, row.version) == ("rejected", None)
    for name in FILES:
        assert f"{name}: score: it loses 0.2000" in row.cause
    assert world.row("run-0").state == "current"


async def test_files_are_compared_with_what_is_served(world: World) -> None:
    world.add("run-0", state="current", version="c" * 64)
    world.add("run-1")
    runs = FakeRuns()
    await world.conduct(runs)
    question = runs.asked[0].judgement
    assert question is not None
    assert question.reference == CURRENT
    assert [c.name for c in question.candidates] == [CURRENT, "fp32", "int8-weights", "int8-vnni"]
    assert question.candidates[0].sha256 == world.blobs.put(FILES["int8-weights"])
    assert question.labels == 2


async def test_what_became_current_meanwhile_does_not_change_what_was_asked(world: World) -> None:
    """The coordinator died while devices judged; the run that asked them goes on."""
    world.add("run-1")
    runs = FakeRuns(crashes=True)
    with pytest.raises(CrashedError):
        await world.conduct(runs)
    world.add("run-0", state="current", version="c" * 64)
    runs.crashes = False
    await world.conduct(runs)
    assert world.row().state == "signed"


async def test_a_run_that_gets_no_answers_leaves_nothing_to_sign(world: World) -> None:
    world.add("run-1")
    with pytest.raises(UnfitModelError, match="not judged: run run-1-judge failed: too few"):
        await world.conduct(FakeRuns(state="failed"))
    assert world.row().state == "rejected"
    with pytest.raises(UnfitModelError, match="not judged: run run-1-judge failed: too few"):
        await world.conduct(FakeRuns())


@pytest.mark.parametrize("gain", [0.0, -0.2])
async def test_a_judgement_that_is_on_record_is_not_made_again(world: World, gain: float) -> None:
    """The coordinator dies between the judgement and the note that it was made."""
    world.add("run-1")
    world.records.crashes_at = Step.JUDGE
    runs = FakeRuns({"int8-weights": gain})
    with pytest.raises(CrashedError):
        await world.conduct(runs)
    before = world.row().judgement
    assert before is not None
    await world.conduct(FakeRuns({"fp32": -0.9}))
    assert world.row().judgement == before
    assert world.row().state == "signed"
    done = world.records.done("run-1")[Step.JUDGE]
    passed = 3 if gain == 0.0 else 2
    assert (
        done.words == f"{passed} of 3 variants passed on 2 devices, by run {judging_run('run-1')}"
    )


async def test_a_rejection_that_is_on_record_stays(world: World) -> None:
    world.add("run-0", state="current", version="c" * 64)
    world.add("run-1")
    with pytest.raises(UnfitModelError, match="no variant passed") as first:
        await world.conduct(FakeRuns(dict.fromkeys(FILES, -0.2)))
    with pytest.raises(UnfitModelError, match="no variant passed") as second:
        await world.conduct(FakeRuns())
    assert str(second.value) == str(first.value)
