"""What one device computes with its peers' keys: boxes of shares, and masks; for client.py.

Shares are dealt at the place in the roster plus one, since a polynomial's value at 0 is the secret.
"""

from collections.abc import Callable, Iterable, Mapping

from shared.errors import PeerError
from shared.secure_sum.config import MaskAlgorithm
from shared.secure_sum.keys import (
    MaskKey,
    SessionSecrets,
    agree,
    commit_seed,
    commit_share,
    mask_private_key,
    open_box,
    own_mask_key,
    pair_mask_key,
    seal_box,
)
from shared.secure_sum.messages import Dealt, Received, Shared
from shared.secure_sum.roster import SumRoster
from shared.secure_sum.rules import Sign, pair_sign
from shared.secure_sum.shamir import PRIME, SHARE_BYTES, deal


def deal_secrets(
    roster: SumRoster,
    place: int,
    secrets: SessionSecrets,
    *,
    box_secrets: Mapping[int, bytes],
    entropy: Callable[[int], bytes],
) -> Shared:
    """Deal both secrets to all peers: t shares rebuild one, fewer say nothing.

    Args:
        roster: U1.
        place: our own.
        secrets: whose seeds are dealt.
        box_secrets: by peer: what our box keys agreed on.
        entropy: returns that many random bytes.
    """
    mask_seed, key_seed = bytes(secrets.mask_seed), bytes(secrets.key_seed)
    places, dealer = [peer + 1 for peer in box_secrets], roster.entries[place].device_id
    seed_shares = deal(mask_seed, threshold=roster.threshold, places=places, entropy=entropy)
    key_shares = deal(key_seed, threshold=roster.threshold, places=places, entropy=entropy)
    dealt = []
    for peer, secret in sorted(box_secrets.items()):
        receiver, shares = (
            roster.entries[peer].device_id,
            (seed_shares[peer + 1], key_shares[peer + 1]),
        )
        box = seal_box(
            secret, roster.binding, sender=dealer, receiver=receiver, shares=b"".join(shares)
        )
        dealt.append(Dealt(peer, box, *_commitments(roster, dealer, receiver, shares)))
    return Shared(commit_seed(mask_seed, roster.binding, dealer), tuple(dealt))


def open_shares(
    roster: SumRoster, place: int, received: Received, box_secret: bytes
) -> tuple[bytes, bytes] | None:
    """Return a dealer's shares for the device at ``place``: of seed, and of key; None if bad."""
    dealer, receiver = roster.entries[received.dealer].device_id, roster.entries[place].device_id
    try:
        content = open_box(
            box_secret, roster.binding, sender=dealer, receiver=receiver, box=received.box
        )
    except PeerError:
        return None
    shares = content[:SHARE_BYTES], content[SHARE_BYTES:]
    promised = received.seed_share_commitment, received.key_share_commitment
    in_field = all(int.from_bytes(share, "big") < PRIME for share in shares)
    good = in_field and promised == _commitments(roster, dealer, receiver, shares)
    return shares if good else None


def masks_of(
    roster: SumRoster,
    place: int,
    peers: Iterable[int],
    secrets: SessionSecrets,
    algorithm: MaskAlgorithm,
) -> list[tuple[MaskKey, Sign]]:
    """Return our own mask, and one with each peer, which has the opposite sign at the other end."""
    device_id, private = roster.entries[place].device_id, mask_private_key(bytes(secrets.key_seed))
    own = own_mask_key(bytes(secrets.mask_seed), roster.binding, device_id, algorithm)
    masks: list[tuple[MaskKey, Sign]] = [(own, 1)]
    for peer in peers:
        entry = roster.entries[peer]
        low, high = sorted((device_id, entry.device_id))
        secret = agree(private, entry.mask_key)
        key = pair_mask_key(secret, roster.binding, low, high, algorithm)
        masks.append((key, pair_sign(place, peer)))
    return masks


def _commitments(
    roster: SumRoster, dealer: str, receiver: str, shares: tuple[bytes, bytes]
) -> tuple[bytes, bytes]:
    """Return what a dealer promises about the two shares of one receiver."""
    seed_share, key_share = shares
    return (
        commit_share("seed", seed_share, roster.binding, dealer=dealer, receiver=receiver),
        commit_share("key", key_share, roster.binding, dealer=dealer, receiver=receiver),
    )
