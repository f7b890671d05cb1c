import hashlib
import os
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PeerError
from shared.secure_sum.shamir import PRIME, Interpolation, deal

SECRET = bytes(range(31))
places_of = st.lists(st.integers(1, 300), min_size=1, max_size=12, unique=True)


def entropy_of(seed: int) -> Callable[[int], bytes]:
    calls = iter(range(1000))
    return lambda size: hashlib.shake_256(b"%d %d" % (seed, next(calls))).digest(size)


def value_at_zero(points: dict[int, int]) -> int:
    """Interpolate as in the textbook, with an inversion for every term."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * other * pow(other - x, -1, PRIME) % PRIME
        total += term
    return total % PRIME


@given(secret=st.binary(min_size=31, max_size=31), places=places_of, data=st.data())
def test_any_threshold_of_shares_rebuilds(
    secret: bytes, places: list[int], data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, len(places)))
    shares = deal(secret, threshold=threshold, places=places, entropy=os.urandom)
    assert list(shares) == places

    some = data.draw(st.permutations(places))[: data.draw(st.integers(threshold, len(places)))]
    assert Interpolation(some).rebuild([shares[place] for place in some]) == secret


def test_every_choice_of_three_from_six_rebuilds() -> None:
    shares = deal(SECRET, threshold=3, places=range(1, 7), entropy=os.urandom)
    for some in combinations(range(1, 7), 3):
        assert Interpolation(some).rebuild([shares[place] for place in some]) == SECRET


@pytest.mark.parametrize("secret", [bytes(31), b"\xff" * 31])
def test_the_smallest_and_the_largest_secret_rebuild(secret: bytes) -> None:
    shares = deal(secret, threshold=2, places=[1, 255], entropy=os.urandom)
    assert Interpolation([1, 255]).rebuild([shares[1], shares[255]]) == secret


@given(
    places=st.lists(st.integers(1, 300), min_size=2, max_size=12, unique=True),
    seed=st.integers(0, 1000),
    any_secret=st.binary(min_size=31, max_size=31),
)
def test_one_share_too_few_fits_every_secret(
    places: list[int], seed: int, any_secret: bytes
) -> None:
    """For each secret there is exactly one last share, so the others do not tell secrets apart."""
    dealt = deal(SECRET, threshold=len(places), places=places, entropy=entropy_of(seed))
    known = {place: int.from_bytes(dealt[place], "big") for place in places[:-1]}
    last = places[-1]

    without = value_at_zero({**known, last: 0})
    weight = (value_at_zero({**known, last: 1}) - without) % PRIME  # of the last share
    fitting = (int.from_bytes(any_secret, "big") - without) * pow(weight, -1, PRIME) % PRIME

    shares = [*(dealt[place] for place in places[:-1]), fitting.to_bytes(32, "big")]
    assert Interpolation(places).rebuild(shares) == any_secret


def test_every_coefficient_is_random_so_shares_below_the_threshold_are_uniform() -> None:
    """Two shares of three, at fixed places, hit each quarter of the field equally often."""
    counts = [[0] * 4 for _ in range(2)]
    for seed in range(4000):
        shares = deal(SECRET, threshold=3, places=[1, 2, 3], entropy=entropy_of(seed))
        for place in (1, 2):
            counts[place - 1][4 * int.from_bytes(shares[place], "big") // PRIME] += 1
    for row in counts:
        assert sum((count - 1000) ** 2 / 1000 for count in row) < 30.7  # p = 1e-6 at three degrees


def test_a_coefficient_beyond_the_field_is_drawn_again() -> None:
    good = bytes([7]) * 32
    draws = [b"\xff" * 32, PRIME.to_bytes(32, "big"), good]
    rejected = deal(SECRET, threshold=2, places=[1, 2], entropy=lambda _: draws.pop(0))
    assert rejected == deal(SECRET, threshold=2, places=[1, 2], entropy=lambda _: good)
    assert not draws


def test_the_same_entropy_deals_the_same_shares() -> None:
    dealt = [deal(SECRET, threshold=3, places=[1, 5, 9], entropy=entropy_of(1)) for _ in range(2)]
    assert dealt[0] == dealt[1]
    assert dealt[0][1].hex()[:16] == PINNED


PINNED = "7ab3dfb914db8b18"


@given(places=st.lists(st.integers(1, 300), min_size=2, max_size=10, unique=True), data=st.data())
def test_leaving_a_place_out_is_as_if_it_had_never_been_there(
    places: list[int], data: st.DataObject
) -> None:
    shares = deal(SECRET, threshold=1, places=places, entropy=os.urandom)
    left_out = data.draw(st.sampled_from(places))
    rest = [place for place in places if place != left_out]
    fewer = Interpolation(places).without(left_out)
    assert fewer.places == tuple(rest)
    assert fewer._coefficients == Interpolation(rest)._coefficients
    assert fewer.rebuild([shares[place] for place in rest]) == SECRET


@pytest.mark.parametrize(("places", "place"), [([1, 2], 3), ([4], 4)])
def test_a_place_that_cannot_be_left_out_is_named(places: list[int], place: int) -> None:
    with pytest.raises(ValueError, match=f"place {place} cannot be left out"):
        Interpolation(places).without(place)


def test_a_bad_share_rebuilds_another_secret_or_is_refused() -> None:
    """Seven bits of slack catch 127 of 128; commitments catch the rest."""
    shares = deal(SECRET, threshold=3, places=[1, 2, 3], entropy=entropy_of(2))
    interpolation, refused = Interpolation([1, 2, 3]), 0
    for seed in range(200):
        bad = entropy_of(seed)(32)[:-1] + b"\0"
        bad = bytes([bad[0] & 0x3F]) + bad[1:]  # of the field, but no share of this secret
        try:
            assert interpolation.rebuild([shares[1], bad, shares[3]]) != SECRET
        except PeerError:
            refused += 1
    assert refused > 190


def test_shares_that_rebuild_no_secret_are_refused() -> None:
    with pytest.raises(PeerError, match="no possible secret"):
        Interpolation([1]).rebuild([(2**248).to_bytes(32, "big")])
    assert Interpolation([1]).rebuild([(2**248 - 1).to_bytes(32, "big")]) == b"\xff" * 31


@pytest.mark.parametrize(
    "share",
    [PRIME.to_bytes(32, "big"), b"\xff" * 32, b"", bytes(31), bytes(33)],
    ids=["prime", "largest", "empty", "short", "long"],
)
def test_what_is_no_field_element_is_no_share(share: bytes) -> None:
    good = deal(SECRET, threshold=2, places=[1, 2], entropy=os.urandom)
    with pytest.raises(PeerError, match="no element of the field"):
        Interpolation([1, 2]).rebuild([good[1], share])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_share_is_wanted_for_each_place(count: int) -> None:
    with pytest.raises(ValueError, match="shares for 2 places"):
        Interpolation([1, 2]).rebuild([bytes(32)] * count)


@pytest.mark.parametrize("places", [[], [0, 1], [-1], [1, 1], [PRIME], [3, PRIME + 3]])
def test_places_are_distinct_and_begin_at_one(places: list[int]) -> None:
    with pytest.raises(ValueError, match="distinct numbers from 1"):
        deal(SECRET, threshold=1, places=places, entropy=os.urandom)
    with pytest.raises(ValueError, match="distinct numbers from 1"):
        Interpolation(places)


@pytest.mark.parametrize("threshold", [-1, 0, 3])
def test_a_threshold_fits_its_places(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"a threshold of {threshold} does not fit"):
        deal(SECRET, threshold=threshold, places=[1, 2], entropy=os.urandom)


@pytest.mark.parametrize("size", [0, 30, 32])
def test_a_secret_has_31_bytes_and_is_not_shown_when_it_has_not(size: int) -> None:
    with pytest.raises(ValueError, match="a secret has 31 bytes") as refused:
        deal(b"\x5a" * size, threshold=1, places=[1], entropy=os.urandom)
    assert "5a" not in str(refused.value)
    assert "ZZ" not in str(refused.value)
