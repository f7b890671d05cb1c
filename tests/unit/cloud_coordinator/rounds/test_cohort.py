import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_coordinator.rounds.cohort import (
    SETTLE_S,
    can_start,
    cohort_rng,
    select_cohort,
    training_seed,
    wanted_devices,
)
from shared.run_plan import CohortPlan

DEVICES = tuple(f"edge-{i}" for i in range(20))


@given(
    joined=st.sets(st.sampled_from(DEVICES)),
    size=st.integers(1, 12),
    over_selection=st.floats(1, 2),
    seed=st.integers(0, 2**63 - 1),
    round_number=st.integers(1, 10**6),
)
def test_a_cohort_is_as_large_as_wanted_or_as_can_be_and_the_same_each_time(
    joined: set[str], size: int, over_selection: float, seed: int, round_number: int
) -> None:
    plan = CohortPlan(size=size, over_selection=over_selection)

    cohorts = [
        select_cohort(order, plan, rng=cohort_rng(seed, round_number), times_selected={})
        for order in (sorted(joined), sorted(joined, reverse=True))
    ]

    assert cohorts[0] == cohorts[1]
    assert set(cohorts[0]) <= joined
    assert len(set(cohorts[0])) == len(cohorts[0]) == min(len(joined), wanted_devices(plan))


@given(times=st.dictionaries(st.sampled_from(DEVICES), st.integers(0, 5)), seed=st.integers(0, 99))
def test_nobody_is_left_out_who_was_asked_less_than_somebody_who_is_in(
    times: dict[str, int], seed: int
) -> None:
    plan = CohortPlan(size=6)

    cohort = select_cohort(DEVICES, plan, rng=cohort_rng(seed, 1), times_selected=times)

    most = max(times.get(device, 0) for device in cohort)
    left_out = set(DEVICES) - set(cohort)
    assert all(times.get(device, 0) >= most for device in left_out)


def test_other_rounds_draw_other_cohorts_and_all_take_part_in_turn() -> None:
    plan = CohortPlan(size=5)
    times: dict[str, int] = {}
    cohorts = []
    for number in range(1, 5):
        cohort = select_cohort(DEVICES, plan, rng=cohort_rng(0, number), times_selected=times)
        cohorts.append(cohort)
        for device in cohort:
            times[device] = times.get(device, 0) + 1

    assert set().union(*cohorts) == set(DEVICES)


@pytest.mark.parametrize(
    ("size", "over_selection", "wanted"), [(5, 1.0, 5), (10, 1.3, 13), (3, 1.1, 4), (1, 1.0, 1)]
)
def test_over_selection_asks_more_than_the_round_wants(
    size: int, over_selection: float, wanted: int
) -> None:
    assert wanted_devices(CohortPlan(size=size, over_selection=over_selection)) == wanted


@pytest.mark.parametrize(
    ("available", "quiet_s", "starts"),
    [
        (5, 0.0, True),  # all that are wanted
        (3, 0.0, False),  # a quorum, but others may be on their way
        (3, SETTLE_S, True),
        (2, 1e6, False),  # no quorum
    ],
)
def test_a_round_starts_when_all_are_there_or_a_quorum_and_nobody_new(
    available: int, quiet_s: float, *, starts: bool
) -> None:
    assert can_start(available, CohortPlan(size=5, quorum=3), quiet_s=quiet_s) is starts


def test_training_seeds_fit_where_devices_expect_them() -> None:
    seeds = {training_seed(seed, number) for seed in (0, 2**63 - 1) for number in range(100)}

    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
