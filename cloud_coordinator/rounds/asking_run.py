"""A run that asks a fleet one question, and trains nothing.

All that comes back is the sum of the devices' vectors: one secure sum, or of more devices than one
can hold a sum for each shard. An attempt without any sum is abandoned with its cause, and the next
one asks anew; without noise, a device that has sent its vector says so, and is not asked again,
because the difference of two sums would be its vector.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from cloud_coordinator.rounds.cohort import cohort_rng, select_cohort
from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.host import RunHost
from cloud_coordinator.rounds.lifecycle import RoundEvent
from cloud_coordinator.rounds.robust import check_sum
from cloud_coordinator.rounds.run_parts import RoundLife, RunParts, abandon_round, close_round
from cloud_coordinator.rounds.secrecy import secrecy_of
from cloud_coordinator.rounds.secure_sums import SecureSums
from cloud_coordinator.rounds.secure_training import configurer
from cloud_coordinator.rounds.sum_plan import SumQuestionSpec
from cloud_coordinator.rounds.sum_session import GroupSum
from cloud_coordinator.rounds.sum_work import SumOutcome, SumQuestion
from cloud_coordinator.rounds.trained import Groups, say_started
from cloud_coordinator.rounds.waiting import wait_for_devices
from cloud_coordinator.rounds.worker_messages import RunFailed, RunFinished
from shared.errors import PeerError, QuorumError
from shared.run_plan import RunPlan
from shared.secure_sum.accounting import sum_sigma
from shared.secure_sum.config import MAX_ROSTER, Purpose
from shared.statistics.blocks import Floats
from shared.statistics.vectors import Answer

logger = logging.getLogger(__name__)

_ALL_SPENT = (
    "{} devices have sent their exact numbers and send no others in this run, and too few others "
    "are here; start a new run"
)


class Asked(Protocol):
    """What an asking run wants to know: one vector of every device, and how their sum is read."""

    purpose: Purpose
    length: int  # d of the vector
    nbytes: int  # that a device downloads to answer

    def spec(self, plan: RunPlan) -> SumQuestionSpec:
        """Return what the signed configuration of each sum says."""
        ...

    def push(
        self,
        exchange: Exchange,
        node_ids: Sequence[int],
        *,
        round_number: int,
        ttl_s: float,
        configs: Mapping[int, bytes],
    ) -> dict[int, str]:
        """Send the question; arguments and result are those of `Exchange.ask_to_train`."""
        ...

    def read(self, total: Floats, *, sigma: float) -> Sequence[Answer]:
        """Read the sum of all vectors, shape (d,), each number with noise of ``sigma``."""
        ...


class AskingRun:
    """One life of a run that asks one question."""

    def __init__(self, host: RunHost, exchange: Exchange, asked: Asked) -> None:
        self._host, self._parts = host, RunParts.of(host, exchange)
        self._asked = asked
        self._sums = SecureSums(self._parts)
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
            life = RoundLife(number, self._host.now())
            try:
                self._perform(life)
            except QuorumError as error:
                cause = abandon_round(self._parts, life, error)
            else:
                return RunFinished()
            if self._is_hopeless():
                return RunFailed(_ALL_SPENT.format(len(self._spent)))
        return RunFailed(
            f"{most} attempts were abandoned, the last because {cause}; "
            "start the run again when more devices can take part"
        )

    def _perform(self, life: RoundLife) -> None:
        """Ask, and save the answers; raise QuorumError where there are none."""
        outcome = self._ask(life)
        self._blamed |= outcome.blamed.keys()
        self._spent |= outcome.spent
        causes: dict[int, str] = {}
        total, variance, count = self._total(outcome, causes)
        life.participations = outcome.participations
        life.cause = "; ".join(filter(None, causes.values()))
        life.secrecy = secrecy_of(self._host.plan.privacy, outcome, causes)
        if not count:
            quorum = self._host.plan.cohort.quorum
            raise QuorumError(life.number, survivors=0, quorum=quorum, of_what="answers")
        life.advance(RoundEvent.SUM_RECOVERED)
        answers = self._asked.read(total, sigma=math.sqrt(variance))
        close_round(self._parts, life, cause=life.cause, answers=tuple(answers))

    def _ask(self, life: RoundLife) -> SumOutcome:
        """Make the sums, or finish those that an earlier life of this worker began."""

        def masked() -> None:
            life.advance(RoundEvent.COLLECTION_CLOSED)

        if self._parts.scratch.load(self._asked.purpose, life.number) is not None:
            life.advance(RoundEvent.COHORT_FORMED)
            outcome = self._sums.resume(self._asked.purpose, life.number, on_masked=masked)
            if outcome is not None:
                return outcome
        shards = self._shards(life.number)
        life.advance(RoundEvent.COHORT_FORMED)
        return self._sums.run(self._sum_question(life.number, shards), shards, on_masked=masked)

    # --- whom to ask, and what -------------------------------------------------------------------

    def _eligible(self, joined: frozenset[str]) -> frozenset[str]:
        if self._host.announces:
            joined &= self._parts.roster.members.keys()
        return joined - self._blamed - self._spent

    def _shards(self, number: int) -> Groups:
        """Wait for devices and part the cohort into complete sums, as few as can be."""
        plan = self._host.plan
        joined = wait_for_devices(self._parts, self._eligible)
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
        left = self._eligible(frozenset(self._parts.roster.nodes))
        return len(left) < self._host.plan.cohort.quorum

    def _sum_question(self, number: int, shards: Groups) -> SumQuestion:
        plan = self._host.plan
        timeout_s = plan.cohort.round_deadline_s
        return SumQuestion(
            purpose=self._asked.purpose,
            round_number=number,
            stage=self._asked.purpose,
            configure=configurer(
                self._parts,
                self._asked.spec(plan),
                round_number=number,
                groups=len(shards),
                most=MAX_ROSTER,
                timeout_s=timeout_s,
            ),
            push=lambda configs, ttl_s: self._push(number, shards, configs, ttl_s),
            wanted=-(-plan.cohort.size // len(shards)),
            timeout_s=timeout_s,
            bytes_down=self._asked.nbytes,
        )

    def _push(
        self, number: int, shards: Groups, configs: Mapping[int, bytes], ttl_s: float
    ) -> dict[int, str]:
        message_ids = self._asked.push(
            self._parts.exchange,
            list(configs),
            round_number=number,
            ttl_s=ttl_s,
            configs=configs,
        )
        cohort = [device for devices in shards.values() for device in devices]
        say_started(self._host, number, cohort)
        return message_ids

    # --- from sums to answers --------------------------------------------------------------------

    def _total(self, outcome: SumOutcome, causes: dict[int, str]) -> tuple[Floats, float, int]:
        """Return the sum over all shards, the variance of its noise, and of how many devices.

        Why a shard is not in it goes into ``causes``.
        """
        total = np.zeros(self._asked.length)
        variance, count = 0.0, 0
        for shard in outcome.groups:
            try:
                part = self._part(shard)
            except PeerError as error:
                logger.warning("left out: %s", error)
                causes[shard.group] = str(error)
                continue
            total += part
            count += shard.survivors
            variance += _noise_variance(shard)
        return total, variance, count

    def _part(self, shard: GroupSum) -> Floats:
        if shard.cause:
            raise PeerError(shard.cause)
        total, exact = shard.decoded()
        check_sum(shard.config, total, exact, shard.survivors)
        return total


def _noise_variance(shard: GroupSum) -> float:
    """Return the variance of the noise that all survivors added, not only those it was sized by."""
    noise = shard.config.noise
    return sum_sigma(shard.config) ** 2 * shard.survivors / noise.survivors if noise else 0.0
