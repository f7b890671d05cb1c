import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.tasks.examples import Examples, held_out_rows, split_held_out


def rows_of(count: int, width: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@given(
    count=st.integers(0, 60),
    added=st.integers(0, 60),
    width=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_row_keeps_its_side_whatever_is_added_and_in_whatever_order(
    count: int, added: int, width: int, seed: int
) -> None:
    rows = rows_of(count + added, width, seed)
    order = np.random.default_rng(seed).permutation(count + added)

    alone = held_out_rows(rows[:count])
    together = held_out_rows(rows)
    shuffled = held_out_rows(rows[order])

    np.testing.assert_array_equal(alone, together[:count])
    np.testing.assert_array_equal(shuffled, together[order])


def test_a_tenth_is_held_out() -> None:
    held_out = held_out_rows(rows_of(20_000, 3, 0))

    assert 0.09 < held_out.mean() < 0.11


def test_copies_of_a_row_with_other_targets_stay_on_one_side() -> None:
    inputs = np.repeat(rows_of(500, 2, 1), 2, axis=0)
    examples = Examples(inputs, np.tile(np.array([0, 1]), 500))

    train, held_out = split_held_out(examples)

    assert not {row.tobytes() for row in train.inputs} & {row.tobytes() for row in held_out.inputs}
    assert len(train) + len(held_out) == 1000


def test_which_rows_are_held_out_never_changes() -> None:
    pixels = np.arange(40, dtype=np.uint8).reshape(40, 1)

    assert np.flatnonzero(held_out_rows(pixels)).tolist() == [2, 22, 33]


@pytest.mark.parametrize("dtype", [">f4", "<f4"])
def test_the_machine_s_byte_order_and_the_sign_of_zero_do_not_matter(dtype: str) -> None:
    rows = rows_of(300, 2, 3)
    rows[::2, 0] = 0.0
    same: NDArray[Any] = rows.astype(dtype)
    same[::2, 0] = -0.0

    np.testing.assert_array_equal(held_out_rows(same), held_out_rows(rows))


def test_images_of_fashion_mnist_s_size_are_split_quickly() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60_000, 1, 28, 28), dtype=np.uint8)

    started = time.process_time()
    held_out_rows(images)

    assert time.process_time() - started < 1.5


def test_the_digest_sees_every_change() -> None:
    examples = Examples(rows_of(5, 2, 0), np.arange(5))
    relabelled = Examples(examples.inputs, np.array([0, 1, 2, 3, 0]))

    digests = {
        examples.digest(),
        relabelled.digest(),
        examples.take(np.arange(4)).digest(),
        Examples(examples.inputs.reshape(5, 2, 1), examples.targets).digest(),
    }

    assert len(digests) == 4
    assert examples.digest() == examples.take(np.arange(5)).digest()


def test_inputs_and_targets_of_different_length_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="3 inputs do not fit 2 targets"):
        Examples(np.zeros((3, 1)), np.zeros(2))
