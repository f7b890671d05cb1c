"""Which versions TUF lists, and which are kept at all.

What was built is listed as a candidate, what is rolled out as released, and what is tidied away no
more. Both follow from the rows, in the transaction that changes them.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloud_coordinator.database import Database
from cloud_coordinator.models.lifecycle import VersionState
from cloud_coordinator.models.tables import ModelVersionRow
from cloud_coordinator.trust.metadata import ListedFile
from cloud_coordinator.trust.repository import TrustRepository
from shared.release_names import Role, artifact_target, manifest_target

KEPT_VERSIONS = 3  # of each model, beside those that are current or desired
_ROLLED_OUT = {
    VersionState.CANARY,
    VersionState.ROLLING,
    VersionState.CURRENT,
    VersionState.SUPERSEDED,
}


class Listing:
    """Lists versions in the TUF repository; blocks on the database."""

    def __init__(self, database: Database, trust: TrustRepository) -> None:
        self._database, self._trust = database, trust

    def add(self, session: Session, role: Role, row: ModelVersionRow) -> None:
        """List a version under ``role`` alone, with the caller's transaction.

        Raises:
            UnavailableError: the list would be longer than devices read.
        """
        self._trust.list_files(session, role, row.run_id, _files_of(role, row))

    def release_served(self, *, protect: Collection[str]) -> None:
        """Release what devices may serve already, in a database from before there was a list."""
        with self._database.transaction() as session:
            for row in list(needed(newest_first(session), protect)):
                if row.state in _ROLLED_OUT:
                    self.add(session, "released", row)

    def withdraw_all_but(self, *, protect: Collection[str], active: Collection[str]) -> None:
        """List no version any more whose files `needed` gives up."""
        with self._database.transaction() as session:
            kept = {row.run_id for row in needed(newest_first(session), protect, active)}
            self._trust.withdraw_all_but(session, kept)


def newest_first(session: Session) -> list[ModelVersionRow]:
    """Return all versions."""
    rows = select(ModelVersionRow).order_by(ModelVersionRow.created_at.desc())
    return list(session.scalars(rows))


def needed(
    newest_first: Iterable[ModelVersionRow],
    protect: Collection[str],
    active: Collection[str] = (),
    last: int = KEPT_VERSIONS,
) -> Iterator[ModelVersionRow]:
    """Yield the versions whose files are still needed.

    Args:
        newest_first: all there are.
        protect: versions that some device serves or should serve.
        active: runs that have not ended: what is built of them may still be signed.
        last: so many of the newest versions of each model are kept besides.
    """
    kept: dict[str, int] = {}
    for row in newest_first:
        is_current = row.state == VersionState.CURRENT
        wanted = is_current or row.run_id in active or row.version in protect
        if row.version is not None and kept.setdefault(row.model, 0) < last:
            kept[row.model] += 1
            wanted = True
        if wanted:
            yield row


def _files_of(role: Role, row: ModelVersionRow) -> Iterator[ListedFile]:
    """Yield what TUF lists of a version: each file that passed, and its manifest once sealed."""
    if row.version is not None and row.sealed is not None:
        digest = hashlib.sha256(row.sealed).hexdigest()
        yield ListedFile(manifest_target(role, row.version), len(row.sealed), digest)
    for variant in row.variants:
        if variant.sha256 is not None:
            path = artifact_target(role, variant.sha256)
            yield ListedFile(path, variant.size_bytes, variant.sha256)
