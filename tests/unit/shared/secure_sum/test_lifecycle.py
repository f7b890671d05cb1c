import itertools
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import pytest

from shared.errors import IllegalTransitionError
from shared.secure_sum.lifecycle import (
    CLIENT_TRANSITIONS,
    SERVER_TRANSITIONS,
    ClientEvent,
    ClientState,
    ServerEvent,
    ServerState,
    next_client_state,
    next_server_state,
)
from tests.diagrams import draw

PAGE = Path(__file__).parents[4] / "docs" / "protocol.md"

C, CE = ClientState, ClientEvent
CLIENT_STEPS = {
    (C.OPENED, CE.KEYS_ADVERTISED): C.ADVERTISED,
    (C.ADVERTISED, CE.SHARES_DEALT): C.SHARED,
    (C.SHARED, CE.VECTOR_MASKED): C.MASKED,
    (C.MASKED, CE.SURVIVORS_SIGNED): C.CONSENTED,
    (C.CONSENTED, CE.SHARES_REVEALED): C.REVEALED,
    (C.OPENED, CE.SESSION_REFUSED): C.REFUSED,
    (C.ADVERTISED, CE.SESSION_REFUSED): C.REFUSED,
    (C.SHARED, CE.SESSION_REFUSED): C.REFUSED,
    (C.MASKED, CE.SESSION_REFUSED): C.REFUSED,
    (C.CONSENTED, CE.SESSION_REFUSED): C.REFUSED,
}
S, SE = ServerState, ServerEvent
SERVER_STEPS = {
    (S.ADVERTISING, SE.ROSTER_CLOSED): S.SHARING,
    (S.SHARING, SE.SHARES_CLOSED): S.MASKING,
    (S.MASKING, SE.VECTORS_CLOSED): S.AGREEING,
    (S.AGREEING, SE.SURVIVORS_AGREED): S.UNMASKING,
    (S.UNMASKING, SE.SUM_RECOVERED): S.SUMMED,
    (S.ADVERTISING, SE.SESSION_LOST): S.ABORTED,
    (S.SHARING, SE.SESSION_LOST): S.ABORTED,
    (S.MASKING, SE.SESSION_LOST): S.ABORTED,
    (S.AGREEING, SE.SESSION_LOST): S.ABORTED,
    (S.UNMASKING, SE.SESSION_LOST): S.ABORTED,
}


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ClientState, ClientEvent)))
def test_every_pair_of_a_devices_state_and_event_is_allowed_or_refused_on_purpose(
    state: ClientState, event: ClientEvent
) -> None:
    if (state, event) in CLIENT_STEPS:
        assert next_client_state(state, event) is CLIENT_STEPS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=str(event)):
            next_client_state(state, event)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ServerState, ServerEvent)))
def test_every_pair_of_a_sessions_state_and_event_is_allowed_or_refused_on_purpose(
    state: ServerState, event: ServerEvent
) -> None:
    if (state, event) in SERVER_STEPS:
        assert next_server_state(state, event) is SERVER_STEPS[state, event]
    else:
        with pytest.raises(IllegalTransitionError, match=str(event)):
            next_server_state(state, event)


@pytest.mark.parametrize("table", [CLIENT_TRANSITIONS, SERVER_TRANSITIONS])
def test_the_pages_diagrams_are_what_the_tables_say(
    table: Mapping[StrEnum, Mapping[StrEnum, StrEnum]],
) -> None:
    assert draw(table) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("state", [*ClientState, *ServerState])
def test_the_page_explains_every_state(state: StrEnum) -> None:
    assert f"| `{state.value}` |" in PAGE.read_text(encoding="utf-8")
