"""The two lives of a secure sum: a device's part in it, and the coordinator's. Nothing does I/O.

docs/protocol.md draws both tables; a test compares the drawing with what stands here.
"""

from enum import StrEnum

from shared.errors import IllegalTransitionError


class ClientState(StrEnum):
    """Where one device's part in one session is: what it said last."""

    OPENED = "opened"  # the configuration is accepted; nothing was said yet
    ADVERTISED = "advertised"  # S0: our fresh keys are known
    SHARED = "shared"  # S1: the roster is accepted; our secrets are dealt to our peers
    MASKED = "masked"  # S2: the vector left, masked; it is spent
    CONSENTED = "consented"  # S2c: the survivors are signed, once
    REVEALED = "revealed"  # S3: shares are revealed and secrets wiped; terminal
    REFUSED = "refused"  # something was wrong, or too late; secrets are wiped; terminal


class ClientEvent(StrEnum):
    """What can happen to a device's part."""

    KEYS_ADVERTISED = "keys_advertised"
    SHARES_DEALT = "shares_dealt"
    VECTOR_MASKED = "vector_masked"
    SURVIVORS_SIGNED = "survivors_signed"
    SHARES_REVEALED = "shares_revealed"
    SESSION_REFUSED = "session_refused"


class ServerState(StrEnum):
    """Where a session is: which answers the coordinator takes."""

    ADVERTISING = "advertising"  # S0: keys arrive; the roster grows
    SHARING = "sharing"  # S1: the roster is fixed; boxes arrive
    MASKING = "masking"  # S2: masked vectors arrive and are added
    AGREEING = "agreeing"  # S2c: the survivors are fixed; signatures arrive
    UNMASKING = "unmasking"  # S3: shares arrive
    SUMMED = "summed"  # the sum is known; terminal
    ABORTED = "aborted"  # there is no sum and there will be none; terminal


class ServerEvent(StrEnum):
    """What can happen to a session."""

    ROSTER_CLOSED = "roster_closed"
    SHARES_CLOSED = "shares_closed"
    VECTORS_CLOSED = "vectors_closed"
    SURVIVORS_AGREED = "survivors_agreed"
    SUM_RECOVERED = "sum_recovered"
    SESSION_LOST = "session_lost"  # too few devices, or a secret that cannot be rebuilt


C, CE = ClientState, ClientEvent  # short names keep the tables readable
_REFUSED = {CE.SESSION_REFUSED: C.REFUSED}
CLIENT_TRANSITIONS: dict[ClientState, dict[ClientEvent, ClientState]] = {
    C.OPENED: {CE.KEYS_ADVERTISED: C.ADVERTISED, **_REFUSED},
    C.ADVERTISED: {CE.SHARES_DEALT: C.SHARED, **_REFUSED},
    C.SHARED: {CE.VECTOR_MASKED: C.MASKED, **_REFUSED},
    C.MASKED: {CE.SURVIVORS_SIGNED: C.CONSENTED, **_REFUSED},
    C.CONSENTED: {CE.SHARES_REVEALED: C.REVEALED, **_REFUSED},
    C.REVEALED: {},
    C.REFUSED: {},
}

S, SE = ServerState, ServerEvent
_LOST = {SE.SESSION_LOST: S.ABORTED}
SERVER_TRANSITIONS: dict[ServerState, dict[ServerEvent, ServerState]] = {
    S.ADVERTISING: {SE.ROSTER_CLOSED: S.SHARING, **_LOST},
    S.SHARING: {SE.SHARES_CLOSED: S.MASKING, **_LOST},
    S.MASKING: {SE.VECTORS_CLOSED: S.AGREEING, **_LOST},
    S.AGREEING: {SE.SURVIVORS_AGREED: S.UNMASKING, **_LOST},
    S.UNMASKING: {SE.SUM_RECOVERED: S.SUMMED, **_LOST},
    S.SUMMED: {},
    S.ABORTED: {},
}


def next_client_state(state: ClientState, event: ClientEvent) -> ClientState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in CLIENT_TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a device's part that is {state}")
    return CLIENT_TRANSITIONS[state][event]


def next_server_state(state: ServerState, event: ServerEvent) -> ServerState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in SERVER_TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a secure sum that is {state}")
    return SERVER_TRANSITIONS[state][event]
