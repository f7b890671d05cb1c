"""The loop that brings the device to its desired state, with a deployment that can misbehave."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from edge_agent.reconcile import Reconciler, Wanted
from edge_agent.state import AgentState
from shared.errors import ShoalError, UnavailableError, UnfitModelError, UntrustedModelError
from shared.messages import Desired

FIRST, SECOND = "1" * 64, "2" * 64
TIME_LIMIT_S = 10.0


class ImpatientRandom(random.Random):
    """Draws the shortest delay."""

    def uniform(self, a: float, b: float) -> float:
        del b
        return a


class Deployment:
    """Fails as told, and may take for ever."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.served: list[str] = []
        self.failures: list[ShoalError] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._changed = asyncio.Condition()

    async def converge(self, model_version: str) -> None:
        async with self._changed:
            self.tried.append(model_version)
            self._changed.notify_all()
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop(0)
        async with self._changed:
            self.served.append(model_version)
            self._changed.notify_all()

    async def until(self, condition: Callable[["Deployment"], bool]) -> None:
        async with asyncio.timeout(TIME_LIMIT_S), self._changed:
            await self._changed.wait_for(lambda: condition(self))


@pytest.fixture
def state(tmp_path: Path) -> Iterator[AgentState]:
    with AgentState(tmp_path / "state.db") as opened:
        yield opened


@contextlib.asynccontextmanager
async def running(state: AgentState, deployment: Deployment) -> AsyncIterator[Reconciler]:
    reconciler = Reconciler(state, converge=deployment.converge, rng=ImpatientRandom())
    task = asyncio.create_task(reconciler.run())
    try:
        yield reconciler
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_desired_model_is_served(state: AgentState) -> None:
    deployment = Deployment()
    async with running(state, deployment) as reconciler:
        assert reconciler.accept(Desired(version=1, model_version=FIRST))
        await deployment.until(lambda d: d.served == [FIRST])


async def test_a_model_that_was_lost_is_brought_back(state: AgentState) -> None:
    deployment = Deployment()
    async with running(state, deployment) as reconciler:
        reconciler.accept(Desired(version=1, model_version=FIRST))
        await deployment.until(lambda d: d.served == [FIRST])
        reconciler.check_again()
        await deployment.until(lambda d: d.served == [FIRST, FIRST])


@pytest.mark.parametrize("version", [1, 4, 5])
async def test_an_older_or_repeated_desired_state_changes_nothing(
    state: AgentState, version: int
) -> None:
    reconciler = Reconciler(state, converge=Deployment().converge, rng=ImpatientRandom())
    reconciler.accept(Desired(version=5, model_version=SECOND))
    assert not reconciler.accept(Desired(version=version, model_version=FIRST))
    assert reconciler.wanted == Wanted(5, SECOND)


async def test_after_a_restart_the_same_is_wanted_and_replays_are_refused(
    state: AgentState,
) -> None:
    before = Reconciler(state, converge=Deployment().converge, rng=ImpatientRandom())
    before.accept(Desired(version=5, model_version=SECOND))
    deployment = Deployment()
    async with running(state, deployment) as after:
        await deployment.until(lambda d: d.served == [SECOND])
        assert not after.accept(Desired(version=4, model_version=FIRST))


async def test_a_newer_desired_state_supersedes_the_work_on_the_old(state: AgentState) -> None:
    deployment = Deployment()
    deployment.gate.clear()
    async with running(state, deployment) as reconciler:
        reconciler.accept(Desired(version=1, model_version=FIRST))
        await deployment.until(lambda d: d.tried == [FIRST])
        reconciler.accept(Desired(version=2, model_version=SECOND))
        await deployment.until(lambda d: d.tried == [FIRST, SECOND])
        deployment.gate.set()
        await deployment.until(lambda d: d.served == [SECOND])


async def test_a_cause_that_can_pass_is_tried_again(state: AgentState) -> None:
    deployment = Deployment()
    deployment.failures = [UnavailableError("no network"), UnavailableError("no disk space")]
    async with running(state, deployment) as reconciler:
        reconciler.accept(Desired(version=1, model_version=FIRST))
        await deployment.until(lambda d: d.served == [FIRST])
    assert deployment.tried == [FIRST] * 3


@pytest.mark.parametrize("kind", [UntrustedModelError, UnfitModelError])
async def test_a_bad_model_is_not_tried_again_but_the_next_one_is(
    state: AgentState, kind: type[ShoalError], caplog: pytest.LogCaptureFixture
) -> None:
    deployment = Deployment()
    deployment.failures = [kind("it is broken")]
    async with running(state, deployment) as reconciler:
        reconciler.accept(Desired(version=1, model_version=FIRST))
        await deployment.until(lambda d: not d.failures)
        reconciler.accept(Desired(version=2, model_version=SECOND))
        await deployment.until(lambda d: d.served == [SECOND])
    assert deployment.tried == [FIRST, SECOND]
    assert "is not served: it is broken" in caplog.text


async def test_no_model_wanted_leaves_what_is_served_alone(state: AgentState) -> None:
    deployment = Deployment()
    async with running(state, deployment) as reconciler:
        reconciler.accept(Desired(version=1, model_version=FIRST))
        await deployment.until(lambda d: d.served == [FIRST])
        reconciler.accept(Desired(version=2))
        reconciler.accept(Desired(version=3, model_version=SECOND))
        await deployment.until(lambda d: d.served == [FIRST, SECOND])
