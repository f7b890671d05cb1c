"""Masks: keystreams that are added to a vector's lanes and vanish from the sum of all vectors.

Lanes are unsigned integers that wrap by themselves, so a uniform mask hides a lane perfectly and
masks cancel exactly. A mask is one keystream, over the main lanes and, from the next cipher block
on, over the exact ones; lanes are little-endian. Keystreams are seekable, so threads take ranges
of the vector, and the result is the same bytes for any number of threads and any size of chunk.

Memory, not arithmetic, is what costs: chunks are the outer loop, so that a chunk of the vector
stays in the cache while one keystream after the other is added to it, into no new memory.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from shared.secure_sum.config import MaskAlgorithm
from shared.secure_sum.keys import MaskKey

CHUNK_BYTES = 256 * 1024  # with the keystream beside it, within a core's second-level cache
_OPEN_AT_ONCE = 64  # keystreams, of about 1 KiB each
_BYTES_PER_THREAD = 8 * 2**20  # of keystream, about 1 ms: less is not worth starting a thread
_RANGE_BYTES = 512 * 1024  # of the vector per thread: with less, threads wait for the interpreter
_BLOCK_BYTES: dict[MaskAlgorithm, int] = {"aes-128-ctr": 16, "chacha20": 64}
_EXACT_ALIGNMENT = 16  # exact lanes begin in the mask at the next multiple of this
_RANGE_ALIGNMENT = 64  # chunks begin at a whole block of either cipher

Sign = Literal[1, -1]
_OPERATIONS: tuple[tuple[np.ufunc, Sign], ...] = ((np.add, 1), (np.subtract, -1))


@dataclass(frozen=True, slots=True, eq=False)
class Lanes:
    """One vector, or a sum of vectors, as integers that wrap; the arrays are changed in place."""

    main: NDArray[np.uint16] | NDArray[np.uint32] = field(repr=False)  # shape (d,)
    exact: NDArray[np.uint64] = field(repr=False)  # shape (k,)

    def __post_init__(self) -> None:
        """Raise ValueError unless both arrays are flat, whole and of a lane's type."""
        if self.main.dtype not in (np.uint16, np.uint32) or self.exact.dtype != np.uint64:
            raise ValueError(f"no lanes are of {self.main.dtype} and {self.exact.dtype}")
        for lanes in (self.main, self.exact):
            if lanes.ndim != 1 or not lanes.flags.c_contiguous:
                raise ValueError("lanes lie in one dimension, without gaps")

    def digest(self) -> bytes:
        """Return SHA-256 of width, lengths and content, 32 bytes."""
        digest = hashlib.sha256(b"shoal lanes v1\0")
        for lanes in (self.main, self.exact):
            digest.update(np.array([lanes.itemsize, lanes.size], dtype="<u8").tobytes())
            digest.update(lanes.data)
        return digest.digest()


def apply_masks(
    lanes: Lanes,
    masks: Sequence[tuple[MaskKey, Sign]],
    algorithm: MaskAlgorithm,
    *,
    threads: int = 1,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Add (1) or subtract (-1) every mask, in place.

    Beyond the lanes this takes a chunk of memory per thread, and one more.

    Args:
        lanes: changed in place.
        masks: in any order; the result does not depend on it.
        algorithm: what every mask is expanded with.
        threads: of the machine's cores; the result does not depend on it.
        chunk_bytes: of the vector that are worked on at once; the result does not depend on it.

    Raises:
        ValueError: the lanes are read-only, or a mask's key is of another algorithm.
    """
    if not masks:
        return
    streams = _Streams(lanes, chunk_bytes)
    ranges = streams.split(threads, len(masks))
    if len(ranges) <= 1:
        for start, end in ranges:
            streams.apply(masks, algorithm, start, end)
        return
    with ThreadPoolExecutor(len(ranges) - 1, thread_name_prefix="masks") as pool:
        others = [
            pool.submit(streams.apply, masks, algorithm, start, end) for start, end in ranges[1:]
        ]
        streams.apply(masks, algorithm, *ranges[0])
        for other in others:
            other.result()


class _Streams:
    """The lanes as one run of bytes, laid out as the keystreams that are added to them."""

    def __init__(self, lanes: Lanes, chunk_bytes: int) -> None:
        if not (lanes.main.flags.writeable and lanes.exact.flags.writeable):
            raise ValueError("masks are added in place, but the lanes are read-only")
        self._lanes = lanes
        self._exact_start = _round_up(lanes.main.nbytes, _EXACT_ALIGNMENT)
        self._length = self._exact_start + lanes.exact.nbytes
        self._chunk_bytes = _round_up(max(1, min(chunk_bytes, self._length)), _RANGE_ALIGNMENT)
        self._room = self._chunk_bytes + 2 * _RANGE_ALIGNMENT  # see `_chunks`
        self._zeros = memoryview(bytes(self._room))

    def split(self, threads: int, masks: int) -> list[tuple[int, int]]:
        """Cut the bytes into a range per thread that is worth its start; each at a whole block."""
        worth = min(self._length * masks // _BYTES_PER_THREAD, self._length // _RANGE_BYTES)
        parts = max(1, min(threads, worth))
        size = max(_RANGE_ALIGNMENT, _round_up(-(-self._length // parts), _RANGE_ALIGNMENT))
        return [(start, min(start + size, self._length)) for start in range(0, self._length, size)]

    def apply(
        self, masks: Sequence[tuple[MaskKey, Sign]], algorithm: MaskAlgorithm, start: int, end: int
    ) -> None:
        """Add the masks between two byte offsets; threads do so side by side."""
        buffer = _aligned(self._room)
        for first in range(0, len(masks), _OPEN_AT_ONCE):
            batch = masks[first : first + _OPEN_AT_ONCE]
            for combine, sign in _OPERATIONS:
                streams = [
                    keystream(mask, algorithm, start).update_into
                    for mask, of in batch
                    if of == sign
                ]
                for low, high in self._chunks(start, end):
                    self._apply_chunk(low, high, streams, combine, buffer)
        buffer.fill(0)

    def _chunks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut a range into chunks of about one size, and never a lane in two.

        All but the first chunk begin where a cache line does: 3 % faster.
        """
        address = self._lanes.main.ctypes.data + start
        beyond_line = address % _RANGE_ALIGNMENT // _EXACT_ALIGNMENT * _EXACT_ALIGNMENT
        count = -(-(end - start) // self._chunk_bytes)
        size = _round_up(-(-(end - start + beyond_line) // count), _RANGE_ALIGNMENT)
        low, high = start, start + size - beyond_line
        while low < end:
            yield low, min(high, end)
            low, high = high, high + size

    def _apply_chunk(
        self,
        low: int,
        high: int,
        streams: Sequence[Callable[[memoryview, memoryview], int]],
        combine: np.ufunc,
        buffer: NDArray[np.uint8],
    ) -> None:
        """Bring the next bytes of each keystream into the buffer, and from there into the lanes."""
        zeros, keys = self._zeros[: high - low], buffer[: high - low].data
        pieces = []
        for lanes, offset in ((self._lanes.main, 0), (self._lanes.exact, self._exact_start)):
            first, last = max(low, offset), min(high, offset + lanes.nbytes)
            if first < last:
                width = lanes.itemsize
                part = lanes[(first - offset) // width : (last - offset) // width]
                pieces.append((part, buffer[first - low : last - low].view(lanes.dtype)))
        if len(pieces) == 1:  # nearly all of them; the loop that all the time is spent in
            part, key_lanes = pieces[0]
            for update_into in streams:
                update_into(zeros, keys)
                combine(part, key_lanes, part)
            return
        for update_into in streams:
            update_into(zeros, keys)
            for part, key_lanes in pieces:
                combine(part, key_lanes, part)


def keystream(mask: MaskKey, algorithm: MaskAlgorithm, offset: int = 0) -> CipherContext:
    """Open a mask's keystream at a byte offset that is a whole number of blocks."""
    block, rest = divmod(offset, _BLOCK_BYTES[algorithm])
    if rest:
        raise ValueError(f"{algorithm} has no block that begins at byte {offset}")
    if algorithm == "aes-128-ctr":
        # SP 800-38A: the whole initialisation vector is a big-endian counter of blocks.
        counter = (int.from_bytes(mask.iv, "big") + block) % 2**128
        cipher = Cipher(algorithms.AES128(mask.key), modes.CTR(counter.to_bytes(16, "big")))
        return cipher.encryptor()
    # RFC 8439: a little-endian counter of 32 bits, then the nonce: 256 GiB, then it would repeat.
    counter = int.from_bytes(mask.iv[:4], "little") + block
    nonce = counter.to_bytes(4, "little") + mask.iv[4:]
    return Cipher(algorithms.ChaCha20(mask.key, nonce), mode=None).encryptor()


@lru_cache(maxsize=1)
def choose_algorithm(clock: Callable[[], float] = time.perf_counter) -> MaskAlgorithm:
    """Return the faster of the two on this machine: AES where the processor has instructions."""
    aes = MaskKey(bytes(16), bytes(16))
    chacha = MaskKey(bytes(32), bytes(16))
    seconds = {
        "aes-128-ctr": _seconds(aes, "aes-128-ctr", clock),
        "chacha20": _seconds(chacha, "chacha20", clock),
    }
    return "aes-128-ctr" if seconds["aes-128-ctr"] <= seconds["chacha20"] else "chacha20"


def _seconds(mask: MaskKey, algorithm: MaskAlgorithm, clock: Callable[[], float]) -> float:
    """Time one chunk, the fastest of ten: others may have the processor in between."""
    stream, zeros, room = keystream(mask, algorithm), bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES)
    times = []
    for _ in range(10):
        begun = clock()
        stream.update_into(zeros, room)
        times.append(clock() - begun)
    return min(times)


def _aligned(size: int) -> NDArray[np.uint8]:
    """Return room for ``size`` bytes that begins at a cache line."""
    room = np.empty(size + _RANGE_ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % _RANGE_ALIGNMENT
    return room[start : start + size]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
