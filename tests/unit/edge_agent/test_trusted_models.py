"""What a device believes of a repository that misbehaves, row by row of the attacks TUF names."""

import asyncio
import errno
import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tuf.api.metadata import Metadata

from cloud_coordinator.trust.metadata import (
    ROLES,
    ListedFile,
    root_of,
    sign,
    snapshot_of,
)
from edge_agent.fetcher import CoordinatorFetcher, Patience
from edge_agent.trusted_models import RESERVE_BYTES, TrustedModels
from shared.errors import (
    ConfigError,
    NotFoundError,
    StaleMetadataError,
    UnavailableError,
    UntrustedModelError,
)
from shared.manifest import Artifact
from shared.release_names import MAX_ROLE_BYTES, artifact_target, manifest_target
from shared.signing import SigningKey
from tests.repository_simulator import LONG, RepositorySimulator

CONTENT = bytes(range(256)) * 512
ARTIFACT = Artifact(
    variant="fp32", sha256=hashlib.sha256(CONTENT).hexdigest(), size_bytes=len(CONTENT)
)
OLD, NEW = "1" * 64, "2" * 64
IMPATIENT = Patience(attempts=2, deadline_s=10, idle_s=5, first_delay_s=0.001)
EXPIRED = timedelta(days=-1)


class Device:
    """One device over its home; `restart` forgets all that is not on the disk."""

    def __init__(self, home: Path, repository: RepositorySimulator) -> None:
        self.home, self.repository = home, repository
        self.root = repository.root
        self.restart()

    def restart(self) -> None:
        rng = random.Random(0)  # noqa: S311 - jitter
        new_fetcher = partial(
            CoordinatorFetcher,
            self.repository.url,
            device="device-1",
            key=SigningKey.generate(),
            rng=rng,
            patience=IMPATIENT,
        )
        self.models = TrustedModels(self.home, self.repository.url, self.root, new_fetcher)

    @property
    def part(self) -> Path:
        return self.home / "models" / "downloads" / f"{ARTIFACT.sha256}.part"

    async def refuses(self, kind: type[Exception], complaint: str | None = None) -> None:
        """Check that the new version is refused, and that nothing is left of it."""
        with pytest.raises(kind, match=complaint) as caught:
            await self.models.manifest(NEW)
        assert type(caught.value) is kind
        assert not self.part.exists()


@pytest.fixture
def repository() -> Iterator[RepositorySimulator]:
    simulator = RepositorySimulator()
    simulator.publish(OLD, b"old", ARTIFACT, CONTENT)
    with simulator.serving():
        yield simulator


@pytest.fixture
async def device(tmp_path: Path, repository: RepositorySimulator) -> Device:
    """Return a device that has seen the repository once."""
    known = Device(tmp_path / "home", repository)
    assert await known.models.manifest(OLD) == b"old"
    return known


def release(repository: RepositorySimulator) -> None:
    repository.publish(NEW, b"new", ARTIFACT, CONTENT)


async def recovers(device: Device) -> None:
    """Check that the device takes the next version that is properly released."""
    repository = device.repository
    for role in ROLES:
        repository.lifetimes[role] = LONG
    repository.versions["timestamp"] += 10
    repository.sign_targets()
    repository.sign_list("candidates")
    release(repository)
    assert await device.models.manifest(NEW) == b"new"


async def test_a_released_version_is_fetched_and_its_file_too(device: Device) -> None:
    release(device.repository)
    assert await device.models.manifest(NEW) == b"new"
    path = await device.models.artifact(ARTIFACT)
    assert path == device.part
    assert path.read_bytes() == CONTENT


# --- metadata that are refused --------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "released", "root"])
async def test_expired_metadata_are_stale_and_nothing_else(device: Device, role: str) -> None:
    repository = device.repository
    repository.lifetimes[role] = EXPIRED
    repository.rotate_root() if role == "root" else repository.sign_targets()
    release(repository)
    await device.refuses(StaleMetadataError, "set the clock if it is wrong")
    if role == "root":
        repository.lifetimes["root"] = LONG
        repository.rotate_root()
    await recovers(device)


async def test_expired_candidates_concern_nobody_who_wants_what_is_released(
    device: Device,
) -> None:
    device.repository.lifetimes["candidates"] = EXPIRED
    device.repository.sign_list("candidates")
    release(device.repository)
    assert await device.models.manifest(NEW) == b"new"


async def test_an_old_timestamp_is_a_rollback(device: Device) -> None:
    old = device.repository.metadata["timestamp.json"]
    release(device.repository)
    await device.models.manifest(NEW)
    device.restart()
    device.repository.metadata["timestamp.json"] = old
    await device.refuses(UntrustedModelError, "metadata are bad")


@pytest.mark.parametrize("role", ["snapshot", "released"])
async def test_an_older_number_of_a_role_is_a_rollback(device: Device, role: str) -> None:
    repository = device.repository
    release(repository)
    await device.models.manifest(NEW)
    if role == "released":
        repository.versions["released"] = 0
        repository.sign_list("released")
        repository.seal()
    else:
        repository.versions["snapshot"] = 0
        repository.seal()
    await device.refuses(UntrustedModelError, "metadata are bad")


def _another_key(repository: RepositorySimulator) -> None:
    repository.keys["timestamp"] = SigningKey.generate()
    repository.sign_timestamp()


def _wrong_role(repository: RepositorySimulator) -> None:
    """The key of candidates signs what is released."""
    repository.keys["released"] = repository.keys["candidates"]
    release(repository)


def _altered(repository: RepositorySimulator) -> None:
    old = repository.metadata["timestamp.json"]
    number = b'"version":%d' % repository.versions["timestamp"]
    repository.metadata["timestamp.json"] = old.replace(number, b'"version":99')


def _usurper(repository: RepositorySimulator) -> None:
    """Root 2 is signed by another root key alone."""
    repository.keys["root"] = SigningKey.generate()
    repository.rotate_root()


def _mixed(repository: RepositorySimulator) -> None:
    """A snapshot that was in force once, under the name of the one that is."""
    before = repository.metadata[f"{repository.versions['snapshot']}.snapshot.json"]
    release(repository)
    repository.metadata[f"{repository.versions['snapshot']}.snapshot.json"] = before


def _forgetful(repository: RepositorySimulator) -> None:
    """The snapshot names no released list any more."""
    named = {role: repository._newest(role) for role in ("targets", "candidates")}
    repository._issue("snapshot", lambda n, end: snapshot_of(named, version=n, expires=end))
    repository.sign_timestamp()


def _no_json(repository: RepositorySimulator) -> None:
    repository.metadata["timestamp.json"] = b"<html>"


def _other_fields(repository: RepositorySimulator) -> None:
    old = repository.metadata["timestamp.json"]
    repository.metadata["timestamp.json"] = old.replace(b'"signed"', b'"signet"')


def _endless(repository: RepositorySimulator) -> None:
    repository.metadata["timestamp.json"] = bytes(MAX_ROLE_BYTES + 1)


@pytest.mark.parametrize(
    "misdeed",
    [
        _another_key,
        _wrong_role,
        _altered,
        _usurper,
        _mixed,
        _forgetful,
        _no_json,
        _other_fields,
        _endless,
    ],
    ids=lambda misdeed: misdeed.__name__.strip("_"),
)
async def test_bad_metadata_are_refused_and_good_ones_taken_again(
    device: Device, misdeed: Callable[[RepositorySimulator], None]
) -> None:
    repository = device.repository
    keys, metadata = dict(repository.keys), dict(repository.metadata)
    versions = dict(repository.versions)
    misdeed(repository)
    await device.refuses(UntrustedModelError, "metadata are bad|not what is listed")
    repository.keys, repository.metadata = keys, metadata
    repository.versions = {role: versions[role] + 5 for role in versions} | {"root": 1}
    await recovers(device)


async def test_the_same_number_with_other_content_changes_nothing(device: Device) -> None:
    repository = device.repository
    repository.versions["timestamp"] -= 1
    repository.versions["snapshot"] += 5
    repository.sign_list("released")
    repository.seal()
    assert await device.models.manifest(OLD) == b"old"


async def test_a_root_that_too_few_signed_is_not_followed(device: Device) -> None:
    """Root 2 asks for two signatures; root 3 has one of them."""
    repository = device.repository
    second = SigningKey.generate()
    named = {role: repository.keys[role].public for role in ROLES[:4]}

    def two_of_two(version: int, *signers: SigningKey) -> bytes:
        expires = Metadata[Any].from_bytes(repository.root).signed.expires
        root = root_of(named, version=version, expires=expires)  # type: ignore[arg-type]
        another = root_of({"root": second.public}, version=version, expires=expires)
        root.signed.add_key(another.signed.keys[second.public.key_id], "root")
        root.signed.roles["root"].threshold = 2
        content = root.to_bytes()
        for key in signers:
            content = sign(Metadata.from_bytes(content), key)
        return content

    repository.metadata["2.root.json"] = two_of_two(2, repository.keys["root"], second)
    assert await device.models.manifest(OLD) == b"old"
    repository.metadata["3.root.json"] = two_of_two(3, repository.keys["root"])
    await device.refuses(UntrustedModelError, "metadata are bad")
    repository.metadata["3.root.json"] = two_of_two(3, repository.keys["root"], second)
    assert await device.models.manifest(OLD) == b"old"


async def test_a_key_of_every_role_can_be_replaced(device: Device) -> None:
    repository = device.repository
    old_root = repository.keys["root"]
    for role in ROLES:
        repository.keys[role] = SigningKey.generate()
    repository.rotate_root(also=old_root)
    await recovers(device)


async def test_a_thief_who_counted_far_ahead_is_overtaken_by_a_new_key(device: Device) -> None:
    repository, before = device.repository, device.repository.versions["timestamp"]
    repository.versions["timestamp"] = 2**31
    repository.sign_timestamp()
    await device.models.manifest(OLD)
    repository.versions["timestamp"] = before
    repository.sign_timestamp()
    await device.refuses(UntrustedModelError, "metadata are bad")
    repository.keys["timestamp"] = SigningKey.generate()
    repository.rotate_root()
    await recovers(device)


# --- what is not released -------------------------------------------------------------------------


async def test_a_candidate_is_not_fetched(device: Device) -> None:
    device.repository.publish(NEW, b"new", ARTIFACT, CONTENT, "candidates")
    await device.refuses(UntrustedModelError, "version 2222.* is not released")


async def test_the_key_of_candidates_cannot_list_what_is_released(device: Device) -> None:
    file = ListedFile(manifest_target("released", NEW), 3, hashlib.sha256(b"new").hexdigest())
    device.repository.manifests[NEW] = b"new"
    device.repository.list("candidates", file)
    await device.refuses(UntrustedModelError, "is not released")


async def test_a_manifest_that_is_not_the_listed_one_is_refused(device: Device) -> None:
    release(device.repository)
    device.repository.manifests[NEW] = b"NEW"
    await device.refuses(UntrustedModelError, "is not what is listed")
    device.repository.manifests[NEW] = b"new and more"
    await device.refuses(UntrustedModelError, "more than the 3 bytes")


async def test_a_list_and_a_manifest_that_disagree_are_refused(device: Device) -> None:
    other = ListedFile(artifact_target("released", ARTIFACT.sha256), 5, "0" * 64)
    device.repository.list("released", other)
    with pytest.raises(UntrustedModelError, match="another size or digest"):
        await device.models.artifact(ARTIFACT)


async def test_a_file_of_other_bytes_is_refused_and_not_kept(device: Device) -> None:
    device.repository.files[ARTIFACT.sha256] = CONTENT[::-1]
    with pytest.raises(UntrustedModelError, match="is not what is listed"):
        await device.models.artifact(ARTIFACT)
    assert not device.part.exists()


# --- network, disk and time -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "status", "kind"),
    [
        ("timestamp.json", 404, NotFoundError),
        ("timestamp.json", 401, UnavailableError),
        ("2.root.json", 403, UnavailableError),
        ("timestamp.json", 503, UnavailableError),
        (NEW, 404, NotFoundError),
    ],
)
async def test_a_refusal_of_the_coordinator_is_no_distrust(
    device: Device, name: str, status: int, kind: type[Exception]
) -> None:
    release(device.repository)
    device.repository.status[name] = status
    await device.refuses(kind)
    device.repository.status.clear()
    assert await device.models.manifest(NEW) == b"new"


async def test_a_device_that_pinned_no_root_is_told_to_enrol_again(device: Device) -> None:
    device.root = b""
    device.restart()
    await device.refuses(ConfigError, "enrol it again")


async def test_a_power_cut_at_any_sync_of_a_refresh_is_survived(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, left = os.fsync, [0]

    def fail_later(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_later)
    for steps in range(100):
        release(device.repository)
        left[0] = steps
        try:
            assert await device.models.manifest(NEW) == b"new"
            break
        except UnavailableError as error:
            assert "free some" in str(error)  # noqa: PT017  # the last attempt succeeds
        (device.home / "tuf" / "tmpabc").write_bytes(b"half a file")
        device.restart()
    assert steps > 5
    assert not list((device.home / "tuf").glob("tmp*"))


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "released.json", "root.json"])
async def test_metadata_that_a_bad_disk_emptied_are_fetched_again(
    device: Device, name: str
) -> None:
    (device.home / "tuf" / name).write_bytes(b"")
    release(device.repository)
    assert await device.models.manifest(NEW) == b"new"


async def test_metadata_are_their_owners_alone(device: Device) -> None:
    folder = device.home / "tuf"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.glob("*.json")} == {0o600}


async def test_a_damaged_old_part_costs_one_more_download(device: Device) -> None:
    device.part.parent.mkdir(parents=True)
    device.part.write_bytes(b"damaged")
    (device.part.parent / "other.part").write_bytes(b"of another version")
    assert (await device.models.artifact(ARTIFACT)).read_bytes() == CONTENT
    assert device.repository.asked.count("artifact") == 2
    assert list(device.part.parent.iterdir()) == [device.part]


async def test_too_little_disk_space_is_known_before_the_first_byte(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    usage = Usage(RESERVE_BYTES + len(CONTENT) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(UnavailableError, match="free some space"):
        await device.models.artifact(ARTIFACT)
    assert "artifact" not in device.repository.asked


@pytest.mark.parametrize("where", ["timestamp.json", ARTIFACT.sha256])
async def test_a_cancelled_errand_is_over_before_the_next_begins(
    device: Device, where: str
) -> None:
    device.repository.hang = where
    task: asyncio.Task[Any] = asyncio.create_task(device.models.artifact(ARTIFACT))
    assert await asyncio.to_thread(device.repository.hangs.wait, 10)
    task.cancel()
    async with asyncio.timeout(3):  # of an idle limit of 5 seconds
        with pytest.raises(asyncio.CancelledError):
            await task
    device.repository.hang = ""
    assert (await device.models.artifact(ARTIFACT)).read_bytes() == CONTENT
