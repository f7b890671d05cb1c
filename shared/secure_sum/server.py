"""The coordinator's part in one secure sum: take answers, close stages, unmask; pure, without I/O.

It keeps one sum, never a list of vectors: each is added as it arrives. Stages are closed by the
caller, who knows how long to wait; a stage that is closed with too few ends the session, and nobody
learns a sum. Which answers are believed is intake.py; what is remembered, server_memory.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn, Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import ConfigError, IllegalTransitionError, PeerError, QuorumError, ShoalError
from shared.membership import Member
from shared.secure_sum.config import SumConfig, check_roster_size, decode_config, encode_config
from shared.secure_sum.intake import Intake
from shared.secure_sum.keys import agree, open_sealed_to
from shared.secure_sum.lane_shape import empty_lanes, lanes_fit
from shared.secure_sum.lifecycle import ServerEvent, ServerState, next_server_state
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import (
    Advertised,
    Boxes,
    Consent,
    Masked,
    Received,
    Roster,
    RosterEntry,
    Shared,
    SignedAnswer,
    Survivors,
    Unmask,
    dealers_in,
)
from shared.secure_sum.roster import SumRoster
from shared.secure_sum.rules import bitmap_of, blame_for_bad_boxes
from shared.secure_sum.server_memory import (
    Blame,
    Dealing,
    ServerMemory,
    decode_snapshot,
    encode_snapshot,
)
from shared.secure_sum.unmasking import BadDealerError, Unmasking

S, E = ServerState, ServerEvent


@dataclass(frozen=True, slots=True)
class SumResult:
    """What came out: the sum of the survivors' encodings, each lane modulo its width."""

    lanes: Lanes
    survivors: tuple[str, ...]
    roster: tuple[str, ...]
    blamed: tuple[Blame, ...]
    threshold: int  # t
    corrupted: int  # c


class SumServer:
    """A state machine per session.

    Every ``take_…`` returns whether the answer counts. It does not if it is late (it is not even
    read), was taken before, is a refusal, or is from a device that is out. It raises PeerError if
    the answer is none of this session and stage, contradicts an earlier one or is nonsense.

    Every ``close_…`` raises QuorumError if there are too few; then the session is ABORTED.
    """

    def __init__(
        self,
        config: SumConfig,
        config_digest: bytes,
        *,
        members: Mapping[str, Member],
        server_key: X25519PrivateKey,
        invited: Iterable[str] | None = None,
        threads: int = 1,
    ) -> None:
        """Begin a session.

        Args:
            config: as it was signed.
            config_digest: of the signed bytes, `config.digest_of`.
            members: the membership list that the configuration names.
            server_key: the private half of the configuration's ``server_key``.
            invited: who is asked; all members if not said.
            threads: to expand masks with.
        """
        asked = members.keys() if invited is None else invited
        memory = ServerMemory(
            config=encode_config(config),
            config_digest=config_digest,
            server_key=server_key.private_bytes_raw(),
            identities={device_id: members[device_id].key.raw for device_id in asked},
        )
        self._begin(memory, None, threads)

    def _begin(self, memory: ServerMemory, total: Lanes | None, threads: int) -> None:
        self._memory, self._sum, self._threads = memory, total, threads
        self._config = decode_config(memory.config)
        self._server_key = X25519PrivateKey.from_private_bytes(memory.server_key)
        self._intake = Intake(self._config, memory)
        self._advertised: dict[str, RosterEntry] = {}  # in order of arrival
        self._boxes: dict[int, Shared] = {}  # by dealer, until they are handed out
        self._unmasking: Unmasking | None = None

    def __repr__(self) -> str:
        return f"SumServer(state={self.state.value!r}, out={len(self.waiting_for)})"

    @property
    def state(self) -> ServerState:
        """Return which answers are taken."""
        return self._memory.state

    @property
    def cause(self) -> str:
        """Return why the session was aborted."""
        return self._memory.cause

    @property
    def blamed(self) -> tuple[Blame, ...]:
        """Return who did not keep to the protocol so far."""
        return tuple(self._memory.blamed)

    @property
    def left(self) -> Mapping[str, str]:
        """Return who is not waited for any more, and why."""
        return dict(self._memory.left)

    @property
    def waiting_for(self) -> frozenset[str]:
        """Return the devices whose answer to the open stage is still out."""
        return self._intake.asked() - self._memory.answered.keys() - self._memory.left.keys()

    @property
    def roster(self) -> tuple[str, ...]:
        """Return the device ids of U1; none before it is fixed."""
        return tuple(entry.device_id for entry in self._memory.roster.entries)

    @property
    def masked(self) -> tuple[str, ...]:
        """Return the devices whose vectors are in the sum so far."""
        return tuple(self.roster[place] for place in sorted(self._memory.masked))

    @property
    def signatures_needed(self) -> int:
        """Return with how many consents the survivors' masks can be removed."""
        return max(self._known().consents_needed, self._known().threshold + 1)

    @property
    def enough_revealed(self) -> bool:
        """Say whether `finish` needs no further share: what came rebuilds every secret.

        Raises:
            PeerError: a dealer's own shares do not rebuild what it promised; the session is over.
        """
        return self.state is S.UNMASKING and self._rebuild()

    def drop(self, device_id: str, cause: str) -> None:
        """Wait no more for a device that left; what it contributed before stays."""
        self._intake.drop(device_id, cause)

    def abort(self, cause: str) -> None:
        """End the session without a sum."""
        if self.state not in (S.SUMMED, S.ABORTED):
            self._memory.cause = cause
            self._move(E.SESSION_LOST)

    # --- S0 --------------------------------------------------------------------------------------

    def take_advertised(self, answer: SignedAnswer) -> bool:
        """Take a device's fresh keys; unusable ones would make all others refuse the roster."""
        if not self._intake.accepts(answer, "advertise"):
            return False
        advertised = self._intake.body(answer, Advertised)
        keys = {advertised.mask_key, advertised.box_key}
        known = {
            key for entry in self._advertised.values() for key in (entry.mask_key, entry.box_key)
        }
        if len(keys) < 2 or keys & known:
            self._intake.reject(answer, "advertised a key that is there already")
        try:
            for key in keys:
                agree(self._server_key, key)
        except PeerError:
            self._intake.reject(answer, "advertised a key that everybody could compute with")
        if len(self._advertised) >= self._config.max_roster:
            self.drop(answer.device_id, "the roster was full")
            return False
        self._advertised[answer.device_id] = RosterEntry(
            answer.device_id, advertised.mask_key, advertised.box_key, answer.signature
        )
        return self._intake.count(answer)

    def close_advertising(self) -> Roster:
        """Fix U1; its devices are asked for shares next.

        Raises:
            QuorumError: too few.
            ConfigError: no roster of a size that the configuration allows could end in a sum.
        """
        self._expect(S.ADVERTISING)
        here = sorted(self._advertised.keys() - self._memory.left.keys())
        try:
            check_roster_size(self._config, len(here))
        except PeerError:
            self._lose(_too_few(self._config, len(here)))
        memory = self._memory
        memory.roster = Roster(tuple(self._advertised[device_id] for device_id in here))
        memory.identities = {device_id: memory.identities[device_id] for device_id in here}
        self._advertised.clear()
        self._intake.fix_roster()
        self._move(E.ROSTER_CLOSED)
        return memory.roster

    # --- S1 --------------------------------------------------------------------------------------

    def take_shared(self, answer: SignedAnswer) -> bool:
        """Take a device's boxes: one for every peer, in order of place."""
        if not self._intake.accepts(answer, "share"):
            return False
        shared, place = self._intake.body(answer, Shared), self._known().place_of(answer.device_id)
        peers = [peer for peer in range(len(self._known())) if peer != place]
        if [dealt.to for dealt in shared.dealt] != peers:
            self._intake.reject(answer, "did not deal one share to each peer")
        self._boxes[place] = shared
        self._memory.dealings[place] = Dealing.of(shared)
        return self._intake.count(answer)

    def close_sharing(self) -> dict[str, Boxes]:
        """Fix U2, return what each of its devices is asked next, and forget the boxes."""
        self._expect(S.SHARING)
        ids, memory = self._known().device_ids, self._memory
        memory.dealings = {
            place: dealing
            for place, dealing in sorted(memory.dealings.items())
            if ids[place] not in memory.left
        }
        self._require(len(memory.dealings), self._known().survivors_needed, "devices' shares")
        questions = {ids[place]: self._boxes_for(place) for place in memory.dealings}
        self._boxes.clear()
        self._sum = empty_lanes(self._config)
        self._move(E.SHARES_CLOSED)
        return questions

    def _boxes_for(self, receiver: int) -> Boxes:
        found = [
            (dealer, self._boxes[dealer].dealt[receiver - (receiver > dealer)])
            for dealer in self._memory.dealings
            if dealer != receiver
        ]
        return Boxes(
            tuple(
                Received(dealer, dealt.box, dealt.seed_share_commitment, dealt.key_share_commitment)
                for dealer, dealt in found
            )
        )

    # --- S2 --------------------------------------------------------------------------------------

    def take_masked(self, answer: SignedAnswer, lanes: Lanes) -> bool:
        """Add a masked vector to the sum; the caller may then forget it."""
        if not self._intake.accepts(answer, "mask"):
            return False
        masked, place = self._intake.body(answer, Masked), self._known().place_of(answer.device_id)
        if lanes.digest() != masked.lanes_digest:  # the lanes themselves are not signed
            raise PeerError(f"{answer.device_id} signed another vector than the one that came")
        if not lanes_fit(self._config, lanes):
            self._intake.reject(answer, "sent a vector of another type or length")
        bad, total = frozenset(masked.bad_boxes), self._sum
        if len(bad) != len(masked.bad_boxes) or not bad <= self._memory.dealings.keys() - {place}:
            self._intake.reject(answer, "complained of boxes that it did not get")
        assert total is not None
        np.add(total.main, lanes.main, out=total.main)
        np.add(total.exact, lanes.exact, out=total.exact)
        self._memory.masked.add(place)
        if bad:
            self._memory.bad_boxes[place] = tuple(sorted(bad))
        return self._intake.count(answer)

    def close_masking(self) -> Survivors:
        """Fix U3, the devices whose vectors are in the sum; they are asked to sign that."""
        self._expect(S.MASKING)
        memory, roster = self._memory, self._known()
        for place, cause in blame_for_bad_boxes(memory.bad_boxes, roster.corrupted).items():
            self._intake.blame(Blame(roster.device_ids[place], cause))
        self._require(len(memory.masked), roster.survivors_needed, "vectors")
        self._move(E.VECTORS_CLOSED)
        return self._survivors()

    # --- S2c -------------------------------------------------------------------------------------

    def take_consent(self, answer: SignedAnswer) -> bool:
        """Take a device's signature of the survivors."""
        if not self._intake.accepts(answer, "consent"):
            return False
        if self._intake.body(answer, Survivors) != self._survivors():
            self._intake.reject(answer, "signed other survivors than it was asked to")
        place = self._known().place_of(answer.device_id)
        self._memory.consents[place] = answer.signature
        return self._intake.count(answer)

    def close_consent(self) -> Unmask:
        """Return the last question, for those who signed; no more signatures than are needed."""
        self._expect(S.AGREEING)
        # Only who signed reveals, and its own secret needs t others.
        self._require(len(self._memory.consents), self.signatures_needed, "signatures")
        self._move(E.SURVIVORS_AGREED)
        return self._unmask()

    # --- S3 --------------------------------------------------------------------------------------

    def take_revealed(self, answer: SignedAnswer) -> bool:
        """Take one device's shares: a seed's of each survivor, a key's of each dropped device."""
        if not self._intake.accepts(answer, "reveal"):
            return False
        roster, memory = self._known(), self._memory
        place = roster.place_of(answer.device_id)
        try:
            associated = roster.revealed_to_server(answer.device_id)
            revealed = open_sealed_to(self._server_key, answer.body, associated=associated)
        except PeerError:
            self._intake.reject(answer, "revealed something unreadable")
        wanted = memory.dealings.keys() - {place, *memory.bad_boxes.get(place, ())}
        if dealers_in(revealed, len(roster)) != wanted:
            self._intake.reject(answer, "did not reveal one share of each peer")
        memory.revealed[place] = revealed
        return self._intake.count(answer)

    def finish(self) -> SumResult:
        """Rebuild the secrets, remove the masks that are left, and return the sum.

        Raises:
            QuorumError: a secret has too few good shares; the session is ABORTED.
            PeerError: a dealer's own shares do not rebuild what it promised; likewise.
        """
        self._expect(S.UNMASKING)
        roster, memory = self._known(), self._memory
        if not self._rebuild():
            lacking = self._shares().lacking()
            assert lacking is not None
            dealer = roster.device_ids[lacking[0]]
            self._require(lacking[1], roster.threshold, f"shares of {dealer}")
        lanes = self._sum
        assert lanes is not None
        self._shares().remove_masks(lanes, self._config.mask_algorithm, threads=self._threads)
        self._move(E.SUM_RECOVERED)
        return SumResult(
            lanes=lanes,
            survivors=tuple(roster.device_ids[place] for place in sorted(memory.masked)),
            roster=roster.device_ids,
            blamed=self.blamed,
            threshold=roster.threshold,
            corrupted=roster.corrupted,
        )

    # --- crashes ---------------------------------------------------------------------------------

    def snapshot(self) -> bytes:
        """Return all that `restore` needs, the private key included: keep it from others' eyes.

        Raises:
            IllegalTransitionError: there is no sum yet, or the session is over.
        """
        if self._sum is None:
            raise IllegalTransitionError(f"a secure sum that is {self.state} has no snapshot")
        return encode_snapshot(self._memory, self._sum)

    @classmethod
    def restore(cls, snapshot: bytes, *, threads: int = 1) -> Self:
        """Go on where a snapshot was taken; devices that were not asked yet can be asked then.

        Raises:
            UnavailableError: the snapshot is damaged.
        """
        stored = decode_snapshot(snapshot)
        server = cls.__new__(cls)
        server._begin(stored.memory, stored.lanes(), threads)  # noqa: SLF001 - it is our own
        return server

    def question(self) -> Survivors | Unmask:
        """Return what the devices of the open stage are asked: after `restore`, once more.

        Raises:
            IllegalTransitionError: not while AGREEING or UNMASKING.
        """
        if self.state is S.AGREEING:
            return self._survivors()
        self._expect(S.UNMASKING)
        return self._unmask()

    # --- what all stages need --------------------------------------------------------------------

    def _known(self) -> SumRoster:
        assert self._intake.roster is not None, "no stage needs it before S1"
        return self._intake.roster

    def _survivors(self) -> Survivors:
        return Survivors(bitmap_of(self._memory.masked, len(self._known())))

    def _unmask(self) -> Unmask:
        chosen = sorted(self._memory.consents.items())[: self._known().consents_needed]
        return Unmask(self._survivors(), tuple(Consent(*consent) for consent in chosen))

    def _shares(self) -> Unmasking:
        if self._unmasking is None:
            memory = self._memory
            self._unmasking = Unmasking(
                self._known(),
                memory.dealings,
                survivors=frozenset(memory.masked),
                revealed=memory.revealed,
            )
        return self._unmasking

    def _rebuild(self) -> bool:
        shares = self._shares()
        try:
            return shares.rebuild()
        except BadDealerError as error:
            self._intake.blame(error.blame)
            self._lose(error)
        finally:
            for liar in shares.liars:
                self._intake.blame(liar)

    def _expect(self, state: ServerState) -> None:
        if self.state is not state:
            raise IllegalTransitionError(f"a secure sum that is {self.state} is not {state}")

    def _require(self, have: int, needed: int, of_what: str) -> None:
        if have < needed:
            self._lose(
                QuorumError(
                    self._config.round_number, survivors=have, quorum=needed, of_what=of_what
                )
            )

    def _lose(self, error: ShoalError) -> NoReturn:
        self.abort(str(error))
        raise error

    def _move(self, event: ServerEvent) -> None:
        memory = self._memory
        memory.state = next_server_state(memory.state, event)
        memory.answered = {}
        if memory.state in (S.SUMMED, S.ABORTED):
            self._sum = self._unmasking = None
            self._boxes.clear()
            memory.revealed, memory.dealings, memory.server_key = {}, {}, b""


def _too_few(config: SumConfig, here: int) -> ShoalError:
    """Say how many devices would have been enough."""
    for size in range(here + 1, config.max_roster + 1):
        try:
            check_roster_size(config, size)
        except PeerError:
            continue
        return QuorumError(config.round_number, survivors=here, quorum=size, of_what="devices")
    return ConfigError(
        f"{here} devices cannot make this sum, and neither can up to {config.max_roster}; "
        f"raise max_roster, or lower drop_fraction"
    )
