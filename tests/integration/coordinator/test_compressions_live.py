"""Compressions in a live coordinator whose workers and models are fakes."""

import asyncio
from pathlib import Path

import msgspec

from cloud_coordinator.compression.service import calibration_run, question_about
from cloud_coordinator.models.tables import ModelVersionRow
from cloud_coordinator.rounds.worker_messages import RoundRecord
from cloud_coordinator.runs.lifecycle import RunEvent
from cloud_coordinator.runs.records import RunRecords
from shared.compression_plan import CompressionPlan
from shared.messages import utc_now
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import RunPlan
from shared.statistics.vectors import Answer
from tests.integration.coordinator.fake_parts import PROBE
from tests.integration.coordinator.live import Live, live, plan, secure_plan, until

ANSWER = Answer("mean", "high x", {"mean": 1.0}, {"mean": 0.1})
COMPRESSED = msgspec.structs.replace(secure_plan(), compression=CompressionPlan())
STEPS = ["probe", "calibrate", "build", "sign"]


def closed(number: int, *, answers: tuple[Answer, ...] = ()) -> RoundRecord:
    now = utc_now()
    return RoundRecord(
        round_number=number,
        state="committed",
        started_at=now,
        closed_at=now,
        participations=(),
        metrics={},
        parameters_sha256=None if answers else "c" * 64,
        answers=answers,
    )


def trained(records: RunRecords, wanted: RunPlan = COMPRESSED) -> str:
    """Store a run that has done its rounds, and return its name."""
    run_id = records.create(wanted).run_id
    records.move(run_id, RunEvent.DEVICES_LACKING)
    records.save_round(run_id, closed(1))
    records.move(run_id, RunEvent.ROUNDS_DONE)
    return run_id


def answered(records: RunRecords, run_id: str) -> str:
    """Store a run that got its answers as the coordinator went away, and return its name."""
    plan = COMPRESSED.calibration(question_about(PROBE, COMPRESSED))
    asking = records.create(plan, run_id=calibration_run(run_id)).run_id
    records.move(asking, RunEvent.DEVICES_LACKING)
    records.save_round(asking, closed(1, answers=(ANSWER,)))
    return asking


async def calibrating(service: Live, run_id: str) -> None:
    async def asks() -> bool:
        runs = {run["run_id"]: run["state"] for run in await service.get("/v1/runs")}
        return runs.get(calibration_run(run_id)) == "recruiting"

    await until("devices to be asked for ranges", asks)


async def test_a_job_that_was_interrupted_goes_on_with_the_run_that_asks_for_it(
    tmp_path: Path,
) -> None:
    async with live(tmp_path) as service:
        run_id = await asyncio.to_thread(trained, service.coordinator.records)
    async with live(tmp_path) as service:  # it finds the run that is exporting
        await calibrating(service, run_id)
        shown = await service.get(f"/v1/compressions/{run_id}")
        assert [step["step"] for step in shown["steps"]] == ["probe"]
        assert f"see run {run_id}-calibrate" in shown["doing"]
    async with live(tmp_path) as service:
        await calibrating(service, run_id)
        [other] = [r for r in await service.get("/v1/runs") if r["run_id"] != run_id]
        assert other["run_id"] == calibration_run(run_id)


async def test_answers_that_came_before_a_crash_are_built_from(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        records = service.coordinator.records
        run_id = await asyncio.to_thread(trained, records)
        await asyncio.to_thread(answered, records, run_id)
    async with live(tmp_path) as service:
        run = await service.ended(run_id)
        assert run["state"] == "finished", run["cause"]
        [job] = await service.get("/v1/compressions")
        assert [step["step"] for step in job["steps"]] == STEPS
        assert job["model_version"] == run["model_version"]
        page = await service.client.get(f"/v1/models/{run['model_version']}/report")
        assert page.headers["content-type"].startswith("text/html")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "measured by run" in page.text
        with service.coordinator.database.transaction() as session:
            row = session.get(ModelVersionRow, run_id)
            assert row is not None
            assert msgspec.json.decode(row.built or b"", type=list[Answer]) == [ANSWER]


async def test_stopping_a_compression_ends_its_run_and_the_one_that_asks(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        run_id = await asyncio.to_thread(trained, service.coordinator.records)
    async with live(tmp_path) as service:
        await calibrating(service, run_id)
        await service.client.post(f"/v1/compressions/{run_id}/stop")
        assert (await service.ended(run_id))["state"] == "stopped"
        assert (await service.ended(calibration_run(run_id)))["state"] == "stopped"
        again = await service.client.post(f"/v1/compressions/{run_id}/stop")
    assert again.status_code == 409
    assert "is stopped, so nothing of it is being compressed" in again.json()["error"]


async def test_a_version_that_cannot_be_built_fails_its_run_with_the_reason(
    tmp_path: Path,
) -> None:
    unfit = msgspec.structs.replace(
        COMPRESSED, name="unfit", compression=CompressionPlan(int8=False)
    )
    async with live(tmp_path) as service:
        run_id = await asyncio.to_thread(trained, service.coordinator.records, unfit)
    async with live(tmp_path) as service:
        run = await service.ended(run_id)
    assert (run["state"], run["cause"]) == ("failed", "the exported model computes something else")


async def test_a_run_without_a_compression_says_where_to_look(tmp_path: Path) -> None:
    async with live(tmp_path) as service:
        bare = msgspec.structs.replace(plan(), privacy=PrivacyPlan(mode="plain"))
        run_id = await service.start(bare)
        answer = await service.client.get(f"/v1/compressions/{run_id}")
        assert answer.status_code == 404
        assert "has no table [compression]" in answer.json()["error"]
        assert await service.get("/v1/compressions") == []
