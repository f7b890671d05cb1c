"""The membership list of this fleet: who may be in a sum, who waits for it, each new version.

With the fleet key beside the coordinator, a new version is signed when a sum needs the list and
devices changed since the last one: a thousand enrolments cost one signature. With the key offline,
changes wait until a person exports, signs and imports the list.

Everything here blocks; callers run it in threads.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Self

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from cloud_coordinator.database import Database
from cloud_coordinator.devices.membership_signing import Unsigned
from cloud_coordinator.devices.tables import DeviceRow, MembershipListRow
from cloud_coordinator.keys import FleetKey
from shared.errors import ConfigError, ConflictError, NotFoundError, PeerError, UnavailableError
from shared.membership import (
    Member,
    MemberEntry,
    MembershipList,
    check_successor,
    members_of,
    next_list,
    open_list,
    sign_list,
)
from shared.signing import VerifyingKey

_NEVER_SIGNED = (
    "nobody has signed a membership list yet; run 'shoal membership export FILE', sign it where "
    "the fleet key is with 'shoal membership sign', then 'shoal membership import' it"
)


@dataclass(frozen=True, slots=True)
class Signed:
    """A signed list, opened."""

    sealed: bytes
    content: MembershipList
    members: Mapping[str, Member]

    @classmethod
    def of(cls, sealed: bytes, content: MembershipList) -> Self:
        """Keep what is expensive to work out."""
        return cls(sealed, content, members_of(content))


@dataclass(frozen=True, slots=True)
class MembershipStatus:
    """How the list stands."""

    version: int  # 0: none was signed yet
    issued_at: datetime | None
    members: int  # that may be in a sum
    revoked: int
    waiting: tuple[str, ...]  # ids of devices that the next version adds or revokes


class Membership:
    """Keeps the newest signed list in the database, and makes or takes the next."""

    def __init__(
        self, database: Database, *, fleet: str, key: FleetKey, clock: Callable[[], datetime]
    ) -> None:
        self._database, self._fleet, self._key, self._clock = database, fleet, key, clock
        self._lock = threading.Lock()  # guards what follows, and the making of versions
        self._signed: Signed | None = None  # what the database holds, opened
        self._counted: tuple[int, int] | None = None  # devices and revoked ones it was made of

    @property
    def key(self) -> FleetKey:
        """What signs the list; its private half only where it is beside us."""
        return self._key

    def current(self) -> tuple[int, Mapping[str, Member]]:
        """Return the version and members that a roster may be made of now.

        Raises:
            UnavailableError: the fleet key is offline and nobody signed a list yet.
            ConfigError: another fleet key signed the list that is kept here.
        """
        with self._lock:
            self._sign_changes()
            signed = self._required()
        return signed.content.version, signed.members

    def sealed(self) -> bytes:
        """Return the newest signed list as devices get it; nothing is signed for that.

        Raises:
            UnavailableError: there is none yet.
        """
        with self._lock:
            return self._required().sealed

    def status(self) -> MembershipStatus:
        """Say how the list stands and who waits for its next version."""
        with self._lock:
            signed = self._newest()
            following = self._following(signed)
        content = signed.content if signed else None
        known = {entry.device_id: entry for entry in content.members} if content else {}
        after = following.members if following else ()
        members = len(signed.members) if signed else 0
        return MembershipStatus(
            version=content.version if content else 0,
            issued_at=content.issued_at if content else None,
            members=members,
            revoked=len(known) - members,
            waiting=tuple(e.device_id for e in after if known.get(e.device_id) != e),
        )

    def listed(self, rows: Iterable[DeviceRow]) -> frozenset[str]:
        """Return which of these devices may be in a sum; the others wait, or were revoked.

        With the key beside us nobody waits: what is missing is signed when a sum needs it.
        """
        valid = [row for row in rows if row.revoked_at is None]
        if self._key.private is not None:
            return frozenset(row.device_id for row in valid)
        with self._lock:
            signed = self._newest()
        members = signed.members if signed else {}
        return frozenset(row.device_id for row in valid if row.device_id in members)

    def unsigned(self) -> Unsigned:
        """Return the next version for somebody to sign; raise ConflictError if nothing is new."""
        with self._lock:
            signed = self._newest()
            following = self._following(signed)
        if following is None:
            raise ConflictError(
                "nothing waits for the membership list: the signed one names every device"
            )
        return Unsigned(next=following, last=signed.sealed if signed else None)

    def take(self, sealed: bytes) -> MembershipList:
        """Take over a list that was signed elsewhere; the same one again changes nothing.

        Raises:
            PeerError: the fleet key did not sign it, it does not follow the newest one, or it
                gives a device another key than the one that it enrolled with.
        """
        content = open_list(sealed, self._trusted(), fleet=self._fleet)
        self._check_enrolled(content)
        with self._lock:
            signed = self._newest()
            if signed is None or content != signed.content:
                if signed is not None:
                    check_successor(signed.content, content)
                self._keep(Signed.of(sealed, content), after=signed)
        return content

    def revoke(self, device_id: str) -> None:
        """Keep a device out of all sums for ever, from the next version of the list on.

        Raises:
            NotFoundError: there is no such device.
        """
        with self._database.transaction() as session:
            if session.get(DeviceRow, device_id) is None:
                raise NotFoundError(
                    f"there is no device {device_id!r}; 'shoal device list' shows all of them"
                )
            session.execute(
                update(DeviceRow)
                .where(DeviceRow.device_id == device_id, DeviceRow.revoked_at.is_(None))
                .values(revoked_at=self._clock())
            )

    def _sign_changes(self) -> None:
        """Sign the next version if the key is here and devices joined or were revoked."""
        if self._key.private is None:
            return
        signed = self._newest()
        counted = self._count()
        if signed is not None and counted == self._counted:
            return
        content = self._following(signed)
        if content is not None:
            sealed = sign_list(content, self._key.private)
            self._keep(Signed.of(sealed, content), after=signed)
        self._counted = counted

    def _following(self, signed: Signed | None) -> MembershipList | None:
        return next_list(
            signed.content if signed else None,
            self._entries(),
            fleet=self._fleet,
            now=self._clock(),
        )

    def _count(self) -> tuple[int, int]:
        """Count what decides whether a list is still true: rows are added and revoked only."""
        with self._database.transaction() as session:
            counts = select(func.count(DeviceRow.device_id), func.count(DeviceRow.revoked_at))
            devices, revoked = session.execute(counts).one()
        return devices, revoked

    def _entries(self) -> list[MemberEntry]:
        """Return every device as a new list would name it, dated by its enrolment."""
        columns = select(
            DeviceRow.device_id,
            DeviceRow.identity_key,
            DeviceRow.enrolled_at,
            DeviceRow.owner,
            DeviceRow.revoked_at,
        )
        with self._database.transaction() as session:
            rows = session.execute(columns).all()
        return [
            MemberEntry(
                device_id=row.device_id,
                identity_key=row.identity_key,
                since=row.enrolled_at,
                owner=row.owner,
                revoked_at=row.revoked_at,
            )
            for row in rows
        ]

    def _required(self) -> Signed:
        if (signed := self._newest()) is None:
            raise UnavailableError(_NEVER_SIGNED)
        return signed

    def _newest(self) -> Signed | None:
        """Return the newest list of the database, opened once."""
        with self._database.transaction() as session:
            version = session.scalar(select(func.max(MembershipListRow.version)))
            if version is None:
                return None
            if self._signed is not None and self._signed.content.version == version:
                return self._signed
            row = session.get_one(MembershipListRow, version)
        try:
            content = open_list(row.sealed, self._trusted(), fleet=self._fleet)
        except PeerError as error:
            raise ConfigError(
                f"the membership list of this fleet cannot be used ({error}); put the fleet key "
                "back with which it was signed"
            ) from error
        self._signed = Signed.of(row.sealed, content)
        return self._signed

    def _keep(self, signed: Signed, *, after: Signed | None) -> None:
        """Store a version unless somebody else stored one meanwhile.

        Raises:
            ConflictError: somebody did.
        """
        expected = after.content.version if after else None
        content = signed.content
        row = MembershipListRow(
            version=content.version, issued_at=content.issued_at, sealed=signed.sealed
        )
        taken = ConflictError("the membership list was changed by somebody else; try again")
        try:
            with self._database.transaction() as session:
                if session.scalar(select(func.max(MembershipListRow.version))) != expected:
                    raise taken
                session.add(row)
                session.flush()  # two versions of one number: the second is refused here
                session.execute(
                    delete(MembershipListRow).where(MembershipListRow.version < content.version)
                )
        except IntegrityError as error:
            raise taken from error
        self._signed = signed

    def _check_enrolled(self, content: MembershipList) -> None:
        """Raise PeerError where the list names a device of ours with another key."""
        named = {entry.device_id: entry.identity_key for entry in content.members}
        for device in self._entries():
            if named.get(device.device_id, device.identity_key) != device.identity_key:
                raise PeerError(
                    f"the list gives {device.device_id} another key than the one it enrolled with"
                )

    def _trusted(self) -> dict[str, VerifyingKey]:
        return {self._key.public.key_id: self._key.public}
