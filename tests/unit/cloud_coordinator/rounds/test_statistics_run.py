"""Stories of runs that ask for statistics, told by a simulated fleet of real clients."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from cloud_coordinator.rounds import asking_run
from cloud_coordinator.rounds.initial_model import contract_of
from cloud_coordinator.rounds.worker_messages import (
    Participation,
    RoundProgress,
    RoundRecord,
    RunFailed,
    RunFinished,
)
from shared.errors import ConfigError, NotFoundError
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from shared.secure_sum.questions import statistics_question
from shared.statistics.probes import Probe, ProbeColumn, contract_of_probe, rows_of_probe
from shared.statistics.questions import (
    Count,
    Histogram,
    Labels,
    Mean,
    Quantiles,
    Statistic,
    StatisticsQuestion,
    Variance,
)
from shared.statistics.vectors import Answer, StatisticsVector
from shared.tasks.examples import Examples
from tests.unit.cloud_coordinator.rounds.simulated_fleet import (
    TASK,
    SimulatedDevice,
    SimulatedFleet,
    SimulatedHost,
)
from tests.unit.cloud_coordinator.rounds.simulated_sums import encoded

OF: tuple[Statistic, ...] = (
    Count(),
    Mean(feature="pressure"),
    Variance(feature="pressure"),
    Histogram(feature="pressure", bins=5),
    Quantiles(feature="pressure", at=(0.5,)),
    Labels(),
)
NO_ROWS = Examples(np.zeros((0, 1), np.float32), np.zeros(0, np.int64))


@dataclass
class Answering(SimulatedDevice):
    """Has rows, and puts what it is asked about them into the sum, as a real one does."""

    rows: Examples = field(default_factory=lambda: NO_ROWS)

    def answer(self, message: Message) -> RecordDict:
        if message.metadata.message_type != "query.statistics":
            return super().answer(message)
        text = message.content.config_records["statistics"]["json"]
        sealed = message.content.config_records["sum"]["config"]
        assert isinstance(text, str)
        assert isinstance(sealed, bytes)
        question = msgspec.json.decode(text, type=StatisticsQuestion)
        contract = contract_of(TASK)
        if question.probe is not None:  # its rows are what the model makes of them
            contract = contract_of_probe(question.probe)
            (model,) = message.content.array_records["model"].values()
            assert hashlib.sha256(bytes(model.numpy())).hexdigest() == question.probe.model_sha256
        vector = StatisticsVector(question, contract).contribution(self.rows)
        answer = self.sums.advertise(sealed, vector, {})
        opened = self.sums.opened[answer.session].config
        assert opened.question_digest == statistics_question(text.encode())
        return RecordDict({"sum": ConfigRecord({"answer": encoded(answer)})})

    def is_silent_at(self, stage: str) -> bool:
        return stage != "statistics" and super().is_silent_at(stage)


def fleet_with_rows(devices: int = 7) -> SimulatedFleet:
    """Device i has 3 + 5·i rows of its own."""
    fleet, rng = SimulatedFleet(devices), np.random.default_rng(1)
    for index, (name, plain) in enumerate(list(fleet.devices.items())):
        size = 3 + 5 * index
        device = Answering(
            name,
            plain.node_id,
            plain.target,
            rows=Examples(
                rng.uniform(0, 1, (size, 1)).astype(np.float32), rng.integers(0, 2, size)
            ),
        )
        device.sums = plain.sums
        fleet.devices[name] = device
    return fleet


def rows_of(fleet: SimulatedFleet, *without: str) -> tuple[np.ndarray[Any, Any], int]:
    """Return all pressures together, and how many rows failed."""
    devices = [d for d in fleet.devices.values() if isinstance(d, Answering)]
    rows = [device.rows for device in devices if device.name not in without]
    pressures = np.concatenate([part.inputs[:, 0] for part in rows]).astype(np.float64)
    return pressures, int(sum(part.targets.sum() for part in rows))


def asking(
    *of: Statistic,
    noise: str = "none",
    at_least: int = 4,
    max_rows: int = 100,
    size: int = 7,
    **cohort: Any,
) -> RunPlan:
    return RunPlan(
        name="pumps",
        task=TASK,
        statistics=StatisticsQuestion(of=of or OF, max_rows=max_rows),
        privacy=PrivacyPlan(noise=noise, at_least=at_least),  # type: ignore[arg-type]
        cohort=CohortPlan(size=size, **cohort),
    )


def ask(
    folder: Path, plan: RunPlan, *, announces: bool = True, devices: int = 7
) -> tuple[SimulatedFleet, SimulatedHost]:
    fleet = fleet_with_rows(devices)
    if announces:
        fleet.join()
    return fleet, SimulatedHost(
        fleet, plan, folder / "blobs", announces=announces, scratch=folder / "scratch"
    )


def by_kind(record: RoundRecord) -> dict[str, Answer]:
    return {answer.kind: answer for answer in record.answers}


@pytest.mark.parametrize("announces", [True, False])
def test_exact_answers_are_those_of_all_rows_together(tmp_path: Path, *, announces: bool) -> None:
    fleet, host = ask(tmp_path, asking(), announces=announces)

    host.perform()

    assert host.outcome == RunFinished()
    (record,) = host.records
    assert msgspec.json.decode(msgspec.json.encode(record), type=RoundRecord) == record
    assert (record.round_number, record.state) == (1, "committed")
    assert record.parameters_sha256 is None
    pressures, failed = rows_of(fleet)
    found = by_kind(record)
    counts, _ = np.histogram(pressures, bins=5, range=(0, 1))
    assert found["count"].values == {"count": len(pressures)}
    assert list(found["histogram"].values.values()) == counts.tolist()
    assert found["labels"].values == {"ok": len(pressures) - failed, "failed": failed}
    assert found["mean"].values["mean"] == pytest.approx(pressures.mean(), rel=1e-6)
    assert found["variance"].values["variance"] == pytest.approx(pressures.var(), rel=1e-5)
    assert found["quantiles"].values["q0.5"] == pytest.approx(np.median(pressures), abs=0.02)
    assert not any(answer.standard_error for answer in record.answers)
    assert record.secrecy is not None
    assert record.secrecy.noise == "none"


def test_no_reply_and_no_record_tells_what_one_device_has(tmp_path: Path) -> None:
    _, host = ask(tmp_path, asking())

    host.perform()

    (record,) = host.records
    assert {part.num_examples for part in record.participations} == {0}
    assert record.metrics == record.training_sums == {}


def test_noised_answers_are_near_and_say_how_near(tmp_path: Path) -> None:
    fleet, host = ask(tmp_path, asking(Count(), Labels(), noise="distributed", max_rows=40))

    host.perform()

    (record,) = host.records
    assert msgspec.json.decode(msgspec.json.encode(record), type=RoundRecord) == record
    pressures, failed = rows_of(fleet)
    count, labels = record.answers
    # σ is the multiplier's 1 times the norm √3, of 4 honest devices' shares; 7 devices add theirs.
    stated = 40 * np.sqrt(3 * 7 / 4)
    assert count.standard_error["count"] == pytest.approx(stated, rel=0.3)
    assert abs(count.values["count"] - len(pressures)) < 6 * stated
    assert abs(labels.values["failed"] - failed) < 6 * stated
    assert count.values["count"] != len(pressures)
    assert record.secrecy is not None
    assert record.secrecy.epsilon is not None


def test_a_device_that_drops_before_its_vector_is_left_out_of_the_answers(tmp_path: Path) -> None:
    fleet, host = ask(tmp_path, asking())
    fleet.devices["edge-6"].silent_at = "mask"

    host.perform()

    (record,) = host.records
    pressures, _ = rows_of(fleet, "edge-6")
    assert by_kind(record)["count"].values == {"count": len(pressures)}
    assert {p.device_id for p in record.participations if p.outcome != "replied"} == {"edge-6"}


def test_devices_that_sent_exact_numbers_are_not_asked_for_them_for_ever(tmp_path: Path) -> None:
    fleet, host = ask(tmp_path, asking(max_abandoned_rounds=9))
    for device in fleet.devices.values():
        device.silent_at = "consent"

    host.perform()

    assert [record.state for record in host.records] == ["abandoned", "abandoned"]
    assert not any(record.answers for record in host.records)
    assert "round 1 has 0 of the 5 answers it needs" in host.records[0].cause
    assert "is spent" in host.records[1].cause
    assert isinstance(host.outcome, RunFailed)
    assert "devices have sent their exact numbers" in host.outcome.cause
    assert all(len(device.sums.opened) == 1 for device in fleet.devices.values())


def test_devices_that_only_said_who_they_are_may_be_asked_again(tmp_path: Path) -> None:
    fleet, host = ask(tmp_path, asking(max_abandoned_rounds=2))
    for name in ("edge-0", "edge-1", "edge-2"):
        fleet.devices[name].sums.refuses["open"] = "this device's owner has statistics = false"

    host.perform()

    assert isinstance(host.outcome, RunFailed)
    assert host.outcome.cause.startswith(
        "2 attempts were abandoned, the last because round 2 has 0"
    )
    assert "statistics = false" in host.outcome.cause


def test_an_attempt_that_failed_before_any_vector_left_is_followed_by_another(
    tmp_path: Path,
) -> None:
    fleet, host = ask(tmp_path, asking(recruit_deadline_s=30))
    for device in fleet.devices.values():
        device.silent_at = "share"
        fleet.at(40, partial(setattr, device, "silent_at", ""))

    host.perform()

    assert [record.state for record in host.records] == ["abandoned", "committed"]
    assert host.outcome == RunFinished()
    pressures, _ = rows_of(fleet)
    assert by_kind(host.records[1])["count"].values == {"count": len(pressures)}


def test_noised_numbers_may_be_asked_for_again_after_a_failure(tmp_path: Path) -> None:
    fleet, host = ask(tmp_path, asking(noise="distributed"))
    for device in fleet.devices.values():
        device.silent_at = "reveal"
        fleet.at(40, partial(setattr, device, "silent_at", ""))

    host.perform()

    assert [record.state for record in host.records] == ["abandoned", "committed"]


def test_too_few_devices_end_the_run_with_the_number_that_is_missing(tmp_path: Path) -> None:
    plan = asking(max_abandoned_rounds=2, recruit_deadline_s=10)
    fleet, host = ask(tmp_path, plan, devices=4)

    host.perform()

    assert fleet.pushed == []
    assert [record.state for record in host.records] == ["abandoned"] * 2
    assert isinstance(host.outcome, RunFailed)
    assert "4 of the 5 devices it needs" in host.outcome.cause


def test_refusals_are_on_record_in_the_owners_words(tmp_path: Path) -> None:
    fleet, host = ask(tmp_path, asking())
    fleet.devices["edge-0"].sums.refuses["open"] = "this device's owner has statistics = false"

    host.perform()

    (record,) = host.records
    (part,) = (p for p in record.participations if p.device_id == "edge-0")
    assert part == Participation(
        device_id="edge-0", outcome="failed", cause=part.cause, bytes_down=part.bytes_down
    )
    assert "statistics = false" in part.cause
    pressures, _ = rows_of(fleet, "edge-0")
    assert by_kind(record)["count"].values == {"count": len(pressures)}


def test_what_the_tasks_data_cannot_answer_ends_the_run_before_anybody_is_asked(
    tmp_path: Path,
) -> None:
    fleet, host = ask(tmp_path, asking(Mean(feature="presure")))

    with pytest.raises(ConfigError, match="no feature 'presure'; known here: pressure"):
        host.perform()

    assert fleet.pushed == []


@pytest.mark.parametrize(("noise", "devices"), [("none", 7), ("distributed", 40)])
def test_devices_are_sent_the_model_whose_ranges_they_are_asked_for(
    tmp_path: Path, noise: str, devices: int
) -> None:
    model = b"a model"
    columns = tuple(ProbeColumn("relu", side, 0.0) for side in ("high", "low"))
    probe = Probe(model_sha256=hashlib.sha256(model).hexdigest(), columns=columns)
    exact = noise == "none"
    of: list[Statistic] = [
        Quantiles(feature=c.feature, at=(0.9,), levels=8) if exact else Mean(feature=c.feature)
        for c in columns
    ]
    plan = RunPlan(
        name="ranges",
        task=TASK,
        statistics=StatisticsQuestion(of=tuple(of), max_rows=5, probe=probe),
        privacy=PrivacyPlan(noise=noise, at_least=devices * 3 // 4 - 1),  # type: ignore[arg-type]
        cohort=CohortPlan(size=devices),
    )
    fleet, host = ask(tmp_path, plan, devices=devices)
    host.blobs.put(model)
    rng = np.random.default_rng(2)
    for device in fleet.devices.values():
        assert isinstance(device, Answering)
        extremes = rng.uniform(1, 4, (50, 2)).astype(np.float32)
        device.rows = rows_of_probe(probe, extremes)

    host.perform()

    assert host.outcome == RunFinished()
    (record,) = host.records
    everything = np.concatenate(
        [d.rows.inputs for d in fleet.devices.values() if isinstance(d, Answering)]
    )
    for column, answer in enumerate(record.answers):
        if exact:
            true = np.quantile(everything[:, column], 0.9)
            assert answer.values["q0.9"] == pytest.approx(true, abs=0.05)
        else:
            stated = answer.standard_error["mean"]
            assert 0 < stated < 1
            assert abs(answer.values["mean"] - everything[:, column].mean()) < 6 * stated


def test_a_model_that_is_gone_ends_the_run_before_anybody_is_asked(tmp_path: Path) -> None:
    probe = Probe(model_sha256="a" * 64, columns=(ProbeColumn("relu", "high", 0.0),))
    question = StatisticsQuestion(of=(Mean(feature="high relu"),), probe=probe)
    plan = msgspec.structs.replace(asking(noise="distributed"), statistics=question)
    _, host = ask(tmp_path, plan)
    with pytest.raises(NotFoundError):
        host.perform()


class Killed(BaseException):
    """The worker process is gone."""


@pytest.mark.parametrize("stage", ["mask", "consent", "reveal"])
def test_a_worker_killed_once_vectors_left_is_followed_by_one_that_finishes_the_sum(
    tmp_path: Path, stage: str
) -> None:
    fleet, host = ask(tmp_path, asking())

    def kill(report: object) -> None:
        if isinstance(report, RoundProgress) and report.stage == stage and report.replied:
            raise Killed

    host.on_report = kill
    with pytest.raises(Killed):
        host.perform()
    fleet.restart()
    fleet.join()
    again = SimulatedHost(fleet, host.plan, tmp_path / "blobs", scratch=tmp_path / "scratch")

    again.perform()

    assert again.outcome == RunFinished()
    (record,) = again.records
    replied = {p.device_id for p in record.participations if p.outcome == "replied"}
    pressures, _ = rows_of(fleet, *(fleet.devices.keys() - replied))
    assert len(replied) >= 6
    assert by_kind(record)["count"].values == {"count": len(pressures)}
    for device in fleet.devices.values():
        assert device.sums.contradictions == []
        assert len(device.sums.opened) == 1


def test_more_devices_than_one_sum_can_hold_are_added_up_from_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking_run, "MAX_ROSTER", 8)
    plan = asking(Count(), noise="distributed", size=14, max_rows=40)
    fleet, host = ask(tmp_path, plan, devices=14)

    host.perform()

    (record,) = host.records
    assert record.secrecy is not None
    assert [group.survivors for group in record.secrecy.groups] == [7, 7]
    (count,) = record.answers
    pressures, _ = rows_of(fleet)
    stated = count.standard_error["count"]
    assert abs(count.values["count"] - len(pressures)) < 6 * stated
    assert stated == pytest.approx(40 * np.sqrt(2 * 14 / 4), rel=0.3)


def test_a_lost_shard_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_run, "MAX_ROSTER", 8)
    fleet, host = ask(
        tmp_path, asking(Count(), noise="distributed", size=14, max_rows=40), devices=14
    )
    shards: list[frozenset[str]] = []

    def lose_one(report: object) -> None:
        if isinstance(report, RoundProgress) and report.stage == "share" and not shards:
            opened = [next(iter(d.sums.opened.values())) for d in fleet.devices.values()]
            names = [d.name for d in fleet.devices.values()]
            lost = frozenset(n for n, o in zip(names, opened, strict=True) if o.config.group == 0)
            shards.append(lost)
            for name in lost:
                fleet.devices[name].silent_at = "mask"

    host.on_report = lose_one

    host.perform()

    (record,) = host.records
    assert record.state == "committed"
    assert record.cause
    assert record.secrecy is not None
    assert [group.survivors for group in record.secrecy.groups] == [0, 7]
