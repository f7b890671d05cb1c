"""Fetching from a coordinator over a network that breaks, with requests that this device signs.

What python-tuf asks for (metadata) and what it vouches for (manifests, model files) comes the same
way. A file goes into a ``.part`` that is continued by HTTP range, over lost connections and over
restarts of the agent. Nothing is believed here: sizes are bounded by what is signed, and whoever
asked checks what came. Everything blocks, in a worker thread; `CoordinatorFetcher.stop` ends it.
"""

import contextlib
import http.client
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tuf.api.exceptions import DownloadHTTPError, DownloadLengthMismatchError
from tuf.ngclient import FetcherInterface

from shared.errors import NotFoundError, StoppedError, UnavailableError, UntrustedModelError
from shared.messages import utc_now
from shared.release_names import MAX_ROLE_BYTES
from shared.request_signing import signed_headers
from shared.signing import SigningKey

_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_CHUNK_BYTES = 1024 * 1024

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


class CoordinatorFetcher(FetcherInterface):
    """Fetches for one errand, in one thread; another one is needed after `stop`."""

    def __init__(
        self,
        base_url: str,
        *,
        device: str,
        key: SigningKey,
        rng: random.Random,
        now: Callable[[], datetime] = utc_now,
        patience: Patience | None = None,
    ) -> None:
        """Describe where from and as whom.

        Args:
            base_url: the coordinator's API.
            device: this device's id.
            key: its identity.
            rng: draws the back-off.
            now: aware UTC, signed into each request.
            patience: for tests and special networks.
        """
        self._base_url = base_url.rstrip("/")
        self._device, self._key = device, key
        self._rng, self._now = rng, now
        self._patience = patience or Patience()
        self._received_bytes = 0  # tells whether an attempt got anywhere
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def stop(self) -> None:
        """End what is under way, from any thread."""
        with self._lock:
            self._stopped.set()
            if self._socket is not None:
                with contextlib.suppress(OSError):  # wakes a thread that waits in recv()
                    self._socket.shutdown(socket.SHUT_RDWR)

    def fetch_bytes(self, path: str, *, limit: int) -> bytes:
        """Return what lies at ``path``, at most ``limit`` bytes.

        Raises:
            NotFoundError: the coordinator has nothing there.
            UnavailableError: no coordinator, or it refuses this device.
            UntrustedModelError: it sends more.
            StoppedError: somebody called `stop`.
        """
        content = bytearray()

        def attempt(deadline: float) -> bool:
            content.clear()
            with self._response(path, start=0) as response:
                _require_success(response, path)
                for chunk in self._chunks(response, deadline):
                    content.extend(chunk)
                    if len(content) > limit:
                        raise UntrustedModelError(
                            f"the coordinator sent more than the {limit} bytes that {path} may have"
                        )
            return True

        self._persist(attempt, path)
        return bytes(content)

    def fetch_file(self, path: str, part: Path, *, length: int) -> None:
        """Bring ``part`` to ``length`` bytes, from what is there; the caller judges them.

        Raises:
            As `fetch_bytes`; a part that became too long is removed.
            OSError: the disk; the part is removed, since a full one needs the space more.
        """

        def attempt(deadline: float) -> bool:
            if _size(part) < length:
                self._continue(path, part, length, deadline)
            return _size(part) >= length

        self._persist(attempt, path)

    def _fetch(self, url: str) -> Iterator[bytes]:
        """Fetch metadata whole, for python-tuf, which turns our errors into causes of its own."""
        try:
            path = url.removeprefix(self._base_url)
            return iter([self.fetch_bytes(path, limit=MAX_ROLE_BYTES)])
        except NotFoundError as error:  # of a root, this says that there is no newer one
            raise DownloadHTTPError(str(error), 404) from error
        except UntrustedModelError as error:
            raise DownloadLengthMismatchError(str(error)) from error

    def _continue(self, path: str, part: Path, length: int, deadline: float) -> None:
        """Ask for the rest of ``part`` and append what comes, for as long as it comes."""
        have = _size(part)
        with self._response(path, start=have) as response:
            if response.status == 416:
                part.unlink()
                raise _InterruptedError("the coordinator's file is shorter than what is here")
            _require_success(response, path)
            resumed = response.status == 206
            if resumed and _start_of_range(response) != have:
                part.unlink()
                raise _InterruptedError("the coordinator sent another range than asked")
            limit = length - (have if resumed else 0)
            try:
                with part.open("ab" if resumed else "wb", buffering=0) as file:
                    self._append(response, file, limit, deadline)
            except (OSError, UntrustedModelError):
                part.unlink(missing_ok=True)
                raise

    def _append(
        self, response: http.client.HTTPResponse, file: BinaryIO, limit: int, deadline: float
    ) -> None:
        """Write a response to ``file``, at most ``limit`` bytes of it."""
        try:
            for chunk in self._chunks(response, deadline):
                limit -= len(chunk)
                if limit < 0:
                    raise UntrustedModelError(
                        "the coordinator sent more than the size that was signed"
                    )
                file.write(chunk)
                self._received_bytes += len(chunk)
        finally:  # what came before the connection broke counts
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _response(self, path: str, *, start: int) -> Iterator[http.client.HTTPResponse]:
        """Send one signed request; the connection is closed at the end."""
        url = urlsplit(self._base_url + path)
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=self._patience.idle_s)
        try:
            try:
                connection.connect()
                with self._lock:
                    self._socket = connection.sock
                self._require_wanted()
                connection.request("GET", url.path, headers=self._headers(url.path, start))
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self._require_wanted()
                raise _InterruptedError(str(error) or type(error).__name__) from error
            with response:
                yield response
        finally:
            with self._lock:
                self._socket = None
            connection.close()

    def _headers(self, path: str, start: int) -> dict[str, str]:
        headers = signed_headers(
            method="GET",
            path=path,
            body=b"",
            device=self._device,
            key=self._key,
            now=self._now(),
        )
        headers |= {"accept-encoding": "identity", "connection": "close"}
        return headers | ({"range": f"bytes={start}-"} if start else {})

    def _chunks(self, response: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
        while True:
            try:
                chunk = response.read1(_CHUNK_BYTES)
            except (OSError, http.client.HTTPException) as error:
                self._require_wanted()
                raise _InterruptedError(str(error) or type(error).__name__) from error
            self._require_wanted()
            if not chunk:
                break
            yield chunk
            if time.monotonic() > deadline:
                raise _InterruptedError("time is up")
        if response.length:
            raise _InterruptedError("the connection ended early")

    def _require_wanted(self) -> None:
        if self._stopped.is_set():
            raise StoppedError("the download was abandoned")

    def _persist(self, attempt: Callable[[float], bool], path: str) -> None:
        """Repeat ``attempt`` until it returns True, as long as `Patience` allows.

        Raises:
            UnavailableError: too many attempts in a row brought nothing, or time is up.
        """
        patience, failures, cause = self._patience, 0, "the connection ended early"
        deadline = time.monotonic() + patience.deadline_s
        while failures < patience.attempts:
            self._require_wanted()
            received = self._received_bytes
            try:
                if attempt(deadline):
                    return
            except _InterruptedError as error:
                cause = str(error)
            if time.monotonic() > deadline:
                cause = f"not finished within {patience.deadline_s:g} seconds"
                break
            failures = 1 if self._received_bytes > received else failures + 1
            logger.info("downloading %s: %s", path, cause)
            self._stopped.wait(self._delay_s(failures))
        raise UnavailableError(
            f"cannot download {path} from {self._base_url} ({cause}); "
            "check that the coordinator runs and can be reached"
        )

    def _delay_s(self, failures: int) -> float:
        ceiling = self._patience.first_delay_s * 2 ** (failures - 1)
        return self._rng.uniform(0, min(ceiling, self._patience.longest_delay_s))


def _require_success(response: http.client.HTTPResponse, path: str) -> None:
    """Raise unless the response carries what was asked for."""
    status = response.status
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


def _start_of_range(response: http.client.HTTPResponse) -> int | None:
    """Return where the body of a 206 starts; None where its header says nothing clear."""
    unit, _, rest = response.headers.get("content-range", "").partition(" ")
    start = rest.partition("-")[0]
    return int(start) if unit == "bytes" and start.isascii() and start.isdigit() else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
