from itertools import product

import pytest

from edge_agent.deployment import TRANSITIONS, DeploymentEvent, next_state
from shared.errors import IllegalTransitionError
from shared.messages import DeploymentState

S, E = DeploymentState, DeploymentEvent
LEGAL = {
    (S.IDLE, E.WANTED): S.DOWNLOADING,
    (S.IDLE, E.FOUND): S.ACTIVATING,
    (S.IDLE, E.SERVED_ALREADY): S.SERVING,
    (S.DOWNLOADING, E.FETCHED): S.TESTING,
    (S.DOWNLOADING, E.FAILED): S.FAILED,
    (S.DOWNLOADING, E.ABANDONED): S.IDLE,
    (S.TESTING, E.PASSED): S.ACTIVATING,
    (S.TESTING, E.FAILED): S.FAILED,
    (S.TESTING, E.ABANDONED): S.IDLE,
    (S.ACTIVATING, E.ACTIVATED): S.SERVING,
    (S.ACTIVATING, E.FAILED): S.FAILED,
    (S.ACTIVATING, E.ABANDONED): S.IDLE,
    (S.SERVING, E.WANTED): S.DOWNLOADING,
    (S.SERVING, E.SERVED_ALREADY): S.SERVING,
    (S.FAILED, E.WANTED): S.DOWNLOADING,
    (S.FAILED, E.SERVED_ALREADY): S.SERVING,
}


@pytest.mark.parametrize(("state", "event"), list(product(S, E)))
def test_every_pair_of_state_and_event_is_decided(
    state: DeploymentState, event: DeploymentEvent
) -> None:
    if (state, event) in LEGAL:
        assert next_state(state, event) == LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event} cannot happen while {state}"):
            next_state(state, event)


def test_every_state_is_in_the_table_and_can_be_left() -> None:
    assert set(TRANSITIONS) == set(S)
    assert all(TRANSITIONS.values())
