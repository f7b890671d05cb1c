"""Files that are either whole or absent: every write goes to a neighbour and is renamed."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shared.errors import UnavailableError

_CHUNK_BYTES = 1024 * 1024


def write_atomic(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace ``path`` by ``content`` in one step, durable before it returns.

    Raises:
        UnavailableError: the disk is full or its folder cannot be used; nothing was changed.
    """
    with explained_disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), mode)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(temporary).unlink()
        sync_directory(path.parent)


def write_private(path: Path, content: bytes) -> None:
    """As ``write_atomic``, readable by the owner alone."""
    write_atomic(path, content, mode=0o600)


def make_folder(folder: Path) -> None:
    """Make ``folder`` with its parents; raise UnavailableError where that cannot be done.

    A new one is for its owner alone: not all that lies in a home is secret, but none of it public.
    """
    with explained_disk_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)


@contextlib.contextmanager
def explained_disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk under ``folder`` refuses in this block into an UnavailableError."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise UnavailableError(
                f"no space left on the disk that holds {folder}; free some and try again"
            ) from error
        raise UnavailableError(
            f"cannot write to {folder}: {error.strerror}; check the path, the disk and who may "
            "write there"
        ) from error


def sync_directory(directory: Path) -> None:
    """Make renames inside ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 digest of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
