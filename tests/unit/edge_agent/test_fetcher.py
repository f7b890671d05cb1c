"""Downloads from a coordinator that cuts, lies, stalls and floods, over real sockets."""

import asyncio
import errno
import hashlib
import os
import random
import re
import time
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tuf.api.exceptions import DownloadHTTPError, DownloadLengthMismatchError

from edge_agent.fetcher import CoordinatorFetcher, Patience
from shared.errors import NotFoundError, StoppedError, UnavailableError, UntrustedModelError
from shared.messages import utc_now
from shared.release_names import MAX_ROLE_BYTES
from shared.request_signing import verify_request
from shared.signing import SigningKey

KEY = SigningKey.generate()
CONTENT = bytes(range(256)) * 4096  # a mebibyte
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ARTIFACT = f"/v1/artifacts/{SHA256}"
MANIFEST = f"/v1/models/{'5' * 64}/manifest"
IMPATIENT = Patience(
    attempts=3, deadline_s=10, idle_s=0.3, first_delay_s=0.001, longest_delay_s=0.01
)


class Coordinator:
    """A server of one file that misbehaves as told: one word per request, then it behaves."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.misdeeds: deque[str] = deque()
        self.ranges: list[str | None] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")
            method, path, _ = head.split("\r\n")[0].split(" ")
            headers = {
                name.lower(): value
                for name, value in re.findall(r"^([^:\r\n]+): (.*)\r$", head, re.MULTILINE)
            }
            verify_request(
                method=method, path=path, body=b"", headers=headers, key=KEY.public, now=utc_now()
            )
            self.ranges.append(headers.get("range"))
            misdeed = self.misdeeds.popleft() if self.misdeeds else ""
            if misdeed == "mute":
                await asyncio.sleep(5)
            await self._answer(writer, misdeed, headers.get("range"))
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, misdeed: str, wanted: str | None) -> None:
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        body = self.content[start:]
        status = "206 Partial Content" if wanted else "200 OK"
        match misdeed.split():
            case ["cut", count]:
                await self._send(writer, status, body[: int(count)], len(body), start=start)
            case ["hang", count]:
                await self._send(writer, status, body[: int(count)], len(body), start=start)
                await asyncio.sleep(5)
            case ["short", count]:  # a complete answer that holds less than is there
                part = body[: int(count)]
                await self._send(writer, status, part, len(part), start=start)
            case ["ignore-range"]:
                await self._send(writer, "200 OK", self.content)
            case ["wrong-range"]:
                await self._send(writer, status, body, start=start + 1)
            case ["wrong-bytes"]:
                await self._send(writer, status, body[::-1], start=start)
            case ["endless"]:
                writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
                while True:
                    writer.write(bytes(65536))
                    await writer.drain()
            case ["status", number]:
                await self._send(writer, f"{number} No", b"")
            case _:
                await self._send(writer, status, body, start=start)

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        status: str,
        body: bytes,
        length: int | None = None,
        *,
        start: int = 0,
    ) -> None:
        head = f"HTTP/1.1 {status}\r\nconnection: close\r\n"
        head += f"content-length: {len(body) if length is None else length}\r\n"
        if status.startswith("206"):
            size = len(self.content)
            head += f"content-range: bytes {start}-{size - 1}/{size}\r\n"
        writer.write(f"{head}\r\n".encode() + body)
        await writer.drain()


class Site:
    """A coordinator, and a device that downloads from it."""

    def __init__(self, coordinator: Coordinator, url: str, folder: Path) -> None:
        self.coordinator, self.url = coordinator, url
        self.part = folder / f"{SHA256}.part"
        self.patience = IMPATIENT

    def fetcher(self) -> CoordinatorFetcher:
        rng = random.Random(0)  # noqa: S311 - jitter
        return CoordinatorFetcher(
            self.url, device="device-1", key=KEY, rng=rng, patience=self.patience
        )

    async def file(self) -> bytes:
        """Download the file, and return what is there then."""
        fetch = self.fetcher().fetch_file
        await asyncio.to_thread(fetch, ARTIFACT, self.part, length=len(CONTENT))
        return self.part.read_bytes()

    async def manifest(self) -> bytes:
        return await asyncio.to_thread(self.fetcher().fetch_bytes, MANIFEST, limit=1000)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    coordinator = Coordinator()
    server = await asyncio.start_server(coordinator.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield Site(coordinator, f"http://{host}:{port}", tmp_path)


async def test_a_file_arrives_whole_and_is_asked_for_once(site: Site) -> None:
    assert await site.file() == CONTENT
    assert site.coordinator.ranges == [None]


async def test_a_manifest_arrives_as_it_was_sent(site: Site) -> None:
    site.coordinator.content = b"sealed"
    site.coordinator.misdeeds.extend(["cut 3", "status 503"])
    assert await site.manifest() == b"sealed"
    assert site.coordinator.ranges == [None] * 3


async def test_a_cut_connection_is_resumed_where_it_broke(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 300000", "short 200000", "cut 0", "hang 100000"])
    assert await site.file() == CONTENT
    starts = [None, "bytes=300000-", "bytes=500000-", "bytes=500000-", "bytes=600000-"]
    assert site.coordinator.ranges == starts


async def test_a_part_from_before_is_continued_and_a_whole_one_is_not_asked_for(
    site: Site,
) -> None:
    site.part.write_bytes(CONTENT[:1000])
    for _ in range(2):
        assert await site.file() == CONTENT
    assert site.coordinator.ranges == ["bytes=1000-"]


async def test_a_server_without_ranges_starts_again_from_the_first_byte(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 5000", "ignore-range"])
    assert await site.file() == CONTENT


@pytest.mark.parametrize("misdeed", ["wrong-range", "status 416"])
async def test_a_range_that_cannot_be_is_thrown_away(site: Site, misdeed: str) -> None:
    site.coordinator.misdeeds.extend(["cut 5000", misdeed])
    assert await site.file() == CONTENT
    assert site.coordinator.ranges == [None, "bytes=5000-", None]


async def test_endless_data_is_refused_at_the_size_that_was_signed(site: Site) -> None:
    site.coordinator.misdeeds.append("endless")
    with pytest.raises(UntrustedModelError, match="more than the size that was signed"):
        await site.file()
    assert not site.part.exists()


async def test_an_endless_manifest_is_refused(site: Site) -> None:
    site.coordinator.misdeeds.append("endless")
    with pytest.raises(UntrustedModelError, match="more than the 1000 bytes"):
        await site.manifest()


async def test_endless_metadata_are_refused_in_pythons_tufs_words(site: Site) -> None:
    site.coordinator.misdeeds.append("endless")
    url = f"{site.url}/v1/tuf/timestamp.json"
    with pytest.raises(DownloadLengthMismatchError, match=f"the {MAX_ROLE_BYTES} bytes"):
        await asyncio.to_thread(site.fetcher().fetch, url)


async def test_missing_metadata_are_said_in_pythons_tufs_words(site: Site) -> None:
    site.coordinator.misdeeds.append("status 404")
    with pytest.raises(DownloadHTTPError) as caught:
        await asyncio.to_thread(site.fetcher().fetch, f"{site.url}/v1/tuf/2.root.json")
    assert caught.value.status_code == 404


@pytest.mark.parametrize("misdeed", ["cut 0", "hang 0", "status 500", "short 0"])
async def test_a_network_that_stays_broken_is_given_up_with_a_sentence(
    site: Site, misdeed: str
) -> None:
    site.coordinator.misdeeds.extend([misdeed] * 3)
    with pytest.raises(UnavailableError, match="check that the coordinator runs"):
        await site.file()
    assert len(site.coordinator.ranges) == 3


async def test_no_coordinator_at_all_is_given_up_with_a_sentence(site: Site) -> None:
    site.url = "http://127.0.0.1:9"
    with pytest.raises(UnavailableError, match=r"cannot download /v1/models/5555.*:9"):
        await site.manifest()


async def test_a_download_that_only_drips_ends_at_its_deadline(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 1"] * 100_000)
    site.patience = Patience(deadline_s=0.3, first_delay_s=0.01, longest_delay_s=0.01)
    with pytest.raises(UnavailableError, match=r"not finished within 0\.3 seconds"):
        await site.file()
    assert 0 < site.part.stat().st_size < 10_000  # and what came is kept


@pytest.mark.parametrize(
    ("status", "kind", "complaint"),
    [
        (404, NotFoundError, "the coordinator has no /v1/models/5555"),
        (401, UnavailableError, "check the device's clock and that it is still enrolled"),
        (403, UnavailableError, "refuses this device"),
        (302, UnavailableError, "with HTTP 302"),
    ],
)
async def test_a_refusal_is_not_asked_again(
    site: Site, status: int, kind: type[Exception], complaint: str
) -> None:
    site.coordinator.misdeeds.append(f"status {status}")
    with pytest.raises(kind, match=complaint):
        await site.manifest()
    assert len(site.coordinator.ranges) == 1


async def test_a_disk_that_fills_up_on_the_way_frees_what_was_written(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        await site.file()
    assert not site.part.exists()


@pytest.mark.parametrize("misdeed", ["hang 4000", "mute"])
async def test_a_stopped_download_ends_at_once_and_keeps_its_part(site: Site, misdeed: str) -> None:
    site.coordinator.misdeeds.append(misdeed)
    site.patience = Patience(idle_s=60)
    fetcher = site.fetcher()
    task: asyncio.Task[Any] = asyncio.create_task(
        asyncio.to_thread(fetcher.fetch_file, ARTIFACT, site.part, length=len(CONTENT))
    )
    async with asyncio.timeout(10):
        while not (site.part.exists() and site.part.stat().st_size) and not (  # noqa: ASYNC110
            misdeed == "mute" and site.coordinator.ranges
        ):
            await asyncio.sleep(0.005)
    began = time.monotonic()
    fetcher.stop()
    with pytest.raises(StoppedError):
        await task
    assert time.monotonic() - began < 5  # of an idle limit of 60
    assert await site.file() == CONTENT
    have = site.coordinator.ranges[1]
    assert have == ("bytes=4000-" if misdeed == "hang 4000" else None)
