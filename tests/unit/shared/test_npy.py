import io

import numpy as np
import pytest

from shared.errors import PeerError
from shared.npy import read_vector

FLOATS = {"<f4": np.float32}


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
def test_a_vector_comes_back_as_it_was_written(size: int) -> None:
    vector = np.arange(size, dtype=np.float32)
    np.testing.assert_array_equal(read_vector(npy(vector), FLOATS, what="it"), vector)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00",
        npy(np.zeros(3, np.float64)),
        npy(np.zeros((2, 2), np.float32)),
        npy(np.zeros(3, np.float32))[:-1],
        npy(np.zeros(3, np.float32)) + b"\0",
        npy(np.zeros(3, np.float32)).replace(b"(3,)", b"(9,)"),
        npy(np.zeros(3, np.float32)).replace(b"'<f4'", b"exit"),
    ],
)
def test_nothing_else_is_read(content: bytes) -> None:
    with pytest.raises(PeerError, match="it"):
        read_vector(content, FLOATS, what="it")


def test_a_header_that_claims_more_than_there_is_allocates_nothing() -> None:
    honest = npy(np.zeros(3, np.float32))
    with pytest.raises(PeerError):
        read_vector(honest.replace(b"(3,), }   ", b"(9999999,)"), FLOATS, what="it")
