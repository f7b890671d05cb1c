import os
from datetime import UTC, datetime
from statistics import median

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloud_coordinator.rounds.robust import Combiner, bounded, check_sum, mean_of, slack
from shared.errors import PeerError, QuorumError
from shared.privacy_plan import AggregationPlan
from shared.secure_sum.config import Encoding, ExactLane, Noise, SumConfig
from shared.secure_sum.encoding import decode_sum, encode
from shared.secure_sum.masking import Lanes

DEVICES, LENGTH, CLIP, HEAVIEST = 16, 200, 2.0, 100
Floats = NDArray[np.float64]


def config_of(
    *, weighted: bool = True, noise: Noise | None = None, group: int = 3, groups: int = 5
) -> SumConfig:
    return SumConfig(
        session=bytes(32),
        fleet="main",
        run_id="run-1",
        round_number=1,
        purpose="train",
        group=group,
        groups=groups,
        task_digest="0" * 64,
        question_digest="0" * 64,
        base_digest=None,
        min_survivors=14,
        max_roster=DEVICES,
        at_least=12,
        encoding=Encoding(
            lane_bits=16, length=LENGTH, clip_norm=CLIP, steps_per_unit=2000 / CLIP, max_steps=2000
        ),
        exact_lanes=(ExactLane(name="examples", max_steps=HEAVIEST),) if weighted else (),
        noise=noise,
        server_key=bytes(32),
        membership_version=1,
        expires_at=datetime(2030, 1, 1, tzinfo=UTC),
    )


def summed(config: SumConfig, updates: list[Floats], weights: list[int] | None = None) -> Lanes:
    """Add what honest devices send."""
    weighted = weights is not None
    lanes = [
        encode(
            config,
            bounded(update, CLIP) * (weight / HEAVIEST if weighted else 1),
            {"examples": weight} if weighted else {},
            rng=np.random.default_rng(at),
            entropy=os.urandom,
        )
        for at, (update, weight) in enumerate(
            zip(updates, weights or [1] * len(updates), strict=True)
        )
    ]
    main = np.zeros(LENGTH, dtype=np.uint16)
    exact = np.zeros(len(config.exact_lanes), dtype=np.uint64)
    for one in lanes:
        main += one.main.astype(np.uint16)
        exact += one.exact
    return Lanes(main, exact)


def updates_of(count: int, *, norm: float, seed: int = 0) -> list[Floats]:
    rng = np.random.default_rng(seed)
    drawn = rng.normal(0.3, 1.0, size=(count, LENGTH))
    return [row * (norm / np.linalg.norm(row)) for row in drawn]


def mean_in(config: SumConfig, lanes: Lanes, count: int) -> Floats:
    total, exact = decode_sum(config, lanes, count=count)
    return mean_of(config, total, exact, count=count)


def test_honest_devices_give_their_weighted_mean() -> None:
    config, updates = config_of(), updates_of(DEVICES, norm=1.5)
    weights = [1 + 6 * at for at in range(DEVICES)]

    mean = mean_in(config, summed(config, updates, weights), DEVICES)

    wanted = np.average(updates, axis=0, weights=weights)
    assert np.linalg.norm(mean - wanted) < 0.02 * np.linalg.norm(wanted)


@given(seed=st.integers(0, 2**32), norm=st.floats(0, 10), weighted=st.booleans())
def test_no_honest_sum_is_refused(seed: int, norm: float, *, weighted: bool) -> None:
    """The worst case is that all devices agree, at the clip or above, with equal weights."""
    config = config_of(weighted=weighted)
    update = updates_of(1, norm=norm, seed=seed)[0]
    lanes = summed(config, [update] * DEVICES, [HEAVIEST] * DEVICES if weighted else None)
    mean = mean_in(config, lanes, DEVICES)
    assert np.linalg.norm(mean) <= CLIP + slack(config, DEVICES) / DEVICES


@pytest.mark.parametrize("multiplier", [0.1, 0.5, 1.5])
def test_noise_is_no_reason_to_refuse_or_to_shorten(multiplier: float) -> None:
    config = config_of(weighted=False, noise=Noise(multiplier=multiplier, survivors=12))
    lanes = summed(config, updates_of(DEVICES, norm=CLIP), None)
    total, exact = decode_sum(config, lanes, count=DEVICES)
    assert np.allclose(mean_of(config, total, exact, count=DEVICES), total / DEVICES)


@pytest.mark.parametrize("seed", range(5))
def test_one_device_that_sets_every_lane_to_full_range_is_refused_by_name(seed: int) -> None:
    config = config_of()
    lanes = summed(config, updates_of(DEVICES - 1, norm=1.0), [50] * (DEVICES - 1))
    garbage = np.random.default_rng(seed).integers(0, 2**16, LENGTH, dtype=np.uint16)
    lanes.main[:] += garbage
    lanes.exact[:] += np.uint64(50)

    noisy = msgspec.structs.replace(
        config, exact_lanes=(), noise=Noise(multiplier=1.0, survivors=12)
    )
    total = decode_sum(noisy, Lanes(lanes.main, lanes.exact[:0]), count=DEVICES)[0]
    with pytest.raises(PeerError, match=r"group 3 is left out: a norm of"):
        check_sum(config, total, {"examples": 800.0}, DEVICES)


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        (-1.0, "-1 examples cannot be of 16 devices with at most 100 each"),
        (1601.0, "1601 examples cannot be of 16 devices with at most 100 each"),
    ],
)
def test_weights_that_nobody_honest_claims_are_refused_by_name(examples: float, said: str) -> None:
    with pytest.raises(PeerError, match=f"group 3 is left out: {said}"):
        check_sum(config_of(), np.zeros(LENGTH), {"examples": examples}, DEVICES)


def test_a_sum_of_no_examples_has_no_mean() -> None:
    with pytest.raises(PeerError, match="claim no examples"):
        mean_of(config_of(), np.zeros(LENGTH), {"examples": 0.0}, count=DEVICES)


def test_a_round_in_which_the_training_of_all_devices_diverged_says_what_to_do() -> None:
    seen = (ExactLane(name="seen", max_steps=1000),)
    config = msgspec.structs.replace(config_of(), exact_lanes=seen)

    with pytest.raises(PeerError, match=r"diverged; lower training\.learning_rate"):
        mean_of(config, np.zeros(LENGTH), {"seen": 0.0}, count=DEVICES)


def test_a_large_update_with_a_small_weight_cannot_lift_the_mean_beyond_the_clip() -> None:
    config = config_of()
    lanes = summed(config, updates_of(DEVICES, norm=CLIP), [1] * (DEVICES - 1) + [HEAVIEST])
    lanes.exact[:] -= np.uint64(HEAVIEST - 1)  # the last claims 1 for what it sent at full weight

    mean = mean_in(config, lanes, DEVICES)

    assert np.linalg.norm(mean) <= (CLIP + slack(config, DEVICES) * HEAVIEST / DEVICES) * 1.001
    assert np.linalg.norm(mean) < 2 * CLIP


def combined(combine: str, means: list[Floats], counts: list[int], **plan: float) -> Floats:
    combiner = Combiner(
        AggregationPlan(group_size=16, combine=combine, **plan),
        groups=len(means),
        round_number=4,
    )
    for mean, count in zip(means, counts, strict=True):
        combiner.add(mean, count)
    return combiner.result()


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=12),
    data=st.data(),
)
def test_mean_and_median_are_those_of_the_groups(values: list[float], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 20), min_size=len(values), max_size=len(values)))
    means = [np.full(3, value) for value in values]

    assert np.allclose(combined("median", means, counts), median(values), atol=1e-3)
    weighted = np.average(values, weights=counts)
    assert np.allclose(combined("mean", means, counts), weighted, atol=1e-6)


@pytest.mark.parametrize("poisoned", [0, 1, 2])
@pytest.mark.parametrize(
    ("combine", "plan"), [("median", {}), ("trimmed-mean", {"trim_fraction": 0.4})]
)
def test_two_poisoned_groups_of_five_leave_the_result_among_the_honest(
    combine: str, plan: dict[str, float], poisoned: int
) -> None:
    rng = np.random.default_rng(poisoned)
    honest = [rng.normal(size=100_000) for _ in range(5 - poisoned)]
    attack = [np.full(100_000, 1e6)] * poisoned

    result = combined(combine, honest + attack, [16] * 5, **plan)

    assert (np.min(honest, axis=0) - 1e-6 <= result).all()
    assert (result <= np.max(honest, axis=0) + 1e-6).all()


def test_three_poisoned_groups_of_five_are_too_many_for_the_median() -> None:
    means = [np.zeros(4)] * 2 + [np.full(4, 1e6)] * 3
    assert (combined("median", means, [16] * 5) == 1e6).all()


def test_a_norm_bound_limits_what_one_group_moves() -> None:
    honest = [np.full(4, 0.25)] * 4
    moved = combined("norm-bound", [*honest, np.full(4, 1e6)], [16] * 5, norm_bound=1.0)
    assert np.linalg.norm(moved - combined("mean", honest, [16] * 4)) <= 2 * 1.0 / 5


def test_as_many_are_trimmed_as_was_planned_though_groups_are_missing() -> None:
    plan = AggregationPlan(group_size=16, combine="trimmed-mean", trim_fraction=0.2)
    combiner = Combiner(plan, groups=5, round_number=1)
    for value in (0.0, 1.0, 2.0, 1e6):  # a fifth of four groups would be none
        combiner.add(np.full(2, value), 16)
    assert (combiner.result() == 1.5).all()


def test_two_groups_cannot_outvote_each_other() -> None:
    with pytest.raises(QuorumError, match="round 4 has 2 of the 3 sums it needs"):
        combined("median", [np.zeros(2)] * 2, [16, 16])


def test_groups_weigh_their_survivors() -> None:
    means = [np.zeros(2), np.ones(2)]
    assert combined("mean", means, [30, 10]) == pytest.approx([0.25, 0.25])


def test_the_mean_of_many_groups_needs_room_for_one() -> None:
    combiner = Combiner(AggregationPlan(), groups=4, round_number=1)
    for value in range(4):
        combiner.add(np.full(10, float(value)), 250)
    assert combiner._kept == []
    assert combiner.result() == pytest.approx(np.full(10, 1.5))
    assert (combiner.count, combiner.sums) == (1000, 4)
