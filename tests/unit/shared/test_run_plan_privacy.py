"""What a plan may say of secure sums, and what is refused."""

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from shared.config import convert
from shared.errors import ConfigError
from shared.privacy_plan import AggregationPlan, PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan, read_plan
from shared.secure_sum.config import (
    check_roster_size,
    corrupted_of,
    survivors_needed,
    threshold_of,
)
from shared.tasks.spec import TaskSpec

TASK = TaskSpec(name="pumps", uses="tabular")
NOISED: dict[str, Any] = {"noise": "distributed", "weights": "uniform"}


def plan_of(
    cohort: dict[str, Any] | None = None,
    privacy: dict[str, Any] | None = None,
    aggregation: dict[str, Any] | None = None,
) -> RunPlan:
    return RunPlan(
        name="first",
        task=TASK,
        cohort=CohortPlan(**cohort or {}),
        privacy=PrivacyPlan(**privacy or {}),
        aggregation=AggregationPlan(**aggregation or {}),
    )


def test_a_plan_without_the_tables_sums_securely(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(
        'name = "old"\n[task]\nname = "pumps"\nuses = "tabular"\n[training]\nepochs = 2\n'
    )
    plan = read_plan(tmp_path / "plan.toml")
    assert plan.privacy.mode == "secure"
    assert plan.cohort.size == 20
    assert plan.cohort.quorum == 18  # 16 honest ones, and a tenth that may not be
    assert plan.layout().tolerated_drops == 2


def test_a_stored_plan_is_read_back_as_the_same_plan() -> None:
    plan = plan_of({"size": 300, "over_selection": 1.2}, NOISED)
    stored = convert(msgspec.json.decode(msgspec.json.encode(plan)), RunPlan, source="stored")
    assert stored == plan
    assert stored.digest == plan.digest


def test_the_digest_covers_every_key_of_both_tables() -> None:
    changes: list[RunPlan] = [
        plan_of(privacy={"at_least": 15}),
        plan_of(privacy={"corrupt_fraction": 0.05}),
        plan_of(privacy={"corrupt_devices": 2, "at_least": 15}),
        plan_of(privacy={"drop_fraction": 0.2}),
        plan_of(privacy={"lane_bits": 32}),
        plan_of(privacy={"clip_norm": 3.0}),
        plan_of(privacy={"rotate": False}),
        plan_of(privacy={"weights": "uniform"}),
        plan_of(privacy={"max_weight": 7}),
        plan_of(privacy=NOISED),
        plan_of(privacy={"delta": 1e-7}),
        plan_of(privacy={"stage_deadline_s": 10}),
        plan_of(privacy={"adaptive_clipping": True}),
        plan_of(privacy={"mode": "plain"}),
        plan_of(aggregation={"group_size": 20}),
        plan_of(aggregation={"poisoned_fraction": 0.01}),
    ]
    digests = {plan.digest for plan in [plan_of(), *changes]}
    assert len(digests) == 1 + len(changes)


def test_the_digest_of_a_plan_is_stable() -> None:
    """Runs are stored with it: whoever changes this changes the name of every plan."""
    assert plan_of().digest == plan_of({"quorum": 18}).digest
    assert plan_of().digest == "2886c16e5f66c4ee22a75a9376d32da12ded21cf0b747b4e0ce4d5278a99206a"


@pytest.mark.parametrize(
    ("cohort", "privacy", "aggregation", "sentence"),
    [
        (
            {"size": 5},
            {},
            {},
            (
                "cohort.size 5 is below the 17 devices that a sum must be of: privacy.at_least 16 "
                "honest ones and 1 that may be corrupted; raise it to 18 or more, or lower at_least"
            ),
        ),
        (
            {"size": 18, "over_selection": 1.5},
            {},
            {},
            (
                "cohort.size 18 is below the 19 devices that a sum must be of: privacy.at_least 16 "
                "honest ones and 3 that may be corrupted of the 27 that over_selection asks; "
                "raise it to 19 or more"
            ),
        ),
        (
            {"size": 300},
            {"at_least": 140},
            {},
            "cohort.size 300, so 2 sums of 150 is below the 155 devices",
        ),
        (
            {"size": 20, "quorum": 21},
            {},
            {},
            "cohort.quorum 21 is above cohort.size 20",
        ),
        (
            {"size": 4},
            {"at_least": 3},
            {},
            (
                "privacy.drop_fraction 0.3 with corrupt_fraction 0.1 and corrupt_devices 1: 4 "
                "devices cannot lose 1 and still reach the threshold of 3 shares; lower "
                "drop_fraction"
            ),
        ),
        (
            {"size": 20},
            {"drop_fraction": 0.49},
            {},
            (
                "privacy.drop_fraction 0.49 with corrupt_fraction 0.1 and corrupt_devices 1: 18 "
                "devices cannot lose 8"
            ),
        ),
        (
            {},
            {"noise": "distributed"},
            {},
            (
                "privacy.weights 'examples' with noise 'distributed' would send the number of "
                "examples, which is data too, without noise: write weights = 'uniform'"
            ),
        ),
        ({}, {"noise": "central"}, {}, "write weights = 'uniform'"),
        (
            {"size": 257},
            {"noise": "central", "weights": "uniform"},
            {},
            "privacy.noise 'central' is made for the mean of one sum, and cohort.size 257",
        ),
        (
            {"size": 60},
            {"noise": "central", "weights": "uniform"},
            {"group_size": 20, "combine": "median"},
            "with aggregation.group_size 20 makes several: ask 256 devices at most",
        ),
        (
            {},
            {**NOISED, "adaptive_clipping": True},
            {},
            "privacy.adaptive_clipping needs to know how many updates were clipped",
        ),
        (
            {"size": 250},
            {**NOISED, "noise_multiplier": 100.0},
            {},
            "privacy.lane_bits 16 with noise_multiplier 100 and noise_kind 'skellam': 16 bits",
        ),
        (
            {"size": 60},
            {},
            {"combine": "median"},
            (
                "aggregation.combine 'median' needs several sums to compare: a sum hides single "
                "devices, so it cannot be checked one by one; write a group_size"
            ),
        ),
        ({"size": 60}, {}, {"combine": "trimmed-mean"}, "write a group_size"),
        ({"size": 60}, {}, {"combine": "norm-bound", "norm_bound": 1.0}, "write a group_size"),
        (
            {"size": 70},
            {},
            {"group_size": 20, "combine": "median"},
            (
                "cohort.size 70 leaves 10 devices over from groups of aggregation.group_size 20: "
                "write 60 or 80"
            ),
        ),
        ({"size": 10}, {}, {"group_size": 20}, "aggregation.group_size 20: write 20"),
        (
            {"size": 48},
            {},
            {"group_size": 16, "combine": "median"},
            (
                "aggregation.group_size 16 is below the 18 devices that a sum must be of: "
                "privacy.at_least 16 honest ones and 2 that may be corrupted; raise it to "
                "18 or more"
            ),
        ),
        (
            {"size": 600, "over_selection": 1.5},
            {},
            {"group_size": 200, "combine": "median"},
            "aggregation.group_size 200 with cohort.over_selection asks 300 devices for one sum",
        ),
        (
            {"size": 40},
            {},
            {"group_size": 20, "combine": "median"},
            (
                "aggregation.combine 'median' of 2 groups cannot tell which is wrong: write a "
                "cohort.size of 60 or more"
            ),
        ),
        (
            {"size": 200},
            {},
            {"group_size": 20, "combine": "median", "poisoned_fraction": 0.05},
            (
                "aggregation.poisoned_fraction 0.05 puts a poisoned device into most groups of 20, "
                "and 'median' needs most groups clean: write 0.035 or less, or smaller groups"
            ),
        ),
        (
            {"size": 80},
            {},
            {"group_size": 20, "combine": "trimmed-mean"},
            "aggregation.trim_fraction 0.2 of 4 groups trims none: write 0.25 or more",
        ),
        (
            {"size": 200},
            {},
            {"group_size": 20, "combine": "trimmed-mean", "poisoned_fraction": 0.02},
            (
                "aggregation.poisoned_fraction 0.02 puts a poisoned device into 33% of the groups, "
                "more than the trim_fraction 0.2 takes away"
            ),
        ),
        (
            {},
            {"mode": "plain", "noise": "central"},
            {},
            "privacy.noise 'central' is of sums, and privacy.mode 'plain' has none",
        ),
        (
            {},
            {"mode": "plain", "adaptive_clipping": True},
            {},
            "privacy.adaptive_clipping is of sums, and privacy.mode 'plain' clips nothing",
        ),
        (
            {},
            {"mode": "plain"},
            {"group_size": 20},
            "aggregation.group_size 20 with combine 'mean' means nothing under privacy.mode",
        ),
    ],
)
def test_what_a_sum_cannot_keep_is_refused_with_key_number_and_remedy(
    cohort: dict[str, Any],
    privacy: dict[str, Any],
    aggregation: dict[str, Any],
    sentence: str,
) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_of(cohort, privacy, aggregation)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("combine", ["krum", "multi-krum", "bulyan", "foolsgold"])
def test_robustness_by_single_updates_is_refused_with_the_reason(combine: str) -> None:
    with pytest.raises(ConfigError, match="a sum hides single devices, so it cannot be checked"):
        plan_of({"size": 100}, {}, {"combine": combine, "group_size": 20})


@pytest.mark.parametrize(
    ("aggregation", "sentence"),
    [
        ({"combine": "meen"}, "there is no 'meen'; choose one of 'mean', 'median'"),
        ({"combine": "norm-bound"}, "need each other"),
        ({"norm_bound": 2.0}, "need each other"),
    ],
)
def test_an_aggregation_that_makes_no_sense_is_refused(
    aggregation: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        AggregationPlan(**aggregation)


def test_compression_by_leaving_lanes_out_does_not_exist(tmp_path: Path) -> None:
    """Devices would leave out different lanes, and a sum has no room for which."""
    (tmp_path / "plan.toml").write_text(
        'name = "old"\n[task]\nname = "a"\nuses = "tabular"\n[privacy]\ntop_k = 0.01\n'
    )
    with pytest.raises(ConfigError, match="unknown key 'top_k' in \\[privacy\\]"):
        read_plan(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("size", "poisoned", "refused"),
    [(18, 0.0385, False), (18, 0.0386, True), (30, 0.0231, False), (30, 0.0232, True)],
)
def test_the_edge_of_robustness_is_where_half_of_the_groups_are_hit(
    size: int, poisoned: float, *, refused: bool
) -> None:
    def plan() -> RunPlan:
        return plan_of(
            {"size": 5 * size},
            {},
            {"group_size": size, "combine": "median", "poisoned_fraction": poisoned},
        )

    assert (poisoned * size > math.log(2)) is refused
    if refused:
        with pytest.raises(ConfigError, match="puts a poisoned device into most groups"):
            plan()
    else:
        assert plan().layout().groups == 5


@settings(deadline=None)
@given(
    groups=st.integers(1, 12),
    group_size=st.sampled_from([0, 8, 10, 20, 26, 30]),
    over_selection=st.sampled_from([1.0, 1.1, 1.3]),
    privacy=st.fixed_dictionaries(
        {
            "at_least": st.integers(1, 20),
            "corrupt_fraction": st.sampled_from([0.0, 0.05, 0.1, 0.2]),
            "drop_fraction": st.sampled_from([0.0, 0.1, 0.3]),
        }
    ),
)
def test_every_roster_of_an_accepted_plan_can_end_in_a_sum_and_holds_its_promise(
    groups: int, group_size: int, over_selection: float, privacy: dict[str, Any]
) -> None:
    cohort = {"size": groups * (group_size or 83), "over_selection": over_selection}
    try:
        plan = plan_of(cohort, privacy, {"group_size": group_size})
    except ConfigError:
        reject()
    for grouped in (True, False):
        layout = plan.layout(grouped=grouped)
        assert layout.max_roster * layout.groups >= plan.cohort.asked
        assert layout.min_survivors <= layout.wanted <= layout.max_roster <= 256
        promised = layout.honest_survivors
        assert promised >= privacy["at_least"]
        for roster in range(layout.min_survivors, layout.max_roster + 1):
            check_roster_size(layout, roster)
            assert survivors_needed(layout, roster) - corrupted_of(layout, roster) >= promised


@pytest.mark.parametrize(
    ("group_size", "drops", "threshold"), [(26, 2, 23), (30, 3, 26), (20, 2, 17), (19, 1, 17)]
)
def test_groups_have_a_high_threshold_and_still_lose_a_tenth(
    group_size: int, drops: int, threshold: int
) -> None:
    """R4: of few devices, chance puts more than c corrupted ones into a group."""
    layout = plan_of({"size": 3 * group_size}, {}, {"group_size": group_size}).layout()
    assert layout.threshold == "group"
    assert layout.tolerated_drops == drops
    assert threshold_of(layout, group_size) == threshold
    check_roster_size(layout, group_size)


def test_measuring_never_uses_groups() -> None:
    plan = plan_of({"size": 200}, {}, {"group_size": 20, "combine": "median"})
    assert plan.layout().groups == 10
    assert plan.layout(grouped=False).groups == 1
    assert plan.layout(grouped=False).max_roster == 200


@pytest.mark.parametrize(
    ("size", "groups", "largest"), [(256, 1, 256), (257, 2, 129), (1000, 4, 250), (1025, 5, 205)]
)
def test_what_one_graph_cannot_hold_is_several_shards(size: int, groups: int, largest: int) -> None:
    layout = plan_of({"size": size}).layout()
    assert (layout.groups, layout.max_roster) == (groups, largest)


def test_a_round_needs_most_of_its_groups_and_three_to_compare() -> None:
    plan = plan_of({"size": 60}, {}, {"group_size": 20, "combine": "median"})
    assert plan.cohort.quorum == 3 * 18
    plan = plan_of({"size": 200}, {}, {"group_size": 20, "combine": "mean"})
    assert plan.cohort.quorum == 6 * 18
    plan = plan_of({"size": 200, "quorum": 190}, {}, {"group_size": 20, "combine": "mean"})
    assert plan.cohort.quorum == 190


def test_plain_rounds_need_one_device_unless_told_otherwise() -> None:
    assert plan_of({"size": 2}, {"mode": "plain"}).cohort.quorum == 1
    assert plan_of({"size": 2, "quorum": 2}, {"mode": "plain"}).cohort.quorum == 2


def test_noise_is_shared_among_the_honest_devices_of_each_group() -> None:
    """R6: what counts is what is certain to be in the sum that the coordinator sees."""
    cohort = {"size": 200}
    one, groups = plan_of(cohort, NOISED), plan_of(cohort, NOISED, {"group_size": 20})
    assert groups.layout().honest_survivors == 16
    assert one.layout().honest_survivors == 30  # 36 of 51, of whom 6 may be corrupted
    assert plan_of(cohort, {**NOISED, "at_least": 100}).layout().honest_survivors == 102


def test_the_demo_of_five_devices_fits_with_its_own_floor() -> None:
    layout = plan_of({"size": 5}, {"at_least": 4}).layout()
    assert (layout.min_survivors, layout.tolerated_drops) == (5, 0)
