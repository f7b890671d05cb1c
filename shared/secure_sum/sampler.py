"""Integer noise from a cryptographic generator: Skellam and discrete Gaussian, by inversion.

A device's noise is worth as much as it is unpredictable and exact: a float64 cumulative
distribution is off by 1e-16 per coordinate, which at 1e7 coordinates is visible beside δ. So the
cumulative distribution is computed in decimals and kept to 128 bits, what is left in the tails
beyond 2⁻¹²⁸ is never drawn, and uniform bits come from AES-128-CTR under a fresh key.

Guide table (Chen and Asau, "On generating random variates from an empirical distribution", 1974):
the first 16 bits of a uniform number name one of 2¹⁶ cells. Most cells lie between two steps of
the cumulative distribution, and the outcome is read off. In the others 48 more bits decide by
binary search, and in case of a tie, which never comes, 64 more. About 1.5 ns a draw at small
variances, some 10 ns where the steps are as many as the cells.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate, chain
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Kind = Literal["skellam", "discrete-gaussian"]
Entropy = Callable[[int], bytes]  # os.urandom, or in tests something that repeats itself

MAX_VARIANCE = 2.0**24  # a table of 2 MiB and 0.2 s to make it; see `Table`
_CELLS = 2**16
_DIGITS = 60  # of the decimals: 128 bits are 39 digits, and rounding errors add up
_NATS = 110  # the tables end where no more than exp(-110) < 2^-157 is left
_AMBIGUOUS = np.iinfo(np.int32).min  # marks the cells in which more bits decide
_ZEROS = memoryview(bytes(2**18))
_DRAWS_AT_ONCE = 2**15  # words, cells and outcomes of so many stay in the cache


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One symmetric distribution over the integers: outcomes and when to take them.

    The outcome is ``lowest`` plus the number of thresholds that are not above a uniform number,
    both in units of 2⁻¹²⁸.
    """

    lowest: int
    guide: NDArray[np.int32]  # shape (2**16,): the outcome of each cell, or _AMBIGUOUS
    below: NDArray[np.int32]  # shape (2**16,): how many thresholds are below each cell
    high: NDArray[np.uint64]  # shape (outcomes - 1,), ascending: the thresholds' upper 64 bits
    low: NDArray[np.uint64]  # and their lower 64 bits


@lru_cache(maxsize=4)
def table_of(kind: Kind, variance: float) -> Table:
    """Build the table of a distribution around zero; ValueError beyond `MAX_VARIANCE`.

    Args:
        kind: ``skellam`` is the difference of two Poisson variables of half the variance each.
            ``discrete-gaussian`` has P(x) ~ exp(-x²/2σ²) at the integers.
        variance: of Skellam, exactly; the parameter σ² of the discrete Gaussian, whose variance
            is slightly less.
    """
    if not 0 < variance <= MAX_VARIANCE:
        raise ValueError(f"no table for a variance of {variance:g}")
    with localcontext() as context:
        context.prec = _DIGITS
        half = (_skellam_half if kind == "skellam" else _gaussian_half)(Decimal(variance))
        unit = Decimal(2**128) / (2 * sum(half) - half[0])
        outcomes = chain(reversed(half[1:]), half)
        thresholds = [int(step) for step in accumulate(unit * weight for weight in outcomes)]
    # Those that are 1 up to 128 bits are above every uniform number.
    reachable = [step for step in thresholds if step < 2**128]
    high = np.array([step >> 64 for step in reachable], np.uint64)
    low = np.array([step & (2**64 - 1) for step in reachable], np.uint64)
    lowest = 1 - len(half)
    return Table(lowest, *_decided(lowest, high), high, low)


def _skellam_half(variance: Decimal) -> list[Decimal]:
    """Return what P(0), P(1), ... are proportional to.

    P(k) = exp(-v)·I_k(v), and I_(k-1) = I_(k+1) + 2k/v · I_k, which is stable downwards (Miller).
    All terms are positive, so nothing cancels.
    """
    # Bernstein's bound on a Skellam tail is 2·exp(-k²/2(v + k/3)).
    last = math.ceil(_NATS / 3 + math.sqrt((_NATS / 3) ** 2 + 2 * _NATS * float(variance)))
    ratio = 2 / variance
    above, here = Decimal(0), Decimal(1)
    half = [here]
    for k in range(last, 0, -1):
        above, here = here, above + k * ratio * here
        half.append(here)
    half.reverse()
    return half


def _gaussian_half(variance: Decimal) -> list[Decimal]:
    """Return what P(0), P(1), ... are proportional to: q to the squares, q = exp(-1/2σ²)."""
    last = math.ceil(math.sqrt(2 * _NATS * float(variance))) + 1
    ratio = (-1 / (2 * variance)).exp()
    square, here = ratio * ratio, Decimal(1)
    half = [here]
    for _ in range(last):
        here *= ratio  # from k² to (k+1)² it is 2k + 1 more factors
        ratio *= square
        half.append(here)
    return half


def _decided(lowest: int, high: NDArray[np.uint64]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return the guide, and of each cell how many thresholds are below it."""
    first = np.arange(_CELLS, dtype=np.uint64) << np.uint64(48)
    below = np.searchsorted(high, first, side="left")
    up_to = np.searchsorted(high, first + np.uint64(2**48 - 1), side="right")
    guide = np.where(below == up_to, below + lowest, _AMBIGUOUS)
    return guide.astype(np.int32), below.astype(np.int32)


class Sampler:
    """Draws from one table with one keystream; make a new one, with fresh entropy, per vector."""

    def __init__(self, table: Table, entropy: Entropy) -> None:
        self._table = table
        self._keystream = Keystream(entropy(16))
        self._cells = np.empty(_DRAWS_AT_ONCE, np.uint16)
        self._indices = np.empty(_DRAWS_AT_ONCE, np.intp)
        self._outcomes = np.empty(_DRAWS_AT_ONCE, np.int32)

    def add_to(self, lanes: NDArray[np.uint16] | NDArray[np.uint32]) -> None:
        """Add an independent draw to each lane, in place; lanes wrap."""
        for start in range(0, lanes.size, _DRAWS_AT_ONCE):
            piece = lanes[start : start + _DRAWS_AT_ONCE]
            np.add(piece, self._draw(piece.size).astype(piece.dtype), out=piece)

    def draw(self, count: int) -> NDArray[np.int32]:
        """Return ``count`` independent draws."""
        draws = np.zeros(count, np.uint32)
        self.add_to(draws)
        return draws.view(np.int32)

    def _draw(self, count: int) -> NDArray[np.int32]:
        """Return up to `_DRAWS_AT_ONCE` draws, which the next call overwrites."""
        cells, indices = self._cells[:count], self._indices[:count]
        outcomes = self._outcomes[:count]
        self._keystream.fill(cells)
        np.copyto(indices, cells)  # take() would do it too, but into new memory
        self._table.guide.take(indices, out=outcomes, mode="clip")
        undecided = np.flatnonzero(outcomes == _AMBIGUOUS)
        if undecided.size:
            more = np.empty(undecided.size, np.uint64)
            self._keystream.fill(more)
            uniform = (cells[undecided].astype(np.uint64) << np.uint64(48)) | (
                more >> np.uint64(16)
            )
            outcomes[undecided] = self._search(uniform)
        return outcomes

    def _search(self, uniform: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the outcomes of uniform numbers of which the first 64 bits are known."""
        high = self._table.high
        # In most cells there is one threshold; where the next is not above it, there are more.
        start = self._table.below[uniform >> np.uint64(48)].astype(np.intp)
        steps = start + (high[start] <= uniform)
        more = np.flatnonzero(high[np.minimum(steps, high.size - 1)] <= uniform)
        steps[more] = np.searchsorted(high, uniform[more], side="right")
        tied = np.flatnonzero(high[np.maximum(steps - 1, 0)] == uniform)
        for place in tied:
            first = np.searchsorted(high, uniform[place], side="left")
            rest = np.empty(1, np.uint64)
            self._keystream.fill(rest)
            ties = self._table.low[first : steps[place]]
            steps[place] = first + np.searchsorted(ties, rest[0], side="right")
        outcomes: NDArray[np.int64] = steps + self._table.lowest
        return outcomes


class Keystream:
    """AES-128-CTR under a key that is used for nothing else, and once."""

    def __init__(self, key: bytes) -> None:
        self._cipher = Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()

    def fill(self, words: NDArray[np.uint16] | NDArray[np.uint64]) -> None:
        """Overwrite ``words``, 256 KiB at most, with the next bytes of the stream."""
        self._cipher.update_into(_ZEROS[: words.nbytes], words.view(np.uint8).data)
