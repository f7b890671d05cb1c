"""Under which stored id a data source is booked, whatever it is called today (R10).

The id is random and stays. A source is known again by its path and by the digest of its rows, so
renaming it, forgetting it and adding it again, or copying the file gives the same account; and two
accounts that turn out to be about one source become one. What no id can know: rows that were
changed *and* moved, and the same people's data in another file.
"""

import sqlite3
import uuid
from dataclasses import dataclass
from typing import Literal

Part = Literal["train", "held-out"]  # two accounts: rows are in one of them for ever

_TABLES_ABOUT_DATA = ("charges", "spent", "survivors")


@dataclass(frozen=True, slots=True)
class DataUse:
    """Which data a sum would be about."""

    data_id: str  # of `source_of`
    part: Part
    digest: str  # of all usable rows, in hex: the version of the data


def source_of(connection: sqlite3.Connection, *, name: str, path: str, digest: str) -> str:
    """Return the id of a source; made if neither its path nor its digest was seen before.

    Args:
        connection: in a transaction of the store.
        name: the owner's name for it, shown in receipts.
        path: absolute; empty where the data lie in no file.
        digest: of all usable rows, in hex.
    """
    marks = [f"digest:{digest}", *([f"path:{path}"] if path else [])]
    places = ", ".join("?" * len(marks))
    rows = connection.execute(
        f"SELECT DISTINCT data_id FROM source_marks WHERE mark IN ({places}) ORDER BY data_id",  # noqa: S608  # question marks alone
        marks,
    ).fetchall()
    kept, *others = [str(row[0]) for row in rows] or [uuid.uuid4().hex]
    for other in others:
        _merge(connection, other, into=kept)
    connection.execute(
        "INSERT OR REPLACE INTO sources (data_id, name, path) VALUES (?, ?, ?)", (kept, name, path)
    )
    connection.executemany(
        "INSERT OR IGNORE INTO source_marks (mark, data_id) VALUES (?, ?)",
        [(mark, kept) for mark in marks],
    )
    return kept


def _merge(connection: sqlite3.Connection, other: str, *, into: str) -> None:
    """Make one account of two: what either gave away, their data gave away."""
    for table in _TABLES_ABOUT_DATA:
        # What both spent stands in the kept account already.
        statement = f"UPDATE OR IGNORE {table} SET data_id = ? WHERE data_id = ?"  # noqa: S608  # our own names
        connection.execute(statement, (into, other))
    connection.execute("DELETE FROM spent WHERE data_id = ?", (other,))
    connection.execute("UPDATE source_marks SET data_id = ? WHERE data_id = ?", (into, other))
    connection.execute("DELETE FROM sources WHERE data_id = ?", (other,))
