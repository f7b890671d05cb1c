import math
import os
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from cloud_coordinator.rounds.plan_explanation import explain
from cloud_coordinator.rounds.robust import mean_of
from cloud_coordinator.rounds.sum_plan import (
    MAX_EXAMPLES,
    SumOccasion,
    SumQuestionSpec,
    evaluation_spec,
    exact_lane,
    make_config,
    training_spec,
)
from shared.errors import ConfigError
from shared.privacy_plan import AggregationPlan, PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan
from shared.secure_sum.accounting import charge_of, gaussian_rdp, sum_sigma
from shared.secure_sum.config import SumConfig, decode_config, encode_config
from shared.secure_sum.encoding import decode_sum, encode
from shared.secure_sum.masking import Lanes
from shared.tasks.spec import TaskSpec

TASK = TaskSpec(name="pumps", uses="tabular")
NOISED: dict[str, Any] = {"noise": "distributed", "weights": "uniform"}
DIGEST = "a" * 64
BOUNDS = {"examples": 1.0, "loss_sum": 20.0, "correct": 1.0}


def plan_of(
    size: int = 20,
    privacy: dict[str, Any] | None = None,
    aggregation: dict[str, Any] | None = None,
    **more: Any,
) -> RunPlan:
    return RunPlan(
        name="first",
        task=TASK,
        cohort=CohortPlan(size=size, **more),
        privacy=PrivacyPlan(**privacy or {}),
        aggregation=AggregationPlan(**aggregation or {}),
    )


def config_for(plan: RunPlan, question: SumQuestionSpec, **changed: Any) -> SumConfig:
    layout = plan.layout(grouped=question.purpose == "train")
    given: dict[str, Any] = {"roster_max": layout.max_roster} | changed
    occasion = SumOccasion(
        run_id="run-1",
        fleet="main",
        round_number=3,
        group=0,
        groups=layout.groups,
        session=bytes(32),
        server_key=bytes(32),
        membership_version=1,
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
        mask_algorithm="aes-128-ctr",
        rotation_seed=bytes(range(16)),
    )
    return make_config(plan, question, occasion, **given)


def training(plan: RunPlan, length: int = 1000) -> SumQuestionSpec:
    return training_spec(plan, length=length, question_digest=DIGEST, base_digest=DIGEST)


def evaluation(plan: RunPlan) -> SumQuestionSpec:
    return evaluation_spec(plan, BOUNDS, question_digest=DIGEST, base_digest=DIGEST)


def lanes_of(config: SumConfig) -> list[str]:
    return [lane.name for lane in config.exact_lanes]


def test_a_config_says_what_the_plan_says() -> None:
    plan = plan_of(20, {"at_least": 12, "drop_fraction": 0.2, "corrupt_devices": 3})
    config = config_for(plan, training(plan))
    assert (config.min_survivors, config.max_roster) == (15, 20)
    assert (config.at_least, config.corrupt_devices, config.drop_fraction) == (12, 3, 0.2)
    assert config.threshold == "majority"
    assert config.task_digest == TASK.digest
    assert config.encoding.rotation_seed == bytes(range(16))
    assert decode_config(encode_config(config)) == config


def test_fewer_devices_than_planned_have_a_smaller_roster() -> None:
    plan = plan_of(40)
    assert config_for(plan, training(plan)).min_survivors == 20
    fewer = config_for(plan, training(plan), roster_max=25)
    assert (fewer.max_roster, fewer.min_survivors) == (25, 20)  # the quorum holds
    plan = plan_of(300)
    fewer = config_for(plan, training(plan), roster_max=25)
    assert (fewer.max_roster, fewer.min_survivors) == (25, 19)  # one shard of two


@pytest.mark.parametrize(
    ("privacy", "lanes"),
    [
        ({}, ["examples", "seen", "loss_sum"]),
        ({"weights": "uniform"}, ["seen", "loss_sum"]),
        ({"adaptive_clipping": True}, ["examples", "seen", "loss_sum", "unclipped"]),
        (NOISED, []),
        ({"noise": "central", "weights": "uniform"}, ["seen", "loss_sum"]),
    ],
)
def test_exact_lanes_never_stand_beside_noise(privacy: dict[str, Any], lanes: list[str]) -> None:
    plan = plan_of(privacy=privacy)
    config = config_for(plan, training(plan))
    assert lanes_of(config) == lanes
    assert (config.noise is not None) == (privacy.get("noise") == "distributed")


def test_the_weight_is_bounded_by_the_plan() -> None:
    plan = plan_of(privacy={"max_weight": 77})
    assert config_for(plan, training(plan)).exact_lanes[0].max_steps == 77


def test_an_exact_evaluation_is_of_exact_lanes_alone() -> None:
    plan = plan_of()
    config = config_for(plan, evaluation(plan))
    assert config.encoding.length == 0
    assert lanes_of(config) == sorted(BOUNDS)


def test_a_noised_evaluation_is_of_wide_noised_lanes_alone() -> None:
    plan = plan_of(privacy=NOISED)
    config = config_for(plan, evaluation(plan))
    assert config.exact_lanes == ()
    assert (config.encoding.length, config.encoding.lane_bits) == (3, 32)
    assert config.encoding.clip_norm == pytest.approx(math.sqrt(3))
    assert config.encoding.rotation_seed is None
    assert config.noise is not None


def test_measuring_is_one_sum_though_training_is_in_groups() -> None:
    plan = plan_of(60, aggregation={"group_size": 20, "combine": "median"})
    trained, measured = config_for(plan, training(plan)), config_for(plan, evaluation(plan))
    assert (trained.groups, trained.threshold, trained.drop_fraction) == (3, "group", 0.1)
    assert (measured.groups, measured.threshold, measured.drop_fraction) == (1, "majority", 0.3)
    assert measured.min_survivors == 22  # not the round's quorum of 54


@pytest.mark.parametrize("value", [0, 1, 12_345_678, MAX_EXAMPLES])
def test_counts_come_back_whole_and_losses_finely(value: int) -> None:
    plan = plan_of()
    config = config_for(plan, evaluation(plan))
    none = np.empty(0, np.float64)
    values = {"examples": value, "correct": value // 3, "loss_sum": value / 7}
    lanes = encode(config, none, values, rng=np.random.default_rng(0), entropy=os.urandom)
    total = Lanes(lanes.main, (lanes.exact * np.uint64(18)).astype(np.uint64))
    exact = decode_sum(config, total, count=18)[1]
    assert exact["examples"] == 18 * value
    assert exact["correct"] == 18 * (value // 3)
    assert exact["loss_sum"] == pytest.approx(18 * value / 7, rel=1e-9, abs=1e-3)


def test_lanes_hold_what_one_device_may_say_at_any_bound() -> None:
    for bound in (1e-6, 1.0, 20.0, 1e4, 1e12):
        lane = exact_lane("loss_sum", bound)
        assert bound * MAX_EXAMPLES <= lane.max_steps / lane.steps_per_unit
        assert 256 * 2 * lane.max_steps < 2**64


def test_updates_come_back_as_their_weighted_mean() -> None:
    plan = plan_of(privacy={"clip_norm": 5.0, "max_weight": 100})
    config = config_for(plan, training(plan))
    rng = np.random.default_rng(4)
    updates = [row * 3 / np.linalg.norm(row) for row in rng.normal(size=(20, 1000)) + 0.2]
    weights = [5 * at + 1 for at in range(20)]
    main = np.zeros(1000, np.uint16)
    exact = np.zeros(3, np.uint64)
    for update, weight in zip(updates, weights, strict=True):
        statistics = {"examples": weight, "seen": weight, "loss_sum": 0.25 * weight}
        lanes = encode(config, update * (weight / 100), statistics, rng=rng, entropy=os.urandom)
        main += lanes.main.astype(np.uint16)
        exact += lanes.exact

    total, sums = decode_sum(config, Lanes(main, exact), count=20)
    mean = mean_of(config, total, sums, count=20)

    wanted = np.average(updates, axis=0, weights=weights)
    assert np.linalg.norm(mean - wanted) < 0.02 * np.linalg.norm(wanted)
    assert sums["loss_sum"] == pytest.approx(0.25 * sum(weights))


def test_noise_is_that_of_each_sum_though_groups_are_small() -> None:
    """R6: a device's charge is that of the sum it is in, whose shares are of its own group."""
    charges = {}
    for group_size in (0, 20):
        plan = plan_of(200, NOISED, {"group_size": group_size})
        config = config_for(plan, training(plan, 10_000))
        assert config.noise is not None
        assert config.noise.survivors == plan.layout().honest_survivors
        assert sum_sigma(config) == pytest.approx(10.0, rel=0.02)  # of clip_norm 10
        charges[group_size] = charge_of(config).epsilon(1e-6)
        assert charges[group_size] == pytest.approx(gaussian_rdp(1).epsilon(1e-6), rel=0.05)
    assert charges[0] == pytest.approx(charges[20], rel=0.02)


def test_shares_that_are_counted_on_but_need_not_be_there_are_charged() -> None:
    """With the noise of the whole cohort, the sum of one small group costs far more (R6)."""
    plan = plan_of(200, NOISED, {"group_size": 20})
    config = config_for(plan, training(plan, 10_000))
    whole = config_for(plan_of(200, {**NOISED, "at_least": 100}), training(plan, 10_000))
    wrong = SumConfig(
        **{f: getattr(config, f) for f in config.__struct_fields__}
        | {
            "noise": whole.noise,
            "encoding": whole.encoding,
        }
    )
    assert charge_of(wrong).epsilon(1e-6) > 2 * charge_of(config).epsilon(1e-6)


def test_a_clip_that_was_adapted_replaces_the_plans() -> None:
    plan = plan_of(privacy={"adaptive_clipping": True})
    assert config_for(plan, training(plan), clip_norm=0.7).encoding.clip_norm == 0.7
    assert config_for(plan, training(plan)).encoding.clip_norm == 10.0


def test_a_model_too_large_for_its_lanes_is_refused_with_the_remedy() -> None:
    privacy = {**NOISED, "noise_multiplier": 40.0}
    plan = plan_of(20, privacy)
    with pytest.raises(ConfigError, match="take 32 bits"):
        config_for(plan, training(plan, 1_000_000_000))


def said(plan: RunPlan, length: int | None = None) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in explain(plan, length=length))


def test_an_explanation_names_what_is_promised_and_what_is_not() -> None:
    lines = said(plan_of(), 100_000)
    assert list(lines) == [
        "devices",
        "losses",
        "anonymity set",
        "upload",
        "noise",
        "poisoned devices",
        "owners",
    ]
    assert "18 survivors: 16 honest ones (at_least) and 2" in lines["devices"]
    assert "2 of 20" in lines["losses"]
    assert "11 of 19 shares" in lines["losses"]
    assert "2 bytes for each parameter, 200,000 bytes for 100,000" in lines["upload"]
    assert "no ε is promised" in lines["noise"]
    assert "none are tolerated" in lines["poisoned devices"]
    assert lines["owners"] == "their policies must say exact_sums = true"


def test_what_the_plan_says_of_epsilon_is_what_devices_book() -> None:
    plan = plan_of(100, {**NOISED, "noise_multiplier": 2.0})
    charge = charge_of(config_for(plan, training(plan, 100_000))).times(plan.rounds)
    stated = float(said(plan)["privacy"].split("ε = ")[1].split()[0])
    assert stated == pytest.approx(charge.epsilon(1e-6), rel=0.05)
    assert said(plan)["owners"].startswith("what their policies allow")


def test_groups_are_said_to_be_the_anonymity_set_and_to_cost_noise() -> None:
    plan = plan_of(180, {**NOISED}, {"group_size": 20, "combine": "median"})
    lines = said(plan)
    assert lines["anonymity set"].startswith("a group of 20, 16 honest ones at least, and not the")
    assert "√9 = 3 times" in lines["noise"]


def test_shards_are_said_to_be_the_anonymity_set() -> None:
    assert said(plan_of(1000))["anonymity set"].startswith("a shard of 250")


@pytest.mark.parametrize(
    ("aggregation", "sentence"),
    [
        ({"combine": "median"}, "any 4, and any number within 4 of the 9 groups, by median"),
        (
            {"combine": "median", "poisoned_fraction": 0.03},
            "poisoned_fraction 0.03 reaches 46% of the groups on average",
        ),
        (
            {"combine": "trimmed-mean", "trim_fraction": 0.25},
            "any 2, and any number within 2 of the 9 groups, by trimmed-mean",
        ),
        (
            {"combine": "norm-bound", "norm_bound": 1.8},
            "each group that holds one moves the mean by 0.4 at most",
        ),
    ],
)
def test_the_number_of_tolerated_poisoned_devices_is_said(
    aggregation: dict[str, Any], sentence: str
) -> None:
    plan = plan_of(180, {}, {"group_size": 20, **aggregation})
    assert sentence in said(plan)["poisoned devices"]


def test_central_noise_is_said_to_be_a_promise() -> None:
    lines = said(plan_of(privacy={"noise": "central", "weights": "uniform"}))
    assert "promised by the coordinator and enforced by nobody" in lines["noise"]
    assert "ledgers count the sums as exact" in lines["privacy"]
    assert "exact_sums = true" in lines["owners"]


def test_a_floor_below_the_owners_default_is_said() -> None:
    lines = said(plan_of(5, {"at_least": 4}))
    assert lines["owners"] == "their policies must say min_cohort = 5 or less and exact_sums = true"


def test_plain_rounds_are_said_to_hide_nothing() -> None:
    lines = said(plan_of(5, {"mode": "plain"}))
    assert lines["plain rounds"] == "the coordinator sees every device's update"
    assert lines["owners"] == "their policies must say individual_updates = true"
