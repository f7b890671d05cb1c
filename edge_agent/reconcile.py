"""Getting from what is served to what is desired, again and again until it is so.

The desired state is one signed document with a rising version, kept over restarts: an older or
repeated one changes nothing, so a replay cannot bring a withdrawn model back. A newer one
supersedes the work on the one before. Causes that can pass (no network, no disk space) are tried
again with back-off; a model that is untrusted or unfit is not, until another is desired.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable

import msgspec

from edge_agent.state import AgentState
from shared.errors import ShoalError, UnavailableError
from shared.messages import Desired

logger = logging.getLogger(__name__)

_FACT = "desired"
_LONGEST_BACK_OFF_S = 300.0


class Wanted(msgspec.Struct, frozen=True):
    """The highest desired state that was accepted; version 0 before any."""

    version: int = 0
    model_version: str | None = None
    watch_s: float = 0.0  # how often to say how it is served; 0: never


class Reconciler:
    """Remembers what is desired and works towards it; `run` is its job."""

    def __init__(
        self,
        state: AgentState,
        *,
        converge: Callable[[str], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        """Describe the loop.

        Args:
            state: keeps what was accepted.
            converge: makes a model version be served; idempotent, and raises a ShoalError after it
                reported the failure.
            rng: draws the back-off.
        """
        self._state = state
        self._converge = converge
        self._rng = rng
        self._attempt: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.wanted = state.read(_FACT, Wanted) or Wanted()

    def accept(self, desired: Desired) -> bool:
        """Take over a newer desired state; return False for one that is not newer."""
        if desired.version <= self.wanted.version:
            if desired.version < self.wanted.version:
                logger.warning(
                    "refused desired state %d: %d is in force", desired.version, self.wanted.version
                )
            return False
        wanted = Wanted(desired.version, desired.model_version, desired.watch_s)
        self._state.write(_FACT, wanted)
        self.wanted = wanted
        logger.info("desired state %d wants model %s", wanted.version, _short(wanted))
        self._changed.set()
        if self._attempt is not None:
            self._attempt.cancel()
        return True

    def check_again(self) -> None:
        """Converge once more to what is wanted: what was served may be so no longer."""
        self._changed.set()

    async def run(self) -> None:
        """Converge to what was wanted at the last stop, then to each newer desired state."""
        self._changed.set()
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self.wanted.model_version is None:
                continue
            async with asyncio.TaskGroup() as group:
                self._attempt = group.create_task(
                    self._insist(self.wanted.model_version), name="converge"
                )
            self._attempt = None

    async def _insist(self, model_version: str) -> None:
        """Converge, and try again after failures that can pass."""
        failures = 0
        while True:
            try:
                await self._converge(model_version)
            except UnavailableError as error:
                failures += 1
                delay_s = self._rng.uniform(0, min(_LONGEST_BACK_OFF_S, 2.0 ** min(failures, 10)))
                logger.warning(
                    "model %s has to wait: %s; trying in %.1f s", model_version[:12], error, delay_s
                )
                await asyncio.sleep(delay_s)
            except ShoalError as error:
                logger.warning("model %s is not served: %s", model_version[:12], error)
                return
            else:
                return


def _short(wanted: Wanted) -> str:
    return (wanted.model_version or "as it is")[:12]
