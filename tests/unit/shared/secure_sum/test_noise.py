import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError, PeerError
from shared.secure_sum.config import (
    Noise,
    SumConfig,
    check_roster_size,
    corrupted_of,
    survivors_needed,
)
from shared.secure_sum.noise import (
    add_share,
    certain_shares,
    sensitivity_of,
    share_variance,
    sum_variance,
)
from tests.unit.shared.secure_sum.whole_sum import Entropy, config_of, encoding_of


@given(length=st.integers(1, 10**9), clip_steps=st.floats(1, 1e9))
def test_rounding_makes_the_sensitivity_larger_and_never_smaller(
    length: int, clip_steps: float
) -> None:
    sensitivity = sensitivity_of(encoding_of(length=length, steps_per_unit=clip_steps))

    assert clip_steps**2 - 1 <= sensitivity.l2_squared <= (clip_steps + math.sqrt(length)) ** 2
    assert sensitivity.l2_squared == math.floor(sensitivity.l2_squared)


@given(
    integers=st.lists(st.integers(-50, 50), min_size=1, max_size=40),
)
def test_the_l1_sensitivity_holds_for_all_integers_within_the_l2_one(integers: list[int]) -> None:
    norm = math.sqrt(sum(value**2 for value in integers))
    encoding = encoding_of(length=len(integers), steps_per_unit=max(norm, 0.1))

    sensitivity = sensitivity_of(encoding)

    assert sum(value**2 for value in integers) <= sensitivity.l2_squared + 1e-6
    assert sum(map(abs, integers)) <= sensitivity.l1 * (1 + 1e-9)


@pytest.mark.parametrize("kind", ["skellam", "discrete-gaussian"])
def test_the_shares_of_the_survivors_add_up_to_the_noise_of_the_sum(kind: Any) -> None:
    encoding = encoding_of(lane_bits=32, length=100_000, steps_per_unit=500.0)
    noise = Noise(kind=kind, multiplier=0.5, survivors=5)
    total = np.zeros(100_000, np.uint32)

    for device in range(5):
        add_share(total, encoding, noise, entropy=Entropy(device))

    variance = total.view(np.int32).astype(float).var()
    assert variance == pytest.approx(0.25 * sensitivity_of(encoding).l2_squared, rel=0.02)
    assert variance == pytest.approx(sum_variance(encoding, noise), rel=0.02)


def test_discrete_gaussians_of_less_than_two_steps_are_refused() -> None:
    encoding = encoding_of(length=1, steps_per_unit=10.0)
    sensitivity = sensitivity_of(encoding).l2

    def gaussian(steps: float) -> Noise:
        return Noise(kind="discrete-gaussian", multiplier=3 * steps / sensitivity, survivors=9)

    assert share_variance(encoding, gaussian(2.001)) == pytest.approx(4, rel=1e-2)
    with pytest.raises(ConfigError, match="take Skellam noise, or more steps_per_unit"):
        share_variance(encoding, gaussian(1.999))


def test_a_share_that_no_device_could_draw_is_refused() -> None:
    for steps in (1e6, 1e30, 1e300):
        with pytest.raises(ConfigError, match="steps_per_unit"):
            share_variance(
                encoding_of(length=1, steps_per_unit=steps), Noise(multiplier=1, survivors=1)
            )


@given(
    min_survivors=st.integers(2, 40),
    more=st.integers(0, 60),
    at_least=st.integers(1, 30),
    corrupt_fraction=st.floats(0, 0.49),
    corrupt_devices=st.integers(1, 10),
    drop_fraction=st.floats(0, 0.49),
)
def test_every_roster_that_devices_accept_holds_the_certain_shares(
    more: int, **fields: Any
) -> None:
    config = config_of(
        encoding=encoding_of(max_steps=1),
        max_roster=fields["min_survivors"] + more,
        **fields,
    )

    certain = certain_shares(config)

    honest = [
        survivors_needed(config, size) - corrupted_of(config, size)
        for size in range(2, config.max_roster + 1)
        if _is_accepted(config, size)
    ]
    assert all(count >= certain for count in honest)
    assert certain >= config.at_least or not certain


def test_the_least_roster_decides_how_many_shares_are_certain() -> None:
    config = config_of(
        encoding=encoding_of(max_steps=1),
        min_survivors=70,
        max_roster=100,
        at_least=16,
        corrupt_fraction=0.1,
    )

    assert certain_shares(config) == 60  # of 100, 70 survive and 10 of those may lie


def _is_accepted(config: SumConfig, size: int) -> bool:
    try:
        check_roster_size(config, size)
    except PeerError:
        return False
    return True
