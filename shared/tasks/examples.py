"""Examples in memory, and the tenth of them that no run ever trains on.

A row is held out when a hash of its inputs says so. The answer depends on nothing else: not on the
order of rows, not on which rows are beside it, not on its target. So a row keeps its side while the
data grow or are relabelled, and copies of one row never lie on both sides.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_HELD_OUT_ONE_IN = 10
_HASH_PURPOSE = b"shoal-held-out-1"  # another purpose would draw other rows; never change it


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """``n`` rows of one data set, in the raw units of its contract."""

    inputs: NDArray[Any]  # (n, …): images uint8 (n, channels, height, width), features float32
    targets: NDArray[Any]  # (n,): class indices int64, or numbers float32

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs do not fit {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: NDArray[Any]) -> "Examples":
        """Return the rows that an index or boolean mask of shape (n,) names."""
        return Examples(self.inputs[rows], self.targets[rows])

    def digest(self) -> str:
        """Hex SHA-256 of all content in this order; says whether a data set changed."""
        content = hashlib.sha256()
        for array in (self.inputs, self.targets):
            content.update(f"{array.dtype.name}{array.shape}".encode())
            content.update(_canonical(array))
        return content.hexdigest()


def split_held_out(examples: Examples) -> tuple[Examples, Examples]:
    """Part the examples into those to train on and the tenth, held out, to measure on."""
    mask = held_out_rows(examples.inputs)
    return examples.take(~mask), examples.take(mask)


def held_out_rows(inputs: NDArray[Any]) -> NDArray[np.bool_]:
    """Say for each row of ``inputs``, shape (n, …), whether it is held out; shape (n,)."""
    if not len(inputs):
        return np.zeros(0, np.bool_)
    content = _canonical(inputs)
    width = len(content) // len(inputs)
    digests = b"".join(
        hashlib.blake2b(
            content[start : start + width], digest_size=8, person=_HASH_PURPOSE
        ).digest()
        for start in range(0, len(content), width)
    )
    mask: NDArray[np.bool_] = np.frombuffer(digests, "<u8") % _HELD_OUT_ONE_IN == 0
    return mask


def _canonical(array: NDArray[Any]) -> memoryview:
    """Return the bytes of an array, the same on every machine; -0.0 counts as 0.0."""
    if np.issubdtype(array.dtype, np.floating):
        array = array + array.dtype.type(0)
    little_endian = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return little_endian.reshape(-1).view(np.uint8).data
