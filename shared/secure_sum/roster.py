"""The roster of one secure sum, U1: who takes part, and the numbers that follow from how many.

Nobody is told c, t or how many survivors are needed: both sides compute them from the signed
configuration and the size of the roster (config.py).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import msgspec

from shared.errors import PeerError
from shared.membership import Member
from shared.secure_sum.config import (
    SumConfig,
    check_roster_size,
    corrupted_of,
    survivors_needed,
    threshold_of,
)
from shared.secure_sum.keys import Binding
from shared.secure_sum.messages import Advertised, Roster, RosterEntry, encode, signed_bytes
from shared.secure_sum.rules import consents_needed


@dataclass(frozen=True, slots=True)
class SumRoster:
    """U1 in order of device id, and what follows from its size."""

    entries: tuple[RosterEntry, ...]
    digest: bytes  # SHA-256 of the encoded roster; part of every signature and key from S1 on
    binding: Binding
    corrupted: int  # c: members that may be in league with the coordinator
    threshold: int  # t: shares that rebuild a secret
    survivors_needed: int
    consents_needed: int

    @classmethod
    def of(cls, config: SumConfig, config_digest: bytes, roster: Roster) -> Self:
        """Compute the numbers of a roster whose entries are checked elsewhere."""
        size, digest = len(roster.entries), hashlib.sha256(encode(roster)).digest()
        corrupted = corrupted_of(config, size)
        return cls(
            entries=roster.entries,
            digest=digest,
            binding=Binding(
                config_digest=config_digest,
                run_id=config.run_id,
                round_number=config.round_number,
                session=config.session,
                roster_digest=digest,
            ),
            corrupted=corrupted,
            threshold=threshold_of(config, size),
            survivors_needed=survivors_needed(config, size),
            consents_needed=consents_needed(size, corrupted),
        )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def device_ids(self) -> tuple[str, ...]:
        """Return the members in order of place."""
        return tuple(entry.device_id for entry in self.entries)

    def place_of(self, device_id: str) -> int:
        """Return a member's index; raise PeerError where it is none."""
        for place, entry in enumerate(self.entries):
            if entry.device_id == device_id:
                return place
        raise PeerError(f"{device_id} is not in the roster")

    def revealed_to_server(self, device_id: str) -> bytes:
        """Return what a sealed S3 answer belongs to: the associated data of its encryption."""
        return msgspec.msgpack.encode([self.binding.session, self.digest, device_id])


def check_entries(
    config: SumConfig, config_digest: bytes, roster: Roster, members: Mapping[str, Member]
) -> None:
    """Check what a device must not take on trust: who its peers are, and what they were told.

    The peers' signatures are over *our* H(config). One who was told of another model, question or
    bound signed something else, so devices that differ in anything refuse each other here.

    Raises:
        PeerError: a size that cannot end in a safe sum, an order or a key that is not unique, a
            device that the membership list does not know, or a signature that is not its own.
    """
    entries = roster.entries
    check_roster_size(config, len(entries))
    if any(low.device_id >= high.device_id for low, high in pairwise(entries)):
        raise PeerError("the roster is not sorted by distinct device ids")
    if len({key for entry in entries for key in (entry.mask_key, entry.box_key)}) != 2 * len(
        entries
    ):
        raise PeerError("two keys in the roster are the same")
    for entry in entries:
        if entry.device_id not in members:
            raise PeerError(f"{entry.device_id} is in the roster but not in the membership list")
        try:
            members[entry.device_id].key.verify(
                entry.signature, advertised_bytes(config, config_digest, entry)
            )
        except PeerError as error:
            raise PeerError(
                f"{entry.device_id} did not sign its keys for this configuration"
            ) from error


def advertised_bytes(config: SumConfig, config_digest: bytes, entry: RosterEntry) -> bytes:
    """Rebuild what the device of an entry signed at S0."""
    return signed_bytes(
        session=config.session,
        stage="advertise",
        config_digest=config_digest,
        roster_digest=b"",
        device_id=entry.device_id,
        body=encode(Advertised(mask_key=entry.mask_key, box_key=entry.box_key)),
    )
