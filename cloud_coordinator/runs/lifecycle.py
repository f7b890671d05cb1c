"""The life of a run. All that may change its state is here; nothing does I/O."""

from enum import StrEnum

from shared.errors import IllegalTransitionError


class RunState(StrEnum):
    """Where a run is."""

    PLANNED = "planned"  # stored; nothing was started yet
    RECRUITING = "recruiting"  # invitations are out; too few devices are joined for a round
    RUNNING = "running"  # rounds are trained and committed
    EXPORTING = "exporting"  # the last round is committed; the model version is being built
    FINISHED = "finished"  # the model version exists, or the answers do; terminal
    FAILED = "failed"  # it cannot go on; what was committed stays; terminal
    STOPPED = "stopped"  # a person ended it; what was committed stays; terminal


class RunEvent(StrEnum):
    """What happens to a run."""

    DEVICES_LACKING = "devices_lacking"  # at the start, after losses, and after every crash
    ROUND_STARTED = "round_started"
    ROUNDS_DONE = "rounds_done"
    MODEL_BUILT = "model_built"
    ANSWERED = "answered"  # of a run that asks for statistics: it builds no model
    BROKE = "broke"
    STOP_ASKED = "stop_asked"


S, E = RunState, RunEvent  # short names keep the table readable
_ENDS = {E.BROKE: S.FAILED, E.STOP_ASKED: S.STOPPED}
TRANSITIONS: dict[RunState, dict[RunEvent, RunState]] = {
    S.PLANNED: {E.DEVICES_LACKING: S.RECRUITING, **_ENDS},
    S.RECRUITING: {
        E.DEVICES_LACKING: S.RECRUITING,
        E.ROUND_STARTED: S.RUNNING,
        E.ROUNDS_DONE: S.EXPORTING,  # a crash fell between the last commit and this event
        E.ANSWERED: S.FINISHED,  # likewise
        **_ENDS,
    },
    S.RUNNING: {
        E.DEVICES_LACKING: S.RECRUITING,
        E.ROUND_STARTED: S.RUNNING,
        E.ROUNDS_DONE: S.EXPORTING,
        E.ANSWERED: S.FINISHED,
        **_ENDS,
    },
    S.EXPORTING: {E.MODEL_BUILT: S.FINISHED, **_ENDS},
    S.FINISHED: {},
    S.FAILED: {},
    S.STOPPED: {},
}
ACTIVE = frozenset(state for state, events in TRANSITIONS.items() if events)


def next_state(state: RunState, event: RunEvent) -> RunState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a run that is {state}")
    return TRANSITIONS[state][event]
