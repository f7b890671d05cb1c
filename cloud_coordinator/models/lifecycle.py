"""The life of one model version. All that may change its state is here; nothing does I/O."""

from enum import StrEnum

from shared.errors import IllegalTransitionError


class VersionState(StrEnum):
    """Where a version is between a run's last round and the devices."""

    CANDIDATE = "candidate"  # a run ended with these parameters; nothing is exported yet
    COMPRESSED = "compressed"  # variants are built and measured, one is chosen
    SIGNED = "signed"  # the manifest is signed; devices may be told to serve it
    CURRENT = "current"  # what devices of its model should serve
    SUPERSEDED = "superseded"  # another version of its model became current; it may come back
    REJECTED = "rejected"  # it cannot be built or does not compute what was trained; terminal


class VersionEvent(StrEnum):
    """What may happen to a version."""

    VARIANTS_BUILT = "variants_built"
    MANIFEST_SIGNED = "manifest_signed"
    MADE_CURRENT = "made_current"
    REPLACED = "replaced"
    BUILD_REFUSED = "build_refused"


S, E = VersionState, VersionEvent  # short names keep the table readable
TRANSITIONS: dict[VersionState, dict[VersionEvent, VersionState]] = {
    S.CANDIDATE: {E.VARIANTS_BUILT: S.COMPRESSED, E.BUILD_REFUSED: S.REJECTED},
    S.COMPRESSED: {E.MANIFEST_SIGNED: S.SIGNED, E.BUILD_REFUSED: S.REJECTED},
    S.SIGNED: {E.MADE_CURRENT: S.CURRENT},
    S.CURRENT: {E.REPLACED: S.SUPERSEDED},
    S.SUPERSEDED: {E.MADE_CURRENT: S.CURRENT},
    S.REJECTED: {},
}


def next_state(state: VersionState, event: VersionEvent) -> VersionState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a model version that is {state}")
    return TRANSITIONS[state][event]
