"""Stories of runs that have devices judge files, told by a simulated fleet of real clients."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from cloud_coordinator.rounds.worker_messages import RoundRecord, RunFailed, RunFinished
from shared.errors import NotFoundError
from shared.judge_plan import JudgePlan
from shared.judging import (
    GAIN,
    MEAN,
    Candidate,
    CandidateFacts,
    JudgeQuestion,
    Score,
    Scorecard,
    base_of_files,
    judge_question,
)
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from tests.unit.cloud_coordinator.rounds.simulated_fleet import (
    TASK,
    SimulatedDevice,
    SimulatedFleet,
    SimulatedHost,
)
from tests.unit.cloud_coordinator.rounds.simulated_sums import encoded

FILES = {"current": b"what is served", "fp32": b"the new one", "int8-weights": b"and smaller"}


@dataclass
class Judging(SimulatedDevice):
    """Has scores, and puts them into the sum as a real device does."""

    scores: dict[str, float] = field(default_factory=dict)
    facts: bytes | None = None  # other than it should tell

    def answer(self, message: Message) -> RecordDict:
        if message.metadata.message_type != "query.judge":
            return super().answer(message)
        text = message.content.config_records["question"]["json"]
        sealed = message.content.config_records["sum"]["config"]
        assert isinstance(text, str)
        assert isinstance(sealed, bytes)
        question = msgspec.json.decode(text, type=JudgeQuestion)
        files = list(message.content.array_records["files"].values())
        digests = [hashlib.sha256(bytes(file.numpy())).hexdigest() for file in files]
        assert digests == [candidate.sha256 for candidate in question.candidates]
        scores = {name: Score(value, np.zeros(0)) for name, value in self.scores.items()}
        vector = Scorecard(question).contribution(scores, 50, np.zeros(0))
        answer = self.sums.advertise(sealed, vector, {})
        opened = self.sums.opened[answer.session].config
        assert opened.question_digest == judge_question(text.encode())
        assert opened.base_digest == base_of_files(question.candidates)
        told = tuple(CandidateFacts(name=c.name, p95_ms=2.0) for c in question.candidates)
        facts = msgspec.json.encode(told) if self.facts is None else self.facts
        return RecordDict(
            {
                "sum": ConfigRecord({"answer": encoded(answer)}),
                "facts": ConfigRecord({"json": facts}),
            }
        )

    def is_silent_at(self, stage: str) -> bool:
        return stage != "judge" and super().is_silent_at(stage)


def plan_of(noise: str, devices: int) -> RunPlan:
    judge = JudgePlan(noise=noise)  # type: ignore[arg-type]
    parent = RunPlan(
        name="pumps",
        task=TASK,
        judge=judge,
        privacy=PrivacyPlan(at_least=devices * 3 // 4 - 1),
        cohort=CohortPlan(size=devices, max_abandoned_rounds=2, recruit_deadline_s=10),
    )
    candidates = tuple(
        Candidate(name=name, sha256=hashlib.sha256(content).hexdigest())
        for name, content in FILES.items()
    )
    return parent.judging(
        JudgeQuestion(
            candidates=candidates,
            reference="current",
            max_rows=50,
            reach=judge.reach,
            bins=judge.bins,
        )
    )


def judging(
    folder: Path, *, noise: str = "none", devices: int = 7
) -> tuple[SimulatedFleet, SimulatedHost]:
    """Device i scores 0.8 + i/100 with what is served, a point more with the new one."""
    fleet = SimulatedFleet(devices)
    for index, (name, plain) in enumerate(list(fleet.devices.items())):
        score = 0.8 + index / 1000
        scores = {"current": score, "fp32": score + 0.01, "int8-weights": score - 0.02}
        device = Judging(name, plain.node_id, plain.target, scores=scores)
        device.sums = plain.sums
        fleet.devices[name] = device
    fleet.join()
    host = SimulatedHost(
        fleet, plan_of(noise, devices), folder / "blobs", scratch=folder / "scratch"
    )
    for content in FILES.values():
        host.blobs.put(content)
    return fleet, host


def test_an_exact_judgement_is_that_of_all_devices_together(tmp_path: Path) -> None:
    _, host = judging(tmp_path)
    host.perform()

    assert host.outcome == RunFinished()
    (record,) = host.records
    assert msgspec.json.decode(msgspec.json.encode(record), type=RoundRecord) == record
    current, fp32, small = record.answers
    assert current.values[MEAN] == pytest.approx(0.803, abs=1e-6)
    assert fp32.values[GAIN] == pytest.approx(0.01, abs=1e-6)
    assert small.values[GAIN] == pytest.approx(-0.02, abs=1e-6)
    assert record.parameters_sha256 is None
    for part in record.participations:
        assert [facts.name for facts in part.facts] == list(FILES)


def test_a_noised_judgement_is_near_and_says_how_near(tmp_path: Path) -> None:
    _, host = judging(tmp_path, noise="distributed", devices=40)
    host.perform()

    (record,) = host.records
    _, fp32, small = record.answers
    for answer, gain in ((fp32, 0.01), (small, -0.02)):
        error = answer.standard_error[GAIN]
        assert 0 < error < 0.02
        assert abs(answer.values[GAIN] - gain) < 6 * error
    assert record.secrecy is not None
    assert record.secrecy.epsilon is not None


def test_a_device_that_drops_is_in_neither_scores_nor_count(tmp_path: Path) -> None:
    fleet, host = judging(tmp_path)
    fleet.devices["edge-6"].silent_at = "mask"
    host.perform()

    (record,) = host.records
    assert record.answers[0].values[MEAN] == pytest.approx(0.8025, abs=1e-6)
    replied = {p.device_id for p in record.participations if p.outcome == "replied"}
    assert replied == set(fleet.devices) - {"edge-6"}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (b"{}", "the reply's facts cannot be read"),
        (b'[{"name":"fp32","p95_ms":-1}]', "the reply's facts cannot be read"),
        (b"[" + b" " * 70_000 + b"]", "the reply's facts are none, or too many"),
        (
            msgspec.json.encode([CandidateFacts(name=f"file-{n}") for n in range(17)]),
            "the reply has facts of 17 files",
        ),
    ],
)
def test_a_device_that_tells_nonsense_of_its_machine_is_left_out(
    tmp_path: Path, facts: bytes, words: str
) -> None:
    fleet, host = judging(tmp_path)
    liar = fleet.devices["edge-0"]
    assert isinstance(liar, Judging)
    liar.facts = facts
    host.perform()

    (record,) = host.records
    assert record.state == "committed"
    (part,) = (p for p in record.participations if p.device_id == "edge-0")
    assert part.outcome == "failed"
    assert words in part.cause


def test_a_file_that_is_gone_ends_the_run_before_anybody_is_asked(tmp_path: Path) -> None:
    fleet, host = judging(tmp_path)
    host.blobs.path_of(hashlib.sha256(FILES["fp32"]).hexdigest()).unlink()
    with pytest.raises(NotFoundError):
        host.perform()
    assert fleet.pushed == []


def test_owners_who_refuse_are_heard_and_too_few_others_judge_nothing(tmp_path: Path) -> None:
    fleet, host = judging(tmp_path)
    for name in ("edge-0", "edge-1", "edge-2"):
        fleet.devices[name].sums.refuses["open"] = "this device's owner has exact_sums = false"
    host.perform()

    assert isinstance(host.outcome, RunFailed)
    assert "exact_sums = false" in host.outcome.cause
    assert not any(record.answers for record in host.records)
