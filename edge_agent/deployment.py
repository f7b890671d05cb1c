"""From a desired version to a served one: fetch, check, stage, try, activate, switch.

The running model is touched by the last step alone, so whatever fails before it changes nothing
that clients see: a manifest that nobody trusted signed, a download that breaks, a model that
crashes the self-test. Each step can be repeated: a restarted agent finds the part of a download and
the staged slot where they were. The lifecycle is the table below; nothing else moves the state.
"""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from edge_agent.choice import Choices, fastest, worth_trying
from edge_agent.inference.messages import SelfTestResult
from edge_agent.inference.supervisor import InferenceServer
from edge_agent.inference.trial import Verdict, run_self_test
from edge_agent.slot_files import MANIFEST, MODEL
from edge_agent.slots import Slots, verified_manifest
from edge_agent.trusted_models import TrustedModels
from shared.errors import (
    IllegalTransitionError,
    ShoalError,
    StaleMetadataError,
    UnavailableError,
    UnfitModelError,
    UntrustedModelError,
)
from shared.files import explained_disk_errors, sha256_of, write_atomic
from shared.manifest import Artifact, Manifest
from shared.messages import DeploymentState, Failure
from shared.signed_manifest import SignedManifest, open_manifest
from shared.signing import VerifyingKey

logger = logging.getLogger(__name__)

T = TypeVar("T")
Report = Callable[[DeploymentState, str, Failure], Awaitable[None]]
SelfTest = Callable[[Sequence[Path]], Awaitable[list[Verdict]]]


class DeploymentEvent(StrEnum):
    """What may happen on the way to a version."""

    WANTED = "wanted"  # another version than the served one is desired
    FETCHED = "fetched"  # manifest checked, file complete, both in the spare slot
    PASSED = "passed"  # the self-test's verdict
    FOUND = "found"  # at start: a slot holds the version that was served
    ACTIVATED = "activated"  # clients get the new version, and a restart will too
    SERVED_ALREADY = "served_already"  # what is desired is what is served
    FAILED = "failed"  # with a cause; the version before is still served
    ABANDONED = "abandoned"  # another version is desired now, or the agent stops


S, E = DeploymentState, DeploymentEvent  # short names keep the table readable
TRANSITIONS: Mapping[DeploymentState, Mapping[DeploymentEvent, DeploymentState]] = {
    S.IDLE: {
        E.WANTED: S.DOWNLOADING,
        E.FOUND: S.ACTIVATING,
        E.SERVED_ALREADY: S.SERVING,
    },
    S.DOWNLOADING: {E.FETCHED: S.TESTING, E.FAILED: S.FAILED, E.ABANDONED: S.IDLE},
    S.TESTING: {E.PASSED: S.ACTIVATING, E.FAILED: S.FAILED, E.ABANDONED: S.IDLE},
    S.ACTIVATING: {E.ACTIVATED: S.SERVING, E.FAILED: S.FAILED, E.ABANDONED: S.IDLE},
    S.SERVING: {E.WANTED: S.DOWNLOADING, E.SERVED_ALREADY: S.SERVING},
    S.FAILED: {E.WANTED: S.DOWNLOADING, E.SERVED_ALREADY: S.SERVING},
}


def next_state(state: DeploymentState, event: DeploymentEvent) -> DeploymentState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen while {state}")
    return TRANSITIONS[state][event]


class Deployment:
    """Brings this device to a model version, and back to it after a restart."""

    def __init__(
        self,
        home: Path,
        trusted: Mapping[str, VerifyingKey],
        server: InferenceServer,
        fetch: TrustedModels,
        report: Report,
        *,
        choices: Choices,
        self_test: SelfTest = run_self_test,
    ) -> None:
        """Put the parts together.

        Args:
            home: the agent's state folder.
            trusted: keys that may sign manifests, by key id.
            server: running, or about to.
            fetch: the way to what the coordinator released.
            report: told each new state, with the cause and kind of a failure (else empty); it
                reads what is served from ``server``.
            choices: that this device made among a version's files.
            self_test: tries staged files where they can do no harm.
        """
        self.slots = Slots(home)
        self.state = DeploymentState.IDLE
        self.self_test_ms: Mapping[str, float] = {}  # by version: this one's and the one's before
        self._trusted, self._server, self._fetch = trusted, server, fetch
        self._report, self._choices, self._self_test = report, choices, self_test
        self._trying = home / "models" / "trying"  # a folder for each file of a version
        self._busy = asyncio.Lock()

    def current(self) -> SignedManifest | None:
        """Return the version that this device serves, or will again after a restart.

        Raises:
            UntrustedModelError: the slot was damaged.
        """
        slot = self.slots.current
        return None if slot is None else verified_manifest(slot, self._trusted)

    async def restore(self) -> None:
        """Serve what was served before the agent stopped; if that fails, what was before it.

        Never raises for a bad model: it reports, and the desired state will bring another.
        """
        async with self._attempt():
            candidates = [s for s in (self.slots.current, self.slots.previous) if s is not None]
            if not candidates:
                return
            await self._move(E.FOUND)
            failures: list[ShoalError] = []
            for slot in candidates:
                try:
                    verified_manifest(slot, self._trusted)
                    await self._activate(slot)
                except ShoalError as error:
                    logger.warning("slot %s cannot be served: %s", slot.name, error)
                    failures.append(error)
                else:
                    await self._move(E.ACTIVATED)
                    return
            await self._move(E.FAILED, "; ".join(map(str, failures)), failure_of(failures[-1]))

    async def converge(self, model_version: str) -> None:
        """Serve ``model_version``; returns when it is served and will be after a restart.

        May be called again at any time, and cancelled. On failure what was served is still served.

        Raises:
            UntrustedModelError: it is not released, or signature, digest or size is wrong.
            UnfitModelError: the model does not work on this device.
            UnavailableError: network, disk or inference server; trying later may help.
            NotFoundError: the coordinator does not have the version.
        """
        async with self._attempt():
            if self._serves(model_version):
                await self._move(E.SERVED_ALREADY)
                return
            await self._move(E.WANTED)
            try:
                await self._deploy(model_version)
            except ShoalError as error:
                await self._move(E.FAILED, str(error), failure_of(error))
                raise

    @contextlib.asynccontextmanager
    async def _attempt(self) -> AsyncIterator[None]:
        """One at a time; a cancelled one leaves the state ready for the next."""
        async with self._busy:
            try:
                yield
            except asyncio.CancelledError:
                if E.ABANDONED in TRANSITIONS[self.state]:
                    self.state = next_state(self.state, E.ABANDONED)
                raise

    async def _deploy(self, version: str) -> None:
        slot = await asyncio.to_thread(self.slots.find, version, self._trusted)
        slot = slot or await self._download(version)
        await self._move(E.FETCHED)
        await self._try(slot)
        await self._move(E.PASSED)
        await self._activate(slot)
        await self._move(E.ACTIVATED)
        logger.info("serving %s from slot %s", version, slot.name)

    async def _download(self, version: str) -> Path:
        sealed = await self._fetch.manifest(version)
        signed = open_manifest(sealed, trusted=self._trusted, version=version)
        with explained_disk_errors(self._trying):
            await asyncio.to_thread(self._clear_trying, signed.manifest)
            model = await self._choose(signed, sealed)
            slot = await _finish(asyncio.to_thread(self.slots.stage, sealed, model))
            await asyncio.to_thread(shutil.rmtree, self._trying, ignore_errors=True)
        return slot

    async def _choose(self, signed: SignedManifest, sealed: bytes) -> Path:
        """Return the file of a version that suits this device best, downloaded."""
        if (known := self._choices.of(signed.version, signed.manifest)) is not None:
            return await self._fetch.artifact(known)
        refused: list[str] = []
        groups = worth_trying(signed.manifest, self._choices.profile)
        for number, group in enumerate(groups, start=1):
            places = [await self._place(artifact, sealed) for artifact in group]
            if number == len(groups) and len(group) == 1:
                return places[0] / MODEL  # nothing to choose; the slot's own test follows
            verdicts = await self._self_test(places)
            named = {a.sha256: v for a, v in zip(group, verdicts, strict=True)}
            passed = {name: v for name, v in named.items() if isinstance(v, SelfTestResult)}
            causes = [f"{a.variant}: {named[a.sha256]}" for a in group if a.sha256 not in passed]
            for cause in causes:
                logger.warning("a file of version %s is not served: %s", signed.version[:12], cause)
            refused += causes
            if passed:
                best = fastest(passed, group)
                self._choices.remember(signed.version, best)
                logger.info("%s is the fastest of %d files here", best.variant, len(group))
                return self._trying / best.sha256 / MODEL
        raise UnfitModelError("; ".join(refused))

    def _clear_trying(self, manifest: Manifest) -> None:
        """Remove what another version left when it was abandoned."""
        if self._trying.exists():
            for folder in self._trying.iterdir():
                if manifest.artifact(folder.name) is None:
                    shutil.rmtree(folder)

    async def _place(self, artifact: Artifact, sealed: bytes) -> Path:
        """Download a file to where it can be tried, unless it is there; return its folder."""
        place = self._trying / artifact.sha256
        if not await asyncio.to_thread(_is_whole, place / MODEL, artifact):
            model = await self._fetch.artifact(artifact)
            place.mkdir(parents=True, exist_ok=True)
            write_atomic(place / MANIFEST, sealed)
            model.replace(place / MODEL)
        return place

    async def _try(self, slot: Path) -> None:
        """Let a throwaway process judge the slot; a refused one is emptied."""
        if slot == self.slots.current:
            return
        [result] = await self._self_test([slot])
        if isinstance(result, UnfitModelError):
            await _finish(asyncio.to_thread(self._discard, slot))
            raise result
        self.self_test_ms = await self._time_beside_current(slot)
        logger.info(
            "self-test passed: loads in %.0f ms, %.3f ms a row, off by %.2g",
            result.load_ms,
            result.p50_ms,
            result.largest_difference,
        )

    def _discard(self, slot: Path) -> None:
        with contextlib.suppress(UntrustedModelError):
            self._choices.forget(verified_manifest(slot, self._trusted).version)
        self.slots.discard(slot)

    async def _time_beside_current(self, slot: Path) -> Mapping[str, float]:
        """Time what is served and what shall replace it in turns: minutes ago says little of now.

        Returns:
            Median times of one row in ms, by version; nothing where there is nothing to compare.
        """
        current = self.slots.current
        if current is None:
            return {}
        verdicts = await self._self_test([slot, current])
        return {v.version: v.p50_ms for v in verdicts if isinstance(v, SelfTestResult)}

    async def _activate(self, slot: Path) -> None:
        """Make server and pointer agree on ``slot``; ends within the server's own deadlines."""
        await _finish(self._activate_and_switch(slot))

    async def _activate_and_switch(self, slot: Path) -> None:
        await self._server.activate(slot)
        before = self.slots.current
        try:
            await asyncio.to_thread(self.slots.switch, slot)
        except UnavailableError:
            if before is not None:
                await self._server.activate(before)
            raise

    def _serves(self, version: str) -> bool:
        """Whether clients get ``version`` now, and would after a restart."""
        if self._server.serving.version != version:
            return False
        try:
            current = self.current()
        except UntrustedModelError:  # damaged since it was loaded: fetch it again
            return False
        return current is not None and current.version == version

    async def _move(self, event: DeploymentEvent, cause: str = "", failure: Failure = "") -> None:
        """Enter the next state and tell; the one place that changes it."""
        self.state = next_state(self.state, event)
        await self._report(self.state, cause[:500], failure)


def failure_of(error: ShoalError) -> Failure:
    """Return what kind of failure ``error`` is, for whoever decides about the version."""
    match error:
        case UnfitModelError():
            return "unfit"
        case UntrustedModelError():
            return "untrusted"
        case StaleMetadataError():
            return "stale"
        case UnavailableError():
            return "unavailable"
    return "missing"


def _is_whole(path: Path, artifact: Artifact) -> bool:
    try:
        return sha256_of(path) == artifact.sha256
    except OSError:
        return False


async def _finish(step: Coroutine[Any, Any, T]) -> T:
    """Take a step that must not be left half done, even if this task is cancelled meanwhile."""
    task = asyncio.create_task(step, name="deployment-step")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled() and (error := task.exception()):
            logger.info("what was abandoned had failed: %s", error)
        raise
