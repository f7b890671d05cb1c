"""Children that die are started again; whoever relies on one hears of its end."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from cloud_coordinator.supervisor import LONGEST_BACK_OFF_S, Supervisor, back_off_s
from shared.errors import UnavailableError

TIME_LIMIT_S = 10.0


class FakeChild:
    """A process that ends when the test says so."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.stopped = False
        self._end: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def die(self, status: int) -> None:
        self._end.set_result(status)

    async def wait(self) -> int:
        return await asyncio.shield(self._end)

    async def stop(self) -> None:
        self.stopped = True


class Impatient(random.Random):
    def uniform(self, a: float, b: float) -> float:
        del a, b
        return 0.0


class Nursery:
    """Starts fake children, or fails to."""

    def __init__(self) -> None:
        self.children: list[FakeChild] = []
        self.refusals = 0

    async def start(self) -> FakeChild:
        if self.refusals:
            self.refusals -= 1
            raise UnavailableError("port 1 is in use")
        child = FakeChild(pid=len(self.children) + 1)
        self.children.append(child)
        return child

    def supervisor(self) -> Supervisor[FakeChild]:
        return Supervisor(
            "child", self.start, clock=lambda: datetime(2026, 1, 1, tzinfo=UTC), rng=Impatient()
        )


@contextlib.asynccontextmanager
async def kept_alive(supervisor: Supervisor[FakeChild]) -> AsyncIterator[None]:
    await supervisor.start()
    task = asyncio.create_task(supervisor.run())
    try:
        async with asyncio.timeout(TIME_LIMIT_S):
            yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        await supervisor.stop()


async def test_a_child_that_dies_is_started_again_as_a_new_life() -> None:
    nursery = Nursery()
    supervisor = nursery.supervisor()
    async with kept_alive(supervisor):
        first = await supervisor.up()
        nursery.children[0].die(-9)
        await first.ended.wait()
        second = await supervisor.up()
        assert second is not first
        assert supervisor.status.pid == 2
        assert supervisor.status.state == "running"
        assert supervisor.status.restarts == 1
        assert supervisor.status.last_cause == "ended with status -9"


async def test_a_start_that_fails_is_tried_again_and_its_cause_shown() -> None:
    nursery = Nursery()
    supervisor = nursery.supervisor()
    async with kept_alive(supervisor):
        first = await supervisor.up()
        nursery.refusals = 2
        nursery.children[0].die(1)
        await first.ended.wait()
        await supervisor.up()
        assert supervisor.status.last_cause == "port 1 is in use"
        assert supervisor.status.pid == 2


async def test_the_first_start_fails_to_whoever_asked_for_it() -> None:
    nursery = Nursery()
    nursery.refusals = 1
    with pytest.raises(UnavailableError, match="port 1 is in use"):
        await nursery.supervisor().start()


async def test_stopping_ends_the_child_of_this_life() -> None:
    nursery = Nursery()
    supervisor = nursery.supervisor()
    async with kept_alive(supervisor):
        await supervisor.up()
        assert not nursery.children[0].stopped
    assert nursery.children[0].stopped


async def test_while_there_is_no_child_asking_for_it_says_so() -> None:
    with pytest.raises(UnavailableError, match="being restarted"):
        Nursery().supervisor().current()


def test_pauses_double_up_to_a_bound() -> None:
    rng = random.Random(1)  # noqa: S311  # jitter
    for failures in range(40):
        longest = min(LONGEST_BACK_OFF_S, 0.25 * 2.0**failures)
        assert longest / 2 <= back_off_s(failures, rng) <= longest
