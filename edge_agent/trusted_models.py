"""Model versions that the coordinator released, as TUF says it; the door to python-tuf's client.

Each errand refreshes the metadata in ``home/tuf`` from the root that was pinned at enrolment, looks
its file up under ``released/``, fetches it, and judges its bytes by length and digest. What is
refused changes nothing: the running model needs no metadata, and no file is removed but a part.
"""

import asyncio
import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from tuf.api.exceptions import (
    DownloadError,
    DownloadLengthMismatchError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
)
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater, UpdaterConfig

from edge_agent.fetcher import CoordinatorFetcher
from shared.errors import (
    ConfigError,
    ShoalError,
    StaleMetadataError,
    UnavailableError,
    UntrustedModelError,
)
from shared.files import explained_disk_errors, make_folder, sync_directory
from shared.manifest import MAX_MANIFEST_BYTES, Artifact
from shared.messages import utc_now
from shared.release_names import (
    MAX_ROLE_BYTES,
    MAX_ROOT_ROTATIONS,
    METADATA_PREFIX,
    Role,
    artifact_target,
    manifest_target,
)

RESERVE_BYTES = 32 * 1024**2  # disk space that a download leaves to everything else
_ROLE: Role = "released"
_CONFIG = UpdaterConfig(
    prefix_targets_with_hash=False,  # names carry digests already
    max_root_rotations=MAX_ROOT_ROTATIONS,
    max_delegations=3,
    root_max_length=MAX_ROLE_BYTES,
    timestamp_max_length=MAX_ROLE_BYTES,
    snapshot_max_length=MAX_ROLE_BYTES,
    targets_max_length=MAX_ROLE_BYTES,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
NewFetcher = Callable[[], CoordinatorFetcher]


class TrustedModels:
    """Fetches released manifests and model files, one at a time."""

    def __init__(
        self,
        home: Path,
        api_url: str,
        root: bytes,
        new_fetcher: NewFetcher,
        *,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        """Describe whom to believe, and where to keep what is known.

        Args:
            home: the agent's state folder; metadata go to ``tuf``, parts to ``models/downloads``.
            api_url: of the coordinator.
            root: the TUF root that was pinned at enrolment; empty before there was one.
            new_fetcher: makes what fetches for one errand.
            now: aware UTC, for messages.
        """
        self._metadata, self._downloads = home / "tuf", home / "models" / "downloads"
        self._api_url, self._root = api_url.rstrip("/"), root
        self._new_fetcher, self._now = new_fetcher, now
        self._one_at_a_time = asyncio.Lock()

    async def manifest(self, version: str) -> bytes:
        """Return the sealed manifest of a released version.

        Raises:
            UntrustedModelError: it is not released, or what came is not what is listed.
            StaleMetadataError: the list has expired, by this device's clock.
            UnavailableError: no coordinator, it refuses this device, or the disk is full.
            ConfigError: this device enrolled before there was a root to pin.
            NotFoundError: it is released, and the coordinator does not have it.
        """
        return await self._run(lambda fetcher: self._manifest(fetcher, version))

    async def artifact(self, artifact: Artifact) -> Path:
        """Download a released model file, or what is missing of it, and return its path.

        Raises:
            As `manifest`; nothing is kept of what is not what the manifest describes.
        """
        return await self._run(lambda fetcher: self._artifact(fetcher, artifact))

    async def _run(self, errand: Callable[[CoordinatorFetcher], T]) -> T:
        """Do an errand in a thread; a cancelled one is stopped, and is over when this returns."""
        async with self._one_at_a_time:
            fetcher = self._new_fetcher()
            task = asyncio.create_task(asyncio.to_thread(errand, fetcher), name="download")
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                fetcher.stop()
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()):
                    logger.info("the download was abandoned: %s", error)
                raise

    def _manifest(self, fetcher: CoordinatorFetcher, version: str) -> bytes:
        listed = self._look_up(fetcher, manifest_target(_ROLE, version), f"version {version[:12]}")
        if listed.length > MAX_MANIFEST_BYTES:
            raise UntrustedModelError(
                f"a manifest of {listed.length} bytes is listed, over {MAX_MANIFEST_BYTES}"
            )
        content = fetcher.fetch_bytes(f"/v1/models/{version}/manifest", limit=listed.length)
        with _explained(f"the manifest of version {version[:12]}"):
            listed.verify_length_and_hashes(content)
        return content

    def _artifact(self, fetcher: CoordinatorFetcher, artifact: Artifact) -> Path:
        name = f"model file {artifact.sha256[:12]}"
        listed = self._look_up(fetcher, artifact_target(_ROLE, artifact.sha256), name)
        if (listed.length, listed.hashes.get("sha256")) != (artifact.size_bytes, artifact.sha256):
            raise UntrustedModelError(f"{name} is listed with another size or digest than it has")
        part = self._downloads / f"{artifact.sha256}.part"
        with explained_disk_errors(self._downloads):
            self._clear_but(part)
            if self._complete(fetcher, listed, part, name):  # an old part may have been damaged
                logger.warning("part of %s was damaged; starting again", name)
                self._complete(fetcher, listed, part, name)
        return part

    def _complete(
        self, fetcher: CoordinatorFetcher, listed: TargetFile, part: Path, name: str
    ) -> bool:
        """Bring ``part`` to its full size and judge it; return True if an *old* part was wrong."""
        started_with = part.stat().st_size if part.exists() else 0
        _require_space(self._downloads, listed.length - started_with)
        path = f"/v1/artifacts/{listed.hashes['sha256']}"
        fetcher.fetch_file(path, part, length=listed.length)
        try:
            with _explained(name), part.open("rb") as file:
                listed.verify_length_and_hashes(file)
        except UntrustedModelError:
            part.unlink()
            if started_with:
                return True
            raise
        return False

    def _look_up(self, fetcher: CoordinatorFetcher, target: str, name: str) -> TargetFile:
        """Refresh the metadata and return what they say of one file."""
        if not self._root:
            raise ConfigError(
                "this device enrolled before there was a TUF root to pin, so it can tell no "
                "released model from another; enrol it again with a new --home"
            )
        make_folder(self._metadata)
        with explained_disk_errors(self._metadata), _explained(name, self._now):
            for left_over in self._metadata.glob("tmp*"):  # by a power cut
                left_over.unlink()
            try:
                updater = Updater(
                    str(self._metadata),
                    self._api_url + METADATA_PREFIX,
                    fetcher=fetcher,
                    config=_CONFIG,
                    bootstrap=self._root,
                )
                listed = updater.get_targetinfo(target)
            finally:
                self._make_durable()
        if listed is None:
            raise UntrustedModelError(f"{name} is not released by this coordinator")
        return listed

    def _make_durable(self) -> None:
        """Sync what python-tuf renamed: what was seen once must not be forgotten."""
        history = self._metadata / "root_history"
        for file in (*self._metadata.glob("*.json"), *history.glob("*.json")):
            with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
                os.fsync(opened.fileno())
        for folder in (history, self._metadata):
            if folder.exists():
                sync_directory(folder)

    def _clear_but(self, part: Path) -> None:
        """Remove what other downloads left behind."""
        self._downloads.mkdir(parents=True, exist_ok=True)
        for path in self._downloads.iterdir():
            if path != part:
                path.unlink()


@contextlib.contextmanager
def _explained(name: str, now: Callable[[], datetime] = utc_now) -> Iterator[None]:
    """Turn python-tuf's refusals in this block into errors of ours."""
    try:
        yield
    except ExpiredMetadataError as error:
        raise StaleMetadataError(
            f"the list of released models has expired ({error}) by this device's clock, which says "
            f"{now():%Y-%m-%d %H:%M} UTC; set the clock if it is wrong, else look why the "
            "coordinator signs no new list"
        ) from error
    except LengthOrHashMismatchError as error:
        raise UntrustedModelError(f"{name} is not what is listed: {error}") from error
    except (RepositoryError, DownloadLengthMismatchError) as error:
        raise UntrustedModelError(f"{name}: the coordinator's metadata are bad: {error}") from error
    except DownloadError as error:
        if isinstance(error.__cause__, OSError | ShoalError):
            raise error.__cause__ from None
        raise UnavailableError(f"{name}: {error}; see the coordinator's log") from error


def _require_space(folder: Path, wanted_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes + RESERVE_BYTES:
        raise UnavailableError(
            f"the model needs {wanted_bytes + RESERVE_BYTES} bytes on the disk that holds "
            f"{folder}, and {free} are free; free some space"
        )
