"""One device's part in one secure sum: it answers five questions, or it refuses; pure, without I/O.

Follows Bell et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020,
on the complete graph, with the round of signed survivors of Bonawitz et al., CCS 2017, that nobody
can switch off. The device takes nothing on trust that it can check or compute by itself, says one
thing only at each stage, and forgets its secrets as soon as it has said the last or refused.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

from shared.errors import PeerError
from shared.membership import Member
from shared.secure_sum.config import SumConfig
from shared.secure_sum.dealing import deal_secrets, masks_of, open_shares
from shared.secure_sum.keys import SessionSecrets, agree, seal_to
from shared.secure_sum.lane_shape import lanes_fit
from shared.secure_sum.lifecycle import ClientEvent, ClientState, next_client_state
from shared.secure_sum.masking import Lanes, apply_masks
from shared.secure_sum.messages import (
    Advertised,
    Boxes,
    Masked,
    Question,
    Roster,
    SignedAnswer,
    Stage,
    Survivors,
    Unmask,
    encode,
    join_shares,
    sign_answer,
    signed_bytes,
)
from shared.secure_sum.roster import SumRoster, check_entries
from shared.secure_sum.rules import (
    check_dealers,
    check_survivors,
    places_in,
    shares_to_reveal,
)
from shared.signing import SigningKey

S, E = ClientState, ClientEvent
_STEPS: dict[Stage, tuple[ClientState, ClientEvent]] = {  # where a stage is answered, and what then
    "advertise": (S.OPENED, E.KEYS_ADVERTISED),
    "share": (S.ADVERTISED, E.SHARES_DEALT),
    "mask": (S.SHARED, E.VECTOR_MASKED),
    "consent": (S.MASKED, E.SURVIVORS_SIGNED),
    "reveal": (S.CONSENTED, E.SHARES_REVEALED),
}


class SumClient:
    """A state machine per session; the shell around it carries, persists and limits.

    A question that breaks a rule ends the session: the state is REFUSED, the secrets are wiped and
    the error says why, without a word about data or secrets. A question that comes too early, or
    another one than was answered before, changes nothing.

    Attributes:
        state: what was said last.
    """

    def __init__(
        self,
        config: SumConfig,
        config_digest: bytes,
        *,
        device_id: str,
        identity: SigningKey,
        members: Mapping[str, Member],
        check_roster: Callable[[Sequence[Member]], None] = lambda _: None,
        secrets: SessionSecrets | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
        threads: int = 1,
    ) -> None:
        """Take part in a session whose configuration this device's owner allows.

        Args:
            config: opened and found within the owner's policy by the caller.
            config_digest: of the signed bytes as they were received, `config.digest_of`.
            device_id: our own.
            identity: what we sign with; peers know its public half from the membership list.
            members: who may be in a roster, ourselves included.
            check_roster: raises PolicyError for a roster that the owner does not accept.
            secrets: of this session alone; drawn from ``entropy`` if there are none.
            entropy: returns that many random bytes.
            threads: for the masks.
        """
        self.state = S.OPENED
        self._config, self._config_digest = config, config_digest
        self._device_id, self._identity, self._members = device_id, identity, members
        self._check_roster, self._entropy, self._threads = check_roster, entropy, threads
        self._secrets: SessionSecrets | None = secrets or SessionSecrets.new(entropy)
        self._answered: dict[str, tuple[Question | None, SignedAnswer]] = {}
        self._refusals: dict[tuple[str, str], SignedAnswer] = {}
        self._roster: SumRoster | None = None
        self._place = -1
        self._box_secrets: dict[int, bytes] = {}  # by peer, agreed at S1
        self._sharing: frozenset[int] = frozenset()  # U2
        self._received: dict[int, tuple[bytes, bytes]] = {}  # by dealer: share of seed, and of key
        self._lanes_digest = b""  # of the masked vector
        self._survivors: tuple[Survivors, frozenset[int]] | None = None

    def __repr__(self) -> str:
        return f"SumClient({self._device_id!r}, state={self.state.value!r})"

    @property
    def roster(self) -> tuple[str, ...]:
        """Return the device ids of U1; none before S1."""
        return self._roster.device_ids if self._roster else ()

    @property
    def survivors(self) -> tuple[str, ...]:
        """Return the device ids of U3, which this device signed; none before S2c."""
        if self._survivors is None:
            return ()
        return tuple(self.roster[place] for place in sorted(self._survivors[1]))

    # --- the five stages; each raises PeerError, `share` also PolicyError ------------------------

    def advertise(self) -> SignedAnswer:
        """S0: say our fresh keys, signed together with what we were asked."""
        return self._answer("advertise", None, self._advertise)

    def share(self, roster: Roster) -> SignedAnswer:
        """S1: accept the roster and deal both secrets to our peers."""
        return self._answer("share", roster, lambda: self._share(roster))

    def mask(self, boxes: Boxes, lanes: Lanes) -> SignedAnswer:
        """S2: mask ``lanes`` in place, and sign what they hash to then; they are spent.

        To repeat this answer needs the masked lanes: the machine does not keep them.

        Raises:
            PeerError: as everywhere; or asked once more about lanes that are not those.
            ValueError: the lanes are not of the configuration's type and shape; nothing changed.
        """
        if not lanes_fit(self._config, lanes):
            raise ValueError("the lanes are not of the type and shape of the configuration")
        if not (lanes.main.flags.writeable and lanes.exact.flags.writeable):
            raise ValueError("lanes are masked in place, but these are read-only")
        answer = self._answer("mask", boxes, lambda: self._mask(boxes, lanes))
        if lanes.digest() != self._lanes_digest:
            raise PeerError("one vector was masked in this session already; it is spent")
        return answer

    def consent(self, survivors: Survivors) -> SignedAnswer:
        """S2c: sign whose vectors are in the sum; once, so that there is only one such set."""
        return self._answer("consent", survivors, lambda: self._consent(survivors))

    def reveal(self, unmask: Unmask) -> SignedAnswer:
        """S3: reveal one share of each peer, sealed to the session's server key; then wiped."""
        answer = self._answer("reveal", unmask, lambda: self._reveal(unmask))
        self._forget()
        return answer

    def refuse(self, stage: Stage, reason: str) -> SignedAnswer:
        """Say no with a reason that says nothing of the data; this ends the session.

        Raises:
            PeerError: everything was said already.
        """
        if self.state is S.REVEALED:
            raise PeerError("this session has ended; there is nothing left to refuse")
        self._end()
        reason = reason[:500] or "refused"
        if (stage, reason) not in self._refusals:
            self._refusals[stage, reason] = self._sign(stage, b"", reason)
        return self._refusals[stage, reason]

    def expire(self, now: datetime) -> bool:
        """End the session if the configuration's time is over at ``now``, aware UTC."""
        if expired := now >= self._config.expires_at:
            self.wipe()
        return expired

    def wipe(self) -> None:
        """End the session and forget all of it, answers included."""
        self._end()
        self._answered.clear()

    # --- what each stage checks and says ---------------------------------------------------------

    def _advertise(self) -> bytes:
        secrets = self._own_secrets()
        return encode(Advertised(mask_key=secrets.mask_public, box_key=secrets.box_public))

    def _share(self, roster: Roster) -> bytes:
        check_entries(self._config, self._config_digest, roster, self._members)
        known = SumRoster.of(self._config, self._config_digest, roster)
        place, secrets = known.place_of(self._device_id), self._own_secrets()
        own, said = known.entries[place], self._answered["advertise"][1]
        if (own.mask_key, own.box_key, own.signature) != (
            secrets.mask_public,
            secrets.box_public,
            said.signature,
        ):
            raise PeerError("the roster shows other keys than ours under our name")
        self._check_roster([self._members[device_id] for device_id in known.device_ids])
        for peer, entry in enumerate(known.entries):
            if peer != place:
                self._box_secrets[peer] = agree(secrets.box_private, entry.box_key)
        self._roster, self._place = known, place
        shared = deal_secrets(
            known, place, secrets, box_secrets=self._box_secrets, entropy=self._entropy
        )
        return encode(shared)

    def _mask(self, boxes: Boxes, lanes: Lanes) -> bytes:
        roster = self._known_roster()
        self._sharing = check_dealers(
            self._place,
            [received.dealer for received in boxes.boxes],
            roster_size=len(roster),
            survivors_needed=roster.survivors_needed,
        )
        # The dealer of a bad box stays in U2, so that masks cancel; we just have no shares of it.
        for received in boxes.boxes:
            secret = self._box_secrets[received.dealer]
            if shares := open_shares(roster, self._place, received, secret):
                self._received[received.dealer] = shares
        peers, algorithm = sorted(self._sharing - {self._place}), self._config.mask_algorithm
        masks = masks_of(roster, self._place, peers, self._own_secrets(), algorithm)
        apply_masks(lanes, masks, algorithm, threads=self._threads)
        # From here on only the shares of others are needed: nobody can take our own from us.
        self._own_secrets().wipe()
        self._secrets = None
        self._box_secrets.clear()
        self._lanes_digest = lanes.digest()
        bad = tuple(peer for peer in peers if peer not in self._received)
        return encode(Masked(lanes_digest=self._lanes_digest, bad_boxes=bad))

    def _consent(self, survivors: Survivors) -> bytes:
        roster = self._known_roster()
        places = places_in(survivors.bitmap, len(roster))
        check_survivors(
            self._place, self._sharing, places, survivors_needed=roster.survivors_needed
        )
        self._survivors = survivors, places
        return encode(survivors)

    def _reveal(self, unmask: Unmask) -> bytes:
        roster = self._known_roster()
        if self._survivors is None or unmask.survivors != self._survivors[0]:
            raise PeerError("these are not the survivors that this device signed")
        self._check_consents(roster, unmask)
        kinds = shares_to_reveal(self._place, self._sharing, self._survivors[1])
        shares = {
            dealer: self._received[dealer][0 if kind == "seed" else 1]
            for dealer, kind in kinds.items()
            if dealer in self._received
        }
        return seal_to(
            self._config.server_key,
            join_shares(shares, roster_size=len(roster)),
            associated=roster.revealed_to_server(self._device_id),
        )

    def _check_consents(self, roster: SumRoster, unmask: Unmask) -> None:
        places = {consent.place for consent in unmask.consents}
        if len(places) != len(unmask.consents) or any(place >= len(roster) for place in places):
            raise PeerError("a consent is there twice, or of nobody in the roster")
        if len(places) < roster.consents_needed:
            raise PeerError(
                f"{len(places)} of the roster signed the survivors, of {roster.consents_needed}"
            )
        body = encode(unmask.survivors)
        for consent in unmask.consents:
            device_id = roster.entries[consent.place].device_id
            try:
                self._members[device_id].key.verify(
                    consent.signature, self._signed_bytes("consent", body, device_id=device_id)
                )
            except PeerError as error:
                raise PeerError(f"{device_id} did not sign these survivors") from error

    # --- how each stage is answered once ---------------------------------------------------------

    def _answer(
        self, stage: Stage, question: Question | None, make_body: Callable[[], bytes]
    ) -> SignedAnswer:
        if stage in self._answered:
            asked, answer = self._answered[stage]
            if asked == question:
                return answer
            raise PeerError(f"another question was answered at the stage {stage!r} already")
        ready, event = _STEPS[stage]
        if self.state is not ready:
            raise PeerError(f"a part in a sum that is {self.state} has no answer to {stage!r}")
        try:
            answer = self._sign(stage, make_body())
        except BaseException:  # whatever it was: half an answer must not be followed by another
            self._end()
            raise
        self.state = next_client_state(self.state, event)
        self._answered[stage] = question, answer
        return answer

    def _sign(self, stage: Stage, body: bytes, refusal: str = "") -> SignedAnswer:
        return sign_answer(
            self._identity,
            session=self._config.session,
            stage=stage,
            config_digest=self._config_digest,
            roster_digest=self._roster.digest if self._roster else b"",
            device_id=self._device_id,
            body=body,
            refusal=refusal,
        )

    def _signed_bytes(self, stage: Stage, body: bytes, *, device_id: str) -> bytes:
        return signed_bytes(
            session=self._config.session,
            stage=stage,
            config_digest=self._config_digest,
            roster_digest=self._known_roster().digest,
            device_id=device_id,
            body=body,
        )

    def _end(self) -> None:
        if self.state not in (S.REVEALED, S.REFUSED):
            self.state = next_client_state(self.state, E.SESSION_REFUSED)
        if self.state is S.REFUSED:
            self._answered.clear()
        self._forget()

    def _forget(self) -> None:
        if self._secrets is not None:
            self._secrets.wipe()
        self._secrets = None
        self._box_secrets.clear()
        self._received.clear()

    def _own_secrets(self) -> SessionSecrets:
        assert self._secrets is not None, "no stage needs them once they are wiped"
        return self._secrets

    def _known_roster(self) -> SumRoster:
        assert self._roster is not None, "no stage needs it before S1"
        return self._roster
