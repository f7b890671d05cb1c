"""A device's way to a model version, with real downloads, self-tests and a real server."""

import asyncio
import contextlib
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from edge_agent.choice import Choices, Profile
from edge_agent.deployment import Deployment
from edge_agent.fetcher import CoordinatorFetcher, Patience
from edge_agent.inference.messages import SelfTestResult
from edge_agent.inference.supervisor import InferenceServer
from edge_agent.inference.trial import Verdict
from edge_agent.slot_files import MODEL
from edge_agent.trusted_models import TrustedModels
from shared.errors import NotFoundError, UnavailableError, UnfitModelError, UntrustedModelError
from shared.manifest import Artifact, TensorSpec
from shared.messages import DeploymentState, Failure
from shared.release_names import Role
from shared.signed_manifest import sign_manifest
from shared.signing import SigningKey
from tests.integration.inference.conftest import RNG, running
from tests.integration.inference.tiny_models import (
    FEATURES,
    TRUSTED,
    Version,
    endless,
    linear,
    not_finite,
)
from tests.repository_simulator import RepositorySimulator

KEY = SigningKey.generate()


class Repository(RepositorySimulator):
    """Releases versions made for tests."""

    def release(self, version: Version, role: Role = "released") -> str:
        signed = version.signed
        return self.publish(version.digest, signed.sealed, version.artifact, version.content, role)


PROFILE = Profile(features=frozenset(), accelerator=False, runtime="1", largest_bytes=1_000_000)


class Device:
    """One agent's deployment parts over its home."""

    def __init__(
        self,
        home: Path,
        repository: Repository,
        server: InferenceServer,
        profile: Profile | None = None,
    ) -> None:
        self.server = server
        self.told: list[tuple[str, str]] = []
        new_fetcher = partial(
            CoordinatorFetcher,
            repository.url,
            device="device-1",
            key=KEY,
            rng=RNG,
            patience=Patience(attempts=2, first_delay_s=0.001),
        )
        fetch = TrustedModels(home, repository.url, repository.root, new_fetcher)
        choices = Choices(home, profile or PROFILE)
        self.deployment = Deployment(home, TRUSTED, server, fetch, self._report, choices=choices)

    async def _report(self, state: DeploymentState, cause: str, failure: Failure) -> None:
        self.failure = failure
        self.told.append((state.value, cause))

    @property
    def states(self) -> list[str]:
        return [state for state, _ in self.told]

    def serves(self, version: Version) -> bool:
        """Whether server, pointer and HTTP agree on ``version``."""
        current = self.deployment.current()
        return (
            self.server.serving.version == version.digest
            and current is not None
            and current.version == version.digest
        )


class Scene(NamedTuple):
    """A device, and the repository that it downloads from."""

    device: Device
    repository: Repository
    home: Path

    @property
    def deployment(self) -> Deployment:
        return self.device.deployment


@contextlib.asynccontextmanager
async def device_at(home: Path, repository: Repository) -> AsyncIterator[Device]:
    async with running(InferenceServer(home, "127.0.0.1", 0, rng=RNG)) as server:
        yield Device(home, repository, server)


@pytest.fixture
def repository() -> Iterator[Repository]:
    serving = Repository()
    with serving.serving():
        yield serving


@pytest.fixture
async def scene(tmp_path: Path, repository: Repository) -> AsyncIterator[Scene]:
    home = tmp_path / "home"
    async with device_at(home, repository) as device:
        yield Scene(device, repository, home)


ON_THE_WAY = ["downloading", "testing", "activating"]


async def test_a_version_is_fetched_tried_and_served(scene: Scene) -> None:
    version = linear(1)
    await scene.deployment.converge(scene.repository.release(version))
    assert scene.device.serves(version)
    assert scene.device.states == [*ON_THE_WAY, "serving"]
    assert scene.device.server.serving.artifact == version.artifact.sha256
    manifest = version.signed.manifest
    current = scene.deployment.current()
    assert current is not None
    assert current.manifest.lineage == manifest.lineage
    assert current.manifest.created_at == manifest.created_at

    await scene.deployment.converge(version.digest)  # again: nothing to do
    assert scene.repository.asked == ["manifest", "artifact"]
    assert scene.device.states == [*ON_THE_WAY, "serving", "serving"]


async def test_going_back_to_the_version_before_needs_no_network(scene: Scene) -> None:
    old, new = linear(1), linear(2)
    for version in (old, new):
        await scene.deployment.converge(scene.repository.release(version))
    scene.repository.asked.clear()
    await scene.deployment.converge(old.digest)
    assert scene.device.serves(old)
    assert scene.repository.asked == []
    downloads = scene.home / "models" / "downloads"
    assert list(downloads.iterdir()) == []


async def refused(scene: Scene, version: Version, kind: type[Exception], complaint: str) -> None:
    """Converge to a bad version, and check that it was refused with the good one served."""
    scene.device.told.clear()
    with pytest.raises(kind, match=complaint) as caught:
        await scene.deployment.converge(version.digest)
    assert scene.device.serves(linear(1))
    assert scene.device.told[-1] == ("failed", str(caught.value))


async def test_whatever_is_wrong_with_a_version_the_old_one_goes_on(scene: Scene) -> None:
    await scene.deployment.converge(scene.repository.release(linear(1)))
    new = linear(2)

    repository, sha256 = scene.repository, new.artifact.sha256

    await refused(scene, new, UntrustedModelError, "is not released")
    repository.release(new, "candidates")  # command-signed, sealed, listed, and still not released
    await refused(scene, new, UntrustedModelError, "is not released")

    stranger = sign_manifest(new.signed.manifest, SigningKey.generate())
    repository.publish(new.digest, stranger.sealed, new.artifact, new.content)
    await refused(scene, new, UntrustedModelError, "signed by no key that is trusted here")

    repository.publish(new.digest, linear(3).signed.sealed, new.artifact, new.content)
    await refused(scene, new, UntrustedModelError, "asked for version")

    repository.release(new)
    del repository.manifests[new.digest]
    await refused(scene, new, NotFoundError, "the coordinator has no")
    repository.manifests[new.digest] = new.signed.sealed[:-1] + b"?"
    await refused(scene, new, UntrustedModelError, "is not what is listed")

    repository.release(new)
    repository.files[sha256] = new.content[:-1] + b"?"
    await refused(scene, new, UntrustedModelError, "is not what is listed")
    repository.files[sha256] = new.content + b"?"
    await refused(scene, new, UntrustedModelError, "more than the size")
    repository.files[sha256] = new.content[:-1]
    await refused(scene, new, UnavailableError, "cannot download")

    wide = linear(4).changed(inputs=(TensorSpec("x", "FP32", (-1, FEATURES + 1)),))
    scene.repository.release(wide)
    await refused(scene, wide, UnfitModelError, "its manifest promises x")

    bad = not_finite()
    scene.repository.release(bad)
    await refused(scene, bad, UnfitModelError, "holds NaN")
    assert scene.deployment.state is DeploymentState.FAILED

    scene.device.told.clear()
    scene.repository.release(new)
    await scene.deployment.converge(new.digest)  # and a good one still comes through
    assert scene.device.serves(new)


async def test_a_model_that_passes_its_test_and_fails_in_the_server_is_refused(
    scene: Scene,
) -> None:
    await scene.deployment.converge(scene.repository.release(linear(1)))
    bad = not_finite()
    scene.repository.release(bad)

    async def lenient(slots: Sequence[Path]) -> list[Verdict]:
        passed = SelfTestResult(
            version=bad.digest,
            artifact=bad.artifact.sha256,
            provider="",
            load_ms=0,
            p50_ms=0,
            largest_difference=0,
            peak_memory_bytes=0,
        )
        return [passed for _ in slots]

    scene.deployment._self_test = lenient
    await refused(scene, bad, UnfitModelError, "holds NaN")
    assert scene.device.states == [*ON_THE_WAY, "failed"]


async def test_a_full_disk_is_reported_and_changes_nothing(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    await scene.deployment.converge(scene.repository.release(linear(1)))
    scene.repository.release(linear(2))
    fsync, left = os.fsync, [0]

    def fail_later(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    steps = 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_later)
        while scene.device.serves(linear(1)):
            left[0] = steps
            steps += 1
            with contextlib.suppress(UnavailableError):
                await scene.deployment.converge(linear(2).digest)
                break
            assert scene.device.told[-1][0] == "failed"
            assert "free some" in scene.device.told[-1][1]
    assert (
        steps > 8
    )  # metadata, the download, both files of the slot, the pointer: each failed once
    assert scene.device.serves(linear(2))


async def test_a_restarted_device_serves_what_it_served(
    tmp_path: Path, repository: Repository
) -> None:
    home = tmp_path / "home"
    async with device_at(home, repository) as device:
        await device.deployment.restore()
        assert device.told == []  # nothing was ever deployed
        for seed in (1, 2):
            await device.deployment.converge(repository.release(linear(seed)))
    async with device_at(home, repository) as device:
        await device.deployment.restore()
        assert device.serves(linear(2))
        assert device.states == ["activating", "serving"]
        slot = device.deployment.slots.current
    assert slot is not None
    (slot / MODEL).write_bytes(b"a bad sector")
    async with device_at(home, repository) as device:
        await device.deployment.restore()  # the one before is better than none
        assert device.serves(linear(1))
        await device.deployment.converge(linear(2).digest)
        assert device.serves(linear(2))


async def test_a_device_whose_slots_are_both_damaged_reports_it_and_recovers(
    tmp_path: Path, repository: Repository
) -> None:
    home = tmp_path / "home"
    async with device_at(home, repository) as device:
        for seed in (1, 2):
            await device.deployment.converge(repository.release(linear(seed)))
    for name in "ab":
        (home / "models" / name / MODEL).unlink()
    async with device_at(home, repository) as device:
        await device.deployment.restore()
        assert device.states == ["activating", "failed"]
        assert device.told[-1][1].count("cannot read") == 2
        await device.deployment.converge(linear(2).digest)
        assert device.serves(linear(2))


async def test_a_newer_wish_cancels_the_one_before(scene: Scene) -> None:
    await scene.deployment.converge(scene.repository.release(linear(1)))
    slow = endless()
    scene.repository.release(slow)
    testing = asyncio.Event()
    report = scene.deployment._report

    async def watch(state: DeploymentState, cause: str, failure: Failure) -> None:
        await report(state, cause, failure)
        if state is DeploymentState.TESTING:
            testing.set()

    scene.deployment._report = watch
    first: asyncio.Task[Any] = asyncio.create_task(scene.deployment.converge(slow.digest))
    await asyncio.wait_for(testing.wait(), 20)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert scene.device.serves(linear(1))
    await scene.deployment.converge(scene.repository.release(linear(2)))
    assert scene.device.serves(linear(2))


async def test_cancelling_an_activation_leaves_server_and_pointer_agreed(scene: Scene) -> None:
    await scene.deployment.converge(scene.repository.release(linear(1)))
    activate, entered = scene.device.server.activate, asyncio.Event()

    async def watched(slot: Path) -> None:
        entered.set()
        await activate(slot)

    scene.device.server.activate = watched  # type: ignore[method-assign]
    task: asyncio.Task[Any] = asyncio.create_task(
        scene.deployment.converge(scene.repository.release(linear(2)))
    )
    await asyncio.wait_for(entered.wait(), 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert scene.device.serves(linear(2))


async def test_a_staged_version_is_not_fetched_again_after_a_crash(
    tmp_path: Path, repository: Repository
) -> None:
    home = tmp_path / "home"
    async with device_at(home, repository) as device:
        await device.deployment.converge(repository.release(linear(1)))
        (home / "download").write_bytes(linear(2).content)
        device.deployment.slots.stage(linear(2).signed.sealed, home / "download")
    repository.asked.clear()
    async with device_at(home, repository) as device:
        await device.deployment.restore()
        assert device.serves(linear(1))
        await device.deployment.converge(linear(2).digest)
        assert device.serves(linear(2))
        assert repository.asked == []


# --- a version of several files -------------------------------------------------------------------


class Files:
    """A version of several files, as a repository offers them."""

    def __init__(
        self, repository: Repository, needs: Mapping[str, tuple[str, ...]] | None = None,
        **contents: bytes,
    ) -> None:  # fmt: skip
        self.artifacts = {
            name: Artifact(
                variant=name,
                sha256=hashlib.sha256(content).hexdigest(),
                size_bytes=len(content),
                needs=(needs or {}).get(name, ()),
            )
            for name, content in contents.items()
        }
        artifacts = tuple(self.artifacts.values())
        self.version = linear(1).changed(artifacts=artifacts, ship=artifacts[0].variant)
        for artifact, content in zip(artifacts, contents.values(), strict=True):
            signed = self.version.signed
            repository.publish(self.version.digest, signed.sealed, artifact, content)


def padded(extra: int) -> bytes:
    """The same function in a larger file that takes longer."""
    return linear(1, padding=extra).content


async def test_the_fastest_file_that_is_right_here_is_served_and_remembered(scene: Scene) -> None:
    wrong = linear(2).content
    files = Files(scene.repository, slow=padded(400_000), quick=linear(1).content, wrong=wrong)
    scene.device.deployment._choices.profile = msgspec.structs.replace(
        PROFILE, largest_bytes=10_000_000
    )
    await scene.deployment.converge(files.version.digest)
    quick = files.artifacts["quick"]
    serving = scene.device.server.serving
    assert (serving.version, serving.artifact) == (files.version.digest, quick.sha256)
    assert serving.variant == "quick"
    assert scene.repository.asked == ["manifest", *["artifact"] * 3]
    assert not (scene.home / "models" / "trying").exists()
    current = scene.deployment.current()
    assert current is not None
    assert scene.deployment._choices.of(current.version, current.manifest) == quick


async def test_what_does_not_fit_this_device_is_not_even_fetched(scene: Scene) -> None:
    contents = {"ship": linear(1).content, "big": padded(400_000), "vnni": padded(1)}
    files = Files(scene.repository, {"vnni": ("vnni",)}, **contents)
    await scene.deployment.converge(files.version.digest)
    assert scene.device.server.serving.variant == "ship"
    assert scene.repository.asked == ["manifest", "artifact"]


async def test_a_larger_file_is_fetched_where_the_others_are_wrong_here(scene: Scene) -> None:
    files = Files(scene.repository, ship=linear(2).content, fp32=padded(1000))
    await scene.deployment.converge(files.version.digest)
    assert scene.device.server.serving.variant == "fp32"


async def test_a_version_too_large_for_the_slot_is_refused_and_the_old_one_serves(
    scene: Scene,
) -> None:
    await scene.deployment.converge(scene.repository.release(linear(1)))
    files = Files(scene.repository, ship=padded(400_000))
    await refused(
        scene, files.version, UnfitModelError, "takes 1,6.* bytes and a slot holds 1,000,000; raise"
    )
    assert scene.device.failure == "unfit"


async def test_if_every_file_is_wrong_each_is_named_with_its_reason(scene: Scene) -> None:
    await scene.deployment.converge(scene.repository.release(linear(1)))
    files = Files(scene.repository, one=linear(2).content, two=linear(3).content)
    await refused(scene, files.version, UnfitModelError, "one: the golden .*; two: the golden ")
