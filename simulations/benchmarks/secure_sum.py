"""``shoal-sim bench secure-sum``: the protocol's arithmetic against that of Flower 1.41's SecAgg+.

Both sides run in this process, in turns, and every figure is a median. Where k = 32 is named, ours
is the complete graph of 33 devices; at n = 100 it is the complete graph of 100, three times the
work of Flower's ring with k = 32. One thread unless a row says otherwise. Whole rounds, over real
transports and without a reference, are in secure_round.py.
"""

import gc
import os
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares

from shared.errors import ConfigError
from shared.secure_sum.config import LaneBits
from shared.secure_sum.keys import MaskKey
from shared.secure_sum.masking import Lanes, apply_masks
from shared.secure_sum.messages import Shared, decode, encode
from shared.secure_sum.shamir import Interpolation, deal
from simulations.benchmarks.flower_secagg import FlowerSecAgg
from simulations.benchmarks.report import Row, row_at_least, row_at_most
from simulations.benchmarks.secure_round import rows as secure_round_rows
from simulations.benchmarks.secure_session import Session, Setting, random_lanes

Progress = Callable[[str], None]
_NEIGHBOURS = 32
_REPEATS, _QUICK_REPEATS = 5, 2
_SLOW_REPEATS = 3
_LANE = {16: np.uint16, 32: np.uint32}
_MIB = 2**20
_PEM_BYTES = 306  # of the key file that Flower shares


def run(*, only: str | None, quick: bool, progress: Progress) -> list[Row]:
    """Measure all rows, or the one named ``only``.

    Args:
        only: name of a row.
        quick: fewer repetitions.
        progress: is told what is being measured.

    Raises:
        ConfigError: there is no such row.
    """
    if only is not None and only not in MEASUREMENTS:
        raise ConfigError(f"there is no row {only!r}; choose one of: {'; '.join(MEASUREMENTS)}")
    repeats = _QUICK_REPEATS if quick else _REPEATS
    rows = []
    for name in MEASUREMENTS if only is None else (only,):
        progress(f"measuring {name} …")
        rows.append(MEASUREMENTS[name](name, repeats=repeats))
    return rows


# --- the client -----------------------------------------------------------------------------------


def _masking(name: str, *, repeats: int, length: int, lane_bits: LaneBits, least: float) -> Row:
    """Compare key agreement, clipping, rounding and masking of one vector."""
    vector = np.random.default_rng(0).normal(0, 0.001, length).astype(np.float32)
    theirs = _flower_ring(_NEIGHBOURS + 1)
    ours_s, theirs_s = [], []
    for _ in range(repeats + 1):
        theirs_s.append(theirs.mask(1, vector)[0])
        session = _shared_session(Setting(_NEIGHBOURS + 1, length, lane_bits))
        ours_s.append(session.mask(session.names[0], vector)[0])
    return row_at_least(name, _median(ours_s), "s", reference=_median(theirs_s), least=least)


def _share_stage(name: str, *, repeats: int, least: float) -> Row:
    """Compare checking peers and dealing shares; ours checks a signature of every peer."""
    theirs = _flower_ring(_NEIGHBOURS + 1)
    ours_s, theirs_s = [], []
    for place in range(repeats + 1):
        session = Session(Setting(_NEIGHBOURS + 1, 1000, 16))
        ours_s.append(session.share(session.names[place])[0])
        theirs_s.append(theirs.share(place + 1)[0])
    return row_at_least(name, _median(ours_s), "s", reference=_median(theirs_s), least=least)


def _shamir(name: str, *, repeats: int, least: float) -> Row:
    """Compare dealing and rebuilding both secrets of one device, n = 100, t = 51."""
    count, threshold = 100, 51
    places = range(1, count + 1)

    def ours() -> None:
        interpolation = Interpolation(places[:threshold])
        for _ in ("seed", "key"):
            shares = deal(os.urandom(31), threshold=threshold, places=places, entropy=os.urandom)
            interpolation.rebuild([shares[place] for place in places[:threshold]])

    def theirs() -> None:
        for size in (32, _PEM_BYTES):
            combine_shares(create_shares(os.urandom(size), threshold, count))

    ours_s, theirs_s = [], []
    for _ in range(min(3, repeats) + 1):
        theirs_s.append(_seconds(theirs))
        ours_s.append(_seconds(ours))
    return row_at_least(name, _median(ours_s), "s", reference=_median(theirs_s), least=least)


def _kernel(name: str, *, repeats: int, lane_bits: LaneBits, threads: int, least: float) -> Row:
    """Compare expanding and adding masks with expanding alone; or two threads with one."""
    length, masks = 2_000_000, 32
    lanes = Lanes(np.zeros(length, _LANE[lane_bits]), np.zeros(0, np.uint64))
    keys = [(MaskKey(os.urandom(16), os.urandom(16)), 1) for _ in range(masks)]
    size = lanes.main.nbytes
    stream = Cipher(algorithms.AES128(os.urandom(16)), modes.CTR(os.urandom(16))).encryptor()
    zeros, room = bytes(128 * 1024), bytearray(128 * 1024)

    def keystream() -> None:
        for _ in range(masks * size // len(zeros)):
            stream.update_into(zeros, room)

    def kernel(on: int) -> None:
        apply_masks(lanes, keys, "aes-128-ctr", threads=on)  # type: ignore[arg-type]  # all +1

    reference = keystream if threads == 1 else partial(kernel, 1)
    ours_s, theirs_s = [], []
    for _ in range(2 * repeats + 1):
        theirs_s.append(_seconds(reference))
        ours_s.append(_seconds(partial(kernel, threads)))
    rates = [masks * size / seconds / 1e9 for seconds in (_median(ours_s), _median(theirs_s))]
    return row_at_least(
        name, rates[0], "GB/s", reference=rates[1], least=least, more_is_better=True
    )


def _upload(name: str, *, repeats: int, most: float) -> Row:
    """Weigh what a device sends at S2, its signature included."""
    del repeats
    length = 1_000_000
    vector = np.zeros(length, np.float32)
    session = _shared_session(Setting(_NEIGHBOURS + 1, length, 16))
    _, answer, lanes = session.mask(session.names[0], vector)
    ours = (lanes.main.nbytes + lanes.exact.nbytes + len(encode(answer))) / length
    theirs = sum(map(len, _flower_ring(_NEIGHBOURS + 1).mask(1, vector)[1])) / length
    return row_at_most(name, ours, "B", limit=most, reference=theirs)


def _key_shares(name: str, *, repeats: int, commitments: bool) -> Row:
    """Weigh what a device sends at S1: boxes and signature, or the commitments beside them."""
    del repeats
    session = Session(Setting(_NEIGHBOURS + 1, 1000, 16))
    _, answer = session.share(session.names[0])
    whole = len(encode(answer))
    shared = decode(answer.body, Shared)
    added = sum(
        len(d.seed_share_commitment) + len(d.key_share_commitment) + 4 for d in shared.dealt
    )
    if commitments:
        return Row(name=name, value=added, unit="B", reference=None, ratio=None, target="", ok=None)
    theirs = _flower_share_bytes()
    return row_at_most(name, whole - added, "B", limit=3500, reference=theirs)


# --- the server -----------------------------------------------------------------------------------


def _unmask(
    name: str,
    *,
    repeats: int,
    devices: int,
    length: int,
    lane_bits: LaneBits,
    dropped: int,
    least: float,
) -> Row:
    """Compare rebuilding secrets and removing masks, from the survivors' answers to the sum."""
    theirs = _flower_opened(devices)
    # At random: Flower's ring fails where neighbours are lost together.
    lost = np.random.default_rng(0).choice(devices, dropped, replace=False) + 1
    ours_s: list[float] = []
    theirs_s: list[float] = []
    for _ in range(repeats):
        if len(theirs_s) < _SLOW_REPEATS:  # it takes up to half a minute, always the same
            theirs_s.append(theirs.unmask(length, lost.tolist()))
        ours_s.append(_unmask_seconds(Setting(devices, length, lane_bits), dropped=dropped))
    return row_at_least(
        name,
        statistics.median(ours_s),
        "s",
        reference=statistics.median(theirs_s),
        least=least,
    )


def _sharded(name: str, *, repeats: int, most: float) -> Row:
    """Take 1,000 devices in shards of 250, of which 30 % never advertise and 5 % never mask."""
    setting = Setting(250, 100_000, 16)
    shards = 1 if repeats < _REPEATS else 4
    seconds = [_unmask_seconds(setting, lost_in_training=75, dropped=9) for _ in range(shards)]
    return row_at_most(name, max(seconds), "s", limit=most)


def _unmask_seconds(setting: Setting, *, dropped: int, lost_in_training: int = 0) -> float:
    """Return the server's seconds for one sum, having checked it against the plain sum."""
    rng = np.random.default_rng(0)
    session = _shared_session(setting, lost_in_training=lost_in_training)
    present = session.names[dropped:]
    expected = np.zeros(setting.length, _LANE[setting.lane_bits])
    for name in present:
        lanes = random_lanes(session.config, rng)
        np.add(expected, lanes.main, out=expected)
        session.server.take_masked(session.mask_lanes(name, lanes), lanes)
    seconds, result = session.unmask(session.reveal(present))
    if not np.array_equal(result.lanes.main, expected):
        raise AssertionError("the unmasked sum is not the sum of the encodings")
    return seconds


def _server_memory(name: str, *, repeats: int) -> Row:
    """Trace the server's allocations while 100 vectors of 10⁶ lanes come in and are unmasked."""
    del repeats
    vectors = 3 * 2 * 1_000_000
    peak = _peak_bytes(Setting(100, 1_000_000, 16))
    flower = 100 * 8 * 1_000_000  # it keeps every message of the stage
    return row_at_most(
        name,
        peak / _MIB,
        "MiB",
        limit=round(vectors / _MIB + 4, 2),
        reference=flower / _MIB,
        target="<= 3 vectors + 4 MiB",
    )


def _server_memory_of_many(name: str, *, repeats: int) -> Row:
    """Compare one shard of 250 devices, of which 1,000 make four, with 100 devices."""
    del repeats
    few = _peak_bytes(Setting(100, 1_000_000, 16))
    many = _peak_bytes(Setting(250, 1_000_000, 16))
    return row_at_most(
        name,
        many / _MIB,
        "MiB",
        limit=1.3 * few / _MIB,
        reference=few / _MIB,
        target="<= 1.3 x the reference",
    )


def _peak_bytes(setting: Setting) -> int:
    """Return how much the server allocates at most from the first vector to the sum.

    What devices allocate is not traced. A vector is copied when its turn comes, and that copy is
    gone before the next; it counts as one of the server's, which has it in hand then.
    """
    session, rng = _shared_session(setting), np.random.default_rng(0)
    present = session.names[setting.devices // 20 :]
    uploads = []
    for name in present:
        lanes = random_lanes(session.config, rng)
        uploads.append((session.mask_lanes(name, lanes), lanes))

    def mask() -> None:
        for answer, lanes in uploads:
            session.server.take_masked(answer, Lanes(lanes.main.copy(), lanes.exact))

    peak, left = _traced(mask)
    revealed = session.reveal(present)
    peak_at_end, _ = _traced(lambda: session.unmask(revealed))
    sum_bytes = uploads[0][1].main.nbytes  # it is there before the first vector
    return sum_bytes + max(peak, left + peak_at_end)


def _traced(work: Callable[[], object]) -> tuple[int, int]:
    """Return how many bytes ``work`` allocated at most, and how many it left."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return peak, left


# --- what the measurements share ------------------------------------------------------------------


def _shared_session(setting: Setting, *, lost_in_training: int = 0) -> Session:
    session = Session(setting, lost_in_training=lost_in_training)
    session.share_all()
    return session


@lru_cache(maxsize=1)
def _flower_opened(devices: int) -> FlowerSecAgg:
    """Return a ring of clients that hold each other's shares; making it takes some seconds."""
    neighbours = min(_NEIGHBOURS, devices - 2)  # even, and at most all others
    ring = FlowerSecAgg(devices, neighbours, threshold=neighbours * 2 // 5 + 1)
    ring.share_all()
    ring.open_boxes()
    return ring


@lru_cache(maxsize=1)
def _flower_ring(devices: int) -> FlowerSecAgg:
    return _flower_opened(devices)


@lru_cache(maxsize=1)
def _flower_share_bytes() -> int:
    return _flower_ring(_NEIGHBOURS + 1).share_bytes(1)


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _median(seconds: list[float]) -> float:
    """Leave out the first, which warms up."""
    return statistics.median(seconds[1:])


_BOTH: tuple[LaneBits, ...] = (16, 32)


def _names() -> Iterator[tuple[str, Callable[..., Row]]]:
    for exponent, targets in ((6, (11, 6)), (7, (18, 9))):
        for bits, least in zip(_BOTH, targets, strict=True):
            yield (
                f"client masking, d=10^{exponent}, k=32, {bits} bit",
                partial(_masking, length=10**exponent, lane_bits=bits, least=least),
            )
    for bits in _BOTH:
        yield (
            f"mask kernel against the raw keystream, {bits} bit",
            partial(_kernel, lane_bits=bits, threads=1, least=0.75),
        )
    yield (
        "mask kernel, two threads against one, 16 bit",
        partial(_kernel, lane_bits=16, threads=2, least=1.5),
    )
    yield "share stage, k=32, signatures checked", partial(_share_stage, least=20)
    yield "Shamir, both secrets, n=100, t=51", partial(_shamir, least=500)
    for dropped, least in ((5, 250), (30, 100)):
        yield (
            f"unmask, n=100, d=10^5, {dropped} % dropped, 16 bit",
            partial(_unmask, devices=100, length=10**5, lane_bits=16, dropped=dropped, least=least),
        )
    for bits, least in zip(_BOTH, (50, 25), strict=True):
        yield (
            f"unmask, n=32, d=10^6, 30 % dropped, {bits} bit",
            partial(_unmask, devices=32, length=10**6, lane_bits=bits, dropped=9, least=least),
        )
    yield "unmask, n=1000 in shards of 250, slowest shard", partial(_sharded, most=1.0)
    yield "upload per parameter, 16 bit", partial(_upload, most=2.01)
    yield "key shares uploaded, k=32", partial(_key_shares, commitments=False)
    yield "commitments to them, k=32", partial(_key_shares, commitments=True)
    yield "server memory, n=100, d=10^6, 16 bit", _server_memory
    yield "server memory, n=1000 in shards, against n=100", _server_memory_of_many
    yield from secure_round_rows()


MEASUREMENTS: dict[str, Callable[..., Row]] = dict(_names())
