import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_coordinator.rounds.clipping import (
    add_central_noise,
    central_charge,
    mean_multiplier,
    next_clip_norm,
    noised_count,
)


@pytest.mark.parametrize("start", [0.01, 1.0, 300.0])
def test_the_clip_finds_the_quantile_that_is_wanted(start: float) -> None:
    norms = np.random.default_rng(0).lognormal(mean=1.0, sigma=0.5, size=1001)
    clip = start
    for _ in range(200):
        clip = next_clip_norm(
            clip,
            unclipped=float((norms <= clip).sum()),
            count=len(norms),
            target=0.5,
            learning_rate=0.2,
        )
    assert clip == pytest.approx(np.median(norms), rel=0.02)


@given(clip=st.floats(1e-6, 1e9), unclipped=st.floats(-100, 100), target=st.floats(0.01, 0.99))
def test_one_step_is_bounded_whatever_the_count(
    clip: float, unclipped: float, target: float
) -> None:
    moved = next_clip_norm(clip, unclipped=unclipped, count=20, target=target, learning_rate=0.2)
    assert math.exp(-0.2) * clip * (1 - 1e-9) <= moved <= math.exp(0.2) * clip * (1 + 1e-9) or (
        moved in {1e-6, 1e9}
    )


@given(multiplier=st.floats(0.01, 100), count=st.integers(2, 100_000))
def test_mean_and_count_together_cost_what_the_plan_says(multiplier: float, count: int) -> None:
    of_mean = mean_multiplier(multiplier, count, adaptive=True)
    of_count = 2 * max(count / 20, multiplier)  # a sensitivity of 1/2
    assert of_mean**-2 + of_count**-2 == pytest.approx(multiplier**-2)
    assert multiplier <= of_mean <= 1.16 * multiplier


def test_a_fixed_clip_spends_nothing_on_a_count() -> None:
    assert mean_multiplier(1.3, 20, adaptive=False) == 1.3


def test_central_noise_has_the_deviation_it_says_and_no_bias() -> None:
    noised = add_central_noise(np.full(100_000, 5.0), 0.25, np.random.default_rng(3))
    assert noised.std() == pytest.approx(0.25, rel=0.02)
    assert noised.mean() == pytest.approx(5.0, abs=0.005)


def test_the_count_is_noised_too() -> None:
    rng = np.random.default_rng(1)
    counts = [noised_count(50, 100, 1.0, rng) for _ in range(4000)]
    assert np.std(counts) == pytest.approx(5.0, rel=0.05)


def test_what_is_promised_grows_with_the_rounds_and_falls_with_the_noise() -> None:
    epsilons = [central_charge(z, rounds).epsilon(1e-6) for z, rounds in [(2, 1), (1, 1), (1, 10)]]
    assert epsilons == sorted(epsilons)
    # One Gaussian of σ = 1: the exact ε at δ = 1e-6 is 4.89 (Balle and Wang, 2018); RDP is above.
    assert 4.8 < epsilons[1] < 5.4
