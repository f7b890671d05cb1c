import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_coordinator.rounds.groups import Groups, draw_groups, present_groups, select_groups
from shared.privacy_plan import AggregationPlan, Layout, PrivacyPlan, lay_out


def layout_of(size: int, group_size: int, *, at_least: int = 2, asked: int = 0) -> Layout:
    return lay_out(
        PrivacyPlan(at_least=at_least),
        AggregationPlan(group_size=group_size),
        size=size,
        asked=asked or size,
    )


def devices(count: int, prefix: str = "edge") -> list[str]:
    return [f"{prefix}-{i:04}" for i in range(count)]


def rank(memberships: list[tuple[str, ...]]) -> int:
    """How many independent sums somebody has who knows the sums over these sets of devices."""
    everybody = sorted(set(itertools.chain(*memberships)))
    matrix = [[device in members for device in everybody] for members in memberships]
    return int(np.linalg.matrix_rank(np.array(matrix, dtype=float)))


@given(
    count=st.integers(0, 200),
    groups=st.integers(1, 6),
    group_size=st.integers(5, 20),
    seed=st.integers(0, 2**32),
)
def test_groups_are_disjoint_and_none_is_too_large_or_too_small(
    count: int, groups: int, group_size: int, seed: int
) -> None:
    layout = layout_of(groups * group_size, group_size)

    drawn = draw_groups(devices(count), layout, rng=np.random.default_rng(seed))

    grouped = list(itertools.chain(*drawn))
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) <= set(devices(count))
    assert all(layout.wanted <= len(group) <= layout.max_roster for group in drawn)
    assert count - len(grouped) < max(layout.max_roster, layout.wanted)


def test_devices_that_come_later_never_change_a_group() -> None:
    layout = layout_of(40, 10)
    first = draw_groups(devices(43), layout, rng=np.random.default_rng(1))
    later = draw_groups(
        devices(43) + devices(9, "late"), layout, rng=np.random.default_rng(2), drawn=first
    )

    assert len(first) == 4
    assert later[:4] == first
    (new,) = later[4:]
    assert len(new) == 10
    assert {device for device in new if device.startswith("edge")} <= set(devices(43)) - set(
        itertools.chain(*first)
    )


def test_over_selected_groups_have_members_to_spare() -> None:
    drawn = draw_groups(devices(120), layout_of(100, 20, asked=120), rng=np.random.default_rng(0))
    assert [len(group) for group in drawn] == [24] * 5


def test_a_thousand_devices_make_four_shards() -> None:
    layout = lay_out(PrivacyPlan(), AggregationPlan(), size=1000, asked=1000)
    drawn = draw_groups(devices(1000), layout, rng=np.random.default_rng(0))
    assert [len(group) for group in drawn] == [250] * 4


def test_the_same_seed_draws_the_same_groups_in_whatever_order_devices_joined() -> None:
    layout = layout_of(30, 10)
    draws = {
        draw_groups(order, layout, rng=np.random.default_rng(5))
        for order in (devices(30), devices(30)[::-1])
    }
    assert len(draws) == 1


def test_only_groups_with_enough_devices_present_take_part() -> None:
    layout = layout_of(12, 6, at_least=3)  # of 6 one may be corrupted: 4 must be left
    groups: Groups = (("a", "b", "c", "d", "e", "f"), ("g", "h", "i", "j", "k", "l"))

    present = present_groups(groups, ["a", "b", "c", "d", "g", "h", "i", "x"], layout)

    assert layout.min_survivors == 4
    assert present == {0: ("a", "b", "c", "d")}


def test_groups_take_turns() -> None:
    layout = layout_of(20, 10)
    all_groups = dict(enumerate(draw_groups(devices(60), layout, rng=np.random.default_rng(0))))
    times: dict[int, int] = {}
    for number in range(1, 4):
        chosen = select_groups(
            all_groups, layout, rng=np.random.default_rng(number), times_selected=times
        )
        assert len(chosen) == 2
        for group in chosen:
            times[group] = times.get(group, 0) + 1
    assert times == dict.fromkeys(range(6), 1)


@pytest.mark.parametrize("rounds", [1, 17, 60])
def test_a_run_gives_away_as_many_independent_sums_as_it_has_groups(rounds: int) -> None:
    """R4: with groups drawn anew in each round, 17 rounds suffice to solve for every device."""
    layout = layout_of(32, 8)
    groups: Groups = ()
    fixed: list[tuple[str, ...]] = []
    anew: list[tuple[str, ...]] = []
    times: dict[int, int] = {}
    for number in range(rounds):
        rng = np.random.default_rng([7, number])
        groups = draw_groups(devices(64), layout, rng=rng, drawn=groups)
        chosen = select_groups(dict(enumerate(groups)), layout, rng=rng, times_selected=times)
        for group in chosen:
            times[group] = times.get(group, 0) + 1
        fixed += chosen.values()
        anew += draw_groups(devices(64), layout, rng=rng)

    assert rank(fixed) == len(set(fixed)) == len(times)
    if rounds >= 17:
        assert rank(fixed) == len(groups) == 8
        assert rank(anew) > 55  # nearly all of the 64 devices lie open
