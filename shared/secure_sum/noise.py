"""The noise that devices add to their own vectors, so that the sum is private when it is seen.

Each device adds a share, and the shares of the honest survivors alone suffice: those of corrupted
devices and of dropped ones are not counted. Lanes wrap and noise is never truncated: to wrap is to
process what is private already, but truncated noise would be private no more (Kairouz, Liu and
Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", ICML 2021, called DDGauss below).
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.secure_sum.config import (
    Encoding,
    Noise,
    SumConfig,
    corrupted_of,
    survivors_needed,
)
from shared.secure_sum.sampler import MAX_VARIANCE, Entropy, Sampler, table_of

_REROUNDING = 1e-9  # β: at most this likely is a rounding above the sensitivity, and made again
_MOST_STEPS = 2.0**50  # in a clip norm
_LEAST_GAUSSIAN_STEPS = 2.0  # below, a sum of discrete Gaussians is too far from being one


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How far one device's integers can move the sum, in steps; see `sensitivity_of`."""

    l1: float
    l2_squared: float

    @property
    def l2(self) -> float:
        """The L2 norm."""
        return math.sqrt(self.l2_squared)


def sensitivity_of(encoding: Encoding) -> Sensitivity:
    """Return the largest norms that an encoded vector has before noise.

    Rounding at random makes a vector longer. DDGauss (Theorem 1) rounds again until the square of
    the integers' L2 norm is at most min((S + √d)², S² + d/4 + √(2·ln(1/β))·(S + √d/2)), where S is
    the clip norm in steps; `encode` does so. The square is an integer, and for integers the L1
    norm is at most the square of the L2 norm, and at most √d times the L2 norm.

    Raises:
        ConfigError: there are so many steps that no noise could be drawn.
    """
    clip, root = encoding.clip_norm * encoding.steps_per_unit, math.sqrt(encoding.length)
    if clip > _MOST_STEPS:
        raise ConfigError(f"a clip norm of {clip:.3g} steps is too fine; lower steps_per_unit")
    likely = clip**2 + root**2 / 4 + math.sqrt(-2 * math.log(_REROUNDING)) * (clip + root / 2)
    squared = float(math.floor(min((clip + root) ** 2, likely)))
    return Sensitivity(l1=min(squared, root * math.sqrt(squared)), l2_squared=squared)


def sum_variance(encoding: Encoding, noise: Noise) -> float:
    """Return the variance of ``noise.survivors`` shares together, in steps²."""
    return noise.multiplier**2 * sensitivity_of(encoding).l2_squared


def share_variance(encoding: Encoding, noise: Noise) -> float:
    """Return the variance of one device's share, in steps².

    Raises:
        ConfigError: no device could draw such noise, or it would not hide what it should.
    """
    variance = sum_variance(encoding, noise) / noise.survivors
    if not 0 < variance <= MAX_VARIANCE:
        raise ConfigError(
            f"a device's share of the noise would have a standard deviation of "
            f"{math.sqrt(variance):.3g} steps, of {math.sqrt(MAX_VARIANCE):.0f} that it can draw; "
            f"choose other steps_per_unit"
        )
    if noise.kind == "discrete-gaussian" and variance < _LEAST_GAUSSIAN_STEPS**2:
        raise ConfigError(
            f"discrete Gaussian noise needs shares of at least {_LEAST_GAUSSIAN_STEPS:g} steps of "
            f"standard deviation, and these have {math.sqrt(variance):.2g}; take Skellam noise, "
            f"or more steps_per_unit"
        )
    return variance


def add_share(
    lanes: NDArray[np.uint16] | NDArray[np.uint32],
    encoding: Encoding,
    noise: Noise,
    *,
    entropy: Entropy,
) -> None:
    """Add one device's share to its lanes, shape (d,), in place; ConfigError: `share_variance`.

    Args:
        lanes: what the device is about to mask.
        encoding: of the sum.
        noise: of the sum.
        entropy: gives the key of the noise, 16 bytes, fresh for each vector.
    """
    Sampler(table_of(noise.kind, share_variance(encoding, noise)), entropy).add_to(lanes)


def certain_shares(config: SumConfig) -> int:
    """Return how many honest shares every sum of this configuration holds, whatever its roster.

    No honest device helps to unmask fewer survivors than `survivors_needed`, of whom c may lie.
    """
    sizes = range(2, config.max_roster + 1)
    return min(
        (
            survivors_needed(config, size) - corrupted_of(config, size)
            for size in sizes
            if survivors_needed(config, size) <= size
        ),
        default=0,
    )
