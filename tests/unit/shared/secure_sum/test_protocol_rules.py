"""The rules against every lie there is: no coordinator gets more out of honest devices than a sum.

Crypto is left out; what a device may sign and reveal depends on places alone, and is decided here
by the very functions that devices call.
"""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PeerError
from shared.secure_sum.config import (
    SumConfig,
    check_roster_size,
    corrupted_of,
    dropped_of,
    survivors_needed,
    threshold_of,
)
from shared.secure_sum.rules import (
    ShareKind,
    bitmap_of,
    blame_for_bad_boxes,
    check_dealers,
    check_survivors,
    consents_needed,
    pair_sign,
    places_in,
    shares_to_reveal,
)
from tests.unit.shared.secure_sum.whole_sum import config_of


def subsets(places: frozenset[int]) -> Iterator[frozenset[int]]:
    for size in range(len(places) + 1):
        yield from map(frozenset, itertools.combinations(sorted(places), size))


def is_possible(config: SumConfig, size: int) -> bool:
    try:
        check_roster_size(config, size)
    except PeerError:
        return False
    return True


def signable(own: int, sharing: frozenset[int], needed: int, size: int) -> list[frozenset[int]]:
    """All survivor sets that a device with this U2 would sign."""

    def is_fine(survivors: frozenset[int]) -> bool:
        try:
            check_survivors(own, sharing, survivors, survivors_needed=needed)
        except PeerError:
            return False
        return True

    return [survivors for survivors in subsets(frozenset(range(size))) if is_fine(survivors)]


def acceptable(own: int, needed: int, size: int) -> list[frozenset[int]]:
    """All sets U2 that a device would mask against."""

    def is_fine(dealers: frozenset[int]) -> bool:
        try:
            check_dealers(own, dealers, roster_size=size, survivors_needed=needed)
        except PeerError:
            return False
        return True

    others = frozenset(range(size)) - {own}
    return [dealers | {own} for dealers in subsets(others) if is_fine(dealers)]


POSSIBLE = [size for size in range(2, 8) if is_possible(config_of(), size)]


def test_small_rosters_are_among_those_that_the_lies_are_tried_on() -> None:
    assert POSSIBLE == [3, 5, 6, 7]


@pytest.mark.parametrize("size", POSSIBLE[:3])
def test_whatever_survivors_each_device_is_told_no_honest_one_has_both_secrets_rebuilt(
    size: int,
) -> None:
    """Every assignment of a survivor set to every honest device, even without consents."""
    config, everybody = config_of(), frozenset(range(size))
    c, t = corrupted_of(config, size), threshold_of(config, size)
    needed = survivors_needed(config, size)
    choices = {own: signable(own, everybody, needed, size) for own in everybody}
    assert min(map(len, choices.values())) > (0 if size == 3 else 1)
    for corrupted in itertools.combinations(everybody, c):
        honest = sorted(everybody - set(corrupted))
        revealed: dict[int, list[dict[int, ShareKind]]] = {
            own: [shares_to_reveal(own, everybody, told) for told in choices[own]] for own in honest
        }
        for lies in itertools.product(*(revealed[own] for own in honest)):
            for target in honest:
                kinds = Counter(shares[target] for shares in lies if target in shares)
                # The corrupted hold shares of both kinds.
                assert min(kinds["seed"], kinds["key"]) + c < t


@pytest.mark.parametrize("size", POSSIBLE)
def test_whatever_boxes_and_survivors_each_device_is_told_no_honest_one_is_opened(
    size: int,
) -> None:
    """Per target only its label at each peer counts, so all lies are tried, U2's included."""
    config = config_of()
    c, t = corrupted_of(config, size), threshold_of(config, size)
    needed = survivors_needed(config, size)
    target = 0
    labels: dict[int, set[ShareKind | None]] = {}
    for own in range(1, size):
        labels[own] = {None}
        for sharing in acceptable(own, needed, size):
            for survivors in signable(own, sharing, needed, size):
                labels[own].add(shares_to_reveal(own, sharing, survivors).get(target))
    for corrupted in itertools.combinations(range(1, size), c):
        honest = [own for own in range(1, size) if own not in corrupted]
        for told in itertools.product(*(sorted(labels[own], key=str) for own in honest)):
            assert min(told.count("seed"), told.count("key")) + c < t


@pytest.mark.parametrize("size", POSSIBLE)
def test_never_are_two_survivor_sets_signed_by_enough(size: int) -> None:
    c = corrupted_of(config_of(), size)
    quorum = consents_needed(size, c)
    for signed in itertools.product(("one", "other", "none"), repeat=size - c):
        enough = [name for name in ("one", "other") if signed.count(name) + c >= quorum]
        assert len(enough) <= 1


@pytest.mark.parametrize("size", POSSIBLE[:3])
def test_devices_told_different_boxes_still_hide_behind_all_honest_survivors(size: int) -> None:
    """Tries every U2 for every honest device, and every U3 that enough of them would sign.

    A set of honest survivors can be opened if no mask stays on its sum: a mask between two honest
    survivors cancels only where both added it and both are in the set.
    """
    config, everybody = config_of(), frozenset(range(size))
    c, needed = corrupted_of(config, size), survivors_needed(config, size)
    quorum, corrupted = consents_needed(size, c), frozenset(range(c))
    honest = sorted(everybody - corrupted)
    choices = [acceptable(own, needed, size) for own in honest]
    opened = 0
    for told in itertools.product(*choices):
        sharing = dict(zip(honest, told, strict=True))
        for survivors in subsets(everybody):
            signers = sum(survivors in signed_by(own, sharing[own], needed, size) for own in honest)
            if signers + c < quorum:
                continue
            hidden = survivors - corrupted
            sums = [part for part in subsets(hidden) if part and opens(part, hidden, sharing)]
            assert sums in ([], [hidden])
            opened += len(sums)
    assert opened


_SIGNED: dict[tuple[int, frozenset[int], int, int], frozenset[frozenset[int]]] = {}


def signed_by(
    own: int, sharing: frozenset[int], needed: int, size: int
) -> frozenset[frozenset[int]]:
    key = own, sharing, needed, size
    if key not in _SIGNED:
        _SIGNED[key] = frozenset(signable(*key))
    return _SIGNED[key]


def opens(part: frozenset[int], hidden: frozenset[int], sharing: dict[int, frozenset[int]]) -> bool:
    return all(
        peer in part and own in sharing[peer]
        for own in part
        for peer in (sharing[own] & hidden) - {own}
    )


@pytest.mark.parametrize("size", range(2, 13))
@pytest.mark.parametrize("corrupt_fraction", [0.0, 0.05, 0.1, 0.2, 0.34])
@pytest.mark.parametrize("drop_fraction", [0.0, 0.1, 0.3, 0.45])
@pytest.mark.parametrize("corrupt_devices", [1, 2, 3])
@pytest.mark.parametrize("threshold", ["majority", "group"])
def test_every_roster_up_to_twelve_is_safe_and_can_lose_what_it_promises_or_is_refused(
    size: int, corrupt_fraction: float, drop_fraction: float, corrupt_devices: int, threshold: str
) -> None:
    config = config_of(
        corrupt_fraction=corrupt_fraction,
        drop_fraction=drop_fraction,
        corrupt_devices=corrupt_devices,
        threshold=threshold,
    )
    c, t = corrupted_of(config, size), threshold_of(config, size)
    assert c >= max(1, corrupt_devices)
    assert c + 1e-9 >= corrupt_fraction * size
    needed = survivors_needed(config, size)
    possible = is_possible(config, size)
    # Those that are left, less one for its own secret, still reach t.
    assert not possible or size - dropped_of(config, size) - 1 >= t
    if not possible:
        return
    for corrupted in range(c + 1):  # whoever really lies
        assert corrupted < t  # with all its shares, and none of an honest peer
        honest = size - 1 - corrupted  # peers of the target
        # Every split of the honest peers' answers into the two kinds.
        for seeds in range(honest + 1):
            assert min(seeds, honest - seeds) + corrupted < t
    assert needed >= consents_needed(size, c)  # those that are left can agree
    assert needed - c >= 1


def test_the_bound_is_sharp_one_more_corrupted_device_could_open_somebody() -> None:
    config, size = config_of(), 7
    c, t = corrupted_of(config, size), threshold_of(config, size)
    honest = size - 1 - (c + 1)
    assert any(min(seeds, honest - seeds) + c + 1 >= t for seeds in range(honest + 1))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 255, 256])
def test_a_bitmap_says_which_places_it_was_made_of(size: int) -> None:
    for places in ({0}, {size - 1}, set(range(size)), set(range(0, size, 3))):
        bitmap = bitmap_of(places, size)
        assert len(bitmap) == -(-size // 8)
        assert places_in(bitmap, size) == places


@pytest.mark.parametrize("bitmap", [b"", b"\x01", b"\x01\x00\x00", b"\x00\x04", b"\xff\xff"])
def test_a_bitmap_of_another_length_or_of_nobody_is_refused(bitmap: bytes) -> None:
    with pytest.raises(PeerError, match="roster of 10"):
        places_in(bitmap, 10)


def test_the_two_ends_of_a_pair_add_their_mask_with_opposite_signs() -> None:
    assert all(pair_sign(a, b) == -pair_sign(b, a) for a, b in itertools.permutations(range(5), 2))


@pytest.mark.parametrize(
    ("dealers", "message"),
    [
        ((1, 2, 2), "more than one box"),
        ((0, 1, 2), "of our own"),
        ((1, 2, 5), "not in the roster"),
        ((1, 2, -1), "not in the roster"),
        ((1, 2), "3 devices dealt shares, of the 4"),
    ],
)
def test_boxes_of_impossible_dealers_are_refused(dealers: tuple[int, ...], message: str) -> None:
    with pytest.raises(PeerError, match=message):
        check_dealers(0, dealers, roster_size=5, survivors_needed=4)


def test_who_complains_of_more_than_can_lie_is_blamed_itself() -> None:
    blamed = blame_for_bad_boxes({0: (1, 2, 3), 4: (5,), 6: (5,)}, 2)
    assert set(blamed) == {0, 4, 5, 6}
    assert "3 boxes" in blamed[0]
    assert "of which 2" in blamed[5]
    assert "either it or its dealer lies" in blamed[4]


def test_who_complains_of_a_dealer_that_certainly_lies_is_not_blamed() -> None:
    assert set(blame_for_bad_boxes({1: (0,), 2: (0,), 3: (0,)}, 2)) == {0}
    assert set(blame_for_bad_boxes({0: (1, 2, 3), 3: (0,)}, 2)) == {0}


@given(
    honest=st.integers(4, 12),
    corrupted=st.integers(1, 4),
    data=st.data(),
)
def test_of_all_disputes_no_liar_stays_and_each_costs_few_honest_devices(
    honest: int, corrupted: int, data: st.DataObject
) -> None:
    liars = range(honest, honest + corrupted)
    everybody = range(honest + corrupted)
    complaints: dict[int, set[int]] = {}
    for liar in liars:
        mine = data.draw(st.sets(st.sampled_from(everybody)), label="complains of") - {liar}
        if mine:
            complaints[liar] = mine
        for victim in data.draw(st.sets(st.sampled_from(range(honest))), label="bad boxes to"):
            complaints.setdefault(victim, set()).add(liar)

    blamed = set(blame_for_bad_boxes(complaints, corrupted))

    lied = {liar for liar in liars if any(peer < honest for peer in complaints.get(liar, ()))}
    lied |= {dealer for victim in range(honest) for dealer in complaints.get(victim, ())}
    assert lied <= blamed
    assert len(blamed - set(liars)) <= 2 * corrupted**2
