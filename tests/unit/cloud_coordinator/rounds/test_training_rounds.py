"""Stories of rounds, told by a simulated fleet in simulated time."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from cloud_coordinator.rounds.worker_messages import (
    NudgeDevices,
    ResumePoint,
    RoundProgress,
    RoundRecord,
    RoundStarted,
    RunFailed,
    RunFinished,
    StopRun,
    WaitingForDevices,
)
from shared.errors import ConfigError, UnavailableError
from shared.tasks.spec import TaskSpec
from tests.unit.cloud_coordinator.rounds.simulated_fleet import (
    SIZE,
    SimulatedFleet,
    SimulatedHost,
    plan_of,
)

HEADER_THAT_NEVER_ENDS = b"\x93NUMPY\x01\x00\x0b\x00{'descr': (" + bytes(4 * SIZE)


def outcomes(record: RoundRecord) -> dict[str, str]:
    return {part.device_id: part.outcome for part in record.participations}


def causes(record: RoundRecord) -> dict[str, str]:
    return {part.device_id: part.cause for part in record.participations if part.cause}


def resume_point(record: RoundRecord) -> ResumePoint:
    assert record.parameters_sha256
    return ResumePoint(round_number=record.round_number, parameters_sha256=record.parameters_sha256)


def test_a_run_commits_the_initial_model_and_every_round_then_finishes(tmp_path: Path) -> None:
    fleet = SimulatedFleet(3)
    fleet.join()
    host = SimulatedHost(fleet, plan_of(rounds=3, size=3, quorum=2), tmp_path)

    host.perform()

    assert [(r.round_number, r.state) for r in host.records] == [
        (number, "committed") for number in range(4)
    ]
    assert host.outcome == RunFinished()
    assert fleet.pulled_again == []


def test_a_round_commits_the_mean_of_the_updates_weighted_by_examples(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    fleet.devices["edge-0"].examples = 30
    host = SimulatedHost(fleet, plan_of(rounds=1, size=2, quorum=2), tmp_path)

    host.perform()

    start = host.parameters(0)
    updates = [(start + device.target) / 2 for device in fleet.devices.values()]
    np.testing.assert_allclose(host.parameters(), (3 * updates[0] + updates[1]) / 4, rtol=1e-6)
    assert host.records[1].training_sums == {"examples": 40.0, "loss_sum": 20.0}


def test_three_of_ten_devices_drop_and_the_round_commits_with_seven(tmp_path: Path) -> None:
    fleet = SimulatedFleet(10)
    fleet.join()
    for name in ("edge-1", "edge-4", "edge-7"):
        fleet.at(0.5, partial(fleet.leave, name, "its power went"))
    host = SimulatedHost(fleet, plan_of(rounds=1, size=10, quorum=5), tmp_path)

    host.perform()

    record = host.records[1]
    assert record.state == "committed"
    assert causes(record) == dict.fromkeys(("edge-1", "edge-4", "edge-7"), "its power went")
    assert sorted(outcomes(record).values()) == ["dropped"] * 3 + ["replied"] * 7
    assert fleet.now_s < 5  # nobody waited for those who are gone


def test_a_dead_device_is_late_at_the_deadline_and_the_round_commits(tmp_path: Path) -> None:
    fleet = SimulatedFleet(3)
    fleet.join()
    fleet.devices["edge-2"].dead = True
    host = SimulatedHost(fleet, plan_of(rounds=1, size=3, quorum=2, round_deadline_s=30), tmp_path)

    host.perform()

    record = host.records[1]
    assert record.state == "committed"
    assert causes(record) == {"edge-2": "no reply within 30 s"}
    assert outcomes(record)["edge-2"] == "late"
    assert (record.closed_at - record.started_at).total_seconds() == pytest.approx(30)


def test_quorum_lost_at_the_deadline_abandons_the_round_and_keeps_the_model(
    tmp_path: Path,
) -> None:
    fleet = SimulatedFleet(3)
    fleet.join()
    for name in ("edge-0", "edge-1"):
        fleet.devices[name].dead = True
        fleet.at(59, partial(setattr, fleet.devices[name], "dead", False))
    plan = plan_of(rounds=2, size=3, quorum=2, round_deadline_s=60)
    host = SimulatedHost(fleet, plan, tmp_path)

    host.perform()

    first, second = host.records[1:]
    assert (first.state, first.parameters_sha256) == ("abandoned", None)
    assert first.cause.startswith("round 1 has 1 of the 2 updates it needs (edge-")
    assert second.state == "committed"
    start = host.parameters(0)
    mean = sum((start + d.target) / 2 for d in fleet.devices.values()) / 3
    np.testing.assert_allclose(host.parameters(2), mean, rtol=1e-5)


def test_a_round_that_can_no_longer_reach_its_quorum_is_abandoned_at_once(tmp_path: Path) -> None:
    fleet = SimulatedFleet(3)
    fleet.join()
    for name in ("edge-0", "edge-1"):
        fleet.devices[name].error = "disk full"
    plan = plan_of(rounds=1, size=3, quorum=2, round_deadline_s=600)
    host = SimulatedHost(fleet, plan, tmp_path)

    host.perform()

    assert host.records[1].state == "abandoned"
    assert "ValueError: disk full" in host.records[1].cause
    assert fleet.now_s < 10


def test_rounds_abandoned_in_a_row_end_the_run_with_the_cause(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    for device in fleet.devices.values():
        device.error = "no such column: pressure"
    plan = plan_of(rounds=50, size=2, quorum=1, max_abandoned_rounds=3)
    host = SimulatedHost(fleet, plan, tmp_path)

    host.perform()

    assert len(host.records) == 1 + 3
    assert isinstance(host.outcome, RunFailed)
    assert host.outcome.cause.startswith("3 rounds in a row were abandoned, the last because")
    assert "no such column: pressure" in host.outcome.cause


def test_a_short_run_without_any_committed_round_fails(tmp_path: Path) -> None:
    fleet = SimulatedFleet(1)
    fleet.join()
    fleet.devices["edge-0"].error = "no"
    host = SimulatedHost(fleet, plan_of(rounds=1, max_abandoned_rounds=3), tmp_path)

    host.perform()

    assert isinstance(host.outcome, RunFailed)


def test_over_selection_closes_the_round_at_its_size_and_drops_the_rest(tmp_path: Path) -> None:
    fleet = SimulatedFleet(5)
    fleet.join()
    fleet.devices["edge-0"].train_s = fleet.devices["edge-1"].train_s = 20
    plan = plan_of(rounds=2, size=3, quorum=2, over_selection=1.6, round_deadline_s=60)
    host = SimulatedHost(fleet, plan, tmp_path)

    host.perform()

    first, second = host.records[1:]
    assert len(first.participations) == 5
    assert {d for d, o in outcomes(first).items() if o == "not-needed"} == {"edge-0", "edge-1"}
    assert (first.closed_at - first.started_at).total_seconds() < 5
    # Those two are still busy with round 1, so round 2 does not ask them.
    assert set(outcomes(second)) == {"edge-2", "edge-3", "edge-4"}


def test_late_replies_change_nothing_and_do_not_pile_up_in_the_superlink(tmp_path: Path) -> None:
    fleet = SimulatedFleet(4)
    fleet.join()
    fleet.devices["edge-0"].train_s = 3
    plan = plan_of(rounds=8, size=3, quorum=3, over_selection=1.3)
    host = SimulatedHost(fleet, plan, tmp_path)

    host.perform()

    assert host.outcome == RunFinished()
    asked = [outcomes(r)["edge-0"] for r in host.records[1:] if "edge-0" in outcomes(r)]
    assert len(asked) > 1
    assert set(asked) == {"not-needed"}
    assert fleet.unanswered_replies() <= 1
    assert fleet.pulled_again == []


@pytest.mark.parametrize(
    ("alter", "cause"),
    [
        (
            lambda c: c.__setitem__(
                "parameters", ArrayRecord([np.full(SIZE, np.nan, dtype=np.float32)])
            ),
            "NaN",
        ),
        (
            lambda c: c.__setitem__(
                "parameters", ArrayRecord([np.zeros(SIZE + 1, dtype=np.float32)])
            ),
            "does not fit",
        ),
        (
            lambda c: c.__setitem__("parameters", ArrayRecord([np.zeros(SIZE)])),
            "in place of a float32 vector",
        ),
        (
            lambda c: c.__setitem__(
                "parameters",
                ArrayRecord({"0": Array("float32", (SIZE,), "numpy.ndarray", b"rubbish")}),
            ),
            "numpy's format",
        ),
        (  # numpy's own reader evaluates such a header, and dies of it in an unexpected way
            lambda c: c.__setitem__(
                "parameters",
                ArrayRecord(
                    {"0": Array("float32", (SIZE,), "numpy.ndarray", HEADER_THAT_NEVER_ENDS)}
                ),
            ),
            "numpy's format",
        ),
        (lambda c: c.__delitem__("parameters"), "no parameters"),
        (lambda c: c.__delitem__("metrics"), "no metrics"),
        (lambda c: c.__setitem__("metrics", MetricRecord({"examples": 0})), "no weight"),
        (lambda c: c.__setitem__("metrics", MetricRecord({"examples": -5})), "between 0 and"),
        (lambda c: c.__setitem__("metrics", MetricRecord({"examples": 1e15})), "between 0 and"),
        (lambda c: c.__setitem__("metrics", MetricRecord({"examples": 2.5})), "no weight"),
        (lambda c: c.__setitem__("metrics", MetricRecord({"examples": [1, 2]})), "not a number"),
        (
            lambda c: c.__setitem__(
                "metrics", MetricRecord({"examples": 9, "loss_sum": float("inf")})
            ),
            "is inf",
        ),
    ],
)
def test_a_reply_that_cannot_be_used_counts_its_device_out_and_the_round_goes_on(
    tmp_path: Path, alter: Callable[[RecordDict], Any], cause: str
) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    fleet.devices["edge-1"].alter = alter
    host = SimulatedHost(fleet, plan_of(rounds=1, size=2, quorum=1), tmp_path)

    host.perform()

    record = host.records[1]
    assert record.state == "committed"
    assert outcomes(record) == {"edge-0": "replied", "edge-1": "failed"}
    assert cause in causes(record)["edge-1"]
    expected = (host.parameters(0) + fleet.devices["edge-0"].target) / 2
    np.testing.assert_allclose(host.parameters(), expected, rtol=1e-6)


def test_errors_made_by_the_superlink_are_mapped_to_the_device_they_concern(
    tmp_path: Path,
) -> None:
    fleet = SimulatedFleet(3)
    fleet.join()
    fleet.devices["edge-1"].unreachable = True
    host = SimulatedHost(fleet, plan_of(rounds=1, size=3, quorum=1), tmp_path)

    host.perform()

    assert outcomes(host.records[1])["edge-1"] == "dropped"
    assert causes(host.records[1]) == {"edge-1": "its node missed its heartbeats"}


def test_a_device_whose_message_is_refused_is_counted_out(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    fleet.devices["edge-0"].refused = True
    host = SimulatedHost(fleet, plan_of(rounds=1, size=2, quorum=1), tmp_path)

    host.perform()

    assert causes(host.records[1]) == {"edge-0": "the SuperLink refused its message"}


def test_a_reply_announced_twice_counts_once(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    for device in fleet.devices.values():
        device.answers_twice = True
    host = SimulatedHost(fleet, plan_of(rounds=2, size=2, quorum=2), tmp_path)

    host.perform()

    assert host.outcome == RunFinished()
    assert fleet.pulled_again == []
    assert host.records[1].training_sums["examples"] == 20


def test_a_lost_announcement_costs_one_safety_poll(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    fleet.devices["edge-1"].announces = False
    host = SimulatedHost(fleet, plan_of(rounds=1, size=2, quorum=2), tmp_path)

    host.perform()

    assert host.records[1].state == "committed"
    assert fleet.now_s <= 6


def test_where_nothing_is_announced_nodes_are_found_and_replies_polled_for(tmp_path: Path) -> None:
    fleet = SimulatedFleet(4)
    plan = plan_of(rounds=3, size=4, quorum=4, evaluate=True)
    host = SimulatedHost(fleet, plan, tmp_path, announces=False)

    host.perform()

    assert host.outcome == RunFinished()
    assert set(outcomes(host.records[1])) == {f"node-{node}" for node in range(100, 104)}
    assert all(record.metrics for record in host.records)
    assert fleet.now_s < 4 * 2 * 1.6  # seven stages of one second, polled for at half seconds


def test_the_initial_model_is_measured_so_that_the_gain_is_known(tmp_path: Path) -> None:
    fleet = SimulatedFleet(3)
    fleet.join()
    plan = plan_of(rounds=6, size=3, quorum=3, evaluate=True)
    host = SimulatedHost(fleet, plan, tmp_path)

    host.perform()

    assert host.records[0].round_number == 0
    assert host.records[-1].metrics["loss"] < host.records[0].metrics["loss"]
    assert set(host.records[0].metrics) == {"loss", "accuracy"}
    part = host.records[1].participations[0]
    assert (part.bytes_down, part.bytes_up, part.num_examples) == (2 * 4 * SIZE, 4 * SIZE, 10)
    assert part.seconds == pytest.approx(1.0)


def test_failing_to_measure_never_loses_the_training_result(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    plan = plan_of(rounds=1, size=2, quorum=2, evaluate=True)
    host = SimulatedHost(fleet, plan, tmp_path)

    def break_devices(report: object) -> None:
        match report:
            case RoundProgress(round_number=1, stage="train", replied=2):
                for device in fleet.devices.values():
                    device.error = "out of memory"

    host.on_report = break_devices
    host.perform()

    record = host.records[1]
    assert (record.state, record.metrics) == ("committed", {})
    assert record.cause == "not measured: ValueError: out of memory"
    assert record.parameters_sha256
    assert host.outcome == RunFinished()


@pytest.mark.parametrize(
    ("statistics", "cause"),
    [
        ({"examples": 0}, "no device holds rows out"),
        ({"examples": 5}, "cannot sum up"),  # the task wants loss_sum and correct
        ({"examples": 5, "loss_sum": float("nan"), "correct": 1}, "is nan"),
    ],
)
def test_statistics_that_say_nothing_leave_a_cause_in_place_of_metrics(
    tmp_path: Path, statistics: dict[str, float], cause: str
) -> None:
    fleet = SimulatedFleet(1)
    fleet.join()

    def alter(content: RecordDict) -> None:
        if "parameters" not in content:
            content["metrics"] = MetricRecord(dict(statistics))

    fleet.devices["edge-0"].alter = alter
    host = SimulatedHost(fleet, plan_of(rounds=1, evaluate=True, size=1), tmp_path)

    host.perform()

    assert host.records[1].state == "committed"
    assert host.records[1].metrics == {}
    assert cause in host.records[1].cause


def test_a_device_that_hangs_while_measuring_delays_the_round_by_a_minute_at_most(
    tmp_path: Path,
) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    plan = plan_of(rounds=1, size=2, quorum=1, evaluate=True, round_deadline_s=3600)
    host = SimulatedHost(fleet, plan, tmp_path)

    def hang(report: object) -> None:
        if isinstance(report, NudgeDevices) and len(fleet.pushed) == 6:
            fleet.devices["edge-1"].dead = True

    host.on_report = hang
    fleet.devices["edge-1"].train_s = 1.5
    host.perform()

    assert host.records[1].metrics  # what the other device measured
    assert 60 <= fleet.now_s < 70


def test_a_round_waits_for_its_quorum_and_says_so(tmp_path: Path) -> None:
    fleet = SimulatedFleet(3)
    fleet.join("edge-0")
    fleet.at(100, lambda: fleet.join("edge-1"))
    fleet.at(102, lambda: fleet.join("edge-2"))
    host = SimulatedHost(fleet, plan_of(rounds=1, size=3, quorum=2), tmp_path)

    host.perform()

    waits = [r.joined for r in host.reports if isinstance(r, WaitingForDevices)]
    assert waits == [1, 2]
    assert len(host.records[1].participations) == 3
    assert 102 < fleet.now_s < 105


def test_with_a_quorum_a_round_starts_soon_after_the_last_device_joined(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    host = SimulatedHost(fleet, plan_of(rounds=2, size=5, quorum=2), tmp_path)

    host.perform()

    assert host.records[1].state == "committed"
    assert 6 <= fleet.now_s < 9  # five seconds of patience once, not for each round


def test_without_a_quorum_recruiting_ends_at_its_deadline(tmp_path: Path) -> None:
    fleet = SimulatedFleet(1)
    fleet.join()
    plan = plan_of(rounds=9, size=3, quorum=2, recruit_deadline_s=50, max_abandoned_rounds=2)
    host = SimulatedHost(fleet, plan, tmp_path)

    host.perform()

    assert [r.state for r in host.records] == ["committed", "abandoned", "abandoned"]
    assert host.records[1].cause == "round 1 has 1 of the 2 devices it needs"
    assert fleet.now_s == pytest.approx(100)
    assert fleet.pushed == []


def test_a_run_resumed_from_any_commit_ends_with_the_same_parameters(tmp_path: Path) -> None:
    plan = plan_of(rounds=5, size=4, quorum=2)
    fleet = SimulatedFleet(8)
    fleet.join()
    whole = SimulatedHost(fleet, plan, tmp_path)
    whole.perform()

    for record in whole.records[:-1]:
        selected: dict[str, int] = {}
        for earlier in whole.records[: record.round_number + 1]:
            for part in earlier.participations:
                selected[part.device_id] = selected.get(part.device_id, 0) + 1
        fleet = SimulatedFleet(8)
        fleet.join()
        resumed = SimulatedHost(
            fleet, plan, tmp_path, resume=resume_point(record), times_selected=selected
        )
        resumed.perform()

        assert resumed.outcome == RunFinished()
        np.testing.assert_allclose(resumed.parameters(), whole.parameters(), rtol=1e-6)


def test_a_run_resumed_after_its_last_round_just_finishes(tmp_path: Path) -> None:
    plan = plan_of(rounds=1, size=1)
    fleet = SimulatedFleet(1)
    fleet.join()
    first = SimulatedHost(fleet, plan, tmp_path)
    first.perform()

    again = SimulatedHost(fleet, plan, tmp_path, resume=resume_point(first.records[-1]))
    again.perform()

    assert again.reports == [RunFinished()]


def test_a_stop_in_the_middle_of_a_round_ends_the_app_without_a_record(tmp_path: Path) -> None:
    fleet = SimulatedFleet(2)
    fleet.join()
    fleet.devices["edge-0"].dead = True
    fleet.at(10, lambda: fleet.events.append(StopRun("a person said so")))
    host = SimulatedHost(fleet, plan_of(rounds=3, size=2, quorum=2), tmp_path)

    host.perform()

    assert [r.round_number for r in host.records] == [0]
    assert host.outcome is None
    assert fleet.now_s == pytest.approx(10)


def test_a_coordinator_that_does_not_save_ends_the_worker_in_time(tmp_path: Path) -> None:
    fleet = SimulatedFleet(1)
    fleet.join()
    host = SimulatedHost(fleet, plan_of(), tmp_path)
    host.saves = False

    with pytest.raises(UnavailableError, match="did not save round 0 within 60 s"):
        host.perform()


def test_a_task_that_is_not_installed_fails_with_a_sentence(tmp_path: Path) -> None:
    fleet = SimulatedFleet(1)
    plan = plan_of()
    host = SimulatedHost(fleet, plan, tmp_path)
    host.plan = type(plan)(name="x", task=TaskSpec(name="x", uses="not-there"))

    with pytest.raises(ConfigError, match="not-there"):
        host.perform()


def test_many_devices_are_nudged_in_waves(tmp_path: Path) -> None:
    fleet = SimulatedFleet(80)
    fleet.join()
    host = SimulatedHost(fleet, plan_of(rounds=1, size=80, quorum=80), tmp_path)
    busy: list[int] = []
    host.on_report = lambda r: (
        busy.append(len(r.device_ids)) if isinstance(r, NudgeDevices) else None
    )

    host.perform()

    assert busy[0] == 32
    assert sum(busy) == 80
    assert host.records[1].state == "committed"


def test_dead_devices_in_the_first_wave_do_not_keep_the_others_from_their_turn(
    tmp_path: Path,
) -> None:
    fleet = SimulatedFleet(64)
    fleet.join()
    plan = plan_of(rounds=1, size=64, quorum=32, round_deadline_s=100)
    host = SimulatedHost(fleet, plan, tmp_path)

    def kill_first_wave(report: object) -> None:
        if isinstance(report, RoundStarted):
            for name in report.cohort[:32]:
                fleet.devices[name].dead = True

    host.on_report = kill_first_wave
    host.perform()

    assert host.records[1].state == "committed"
    assert sorted(outcomes(host.records[1]).values()) == ["late"] * 32 + ["replied"] * 32


def test_every_round_trains_from_its_own_seed_which_does_not_change_on_a_rerun(
    tmp_path: Path,
) -> None:
    seeds = []
    for _ in range(2):
        fleet = SimulatedFleet(1)
        fleet.join()
        SimulatedHost(fleet, plan_of(rounds=3, size=1), tmp_path).perform()
        seeds.append([m.content.config_records["plan"]["seed"] for m in fleet.pushed])

    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3
