"""The coordinator's TUF repository: which metadata are in force, and which files they list.

Signed metadata are rows, written in the transaction of whatever they speak about: a version is
released, or it is not, and no crash leaves a snapshot of half a change. Versions count in seconds
since 1970, so that a database that was restored from a backup still counts upwards; devices refuse
what is older than they know. Methods block; callers run them in threads.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session
from tuf.api.metadata import Metadata

from cloud_coordinator.database import Database
from cloud_coordinator.trust.keys import ROOT_KEY_FILE, TrustKeys
from cloud_coordinator.trust.metadata import (
    DELEGATED,
    ROLES,
    AnyRole,
    ListedFile,
    keys_of_root,
    keys_of_targets,
    listing_of,
    root_of,
    sign,
    signed_by,
    snapshot_of,
    targets_of,
    timestamp_of,
)
from cloud_coordinator.trust.tables import TufMetadataRow, TufTargetRow
from shared.errors import ConfigError, NotFoundError, UnavailableError
from shared.release_names import MAX_ROLE_BYTES, Role

logger = logging.getLogger(__name__)

LIFETIMES: Mapping[AnyRole, timedelta] = {
    "root": timedelta(days=730),
    "targets": timedelta(days=365),
    "snapshot": timedelta(days=30),
    "timestamp": timedelta(days=7),
    "candidates": timedelta(days=30),
    "released": timedelta(days=30),
}
_STILL_ASKED_FOR = timedelta(days=1)  # by devices in the middle of a refresh
_NAME = re.compile(rf"([1-9][0-9]{{0,17}})\.({'|'.join(ROLES)})\.json\Z")

Build = Callable[[int, datetime], Metadata[Any]]


@dataclass(frozen=True, slots=True)
class RoleStatus:
    """One role's metadata in force."""

    role: str
    version: int
    expires_at: datetime
    key_id: str
    files: int  # that it lists


class TrustRepository:
    """Signs, keeps and hands out metadata."""

    def __init__(
        self,
        database: Database,
        keys: TrustKeys,
        *,
        clock: Callable[[], datetime],
        lifetimes: Mapping[AnyRole, timedelta] = LIFETIMES,
    ) -> None:
        """Describe what signs, and for how long."""
        self._database, self._keys = database, keys
        self._clock, self._lifetimes = clock, lifetimes

    def renew(self) -> None:
        """Sign whatever is missing, half expired, or signed by a key that was replaced.

        Raises:
            ConfigError: the root key is another than the one that devices pinned.
        """
        with self._database.transaction() as session:
            self._renew_root(session, _in_force(session, "root"))
            changed = False
            changed = self._renew_targets(session, _in_force(session, "targets"))
            for role in DELEGATED:
                if self._is_due(role, _in_force(session, role)):
                    self._list(session, role)
                    changed = True
            self._seal(session, changed=changed)

    @property
    def root_key_is_here(self) -> bool:
        """Whether whoever owns this coordinator can sign another root."""
        return self._keys.root_is_here

    def newest_root(self) -> bytes:
        """Return the root that devices pin when they enrol."""
        with self._database.transaction() as session:
            row = _in_force(session, "root")
            assert row is not None  # `renew` made it before anything was served
            return row.content

    def list_files(
        self, session: Session, role: Role, run_id: str, files: Iterable[ListedFile]
    ) -> None:
        """List the files of a run's version under ``role`` alone, with the caller's transaction.

        Nothing happens if they are listed there already.

        Raises:
            UnavailableError: the list would be longer than devices read.
        """
        _lock(session)
        of_run = TufTargetRow.run_id == run_id
        before = set(session.scalars(select(TufTargetRow.role).where(of_run)))
        if role in before:
            return
        session.execute(delete(TufTargetRow).where(of_run))
        for file in sorted(set(files)):
            session.add(
                TufTargetRow(
                    run_id=run_id,
                    path=file.path,
                    role=role,
                    length=file.length,
                    sha256=file.sha256,
                )
            )
        self._publish(session, before | {role})

    def withdraw_all_but(self, session: Session, run_ids: Collection[str]) -> None:
        """List only the versions of these runs from the caller's transaction on."""
        _lock(session)
        listed = session.execute(select(TufTargetRow.run_id, TufTargetRow.role).distinct())
        gone = [(run_id, role) for run_id, role in listed if run_id not in run_ids]
        if not gone:
            return
        runs = [run_id for run_id, _ in gone]
        session.execute(delete(TufTargetRow).where(TufTargetRow.run_id.in_(runs)))
        self._publish(session, {role for _, role in gone})
        logger.info("withdrew %d model versions that nothing needs any more", len(set(runs)))

    def metadata(self, name: str) -> bytes:
        """Return ``timestamp.json``, or ``N.role.json``; raise NotFoundError for another name."""
        with self._database.transaction() as session:
            if name == "timestamp.json":
                row = _in_force(session, "timestamp")
            elif match := _NAME.match(name):
                row = session.get(TufMetadataRow, (match[2], int(match[1])))
            else:
                row = None
            if row is None:
                raise NotFoundError(f"there is no metadata {name[:80]!r}")
            return row.content

    def root_fingerprint(self) -> str:
        """Return what a device may pin: hex SHA-256 of the newest root."""
        return hashlib.sha256(self.newest_root()).hexdigest()

    def status(self) -> list[RoleStatus]:
        """Say what is in force for each role."""
        with self._database.transaction() as session:
            return [self._status(session, role) for role in ROLES]

    def _status(self, session: Session, role: AnyRole) -> RoleStatus:
        row = _in_force(session, role)
        assert row is not None
        return RoleStatus(
            role=role,
            version=row.version,
            expires_at=row.expires_at,
            key_id=min(signed_by(row.content)),
            files=len(_files(session, role)),
        )

    def _renew_root(self, session: Session, row: TufMetadataRow | None) -> None:
        named = {} if row is None else keys_of_root(row.content)
        here = _ids(self._keys.top)
        if not self._keys.root_is_here:
            self._do_without_root_key(row, named, here)
        elif row is not None and named["root"] != here["root"]:
            raise ConfigError(
                f"{ROOT_KEY_FILE} in the folder 'trust' is not the root key that devices pinned "
                f"({named['root'][0][:12]}); put the backup copy back"
            )
        elif self._is_due("root", row) or named != here:
            self._issue(session, "root", self._root)

    def _do_without_root_key(
        self, row: TufMetadataRow | None, named: Mapping[str, object], here: Mapping[str, object]
    ) -> None:
        """Raise ConfigError where devices would refuse what is signed under the root in force."""
        other = [role for role, key in here.items() if named.get(role) != key]
        if row is None or other:
            raise ConfigError(
                f"{ROOT_KEY_FILE} is not in the folder 'trust', and a new root has to name "
                f"{' and '.join(other) or 'all roles'}; put it there for one start"
            )
        if row.expires_at - self._clock() < self._lifetimes["root"] / 2:
            logger.warning(
                "the TUF root expires on %s; put %s into the folder 'trust' for one start before",
                f"{row.expires_at:%Y-%m-%d}",
                ROOT_KEY_FILE,
            )

    def _renew_targets(self, session: Session, row: TufMetadataRow | None) -> bool:
        named = None if row is None else keys_of_targets(row.content)
        due = self._is_due("targets", row) or named != _ids(self._keys.delegated)
        if due:
            self._issue(session, "targets", self._targets)
        return due

    def _publish(self, session: Session, roles: Collection[str]) -> None:
        """Sign the lists of ``roles``, then what names them."""
        session.flush()
        for role in DELEGATED:
            if role in roles:
                self._list(session, role)
        self._seal(session, changed=True)

    def _list(self, session: Session, role: Role) -> None:
        files = _files(session, role)
        self._issue(session, role, lambda n, end: listing_of(files, version=n, expires=end))

    def _seal(self, session: Session, *, changed: bool) -> None:
        """Sign snapshot and timestamp if what they name ``changed``, or if they are due."""
        changed = changed or self._is_due("snapshot", _in_force(session, "snapshot"))
        if changed:
            named = {role: _named(session, role) for role in ("targets", *DELEGATED)}
            self._issue(
                session, "snapshot", lambda n, end: snapshot_of(named, version=n, expires=end)
            )
        if changed or self._is_due("timestamp", _in_force(session, "timestamp")):
            newest = _named(session, "snapshot")
            self._issue(
                session, "timestamp", lambda n, end: timestamp_of(newest, version=n, expires=end)
            )
        self._forget(session)

    def _is_due(self, role: AnyRole, row: TufMetadataRow | None) -> bool:
        """Whether there is none, half its life is over, or another key signs now."""
        if row is None:
            return True
        half = (row.expires_at - row.created_at) / 2
        signer = self._keys.by_role[role].public.key_id
        return row.expires_at - self._clock() < half or signed_by(row.content) != {signer}

    def _issue(self, session: Session, role: AnyRole, build: Build) -> None:
        """Sign the next version of a role's metadata, in force from this transaction on."""
        now, before = self._clock().replace(microsecond=0), _in_force(session, role)
        number = 1 if before is None else before.version + 1
        if role != "root":  # whose numbers must follow each other
            number = max(number, int(now.timestamp()))
        expires = now + self._lifetimes[role]
        content = sign(build(number, expires), self._keys.by_role[role])
        if len(content) > MAX_ROLE_BYTES:
            raise UnavailableError(
                f"the TUF role {role} would take {len(content)} bytes and devices read "
                f"{MAX_ROLE_BYTES}; fewer model versions may be in use at one time"
            )
        if before is not None:
            before.replaced_at = now
        row = TufMetadataRow(
            role=role, version=number, content=content, created_at=now, expires_at=expires
        )
        session.add(row)
        session.flush()

    def _forget(self, session: Session) -> None:
        """Remove what no refresh asks for any more; roots are needed for ever."""
        long_ago = self._clock() - _STILL_ASKED_FOR
        old = (TufMetadataRow.role != "root", TufMetadataRow.replaced_at < long_ago)
        session.execute(delete(TufMetadataRow).where(*old))

    def _root(self, version: int, expires: datetime) -> Metadata[Any]:
        return root_of(self._keys.top, version=version, expires=expires)

    def _targets(self, version: int, expires: datetime) -> Metadata[Any]:
        return targets_of(self._keys.delegated, version=version, expires=expires)


def _in_force(session: Session, role: str) -> TufMetadataRow | None:
    newest = (TufMetadataRow.role == role, TufMetadataRow.replaced_at.is_(None))
    return session.scalar(select(TufMetadataRow).where(*newest))


def _named(session: Session, role: str) -> tuple[int, bytes]:
    row = _in_force(session, role)
    assert row is not None  # lists are signed before what names them
    return row.version, row.content


def _files(session: Session, role: str) -> list[ListedFile]:
    """Return the files that ``role`` lists; a file of two versions stands there once."""
    rows = session.scalars(select(TufTargetRow).where(TufTargetRow.role == role))
    return sorted({ListedFile(row.path, row.length, row.sha256) for row in rows})


def _lock(session: Session) -> None:
    """Let one transaction at a time change what is listed; SQLite has one writer anyway."""
    in_force = (TufMetadataRow.role == "root", TufMetadataRow.replaced_at.is_(None))
    session.scalar(select(TufMetadataRow).where(*in_force).with_for_update())


def _ids(keys: Mapping[Any, Any]) -> dict[str, tuple[str, ...]]:
    return {role: (key.key_id,) for role, key in keys.items()}
