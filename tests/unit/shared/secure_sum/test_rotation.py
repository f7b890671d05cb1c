import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.secure_sum.rotation import block_length, rotate, unrotate

SEED = bytes(range(16))
lengths = st.integers(1, 3000)
seeds = st.integers(0, 2**32 - 1)


@given(length=lengths, seed=seeds)
def test_a_rotation_can_be_taken_back(length: int, seed: int) -> None:
    vector = np.random.default_rng(seed).normal(size=length)

    restored = unrotate(rotate(vector, SEED), SEED)

    np.testing.assert_allclose(restored, vector, atol=1e-12)


@given(length=lengths, seed=seeds)
def test_a_rotation_keeps_all_angles_and_norms(length: int, seed: int) -> None:
    one, other = np.random.default_rng(seed).normal(size=(2, length))

    turned, also_turned = rotate(one, SEED), rotate(other, SEED)

    assert turned @ turned == pytest.approx(one @ one)
    assert turned @ also_turned == pytest.approx(one @ other, abs=1e-9 * length)


def test_a_sum_can_be_rotated_back_as_a_whole() -> None:
    vectors = np.random.default_rng(1).normal(size=(7, 1001))

    total = np.sum([rotate(vector, SEED) for vector in vectors], axis=0)

    np.testing.assert_allclose(unrotate(total, SEED), vectors.sum(axis=0), atol=1e-12)


def test_the_same_seed_gives_the_same_rotation_for_ever() -> None:
    turned = rotate(np.arange(1.0, 41.0), SEED)

    signs = np.sign(np.round(turned, 9)).astype(np.int8)
    assert (
        hashlib.sha256(signs.tobytes()).hexdigest()
        == "6610627c2709142964c11f7c0eda19b9c24883ce5d1bd08ca2f6188b2b01e9b5"
    )
    np.testing.assert_array_equal(turned, rotate(np.arange(1.0, 41.0), SEED))


def test_another_seed_gives_another_rotation() -> None:
    vector = np.ones(64)

    assert not np.allclose(rotate(vector, SEED), rotate(vector, bytes(16)))


def test_a_vector_is_rotated_into_a_copy_of_its_own_type() -> None:
    vector = np.ones(100, np.float32)

    turned = rotate(vector, SEED)

    assert turned.dtype == np.float32
    assert (vector == 1).all()


@pytest.mark.parametrize("length", [1000, 1024, 1023, 2047])
def test_a_single_large_coordinate_is_spread_over_all(length: int) -> None:
    # Whatever the input, a coordinate is a sum of at least B terms of at most 1/√B each.
    limit = 5 / np.sqrt(block_length(length))
    for place in (0, length // 2, length - 1):
        spike = np.zeros(length)
        spike[place] = 1.0

        assert np.abs(rotate(spike, SEED)).max() < limit


@given(length=lengths)
def test_a_block_covers_more_than_half_of_a_vector(length: int) -> None:
    block = block_length(length)

    assert length / 2 < block <= length
    assert block & (block - 1) == 0


def test_nothing_rotates_to_nothing() -> None:
    assert rotate(np.zeros(0), SEED).size == unrotate(np.zeros(0), SEED).size == 0
