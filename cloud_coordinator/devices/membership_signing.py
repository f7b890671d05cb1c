"""Signing a membership list by hand, where the fleet key is: on a machine without a coordinator.

The coordinator exports what it wants signed (`Unsigned`). Whoever holds the key need not believe
it: what the last signed list says stays, new devices are dated now whatever the file claims, and a
list signed here before is not forgotten because the coordinator leaves it out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

import msgspec

from shared.errors import ConfigError, PeerError
from shared.membership import (
    MemberEntry,
    MembershipList,
    check_successor,
    next_list,
    open_list,
    sign_list,
)
from shared.signing import SigningKey
from shared.untrusted import NOT_JSON


class Unsigned(msgspec.Struct, frozen=True, kw_only=True):
    """What `shoal membership export` writes. Whoever signs may delete new members from it."""

    next: MembershipList
    last: bytes | None  # the newest signed list, sealed; None before the first


@dataclass(frozen=True, slots=True)
class Signing:
    """A list that was signed, and what is new in it."""

    sealed: bytes
    content: MembershipList
    added: tuple[MemberEntry, ...]
    revoked: tuple[MemberEntry, ...]


def read_unsigned(content: bytes) -> Unsigned:
    """Read an exported file; raise ConfigError where it is none."""
    try:
        return msgspec.json.decode(content, type=Unsigned)
    except NOT_JSON as error:
        raise ConfigError(
            f"that is not what 'shoal membership export' writes ({error}); export it again"
        ) from error


def sign_unsigned(
    unsigned: Unsigned, key: SigningKey, *, signed_before: bytes | None, now: datetime
) -> Signing:
    """Sign the list that follows the last one with the devices of ``unsigned`` in it.

    Args:
        unsigned: what the coordinator exported.
        key: the fleet key.
        signed_before: the newest list that was signed here, sealed; None: none that we know of.
        now: aware UTC; the day from which new members count as listed.

    Raises:
        ConfigError: there is nothing to sign, or the list signed before was not imported yet.
        PeerError: another key signed the last list, or the exported one does not follow it.
    """
    trusted = {key.public.key_id: key.public}
    fleet = unsigned.next.fleet
    last = None if unsigned.last is None else open_list(unsigned.last, trusted, fleet=fleet)
    if signed_before is not None:
        _check_remembered(open_list(signed_before, trusted, fleet=fleet), last)
    if last is not None:
        check_successor(last, unsigned.next)
    content = next_list(last, unsigned.next.members, fleet=fleet, now=now)
    if content is None:
        raise ConfigError("there is nothing new to sign in that file; export it again")
    before = {} if last is None else {entry.device_id: entry for entry in last.members}
    return Signing(
        sign_list(content, key),
        content,
        tuple(entry for entry in content.members if entry.device_id not in before),
        tuple(entry for entry in content.members if _was_revoked(entry, before)),
    )


def _check_remembered(before: MembershipList, last: MembershipList | None) -> None:
    """Raise unless the coordinator's last list is the one signed here before, or follows it."""
    if last is None or before.version > last.version:
        raise ConfigError(
            f"membership list {before.version} was signed before and the exported file does not "
            "know it; import it with 'shoal membership import', then export again"
        )
    if before != last:
        if before.version == last.version:
            raise PeerError(f"there are two membership lists {last.version}; somebody has the key")
        check_successor(before, last)


def _was_revoked(entry: MemberEntry, before: Mapping[str, MemberEntry]) -> bool:
    known = before.get(entry.device_id)
    return entry.revoked_at is not None and known is not None and known.revoked_at is None
