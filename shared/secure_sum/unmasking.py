"""The coordinator's last step: rebuild secrets from revealed shares, remove what masks are left.

A survivor's own mask is expanded from its rebuilt seed, and the masks that it shares with dropped
devices from their rebuilt keys; masks between survivors cancel by themselves, those between dropped
devices were never added. Shares are first believed, since what they rebuild is checked anyway
(by the dealer's commitment to its seed, or its advertised key); only where that fails is each share
compared with its own commitment, which tells a revealer that lied from a dealer that did.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from shared.errors import PeerError
from shared.secure_sum.config import MaskAlgorithm
from shared.secure_sum.keys import (
    MaskKey,
    agree,
    commit_seed,
    commit_share,
    mask_private_key,
    own_mask_key,
    pair_mask_key,
)
from shared.secure_sum.masking import Lanes, apply_masks
from shared.secure_sum.messages import share_in
from shared.secure_sum.roster import SumRoster
from shared.secure_sum.rules import ShareKind, Sign, pair_sign
from shared.secure_sum.server_memory import Blame, Dealing
from shared.secure_sum.shamir import Interpolation

_MASKS_AT_ONCE = 1024  # keys that are derived before their masks are expanded; some 200 KiB


class BadDealerError(PeerError):
    """A secret that its dealer's own shares do not rebuild: there will be no sum."""

    def __init__(self, blame: Blame) -> None:
        super().__init__(f"{blame.device_id} {blame.cause}")
        self.blame = blame


class Unmasking:
    """The secrets of one session while they are rebuilt.

    Attributes:
        liars: devices that revealed shares other than they were dealt; their shares are not used.
    """

    def __init__(
        self,
        roster: SumRoster,
        dealings: Mapping[int, Dealing],
        *,
        survivors: frozenset[int],
        revealed: Mapping[int, bytes],
    ) -> None:
        """Begin, or go on, with the shares that were revealed so far.

        Args:
            roster: U1.
            dealings: by dealer: what it committed to at S1; U2 are their keys.
            survivors: U3.
            revealed: by revealer, its shares in their slots. The caller adds to it; nobody removes.
        """
        self._roster, self._dealings, self._revealed = roster, dealings, revealed
        self._survivors, self._dropped = survivors, frozenset(dealings) - survivors
        self._secrets: dict[int, bytes] = {}
        self._interpolations: dict[tuple[int, ...], Interpolation] = {}
        self.liars: list[Blame] = []
        self._lied: set[int] = set()

    def lacking(self) -> tuple[int, int] | None:
        """Return a dealer with fewer shares than needed, and how many those are; None if all do."""
        counts = {
            dealer: len(self._holders(dealer))
            for dealer in self._survivors | self._dropped
            if dealer not in self._secrets
        }
        if not counts:
            return None
        dealer = min(counts, key=lambda place: (counts[place], place))
        return (dealer, counts[dealer]) if counts[dealer] < self._roster.threshold else None

    def rebuild(self) -> bool:
        """Rebuild every secret, and say whether that was possible with the shares so far.

        Raises:
            BadDealerError: good shares of somebody do not make what it promised.
        """
        while len(self._revealed) - (lied := len(self._lied)) >= self._roster.threshold:
            waiting = sorted((self._survivors | self._dropped) - self._secrets.keys())
            base = self._base()
            # One liar may spoil every secret: begin anew without it, not secret by secret.
            if all(self._rebuild_one(dealer, base) for dealer in waiting):
                return True
            if len(self._lied) == lied:  # nobody lied: too few shares of somebody are there
                return False
        return False

    def remove_masks(self, lanes: Lanes, algorithm: MaskAlgorithm, *, threads: int) -> None:
        """Turn the sum of the masked vectors into the sum of the vectors, once all is rebuilt."""
        masks = self._masks(algorithm)
        while batch := list(islice(masks, _MASKS_AT_ONCE)):
            apply_masks(lanes, batch, algorithm, threads=threads)

    def _masks(self, algorithm: MaskAlgorithm) -> Iterator[tuple[MaskKey, Sign]]:
        roster = self._roster
        for place in sorted(self._survivors):
            device_id = roster.entries[place].device_id
            key = own_mask_key(self._secrets[place], roster.binding, device_id, algorithm)
            yield key, -1
        for place in sorted(self._dropped):
            private, device_id = mask_private_key(self._secrets[place]), roster.device_ids[place]
            for survivor in sorted(self._survivors):
                entry = roster.entries[survivor]
                low, high = sorted((device_id, entry.device_id))
                secret = agree(private, entry.mask_key)
                key = pair_mask_key(secret, roster.binding, low, high, algorithm)
                # The survivor added it with its own sign; what the dropped one would have added.
                yield key, pair_sign(place, survivor)

    def _holders(self, dealer: int) -> list[int]:
        return [
            place
            for place, shares in self._revealed.items()
            if place not in self._lied and share_in(shares, dealer)
        ]

    def _base(self) -> Interpolation:
        """Return an interpolation of the first t + 1: enough without any one of them."""
        first = [place for place in self._revealed if place not in self._lied]
        return self._interpolation(first[: self._roster.threshold + 1])

    def _interpolation(self, holders: Sequence[int]) -> Interpolation:
        places = tuple(holder + 1 for holder in holders)
        if places not in self._interpolations:
            self._interpolations[places] = Interpolation(places)
        return self._interpolations[places]

    def _rebuild_one(self, dealer: int, base: Interpolation) -> bool:
        """Rebuild one secret, or return False: there are too few shares, or some are bad.

        Who revealed bad ones is named then.
        """
        interpolation = base.without(dealer + 1) if dealer + 1 in base.places else base
        shares = self._shares_of(dealer, interpolation)
        if len(shares) < self._roster.threshold or not all(shares):
            holders = self._holders(dealer)
            if len(holders) < self._roster.threshold:
                return False
            interpolation = self._interpolation(holders[: self._roster.threshold])
            shares = self._shares_of(dealer, interpolation)
        try:
            secret = interpolation.rebuild(shares)
        except PeerError:
            secret = b""
        if secret and self._is_promised(dealer, secret):
            self._secrets[dealer] = secret
            return True
        self._find_liars(dealer)
        return False

    def _shares_of(self, dealer: int, interpolation: Interpolation) -> list[bytes]:
        return [share_in(self._revealed[place - 1], dealer) for place in interpolation.places]

    def _is_promised(self, dealer: int, secret: bytes) -> bool:
        roster, entry = self._roster, self._roster.entries[dealer]
        if dealer in self._dropped:
            public = mask_private_key(secret).public_key().public_bytes_raw()
            return public == entry.mask_key
        committed = commit_seed(secret, roster.binding, entry.device_id)
        return committed == self._dealings[dealer].seed_commitment

    def _find_liars(self, dealer: int) -> None:
        """Name who revealed other shares than it was dealt; if all are good, the dealer lied."""
        entry, kind = self._roster.entries[dealer], self._kind(dealer)
        bad = [
            place
            for place in self._holders(dealer)
            if self._dealings[dealer].commitment(dealer, place, kind)
            != commit_share(
                kind,
                share_in(self._revealed[place], dealer),
                self._roster.binding,
                dealer=entry.device_id,
                receiver=self._roster.entries[place].device_id,
            )
        ]
        if not bad:
            cause = f"dealt shares that do not rebuild the {kind} that it promised"
            raise BadDealerError(Blame(entry.device_id, cause))
        for place in bad:
            self._lied.add(place)
            cause = f"revealed another share than {entry.device_id} dealt it"
            self.liars.append(Blame(self._roster.entries[place].device_id, cause))

    def _kind(self, dealer: int) -> ShareKind:
        return "seed" if dealer in self._survivors else "key"
