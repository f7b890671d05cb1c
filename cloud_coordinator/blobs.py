"""Content-addressed files: parameters, optimiser state, model files.

A blob is named by the SHA-256 of its bytes, so it can only be whole and right, or absent. Every
write goes to a temporary file in the same file system, is flushed to the disk and renamed; a crash
leaves at most a temporary file, which `remove_temporaries` clears away. Blobs are written before
the database names them; those that it never came to name are orphans, for `collect`.
"""

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from shared.errors import NotFoundError, UnavailableError, UntrustedModelError
from shared.files import sha256_of, sync_directory

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1024 * 1024


class BlobStore:
    """Blobs in ``folder/ab/abcd…``; any number of processes may put and read at the same time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._temporaries = folder / "tmp"
        self._temporaries.mkdir(parents=True, exist_ok=True)

    def put(self, content: bytes) -> str:
        """Store ``content``, durable before it returns, and return its digest.

        Raises:
            UnavailableError: the disk is full; nothing was changed.
        """
        digest = hashlib.sha256(content).hexdigest()

        def fill(file: BinaryIO) -> str:
            file.write(content)
            return digest

        return digest if self._has(digest) else self._write(fill)

    def put_file(self, path: Path) -> str:
        """Store a copy of the file at ``path`` and return its digest; raises as `put` does."""
        return self._write(lambda file: _copy(path, file))

    def path_of(self, digest: str) -> Path:
        """Return where the blob lies.

        Raises:
            NotFoundError: there is no such blob.
        """
        path = self._path(digest)
        if not path.is_file():
            raise NotFoundError(f"there is no blob {digest[:12]} in {self._folder}")
        return path

    def read(self, digest: str) -> bytes:
        """Return the blob's bytes, checked against its name.

        Raises:
            NotFoundError: there is no such blob.
            UntrustedModelError: the file was changed or the disk failed.
        """
        content = self.path_of(digest).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise UntrustedModelError(
                f"blob {digest[:12]} in {self._folder} does not hold what its name says; "
                "restore it from a backup"
            )
        return content

    def collect(self, keep: AbstractSet[str], *, before: datetime | None = None) -> int:
        """Remove all blobs that are not in ``keep``, and return how many.

        Args:
            keep: digests that the database names.
            before: spare blobs put at this aware time or later, which may be about to be named.
        """
        orphans = [
            path
            for path in self._blobs()
            if path.name not in keep and (before is None or _written_at(path) < before)
        ]
        for path in orphans:
            path.unlink(missing_ok=True)
        return len(orphans)

    def remove_temporaries(self) -> int:
        """Clear away what crashed writers left; only while no other process writes."""
        leftovers = list(self._temporaries.iterdir())
        for path in leftovers:
            path.unlink(missing_ok=True)
        return len(leftovers)

    def _path(self, digest: str) -> Path:
        if not _DIGEST.fullmatch(digest):
            raise NotFoundError(f"{digest[:80]!r} is not the SHA-256 digest of a blob")
        return self._folder / digest[:2] / digest

    def _blobs(self) -> Iterator[Path]:
        for folder in self._folder.iterdir():
            if folder != self._temporaries:
                yield from folder.iterdir()

    def _has(self, digest: str) -> bool:
        # A blob that a failing disk changed is written anew; one put again is young again.
        path = self._path(digest)
        with contextlib.suppress(FileNotFoundError):
            if sha256_of(path) == digest:
                os.utime(path)
                return True
        return False

    def _write(self, fill: Callable[[BinaryIO], str]) -> str:
        """Let ``fill`` write a temporary file and name it; then give it that name."""
        descriptor, name = tempfile.mkstemp(dir=self._temporaries)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                digest = fill(file)
                file.flush()
                os.fsync(file.fileno())
            path = self._path(digest)
            path.parent.mkdir(exist_ok=True)
            temporary.replace(path)
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise UnavailableError(
                    f"no space left on the disk that holds {self._folder}; free some and try again"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
        sync_directory(self._folder)
        return digest


def _copy(source: Path, target: BinaryIO) -> str:
    digest = hashlib.sha256()
    with source.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def _written_at(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
