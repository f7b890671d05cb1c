"""The general call for values that depend on devices' data: only their sum comes back.

One session of the protocol (shared/secure_sum) for each group of devices, side by side, stage by
stage: train or measure, and advertise keys (by Flower); deal shares; send masked vectors (by
Flower); sign the survivors; reveal shares. What may be asked again after a crash is on disk before
it is asked, so that a new life of the worker resumes the sum where it was (`resume`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence

from cloud_coordinator.rounds.carriers import FlowerStages, RelayedStages
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.sum_work import SumOutcome, SumQuestion, SumWork
from shared.secure_sum.config import Purpose

logger = logging.getLogger(__name__)


class SecureSums:
    """Makes sums, for the rounds of one run."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._carrier = (RelayedStages if parts.host.announces else FlowerStages)(parts)

    def run(
        self,
        question: SumQuestion,
        groups: Mapping[int, Sequence[str]],
        *,
        on_masked: Callable[[], None] = lambda: None,
    ) -> SumOutcome:
        """Ask the devices of each group, and return the groups' sums.

        Args:
            question: what is asked.
            groups: by number: the devices, by the names that the roster has for them.
            on_masked: called once no vector is added any more.

        Raises:
            StoppedError: the run is to end now.
            UnavailableError: the SuperLink, the coordinator or disk space is gone.
        """
        work = SumWork(
            self._parts,
            self._carrier,
            question.purpose,
            question.round_number,
            self._parts.host.now(),
        )
        work.begin(question, groups)
        return work.perform("share", on_masked)

    def resume(
        self,
        purpose: Purpose,
        round_number: int,
        *,
        on_masked: Callable[[], None] = lambda: None,
    ) -> SumOutcome | None:
        """Finish what an earlier life began; None where there is nothing of this round.

        Raises:
            StoppedError: the run is to end now.
            UnavailableError: the SuperLink, the coordinator or disk space is gone.
        """
        pending = self._parts.scratch.load(purpose, round_number)
        if pending is None:
            return None
        logger.info("round %d: the sum that was interrupted is resumed", round_number)
        work = SumWork(self._parts, self._carrier, purpose, round_number, pending.started_at)
        work.restore(pending)
        return work.perform("mask", on_masked)
