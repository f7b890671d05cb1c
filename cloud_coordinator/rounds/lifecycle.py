"""The life of one training round. All that may change its state is here; nothing does I/O."""

from enum import StrEnum

from shared.errors import IllegalTransitionError


class RoundState(StrEnum):
    """Where a round is."""

    RECRUITING = "recruiting"  # too few devices are joined yet; more may be invited
    COLLECTING = "collecting"  # the cohort is fixed; (masked) updates arrive until the deadline
    UNMASKING = "unmasking"  # survivors reveal the shares that remove what masks are left
    COMMITTED = "committed"  # new parameters exist; terminal
    ABANDONED = "abandoned"  # the parameters stay as they were; terminal


class RoundEvent(StrEnum):
    """What can happen to a round."""

    COHORT_FORMED = "cohort_formed"
    COLLECTION_CLOSED = "collection_closed"  # no masked update is added any more
    SUM_RECOVERED = "sum_recovered"  # the sum of the updates is known, by quorum or more devices
    QUORUM_LOST = "quorum_lost"


S, E = RoundState, RoundEvent  # short names keep the table readable
TRANSITIONS: dict[RoundState, dict[RoundEvent, RoundState]] = {
    S.RECRUITING: {E.COHORT_FORMED: S.COLLECTING, E.QUORUM_LOST: S.ABANDONED},
    S.COLLECTING: {
        E.COLLECTION_CLOSED: S.UNMASKING,
        E.SUM_RECOVERED: S.COMMITTED,  # plain rounds, and what the devices measure of round 0
        E.QUORUM_LOST: S.ABANDONED,
    },
    S.UNMASKING: {E.SUM_RECOVERED: S.COMMITTED, E.QUORUM_LOST: S.ABANDONED},
    S.COMMITTED: {},
    S.ABANDONED: {},
}


def next_state(state: RoundState, event: RoundEvent) -> RoundState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a round while {state}")
    return TRANSITIONS[state][event]
