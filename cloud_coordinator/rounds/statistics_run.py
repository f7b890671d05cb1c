"""A run that asks a fleet one question about its rows, and trains nothing.

All that comes back is the sum of the devices' vectors (shared/statistics): one secure sum, or of
more devices than one can hold a sum for each shard. An attempt without any sum is abandoned with
its cause, and the next one asks anew; without noise, a device that has sent its vector says so, and
is not asked again, because the difference of two sums would be its vector.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_coordinator.rounds.cohort import cohort_rng, select_cohort
from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.host import RunHost
from cloud_coordinator.rounds.initial_model import contract_of
from cloud_coordinator.rounds.lifecycle import RoundEvent, RoundState, next_state
from cloud_coordinator.rounds.pending import Scratch
from cloud_coordinator.rounds.robust import check_sum
from cloud_coordinator.rounds.roster import Roster
from cloud_coordinator.rounds.secrecy import secrecy_of
from cloud_coordinator.rounds.secure_sums import SecureSums
from cloud_coordinator.rounds.secure_training import configurer
from cloud_coordinator.rounds.sum_plan import statistics_spec
from cloud_coordinator.rounds.sum_session import GroupSum
from cloud_coordinator.rounds.sum_work import SumOutcome, SumQuestion
from cloud_coordinator.rounds.trained import Groups, say_started
from cloud_coordinator.rounds.waiting import wait_for_devices
from cloud_coordinator.rounds.worker_messages import (
    Participation,
    RoundClosed,
    RoundRecord,
    RunFailed,
    RunFinished,
    Secrecy,
)
from shared.errors import PeerError, QuorumError
from shared.secure_sum.accounting import sum_sigma
from shared.secure_sum.config import MAX_ROSTER
from shared.secure_sum.questions import statistics_question
from shared.statistics.questions import check_question
from shared.statistics.vectors import Answer, StatisticsVector

logger = logging.getLogger(__name__)

_ALL_SPENT = (
    "{} devices have sent their exact numbers and send no others in this run, and too few others "
    "are here; start a new run"
)


@dataclass(slots=True)
class _Attempt:
    """One round while it lives."""

    number: int
    started_at: datetime
    state: RoundState = RoundState.RECRUITING
    outcome: SumOutcome | None = None
    causes: dict[int, str] = field(default_factory=dict)  # by shard: why its sum is not there

    def advance(self, event: RoundEvent) -> None:
        self.state = next_state(self.state, event)
        logger.info("round %d is %s", self.number, self.state, extra={"round_number": self.number})

    @property
    def participations(self) -> tuple[Participation, ...]:
        return self.outcome.participations if self.outcome else ()

    @property
    def cause(self) -> str:
        return "; ".join(filter(None, self.causes.values()))


class StatisticsRun:
    """One life of a run that asks for statistics."""

    def __init__(
        self,
        host: RunHost,
        exchange: Exchange,
        *,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """Lay out the question's vector; raise ConfigError where the task's data cannot answer."""
        assert host.plan.statistics is not None, "of a plan that asks"
        self._host, self._exchange, self._entropy = host, exchange, entropy
        self._question = host.plan.statistics
        contract = contract_of(host.plan.task)
        check_question(self._question, contract)
        self._vector = StatisticsVector(self._question, contract)
        self._asked = msgspec.json.encode(self._question)  # the bytes that every device digests
        self._roster = Roster(host, exchange)
        self._scratch = Scratch(host.scratch)
        self._sums = SecureSums(host, self._roster, exchange, self._scratch)
        self._blamed: set[str] = set()
        self._spent: set[str] = set()

    def run(self) -> RunFinished | RunFailed:
        """Ask until there is an answer, or there were as many attempts as the plan allows.

        Raises:
            StoppedError: the run was ended from outside.
            UnavailableError: the SuperLink, the coordinator or disk space is gone; the run can go
                on from what was saved.
        """
        most, cause = self._host.plan.cohort.max_abandoned_rounds, "of a crash"
        for number in range(max(1, self._host.next_round), most + 1):
            attempt = _Attempt(number, self._host.now())
            try:
                self._perform(attempt)
            except QuorumError as error:
                cause = self._abandon(attempt, error)
            else:
                return RunFinished()
            if self._is_hopeless():
                return RunFailed(_ALL_SPENT.format(len(self._spent)))
        return RunFailed(
            f"{most} attempts were abandoned, the last because {cause}; "
            "start the run again when more devices can take part"
        )

    def _perform(self, attempt: _Attempt) -> None:
        """Ask, and save the answers; raise QuorumError where there are none."""
        outcome = self._ask(attempt)
        attempt.outcome = outcome
        self._blamed |= outcome.blamed.keys()
        self._spent |= outcome.spent
        total, variance, count = self._total(attempt, outcome)
        if not count:
            quorum = self._host.plan.cohort.quorum
            raise QuorumError(attempt.number, survivors=0, quorum=quorum, of_what="answers")
        attempt.advance(RoundEvent.SUM_RECOVERED)
        answers = self._vector.read(total, sigma=math.sqrt(variance))
        self._close(attempt, cause=attempt.cause, answers=tuple(answers))

    def _ask(self, attempt: _Attempt) -> SumOutcome:
        """Make the sums, or finish those that an earlier life of this worker began."""

        def masked() -> None:
            attempt.advance(RoundEvent.COLLECTION_CLOSED)

        if self._scratch.load("statistics", attempt.number) is not None:
            attempt.advance(RoundEvent.COHORT_FORMED)
            outcome = self._sums.resume("statistics", attempt.number, on_masked=masked)
            if outcome is not None:
                return outcome
        shards = self._shards(attempt.number)
        attempt.advance(RoundEvent.COHORT_FORMED)
        return self._sums.run(self._sum_question(attempt.number, shards), shards, on_masked=masked)

    # --- whom to ask, and what -------------------------------------------------------------------

    def _eligible(self, joined: frozenset[str]) -> frozenset[str]:
        if self._host.announces:
            joined &= self._roster.members.keys()
        return joined - self._blamed - self._spent

    def _shards(self, number: int) -> Groups:
        """Wait for devices and part the cohort into complete sums, as few as can be."""
        plan = self._host.plan
        joined = wait_for_devices(self._host, self._roster, self._eligible)
        rng = cohort_rng(plan.seed, number)
        cohort = select_cohort(joined, plan.cohort, rng=rng, times_selected={})
        if len(cohort) < (quorum := plan.cohort.quorum):
            raise QuorumError(number, survivors=len(cohort), quorum=quorum, of_what="devices")
        shards = -(-len(cohort) // MAX_ROSTER)
        return {shard: cohort[shard::shards] for shard in range(shards)}

    def _is_hopeless(self) -> bool:
        """Return whether only devices that may answer no more are here."""
        if not self._spent:
            return False
        left = self._eligible(frozenset(self._roster.nodes))
        return len(left) < self._host.plan.cohort.quorum

    def _sum_question(self, number: int, shards: Groups) -> SumQuestion:
        plan = self._host.plan
        timeout_s = plan.cohort.round_deadline_s
        spec = statistics_spec(
            plan,
            length=self._vector.length,
            norm=self._vector.norm,
            max_rows=self._question.max_rows,
            question_digest=statistics_question(self._asked),
        )
        return SumQuestion(
            purpose="statistics",
            round_number=number,
            stage="statistics",
            configure=configurer(
                self._host,
                self._roster,
                spec,
                round_number=number,
                groups=len(shards),
                most=MAX_ROSTER,
                timeout_s=timeout_s,
                rotation_seed=self._entropy(16),
            ),
            push=lambda configs, ttl_s: self._push(number, shards, configs, ttl_s),
            wanted=-(-plan.cohort.size // len(shards)),
            timeout_s=timeout_s,
            bytes_down=len(self._asked),
        )

    def _push(
        self, number: int, shards: Groups, configs: Mapping[int, bytes], ttl_s: float
    ) -> dict[int, str]:
        message_ids = self._exchange.ask_for_statistics(
            self._asked, list(configs), round_number=number, ttl_s=ttl_s, configs=configs
        )
        cohort = [device for devices in shards.values() for device in devices]
        say_started(self._host, number, cohort)
        return message_ids

    # --- from sums to answers --------------------------------------------------------------------

    def _total(
        self, attempt: _Attempt, outcome: SumOutcome
    ) -> tuple[NDArray[np.float64], float, int]:
        """Return the sum over all shards, the variance of its noise, and of how many devices."""
        total = np.zeros(self._vector.length)
        variance, count = 0.0, 0
        for shard in outcome.groups:
            try:
                part = self._part(shard)
            except PeerError as error:
                logger.warning("round %d: %s", attempt.number, error)
                attempt.causes[shard.group] = str(error)
                continue
            total += part
            count += shard.survivors
            variance += _noise_variance(shard)
        return total, variance, count

    def _part(self, shard: GroupSum) -> NDArray[np.float64]:
        if shard.cause:
            raise PeerError(shard.cause)
        total, exact = shard.decoded()
        check_sum(shard.config, total, exact, shard.survivors)
        return total

    # --- records ---------------------------------------------------------------------------------

    def _abandon(self, attempt: _Attempt, error: QuorumError) -> str:
        """Close the attempt without answers; return the cause, for people."""
        attempt.advance(RoundEvent.QUORUM_LOST)
        lost = [
            f"{part.device_id}: {part.cause}"
            for part in attempt.participations
            if part.outcome not in {"replied", "not-needed"}
        ]
        lost = [attempt.cause, *lost] if attempt.cause else lost
        cause = f"{error} ({'; '.join(lost)})"[:500] if lost else str(error)
        self._close(attempt, cause=cause)
        return cause

    def _close(self, attempt: _Attempt, *, cause: str, answers: tuple[Answer, ...] = ()) -> None:
        """Report the round and wait until its record is durable."""
        record = RoundRecord(
            round_number=attempt.number,
            state="committed" if attempt.state is RoundState.COMMITTED else "abandoned",
            cause=cause,
            started_at=attempt.started_at,
            closed_at=self._host.now(),
            participations=attempt.participations,
            metrics={},
            answers=answers,
            secrecy=self._secrecy(attempt),
        )
        self._host.report(RoundClosed(record))
        self._roster.wait_until_saved(attempt.number)
        self._scratch.forget_sums()

    def _secrecy(self, attempt: _Attempt) -> Secrecy | None:
        if attempt.outcome is None:
            return None
        return secrecy_of(self._host.plan.privacy, attempt.outcome, attempt.causes)


def _noise_variance(shard: GroupSum) -> float:
    """Return the variance of the noise that all survivors added, not only those it was sized by."""
    noise = shard.config.noise
    return sum_sigma(shard.config) ** 2 * shard.survivors / noise.survivors if noise else 0.0
