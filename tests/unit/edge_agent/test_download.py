"""Downloads from a coordinator that cuts, lies, stalls and floods, over real sockets."""

import asyncio
import errno
import hashlib
import os
import random
import re
import shutil
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from edge_agent.download import RESERVE_BYTES, Downloader, Patience
from shared.errors import NotFoundError, UnavailableError, UntrustedModelError
from shared.manifest import MAX_MANIFEST_BYTES, Artifact
from shared.messages import utc_now
from shared.request_signing import verify_request
from shared.signing import SigningKey

KEY = SigningKey.generate()
CONTENT = bytes(range(256)) * 4096  # a mebibyte
ARTIFACT = Artifact(
    variant="fp32", sha256=hashlib.sha256(CONTENT).hexdigest(), size_bytes=len(CONTENT)
)
VERSION = "5" * 64
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


class Site(NamedTuple):
    """A coordinator, and a device that downloads from it."""

    coordinator: Coordinator
    downloads: Downloader
    part: Path


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    coordinator = Coordinator()
    server = await asyncio.start_server(coordinator.serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, httpx.AsyncClient(base_url=f"http://{host}:{port}") as client:
        downloads = Downloader(
            tmp_path,
            client,
            device="device-1",
            key=KEY,
            rng=random.Random(0),  # noqa: S311 - jitter
            patience=IMPATIENT,
        )
        folder = tmp_path / "models" / "downloads"
        yield Site(coordinator, downloads, folder / f"{ARTIFACT.sha256}.part")


async def test_a_file_arrives_whole_and_is_asked_for_once(site: Site) -> None:
    path = await site.downloads.artifact(ARTIFACT)
    assert path == site.part
    assert path.read_bytes() == CONTENT
    assert site.coordinator.ranges == [None]


async def test_a_manifest_arrives_as_it_was_sent(site: Site) -> None:
    site.coordinator.content = b"sealed"
    site.coordinator.misdeeds.extend(["cut 3", "status 503"])
    assert await site.downloads.manifest(VERSION) == b"sealed"
    assert site.coordinator.ranges == [None] * 3


async def test_a_cut_connection_is_resumed_where_it_broke(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 300000", "short 200000", "cut 0", "hang 100000"])
    path = await site.downloads.artifact(ARTIFACT)
    assert path.read_bytes() == CONTENT
    starts = [None, "bytes=300000-", "bytes=500000-", "bytes=500000-", "bytes=600000-"]
    assert site.coordinator.ranges == starts


async def test_a_restarted_agent_resumes_and_removes_what_is_not_wanted_any_more(
    site: Site,
) -> None:
    site.part.parent.mkdir(parents=True)
    site.part.write_bytes(CONTENT[:1000])
    other = site.part.with_name("other.part")
    other.write_bytes(b"x")
    await site.downloads.artifact(ARTIFACT)
    assert site.coordinator.ranges == ["bytes=1000-"]
    assert not other.exists()
    await site.downloads.artifact(ARTIFACT)  # complete: nothing is asked
    assert site.coordinator.ranges == ["bytes=1000-"]


async def test_a_server_without_ranges_starts_again_from_the_first_byte(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 5000", "ignore-range"])
    assert (await site.downloads.artifact(ARTIFACT)).read_bytes() == CONTENT


async def test_a_wrong_range_is_thrown_away(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 5000", "wrong-range"])
    assert (await site.downloads.artifact(ARTIFACT)).read_bytes() == CONTENT
    assert site.coordinator.ranges == [None, "bytes=5000-", None]


async def test_an_unsatisfiable_range_starts_again(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 5000", "status 416"])
    assert (await site.downloads.artifact(ARTIFACT)).read_bytes() == CONTENT
    assert site.coordinator.ranges == [None, "bytes=5000-", None]


async def test_wrong_bytes_are_refused_and_not_kept(site: Site) -> None:
    site.coordinator.misdeeds.append("wrong-bytes")
    with pytest.raises(UntrustedModelError, match="download has digest"):
        await site.downloads.artifact(ARTIFACT)
    assert not site.part.exists()


async def test_a_damaged_old_part_costs_one_more_download(site: Site) -> None:
    site.part.parent.mkdir(parents=True)
    site.part.write_bytes(b"damaged")
    assert (await site.downloads.artifact(ARTIFACT)).read_bytes() == CONTENT
    assert site.coordinator.ranges == ["bytes=7-", None]


async def test_an_old_part_that_is_too_long_is_thrown_away(site: Site) -> None:
    site.part.parent.mkdir(parents=True)
    site.part.write_bytes(CONTENT + b"x")
    assert (await site.downloads.artifact(ARTIFACT)).read_bytes() == CONTENT


async def test_endless_data_is_refused_at_the_size_that_was_signed(site: Site) -> None:
    site.coordinator.misdeeds.append("endless")
    with pytest.raises(UntrustedModelError, match="more than the size that the manifest names"):
        await site.downloads.artifact(ARTIFACT)
    assert not site.part.exists()


async def test_an_endless_manifest_is_refused(site: Site) -> None:
    site.coordinator.misdeeds.append("endless")
    with pytest.raises(UntrustedModelError, match=f"manifest of over {MAX_MANIFEST_BYTES} bytes"):
        await site.downloads.manifest(VERSION)


@pytest.mark.parametrize("misdeed", ["cut 0", "hang 0", "status 500", "short 0"])
async def test_a_network_that_stays_broken_is_given_up_with_a_sentence(
    site: Site, misdeed: str
) -> None:
    site.coordinator.misdeeds.extend([misdeed] * 3)
    with pytest.raises(UnavailableError, match="check that the coordinator runs"):
        await site.downloads.artifact(ARTIFACT)
    assert len(site.coordinator.ranges) == 3


async def test_no_coordinator_at_all_is_given_up_with_a_sentence(tmp_path: Path) -> None:
    async with httpx.AsyncClient(base_url="http://127.0.0.1:9") as client:
        downloads = Downloader(
            tmp_path,
            client,
            device="device-1",
            key=KEY,
            rng=random.Random(0),  # noqa: S311 - jitter
            patience=IMPATIENT,
        )
        with pytest.raises(UnavailableError, match=r"cannot download the manifest of 5555.*:9"):
            await downloads.manifest(VERSION)


async def test_a_download_that_only_drips_ends_at_its_deadline(site: Site) -> None:
    site.coordinator.misdeeds.extend(["cut 1"] * 100_000)
    slow = Patience(deadline_s=0.3, first_delay_s=0.01, longest_delay_s=0.01)
    site.downloads._patience = slow
    with pytest.raises(UnavailableError, match=r"not finished within 0\.3 seconds"):
        await site.downloads.artifact(ARTIFACT)
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
        await site.downloads.manifest(VERSION)
    assert len(site.coordinator.ranges) == 1


async def test_too_little_disk_space_is_known_before_the_first_byte(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    usage = Usage(RESERVE_BYTES + len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UnavailableError, match="free some space"):
        await site.downloads.artifact(ARTIFACT)
    assert site.coordinator.ranges == []


async def test_a_disk_that_fills_up_on_the_way_frees_what_was_written(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UnavailableError, match="no space left on the disk"):
        await site.downloads.artifact(ARTIFACT)
    assert not site.part.exists()


async def test_a_cancelled_download_keeps_its_part(site: Site) -> None:
    site.coordinator.misdeeds.append("hang 4000")
    task: asyncio.Task[Any] = asyncio.create_task(site.downloads.artifact(ARTIFACT))
    async with asyncio.timeout(10):
        while not (site.part.exists() and site.part.stat().st_size):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.005)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await site.downloads.artifact(ARTIFACT)).read_bytes() == CONTENT
    assert site.coordinator.ranges == [None, "bytes=4000-"]
