import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.secure_sum.choice import choose_encoding, largest_roster, largest_steps
from shared.secure_sum.config import Encoding, LaneBits, Noise
from shared.secure_sum.noise import sensitivity_of, share_variance, sum_variance
from shared.secure_sum.rotation import rotate
from tests.unit.shared.secure_sum.whole_sum import config_of

SEED = bytes(range(16))


def choose(**changes: Any) -> Encoding:
    fields: dict[str, Any] = {
        "length": 1_000_000,
        "lane_bits": 16,
        "clip_norm": 1.0,
        "max_roster": 100,
        "rotate": True,
        "noise": None,
        "rotation_seed": SEED,
    }
    return choose_encoding(**{**fields, **changes})


@given(bits=st.sampled_from([16, 32]), devices=st.integers(2, 256))
def test_without_noise_a_roster_uses_the_whole_range_and_not_more(
    bits: LaneBits, devices: int
) -> None:
    steps = largest_steps(bits, devices)

    assert devices * 2 * steps < 2**bits <= devices * 2 * (steps + 1)
    assert largest_roster(bits, steps) >= devices
    assert largest_roster(bits, steps) * 2 * steps < 2**bits
    assert (largest_roster(bits, steps) + 1) * 2 * steps >= 2**bits


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("length", [0, 1, 1000])
@pytest.mark.parametrize("rotated", [False, True])
def test_what_is_chosen_is_a_possible_configuration(
    *,
    bits: LaneBits,
    length: int,
    rotated: bool,
) -> None:
    chosen = choose(length=length, lane_bits=bits, rotate=rotated)

    config_of(encoding=chosen, max_roster=100)  # raises if not
    assert (chosen.rotation_seed is not None) == rotated


def test_without_rotation_a_coordinate_may_be_as_large_as_the_clip_norm() -> None:
    chosen = choose(rotate=False, clip_norm=4.0)

    assert chosen.max_steps == 327
    assert chosen.steps_per_unit == pytest.approx(327 / 4)


def test_rotation_makes_steps_finer_by_what_it_spreads() -> None:
    plain, rotated = choose(rotate=False), choose(rotate=True)

    # 2^19 coordinates share the norm: k/√B = 5/724.
    assert rotated.steps_per_unit / plain.steps_per_unit == pytest.approx(math.sqrt(2**19) / 5)


@pytest.mark.parametrize("shape", ["spike", "block", "noise"])
def test_hardly_a_coordinate_is_clamped_after_the_rotation(shape: str) -> None:
    length = 100_000
    chosen = choose(length=length)
    vector = np.zeros(length)
    vector[{"spike": slice(7, 8), "block": slice(0, 300), "noise": slice(None)}[shape]] = 1.0
    vector *= np.random.default_rng(1).normal(size=length)
    vector /= np.linalg.norm(vector)

    steps = rotate(vector, SEED) * chosen.steps_per_unit

    assert (np.abs(steps) > chosen.max_steps).mean() < 1e-5


def test_bits_that_cannot_hold_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="too few for 40000 devices; take 32"):
        choose(max_roster=40_000)


@pytest.mark.parametrize(
    ("bits", "length", "multiplier", "survivors"),
    [
        (16, 1_000_000, 1.0, 80),
        (16, 10_000, 4.0, 80),
        (16, 10_000, 10.0, 80),  # as much as fits
        (32, 1_000_000, 0.1, 16),
        (32, 1_000_000, 10.0, 80),
        (32, 10, 1.0, 16),
        (32, 10_000_000, 1.0, 16),
    ],
)
def test_noise_leaves_room_for_six_deviations_beside_the_signal(
    bits: LaneBits, length: int, multiplier: float, survivors: int
) -> None:
    noise = Noise(multiplier=multiplier, survivors=survivors)

    chosen = choose(lane_bits=bits, length=length, noise=noise)

    sigma = math.sqrt(sum_variance(chosen, noise) * 100 / survivors)
    assert 6 * sigma + 100 * chosen.max_steps <= 2 ** (bits - 1)
    assert sensitivity_of(chosen).l2 <= 1.1 * chosen.steps_per_unit  # rounding adds little
    assert share_variance(chosen, noise) > 100  # and neither do coarse steps


def test_wide_lanes_are_not_made_finer_than_noise_can_be_drawn_cheaply() -> None:
    noise = Noise(multiplier=1.0, survivors=80)

    chosen = choose(lane_bits=32, length=1000, noise=noise)

    assert math.sqrt(share_variance(chosen, noise)) == pytest.approx(256, rel=0.02)


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"rotate": False}, "take 32 bits, rotation, a smaller noise multiplier"),
        ({"max_roster": 256, "length": 10**9}, "take 32 bits, a smaller noise multiplier"),
        ({"lane_bits": 32, "length": 10**9, "multiplier": 500.0}, "take a smaller noise multipl"),
    ],
)
def test_lanes_that_are_too_narrow_for_the_noise_are_refused(
    fields: dict[str, Any], advice: str
) -> None:
    noise = Noise(multiplier=fields.pop("multiplier", 1.0), survivors=80)

    with pytest.raises(ConfigError, match=advice):
        choose(noise=noise, **fields)


def test_discrete_gaussians_that_would_be_too_narrow_are_refused() -> None:
    noise = Noise(kind="discrete-gaussian", multiplier=0.001, survivors=80)

    with pytest.raises(ConfigError, match="take Skellam noise"):
        choose(noise=noise, length=100)


def test_the_clip_norm_only_sets_the_unit() -> None:
    noise = Noise(multiplier=1.0, survivors=80)
    for changes in ({"noise": None}, {"noise": noise}):
        one, other = choose(**changes), choose(clip_norm=1e-3, **changes)

        assert one.max_steps == other.max_steps
        assert one.steps_per_unit == pytest.approx(other.steps_per_unit * 1e-3)
