"""What a device may say in a secure sum, as functions of places in the roster alone.

A place is an index into the roster, which is sorted by device id. These few rules are all that
stands between a lying coordinator and a device's vector, so they are apart from keys and messages,
where tests can try them on every lie there is. docs/protocol.md argues why they suffice.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Literal

from shared.errors import PeerError

ShareKind = Literal["seed", "key"]
Sign = Literal[1, -1]


def pair_sign(place: int, peer: int) -> Sign:
    """Return how the device at ``place`` adds its mask with ``peer``, who does the opposite."""
    return 1 if place < peer else -1


def bitmap_of(places: Iterable[int], roster_size: int) -> bytes:
    """Return the bitmap of these places: bit i of byte i//8, as long as the roster needs."""
    bits = bytearray(-(-roster_size // 8))
    for place in places:
        bits[place // 8] |= 1 << place % 8
    return bytes(bits)


def places_in(bitmap: bytes, roster_size: int) -> frozenset[int]:
    """Return the places of a bitmap; raise PeerError where it is not one of this roster."""
    places = frozenset(
        place for place in range(8 * len(bitmap)) if bitmap[place // 8] >> place % 8 & 1
    )
    if len(bitmap) != -(-roster_size // 8) or any(place >= roster_size for place in places):
        raise PeerError(f"the survivors are no bitmap of a roster of {roster_size}")
    return places


def check_dealers(
    own_place: int, dealers: Collection[int], *, roster_size: int, survivors_needed: int
) -> frozenset[int]:
    """Return U2: those whose boxes we got, and ourselves.

    A vector is masked against all of U2, so it must be large enough that the survivors of it can
    be too, and then every other device's U2 meets those who sign the survivors.

    Raises:
        PeerError: a dealer stands there twice, is no peer, or there are too few.
    """
    sharing = frozenset(dealers) | {own_place}
    if own_place in dealers or len(sharing) != len(dealers) + 1:
        raise PeerError("more than one box of one dealer, or one of our own")
    if any(not 0 <= place < roster_size for place in sharing):
        raise PeerError("a box of a dealer that is not in the roster")
    if len(sharing) < survivors_needed:
        raise PeerError(f"{len(sharing)} devices dealt shares, of the {survivors_needed} needed")
    return sharing


def check_survivors(
    own_place: int,
    sharing: frozenset[int],
    survivors: frozenset[int],
    *,
    survivors_needed: int,
) -> None:
    """Raise PeerError unless a device with this U2 may sign these survivors, U3."""
    if own_place not in survivors:
        raise PeerError("our own vector is not in the sum that we should unmask")
    if not survivors <= sharing:
        raise PeerError("a survivor is not among those that our vector is masked against")
    if len(survivors) < survivors_needed:
        raise PeerError(f"{len(survivors)} survivors, of the {survivors_needed} that are needed")


def consents_needed(roster_size: int, corrupted: int) -> int:
    """Return how many of the roster must sign the survivors: more than (n + c) / 2.

    Any two sets of so many share more than c devices, so an honest one, which signs only once:
    never two different bitmaps are signed by enough.
    """
    return (roster_size + corrupted) // 2 + 1


def shares_to_reveal(
    own_place: int, sharing: frozenset[int], survivors: frozenset[int]
) -> dict[int, ShareKind]:
    """Return which one share of each peer a device reveals, once it signed the survivors.

    A survivor's own mask is removed by its seed; a dropped device's pair masks by its key. Never
    both: whoever has both can open the one vector.
    """
    return {
        place: "seed" if place in survivors else "key" for place in sorted(sharing - {own_place})
    }


def blame_for_bad_boxes(
    complaints: Mapping[int, Collection[int]], corrupted: int
) -> dict[int, str]:
    """Say who is to blame where receivers could not use dealers' boxes.

    Of a dealer and a receiver that complains, one lies, and nobody else can tell which. But at
    most c devices lie: whoever complains of more than c dealers lies, whom more than c complain of
    does. Where it is open, both are named: so a liar costs at most c honest devices their place,
    and once only, since it loses its own. Were only dealers named, it could go on round by round.

    Args:
        complaints: by receiver: dealers.
        corrupted: c.

    Returns:
        By place: the cause.
    """
    blame: dict[int, str] = {}
    believed: dict[int, Collection[int]] = {}
    for receiver, dealers in complaints.items():
        if len(dealers) > corrupted:
            blame[receiver] = f"complained of {len(dealers)} boxes, more than devices that may lie"
        else:
            believed[receiver] = dealers
    against = Counter(dealer for dealers in believed.values() for dealer in dealers)
    certain = blame.keys() | {dealer for dealer, count in against.items() if count > corrupted}
    for dealer, count in against.items():
        blame[dealer] = f"dealt boxes of which {count} could not be used, as their receivers say"
    for receiver, dealers in believed.items():
        if not certain.issuperset(dealers):
            blame.setdefault(receiver, "complained of a box, and either it or its dealer lies")
    return blame
