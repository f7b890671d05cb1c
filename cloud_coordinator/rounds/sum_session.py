"""One group's session, from its configuration to its sum, and what a crash must not lose of it."""

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from cloud_coordinator.rounds.pending import PendingGroup
from shared.errors import ShoalError, UnavailableError
from shared.secure_sum.config import SumConfig, decode_config, survivors_needed
from shared.secure_sum.encoding import decode_sum
from shared.secure_sum.lane_shape import MAIN_TYPES
from shared.secure_sum.lifecycle import ServerState
from shared.secure_sum.masking import Lanes
from shared.secure_sum.server import SumServer

_WORTH_KEEPING = {ServerState.MASKING, ServerState.AGREEING, ServerState.UNMASKING}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSum:
    """One group's sum, or why there is none."""

    group: int
    config: SumConfig
    roster: int
    survivors: int = 0
    corrupted: int = 0
    threshold: int = 0
    cause: str = ""
    lanes: Lanes | None = field(default=None, repr=False)

    def decoded(self) -> tuple[NDArray[np.float64], dict[str, float]]:
        """Return the sum of the vectors and of each exact lane; raise PeerError beyond bounds."""
        assert self.lanes is not None
        return decode_sum(self.config, self.lanes, count=self.survivors)


@dataclass(slots=True)
class Session:
    """One group's session while it lives, and its result.

    Attributes:
        group: its number.
        config: as it was signed.
        payload: the bytes that were signed.
        running: the protocol; None once there is a result, or after a crash that lost it.
        names: what the worker's roster calls each device, by device id.
        question: what its devices are asked at the second stage: who takes part.
        roster: devices in it; 0 before that is known.
        cause: why there is no sum; empty while there may be one.
        result: the sum.
    """

    group: int
    config: SumConfig
    payload: bytes
    running: SumServer | None
    names: dict[str, str] = field(default_factory=dict)
    roster: int = 0
    cause: str = ""
    result: GroupSum | None = None
    question: bytes = b""

    @property
    def lives(self) -> bool:
        """Whether stages are left to go through."""
        return self.running is not None and not self.cause

    @property
    def server(self) -> SumServer:
        """The protocol, of a session that has no result yet."""
        assert self.running is not None
        return self.running

    @property
    def survivors_needed(self) -> int:
        """How many devices' vectors must be in the sum."""
        return survivors_needed(self.config, self.roster)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether vectors may have left for it, so that it cannot be begun anew."""
        return self.result is not None or (self.lives and self.server.state in _WORTH_KEEPING)

    def fail(self, error: ShoalError) -> None:
        """Give up."""
        self.cause = str(error)

    def finish(self) -> None:
        """Remove the masks and keep the sum; raises what `SumServer.finish` raises."""
        result = self.server.finish()
        self.result = GroupSum(
            group=self.group,
            config=self.config,
            roster=len(result.roster),
            survivors=len(result.survivors),
            corrupted=result.corrupted,
            threshold=result.threshold,
            lanes=result.lanes,
        )
        self.running = None

    def outcome(self) -> GroupSum:
        """Return the sum, or why there is none."""
        return self.result or GroupSum(
            group=self.group, config=self.config, roster=self.roster, cause=self.cause
        )

    def as_pending(self) -> PendingGroup:
        """Return what a new life needs."""
        kept = PendingGroup(
            group=self.group,
            config=self.payload,
            names=self.names,
            snapshot=self.server.snapshot() if self.lives else b"",
            cause=self.cause,
            roster=self.roster,
        )
        result = self.result
        if result is None or result.lanes is None:
            return kept
        return msgspec.structs.replace(
            kept,
            main=result.lanes.main.tobytes(),
            exact=result.lanes.exact.tobytes(),
            survivors=result.survivors,
            corrupted=result.corrupted,
            threshold=result.threshold,
        )

    @classmethod
    def restored(cls, kept: PendingGroup) -> "Session":
        """Take up what `as_pending` returned; a damaged snapshot is a session without a sum."""
        config = decode_config(kept.config)
        session = cls(kept.group, config, kept.config, None, dict(kept.names), kept.roster)
        session.cause = kept.cause
        if kept.survivors:
            session.result = _as_result(kept, config)
        elif kept.snapshot:
            try:
                session.running = SumServer.restore(kept.snapshot)
            except UnavailableError as error:
                session.fail(error)
        return session


def _as_result(kept: PendingGroup, config: SumConfig) -> GroupSum:
    main: Any = np.frombuffer(kept.main, MAIN_TYPES[config.encoding.lane_bits])
    lanes = Lanes(
        main=main,
        exact=np.frombuffer(kept.exact, np.uint64),
    )
    return GroupSum(
        group=kept.group,
        config=config,
        roster=kept.roster,
        survivors=kept.survivors,
        corrupted=kept.corrupted,
        threshold=kept.threshold,
        lanes=lanes,
    )
