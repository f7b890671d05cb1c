"""How fine the steps of a sum are: the numbers of an `Encoding` that a plan leaves open.

Without noise, lanes must not wrap: a roster of n devices leaves each 1/n of the lane's range, and
a step is that part of the range which a coordinate needs. With noise, lanes may wrap, but no more
often than a Gaussian is beyond 6 σ; there steps are as fine as noise can be drawn cheaply.
"""

import math
from collections.abc import Callable

from shared.errors import ConfigError
from shared.secure_sum.config import Encoding, LaneBits, Noise
from shared.secure_sum.noise import sensitivity_of, share_variance, sum_variance
from shared.secure_sum.rotation import block_length
from shared.secure_sum.sampler import MAX_VARIANCE

_SPREAD = 5.0  # k of rotation.py: a coordinate is beyond k·|x|/√B with P < 2·exp(-k²/2) < 1e-5
_SIGMAS = 6.0  # of the noise of a whole roster, that fit beside the signal
_SHARE_SIGMA = 256.0  # steps: finer ones gain nothing more, and are drawn more slowly
_LITTLE, _MUCH = 1.01, 1.1  # what rounding may add to the sensitivity: aimed at; still accepted
_HALVINGS = 60


def choose_encoding(
    *,
    length: int,
    lane_bits: LaneBits,
    clip_norm: float,
    max_roster: int,
    rotate: bool,
    noise: Noise | None,
    rotation_seed: bytes,
) -> Encoding:
    """Return the encoding with the finest steps that are of use.

    Args:
        length: d, main lanes.
        lane_bits: 16 or 32.
        clip_norm: largest L2 norm kept, in the vector's unit.
        max_roster: n_max, most devices in the sum.
        rotate: whether to rotate, which pays where coordinates are of unequal size.
        noise: of the sum.
        rotation_seed: 16 bytes, for ``rotate``.

    Raises:
        ConfigError: the lanes are too narrow for so many devices, or for so much noise.
    """
    spread = min(1.0, _SPREAD / math.sqrt(block_length(length))) if rotate and length else 1.0
    lanes = _Lanes(length, lane_bits, clip_norm, spread, rotation_seed if rotate else None)
    if noise is None:
        max_steps = largest_steps(lane_bits, max_roster)
        return lanes.encoding(max_steps / (clip_norm * spread), max_steps)
    return _with_noise(lanes, noise, max_roster)


def largest_steps(lane_bits: LaneBits, max_roster: int) -> int:
    """Return the largest magnitude of a lane of which ``max_roster`` never wrap.

    Raises:
        ConfigError: not even a single step fits.
    """
    steps = ((1 << lane_bits) - 1) // (2 * max_roster)
    if steps < 1:
        raise ConfigError(f"{lane_bits} bits are too few for {max_roster} devices; take 32")
    return steps


def largest_roster(lane_bits: LaneBits, max_steps: int) -> int:
    """Return how many lanes of up to ±``max_steps`` steps add up without wrapping."""
    return ((1 << lane_bits) - 1) // (2 * max_steps)


class _Lanes:
    """An encoding but for its steps."""

    def __init__(
        self,
        length: int,
        lane_bits: LaneBits,
        clip_norm: float,
        spread: float,
        rotation_seed: bytes | None,
    ) -> None:
        self.length, self.lane_bits, self.clip_norm = length, lane_bits, clip_norm
        self.spread = spread  # the largest coordinate, over clip_norm
        self.rotation_seed = rotation_seed

    def encoding(self, steps_per_unit: float, max_steps: int | None = None) -> Encoding:
        """Return the encoding; clamped where a coordinate cannot be but by mischance."""
        return Encoding(
            lane_bits=self.lane_bits,
            length=self.length,
            clip_norm=self.clip_norm,
            steps_per_unit=steps_per_unit,
            max_steps=max_steps or math.ceil(self.clip_norm * self.spread * steps_per_unit),
            rotation_seed=self.rotation_seed,
        )

    def of_clip(self, clip_steps: float) -> Encoding:
        """Return the encoding in which the clip norm has so many steps."""
        return self.encoding(clip_steps / self.clip_norm)


def _with_noise(lanes: _Lanes, noise: Noise, max_roster: int) -> Encoding:
    """Return an encoding whose rounding hardly shows beside the noise; ConfigError if none is."""

    def too_fine(clip_steps: float) -> bool:
        encoding = lanes.of_clip(clip_steps)
        share = sum_variance(encoding, noise) / noise.survivors
        needed = _SIGMAS * math.sqrt(max_roster * share) + max_roster * encoding.max_steps
        return share > MAX_VARIANCE or needed > 2 ** (lanes.lane_bits - 1)

    def too_coarse(clip_steps: float, excess: float) -> bool:
        return sensitivity_of(lanes.of_clip(clip_steps)).l2 > excess * clip_steps

    wanted = max(
        _SHARE_SIGMA * math.sqrt(noise.survivors) / noise.multiplier,
        _turn(lambda clip_steps: not too_coarse(clip_steps, _LITTLE)),
    )
    chosen = min(wanted, _turn(too_fine))
    if too_fine(chosen) or too_coarse(chosen, _MUCH):
        instead = ["32 bits"] if lanes.lane_bits == 16 else []
        instead += ["rotation"] if lanes.rotation_seed is None else []
        raise ConfigError(
            f"{lanes.lane_bits} bits cannot hold the sum of {max_roster} vectors of "
            f"{lanes.length} numbers beside noise of {noise.multiplier:g} times the clip norm; "
            f"take {', '.join([*instead, 'a smaller noise multiplier'])} or more devices"
        )
    encoding = lanes.of_clip(chosen)
    share_variance(encoding, noise)  # refuses discrete Gaussians that are too narrow
    return encoding


def _turn(reached: Callable[[float], bool]) -> float:
    """Return the number of steps, from 1 to 2**40, up to which ``reached`` is false."""
    low, high = 0.0, 40.0  # logarithms
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(2**middle) else (middle, high)
    return float(2**low)
