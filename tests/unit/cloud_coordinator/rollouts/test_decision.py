"""What a rollout does next, for whatever devices report."""

from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_coordinator.rollouts.decision import (
    Finish,
    Halt,
    Member,
    OpenWave,
    Rollout,
    Standing,
    TurnBack,
    Wait,
    decide,
    machine_breach,
)
from cloud_coordinator.rollouts.lifecycle import (
    TRANSITIONS,
    RolloutEvent,
    RolloutState,
    next_state,
)
from shared.errors import IllegalTransitionError
from shared.messages import ServedFigures
from shared.rollout_plan import AT_ONCE, GatePlan, RolloutPlan, WavePlan, WindowPlan

S = RolloutState
T0 = datetime(2026, 3, 2, 12, tzinfo=UTC)  # a Monday
PLAN = RolloutPlan(
    waves=(
        WavePlan(devices=1, bake_s=60),
        WavePlan(percent=25, bake_s=60),
        WavePlan(percent=100, bake_s=60),
    )
)


def rolling(**changed: Any) -> Rollout:
    given: dict[str, Any] = {"state": S.ROLLING, "plan": PLAN, "wave": 1}
    return Rollout(**given | changed)


def after(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def figures(**given: Any) -> ServedFigures:
    return ServedFigures(version="0" * 64, artifact="0" * 64, **given)


def serving(count: int = 1, *, wave: int = 1, **given: Any) -> list[Member]:
    return [
        Member(
            device_id=f"d{number}",
            wave=wave,
            told_at=T0,
            standing=Standing.SERVING,
            serving_since=after(5 + number),
            **given,
        )
        for number in range(count)
    ]


def other(standing: Standing, *, cause: str = "", name: str = "x") -> Member:
    return Member(device_id=name, wave=1, told_at=T0, standing=standing, cause=cause)


def test_the_first_wave_opens_unless_something_comes_before_it() -> None:
    assert decide(rolling(state=S.PLANNED, wave=0), [], T0) == OpenWave(1)
    waits = rolling(state=S.PLANNED, wave=0, waits_for="rollout a is paused")
    assert decide(waits, [], T0) == Wait("rollout a is paused")


def test_a_wave_bakes_from_the_moment_at_which_enough_devices_serve() -> None:
    assert decide(rolling(), serving(2), after(30)) == Wait("wave 1 bakes", after(66))
    assert decide(rolling(), serving(2), after(66)) == OpenWave(2)


def test_the_last_wave_ends_the_rollout() -> None:
    assert decide(rolling(wave=3), serving(wave=3), after(65)) == Finish(
        RolloutEvent.LAST_WAVE_PASSED
    )


def test_a_wave_waits_for_those_who_do_not_serve_yet_and_halts_at_its_deadline() -> None:
    members = [*serving(1), other(Standing.CONVERGING), other(Standing.CONVERGING)]
    assert decide(rolling(), members, after(30)) == Wait(
        "1 of 3 devices in wave 1 serve it", after(900)
    )
    assert decide(rolling(), members, after(900)) == Halt(
        "convergence", "only 1 of 3 devices in wave 1 serve it in time"
    )


def test_devices_that_are_away_hold_nobody_up_but_somebody_has_to_serve() -> None:
    members = [*serving(2), other(Standing.AWAY)]
    assert decide(rolling(), members, after(66)) == OpenWave(2)
    alone = [other(Standing.AWAY)]
    assert isinstance(decide(rolling(), alone, after(100)), Wait)
    assert isinstance(decide(rolling(), alone, after(900)), Halt)


def test_without_a_plan_all_get_it_at_once_and_nobody_is_waited_for() -> None:
    at_once = rolling(plan=AT_ONCE, wave=1)
    for members in ([], [other(Standing.CONVERGING)], [other(Standing.AWAY)]):
        assert decide(at_once, members, T0) == Finish(RolloutEvent.LAST_WAVE_PASSED)


@pytest.mark.parametrize(
    ("member", "gate", "words"),
    [
        (
            other(Standing.FAILED, cause="the model did not survive its self-test"),
            "deployment",
            "1 of 1 device refuse it; x: the model did not survive",
        ),
        (other(Standing.STRANGE), "digest", "x serves a digest that no version here has"),
        (serving(served=figures(crashes=1))[0], "crashes", "server of d0 crashed 1 times"),
        (
            serving(served=figures(requests=40, errors=1))[0],
            "errors",
            "1 of 40 requests failed by its fault, at most 2.0% may",
        ),
        (
            serving(
                served=figures(requests=40, p95_ms=10.0), before=figures(requests=99, p95_ms=1.0)
            )[0],
            "latency",
            "takes 10.0 times as long as the version before, at most 3 are allowed",
        ),
        (
            serving(
                served=figures(requests=3, p95_ms=0.1, self_test_ms=5.0),
                before=figures(requests=99, p95_ms=1.0, self_test_ms=0.5),
            )[0],
            "latency",
            "takes 10.0 times as long",
        ),
    ],
    ids=["fails", "strange", "crashes", "errors", "slow", "slow in the self-test"],
)
def test_each_gate_turns_a_rollout_back_and_says_by_how_much(
    member: Member, gate: str, words: str
) -> None:
    if gate == "errors":
        member = serving(served=figures(requests=40, errors=1))[0]
        strict = msgspec.structs.replace(PLAN, gates=GatePlan(max_error_share=0.02))
        breach = decide(rolling(plan=strict), [member], after(10))
    else:
        breach = decide(rolling(), [member], after(10))
    assert isinstance(breach, TurnBack)
    assert breach.gate == gate
    assert words in breach.cause


def test_few_requests_and_few_errors_break_no_gate() -> None:
    fine = [
        serving(served=figures(requests=19, errors=19))[0],
        serving(served=figures(requests=100, errors=2))[0],
        serving(served=figures(requests=40, p95_ms=2.9), before=figures(requests=40, p95_ms=1.0))[
            0
        ],
        serving(served=figures(requests=40, p95_ms=90.0))[0],  # nothing to compare with
    ]
    for member in fine:
        assert machine_breach(PLAN.gates, [member]) is None


def test_a_typical_device_decides_on_latency_not_a_single_one() -> None:
    slow = serving(served=figures(self_test_ms=50.0), before=figures(self_test_ms=1.0))
    usual = serving(2, served=figures(self_test_ms=1.1), before=figures(self_test_ms=1.0))
    assert machine_breach(PLAN.gates, [*slow, *usual]) is None
    assert machine_breach(PLAN.gates, [*slow, *slow, *usual[:1]]) is not None


def test_a_broken_gate_halts_where_nothing_is_there_to_go_back_to_or_the_plan_says_so() -> None:
    crashed = serving(served=figures(crashes=1))
    assert isinstance(decide(rolling(can_return=False), crashed, after(9)), Halt)
    by_hand = msgspec.structs.replace(PLAN, on_breach="pause")
    assert isinstance(decide(rolling(plan=by_hand), crashed, after(9)), Halt)
    paused = rolling(plan=by_hand, state=S.PAUSED)
    assert isinstance(decide(paused, crashed, after(9)), Wait)


def test_a_paused_rollout_is_still_watched() -> None:
    paused = rolling(state=S.PAUSED)
    assert isinstance(decide(paused, serving(), after(900)), Wait)
    assert isinstance(decide(paused, serving(served=figures(crashes=1)), after(9)), TurnBack)


def test_a_rollback_ends_when_no_device_that_is_online_serves_the_version() -> None:
    back = rolling(state=S.ROLLING_BACK)
    assert decide(back, serving(2), after(9)) == Wait("2 devices still to go back")
    gone = [other(Standing.CONVERGING), other(Standing.AWAY)]
    assert decide(back, gone, after(9)) == Finish(RolloutEvent.RETURNED)
    stuck = rolling(state=S.ROLLING_BACK, can_return=False)
    assert decide(stuck, serving(2), after(9)) == Finish(RolloutEvent.RETURNED)


def test_what_has_ended_needs_no_decision() -> None:
    for state in (S.COMPLETED, S.ROLLED_BACK, S.DROPPED):
        assert decide(rolling(state=state), serving(), T0) is None


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Standing),
            st.integers(1, 3),
            st.integers(0, 50),
            st.integers(0, 50),
            st.integers(0, 2),
        ),
        max_size=8,
    ),
    st.integers(1, 3),
    st.sampled_from([S.ROLLING, S.PAUSED]),
    st.integers(0, 2000),
)
def test_whatever_is_reported_no_wave_opens_while_a_gate_is_broken(
    drawn: list[tuple[Standing, int, int, int, int]], wave: int, state: RolloutState, seconds: int
) -> None:
    members = [
        Member(
            device_id=f"d{number}",
            wave=place,
            told_at=T0,
            standing=standing,
            serving_since=T0 if standing is Standing.SERVING else None,
            served=figures(requests=requests, errors=min(errors, requests), crashes=crashes)
            if standing is Standing.SERVING
            else None,
        )
        for number, (standing, place, requests, errors, crashes) in enumerate(drawn)
    ]
    decision = decide(rolling(state=state, wave=wave), members, after(seconds))
    if machine_breach(PLAN.gates, members):
        assert isinstance(decision, TurnBack)
    else:
        assert not isinstance(decision, TurnBack)
    if state is S.PAUSED:
        assert not isinstance(decision, OpenWave | Finish)


def test_waves_open_in_windows_alone() -> None:
    at_night = RolloutPlan(waves=PLAN.waves, windows=(WindowPlan(start="22:00", end="05:00"),))
    planned = rolling(state=S.PLANNED, wave=0, plan=at_night)
    opens = T0.replace(hour=22)
    assert decide(planned, [], T0) == Wait("its window opens later", opens)
    assert decide(planned, [], opens) == OpenWave(1)
    crashed = serving(served=figures(crashes=1))
    assert isinstance(decide(rolling(plan=at_night), crashed, T0), TurnBack)


LEGAL = {
    (S.PLANNED, RolloutEvent.WAVE_OPENED): S.ROLLING,
    (S.PLANNED, RolloutEvent.GIVEN_UP): S.DROPPED,
    (S.ROLLING, RolloutEvent.WAVE_OPENED): S.ROLLING,
    (S.ROLLING, RolloutEvent.LAST_WAVE_PASSED): S.COMPLETED,
    (S.ROLLING, RolloutEvent.HALTED): S.PAUSED,
    (S.ROLLING, RolloutEvent.TURNED_BACK): S.ROLLING_BACK,
    (S.PAUSED, RolloutEvent.RESUMED): S.ROLLING,
    (S.PAUSED, RolloutEvent.TURNED_BACK): S.ROLLING_BACK,
    (S.ROLLING_BACK, RolloutEvent.RETURNED): S.ROLLED_BACK,
}


@pytest.mark.parametrize(("state", "event"), list(product(RolloutState, RolloutEvent)))
def test_every_pair_of_state_and_event_is_decided(state: RolloutState, event: RolloutEvent) -> None:
    if (state, event) in LEGAL:
        assert next_state(state, event) is LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event} cannot happen"):
            next_state(state, event)
    assert set(TRANSITIONS) == set(RolloutState)
