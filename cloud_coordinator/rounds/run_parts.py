"""What all the work of one run shares, and how each of its rounds is lived and put on record."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.host import RunHost
from cloud_coordinator.rounds.lifecycle import RoundEvent, RoundState, next_state
from cloud_coordinator.rounds.pending import Scratch
from cloud_coordinator.rounds.roster import Roster
from cloud_coordinator.rounds.worker_messages import (
    Participation,
    ResumePoint,
    RoundClosed,
    RoundRecord,
    Secrecy,
)
from shared.errors import QuorumError
from shared.statistics.vectors import Answer

logger = logging.getLogger(__name__)

_LONGEST_CAUSE = 500


@dataclass(frozen=True, slots=True)
class RunParts:
    """One life of a run: the process around it, its devices, and what it keeps over a crash."""

    host: RunHost
    roster: Roster
    exchange: Exchange
    scratch: Scratch
    entropy: Callable[[int], bytes] = os.urandom

    @classmethod
    def of(cls, host: RunHost, exchange: Exchange) -> Self:
        """Assemble them for a host."""
        return cls(host, Roster(host, exchange), exchange, Scratch(host.scratch))


@dataclass(slots=True)
class RoundLife:
    """One round, or one attempt to get an answer, while it lives."""

    number: int
    started_at: datetime
    state: RoundState = RoundState.RECRUITING
    participations: tuple[Participation, ...] = ()
    cause: str = ""  # why some or all of its sums are not there
    secrecy: Secrecy | None = None
    trained_s: float = 0.0  # how long training took
    training_sums: dict[str, float] = field(default_factory=dict)
    is_hopeless: bool = False  # the same model cannot be trained by enough devices any more

    def advance(self, event: RoundEvent) -> None:
        """Let ``event`` happen; raise IllegalTransitionError where it cannot."""
        self.state = next_state(self.state, event)
        logger.info("round %d is %s", self.number, self.state, extra={"round_number": self.number})


def abandon_round(parts: RunParts, life: RoundLife, error: QuorumError) -> str:
    """Close a round without a result; return the cause, for people."""
    life.advance(RoundEvent.QUORUM_LOST)
    # One whose vector arrived may have refused afterwards, and that is then the reason.
    lost = [
        f"{part.device_id}: {part.cause}"
        for part in life.participations
        if part.cause and part.outcome != "not-needed"
    ]
    lost = [life.cause, *lost] if life.cause else lost
    cause = f"{error} ({'; '.join(lost)})"[:_LONGEST_CAUSE] if lost else str(error)
    close_round(parts, life, cause=cause)
    return cause


def close_round(
    parts: RunParts,
    life: RoundLife,
    *,
    cause: str,
    metrics: dict[str, float] | None = None,
    result: ResumePoint | None = None,
    answers: tuple[Answer, ...] = (),
) -> None:
    """Report a round that is over, and wait until its record is durable.

    Args:
        parts: of the run.
        life: of the round, in a terminal state.
        cause: why it was abandoned, or what it lacks.
        metrics: of the result.
        result: where its parameters are kept; None where it has none.
        answers: to the run's question.
    """
    assert life.state in {RoundState.COMMITTED, RoundState.ABANDONED}
    record = RoundRecord(
        round_number=life.number,
        state="committed" if life.state is RoundState.COMMITTED else "abandoned",
        cause=cause,
        started_at=life.started_at,
        closed_at=parts.host.now(),
        participations=life.participations,
        metrics=metrics or {},
        training_sums=life.training_sums,
        parameters_sha256=result.parameters_sha256 if result else None,
        optimizer_sha256=result.optimizer_sha256 if result else None,
        answers=answers,
        secrecy=life.secrecy,
    )
    parts.host.report(RoundClosed(record))
    parts.roster.wait_until_saved(life.number)
    parts.scratch.forget_sums()
