"""Who is invited, and who is asked again after what."""

from datetime import UTC, datetime, timedelta

from cloud_coordinator.devices.service import Device
from cloud_coordinator.runs.recruitment import InvitationState, Recruitment

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def device(name: str, *, online: bool = True, task: str = "digits") -> Device:
    return Device(name, "pem", online, frozenset({task}))


def recruitment(most_devices: int = 10) -> Recruitment:
    return Recruitment(
        task="digits",
        answer_time=30 * SECOND,
        join_time=180 * SECOND,
        most_devices=most_devices,
    )


def names(devices: list[Device]) -> list[str]:
    return [device.device_id for device in devices]


def test_online_devices_with_data_for_the_task_are_asked() -> None:
    everybody = [
        device("ready"),
        device("gone", online=False),
        device("other", task="weather"),
    ]
    assert names(recruitment().whom_to_invite(everybody, NOW)) == ["ready"]


def test_nobody_is_asked_while_an_invitation_is_open() -> None:
    round_ = recruitment()
    round_.invite("a", NOW)
    assert round_.whom_to_invite([device("a")], NOW + 29 * SECOND) == []


def test_no_more_are_asked_than_a_superlink_serves() -> None:
    few = recruitment(most_devices=2)
    few.invite("a", NOW)
    few.invite("b", NOW)
    assert few.whom_to_invite([device("c")], NOW) == []
    few.answer("a", accepted=False, reason="busy", now=NOW)
    assert names(few.whom_to_invite([device("c")], NOW)) == ["c"]


def test_who_does_not_answer_in_time_is_given_up_and_asked_again() -> None:
    asked = recruitment()
    asked.invite("a", NOW)
    assert asked.expire(NOW + 29 * SECOND) == []
    [given_up] = asked.expire(NOW + 30 * SECOND)
    assert given_up.state is InvitationState.UNANSWERED
    assert given_up.reason == "did not answer in time"
    assert names(asked.whom_to_invite([device("a")], NOW + 30 * SECOND)) == ["a"]


def test_who_says_yes_has_longer_to_join() -> None:
    asked = recruitment()
    asked.invite("a", NOW)
    asked.answer("a", accepted=True, reason="", now=NOW)
    assert asked.expire(NOW + 179 * SECOND) == []
    [given_up] = asked.expire(NOW + 180 * SECOND)
    assert given_up.reason == "said yes and did not join in time"


def test_who_says_no_is_asked_again_after_a_minute_with_the_reason_kept() -> None:
    asked = recruitment()
    asked.invite("a", NOW)
    [declined] = asked.answer("a", accepted=False, reason="no data", now=NOW)
    assert (declined.state, declined.reason) == (InvitationState.DECLINED, "no data")
    assert asked.whom_to_invite([device("a")], NOW + 59 * SECOND) == []
    assert names(asked.whom_to_invite([device("a")], NOW + 60 * SECOND)) == ["a"]


def test_who_joins_without_an_answer_that_reached_us_is_in() -> None:
    asked = recruitment()
    asked.invite("a", NOW)
    [joined] = asked.join("a")
    assert joined.state is InvitationState.JOINED
    assert asked.joined == {"a"}
    assert asked.answer("a", accepted=True, reason="", now=NOW) == []
    assert asked.expire(NOW + timedelta(days=1)) == []


def test_joining_twice_changes_nothing_the_second_time() -> None:
    asked = recruitment()
    asked.invite("a", NOW)
    asked.join("a")
    assert asked.join("a") == []


def test_who_was_never_invited_is_not_let_in() -> None:
    asked = recruitment()
    assert asked.join("stranger") == []
    assert asked.answer("stranger", accepted=True, reason="", now=NOW) == []
    assert asked.leave("stranger", cause="x", now=NOW) == []


def test_who_leaves_again_and_again_is_asked_after_growing_pauses() -> None:
    asked = recruitment()
    pauses = []
    now = NOW
    for _ in range(9):
        asked.invite("a", now)
        asked.join("a")
        [left] = asked.leave("a", cause="the trainer ended", now=now)
        assert left.until is not None
        pauses.append((left.until - now).total_seconds())
        now = left.until
        assert names(asked.whom_to_invite([device("a")], now)) == ["a"]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_the_next_deadline_is_the_earliest_of_all() -> None:
    asked = recruitment()
    assert asked.next_deadline() is None
    asked.invite("a", NOW)
    asked.invite("b", NOW + SECOND)
    assert asked.next_deadline() == NOW + 30 * SECOND
    asked.join("a")
    assert asked.next_deadline() == NOW + 31 * SECOND
