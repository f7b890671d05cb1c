"""From a vector of floats to integer lanes that can be masked and summed, and back from the sum.

Clip to an L2 norm, rotate (see rotation.py), scale to steps, round at random to a neighbouring
integer so that the mean over devices has no bias, add noise (see noise.py). Lanes are two's
complement integers of 16 or 32 bits that wrap by themselves; without noise they never do, since
the configuration's roster times its ``max_steps`` fits, and what lies beyond is clamped.

Rounding is unbiased but for the resolution of its dice: a lane goes up with a probability that
is a multiple of 2⁻¹⁶ and less than 2⁻¹⁶ above the fraction that it should be; so whole steps stay,
and what is just below one becomes it. float32 vectors are scaled in float32: a relative error of
2⁻²⁴.
"""

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import PeerError
from shared.secure_sum.config import Encoding, ExactLane, LaneBits, SumConfig
from shared.secure_sum.masking import Lanes
from shared.secure_sum.noise import add_share, sensitivity_of
from shared.secure_sum.rotation import rotate, unrotate
from shared.secure_sum.sampler import Entropy, Keystream

Vector = NDArray[np.float32] | NDArray[np.float64]
_Floats = NDArray[Any]  # either; numpy's arithmetic keeps to the one it gets
_Integers = NDArray[Any]  # int16 or int32
_LANE: dict[LaneBits, type[Any]] = {16: np.uint16, 32: np.uint32}
_INTEGER: dict[LaneBits, type[Any]] = {16: np.int16, 32: np.int32}

_PIECE = 2**15  # lanes; what one piece needs stays in the second-level cache
_DOT_PIECE = 2**13  # below the length at which BLAS starts threads
_CLOSE = 2**-20  # norms that differ by less than this part of them may be the same
_PLAIN_NORM = 1e15  # up to this and down to its inverse, float32 serves for squares and scales
_ATTEMPTS = 16  # to round below the sensitivity, before a vector is made shorter
_MOST_ATTEMPTS = 64


def encode(
    config: SumConfig,
    vector: Vector,
    exact: Mapping[str, float],
    *,
    rng: np.random.Generator,
    entropy: Entropy = os.urandom,
) -> Lanes:
    """Return one device's vector as lanes, ready to be masked.

    Args:
        config: of the session.
        vector: shape (d,), in the vector's own unit; stays as it is.
        exact: the value of each exact lane, by name; rounded to steps and clamped.
        rng: for rounding; guards nothing.
        entropy: for the key of the noise; see `shared.secure_sum.noise.add_share`.

    Raises:
        ValueError: the vector or an exact value is not finite, or not what the configuration says.
        ConfigError: the noise is such as no device could draw.
    """
    encoding = config.encoding
    if vector.shape != (encoding.length,) or vector.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"a vector of {vector.dtype}, shape {vector.shape}, for {encoding.length} lanes"
        )
    integers = np.empty(encoding.length, _INTEGER[encoding.lane_bits])
    main = integers.view(_LANE[encoding.lane_bits])
    rounding = _Rounding(encoding, vector, Keystream(rng.bytes(16)))
    if config.noise is None:
        rounding.into(integers)
    else:
        rounding.within_sensitivity(integers)
        add_share(main, encoding, config.noise, entropy=entropy)
    return Lanes(main, _encode_exact(config.exact_lanes, exact))


def decode_sum(
    config: SumConfig, lanes: Lanes, *, count: int
) -> tuple[NDArray[np.float64], dict[str, float]]:
    """Turn the unmasked sum of ``count`` encodings back into floats.

    Returns:
        The sum of the vectors, shape (d,), in their unit, and the sum in each exact lane, by name.

    Raises:
        PeerError: no ``count`` honest devices could have made this sum.
        ValueError: the lanes are not such as the configuration says.
    """
    encoding = config.encoding
    if lanes.main.dtype != _LANE[encoding.lane_bits] or lanes.main.shape != (encoding.length,):
        raise ValueError(f"{lanes.main.size} lanes of {lanes.main.dtype} are not of this sum")
    if lanes.exact.shape != (len(config.exact_lanes),):
        raise ValueError(f"{lanes.exact.size} exact lanes of {len(config.exact_lanes)}")
    main = lanes.main.view(_INTEGER[encoding.lane_bits])
    if config.noise is None and main.size:
        _check_range("a lane", int(main.min()), int(main.max()), count * encoding.max_steps)
    values: NDArray[np.float64] = main / np.float64(encoding.steps_per_unit)
    if encoding.rotation_seed is not None:
        values = unrotate(values, encoding.rotation_seed)
    totals = {}
    for lane, steps in zip(config.exact_lanes, lanes.exact.view(np.int64).tolist(), strict=True):
        _check_range(f"the exact lane {lane.name!r}", steps, steps, count * lane.max_steps)
        totals[lane.name] = steps / lane.steps_per_unit
    return values, totals


def was_clipped(config: SumConfig, vector: Vector) -> bool:
    """Return whether `encode` shortens ``vector``; ValueError where it is not finite."""
    return _norm(vector) > config.encoding.clip_norm * (1 + _CLOSE)


def _encode_exact(lanes: tuple[ExactLane, ...], values: Mapping[str, float]) -> NDArray[np.uint64]:
    if values.keys() != {lane.name for lane in lanes}:
        raise ValueError(f"exact values for {sorted(values)}, not those of the configuration")
    steps = []
    for lane in lanes:
        if not math.isfinite(values[lane.name]):
            raise ValueError(f"the exact value {lane.name!r} is not finite")
        # Steps so many that they overflow are clamped too: an error would tell that they are.
        scaled = values[lane.name] * lane.steps_per_unit
        steps.append(round(max(-lane.max_steps, min(lane.max_steps, scaled))))
    return np.array(steps, np.int64).view(np.uint64)


def _check_range(what: str, lowest: int, highest: int, limit: int) -> None:
    if lowest < -limit or highest > limit:
        raise PeerError(f"the sum in {what} is beyond ±{limit} steps: a device broke its bounds")


class _Rounding:
    """One vector on its way to integers; can be rounded again with other dice."""

    def __init__(self, encoding: Encoding, vector: _Floats, dice: Keystream) -> None:
        """Clip and rotate; raise ValueError where the vector is not finite."""
        self._encoding, self._dice = encoding, dice
        self._scale = encoding.steps_per_unit
        norm = _norm(vector)
        if norm > encoding.clip_norm * (1 + _CLOSE):
            # To just below the clip norm, so that no error of floats leads above max_steps.
            shorter = encoding.clip_norm * (1 - _CLOSE) / norm
            if encoding.rotation_seed is not None or norm > _PLAIN_NORM:
                vector = (vector * np.float64(shorter)).astype(vector.dtype, copy=False)
            else:
                self._scale *= shorter
            norm *= shorter
        self._at_the_edge = norm > encoding.clip_norm * (1 - _CLOSE / 2)
        if encoding.rotation_seed is not None:
            if norm > _PLAIN_NORM:  # a rotated coordinate may be as large as the norm
                vector = vector.astype(np.float64, copy=False)
            vector = rotate(vector, encoding.rotation_seed)
        if not 1 / _PLAIN_NORM < self._scale < _PLAIN_NORM:
            vector = vector.astype(np.float64, copy=False)
        self._vector = vector

    def within_sensitivity(self, integers: _Integers) -> None:
        """Round until the integers' L2 norm is within what the noise is for, and thus the L1 norm.

        The first attempt fails once in 1e9 vectors, so what this does to the mean is nothing.
        """
        largest = sensitivity_of(self._encoding).l2_squared
        for attempt in itertools.count(1):
            self.into(integers)
            if _square_of(integers) <= largest:
                return
            if attempt >= _MOST_ATTEMPTS:  # whatever the numbers are, this ends
                integers.fill(0)
                return
            if attempt >= _ATTEMPTS:  # only rounding errors of floats can lead here
                self._scale *= 0.99

    def into(self, integers: _Integers) -> None:
        """Overwrite ``integers``, shape (d,), with the vector in steps, rounded at random."""
        number = self._vector.dtype.type
        scale, sides, limit = number(self._scale), number(2**16), self._limit()
        most = min(_PIECE, integers.size)
        floats, dice, up = (
            np.empty((3, most), number),
            np.empty(most, np.uint16),
            np.empty(most, "?"),
        )
        for start in range(0, integers.size, _PIECE):
            piece = integers[start : start + _PIECE]
            size = piece.size
            steps, floor, throws = floats[:, :size]
            np.multiply(self._vector[start : start + _PIECE], scale, out=steps)
            if limit is not None:
                np.clip(steps, -limit, limit, out=steps)
            np.floor(steps, out=floor)
            # Both are exact: what is left above the floor, and 2^16 times that.
            np.subtract(steps, floor, out=steps)
            np.multiply(steps, sides, out=steps)
            self._dice.fill(dice[:size])
            np.copyto(throws, dice[:size])
            np.less(throws, steps, out=up[:size])
            np.copyto(piece, floor, casting="unsafe")
            np.add(piece, up[:size].view(np.int8), out=piece)

    def _limit(self) -> np.floating[Any] | None:
        """Return what a lane is clamped to, in steps, or None where none can be above it."""
        encoding = self._encoding
        steps = min(encoding.max_steps, 2 ** (encoding.lane_bits - 1) - 1)
        fits = encoding.clip_norm * encoding.steps_per_unit <= steps
        if fits and encoding.rotation_seed is None and not self._at_the_edge:
            return None
        limit: np.floating[Any] = self._vector.dtype.type(steps)
        return limit if int(limit) <= steps else np.nextafter(limit, limit * 0)


def _norm(vector: _Floats) -> float:
    """Return the L2 norm, below no coordinate but for 2⁻²³; ValueError where it is not finite."""
    with np.errstate(over="ignore", under="ignore"):
        square = sum(_squares(vector))
    if _PLAIN_NORM**-2 < square < _PLAIN_NORM**2:
        return math.sqrt(square)
    largest = float(np.abs(vector).max(initial=0))
    if not math.isfinite(largest):
        raise ValueError("the vector holds NaN or infinity")
    if largest == 0:
        return 0.0
    return largest * math.sqrt(sum(_squares(vector / np.float64(largest))))


def _squares(vector: _Floats) -> Iterator[float]:
    """Yield sums of squares; a sum of floats that are not negative is never below one of them."""
    for start in range(0, vector.size, _DOT_PIECE):
        piece = vector[start : start + _DOT_PIECE]
        yield float(np.dot(piece, piece))


def _square_of(integers: _Integers) -> float:
    """Return the square of the L2 norm, but for a relative error of some 2⁻⁵⁰."""
    starts = range(0, integers.size, _DOT_PIECE)
    pieces = (integers[start : start + _DOT_PIECE].astype(np.float64) for start in starts)
    return sum(float(np.dot(piece, piece)) for piece in pieces)
