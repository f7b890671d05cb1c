import errno
import hashlib
import os
import subprocess
import sys
import textwrap
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloud_coordinator.blobs import BlobStore
from shared.errors import NotFoundError, UnavailableError, UntrustedModelError


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("content", [b"", b"parameters", bytes(3_000_000)])
def test_what_was_put_comes_back_under_its_digest(tmp_path: Path, content: bytes) -> None:
    blobs = BlobStore(tmp_path)

    digest = blobs.put(content)

    assert digest == hashlib.sha256(content).hexdigest()
    assert blobs.read(digest) == content
    assert blobs.path_of(digest) == tmp_path / digest[:2] / digest
    assert files_in(tmp_path) == [blobs.path_of(digest)]


def test_a_file_is_stored_as_its_bytes_would_be(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(os.urandom(2_500_000))
    blobs = BlobStore(tmp_path / "blobs")

    assert blobs.put_file(source) == blobs.put(source.read_bytes())
    assert len(files_in(tmp_path / "blobs")) == 1


def test_another_process_finds_what_this_one_put(tmp_path: Path) -> None:
    digest = BlobStore(tmp_path).put(b"x")

    assert BlobStore(tmp_path).read(digest) == b"x"


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "abc", "A" * 64, "0" * 64])
def test_a_name_that_is_no_blob_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFoundError):
        BlobStore(tmp_path).path_of(name)


def test_a_changed_blob_is_refused_on_reading_and_mended_by_putting_it_again(
    tmp_path: Path,
) -> None:
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"genuine")
    blobs.path_of(digest).write_bytes(b"altered")

    with pytest.raises(UntrustedModelError, match=digest[:12]):
        blobs.read(digest)
    blobs.put(b"genuine")
    assert blobs.read(digest) == b"genuine"


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = BlobStore(tmp_path)

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)

    with pytest.raises(UnavailableError, match="no space left on the disk"):
        blobs.put(b"too much")
    assert files_in(tmp_path) == []


def test_a_writer_killed_in_the_middle_leaves_no_blob_and_its_traces_are_cleared(
    tmp_path: Path,
) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from cloud_coordinator.blobs import BlobStore

        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        BlobStore(Path(sys.argv[1])).put(b"half a model")
        """
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=60)
    blobs = BlobStore(tmp_path)

    assert killed.returncode == -9
    assert len(files_in(tmp_path)) == 1
    with pytest.raises(NotFoundError):
        blobs.path_of(hashlib.sha256(b"half a model").hexdigest())
    assert blobs.remove_temporaries() == 1
    assert files_in(tmp_path) == []


def test_collecting_removes_what_nobody_names(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    kept, orphan = blobs.put(b"kept"), blobs.put(b"orphan")

    assert blobs.collect({kept}) == 1
    assert blobs.read(kept) == b"kept"
    with pytest.raises(NotFoundError):
        blobs.path_of(orphan)
    assert blobs.collect({kept}) == 0


def test_collecting_spares_what_was_put_a_moment_ago_and_may_be_about_to_be_named(
    tmp_path: Path,
) -> None:
    blobs = BlobStore(tmp_path)
    old, renewed, young = blobs.put(b"old"), blobs.put(b"renewed"), blobs.put(b"young")
    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    for digest in (old, renewed):
        os.utime(blobs.path_of(digest), (hour_ago.timestamp() - 60,) * 2)
    blobs.put(b"renewed")

    assert blobs.collect(set(), before=hour_ago) == 1
    assert blobs.read(renewed) == b"renewed"
    assert blobs.read(young) == b"young"
