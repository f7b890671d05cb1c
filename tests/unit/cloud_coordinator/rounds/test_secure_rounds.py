"""Stories of rounds by secure sums, told by a simulated fleet of real clients in simulated time."""

import hashlib
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.app import ArrayRecord, RecordDict

from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    Participation,
    ResumePoint,
    RoundClosed,
    RoundProgress,
    RoundRecord,
    RunFailed,
    RunFinished,
)
from shared.parameters import Vector
from shared.privacy_plan import AggregationPlan, PrivacyPlan
from shared.run_plan import RunPlan
from shared.secure_sum.config import digest_of, encode_config
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import SignedAnswer, sign_answer
from shared.secure_sum.server import SumServer
from tests.unit.cloud_coordinator.rounds.simulated_fleet import (
    SimulatedFleet,
    SimulatedHost,
    plan_of,
)
from tests.unit.cloud_coordinator.rounds.simulated_sums import SumPart


def resume_point(record: RoundRecord) -> ResumePoint:
    assert record.parameters_sha256
    return ResumePoint(round_number=record.round_number, parameters_sha256=record.parameters_sha256)


def secure_plan(*, at_least: int = 4, size: int = 7, **given: Any) -> RunPlan:
    privacy = PrivacyPlan(
        **{"at_least": at_least, "max_weight": 30, "clip_norm": 4.0, **given.pop("privacy", {})}
    )
    return plan_of(privacy=privacy, size=size, **given)


@pytest.mark.parametrize("announces", [True, False])
def test_a_secure_round_commits_the_mean_weighted_by_examples(
    tmp_path: Path, *, announces: bool
) -> None:
    fleet = SimulatedFleet(7)
    fleet.join() if announces else None
    fleet.devices["edge-0"].examples = 30
    plan = secure_plan(rounds=1, evaluate=True)
    host = SimulatedHost(fleet, plan, tmp_path, announces=announces, scratch=tmp_path / "scratch")

    host.perform()

    assert host.outcome == RunFinished()
    start = host.parameters(0)
    targets = [device.target for device in fleet.devices.values()]
    updates = [(start + target) / 2 for target in targets]
    expected = np.average(updates, axis=0, weights=[30, *[10] * 6])
    np.testing.assert_allclose(host.parameters(), expected, atol=0.01)
    record = host.records[1]
    assert record.training_sums == {"examples": 90, "seen": 90, "loss_sum": 45}
    assert record.metrics


def whole_mean(fleet: SimulatedFleet, host: SimulatedHost, *names: str) -> Vector:
    """Return what averaging the updates of these devices gives; of all where none is named."""
    start = host.parameters(0)
    updates = [(start + fleet.devices[name].target) / 2 for name in names or fleet.devices]
    mean: Vector = np.mean(updates, axis=0)
    return mean


def a_run(
    tmp_path: Path, *, devices: int = 7, announces: bool = True, **given: Any
) -> tuple[SimulatedFleet, SimulatedHost]:
    fleet = SimulatedFleet(devices)
    if announces:
        fleet.join()
    plan = secure_plan(**{"rounds": 1, "size": devices, **given})
    host = SimulatedHost(
        fleet, plan, tmp_path / "blobs", announces=announces, scratch=tmp_path / "scratch"
    )
    return fleet, host


def part_of(record: RoundRecord, name: str) -> Participation:
    return next(part for part in record.participations if part.device_id == name)


def others(fleet: SimulatedFleet, *names: str) -> list[str]:
    return [name for name in fleet.devices if name not in names]


@pytest.mark.parametrize("announces", [True, False])
@pytest.mark.parametrize("stage", ["train", "share", "mask", "consent", "reveal"])
def test_two_of_seven_fall_silent_at_any_stage_and_the_sum_is_that_of_the_vectors_that_came(
    tmp_path: Path, stage: str, *, announces: bool
) -> None:
    fleet, host = a_run(tmp_path, announces=announces, round_deadline_s=60)
    for name in ("edge-1", "edge-4"):
        fleet.devices[name].silent_at = stage

    host.perform()

    record = host.records[1]
    assert record.state == "committed"
    assert record.secrecy is not None
    gone = ("edge-1", "edge-4") if stage in {"train", "share", "mask"} else ()
    expected = whole_mean(fleet, host, *others(fleet, *gone))
    np.testing.assert_allclose(host.parameters(), expected, atol=2e-3)
    assert record.secrecy.groups[0].survivors == 7 - len(gone)
    assert sum(part.outcome == "replied" for part in record.participations) == 7 - len(gone)
    if announces and stage in {"share", "mask"}:
        assert part_of(record, "edge-1").outcome == "late"
        assert ("masked vector" if stage == "mask" else "keys") in part_of(record, "edge-1").cause
    if stage != "train":  # nobody waited for them until the deadline
        assert fleet.now_s < 35
    assert fleet.pulled_again == []


@pytest.mark.parametrize("stage", ["share", "mask", "consent", "reveal"])
def test_a_device_that_refuses_a_stage_says_why_and_the_others_go_on(
    tmp_path: Path, stage: str
) -> None:
    fleet, host = a_run(tmp_path)
    fleet.devices["edge-2"].sums.refuses[stage] = "its owner has had enough"

    host.perform()

    record = host.records[1]
    assert record.state == "committed"
    assert "refused: its owner has had enough" in part_of(record, "edge-2").cause
    outcome = "failed" if stage in {"share", "mask"} else "replied"
    assert part_of(record, "edge-2").outcome == outcome


def test_a_device_that_leaves_before_it_dealt_shares_is_dropped_at_once(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path)

    def leave(report: object) -> None:
        match report:
            case AskDevices(stage="share"):
                fleet.at(fleet.now_s, partial(fleet.leave, "edge-3"))

    host.on_report = leave
    host.perform()

    assert part_of(host.records[1], "edge-3").outcome == "dropped"
    assert fleet.now_s < 3


def test_nobody_waits_for_a_device_that_left_after_its_vector_was_sent(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path)

    def leave(report: object) -> None:
        match report:
            case AskDevices(stage="consent"):
                fleet.at(fleet.now_s, partial(fleet.leave, "edge-3"))

    host.on_report = leave
    host.perform()

    assert part_of(host.records[1], "edge-3").outcome == "replied"
    assert host.records[1].secrecy is not None
    assert host.records[1].secrecy.groups[0].survivors == 7
    assert fleet.now_s < 2


def test_a_question_that_got_lost_is_asked_again_in_the_same_words(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path)
    for device in list(fleet.devices.values())[:3]:
        device.loses = {"share", "consent", "reveal"}

    host.perform()

    record = host.records[1]
    assert record.secrecy is not None
    assert record.secrecy.groups[0].survivors == 7
    assert not any(device.sums.contradictions for device in fleet.devices.values())
    for stage in ("share", "consent", "reveal"):
        assert len({ask.question for ask in fleet.asked if ask.stage == stage}) == 1


def test_too_few_at_a_stage_abandon_the_round_and_the_cause_names_it(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path, recruit_deadline_s=20)
    for name in ("edge-0", "edge-1", "edge-2"):
        fleet.devices[name].silent_at = "share"

    host.perform()

    record = host.records[1]
    assert (record.state, record.parameters_sha256) == ("abandoned", None)
    assert "4 of the 5 devices' shares it needs" in record.cause


def test_after_the_vectors_left_an_abandoned_round_is_not_repeated_for_the_same_model(
    tmp_path: Path,
) -> None:
    fleet, host = a_run(tmp_path, rounds=5, recruit_deadline_s=20)

    def forget(report: object) -> None:
        match report:
            case RoundProgress(round_number=1, stage="consent"):
                for device in fleet.devices.values():
                    device.silent_at = "consent"

    host.on_report = forget
    host.perform()

    first, second, third = host.records[1:]
    assert "signatures" in first.cause
    # Three refusals of seven show that there will be no sum; nobody waits for the others'.
    assert sum("is spent" in part.cause for part in second.participations) == 3
    assert third.state == "abandoned"  # nobody is left to be asked
    assert isinstance(host.outcome, RunFailed)
    assert "have sent their update for this model" in host.outcome.cause
    asked = [m for m in fleet.pushed if m.metadata.message_type == "train"]
    assert len(asked) == 14


def test_over_selection_closes_the_roster_at_the_size_that_is_wanted(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path, devices=9, size=7, over_selection=1.2)
    fleet.devices["edge-5"].train_s = fleet.devices["edge-8"].train_s = 20

    host.perform()

    record = host.records[1]
    assert record.secrecy is not None
    assert record.secrecy.groups[0].roster == 7
    slow = {part_of(record, name).outcome for name in ("edge-5", "edge-8")}
    assert slow == {"not-needed"}


@pytest.mark.parametrize("lane_bits", [16, 32])
def test_either_width_of_lanes_gives_the_mean(tmp_path: Path, lane_bits: int) -> None:
    fleet, host = a_run(tmp_path, privacy={"lane_bits": lane_bits, "weights": "uniform"})

    host.perform()

    precise = 1e-3 if lane_bits == 16 else 1e-6
    np.testing.assert_allclose(host.parameters(), whole_mean(fleet, host), atol=precise)


def test_a_vector_that_comes_too_late_is_not_read(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path, rounds=2)
    fleet.devices["edge-6"].stage_s = 6.0

    def quick_shares(report: object) -> None:
        match report:
            case AskDevices(stage="share"):
                fleet.devices["edge-6"].stage_s = 0.01
            case RoundProgress(stage="mask", replied=0):
                fleet.devices["edge-6"].stage_s = 6.0

    host.on_report = quick_shares
    host.perform()

    first = host.records[1]
    assert part_of(first, "edge-6").outcome == "late"
    expected = whole_mean(fleet, host, *others(fleet, "edge-6"))
    np.testing.assert_allclose(host.parameters(1), expected, atol=2e-3)
    assert fleet.pulled_again == []


def test_a_device_that_signs_nonsense_is_blamed_and_asked_no_more(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path, rounds=3)
    liar = fleet.devices["edge-1"].sums
    liar.lies["share"] = lambda answer: resigned(liar, host, fleet, answer, b"nonsense")

    host.perform()

    first, second = host.records[1:3]
    assert first.state == second.state == "committed"
    assert first.secrecy is not None
    assert list(first.secrecy.blamed) == ["edge-1"]
    assert "edge-1" not in {part.device_id for part in second.participations}


def resigned(
    part: SumPart, host: SimulatedHost, fleet: SimulatedFleet, answer: SignedAnswer, body: bytes
) -> SignedAnswer:
    """Sign another body, as only the device itself can."""
    del host
    opened = part.opened[answer.session]
    roster = next(ask.question for ask in fleet.asked if ask.session == answer.session)
    return sign_answer(
        part.identity,
        session=answer.session,
        stage=answer.stage,
        config_digest=digest_of(encode_config(opened.config)),
        roster_digest=hashlib.sha256(roster).digest(),
        device_id=part.name,
        body=body,
    )


def test_who_is_not_in_the_membership_list_is_not_asked(tmp_path: Path) -> None:
    fleet = SimulatedFleet(8)
    del fleet.members["edge-0"]
    fleet.join()
    host = SimulatedHost(fleet, secure_plan(rounds=1), tmp_path)

    host.perform()

    assert "edge-0" not in {part.device_id for part in host.records[1].participations}
    assert host.records[1].state == "committed"


def test_secure_rounds_keep_no_number_of_a_single_device(tmp_path: Path) -> None:
    _, host = a_run(tmp_path, evaluate=True)

    host.perform()

    assert all(part.num_examples == 0 for r in host.records for part in r.participations)
    assert host.records[1].metrics["loss"] < host.records[0].metrics["loss"]


@pytest.mark.parametrize(
    ("name", "array", "cause"),
    [
        ("lanes", np.zeros(4, np.float32), "in place of a uint16 or uint32 vector"),
        ("lanes", np.zeros((2, 2), np.uint16), "in place of a uint16 or uint32 vector"),
        ("lanes", np.zeros(5, np.uint16), "another vector"),
        ("exact", np.zeros(3, np.int64), "in place of a uint64 vector"),
        ("exact", None, "only one of the two arrays"),
    ],
)
def test_a_masked_vector_that_is_none_costs_its_device_the_round(
    tmp_path: Path, name: str, array: Any, cause: str
) -> None:
    fleet, host = a_run(tmp_path)

    def alter(content: RecordDict) -> None:
        if name in content:
            del content[name]
            if array is not None:
                content[name] = ArrayRecord([array])

    fleet.devices["edge-2"].alter = alter
    host.perform()

    record = host.records[1]
    assert record.state == "committed"
    assert part_of(record, "edge-2").outcome == "failed"
    assert cause in part_of(record, "edge-2").cause
    expected = whole_mean(fleet, host, *others(fleet, "edge-2"))
    np.testing.assert_allclose(host.parameters(), expected, atol=2e-3)


def test_each_masked_vector_is_dropped_before_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = a_run(tmp_path)
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []
    take = SumServer.take_masked

    def watched(server: SumServer, answer: SignedAnswer, lanes: Lanes) -> bool:
        seen.append(weakref.ref(lanes.main))
        alive.append(sum(ref() is not None for ref in seen))
        return take(server, answer, lanes)

    monkeypatch.setattr(SumServer, "take_masked", watched)
    host.perform()

    assert alive == [1] * 7


# --- crashes -----------------------------------------------------------------------------------


class Killed(BaseException):
    """The worker's process is gone."""


def kill_when(is_it: Callable[[object], bool]) -> Callable[[object], None]:
    def look(report: object) -> None:
        if is_it(report):
            raise Killed

    return look


def at(stage: str, replied: int) -> Callable[[object], bool]:
    """Say whether round 1 is told to be at this point of training or, later, of measuring."""
    return lambda report: (
        isinstance(report, RoundProgress)
        and (report.round_number, report.stage, report.replied) == (1, stage, replied)
    )


MOMENTS = {
    "after the second vector": at("mask", 2),
    "before anybody is asked to sign": at("consent", 0),
    "when three have signed": at("consent", 3),
    "before shares are asked for": at("reveal", 0),
    "when three have revealed": at("reveal", 3),
    "while the result is measured": at("evaluate", 1),
    "before the round is saved": lambda r: (
        isinstance(r, RoundClosed) and r.record.round_number == 1
    ),
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_a_worker_killed_once_vectors_left_is_followed_by_one_that_finishes_the_same_sum(
    tmp_path: Path, moment: str
) -> None:
    fleet, host = a_run(tmp_path, evaluate=True)
    host.on_report = kill_when(MOMENTS[moment])
    with pytest.raises(Killed):
        host.perform()

    fleet.restart()
    fleet.join(*others(fleet, "edge-5"))  # one device does not come back
    again = SimulatedHost(
        fleet,
        host.plan,
        tmp_path / "blobs",
        resume=resume_point(host.records[0]),
        scratch=tmp_path / "scratch",
    )
    again.perform()

    assert again.outcome == RunFinished()
    [record] = [record for record in again.records if record.round_number == 1]
    assert record.state == "committed"
    # Where one device's vector was on its way to the worker that died, it is not in the sum.
    gone = others(fleet, *(p.device_id for p in record.participations if p.outcome == "replied"))
    assert gone in ([], ["edge-5"])
    expected = whole_mean(fleet, host, *others(fleet, *gone))
    np.testing.assert_allclose(again.parameters(1), expected, atol=2e-3)
    for device in fleet.devices.values():
        assert device.sums.contradictions == []
        trained = [o for o in device.sums.opened.values() if o.config.purpose == "train"]
        assert sum(o.lanes is not None for o in trained) <= 1
    assert not list((tmp_path / "scratch").glob("*.sum"))


def test_a_worker_killed_before_any_vector_left_repeats_the_round(tmp_path: Path) -> None:
    fleet, host = a_run(tmp_path)
    host.on_report = kill_when(lambda r: isinstance(r, RoundProgress) and r.stage == "share")
    with pytest.raises(Killed):
        host.perform()

    fleet.restart()
    fleet.join()
    again = SimulatedHost(
        fleet,
        host.plan,
        tmp_path / "blobs",
        resume=resume_point(host.records[0]),
        scratch=tmp_path / "scratch",
    )
    again.perform()

    assert again.records[0].state == "committed"


def test_a_sum_that_cannot_be_resumed_ends_in_an_abandoned_round_and_is_not_run_again(
    tmp_path: Path,
) -> None:
    fleet, host = a_run(tmp_path, rounds=4, recruit_deadline_s=20)
    host.on_report = kill_when(MOMENTS["before shares are asked for"])
    with pytest.raises(Killed):
        host.perform()

    fleet.restart()
    for device in fleet.devices.values():
        device.sums.opened.clear()  # their trainers were killed too
    fleet.join()
    again = SimulatedHost(
        fleet,
        host.plan,
        tmp_path / "blobs",
        resume=resume_point(host.records[0]),
        scratch=tmp_path / "scratch",
    )
    again.perform()

    assert [record.state for record in again.records] == ["abandoned"] * 3
    assert isinstance(again.outcome, RunFailed)
    assert all(
        opened.lanes is None
        for device in fleet.devices.values()
        for opened in device.sums.opened.values()
    )


# --- groups ------------------------------------------------------------------------------------


def groups_plan(**given: Any) -> RunPlan:
    aggregation = AggregationPlan(
        group_size=5, combine="median", poisoned_fraction=0.05, **given.pop("aggregation", {})
    )
    privacy = {"weights": "uniform", "drop_fraction": 0.0}
    return secure_plan(**{"size": 25, "aggregation": aggregation, "privacy": privacy, **given})


def test_groups_stay_the_same_for_the_whole_run_and_over_crashes(tmp_path: Path) -> None:
    fleet = SimulatedFleet(25)
    fleet.join()
    plan = groups_plan(rounds=2)
    host = SimulatedHost(fleet, plan, tmp_path / "blobs", scratch=tmp_path / "scratch")
    host.perform()
    fleet.restart()
    fleet.join()
    again = SimulatedHost(
        fleet,
        msgspec.structs.replace(plan, rounds=3),
        tmp_path / "blobs",
        resume=resume_point(host.records[-1]),
        scratch=tmp_path / "scratch",
    )
    again.perform()

    for device in fleet.devices.values():
        groups = {o.config.group for o in device.sums.opened.values()}
        assert len(groups) == 1
    sessions = {
        (o.config.round_number, o.config.group)
        for d in fleet.devices.values()
        for o in d.sums.opened.values()
    }
    assert len(sessions) == 3 * 5


def test_the_median_over_groups_outvotes_a_poisoned_one(tmp_path: Path) -> None:
    fleet = SimulatedFleet(25)
    for device in fleet.devices.values():
        device.target = np.ones(4, np.float32)
    fleet.join()

    def poison(vector: Any, exact: dict[str, float]) -> None:
        del exact
        vector += 3.0

    fleet.devices["edge-3"].sums.contributes = poison
    host = SimulatedHost(fleet, groups_plan(rounds=1), tmp_path)
    host.perform()

    expected = (host.parameters(0) + 1) / 2
    np.testing.assert_allclose(host.parameters(1), expected, atol=5e-3)


def test_a_group_whose_sum_no_honest_devices_could_have_made_is_left_out_by_name(
    tmp_path: Path,
) -> None:
    fleet = SimulatedFleet(25)
    fleet.join()

    def overflow(lanes: Lanes) -> None:
        lanes.main[:] = 30_000

    poisoned = fleet.devices["edge-3"].sums
    poisoned.alters = overflow
    host = SimulatedHost(fleet, groups_plan(rounds=1), tmp_path)
    host.perform()

    record = host.records[1]
    assert record.state == "committed"
    assert record.secrecy is not None
    group = next(iter(poisoned.opened.values())).config.group
    causes = {g.group: g.cause for g in record.secrecy.groups}
    assert causes.pop(group)
    assert set(causes.values()) == {""}


def test_progress_names_each_stage_and_until_when_it_lasts(tmp_path: Path) -> None:
    _, host = a_run(tmp_path)

    host.perform()

    begun = [r for r in host.reports if isinstance(r, RoundProgress) and r.until]
    assert [r.stage for r in begun] == ["share", "mask", "consent", "reveal"]
    assert [r.cohort for r in begun[:3]] == [7, 7, 7]
    assert host.records[1].secrecy is not None
    assert set(host.records[1].secrecy.stage_seconds) == {
        "train", "share", "mask", "consent", "reveal",
    }  # fmt: skip


# --- noise -------------------------------------------------------------------------------------


def test_distributed_noise_is_in_the_mean_and_its_epsilon_on_record(tmp_path: Path) -> None:
    noise = {
        "noise": "distributed",
        "noise_multiplier": 0.5,
        "weights": "uniform",
        "lane_bits": 32,
    }
    fleet, host = a_run(tmp_path, evaluate=False, privacy=noise)

    host.perform()

    record = host.records[1]
    assert record.secrecy is not None
    assert record.secrecy.noise == "distributed"
    assert record.secrecy.epsilon is not None
    assert 1 < record.secrecy.epsilon < 100
    assert record.training_sums == {}  # exact sums beside noised ones would void the noise
    error = host.parameters() - whole_mean(fleet, host)
    assert 0.01 < np.abs(error).max() < 3  # sigma is 0.5 * 4 over a few devices


def test_central_noise_and_a_moving_clip_norm_are_kept_with_the_model(tmp_path: Path) -> None:
    noise = {
        "noise": "central",
        "noise_multiplier": 0.1,
        "weights": "uniform",
        "adaptive_clipping": True,
    }
    fleet, host = a_run(tmp_path, rounds=2, privacy=noise)

    host.perform()

    first, second = host.records[1:]
    assert first.secrecy is not None
    assert second.secrecy is not None
    assert first.secrecy.clip_norm == 4.0
    # All updates are far below it, and half of them should be above.
    assert second.secrecy.clip_norm is not None
    assert 3.0 < second.secrecy.clip_norm < 4.0
    assert first.optimizer_sha256
    assert "unclipped" not in first.training_sums
    assert np.abs(host.parameters(1) - whole_mean(fleet, host)).max() > 1e-3
