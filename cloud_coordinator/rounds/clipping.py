"""What the coordinator itself does about updates' norms and noise; it has seen the exact sum.

Adaptive clipping moves ``clip_norm`` towards the quantile of updates that a plan wants unclipped
(Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021), by an exact
count in a lane of its own. Central noise is added to a mean that is known already: it protects
whoever gets the model, not the devices from the coordinator. It is *promised by the coordinator*,
and devices count such a sum as exact.
"""

import math

import numpy as np
from numpy.typing import NDArray

from shared.secure_sum.accounting import RdpCurve, gaussian_rdp
from shared.secure_sum.config import SumConfig

UNCLIPPED = "unclipped"  # the exact lane that counts
PROMISED = "promised by the coordinator"

_SMALLEST, _LARGEST = 1e-6, 1e9  # clip norms
_COUNT_NOISE = 1 / 20  # σ of the noise of the count, over the devices, as the paper has it


def next_clip_norm(
    clip_norm: float, *, unclipped: float, count: int, target: float, learning_rate: float
) -> float:
    """Return the next round's clip norm: clip · exp(-rate · (unclipped/count - target)).

    Args:
        clip_norm: this round's.
        unclipped: how many updates were below it; with central noise `noised_count` of it.
        count: survivors, at least 1.
        target: fraction that should be unclipped.
        learning_rate: how fast to move.
    """
    fraction = min(1.0, max(0.0, unclipped / count))  # noise may take it out of there
    moved = clip_norm * math.exp(-learning_rate * (fraction - target))
    return min(_LARGEST, max(_SMALLEST, moved))


def noised_count(
    unclipped: float, count: int, multiplier: float, rng: np.random.Generator
) -> float:
    """Return the count with the noise that `mean_multiplier` reckons with."""
    return unclipped + float(rng.normal(scale=_count_sigma(count, multiplier)))


def mean_multiplier(multiplier: float, count: int, *, adaptive: bool) -> float:
    """Return the mean's noise multiplier with which mean and count together have ``multiplier``.

    The count is of ±1/2 around its middle, so its sensitivity is 1/2, and the squares of inverse
    multipliers add up: 1/z² = 1/z_mean² + 1/(2σ_count)².
    """
    if not adaptive:
        return multiplier
    return 1 / math.sqrt(multiplier**-2 - (2 * _count_sigma(count, multiplier)) ** -2)


def central_sigma(config: SumConfig, multiplier: float, *, count: int) -> float:
    """Return σ of central noise in each coordinate of the mean of ``count`` updates.

    Rounding may lengthen a clipped update by less than one step in each lane.
    """
    encoding = config.encoding
    longest = encoding.clip_norm + math.sqrt(encoding.length) / encoding.steps_per_unit
    return multiplier * longest / count


def add_central_noise(
    mean: NDArray[np.float64], sigma: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return ``mean``, shape (d,), with Gaussian noise; seed ``rng`` from the system's entropy."""
    return mean + rng.normal(scale=sigma, size=mean.shape)


def central_charge(multiplier: float, rounds: int) -> RdpCurve:
    """Return what the coordinator promises of ``rounds`` rounds, to a device that is in all."""
    return gaussian_rdp(multiplier).times(rounds)


def _count_sigma(count: int, multiplier: float) -> float:
    return max(count * _COUNT_NOISE, multiplier)
