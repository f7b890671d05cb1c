import itertools

import pytest

from cloud_coordinator.rounds.lifecycle import TRANSITIONS, RoundEvent, RoundState, next_state
from shared.errors import IllegalTransitionError

S, E = RoundState, RoundEvent
LEGAL = {
    (S.RECRUITING, E.COHORT_FORMED): S.COLLECTING,
    (S.RECRUITING, E.QUORUM_LOST): S.ABANDONED,
    (S.COLLECTING, E.COLLECTION_CLOSED): S.UNMASKING,
    (S.COLLECTING, E.SUM_RECOVERED): S.COMMITTED,
    (S.COLLECTING, E.QUORUM_LOST): S.ABANDONED,
    (S.UNMASKING, E.SUM_RECOVERED): S.COMMITTED,
    (S.UNMASKING, E.QUORUM_LOST): S.ABANDONED,
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(RoundState, RoundEvent)))
def test_every_pair_of_state_and_event_is_allowed_or_refused_on_purpose(
    state: RoundState, event: RoundEvent
) -> None:
    if (state, event) in LEGAL:
        assert next_state(state, event) is LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=str(event)):
            next_state(state, event)


def test_every_state_is_in_the_table_and_each_round_can_end() -> None:
    assert set(TRANSITIONS) == set(RoundState)
    for state, events in TRANSITIONS.items():
        assert not events or RoundState.ABANDONED in events.values(), state
