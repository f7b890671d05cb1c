"""The membership list: which devices may be in one sum, signed by the fleet key.

Inside a roster, a coordinator that lies learns nothing; so it would fill the roster with devices
of its own. Therefore devices take as peers only those that this list names, and the key that signs
it need not live where the coordinator lives. The list only grows: entries neither vanish nor change
their key, they are at most revoked. Whoever keeps the newest list it saw, and asks of each later
one that it follows that one (`check_successor`), cannot be shown two pasts.

A list of 100,000 devices takes about 13 MB, 17 MB sealed; it is meant to be opened once and kept.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.enrolment import DeviceId
from shared.errors import ConfigError, PeerError
from shared.messages import Identifier
from shared.signing import SigningKey, VerifyingKey, open_sealed, seal
from shared.untrusted import NOT_JSON

PAYLOAD_TYPE = "application/vnd.shoal.membership.v1+json"
MAX_SEALED_BYTES = 64 * 1024 * 1024  # some 300,000 devices
OWNER_PATTERN = r"^[^\x00-\x1f\x7f]*$"  # no control characters
MAX_OWNER_LENGTH = 128

Owner = Annotated[str, Meta(max_length=MAX_OWNER_LENGTH, pattern=OWNER_PATTERN)]
Moment = Annotated[datetime, Meta(tz=True)]


@dataclass(frozen=True, slots=True)
class Member:
    """A device that may be in a sum, as its peers know it."""

    device_id: str
    key: VerifyingKey  # its identity
    known_since: datetime  # aware: when it was first listed
    owner: str = ""  # whose device it is, in the words of whoever made its join token


class MemberEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device in the list."""

    device_id: DeviceId
    identity_key: Annotated[str, Meta(pattern=r"^[A-Za-z0-9+/]{43}=\Z")]  # base64, raw Ed25519
    since: Moment  # when it was first listed: `issued_at` of that list
    owner: Owner = ""
    revoked_at: Moment | None = None  # from then on it is in no roster


class MembershipList(msgspec.Struct, frozen=True, kw_only=True):
    """One version of the list."""

    fleet: Identifier
    version: Annotated[int, Meta(ge=1)]
    issued_at: Moment
    members: tuple[MemberEntry, ...]  # sorted by device id

    def __post_init__(self) -> None:
        """Refuse what is no list; raise ValueError, which msgspec turns into its own."""
        ids = [entry.device_id for entry in self.members]
        if any(ids[i] >= ids[i + 1] for i in range(len(ids) - 1)):
            raise ValueError("members are not sorted by device id, or one is named twice")
        if len({entry.identity_key for entry in self.members}) != len(ids):
            raise ValueError("two members have the same key")
        for entry in self.members:
            if entry.since > self.issued_at:
                raise ValueError(f"{entry.device_id} is listed since later than the list's own day")


def sign_list(members: MembershipList, key: SigningKey) -> bytes:
    """Seal a list with the fleet key; raise ConfigError where it is larger than devices accept."""
    sealed = seal(msgspec.json.encode(members), payload_type=PAYLOAD_TYPE, key=key)
    if len(sealed) > MAX_SEALED_BYTES:
        raise ConfigError(
            f"a membership list of {len(members.members)} devices takes {len(sealed)} bytes, over "
            f"the {MAX_SEALED_BYTES} that devices accept; split the fleet in two"
        )
    return sealed


def open_list(sealed: bytes, trusted: Mapping[str, VerifyingKey], *, fleet: str) -> MembershipList:
    """Return the list if a fleet key signed it for this fleet.

    Args:
        sealed: what was downloaded or read.
        trusted: the pinned fleet keys by key id.
        fleet: the name of the fleet that the reader belongs to.

    Raises:
        PeerError: too large, signed by nobody trusted, altered, no list, or of another fleet.
    """
    if len(sealed) > MAX_SEALED_BYTES:
        raise PeerError(f"membership list of {len(sealed)} bytes is over {MAX_SEALED_BYTES}")
    payload = open_sealed(sealed, payload_type=PAYLOAD_TYPE, trusted=trusted)
    try:
        members = msgspec.json.decode(payload, type=MembershipList)
    except NOT_JSON as error:
        raise PeerError(f"not a membership list: {error}") from error
    if members.fleet != fleet:
        raise PeerError(f"the membership list is of fleet {members.fleet!r}, not {fleet!r}")
    return members


def check_successor(old: MembershipList, new: MembershipList) -> None:
    """Raise PeerError unless ``new`` is a later version of ``old`` that keeps all that it said.

    Whom ``old`` does not name was first listed after it, so the signer cannot make a new device
    look like one that has been there for long.
    """
    if new.fleet != old.fleet:
        raise PeerError(f"the membership list is of fleet {new.fleet!r}, not {old.fleet!r}")
    if new.version <= old.version:
        raise PeerError(
            f"membership list {new.version} is not newer than {old.version}, which is known here"
        )
    if new.issued_at < old.issued_at:
        raise PeerError(f"membership list {new.version} is dated before list {old.version}")
    entries = {entry.device_id: entry for entry in new.members}
    for before in old.members:
        _check_kept(before, entries.pop(before.device_id, None), new.version)
    for entry in entries.values():
        if entry.since < old.issued_at:
            raise PeerError(
                f"membership list {new.version} lists {entry.device_id} since before it was listed"
            )


def _check_kept(before: MemberEntry, after: MemberEntry | None, version: int) -> None:
    """Raise PeerError where a later list does not say of a device what an earlier one said."""
    if after is None:
        raise PeerError(f"membership list {version} has lost {before.device_id}")
    if after.identity_key != before.identity_key:
        raise PeerError(f"membership list {version} gives {before.device_id} another key")
    if after.since != before.since:
        raise PeerError(f"membership list {version} changes since when it has {before.device_id}")
    if before.revoked_at is not None and after.revoked_at != before.revoked_at:
        raise PeerError(f"membership list {version} takes the end of {before.device_id} back")


def members_of(members: MembershipList) -> dict[str, Member]:
    """Return the members by device id, without the revoked.

    It costs some 6 µs for each: keep the result.
    """
    return {
        entry.device_id: Member(
            entry.device_id, VerifyingKey.from_text(entry.identity_key), entry.since, entry.owner
        )
        for entry in members.members
        if entry.revoked_at is None
    }


def next_list(
    last: MembershipList | None,
    devices: Iterable[MemberEntry],
    *,
    fleet: str,
    now: datetime,
) -> MembershipList | None:
    """Return the list that follows ``last`` once ``devices`` are in it; None: nothing is new.

    Args:
        last: the newest signed list; None before the first.
        devices: all that should be listed; of those that are listed already, only `revoked_at`
            counts, and the `since` of new ones is replaced by the new list's date.
        fleet: the fleet's name.
        now: aware UTC; a clock that went back does not date a list before the last one.
    """
    issued_at = now if last is None else max(now, last.issued_at)
    listed = {} if last is None else {entry.device_id: entry for entry in last.members}
    for device in devices:
        known = listed.get(device.device_id)
        if known is None:
            listed[device.device_id] = msgspec.structs.replace(device, since=issued_at)
        elif known.revoked_at is None and device.revoked_at is not None:
            listed[device.device_id] = msgspec.structs.replace(known, revoked_at=device.revoked_at)
    entries = tuple(listed[name] for name in sorted(listed))
    if last is not None and entries == last.members:
        return None
    version = 1 if last is None else last.version + 1
    return MembershipList(fleet=fleet, version=version, issued_at=issued_at, members=entries)
