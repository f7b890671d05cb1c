"""A random rotation that spreads a vector's norm evenly over its coordinates, and back.

Integers of few bits waste most of their range on an update whose few large coordinates stand
beside many small ones. A randomised Hadamard transform, x -> H·D·x / √B with random signs D, makes
every coordinate about as large as the others: Suresh, Yu, Kumar and McMahan, "Distributed Mean
Estimation with Limited Communication", ICML 2017.

H needs a power of two, B, and we pad nothing, since padding is uploaded too. B is the largest power
of two up to d; the first B coordinates are rotated, then the last B, with other signs. As B > d/2,
both together touch every coordinate, and whatever came last to it was a rotation of B coordinates
by fresh signs: each is at most k·|x|/√B but for a chance of 2·exp(-k²/2) (Hoeffding's bound).
"""

from functools import lru_cache
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

Vector = TypeVar("Vector", NDArray[np.float32], NDArray[np.float64])

_AXIS_BITS = 5  # H of 2^5 along an axis: measured fastest of 4 to 8
_SIGNS_AT_ONCE = 2**16


def block_length(length: int) -> int:
    """Return B, the largest power of two up to ``length``, which is at least 1."""
    return 1 << (length.bit_length() - 1)


def rotate(vector: Vector, seed: bytes) -> Vector:
    """Return the rotated vector, shape (d,), of the same norm; ``vector`` stays as it is.

    Args:
        vector: shape (d,), finite.
        seed: 16 bytes, public; the same seed gives the same rotation everywhere.
    """
    rotated = vector.copy()
    if rotated.size:
        first, last = _parts(rotated)
        signs = _Signs(seed, first.size)
        signs.flip(first, stream=0)
        _transform(first)
        if last is not None:
            signs.flip(last, stream=1)
            _transform(last)
    return rotated


def unrotate(vector: Vector, seed: bytes) -> Vector:
    """Return what `rotate` with this seed made ``vector`` of, but for the rounding of floats."""
    restored = vector.copy()
    if restored.size:
        first, last = _parts(restored)
        signs = _Signs(seed, first.size)
        if last is not None:
            _transform(last)
            signs.flip(last, stream=1)
        _transform(first)
        signs.flip(first, stream=0)
    return restored


def _parts(vector: Vector) -> tuple[Vector, Vector | None]:
    """Return views of the first and the last B coordinates; the latter only if they differ."""
    block = block_length(vector.size)
    return vector[:block], vector[-block:] if block < vector.size else None


class _Signs:
    """Two streams of B random signs each, from AES-128-CTR under the seed."""

    def __init__(self, seed: bytes, block: int) -> None:
        self._seed, self._block = seed, block

    def flip(self, part: Vector, *, stream: int) -> None:
        """Multiply ``part``, shape (B,), by the signs of ``stream``, in place."""
        counter = stream * (self._block // 128 + 1)  # 128 signs to a cipher block
        cipher = Cipher(algorithms.AES128(self._seed), modes.CTR(counter.to_bytes(16, "big")))
        bits = cipher.encryptor()
        for start in range(0, part.size, _SIGNS_AT_ONCE):
            piece = part[start : start + _SIGNS_AT_ONCE]
            packed = np.frombuffer(bits.update(bytes(-(-piece.size // 8))), np.uint8)
            negative = np.unpackbits(packed, count=piece.size)
            piece *= 1 - 2 * negative.astype(piece.dtype)


def _transform(part: Vector) -> None:
    """Apply H/√B in place, which is its own inverse.

    H of 2^m is the Kronecker product of smaller ones, each a matrix product along one axis.
    """
    inner, values = 1, part.reshape(1, -1)
    while inner < part.size:
        size = min(2**_AXIS_BITS, part.size // inner)
        matrix = _hadamard(size).astype(part.dtype)
        if inner == 1:  # the same, but one product instead of one for every `size` coordinates
            values = values.reshape(-1, size) @ matrix
        else:
            values = np.matmul(matrix, values.reshape(-1, size, inner))
        inner *= size
    part[:] = values.reshape(-1)


@lru_cache
def _hadamard(size: int) -> NDArray[np.float64]:
    """Return the orthogonal and symmetric Hadamard matrix, shape (size, size)."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    return matrix
