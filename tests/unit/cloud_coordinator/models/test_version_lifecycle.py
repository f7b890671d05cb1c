from itertools import product

import pytest

from cloud_coordinator.models.lifecycle import (
    TRANSITIONS,
    VersionEvent,
    VersionState,
    next_state,
)
from shared.errors import IllegalTransitionError

S, E = VersionState, VersionEvent
LEGAL = {
    (S.CANDIDATE, E.VARIANTS_BUILT): S.COMPRESSED,
    (S.CANDIDATE, E.BUILD_REFUSED): S.REJECTED,
    (S.COMPRESSED, E.MANIFEST_SIGNED): S.SIGNED,
    (S.COMPRESSED, E.BUILD_REFUSED): S.REJECTED,
    (S.COMPRESSED, E.JUDGED_FIT): S.JUDGED,
    (S.COMPRESSED, E.GATES_FAILED): S.REJECTED,
    (S.JUDGED, E.MANIFEST_SIGNED): S.SIGNED,
    (S.SIGNED, E.ROLLOUT_BEGAN): S.CANARY,
    (S.CANARY, E.ROLLOUT_WIDENED): S.ROLLING,
    (S.CANARY, E.MADE_CURRENT): S.CURRENT,
    (S.CANARY, E.TURNED_BACK): S.ROLLED_BACK,
    (S.ROLLING, E.MADE_CURRENT): S.CURRENT,
    (S.ROLLING, E.TURNED_BACK): S.ROLLED_BACK,
    (S.CURRENT, E.REPLACED): S.SUPERSEDED,
    (S.SUPERSEDED, E.ROLLOUT_BEGAN): S.CANARY,
    (S.ROLLED_BACK, E.ROLLOUT_BEGAN): S.CANARY,
}


@pytest.mark.parametrize(("state", "event"), list(product(VersionState, VersionEvent)))
def test_every_pair_of_state_and_event_is_decided(state: VersionState, event: VersionEvent) -> None:
    if (state, event) in LEGAL:
        assert next_state(state, event) is LEGAL[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=f"{event} cannot happen"):
            next_state(state, event)


def test_a_rejected_version_never_ships() -> None:
    assert not TRANSITIONS[VersionState.REJECTED]
