"""What the agent's two SQLite files have in common: their errors in words, and their versions."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from shared.errors import UnavailableError


@contextlib.contextmanager
def explained(path: Path, *, if_damaged: str) -> Iterator[None]:
    """Turn what SQLite says of ``path`` into an UnavailableError that tells what to do.

    Args:
        path: the file.
        if_damaged: what to do where it cannot be read any more.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        raise UnavailableError(
            f"cannot use {path}: {error}; free some disk space or check who may write it"
        ) from error
    except sqlite3.IntegrityError:
        raise  # our own bug: let it surface
    except sqlite3.DatabaseError as error:
        raise UnavailableError(f"{path} is damaged ({error}); {if_damaged}") from error


def is_empty(connection: sqlite3.Connection, path: Path, *, version: int) -> bool:
    """Say whether the file has no tables yet, which its ``user_version`` tells.

    Raises:
        UnavailableError: a newer agent, of a schema beyond ``version``, wrote it.
    """
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > version:
        raise UnavailableError(
            f"{path} was written by a newer shoal-agent; install that version again"
        )
    return bool(found == 0)
