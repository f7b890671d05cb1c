import hashlib
import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.secure_sum import masking
from shared.secure_sum.config import MaskAlgorithm
from shared.secure_sum.keys import Binding, MaskKey, own_mask_key, pair_mask_key
from shared.secure_sum.masking import Lanes, Sign, apply_masks, choose_algorithm, keystream

BINDING = Binding(
    config_digest=b"c" * 32,
    run_id="run-1",
    round_number=3,
    session=b"s" * 32,
    roster_digest=b"r" * 32,
)
SECRET = bytes(range(32))
# RFC 8439, appendix A.1, test vectors 1 and 2: key and nonce zero, blocks 0 and 1.
CHACHA20_BLOCKS = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)
algorithms_of = st.sampled_from(["aes-128-ctr", "chacha20"])


@pytest.fixture(autouse=True)
def eager_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads be used however little there is to do."""
    monkeypatch.setattr(masking, "_BYTES_PER_THREAD", 1)
    monkeypatch.setattr(masking, "_RANGE_BYTES", 1)


def mask_of(seed: object, algorithm: MaskAlgorithm) -> MaskKey:
    content = hashlib.sha512(repr(seed).encode()).digest()
    if algorithm == "chacha20":
        return MaskKey(content[:32], bytes(4) + content[32:44])
    return MaskKey(content[:16], content[16:32])


def masks_of(seed: int, count: int, algorithm: MaskAlgorithm) -> list[tuple[MaskKey, Sign]]:
    signs: list[Sign] = [1, -1, -1]
    return [(mask_of((seed, place), algorithm), signs[place % 3]) for place in range(count)]


def random_lanes(seed: int, *, length: int, exact: int, lane_bits: int) -> Lanes:
    rng = np.random.default_rng(seed)
    kind: Any = np.uint16 if lane_bits == 16 else np.uint32
    main = rng.integers(0, 2**lane_bits, length, dtype=kind)
    return Lanes(main, rng.integers(0, 2**64, exact, dtype=np.uint64))


def copy_of(lanes: Lanes) -> Lanes:
    return Lanes(lanes.main.copy(), lanes.exact.copy())


def counter_mode(mask: MaskKey, size: int) -> bytes:
    """Make AES-128-CTR's keystream from single blocks, so that no counter mode is trusted."""
    block = Cipher(algorithms.AES128(mask.key), modes.ECB()).encryptor()  # noqa: S305  # one by one
    start = int.from_bytes(mask.iv, "big")
    blocks = range(start, start + -(-size // 16))
    return b"".join(block.update((i % 2**128).to_bytes(16, "big")) for i in blocks)[:size]


def plainly_masked(lanes: Lanes, masks: Sequence[tuple[bytes, Sign]]) -> Lanes:
    """Add whole keystreams, one after the other, in new memory."""
    main, exact = lanes.main.astype(object), lanes.exact.astype(object)
    start = -(-lanes.main.nbytes // 16) * 16
    for stream, sign in masks:
        key_lanes = np.frombuffer(stream[: lanes.main.nbytes], lanes.main.dtype)
        main = main + sign * key_lanes.astype(object)
        key_lanes = np.frombuffer(stream[start : start + lanes.exact.nbytes], np.uint64)
        exact = exact + sign * key_lanes.astype(object)
    wrapped: Any = np.array(main % 2 ** (8 * lanes.main.itemsize), dtype=lanes.main.dtype)
    return Lanes(wrapped, np.array(exact % 2**64, dtype=np.uint64))


def assert_equal(one: Lanes, other: Lanes) -> None:
    np.testing.assert_array_equal(one.main, other.main)
    np.testing.assert_array_equal(one.exact, other.exact)


@pytest.mark.parametrize("lane_bits", [16, 32])
@pytest.mark.parametrize(("length", "exact"), [(0, 0), (0, 1), (1, 0), (1, 1), (7, 3), (1001, 2)])
def test_a_mask_is_the_keystream_over_main_and_then_exact_lanes(
    length: int, exact: int, lane_bits: int
) -> None:
    lanes = random_lanes(1, length=length, exact=exact, lane_bits=lane_bits)
    pair = pair_mask_key(SECRET, BINDING, "a", "b", "aes-128-ctr")
    own = own_mask_key(SECRET[:31], BINDING, "a", "aes-128-ctr")
    size = lanes.main.nbytes + 16 + lanes.exact.nbytes
    expected = plainly_masked(lanes, [(counter_mode(pair, size), -1), (counter_mode(own, size), 1)])

    apply_masks(lanes, [(pair, -1), (own, 1)], "aes-128-ctr")

    assert_equal(lanes, expected)


def test_chacha20_is_that_of_the_standard() -> None:
    lanes = Lanes(np.zeros(3, np.uint16), np.zeros(14, np.uint64))  # 6 bytes, 10 unused, 112
    apply_masks(lanes, [(MaskKey(bytes(32), bytes(16)), 1)], "chacha20")
    assert lanes.main.tobytes() == CHACHA20_BLOCKS[:6]
    assert lanes.exact.tobytes() == CHACHA20_BLOCKS[16:]


def test_the_bytes_of_a_masked_vector_never_change() -> None:
    for algorithm, expected in PINNED.items():
        lanes = Lanes(np.arange(5, dtype=np.uint16), np.arange(2, dtype=np.uint64))
        mask = pair_mask_key(SECRET, BINDING, "a", "b", algorithm)
        apply_masks(lanes, [(mask, -1)], algorithm)
        assert lanes.digest().hex()[:32] == expected


PINNED: dict[MaskAlgorithm, str] = {
    "aes-128-ctr": "83f60720174868108d3de466062ffebe",
    "chacha20": "ad7c22a424cca5dadbd22724f148558b",
}


@pytest.mark.parametrize("block", [0, 1, 255, 256, 2**20])
@pytest.mark.parametrize("iv", [bytes(16), b"\xff" * 16, b"\0" * 8 + b"\xff" * 8, bytes(range(16))])
def test_aes_counts_its_blocks_in_all_of_the_initialisation_vector(iv: bytes, block: int) -> None:
    mask = MaskKey(SECRET[:16], iv)
    counted = MaskKey(mask.key, ((int.from_bytes(iv, "big") + block) % 2**128).to_bytes(16, "big"))
    stream = keystream(mask, "aes-128-ctr", 16 * block)
    assert stream.update(bytes(100)) == counter_mode(counted, 100)


@given(algorithm=algorithms_of, block=st.integers(0, 100))
def test_a_keystream_can_be_entered_at_any_block(algorithm: MaskAlgorithm, block: int) -> None:
    mask = mask_of(block, algorithm)
    whole = keystream(mask, algorithm).update(bytes(64 * 101))
    assert keystream(mask, algorithm, 64 * block).update(bytes(64)) == whole[64 * block :][:64]


def test_a_chacha20_keystream_can_be_entered_beyond_four_gibibytes() -> None:
    mask = MaskKey(bytes(32), bytes(16))
    stream = keystream(mask, "chacha20", 2**33)
    counted = (2**27).to_bytes(4, "little") + bytes(12)
    expected = Cipher(algorithms.ChaCha20(bytes(32), counted), None).encryptor().update(bytes(64))
    assert stream.update(bytes(64)) == expected


def test_a_keystream_that_would_repeat_is_not_entered() -> None:
    with pytest.raises(OverflowError):
        keystream(MaskKey(bytes(32), bytes(16)), "chacha20", 2**38)


@pytest.mark.parametrize(
    ("algorithm", "offset"), [("aes-128-ctr", 8), ("chacha20", 16), ("chacha20", 63)]
)
def test_a_keystream_is_entered_at_whole_blocks_only(algorithm: MaskAlgorithm, offset: int) -> None:
    with pytest.raises(ValueError, match=f"no block that begins at byte {offset}"):
        keystream(mask_of(0, algorithm), algorithm, offset)


@settings(max_examples=60)
@given(
    algorithm=algorithms_of,
    lane_bits=st.sampled_from([16, 32]),
    length=st.integers(0, 3000),
    exact=st.integers(0, 40),
    count=st.integers(0, 70),
    threads=st.integers(1, 4),
    chunk_bytes=st.integers(1, 9000),
)
def test_threads_and_chunks_do_not_change_a_bit(
    *,
    algorithm: MaskAlgorithm,
    lane_bits: int,
    length: int,
    exact: int,
    count: int,
    threads: int,
    chunk_bytes: int,
) -> None:
    lanes = random_lanes(length, length=length, exact=exact, lane_bits=lane_bits)
    masks = masks_of(count, count, algorithm)
    size = lanes.main.nbytes + 16 + lanes.exact.nbytes
    streams = [(keystream(mask, algorithm).update(bytes(size)), sign) for mask, sign in masks]
    expected = plainly_masked(lanes, streams)

    apply_masks(lanes, masks, algorithm, threads=threads, chunk_bytes=chunk_bytes)

    assert_equal(lanes, expected)


@given(algorithm=algorithms_of, offset=st.integers(0, 31))
def test_where_the_lanes_lie_in_memory_does_not_matter(
    algorithm: MaskAlgorithm, offset: int
) -> None:
    content = np.zeros(20_000 + 128, np.uint8)
    start = -content.ctypes.data % 64 + 2 * offset
    there = Lanes(content[start : start + 20_000].view(np.uint16), np.zeros(3, np.uint64))
    here = Lanes(np.zeros(10_000, np.uint16), np.zeros(3, np.uint64))
    masks = masks_of(1, 3, algorithm)

    apply_masks(there, masks, algorithm, threads=2, chunk_bytes=4096)
    apply_masks(here, masks, algorithm)

    assert_equal(there, here)


def test_threads_are_used_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    long = masking._Streams(Lanes(np.zeros(10**6, np.uint32), np.zeros(1, np.uint64)), 2**18)
    short = masking._Streams(Lanes(np.zeros(10**5, np.uint16), np.zeros(1, np.uint64)), 2**18)
    assert [len(long.split(threads, 32)) for threads in (1, 2, 3, 100)] == [1, 2, 3, 7]
    assert [len(long.split(2, masks)) for masks in (1, 3, 5)] == [1, 1, 2]
    assert [len(short.split(threads, 10_000)) for threads in (1, 2, 100)] == [1, 1, 1]


@settings(max_examples=30)
@given(
    algorithm=algorithms_of,
    devices=st.integers(2, 8),
    length=st.integers(0, 500),
    lane_bits=st.sampled_from([16, 32]),
)
def test_pair_masks_vanish_from_the_sum_and_own_masks_can_be_removed(
    algorithm: MaskAlgorithm, devices: int, length: int, lane_bits: int
) -> None:
    names = [f"device-{place}" for place in range(devices)]
    plain = [
        random_lanes(place, length=length, exact=2, lane_bits=lane_bits) for place in range(devices)
    ]
    total = Lanes(np.zeros_like(plain[0].main), np.zeros(2, np.uint64))
    own = [own_mask_key(bytes([i]) * 31, BINDING, names[i], algorithm) for i in range(devices)]
    for i, lanes in enumerate(map(copy_of, plain)):
        masks: list[tuple[MaskKey, Sign]] = [(own[i], 1)]
        for j in range(devices):
            if i != j:
                low, high = min(i, j), max(i, j)
                secret = bytes([low, high]) * 16
                key = pair_mask_key(secret, BINDING, names[low], names[high], algorithm)
                masks.append((key, 1 if i < j else -1))
        apply_masks(lanes, masks, algorithm)
        np.add(total.main, lanes.main, out=total.main)
        np.add(total.exact, lanes.exact, out=total.exact)

    apply_masks(total, [(key, -1) for key in own], algorithm)

    kind = plain[0].main.dtype
    expected = np.sum([lanes.main.astype(np.uint64) for lanes in plain], axis=0)
    np.testing.assert_array_equal(total.main, expected.astype(kind))
    np.testing.assert_array_equal(total.exact, np.sum([x.exact for x in plain], axis=0))


@pytest.mark.parametrize("threads", [1, 2])
def test_masking_takes_less_than_a_mebibyte_per_thread_beside_the_lanes(threads: int) -> None:
    lanes = Lanes(np.zeros(2_000_000, np.uint32), np.zeros(1000, np.uint64))
    masks = masks_of(1, 70, "aes-128-ctr")
    apply_masks(lanes, masks[:1], "aes-128-ctr", threads=threads)
    tracemalloc.start()
    try:
        apply_masks(lanes, masks, "aes-128-ctr", threads=threads)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    contexts = masking._OPEN_AT_ONCE * 1024 * threads  # OpenSSL's own memory is not traced
    assert peak + contexts < threads * 2**20


def test_lanes_that_cannot_be_changed_are_refused() -> None:
    lanes = Lanes(np.frombuffer(bytes(8), np.uint16), np.zeros(1, np.uint64))
    with pytest.raises(ValueError, match="read-only"):
        apply_masks(lanes, masks_of(1, 1, "aes-128-ctr"), "aes-128-ctr")


@pytest.mark.parametrize("threads", [1, 2])
def test_a_key_of_the_other_algorithm_is_refused(threads: int) -> None:
    lanes = Lanes(np.zeros(1000, np.uint16), np.zeros(1, np.uint64))
    for algorithm, other in (("aes-128-ctr", "chacha20"), ("chacha20", "aes-128-ctr")):
        masks = masks_of(1, 1, other)  # type: ignore[arg-type]  # mypy widens the literal
        with pytest.raises(ValueError, match=r"key|Key"):
            apply_masks(lanes, masks, algorithm, threads=threads)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("main", "exact"),
    [
        (np.zeros(1, np.uint8), np.zeros(1, np.uint64)),
        (np.zeros(1, np.int16), np.zeros(1, np.uint64)),
        (np.zeros(1, ">u2"), np.zeros(1, np.uint64)),
        (np.zeros(1, np.uint16), np.zeros(1, np.int64)),
        (np.zeros((2, 2), np.uint16), np.zeros(1, np.uint64)),
        (np.zeros(4, np.uint16)[::2], np.zeros(1, np.uint64)),
        (np.zeros(1, np.uint16), np.zeros(4, np.uint64)[::2]),
    ],
)
def test_what_are_no_lanes_is_refused(main: Any, exact: Any) -> None:
    with pytest.raises(ValueError, match=r"lane"):
        Lanes(main, exact)


def test_a_digest_tells_width_length_and_place_apart() -> None:
    def some() -> Iterator[Lanes]:
        kind: Any
        for kind, sizes in ((np.uint16, (0, 1, 2, 4)), (np.uint32, (0, 1, 2))):
            for size in sizes:
                for exact in (0, 1, 2):
                    yield Lanes(np.zeros(size, kind), np.zeros(exact, np.uint64))
        yield Lanes(np.ones(4, np.uint16), np.zeros(1, np.uint64))
        yield Lanes(np.zeros(4, np.uint16), np.ones(1, np.uint64))

    digests = [lanes.digest() for lanes in some()]
    assert len(set(digests)) == len(digests) == 23
    assert all(len(digest) == 32 for digest in digests)


def test_lanes_are_never_shown() -> None:
    lanes = Lanes(np.full(3, 4711, np.uint16), np.full(2, 815, np.uint64))
    assert repr(lanes) == "Lanes()"


def test_the_faster_algorithm_is_chosen() -> None:
    def clock_with(aes_s: float, chacha_s: float) -> Any:
        times = iter(
            moment for seconds in (aes_s, chacha_s) for _ in range(10) for moment in (0.0, seconds)
        )
        return lambda: next(times)

    assert choose_algorithm(clock_with(1.0, 2.0)) == "aes-128-ctr"
    assert choose_algorithm(clock_with(2.0, 1.0)) == "chacha20"
