"""Keeps one child process alive: starts it, starts it again with back-off, and says how it is.

What was in a dead child's memory is void, so each life is an object of its own: whoever relies on
the child waits for `Supervisor.up`, works with that `Life`, and stops when `Life.ended` is set.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from shared.errors import ShoalError, UnavailableError

logger = logging.getLogger(__name__)

LONGEST_BACK_OFF_S = 30.0
STEADY_AFTER_S = 60.0  # a life that lasted so long resets the back-off


class Handle(Protocol):
    """A running child: `shared.child.Child`, or what wraps one."""

    @property
    def pid(self) -> int:
        """Process id."""
        ...

    async def wait(self) -> int:
        """Wait for the end and return the exit status."""
        ...

    async def stop(self) -> None:
        """End it within a deadline."""
        ...


H = TypeVar("H", bound=Handle)


@dataclass(frozen=True, slots=True)
class Life(Generic[H]):
    """One life of the child."""

    handle: H
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """How the child is, for people."""

    state: str  # "starting", "running", "backing-off"
    pid: int | None
    since: datetime
    restarts: int
    last_cause: str  # why it ended last; empty while it never did


def back_off_s(failures: int, rng: random.Random) -> float:
    """Return the seconds before start number ``failures`` + 1: doubling, with jitter by half."""
    longest = min(LONGEST_BACK_OFF_S, 0.25 * 2.0 ** min(failures, 10))
    return rng.uniform(longest / 2, longest)


class Supervisor(Generic[H]):
    """Owns one child. `start` it once, let `run` keep it alive, and `stop` it in the end."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[H]],
        *,
        clock: Callable[[], datetime],
        rng: random.Random,
    ) -> None:
        self.name = name
        self._start = start
        self._clock = clock
        self._rng = rng
        self._life: Life[H] | None = None
        self._up = asyncio.Condition()
        self.status = ChildStatus("starting", None, clock(), 0, "")

    async def start(self) -> None:
        """Start the first life; what prevents it is raised to whoever starts the service."""
        await self._begin()

    async def run(self) -> None:
        """Keep the child alive until cancelled; then `stop` it."""
        failures = 0
        while True:
            failures = await self._outlive(failures)
            await asyncio.sleep(back_off_s(failures, self._rng))
            try:
                await self._begin()
            except ShoalError as error:
                logger.warning("%s does not start: %s", self.name, error)
                self._note("backing-off", cause=str(error))

    async def stop(self) -> None:
        """End the child, if there is one; only while nobody is in `run`."""
        if self._life is not None:
            await self._life.handle.stop()

    async def up(self) -> Life[H]:
        """Wait until the child runs and return this life."""
        async with self._up:
            await self._up.wait_for(lambda: self._life is not None)
            assert self._life is not None
            return self._life

    def current(self) -> H:
        """Return the running child; raise UnavailableError while there is none."""
        if self._life is None:
            raise UnavailableError(f"{self.name} is being restarted; try again in a moment")
        return self._life.handle

    async def _begin(self) -> None:
        handle = await self._start()
        async with self._up:
            self._life = Life(handle)
            self._up.notify_all()
        self._note("running", pid=handle.pid)
        logger.info("%s runs as process %d", self.name, handle.pid)

    async def _outlive(self, failures: int) -> int:
        """Wait for the end of this life, if there is one; return the new count of failures."""
        if self._life is None:
            return failures + 1
        loop = asyncio.get_running_loop()
        began = loop.time()
        status = await self._life.handle.wait()
        self._life.ended.set()
        self._life = None
        self._note("backing-off", cause=f"ended with status {status}", restarted=True)
        logger.warning("%s ended with status %d; starting it again", self.name, status)
        return 0 if loop.time() - began >= STEADY_AFTER_S else failures + 1

    def _note(
        self,
        state: str,
        *,
        pid: int | None = None,
        cause: str | None = None,
        restarted: bool = False,
    ) -> None:
        old = self.status
        self.status = ChildStatus(
            state,
            pid,
            self._clock(),
            old.restarts + restarted,
            old.last_cause if cause is None else cause,
        )
