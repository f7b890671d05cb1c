"""Which signed answers the coordinator believes: the door between a transport and the sum.

What carries a message may garble it, so a wrong signature changes nothing. Whoever *signed*
nonsense is out, by name.
"""

import hashlib
from typing import NoReturn, TypeVar

from shared.errors import PeerError
from shared.secure_sum.config import SumConfig
from shared.secure_sum.lifecycle import ServerState
from shared.secure_sum.messages import SignedAnswer, Stage, Struct, check_answer, decode, encode
from shared.secure_sum.roster import SumRoster
from shared.secure_sum.server_memory import Blame, ServerMemory
from shared.signing import VerifyingKey

OPEN_AT: dict[Stage, ServerState] = {
    "advertise": ServerState.ADVERTISING,
    "share": ServerState.SHARING,
    "mask": ServerState.MASKING,
    "consent": ServerState.AGREEING,
    "reveal": ServerState.UNMASKING,
}
_ORDER = list(ServerState)

T = TypeVar("T", bound=Struct)


class Intake:
    """Reads answers into a session's memory, and keeps there who left and who lied.

    Attributes:
        config: of the session.
        memory: shared with the state machine, which alone changes its state.
        roster: U1 once it is fixed.
    """

    def __init__(self, config: SumConfig, memory: ServerMemory) -> None:
        self.config, self.memory = config, memory
        self.roster: SumRoster | None = None
        if memory.roster.entries:
            self.fix_roster()

    def fix_roster(self) -> SumRoster:
        """Compute what follows from the roster in memory."""
        self.roster = SumRoster.of(self.config, self.memory.config_digest, self.memory.roster)
        return self.roster

    def asked(self) -> frozenset[str]:
        """Return whose answers the open stage is for."""
        memory = self.memory
        match memory.state:
            case ServerState.ADVERTISING | ServerState.SHARING:
                return frozenset(memory.identities)
            case ServerState.MASKING:
                places = frozenset(memory.dealings)
            case ServerState.AGREEING:
                places = frozenset(memory.masked)
            case ServerState.UNMASKING:
                places = frozenset(memory.consents)
            case _:
                places = frozenset()
        return frozenset(memory.roster.entries[place].device_id for place in places)

    def accepts(self, answer: SignedAnswer, stage: Stage) -> bool:
        """Say whether to read this answer's body; raise PeerError where it must not be."""
        memory, device_id = self.memory, answer.device_id
        late = _ORDER.index(memory.state) > _ORDER.index(OPEN_AT[stage])
        if late or device_id in memory.left:
            return False
        if memory.state is not OPEN_AT[stage]:
            raise PeerError(f"{device_id} answers a stage that is not open yet")
        if answer.session != self.config.session or device_id not in self.asked():
            raise PeerError(f"{device_id} is not asked in this session")
        if device_id in memory.answered:
            if memory.answered[device_id] == _digest_of(answer):
                return False
            raise PeerError(f"{device_id} gave two different answers to {stage!r}")
        self._verify(answer)
        if answer.refusal:
            self.drop(device_id, f"refused: {answer.refusal}")
            return False
        if answer.stage != stage:
            raise PeerError(f"{device_id} answers {answer.stage!r} where {stage!r} is open")
        return True

    def _verify(self, answer: SignedAnswer) -> None:
        key = VerifyingKey(self.memory.identities[answer.device_id])
        config_digest = self.memory.config_digest
        expected = self.roster.digest if self.roster else b""
        try:
            check_answer(answer, key, config_digest=config_digest, roster_digest=expected)
        except PeerError:
            # Who refuses a roster, or forgot the session, has none to sign.
            if not answer.refusal:
                raise
            check_answer(answer, key, config_digest=config_digest, roster_digest=b"")

    def body(self, answer: SignedAnswer, kind: type[T]) -> T:
        """Read a signed body; peers rebuild what was signed, so there is one way to write it."""
        try:
            body = decode(answer.body, kind)
        except PeerError:
            body = None
        if body is None or encode(body) != answer.body:
            self.reject(answer, f"signed something that is no {kind.__name__}")
        return body

    def count(self, answer: SignedAnswer) -> bool:
        """Remember an answer that was taken, so that it may come again; return True."""
        self.memory.answered[answer.device_id] = _digest_of(answer)
        return True

    def reject(self, answer: SignedAnswer, cause: str) -> NoReturn:
        """Put out a device that signed nonsense: no carrier can have forged that."""
        self.blame(Blame(answer.device_id, cause))
        self.drop(answer.device_id, cause)
        raise PeerError(f"{answer.device_id} {cause}")

    def blame(self, blame: Blame) -> None:
        """Name who did not keep to the protocol, once."""
        if blame not in self.memory.blamed:
            self.memory.blamed.append(blame)

    def drop(self, device_id: str, cause: str) -> None:
        """Wait no more for a device; what it contributed before stays."""
        self.memory.left.setdefault(device_id, cause)


def _digest_of(answer: SignedAnswer) -> bytes:
    return hashlib.sha256(encode(answer)).digest()
