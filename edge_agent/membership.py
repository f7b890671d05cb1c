"""Which devices this one takes as peers in a sum: the signed membership list, kept and renewed.

The newest list that was seen lies in the home, as it was sealed. A newer one replaces it only if
the pinned fleet key signed it and it follows the one that is here, so a coordinator without that
key can neither add a device nor take one back out. Everything here blocks: the trainer calls it.

A list of 100,000 devices takes 20 MB and some one second to open; it is opened once for as long as
the file stays the same, and held in some 100 MB. Devices download a whole list when a sum asks for
a newer one than theirs, so a fleet that grows every minute is better signed every hour.
"""

import fcntl
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import httpx

from edge_agent.enrolment import Enrolment
from shared.errors import PeerError, UnavailableError
from shared.files import explained_disk_errors, write_private
from shared.http_retries import retry_while_away
from shared.membership import (
    MAX_SEALED_BYTES,
    Member,
    MembershipList,
    check_successor,
    members_of,
    open_list,
)
from shared.messages import utc_now
from shared.request_signing import signed_headers
from shared.signing import VerifyingKey

LIST_FILE = "membership.json"
_LOCK_FILE = "membership.lock"
_PATH = "/v1/membership"
_IDLE_S = 10.0  # without a byte
_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class _Opened:
    """A list that was checked, and its members without the revoked."""

    content: MembershipList
    members: Mapping[str, Member]


def members_for(
    home: Path,
    enrolment: Enrolment,
    version: int,
    *,
    deadline_s: float = _DEADLINE_S,
    now: Callable[[], datetime] = utc_now,
    rng: random.Random | None = None,
    stop: threading.Event | None = None,
) -> Mapping[str, Member]:
    """Return the members by device id, from list ``version`` or a newer one that is known here.

    Args:
        home: the agent's state folder; the newest list seen is kept there.
        enrolment: who this device is, and the fleet key that it pinned.
        version: the list that the roster of a sum is from.
        deadline_s: seconds after which a download ends, at most.
        now: aware UTC; signs the request.
        rng: draws the pauses between attempts.
        stop: ends the waiting at once.

    Raises:
        PeerError: what the coordinator serves is older than it claims, was not signed by the
            pinned fleet key, is of another fleet, or takes back what an earlier list said.
        UnavailableError: no coordinator answers, it has no list, or the disk is full.
    """
    if not enrolment.fleet_keys:
        raise PeerError(
            "this device was enrolled without a fleet key, so it knows no peers for a sum; "
            "enrol it anew in another --home"
        )
    kept = _kept(home, enrolment)
    if kept is None or kept.content.version < version:
        sealed = _download(
            enrolment,
            now=now,
            deadline_s=deadline_s,
            rng=rng or random.Random(),  # noqa: S311  # jitter, no secret
            stop=stop or threading.Event(),
        )
        kept = _renew(home, enrolment, sealed, version)
    if kept.content.version < version:
        raise PeerError(
            f"the sum names membership list {version} and the coordinator serves "
            f"{kept.content.version}"
        )
    return kept.members


def _renew(home: Path, enrolment: Enrolment, sealed: bytes, version: int) -> _Opened:
    """Keep a downloaded list if it follows the one that is here; return the one that counts."""
    new = open_list(sealed, enrolment.fleet_keys, fleet=enrolment.fleet)
    with _only_writer(home):
        kept = _kept(home, enrolment)
        if kept is not None and (kept.content.version >= version or kept.content == new):
            return kept  # another process was quicker, or there is nothing newer
        if kept is not None:
            check_successor(kept.content, new)
        write_private(home / LIST_FILE, sealed)
        renewed = _kept(home, enrolment)
    assert renewed is not None
    return renewed


def _kept(home: Path, enrolment: Enrolment) -> _Opened | None:
    """Return the list in ``home``; None before the first.

    Raises:
        PeerError: it was changed since it was written.
    """
    path = home / LIST_FILE
    with explained_disk_errors(home):
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
    stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
    keys = tuple(key.raw for key in enrolment.fleet_keys.values())
    return _open_file(path, stamp, keys, enrolment.fleet)


@functools.lru_cache(maxsize=2)  # of one home, and of the one before it in tests
def _open_file(path: Path, _stamp: tuple[int, ...], keys: tuple[bytes, ...], fleet: str) -> _Opened:
    """Open the list at ``path``; ``_stamp`` tells one content of the file from another."""
    trusted = {key.key_id: key for key in map(VerifyingKey, keys)}
    with explained_disk_errors(path.parent):
        sealed = path.read_bytes()
    try:
        content = open_list(sealed, trusted, fleet=fleet)
    except PeerError as error:
        raise PeerError(f"{path} is damaged ({error}); delete it to fetch it again") from error
    return _Opened(content, members_of(content))


def _download(
    enrolment: Enrolment,
    *,
    now: Callable[[], datetime],
    deadline_s: float,
    rng: random.Random,
    stop: threading.Event,
) -> bytes:
    """Return the sealed list that the coordinator serves."""
    deadline = time.monotonic() + deadline_s
    with httpx.Client(
        base_url=enrolment.api_url,
        timeout=_IDLE_S,
        trust_env=False,  # a proxy cannot reach this machine's loopback
    ) as client:
        try:
            return retry_while_away(
                lambda: _download_once(client, enrolment, now=now(), deadline=deadline),
                what=f"the coordinator at {enrolment.api_url}",
                deadline=deadline,
                stop=stop,
                rng=rng,
            )
        except httpx.HTTPStatusError as error:
            raise UnavailableError(
                f"the coordinator at {enrolment.api_url} does not give this device the membership "
                f"list (HTTP {error.response.status_code}); check the device's clock and the "
                "coordinator's log"
            ) from error


def _download_once(
    client: httpx.Client, enrolment: Enrolment, *, now: datetime, deadline: float
) -> bytes:
    headers = signed_headers(
        method="GET",
        path=_PATH,
        body=b"",
        device=enrolment.device_id,
        key=enrolment.key,
        now=now,
    )
    content = bytearray()
    with client.stream("GET", _PATH, headers={"accept-encoding": "identity", **headers}) as answer:
        answer.raise_for_status()
        for chunk in answer.iter_raw():
            content += chunk
            if len(content) > MAX_SEALED_BYTES:
                raise PeerError(
                    f"the coordinator sent a membership list of over {MAX_SEALED_BYTES} bytes"
                )
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the membership list comes too slowly")
    return bytes(content)


@contextmanager
def _only_writer(home: Path) -> Iterator[None]:
    """Hold the list against other processes of this home; the kernel lets go of the dead."""
    with explained_disk_errors(home):
        lock = (home / _LOCK_FILE).open("a")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
