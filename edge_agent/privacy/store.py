"""The database of what was given away: one SQLite file that several processes share.

Trainers, commands and stock SuperNode processes of one home all write it. Write-ahead logging with
``synchronous=FULL`` where it matters: what was committed survives a power cut, so a charge is on
disk before the vector that it pays for leaves. All transactions begin IMMEDIATE, so that what one
reads in it is still true when it commits.

A process that works on sessions holds the lock of a file of its own; the kernel releases it however
the process ends, which is how others see that the secrets in its memory are gone.
"""

import contextlib
import fcntl
import os
import sqlite3
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from edge_agent.sqlite_file import explained, is_empty
from shared.files import explained_disk_errors, make_folder, sync_directory

STORE_FILE = "privacy.db"
_HOLDERS_FOLDER = "privacy-holders"
_BUSY_TIMEOUT_S = 10.0
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE sources (
    data_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    path TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE source_marks (
    mark TEXT PRIMARY KEY,
    data_id TEXT NOT NULL REFERENCES sources (data_id)
) WITHOUT ROWID;
CREATE TABLE sessions (
    session BLOB PRIMARY KEY,
    holder TEXT NOT NULL,
    state TEXT NOT NULL,
    cause TEXT NOT NULL DEFAULT '',
    run_id TEXT NOT NULL,
    round_number INTEGER NOT NULL,
    purpose TEXT NOT NULL,
    group_number INTEGER NOT NULL,
    config_digest BLOB NOT NULL,
    opened_at REAL NOT NULL,
    changed_at REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX sessions_state ON sessions (state);
CREATE TABLE rounds (
    run_id TEXT NOT NULL,
    purpose TEXT NOT NULL,
    round_number INTEGER NOT NULL,
    group_number INTEGER NOT NULL,
    PRIMARY KEY (run_id, purpose)
) WITHOUT ROWID;
CREATE TABLE spent (
    data_id TEXT NOT NULL,
    part TEXT NOT NULL,
    run_id TEXT NOT NULL,
    base_digest TEXT NOT NULL,
    question_digest TEXT NOT NULL,
    session BLOB NOT NULL,
    PRIMARY KEY (data_id, part, run_id, base_digest, question_digest)
) WITHOUT ROWID;
CREATE TABLE charges (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    session BLOB UNIQUE,
    data_id TEXT NOT NULL,
    part TEXT NOT NULL,
    digest TEXT NOT NULL,
    kind TEXT NOT NULL,
    curve TEXT,
    run_id TEXT NOT NULL,
    round_number INTEGER NOT NULL,
    purpose TEXT NOT NULL,
    charged_at REAL NOT NULL,
    reset_at REAL
);
CREATE INDEX charges_data ON charges (data_id, part);
CREATE TABLE survivors (
    session BLOB PRIMARY KEY,
    data_id TEXT NOT NULL,
    part TEXT NOT NULL,
    digest TEXT NOT NULL,
    purpose TEXT NOT NULL,
    base_digest TEXT NOT NULL,
    members TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX survivors_data ON survivors (data_id, part);
"""


class PrivacyStore:
    """The open database. Threads may share it; a transaction belongs to one of them at a time."""

    def __init__(self, home: Path) -> None:
        """Open or make the database of ``home``.

        Raises:
            UnavailableError: it is damaged, from a newer agent, or the disk is full.
        """
        self._path = home / STORE_FILE
        self._lock = threading.RLock()
        make_folder(home)
        self._make_file()
        with self._explained():
            self._connection = sqlite3.connect(
                self._path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        try:
            with self._explained():
                self._make_tables()
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Do all of the block or none of it; no other process writes while it runs.

        Args:
            durable: a power cut does not undo it once the block has ended. If not, only the end of
                this process does not; the next durable one makes it so, too.

        Raises:
            UnavailableError: the disk is full, the file is damaged, or another process holds it.
        """
        with self._lock, self._explained():
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have ended the transaction already.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _make_file(self) -> None:
        """Make the file for the owner alone; SQLite gives its neighbours the same mode.

        It is linked to its name, never opened under it: closing a file that another connection of
        this process has open would drop that connection's locks.
        """
        folder = self._path.parent
        with explained_disk_errors(folder):
            if self._path.exists():
                return
            descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{STORE_FILE}.")
            os.close(descriptor)
            try:
                with contextlib.suppress(FileExistsError):
                    self._path.hardlink_to(temporary)
            finally:
                Path(temporary).unlink()
            sync_directory(folder)

    def _make_tables(self) -> None:
        """Give an empty file its tables; who finds another process at it waits."""
        (mode,) = self._connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            with _locked(self._path.with_suffix(".lock")):
                self._connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
        with self.transaction() as connection:
            if is_empty(connection, self._path, version=_SCHEMA_VERSION):
                for statement in _SCHEMA.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(
            self._path,
            if_damaged="restore it from a backup, since without it nobody knows what these data "
            "have given away",
        )


class Holder:
    """A living process that keeps secrets of sessions; its lock vanishes with the process.

    Names are taken, and dead ones looked for, inside a transaction of the store: one at a time.
    """

    def __init__(self, home: Path) -> None:
        """Take a name and its lock; raise UnavailableError where the disk refuses."""
        self._folder = home / _HOLDERS_FOLDER
        self.name = uuid.uuid4().hex
        make_folder(self._folder)
        with explained_disk_errors(self._folder):
            self._descriptor = os.open(self._folder / self.name, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def close(self) -> None:
        """Give up the name."""
        with contextlib.suppress(FileNotFoundError):
            (self._folder / self.name).unlink()
        os.close(self._descriptor)


def is_alive(home: Path, holder: str) -> bool:
    """Return whether the process that took this name still runs."""
    path = home / _HOLDERS_FOLDER / holder
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def forget_dead_holders(home: Path) -> None:
    """Remove the lock files of processes that ended without doing so."""
    folder = home / _HOLDERS_FOLDER
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if not is_alive(home, path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes out of the block."""
    with explained_disk_errors(path.parent):
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
