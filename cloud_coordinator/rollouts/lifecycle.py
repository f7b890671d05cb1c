"""The life of one rollout. All that may change its state is here; nothing does I/O."""

from enum import StrEnum

from shared.errors import IllegalTransitionError


class RolloutState(StrEnum):
    """How far a rollout is."""

    PLANNED = "planned"  # stored; waits for a window, or for the rollout before it to end
    ROLLING = "rolling"  # waves open one after the other, the canary first, and each one bakes
    PAUSED = "paused"  # no further wave opens; what is served stays, and is still watched
    ROLLING_BACK = "rolling_back"  # devices are told to serve what they served before
    COMPLETED = "completed"  # its version is the current one; terminal
    ROLLED_BACK = "rolled_back"  # no device that is online serves it any more; terminal
    DROPPED = "dropped"  # ended before its first wave; terminal


class RolloutEvent(StrEnum):
    """What may happen to a rollout."""

    WAVE_OPENED = "wave_opened"
    LAST_WAVE_PASSED = "last_wave_passed"
    HALTED = "halted"  # by a gate, or by a person
    RESUMED = "resumed"
    TURNED_BACK = "turned_back"  # by a gate, or by a person
    RETURNED = "returned"
    GIVEN_UP = "given_up"  # by a person, or because a newer one is planned for the task


S, E = RolloutState, RolloutEvent  # short names keep the table readable
TRANSITIONS: dict[RolloutState, dict[RolloutEvent, RolloutState]] = {
    S.PLANNED: {E.WAVE_OPENED: S.ROLLING, E.GIVEN_UP: S.DROPPED},
    S.ROLLING: {
        E.WAVE_OPENED: S.ROLLING,
        E.LAST_WAVE_PASSED: S.COMPLETED,
        E.HALTED: S.PAUSED,
        E.TURNED_BACK: S.ROLLING_BACK,
    },
    S.PAUSED: {E.RESUMED: S.ROLLING, E.TURNED_BACK: S.ROLLING_BACK},
    S.ROLLING_BACK: {E.RETURNED: S.ROLLED_BACK},
    S.COMPLETED: {},
    S.ROLLED_BACK: {},
    S.DROPPED: {},
}
ACTIVE = frozenset({S.ROLLING, S.PAUSED, S.ROLLING_BACK})  # at most one of a task's rollouts
UNFINISHED = ACTIVE | {S.PLANNED}


def next_state(state: RolloutState, event: RolloutEvent) -> RolloutState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a rollout that is {state}")
    return TRANSITIONS[state][event]
