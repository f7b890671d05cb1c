"""The life of a run, on every pair of state and event."""

from itertools import product

import pytest

from cloud_coordinator.runs.lifecycle import ACTIVE, RunEvent, RunState, next_state
from shared.errors import IllegalTransitionError

S, E = RunState, RunEvent
LEGAL = {
    (S.PLANNED, E.DEVICES_LACKING): S.RECRUITING,
    (S.RECRUITING, E.DEVICES_LACKING): S.RECRUITING,
    (S.RECRUITING, E.ROUND_STARTED): S.RUNNING,
    (S.RECRUITING, E.ROUNDS_DONE): S.EXPORTING,
    (S.RECRUITING, E.ANSWERED): S.FINISHED,
    (S.RUNNING, E.DEVICES_LACKING): S.RECRUITING,
    (S.RUNNING, E.ROUND_STARTED): S.RUNNING,
    (S.RUNNING, E.ROUNDS_DONE): S.EXPORTING,
    (S.RUNNING, E.ANSWERED): S.FINISHED,
    (S.EXPORTING, E.MODEL_BUILT): S.FINISHED,
    **{(s, E.BROKE): S.FAILED for s in (S.PLANNED, S.RECRUITING, S.RUNNING, S.EXPORTING)},
    **{(s, E.STOP_ASKED): S.STOPPED for s in (S.PLANNED, S.RECRUITING, S.RUNNING, S.EXPORTING)},
}


@pytest.mark.parametrize(("state", "event"), list(product(RunState, RunEvent)))
def test_every_event_in_every_state_moves_on_or_is_refused(
    state: RunState, event: RunEvent
) -> None:
    if (state, event) in LEGAL:
        assert next_state(state, event) is LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match="cannot happen"):
            next_state(state, event)


def test_ended_runs_are_not_active() -> None:
    assert set(RunState) - ACTIVE == {S.FINISHED, S.FAILED, S.STOPPED}
