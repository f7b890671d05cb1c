"""The life of one model version. All that may change its state is here; nothing does I/O."""

from enum import StrEnum

from shared.errors import IllegalTransitionError


class VersionState(StrEnum):
    """Where a version is between a run's last round and the devices."""

    CANDIDATE = "candidate"  # a run ended with these parameters; nothing is exported yet
    COMPRESSED = "compressed"  # variants are built and measured, one is chosen
    JUDGED = "judged"  # devices judged the variants, and some passed every gate
    SIGNED = "signed"  # the manifest is signed; devices may be told to serve it
    CANARY = "canary"  # the first wave of a rollout serves it
    ROLLING = "rolling"  # later waves serve it as well
    CURRENT = "current"  # what devices of its model should serve
    SUPERSEDED = "superseded"  # another version of its model became current; it may come back
    ROLLED_BACK = "rolled_back"  # devices that served it went back; a person may try it again
    REJECTED = "rejected"  # it cannot be built, or no variant of it is good enough; terminal


class VersionEvent(StrEnum):
    """What may happen to a version."""

    VARIANTS_BUILT = "variants_built"
    JUDGED_FIT = "judged_fit"
    GATES_FAILED = "gates_failed"
    MANIFEST_SIGNED = "manifest_signed"
    ROLLOUT_BEGAN = "rollout_began"
    ROLLOUT_WIDENED = "rollout_widened"
    MADE_CURRENT = "made_current"
    TURNED_BACK = "turned_back"
    REPLACED = "replaced"
    BUILD_REFUSED = "build_refused"


S, E = VersionState, VersionEvent  # short names keep the table readable
TRANSITIONS: dict[VersionState, dict[VersionEvent, VersionState]] = {
    S.CANDIDATE: {E.VARIANTS_BUILT: S.COMPRESSED, E.BUILD_REFUSED: S.REJECTED},
    S.COMPRESSED: {
        E.JUDGED_FIT: S.JUDGED,
        E.GATES_FAILED: S.REJECTED,
        E.MANIFEST_SIGNED: S.SIGNED,
        E.BUILD_REFUSED: S.REJECTED,
    },
    S.JUDGED: {E.MANIFEST_SIGNED: S.SIGNED},
    S.SIGNED: {E.ROLLOUT_BEGAN: S.CANARY},
    S.CANARY: {
        E.ROLLOUT_WIDENED: S.ROLLING,
        E.MADE_CURRENT: S.CURRENT,
        E.TURNED_BACK: S.ROLLED_BACK,
    },
    S.ROLLING: {E.MADE_CURRENT: S.CURRENT, E.TURNED_BACK: S.ROLLED_BACK},
    S.CURRENT: {E.REPLACED: S.SUPERSEDED},
    S.SUPERSEDED: {E.ROLLOUT_BEGAN: S.CANARY},
    S.ROLLED_BACK: {E.ROLLOUT_BEGAN: S.CANARY},
    S.REJECTED: {},
}


def next_state(state: VersionState, event: VersionEvent) -> VersionState:
    """Return the state after ``event``; raise IllegalTransitionError where the table has none."""
    if event not in TRANSITIONS[state]:
        raise IllegalTransitionError(f"{event} cannot happen to a model version that is {state}")
    return TRANSITIONS[state][event]
