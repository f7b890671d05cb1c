"""What a masked vector looks like to somebody who wants to learn from it: nothing but noise."""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.secure_sum.config import MaskAlgorithm
from shared.secure_sum.keys import Binding, MaskKey, own_mask_key, pair_mask_key
from shared.secure_sum.masking import Lanes, Sign, apply_masks

BINDING = Binding(
    config_digest=b"c" * 32,
    run_id="run-1",
    round_number=3,
    session=b"s" * 32,
    roster_digest=b"r" * 32,
)
CASES: list[tuple[int, MaskAlgorithm]] = [
    (16, "aes-128-ctr"),
    (32, "aes-128-ctr"),
    (16, "chacha20"),
]
LANES = 10_000_000
LIKELY = 4.9  # standard deviations that a fair sample exceeds once in a million times
MERSENNE_TWISTER = 19_937  # bits of its state


@lru_cache(maxsize=1)
def masked_zeros(lane_bits: int, algorithm: MaskAlgorithm) -> NDArray[Any]:
    """Mask an update that is all zero as a device with four peers would; seeds make it repeat."""
    kind: Any = np.uint16 if lane_bits == 16 else np.uint32
    lanes = Lanes(np.zeros(LANES, kind), np.zeros(0, np.uint64))
    apply_masks(lanes, device_masks(algorithm), algorithm)
    return lanes.main


def device_masks(algorithm: MaskAlgorithm) -> list[tuple[MaskKey, Sign]]:
    signs: list[Sign] = [-1, -1, 1, 1]
    masks: list[tuple[MaskKey, Sign]] = [
        (own_mask_key(bytes(range(31)), BINDING, "c", algorithm), 1)
    ]
    for peer, sign in zip("abde", signs, strict=True):
        low, high = sorted("c" + peer)
        masks.append((pair_mask_key(peer.encode() * 32, BINDING, low, high, algorithm), sign))
    return masks


def deviation(counts: NDArray[Any]) -> float:
    """Return how far a chi-square statistic lies out, in standard deviations (Wilson-Hilferty)."""
    freedom, expected = counts.size - 1, counts.sum() / counts.size
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    spread = 2 / (9 * freedom)
    cube_root: float = (chi_square / freedom) ** (1 / 3)
    return (cube_root - (1 - spread)) / math.sqrt(spread)


def lag_one_deviation(values: NDArray[Any]) -> float:
    """Return the correlation of neighbours, in standard deviations of what chance makes."""
    centred = values.astype(np.float64)
    centred -= centred.mean()
    correlation = (centred[1:] @ centred[:-1]) / (centred @ centred)
    return float(correlation * math.sqrt(values.size))


@pytest.mark.parametrize(("lane_bits", "algorithm"), CASES)
def test_a_masked_vector_of_zeros_is_uniform(lane_bits: int, algorithm: MaskAlgorithm) -> None:
    lanes = masked_zeros(lane_bits, algorithm)
    assert abs(deviation(np.bincount(lanes.view(np.uint8), minlength=256))) < LIKELY
    words = lanes.view(np.uint16).reshape(LANES, -1)  # the low one, and with 32 bits the top one
    for word in words.T:
        counts = np.bincount(word, minlength=2**16)
        assert counts.min() > 0  # every value occurs, the largest one among them
        assert abs(deviation(counts)) < LIKELY
    assert abs(lag_one_deviation(lanes)) < LIKELY


def test_the_measures_see_generators_that_are_slightly_off() -> None:
    lanes = masked_zeros(16, "aes-128-ctr")
    halved = np.where(lanes % 4096 == 0, lanes + lanes % 7, lanes)  # one value in 4,096
    assert deviation(np.bincount(halved, minlength=2**16)) > LIKELY
    assert deviation(np.bincount(lanes[:1_000_000] & 0xFFFE, minlength=2**16)) > LIKELY
    echoed = lanes[:100_000].astype(np.float64)
    echoed[1:] += 0.02 * echoed[:-1]
    assert lag_one_deviation(echoed) > LIKELY


def linear_complexity(bits: NDArray[Any]) -> int:
    """Return the length of the shortest linear feedback register that makes ``bits``.

    Berlekamp and Massey's algorithm (J. Massey, IEEE Trans. Information Theory 15(1), 1969), with
    polynomials over GF(2) as integers: bit i is the coefficient of x^i.
    """
    feedback, earlier, shift, length, window = 1, 1, 1, 0, 0
    for place, bit in enumerate(bits.tolist()):
        window = window << 1 | bit
        if not (feedback & window).bit_count() & 1:
            shift += 1
        elif 2 * length <= place:
            feedback, earlier = feedback ^ earlier << shift, feedback
            length, shift = place + 1 - length, 1
        else:
            feedback ^= earlier << shift
            shift += 1
    return length


def test_the_measure_of_linear_complexity_finds_a_short_register() -> None:
    bits = [1, 0, 0, 1, 1]
    while len(bits) < 200:
        bits.append(bits[-5] ^ bits[-3])
    assert linear_complexity(np.array(bits)) == 5


@pytest.mark.parametrize("algorithm", ["aes-128-ctr", "chacha20"])
def test_masks_are_not_linear_as_those_of_a_mersenne_twister_are(algorithm: MaskAlgorithm) -> None:
    """Some 20,000 known lowest bits would give all others, however many masks were added up."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    count = 2 * MERSENNE_TWISTER + 2000
    theirs = np.zeros(count, np.int64)
    for seed in range(10):
        theirs += pseudo_rand_gen(seed.to_bytes(4, "little"), 2**32, [(count,)])[0]
    lanes = Lanes(np.zeros(count, np.uint32), np.zeros(0, np.uint64))
    apply_masks(lanes, device_masks(algorithm), algorithm)

    assert linear_complexity(theirs & 1) <= MERSENNE_TWISTER
    assert abs(linear_complexity(lanes.main & 1) - count / 2) < 20
