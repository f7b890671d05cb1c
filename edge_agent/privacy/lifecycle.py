"""The life of one secure sum on this device. All that may change its state is here; pure.

The states lie on disk so that a new process knows what an old one did; the secrets do not, so
whatever an ended process left behind is ``lost`` and stays unanswered (R1, R16).
"""

from enum import StrEnum

from shared.errors import IllegalTransitionError


class SumState(StrEnum):
    """Where a session stands."""

    OPENED = "opened"  # everything was checked; the vector is being made
    ADVERTISED = "advertised"  # the vector waits here; our keys of this session are out
    SHARED = "shared"  # shares of our secrets are with the peers
    MASKED = "masked"  # the masked vector left, or may have: it is paid for and spent
    CONSENTED = "consented"  # we signed who is in the sum
    REVEALED = "revealed"  # we helped to unmask the sum; terminal
    REFUSED = "refused"  # something was not allowed, or broke the protocol; terminal
    LOST = "lost"  # its process ended, and the secrets with it; terminal
    EXPIRED = "expired"  # time is up, or a later session took its place; terminal


class SumEvent(StrEnum):
    """What happens to a session."""

    VECTOR_READY = "vector_ready"
    SHARES_DEALT = "shares_dealt"
    VECTOR_LEAVING = "vector_leaving"
    SURVIVORS_SIGNED = "survivors_signed"
    SHARES_REVEALED = "shares_revealed"
    REFUSAL = "refusal"
    PROCESS_ENDED = "process_ended"
    TIME_OVER = "time_over"


S, E = SumState, SumEvent
_ENDS = {E.REFUSAL: S.REFUSED, E.PROCESS_ENDED: S.LOST, E.TIME_OVER: S.EXPIRED}
TRANSITIONS: dict[SumState, dict[SumEvent, SumState]] = {
    S.OPENED: {E.VECTOR_READY: S.ADVERTISED, **_ENDS},
    S.ADVERTISED: {E.SHARES_DEALT: S.SHARED, **_ENDS},
    S.SHARED: {E.VECTOR_LEAVING: S.MASKED, **_ENDS},
    S.MASKED: {E.SURVIVORS_SIGNED: S.CONSENTED, **_ENDS},
    S.CONSENTED: {E.SHARES_REVEALED: S.REVEALED, **_ENDS},
    S.REVEALED: {},
    S.REFUSED: {},
    S.LOST: {},
    S.EXPIRED: {},
}
TERMINAL = frozenset(state for state, events in TRANSITIONS.items() if not events)


def next_state(state: SumState, event: SumEvent) -> SumState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a sum that is {state}")
    return TRANSITIONS[state][event]
