import math
from bisect import bisect_right
from collections.abc import Iterator
from decimal import Decimal, localcontext

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from scipy.special import chdtrc, ive

from shared.secure_sum import sampler
from shared.secure_sum.sampler import MAX_VARIANCE, Keystream, Kind, Sampler, Table, table_of
from tests.unit.shared.secure_sum.whole_sum import Entropy

LAWS: list[tuple[Kind, float]] = [
    ("skellam", 0.01),
    ("skellam", 1.0),
    ("skellam", 37.5),
    ("skellam", 100.0),
    ("skellam", 1e4),
    ("skellam", 1e6),
    ("discrete-gaussian", 0.3),
    ("discrete-gaussian", 4.0),
    ("discrete-gaussian", 1000.0),
]


def draws(kind: Kind, variance: float, count: int, seed: int = 1) -> NDArray[np.int32]:
    return Sampler(table_of(kind, variance), Entropy(kind, variance, seed)).draw(count)


def pmf(kind: Kind, variance: float, values: NDArray[np.int64]) -> NDArray[np.float64]:
    """The exact probabilities, up to float64, by another road than the tables."""
    if kind == "skellam":
        return np.asarray(ive(np.abs(values), variance))
    weights = np.exp(-(values.astype(float) ** 2) / (2 * variance))
    everything = np.arange(-20 * math.ceil(variance**0.5) - 20, 20 * math.ceil(variance**0.5) + 20)
    return np.asarray(weights / np.exp(-(everything**2) / (2 * variance)).sum())


def thresholds(table: Table) -> list[int]:
    return [(int(h) << 64) | int(low) for h, low in zip(table.high, table.low, strict=True)]


@pytest.mark.parametrize(("kind", "variance"), LAWS)
def test_draws_are_of_the_exact_law(kind: Kind, variance: float) -> None:
    count = 400_000
    found = draws(kind, variance, count)
    # Bins of at least 25 expected draws; what is beyond them is one bin on either side.
    reach = math.ceil(14 * variance**0.5) + 14
    values = np.arange(-reach, reach + 1)
    width = max(1, math.ceil(variance**0.5 / 20))
    bins = values // width
    expected = np.bincount(bins - bins[0], pmf(kind, variance, values)) * count
    observed = np.bincount(
        np.clip(found, -reach, reach) // width - bins[0], minlength=len(expected)
    )
    common = expected >= 25

    pairs = [(observed[common], expected[common]), (observed[~common], expected[~common])]
    seen, awaited = (np.append(inner, outer.sum()) for inner, outer in zip(*pairs, strict=True))
    if awaited[-1] < 5:
        seen, awaited = seen[:-1], awaited[:-1]
    statistic = float(((seen - awaited) ** 2 / awaited).sum())
    assert 1e-5 < chdtrc(len(seen) - 1, statistic) < 1 - 1e-5


@pytest.mark.parametrize("variance", [1.0, 100.0, 65_536.0, 1e6, MAX_VARIANCE])
def test_the_variance_is_right_within_one_percent(variance: float) -> None:
    found = draws("skellam", variance, 500_000).astype(float)

    assert found.var() == pytest.approx(variance, rel=0.01)
    assert abs(found.mean()) < 4 * math.sqrt(variance / found.size)


def test_tails_are_as_heavy_as_they_must_be() -> None:
    found = draws("skellam", 100.0, 4_000_000)

    for deviations in (3, 4):
        beyond = 2 * float(ive(np.arange(10 * deviations + 1, 200), 100.0).sum())
        expected = beyond * found.size
        observed = int((np.abs(found) > 10 * deviations).sum())
        assert abs(observed - expected) < 5 * math.sqrt(expected)


def test_draws_beside_each_other_are_independent() -> None:
    found = draws("skellam", 9.0, 500_000).astype(float)

    for lag in (1, 2, 8):
        correlation = (found[:-lag] * found[lag:]).mean() / 9.0
        assert abs(correlation) < 4 / math.sqrt(found.size)


def test_thresholds_are_the_cumulative_skellam_law_to_128_bits() -> None:
    variance = 3.0
    table = table_of("skellam", variance)
    with localcontext() as context:
        context.prec = 80
        bessel = [_bessel(k, Decimal(variance)) for k in range(-table.lowest + 1)]
        total = Decimal(variance).exp()  # of I_k over all integers k
        below = Decimal(0)
        for place, threshold in enumerate(thresholds(table)):
            below += bessel[abs(table.lowest + place)] / total
            assert abs(below * 2**128 - threshold) < 2


def test_thresholds_are_the_cumulative_discrete_gaussian_to_128_bits() -> None:
    table = table_of("discrete-gaussian", 2.0)
    with localcontext() as context:
        context.prec = 80
        weights = [(-Decimal(k * k) / 4).exp() for k in range(200)]
        total = 2 * sum(weights) - 1
        below = Decimal(0)
        for place, threshold in enumerate(thresholds(table)):
            below += weights[abs(table.lowest + place)] / total
            assert abs(below * 2**128 - threshold) < 2


@pytest.mark.parametrize(("kind", "variance"), LAWS)
def test_a_cell_of_the_guide_is_decided_only_where_no_threshold_is(
    kind: Kind, variance: float
) -> None:
    table = table_of(kind, variance)
    cells = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    at_start = np.searchsorted(table.high, cells, side="right") + table.lowest
    at_end = np.searchsorted(table.high, cells + np.uint64(2**48 - 1), side="right") + table.lowest

    decided = table.guide != sampler._AMBIGUOUS

    assert (at_start[decided] == table.guide[decided]).all()
    assert (at_end[decided] == table.guide[decided]).all()
    assert (at_start[~decided] < at_end[~decided]).mean() > 0.99  # but for exact starts of cells


def test_what_is_left_beyond_a_table_is_less_than_it_can_hold() -> None:
    variance = 10.0
    reach = -table_of("skellam", variance).lowest

    # Bernstein's bound on what was cut off, in units of 2^-128.
    assert 2 * math.exp(-(reach**2) / (2 * (variance + reach / 3))) * 2.0**128 < 1


def test_undecided_draws_follow_the_law_between_their_thresholds() -> None:
    table = table_of("skellam", 1e4)
    steps = thresholds(table)
    rng = np.random.default_rng(5)
    uniform = rng.integers(0, 2**64, 20_000, dtype=np.uint64)
    found = Sampler(table, Entropy(1))._search(uniform)

    expected = [table.lowest + bisect_right(steps, int(u) << 64) for u in uniform[:2000]]
    assert found[:2000].tolist() == expected
    assert (found == np.searchsorted(table.high, uniform, side="right") + table.lowest).all()


def test_ties_of_64_bits_are_broken_by_64_more(monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of("skellam", 4.0)
    place = len(table.high) // 2
    uniform = table.high[place : place + 1]
    low = int(table.low[place])

    for rest, outcome in ((low - 1, place), (low, place + 1), (low + 1, place + 1)):
        source = Sampler(table, Entropy(1))
        monkeypatch.setattr(source, "_keystream", _Fixed(rest))
        assert source._search(uniform).tolist() == [table.lowest + outcome]


def test_lanes_wrap_when_noise_carries_them_over_the_edge() -> None:
    lanes = np.full(10_000, 2**15 - 1, np.uint16)

    Sampler(table_of("skellam", 100.0), Entropy(2)).add_to(lanes)

    noise = lanes.astype(np.int64) - (2**15 - 1)
    assert (lanes.view(np.int16) < 0).any()
    assert noise.var() == pytest.approx(100, rel=0.05)


def test_the_width_of_the_lanes_does_not_change_the_noise() -> None:
    narrow, wide = np.zeros(100_000, np.uint16), np.zeros(100_000, np.uint32)
    table = table_of("skellam", 1e4)

    Sampler(table, Entropy(3)).add_to(narrow)
    Sampler(table, Entropy(3)).add_to(wide)

    assert (narrow.view(np.int16) == wide.view(np.int32)).all()


def test_other_entropy_gives_other_noise() -> None:
    assert (draws("skellam", 9.0, 1000, seed=1) == draws("skellam", 9.0, 1000, seed=1)).all()
    assert (draws("skellam", 9.0, 1000, seed=1) != draws("skellam", 9.0, 1000, seed=2)).any()


def test_no_part_of_the_keystream_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bytes] = []
    fill = Keystream.fill

    def recorded(stream: Keystream, words: NDArray[np.uint16]) -> None:
        fill(stream, words)
        used.append(words.tobytes())

    monkeypatch.setattr(Keystream, "fill", recorded)
    key = Entropy("key")(16)
    Sampler(table_of("skellam", 1e6), lambda length: key[:length]).draw(100_000)

    whole = b"".join(used)
    cipher = Cipher(algorithms.AES128(key), modes.CTR(bytes(16))).encryptor()
    assert len(whole) > 200_000  # the cells', and what decided the undecided
    assert cipher.update(bytes(len(whole))) == whole


def test_each_sampler_asks_for_a_key_of_its_own() -> None:
    asked: list[int] = []

    def entropy(length: int) -> bytes:
        asked.append(length)
        return bytes(length - 1) + bytes([len(asked)])

    table = table_of("skellam", 9.0)
    first, second = (Sampler(table, entropy).draw(100) for _ in range(2))

    assert asked == [16, 16]
    assert (first != second).any()


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, 2 * MAX_VARIANCE])
def test_no_table_is_made_for_a_variance_that_cannot_be_drawn(variance: float) -> None:
    with pytest.raises(ValueError, match="no table"):
        table_of("skellam", variance)


class _Fixed:
    def __init__(self, word: int) -> None:
        self._word = word

    def fill(self, words: NDArray[np.uint64]) -> None:
        words[:] = self._word


def _bessel(order: int, argument: Decimal) -> Decimal:
    """I_k by its power series, term by term."""
    terms = _terms(order, argument / 2)
    return sum((next(terms) for _ in range(120)), Decimal(0))


def _terms(order: int, half: Decimal) -> Iterator[Decimal]:
    term = half**order / math.factorial(order)
    for m in range(1, 10_000):
        yield term
        term = term * half * half / (m * (m + order))
