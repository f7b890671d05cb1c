"""Fetching a model version over a network that breaks, from a server that may be wrong or hostile.

A download goes to ``home/models/downloads/<digest>.part`` and is continued by HTTP range, over lost
connections and over restarts of the agent. Nothing is taken on trust: the size is bounded by the
signed manifest (a server cannot send for ever), the range must be the one that was asked for, and
the finished file must have the digest that names it. There is at most one file in the folder.
"""

import asyncio
import logging
import os
import random
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import httpx

from shared.errors import NotFoundError, UnavailableError, UntrustedModelError
from shared.files import explained_disk_errors, sha256_of
from shared.manifest import MAX_MANIFEST_BYTES, Artifact
from shared.messages import utc_now
from shared.request_signing import signed_headers
from shared.signing import SigningKey

RESERVE_BYTES = 32 * 1024**2  # disk space that a download leaves to everything else
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a download bears with its network."""

    attempts: int = 6  # in a row without a single new byte
    deadline_s: float = 3600.0  # for one file, all attempts together
    idle_s: float = 30.0  # without a byte, until a connection counts as lost
    first_delay_s: float = 0.5  # before the second attempt; doubles, with full jitter
    longest_delay_s: float = 30.0


class _InterruptedError(Exception):
    """This attempt failed in a way that another one may not."""


class Downloader:
    """Downloads manifests and artifacts with requests that this device signs."""

    def __init__(
        self,
        home: Path,
        client: httpx.AsyncClient,
        *,
        device: str,
        key: SigningKey,
        rng: random.Random,
        now: Callable[[], datetime] = utc_now,
        patience: Patience | None = None,
    ) -> None:
        """Describe where from, where to and as whom.

        Args:
            home: the agent's state folder.
            client: its base URL is the coordinator's API; the caller closes it.
            device: this device's id.
            key: its identity.
            rng: draws the back-off.
            now: aware UTC, signed into each request.
            patience: for tests and special networks.
        """
        self._folder = home / "models" / "downloads"
        self._client, self._device, self._key = client, device, key
        self._rng, self._now = rng, now
        self._patience = patience or Patience()
        self._received_bytes = 0  # in all downloads; tells whether an attempt got anywhere

    async def manifest(self, version: str) -> bytes:
        """Return the sealed manifest of ``version``; the caller checks it.

        Raises:
            NotFoundError: the coordinator does not know the version.
            UnavailableError: no coordinator, or it refuses this device.
            UntrustedModelError: it sends more than a manifest may hold.
        """
        content = b""

        async def attempt() -> bool:
            nonlocal content
            content = await self._manifest_once(version)
            return True

        await self._persist(attempt, f"the manifest of {version[:12]}")
        return content

    async def artifact(self, artifact: Artifact) -> Path:
        """Download a model file, or what is missing of it, and return its path.

        Raises:
            NotFoundError: the coordinator does not have it.
            UnavailableError: no coordinator, it refuses this device, or the disk is full.
            UntrustedModelError: what came is not what the manifest describes; nothing is kept.
        """
        part = self._folder / f"{artifact.sha256}.part"
        with explained_disk_errors(self._folder):
            await asyncio.to_thread(self._clear_but, part)
            if await self._complete(artifact, part):  # resumed: an old part may have been damaged
                logger.warning("part of %s was damaged; starting again", artifact.sha256[:12])
                _forget(part)
                await self._complete(artifact, part)
        return part

    async def _complete(self, artifact: Artifact, part: Path) -> bool:
        """Bring ``part`` to its full size and check it; return True if an *old* part was wrong."""
        started_with = _size(part)
        _require_space(self._folder, artifact.size_bytes - started_with)

        async def attempt() -> bool:
            if _size(part) < artifact.size_bytes:
                await self._continue(artifact, part)
            return _size(part) >= artifact.size_bytes  # the digest judges one that is too long

        await self._persist(attempt, f"model file {artifact.sha256[:12]}")
        found = await asyncio.to_thread(sha256_of, part)
        if found == artifact.sha256:
            return False
        if started_with:
            return True
        _forget(part)
        raise UntrustedModelError(
            f"the download has digest {found[:12]} and the manifest names {artifact.sha256[:12]}"
        )

    async def _manifest_once(self, version: str) -> bytes:
        content = bytearray()
        request = self._request(f"/v1/models/{version}/manifest", {})
        response = await self._client.send(request, stream=True)
        try:
            _require_success(response)
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > MAX_MANIFEST_BYTES:
                    raise UntrustedModelError(
                        f"the coordinator sent a manifest of over {MAX_MANIFEST_BYTES} bytes"
                    )
        finally:
            await response.aclose()
        return bytes(content)

    async def _continue(self, artifact: Artifact, part: Path) -> None:
        """Ask for the rest of ``part`` and append what comes, for as long as it comes."""
        have = _size(part)
        headers = {"range": f"bytes={have}-"} if have else {}
        request = self._request(f"/v1/artifacts/{artifact.sha256}", headers)
        response = await self._client.send(request, stream=True)
        try:
            if response.status_code == 416:
                _forget(part)
                raise _InterruptedError("the coordinator's file is shorter than what is here")
            _require_success(response)
            if response.status_code == 206 and _start_of_range(response) != have:
                _forget(part)
                raise _InterruptedError("the coordinator sent another range than asked")
            resumed = response.status_code == 206
            with _open(part, append=resumed) as file:
                await self._append(response, file, artifact.size_bytes - (have if resumed else 0))
        except OSError:
            _forget(part)  # a full disk needs the space more
            raise
        finally:
            await response.aclose()

    async def _append(self, response: httpx.Response, file: BinaryIO, limit_bytes: int) -> None:
        """Write a response to ``file``, at most ``limit_bytes`` of it."""
        written = 0
        try:
            async for chunk in response.aiter_raw():
                written += len(chunk)
                if written > limit_bytes:
                    _forget(Path(file.name))
                    raise UntrustedModelError(
                        "the coordinator sent more than the size that the manifest names"
                    )
                file.write(chunk)
                self._received_bytes += len(chunk)
        finally:  # what came before the connection broke counts
            file.flush()
            await asyncio.to_thread(os.fsync, file.fileno())

    def _request(self, path: str, headers: dict[str, str]) -> httpx.Request:
        request = self._client.build_request(
            "GET",
            path,
            headers={"accept-encoding": "identity", **headers},
            timeout=self._patience.idle_s,
        )
        signed = signed_headers(
            method="GET",
            path=request.url.raw_path.decode("ascii"),
            body=b"",
            device=self._device,
            key=self._key,
            now=self._now(),
        )
        request.headers.update(signed)
        return request

    async def _persist(self, attempt: Callable[[], Awaitable[bool]], what: str) -> None:
        """Repeat ``attempt`` until it returns True, as long as `Patience` allows.

        Raises:
            UnavailableError: too many attempts in a row brought nothing, or time is up.
        """
        patience, failures, cause = self._patience, 0, "the connection ended early"
        try:
            async with asyncio.timeout(patience.deadline_s):
                while failures < patience.attempts:
                    received = self._received_bytes
                    try:
                        if await attempt():
                            return
                    except (httpx.TransportError, _InterruptedError) as error:
                        cause = str(error) or type(error).__name__
                    failures = 1 if self._received_bytes > received else failures + 1
                    logger.info("downloading %s: %s", what, cause)
                    await asyncio.sleep(self._delay_s(failures))
        except TimeoutError:
            cause = f"not finished within {patience.deadline_s:g} seconds"
        raise UnavailableError(
            f"cannot download {what} from {self._client.base_url} ({cause}); "
            "check that the coordinator runs and can be reached"
        )

    def _delay_s(self, failures: int) -> float:
        ceiling = self._patience.first_delay_s * 2 ** (failures - 1)
        return self._rng.uniform(0, min(ceiling, self._patience.longest_delay_s))

    def _clear_but(self, part: Path) -> None:
        """Remove what other downloads left behind."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if path != part:
                path.unlink()


def _require_success(response: httpx.Response) -> None:
    """Raise unless the response carries what was asked for."""
    status, path = response.status_code, response.request.url.path
    if status in {200, 206}:
        return
    if status in _BUSY:
        raise _InterruptedError(f"the coordinator answered with HTTP {status}")
    if status == 404:
        raise NotFoundError(f"the coordinator has no {path}; it may have been removed")
    if status in {401, 403}:
        raise UnavailableError(
            f"the coordinator refuses this device (HTTP {status}); "
            "check the device's clock and that it is still enrolled"
        )
    raise UnavailableError(f"the coordinator answered {path} with HTTP {status}; see its log")


def _start_of_range(response: httpx.Response) -> int | None:
    """Return where the body of a 206 starts; None where its header says nothing clear."""
    unit, _, rest = response.headers.get("content-range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isascii() and start.isdigit() else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _open(part: Path, *, append: bool) -> BinaryIO:
    return part.open("ab" if append else "wb")


def _forget(part: Path) -> None:
    """Remove what is not worth continuing."""
    part.unlink(missing_ok=True)


def _require_space(folder: Path, wanted_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted_bytes + RESERVE_BYTES:
        raise UnavailableError(
            f"the model needs {wanted_bytes + RESERVE_BYTES} bytes on the disk that holds "
            f"{folder}, and {free} are free; free some space"
        )
