"""Runs that train a smaller network of their task, with a teacher and without."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud_coordinator.rounds.worker_messages import RunFinished
from shared.compression_plan import CompressionPlan, DistilPlan
from shared.errors import ConfigError, UntrustedModelError
from shared.parameters import save_vectors
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import RunPlan, plan_from
from shared.secure_sum.questions import base_digest_of, evaluation_question, training_question
from shared.student_plan import Distillation, StudentPlan, encode_student
from tests.unit.cloud_coordinator.rounds.simulated_fleet import (
    PLAIN,
    SimulatedFleet,
    SimulatedHost,
    plan_of,
)

TEACHER = np.arange(4, dtype=np.float32)
SECURE = PrivacyPlan(at_least=4, max_weight=30, clip_norm=4.0)


def taught(sha256: str, teacher: str = "") -> StudentPlan:
    return StudentPlan(
        network="linear",
        distil=Distillation(
            teacher=teacher or base_digest_of(TEACHER),
            parameters_sha256=sha256,
            temperature=4.0,
            weight=0.8,
        ),
    )


def studying(
    folder: Path, privacy: PrivacyPlan, *, teacher: str = ""
) -> tuple[SimulatedFleet, SimulatedHost]:
    fleet = SimulatedFleet(7)
    fleet.join()
    parent = plan_of(privacy=privacy, size=7, evaluate=True)
    host = SimulatedHost(fleet, parent, folder, scratch=folder / "scratch")
    sha256 = host.blobs.put(save_vectors({"parameters": TEACHER}))
    host.plan = parent.studying(taught(sha256, teacher), suffix="distil", rounds=1)
    return fleet, host


@pytest.mark.parametrize("privacy", [SECURE, PLAIN])
def test_devices_get_the_teacher_with_each_train_message(
    tmp_path: Path, privacy: PrivacyPlan
) -> None:
    fleet, host = studying(tmp_path, privacy)
    host.perform()

    assert host.outcome == RunFinished()
    assert host.plan.student is not None
    for message in fleet.pushed:
        kind, content = message.metadata.message_type, message.content
        if kind == "train":
            (teacher,) = content.array_records["teacher"].to_numpy_ndarrays()
            np.testing.assert_array_equal(teacher, TEACHER)
            wanted = host.plan.student
        elif kind == "evaluate":
            assert "teacher" not in content.array_records
            wanted = StudentPlan(network="linear")
        else:
            continue
        text = content.config_records["student"]["json"]
        assert msgspec.json.decode(str(text), type=StudentPlan) == wanted


def test_students_are_measured_by_a_score_that_every_task_has(tmp_path: Path) -> None:
    _, host = studying(tmp_path, SECURE)
    host.perform()
    for record in host.records:
        assert record.metrics["score"] == pytest.approx(record.metrics["accuracy"])

    parent = SimulatedHost(
        SimulatedFleet(7), plan_of(privacy=SECURE, size=7, evaluate=True), tmp_path
    )
    parent.world.join()
    parent.perform()
    assert all("score" not in record.metrics for record in parent.records)


def test_what_is_signed_names_student_and_teacher(tmp_path: Path) -> None:
    fleet, host = studying(tmp_path, SECURE)
    host.perform()

    student = host.plan.student
    plan = msgspec.json.encode(host.plan.training)
    digests = {
        opened.config.question_digest for opened in fleet.devices["edge-0"].sums.opened.values()
    }
    measured = StudentPlan(network="linear")
    assert digests == {
        training_question(plan, encode_student(student)),
        evaluation_question(encode_student(measured)),
    }


def test_a_teacher_other_than_the_plan_names_ends_the_run_before_anybody_is_asked(
    tmp_path: Path,
) -> None:
    fleet, host = studying(tmp_path, SECURE, teacher="f" * 64)
    with pytest.raises(UntrustedModelError, match="does not hold the teacher"):
        host.perform()
    assert fleet.pushed == []


def test_a_student_that_does_not_exist_is_found_before_anybody_trains(tmp_path: Path) -> None:
    fleet = SimulatedFleet(7)
    fleet.join()
    compression = CompressionPlan(int8=False, distil=DistilPlan(student="giant"))
    plan = msgspec.structs.replace(plan_of(privacy=SECURE, size=7), compression=compression)
    host = SimulatedHost(fleet, plan, tmp_path, scratch=tmp_path / "scratch")
    with pytest.raises(ConfigError, match="giant"):
        host.perform()
    assert fleet.pushed == []


def test_the_run_of_a_student_is_like_its_teachers_and_makes_no_version() -> None:
    parent = plan_of(privacy=SECURE, size=7, seed=3)
    plan = parent.studying(StudentPlan(network="linear"), suffix="scratch", rounds=9)
    assert (plan.name, plan.rounds, plan.export, plan.deploy) == ("pumps-scratch", 9, False, False)
    assert (plan.seed, plan.cohort, plan.privacy) == (parent.seed, parent.cohort, parent.privacy)


@pytest.mark.parametrize("key", ["student", "judgement"])
def test_nobody_writes_by_hand_what_another_run_starts(key: str) -> None:
    document = {**msgspec.to_builtins(plan_of(privacy=SECURE, size=7)), key: {}}
    with pytest.raises(ConfigError, match=f"{key} is of runs that another one starts"):
        plan_from(document, source="the plan")


def test_a_plan_without_export_trains_and_makes_no_version() -> None:
    document = {**msgspec.to_builtins(plan_of(privacy=SECURE, size=7)), "export": False}
    for key in ("student", "judgement"):
        del document[key]
    assert isinstance(plan_from(document, source="the plan"), RunPlan)
