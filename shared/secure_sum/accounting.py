"""What a sum costs a device in privacy: Rényi differential privacy at fixed orders.

The unit is one device's whole contribution to one sum: whether it sent its vector or zeros cannot
be told, up to (ε, δ). Curves of several sums over the same data add up, and only then are turned
into ε. Nothing is taken off for sampling, since it is the coordinator that selects. Sources:

- Rényi differential privacy: Mironov, CSF 2017.
- Skellam: Agarwal, Kairouz and Liu, "The Skellam Mechanism for Differentially Private Federated
  Learning", NeurIPS 2021, Corollary 3.6; it holds at integer orders, so all of ours are.
- Sums of discrete Gaussians: Kairouz, Liu and Steinke, "The Distributed Discrete Gaussian Mechanism
  for Federated Learning with Secure Aggregation", ICML 2021, Proposition 14. One alone: Canonne,
  Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020.
- From a curve to ε: Canonne, Kamath and Steinke, Proposition 12; also Balle et al., AISTATS 2020.
"""

import math
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from shared.secure_sum.config import SumConfig
from shared.secure_sum.noise import (
    Sensitivity,
    certain_shares,
    sensitivity_of,
    share_variance,
    sum_variance,
)

# Ledgers store one number for each order: to change them is to migrate all ledgers.
ORDERS: tuple[int, ...] = (
    *range(2, 33),
    *range(34, 65, 2),
    *range(72, 129, 8),
    *(eighths * 2**power for power in range(5, 12) for eighths in (5, 6, 7, 8)),
)
_ALPHA = np.array(ORDERS, np.float64)


class RdpCurve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Rényi divergences at `ORDERS`; no numbers at all where nothing is promised."""

    epsilons: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a possible divergence for each order, or none."""
        if len(self.epsilons) not in (0, len(ORDERS)):
            raise ValueError(f"{len(self.epsilons)} divergences for {len(ORDERS)} orders")
        if not all(0 <= epsilon < math.inf for epsilon in self.epsilons):
            raise ValueError("a divergence is a finite number, and not negative")

    @classmethod
    def nothing(cls) -> Self:
        """Return the curve of no sum at all: ε is 0."""
        return cls((0.0,) * len(ORDERS))

    @classmethod
    def unbounded(cls) -> Self:
        """Return the curve of a sum without noise: ε is infinite, whatever is added."""
        return cls(())

    @property
    def infinite(self) -> bool:
        """Whether no ε is promised."""
        return not self.epsilons

    def __add__(self, other: "RdpCurve") -> "RdpCurve":
        """Return the curve of both, in whatever order and however the second was chosen."""
        if self.infinite or other.infinite:
            return RdpCurve.unbounded()
        return RdpCurve(tuple(np.add(self.epsilons, other.epsilons).tolist()))

    def times(self, count: int) -> "RdpCurve":
        """Return the curve of ``count`` such sums."""
        if self.infinite:
            return self if count else RdpCurve.nothing()
        return RdpCurve(tuple(np.multiply(self.epsilons, count).tolist()))

    def epsilon(self, delta: float) -> float:
        """Return the least ε of which (ε, ``delta``) differential privacy follows; may be inf."""
        if not 0 < delta < 1:
            raise ValueError(f"delta is {delta}, not between 0 and 1")
        if self.infinite:
            return math.inf
        divergences = np.array(self.epsilons)
        at_orders = (
            divergences + np.log1p(-1 / _ALPHA) - (math.log(delta) + np.log(_ALPHA)) / (_ALPHA - 1)
        )
        # Bretagnolle and Huber: no two laws of divergence r differ by more than sqrt(1 - exp(-r)).
        alike = delta**2 + np.expm1(-divergences) >= 0
        return max(0.0, float(np.where(alike, 0.0, at_orders).min()))


def gaussian_rdp(multiplier: float) -> RdpCurve:
    """Return the curve of Gaussian noise, whose σ is ``multiplier`` times the L2 sensitivity.

    This is central noise, which somebody adds who has seen the sum: it is their promise.
    """
    return _curve(_ALPHA / (2 * multiplier**2))


def skellam_rdp(sensitivity: Sensitivity, variance: float) -> RdpCurve:
    """Return the curve of Skellam noise on each lane of an integer vector.

    Args:
        sensitivity: of the integers, in steps.
        variance: of the noise of the sum, in steps².
    """
    squared, l1 = sensitivity.l2_squared, sensitivity.l1
    with np.errstate(divide="ignore", over="ignore"):  # of next to no noise
        gaussian = _ALPHA * squared / (2 * variance)
        beyond = np.minimum(
            ((2 * _ALPHA - 1) * squared + 6 * l1) / (4 * variance**2),
            np.divide(3 * l1, 2 * variance),
        )
    return _curve(gaussian + beyond)


def discrete_gaussian_rdp(
    sensitivity: Sensitivity, share: float, *, shares: int, length: int
) -> RdpCurve:
    """Return the curve of a sum of discrete Gaussians on each lane of an integer vector.

    Args:
        sensitivity: of the integers, in steps.
        share: σ² of each discrete Gaussian, in steps²; at least 1/2.
        shares: how many are added.
        length: d, lanes.
    """
    if share < 0.5:
        raise ValueError(f"the bound needs a variance of at least 1/2, not {share}")
    distance = 10 * math.fsum(
        math.exp(-2 * math.pi**2 * share * k / (k + 1)) for k in range(1, shares)
    )
    scale, l1_scale = (
        norm / math.sqrt(shares * share) for norm in (sensitivity.l2, sensitivity.l1)
    )
    divergences = [
        _ALPHA / 2 * scale**2 + distance * length,
        _ALPHA / 2 * (scale**2 + 2 * l1_scale * distance + distance**2 * length),
        _ALPHA / 2 * (scale + math.sqrt(length) * distance) ** 2,
    ]
    return _curve(np.minimum.reduce(divergences))


def charge_of(config: SumConfig) -> RdpCurve:
    """Return what taking part once costs a device, known before anybody takes part.

    Only shares that are certain to be in the sum count: no more than ``noise.survivors``, and no
    more than every roster that devices accept guarantees. Exact sums cost everything.

    Raises:
        ConfigError: the noise is such as no device could draw.
    """
    noise, encoding = config.noise, config.encoding
    if noise is None or encoding.length == 0:
        return RdpCurve.unbounded()
    shares = min(noise.survivors, certain_shares(config))
    if shares < 1:
        return RdpCurve.unbounded()
    sensitivity, share = sensitivity_of(encoding), share_variance(encoding, noise)
    if noise.kind == "skellam":
        return skellam_rdp(sensitivity, shares * share)
    return discrete_gaussian_rdp(sensitivity, share, shares=shares, length=encoding.length)


def sum_sigma(config: SumConfig) -> float:
    """Return the noise's standard deviation in each coordinate of the sum, in the vector's unit.

    It is that of ``noise.survivors`` shares; every further survivor adds its own. 0 without noise.
    """
    if config.noise is None:
        return 0.0
    return math.sqrt(sum_variance(config.encoding, config.noise)) / config.encoding.steps_per_unit


def _curve(divergences: NDArray[np.float64]) -> RdpCurve:
    """Return the curve, of nothing promised where a divergence is too large to be a number."""
    if not np.isfinite(divergences).all():
        return RdpCurve.unbounded()
    return RdpCurve(tuple(divergences.tolist()))
