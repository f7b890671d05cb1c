import math
import warnings
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.secure_sum.accounting import (
    ORDERS,
    RdpCurve,
    charge_of,
    discrete_gaussian_rdp,
    gaussian_rdp,
    skellam_rdp,
    sum_sigma,
)
from shared.secure_sum.config import Noise, SumConfig
from shared.secure_sum.noise import Sensitivity
from tests.unit.shared.secure_sum.whole_sum import config_of, encoding_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the libraries it loads
    from dp_accounting.dp_event import GaussianDpEvent
    from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
    from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant

curves = st.lists(st.floats(0, 1e6), min_size=len(ORDERS), max_size=len(ORDERS)).map(
    lambda values: RdpCurve(tuple(values))
)


def noised(**changes: Any) -> SumConfig:
    fields: dict[str, Any] = {
        "encoding": encoding_of(lane_bits=32, length=1000, steps_per_unit=1000.0),
        "exact_lanes": (),
        "noise": Noise(multiplier=1.0, survivors=16),
        "min_survivors": 20,
        "max_roster": 30,
    }
    return config_of(**{**fields, **changes})


# --- the law of integers, in logarithms, by a road of its own ------------------------------------


def log_skellam(variance: float, reach: int) -> NDArray[np.float64]:
    """ln P(-reach), ..., ln P(reach): ratios I_k / I_(k-1) by their continued fraction."""
    ratios = np.zeros(reach + 2)
    for k in range(reach, 0, -1):
        ratios[k] = 1 / (2 * k / variance + ratios[k + 1])
    half = np.concatenate([[0.0], np.cumsum(np.log(ratios[1 : reach + 1]))])
    return normalised(np.concatenate([half[:0:-1], half]))


def log_sum_of_gaussians(share: float, shares: int, reach: int) -> NDArray[np.float64]:
    """ln P of a sum of discrete Gaussians; in floats, so good where P is above 1e-250."""
    values = np.arange(-reach, reach + 1)
    one = np.exp(-(values**2) / (2 * share))
    law = np.ones(1)
    for _ in range(shares):
        law = np.convolve(law, one / one.sum())
    middle = len(law) // 2
    with np.errstate(divide="ignore"):
        return normalised(np.log(law[middle - reach : middle + reach + 1]))


def normalised(logs: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(logs - np.logaddexp.reduce(logs))


def divergence(logs: NDArray[np.float64], shift: int, order: int) -> float:
    """The Rényi divergence between the law and itself moved by ``shift``."""
    moved, still = logs[:-shift], logs[shift:]
    terms = order * moved + (1 - order) * still
    largest = int(terms.argmax())
    assert 0 < largest < len(terms) - 1, "the law is cut off where it matters"
    return float(np.logaddexp.reduce(terms)) / (order - 1)


@pytest.mark.parametrize("variance", [0.5, 4.0, 100.0, 1000.0, 1e4])
@pytest.mark.parametrize("shift", [1, 2, 5, 20])
def test_the_skellam_curve_is_above_the_exact_divergence(variance: float, shift: int) -> None:
    curve = skellam_rdp(Sensitivity(shift, shift**2), variance)

    for order in (2, 3, 5, 16, 64, 256, 1024):
        reach = math.ceil(200 + 20 * variance**0.5 + 3 * order * shift)
        exact = divergence(log_skellam(variance, reach), shift, order)
        assert exact <= curve.epsilons[ORDERS.index(order)]


@pytest.mark.parametrize(
    ("variance", "shift", "order", "factor"),
    [
        (100, 1, 2, 1.03),
        (100, 5, 2, 1.02),
        (1000, 1, 64, 1.003),
        (1000, 5, 64, 1.03),
        (1e4, 1, 1024, 1.003),
        (1e4, 5, 64, 1.001),
        (1e4, 20, 16, 1.001),
    ],
)
def test_the_skellam_curve_is_tight_where_noise_is_wide(
    variance: float, shift: int, order: int, factor: float
) -> None:
    curve = skellam_rdp(Sensitivity(shift, shift**2), variance)
    reach = math.ceil(200 + 20 * variance**0.5 + 3 * order * shift)

    exact = divergence(log_skellam(variance, reach), shift, order)

    assert curve.epsilons[ORDERS.index(order)] <= factor * exact


def test_the_skellam_curve_is_that_of_the_paper() -> None:
    order = ORDERS.index(4)

    # 4·9/(2·10) + min((7·9 + 6·3)/(4·10²), 3·3/(2·10)), and where the other term is the smaller.
    assert skellam_rdp(Sensitivity(3, 9), 10.0).epsilons[order] == pytest.approx(1.8 + 0.2025)
    assert skellam_rdp(Sensitivity(3, 9), 1.0).epsilons[order] == pytest.approx(18 + 4.5)


def test_the_skellam_curve_holds_for_vectors_of_many_coordinates() -> None:
    shifts = [1, 1, 2, 3, 7]
    sensitivity = Sensitivity(sum(shifts), sum(shift**2 for shift in shifts))

    for variance in (2.0, 50.0, 1000.0):
        curve = skellam_rdp(sensitivity, variance)
        for order in (2, 8, 32):
            logs = log_skellam(variance, math.ceil(200 + 20 * variance**0.5 + 21 * order))
            exact = sum(divergence(logs, shift, order) for shift in shifts)
            assert exact <= curve.epsilons[ORDERS.index(order)]


@pytest.mark.parametrize(("share", "shares"), [(0.5, 3), (1.0, 2), (4.0, 1), (4.0, 8)])
def test_the_curve_of_summed_discrete_gaussians_is_above_the_exact_one(
    share: float, shares: int
) -> None:
    logs = log_sum_of_gaussians(share, shares, math.ceil(30 * (share * shares) ** 0.5))
    for shift in (1, 3):
        curve = discrete_gaussian_rdp(Sensitivity(shift, shift**2), share, shares=shares, length=1)
        for order in (2, 3, 5):
            exact = divergence(logs, shift, order)
            bound = curve.epsilons[ORDERS.index(order)]
            assert exact <= bound * (1 + 1e-9)
            assert share < 4 or bound <= exact * (1 + 1e-6)


def test_one_discrete_gaussian_costs_what_a_gaussian_does() -> None:
    alone = discrete_gaussian_rdp(Sensitivity(10, 100), 400.0, shares=1, length=10**6)

    assert alone.epsilons == pytest.approx(gaussian_rdp(2.0).epsilons)


def test_the_bound_on_discrete_gaussians_refuses_narrower_ones_than_it_covers() -> None:
    with pytest.raises(ValueError, match="at least 1/2"):
        discrete_gaussian_rdp(Sensitivity(1, 1), 0.4, shares=2, length=1)


# --- from curves to epsilon ----------------------------------------------------------------------


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("times", [1, 50])
@pytest.mark.parametrize("delta", [1e-4, 1e-6, 1e-9])
def test_epsilon_is_what_dp_accounting_says(multiplier: float, times: int, delta: float) -> None:
    accountant = RdpAccountant(list(ORDERS))
    accountant.compose(GaussianDpEvent(multiplier), times)

    curve = gaussian_rdp(multiplier).times(times)

    assert curve.epsilon(delta) == pytest.approx(accountant.get_epsilon(delta), rel=1e-9)


@pytest.mark.parametrize("multiplier", [0.8, 2.0, 10.0])
def test_epsilon_is_little_above_the_exact_one(multiplier: float) -> None:
    accountant = PLDAccountant()
    accountant.compose(GaussianDpEvent(multiplier))

    exact, ours = accountant.get_epsilon(1e-6), gaussian_rdp(multiplier).epsilon(1e-6)

    assert exact <= ours <= 1.15 * exact


def test_epsilon_of_the_design_review_is_found_again() -> None:
    # A cohort of 1,024 with noise of 1: as one sum, in groups of 256, in groups of 16.
    assert gaussian_rdp(1.0).epsilon(1e-6) == pytest.approx(5.2, abs=0.1)
    assert gaussian_rdp(1 / 2).epsilon(1e-6) == pytest.approx(11.9, abs=0.1)
    assert gaussian_rdp(1 / 8).epsilon(1e-6) == pytest.approx(76, abs=1)


@given(one=curves, other=curves)
def test_adding_curves_never_lowers_epsilon(one: RdpCurve, other: RdpCurve) -> None:
    assert (one + other).epsilon(1e-6) >= max(one.epsilon(1e-6), other.epsilon(1e-6))
    assert one + other == other + one


@given(curve=curves, count=st.integers(1, 20))
def test_a_curve_taken_several_times_is_a_sum(curve: RdpCurve, count: int) -> None:
    summed = RdpCurve.nothing()
    for _ in range(count):
        summed += curve

    assert curve.times(count).epsilons == pytest.approx(summed.epsilons)


def test_nothing_costs_nothing_and_an_exact_sum_everything() -> None:
    unbounded = RdpCurve.unbounded()

    assert RdpCurve.nothing().epsilon(1e-6) == 0
    assert unbounded.epsilon(1e-6) == math.inf
    assert unbounded.infinite
    assert (gaussian_rdp(1) + unbounded).infinite
    assert (unbounded + gaussian_rdp(1)).infinite
    assert unbounded.times(3).infinite
    assert unbounded.times(0) == RdpCurve.nothing()


@pytest.mark.parametrize("curve", [gaussian_rdp(1.3), RdpCurve.unbounded(), RdpCurve.nothing()])
def test_a_curve_survives_being_written_down(curve: RdpCurve) -> None:
    assert msgspec.json.decode(msgspec.json.encode(curve), type=RdpCurve) == curve


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_impossible_curves_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        RdpCurve((value,) * len(ORDERS))
    with pytest.raises(ValueError, match="orders"):
        RdpCurve((1.0,))


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-6])
def test_epsilon_needs_a_delta_between_zero_and_one(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        gaussian_rdp(1).epsilon(delta)


# --- charges -------------------------------------------------------------------------------------


def test_a_sum_without_noise_costs_everything() -> None:
    assert charge_of(noised(noise=None)).infinite


@pytest.mark.parametrize("multiplier", [1e-150, 1e-160])
def test_next_to_no_noise_costs_next_to_everything_and_is_no_error(multiplier: float) -> None:
    charge = charge_of(noised(noise=Noise(multiplier=multiplier, survivors=2)))

    assert charge.epsilon(1e-6) > 1e100


def test_a_charge_is_that_of_the_multiplier_where_all_shares_are_certain() -> None:
    charge = charge_of(noised())

    # Skellam noise is a little worse than a Gaussian's.
    gaussian = gaussian_rdp(1.0).epsilon(1e-6)
    assert gaussian < charge.epsilon(1e-6) < 1.001 * gaussian


def test_a_charge_counts_only_shares_that_every_roster_guarantees() -> None:
    # 20 survivors, of whom ⌈0.1 · 20⌉ = 2 or, of 30, 3 may lie: 17 honest ones at least.
    for survivors, certain in ((10, 10), (17, 17), (34, 17), (68, 17)):
        charge = charge_of(noised(noise=Noise(multiplier=1.0, survivors=survivors)))
        expected = gaussian_rdp(math.sqrt(certain / survivors)).epsilon(1e-6)
        assert charge.epsilon(1e-6) == pytest.approx(expected, rel=2e-3)


def test_a_smaller_group_costs_more_with_shares_for_the_whole_cohort() -> None:
    shares = Noise(multiplier=1.0, survivors=200)
    floors = (180, 60, 16)

    costs = [
        charge_of(noised(noise=shares, min_survivors=floor, max_roster=250)).epsilon(1e-6)
        for floor in floors
    ]

    assert costs == sorted(costs)
    assert costs[-1] > 3 * costs[0]


def test_more_devices_that_may_lie_cost_more() -> None:
    few, many = (charge_of(noised(corrupt_devices=count)).epsilon(1e-6) for count in (1, 12))

    assert many > 1.2 * few


def test_a_roster_that_no_device_accepts_is_promised_nothing() -> None:
    assert charge_of(noised(at_least=40)).infinite


def test_discrete_gaussian_noise_is_charged_by_its_own_bound() -> None:
    noise = Noise(kind="discrete-gaussian", multiplier=1.0, survivors=16)

    charge = charge_of(noised(noise=noise))

    assert charge.epsilons == pytest.approx(gaussian_rdp(1.0).epsilons, rel=1e-9)


def test_narrow_discrete_gaussians_are_refused() -> None:
    noise = Noise(kind="discrete-gaussian", multiplier=0.001, survivors=16)

    with pytest.raises(ConfigError, match="take Skellam noise"):
        charge_of(noised(noise=noise))


def test_noise_that_cannot_be_drawn_is_refused() -> None:
    for steps_per_unit in (1e9, 1e200):
        encoding = encoding_of(lane_bits=32, length=10, steps_per_unit=steps_per_unit)
        with pytest.raises(ConfigError, match="steps_per_unit"):
            charge_of(noised(encoding=encoding))


def test_the_noise_of_a_sum_is_told_in_the_vectors_unit() -> None:
    encoding = encoding_of(lane_bits=32, length=10, clip_norm=3.0, steps_per_unit=10_000.0)
    config = noised(encoding=encoding, noise=Noise(multiplier=0.5, survivors=16))

    assert sum_sigma(config) == pytest.approx(1.5, rel=1e-3)
    assert sum_sigma(noised(noise=None)) == 0
