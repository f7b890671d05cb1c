"""What the agent remembers over a crash: one SQLite database, and who may write it.

Write-ahead logging with ``synchronous=NORMAL``: a killed process loses nothing, a power cut at most
the last moments, and neither damages the file. Progress that belongs to a message lies in the same
database as the message, so that both are kept or neither is.
"""

import contextlib
import fcntl
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

import msgspec

from edge_agent.sqlite_file import explained, is_empty
from shared.errors import ConflictError
from shared.files import make_folder

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS outbox (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    message_id TEXT NOT NULL UNIQUE,
    topic TEXT NOT NULL,
    payload BLOB NOT NULL,
    expires_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS seen (message_id TEXT PRIMARY KEY, until REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS seen_until ON seen (until);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
_BUSY_TIMEOUT_S = 5.0

T = TypeVar("T", bound=msgspec.Struct)


class AgentState:
    """The open database. Use it from one thread, as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open or make the database at ``path``.

        Raises:
            UnavailableError: it is damaged, from a newer agent, or the disk is full.
        """
        self._path = path
        make_folder(path.parent)
        with self._explained():
            self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S)
        try:
            with self._explained():
                self._connection.execute("PRAGMA synchronous = NORMAL")
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
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Do all of the block or none of it.

        Raises:
            UnavailableError: the disk is full, or the file is damaged.
        """
        with self._explained(), self._connection:
            yield self._connection

    def read(self, name: str, kind: type[T]) -> T | None:
        """Return the fact ``name``, or None before it was first written."""
        with self.transaction() as connection:
            row = connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=kind)

    def write(self, name: str, value: msgspec.Struct) -> None:
        """Replace the fact ``name``."""
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO facts (name, value) VALUES (?, ?)",
                (name, msgspec.json.encode(value)),
            )

    def _make_tables(self) -> None:
        if is_empty(self._connection, self._path, version=_SCHEMA_VERSION):
            self._connection.execute("PRAGMA journal_mode = WAL")  # stays with the file
            # Daemon and `status` may both find it empty: the second waits, and changes nothing.
            self._connection.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version = {_SCHEMA_VERSION}; COMMIT;"
            )

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self._path, if_damaged="move it away, the agent makes a new one")


@contextlib.contextmanager
def only_agent_of(home: Path) -> Iterator[None]:
    """Keep a second daemon away from ``home`` while the block runs.

    Raises:
        ConflictError: one is running.
    """
    make_folder(home)
    with _lock_file(home).open("a") as file:
        # `is_running` holds the lock for a moment, so one refusal is not yet an answer.
        if not any(_try_lock(file.fileno(), wait_s=0.02) for _ in range(10)):
            raise ConflictError(f"a shoal-agent is running on {home} already; stop it first")
        yield


def is_running(home: Path) -> bool:
    """Return whether a daemon holds ``home``."""
    try:
        with _lock_file(home).open("r") as file:
            return not _try_lock(file.fileno(), wait_s=0)
    except FileNotFoundError:
        return False


def _lock_file(home: Path) -> Path:
    return home / "agent.lock"


def _try_lock(descriptor: int, *, wait_s: float) -> bool:
    """Take the lock, which the kernel releases when the file is closed, however that happens."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(wait_s)
        return False
    return True
