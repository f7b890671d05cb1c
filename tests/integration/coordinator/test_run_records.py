"""Runs in the database, on SQLite and on PostgreSQL."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from cloud_coordinator.database import Database
from cloud_coordinator.devices.enrolment import Enrolment
from cloud_coordinator.rounds.worker_messages import Participation, RoundRecord
from cloud_coordinator.runs.lifecycle import RunEvent, RunState
from cloud_coordinator.runs.records import RunRecords
from cloud_coordinator.runs.recruitment import Invitation, InvitationState
from shared.errors import IllegalTransitionError, NotFoundError
from shared.run_plan import RunPlan
from shared.statistics.vectors import Answer
from tests.integration.coordinator.fake_device import DeviceKeys
from tests.integration.coordinator.live import plan

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def digest_of(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def records(database: Database) -> RunRecords:
    enrolment = Enrolment(database, coordinator_key_id="c" * 64, clock=lambda: NOW)
    token = enrolment.create_token(uses=2, lifetime=timedelta(hours=1))
    for name in ("a", "b"):
        enrolment.enrol(DeviceKeys().request(token, name))
    return RunRecords(database, clock=lambda: NOW)


def closed(number: int, *devices: str, committed: bool = True) -> RoundRecord:
    return RoundRecord(
        round_number=number,
        state="committed" if committed else "abandoned",
        cause="" if committed else "nobody came",
        started_at=NOW,
        closed_at=NOW + timedelta(seconds=2),
        participations=tuple(
            Participation(device_id=device, outcome="replied", num_examples=7, bytes_up=2**33)
            for device in devices
        ),
        metrics={"loss": 0.5},
        training_sums={"loss_sum": 3.5},
        parameters_sha256=digest_of(number) if committed else None,
    )


def test_a_plan_is_stored_whole_with_every_default(records: RunRecords) -> None:
    wanted = plan()
    row = records.get(records.create(wanted).run_id)
    assert msgspec.convert(row.plan, RunPlan) == wanted
    assert row.plan["training"]["learning_rate"] == wanted.training.learning_rate
    assert row.plan_digest == wanted.digest
    assert row.state == "planned"


def test_a_round_is_stored_with_everything_that_is_known_of_it(records: RunRecords) -> None:
    run_id = records.create(plan()).run_id
    records.save_round(run_id, closed(1, "a", "b"))
    details = records.details(run_id)
    [row] = details.rounds
    assert (row.metrics, row.training_sums) == ({"loss": 0.5}, {"loss_sum": 3.5})
    assert row.closed_at - row.started_at == timedelta(seconds=2)
    assert [p.device_id for p in details.participations] == ["a", "b"]
    assert details.participations[0].bytes_up == 2**33


def test_a_round_that_is_closed_twice_counts_once(records: RunRecords) -> None:
    run_id = records.create(plan()).run_id
    for _ in range(2):
        records.save_round(run_id, closed(1, "a"))
    assert len(records.details(run_id).participations) == 1


def test_a_fresh_run_starts_with_round_1_and_nothing_to_resume(records: RunRecords) -> None:
    start = records.starting_point(records.create(plan()).run_id)
    assert start.resume is None
    assert (start.next_round, start.rounds_committed, start.times_selected) == (1, 0, {})


def test_a_run_resumes_at_its_last_commit_past_abandoned_rounds(records: RunRecords) -> None:
    run_id = records.create(plan()).run_id
    records.save_round(run_id, closed(0))
    records.save_round(run_id, closed(1, "a", "b"))
    records.save_round(run_id, closed(2, "a", committed=False))
    start = records.starting_point(run_id)
    assert start.resume is not None
    assert start.resume.round_number == 1
    assert start.resume.parameters_sha256 == digest_of(1)
    assert (start.next_round, start.rounds_committed) == (3, 1)
    assert start.times_selected == {"a": 2, "b": 1}


def test_answers_to_statistics_are_stored_and_are_no_model_to_go_on_from(
    records: RunRecords,
) -> None:
    run_id = records.create(plan()).run_id
    answer = Answer(kind="count", feature="", values={"count": 7.0}, standard_error={"count": 0.5})
    record = closed(1, "a")
    records.save_round(
        run_id, msgspec.structs.replace(record, answers=(answer,), parameters_sha256=None)
    )
    [row] = records.details(run_id).rounds
    assert msgspec.convert(row.answers, list[Answer]) == [answer]
    start = records.starting_point(run_id)
    assert (start.resume, start.next_round, start.rounds_committed) == (None, 2, 1)


def test_a_run_moves_along_its_lifecycle_and_no_other_way(records: RunRecords) -> None:
    run_id = records.create(plan()).run_id
    assert records.move(run_id, RunEvent.DEVICES_LACKING) is RunState.RECRUITING
    with pytest.raises(IllegalTransitionError):
        records.move(run_id, RunEvent.MODEL_BUILT)
    assert records.move(run_id, RunEvent.STOP_ASKED, cause="enough") is RunState.STOPPED
    row = records.get(run_id)
    assert (row.cause, row.ended_at) == ("enough", NOW)
    assert [active.run_id for active in records.active()] == []


def test_runs_that_have_not_ended_are_active(records: RunRecords) -> None:
    ended, active = records.create(plan()).run_id, records.create(plan()).run_id
    records.move(ended, RunEvent.BROKE, cause="x")
    assert [row.run_id for row in records.active()] == [active]
    assert {row.run_id for row in records.all()} == {ended, active}


def test_the_last_of_an_invitation_is_kept(records: RunRecords) -> None:
    run_id = records.create(plan()).run_id
    for state in (InvitationState.INVITED, InvitationState.DECLINED):
        records.note_invitations(run_id, "s", [Invitation("a", state, None, "busy")])
    [row] = records.details(run_id).invitations
    assert (row.state, row.reason) == ("declined", "busy")


def test_blobs_of_the_last_two_commits_of_each_run_are_in_use(records: RunRecords) -> None:
    run_id = records.create(plan()).run_id
    for number in range(4):
        records.save_round(run_id, closed(number, "a"))
    assert records.blobs_in_use() == {digest_of(2), digest_of(3)}


def test_rounds_that_only_ask_push_no_parameters_out(records: RunRecords) -> None:
    run_id = records.create(plan()).run_id
    records.save_round(run_id, closed(1, "a"))
    for number in (2, 3, 4):
        asked = msgspec.structs.replace(closed(number, "a"), parameters_sha256=None)
        records.save_round(run_id, asked)
    assert records.blobs_in_use() == {digest_of(1)}


def test_an_unknown_run_is_named_with_advice(records: RunRecords) -> None:
    with pytest.raises(NotFoundError, match="'nothing'; 'shoal run list' shows"):
        records.details("nothing")
