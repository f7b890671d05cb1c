"""This device's part in secure sums: the shell around `SumClient` that checks, books and remembers.

Every value that depends on the owner's data leaves through here. What a coordinator asks is checked
against the signed configuration, the owner's policy and the ledger before anything is trained, and
again when the vector leaves; charge and spent vector are on disk before the masked lanes are handed
out. Secrets and vectors live in this process's memory only: a session whose process ended is lost,
and every question about it is answered by a refusal (R1).

Free of torch and Flower, so that the trainer, stock SuperNodes and the simulation share it. Threads
may share it too.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge_agent.enrolment import load_enrolment
from edge_agent.membership import members_for
from edge_agent.privacy.ledger import Charge
from edge_agent.privacy.lifecycle import SumEvent
from edge_agent.privacy.policy import OwnerPolicy, read_policy
from edge_agent.privacy.proposal import check_membership, check_received, check_time, open_config
from edge_agent.privacy.records import SumRecords
from edge_agent.privacy.sources import DataUse, Part
from shared.errors import ConfigError, PeerError, PolicyError, ShoalError, UnavailableError
from shared.membership import Member
from shared.messages import as_text, utc_now
from shared.secure_sum.client import SumClient
from shared.secure_sum.config import SumConfig
from shared.secure_sum.encoding import encode as encode_vector
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import (
    Boxes,
    Roster,
    SignedAnswer,
    Stage,
    Survivors,
    Unmask,
    decode,
    encode,
    sign_answer,
)

logger = logging.getLogger(__name__)

MembersFor = Callable[[int], Mapping[str, Member]]
_STAGES: tuple[Stage | None, ...] = ("advertise", "share", "mask", "consent", "reveal", None)
_NO_DISK = "this device cannot write its ledger now"  # the coordinator learns no path


@dataclass(frozen=True, slots=True)
class OpenSum:
    """A sum that this device may take part in; the vector is still to be made."""

    config: SumConfig
    config_digest: bytes
    data: DataUse
    members: Mapping[str, Member] = field(repr=False)


@dataclass(slots=True)
class _Session:
    """What of one session lives in memory only."""

    opened: OpenSum
    client: SumClient | None = field(default=None, repr=False)  # from S0 on
    vector: NDArray[Any] | None = field(default=None, repr=False)  # until S2
    exact: Mapping[str, float] = field(default_factory=dict, repr=False)  # until S2
    lanes: Lanes | None = field(default=None, repr=False)  # from S2 on; what left
    said: dict[Stage, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)
    # by stage: SHA-256 of the question, and our answer

    def wipe(self) -> None:
        """Forget the secrets, and the vector in whatever form."""
        if self.client is not None:
            self.client.wipe()
        self.vector, self.exact, self.lanes = None, {}, None
        self.said.clear()


class SecureSums:
    """The sessions of one process, and what the home's database remembers of all."""

    def __init__(
        self,
        home: Path,
        *,
        now: Callable[[], datetime] = utc_now,
        threads: int = 1,
        entropy: Callable[[int], bytes] = os.urandom,
        members: MembersFor | None = None,
    ) -> None:
        """Open the home of an enrolled device; what dead processes left open ends as lost.

        Args:
            home: the agent's state folder.
            now: aware UTC.
            threads: for the masks.
            entropy: returns that many random bytes; for keys, rounding and noise.
            members: returns the members of a list's version; the home's own list if it is left out.

        Raises:
            ConfigError: not enrolled.
            UnavailableError: the database cannot be used.
        """
        self._home, self._now, self._threads, self._entropy = home, now, threads, entropy
        self._enrolment = load_enrolment(home)
        self._members = members or (lambda version: members_for(home, self._enrolment, version))
        self._records = SumRecords(home, now=now)
        self._sessions: dict[bytes, _Session] = {}
        self._lock = threading.RLock()
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget all sessions and let go of the files."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for session in list(self._sessions):
                self._end(session, SumEvent.PROCESS_ENDED, "this device's trainer ended")
            self._records.close()

    def data_use(self, *, name: str, path: str, digest: str, part: Part) -> DataUse:
        """Return under which account the owner's data are booked.

        Args:
            name: the owner's name for the data.
            path: absolute; empty where the data lie in no file.
            digest: of all usable rows, in hex.
            part: training rows and held-out rows have an account each.
        """
        data_id = self._records.identify(name=name, path=path, digest=digest)
        return DataUse(data_id, part, digest)

    def open(
        self,
        sealed_config: bytes,
        *,
        task_digest: str,
        question_digest: str,
        base_digest: str | None,
        data: DataUse,
    ) -> OpenSum:
        """Check all that can be checked before the vector is made.

        An earlier session of the same run and purpose ends: its coordinator goes on without it.

        Args:
            sealed_config: as it was received.
            task_digest: of the task that this device works for.
            question_digest: of what it was asked, as it received it.
            base_digest: of the parameters that it received; None where there are none.
            data: what the vector will be about.

        Raises:
            PeerError: not our coordinator's word, not about what was received, or over already.
            PolicyError: the owner does not allow it, or the budget does not bear it.
            UnavailableError: the membership list or the disk cannot be had now.
        """
        self.forget_expired()
        config, config_digest = open_config(sealed_config, self._enrolment)
        check_time(config, self._now())
        check_received(
            config,
            data,
            task_digest=task_digest,
            question_digest=question_digest,
            base_digest=base_digest,
        )
        policy = self._policy()
        policy.check_config(config)
        members = self._members(config.membership_version)  # may take a while: outside the lock
        check_membership(members, self._enrolment)
        policy.check_members(members)
        opened = OpenSum(config, config_digest, data, members)
        with self._lock:
            earlier = self._earlier_sessions(config)
            self._records.open(config, config_digest, data, policy)
            for session in earlier:
                self._end(session, SumEvent.TIME_OVER, "a later session of the run took its place")
            self._sessions[config.session] = _Session(opened)
        logger.info("opened the sum of round %d of run %s", config.round_number, config.run_id)
        return opened

    def advertise(
        self, opened: OpenSum, vector: NDArray[Any] | None, exact: Mapping[str, float]
    ) -> bytes:
        """S0: keep the vector here until S2, and answer with fresh keys.

        Args:
            opened: what `open` gave.
            vector: shape (d,), float, in its own unit, neither clipped nor rounded; it is not
                copied, so nobody may change it afterwards. None where d is 0.
            exact: value by name of each exact lane.

        Returns:
            The encoded `SignedAnswer`. Where a number is not finite, zeros take the place of all:
            to refuse would tell of this one device's data, at no charge.

        Raises:
            ValueError: vector or names are not those of the configuration.
        """
        config = opened.config
        values = np.zeros(0, np.float32) if vector is None else vector
        if values.shape != (config.encoding.length,):
            raise ValueError(f"a vector of {values.shape} for {config.encoding.length} lanes")
        if set(exact) != {lane.name for lane in config.exact_lanes}:
            raise ValueError("the exact values are not those that the configuration names")
        if not (np.isfinite(values).all() and np.isfinite(list(exact.values())).all()):
            logger.warning("round %d: not finite; zeros go into the sum", config.round_number)
            values, exact = np.zeros_like(values), dict.fromkeys(exact, 0.0)

        def answer(session: _Session) -> SignedAnswer:
            session.vector, session.exact = values, dict(exact)
            session.client = self._client_of(opened)
            self._records.advance(config.session, SumEvent.VECTOR_READY)
            return session.client.advertise()

        return self._answer(config.session, "advertise", b"", answer)

    def decline(self, opened: OpenSum, reason: str) -> bytes:
        """S0: say no, since the vector could not be made; ``reason`` says nothing of the data."""
        with self._lock:
            self._end(opened.config.session, SumEvent.REFUSAL, reason)
        return self._refusal(opened.config.session, opened.config_digest, "advertise", reason)

    def answer(self, session: bytes, stage: Stage, question: bytes) -> bytes:
        """Answer S1 (share), S2c (consent) or S3 (reveal): an encoded `SignedAnswer`.

        The same question gets the same bytes; what may not be answered, a signed refusal.

        Raises:
            PeerError: a session that was never opened here: there is nothing to sign.
            ValueError: another stage.
        """
        steps: dict[str, Callable[[_Session, bytes], SignedAnswer]] = {
            "share": self._share,
            "consent": self._consent,
            "reveal": self._reveal,
        }
        if stage not in steps:
            raise ValueError(f"the stage {stage!r} is answered elsewhere")
        return self._answer(session, stage, question, lambda known: steps[stage](known, question))

    def mask(self, session: bytes, question: bytes) -> tuple[bytes, Lanes | None]:
        """S2: book the sum, mask the vector, and hand it out; from then on it is spent.

        Returns:
            The encoded `SignedAnswer` and the masked lanes, read-only, for the same question the
            same; or a signed refusal and None, of which nothing left and nothing is charged.

        Raises:
            PeerError: a session that was never opened here.
        """
        with self._lock:
            answer = self._answer(session, "mask", question, lambda s: self._mask(s, question))
            known = self._sessions.get(session)
            if known is None or known.said.get("mask", (b"", b""))[1] != answer:
                return answer, None
            if known.lanes is None:
                digest = known.opened.config_digest
                return self._refusal(session, digest, "mask", "the sum was unmasked already"), None
            return answer, known.lanes

    def allow_plain_update(self, run_id: str, round_number: int, data: DataUse) -> None:
        """Book an update or a measurement that leaves by itself; durable when it returns.

        Raises:
            PolicyError: the owner does not allow it, or as many as allowed have left.
            UnavailableError: the disk refuses; the update must not leave.
        """
        policy = self._policy()
        policy.check_plain_update()
        charge = Charge(
            session=None,
            run_id=run_id,
            round_number=round_number,
            purpose="train" if data.part == "train" else "evaluate",
            kind="plain",
            curve=None,
        )
        self._records.book_plain(data, policy, charge)

    def forget_expired(self) -> None:
        """End sessions whose time is over; every call does, and a caller that waits long may."""
        with self._lock:
            for session, known in list(self._sessions.items()):
                if known.opened.config.expires_at <= self._now():
                    self._end(session, SumEvent.TIME_OVER, "the session expired")

    # --- the stages ------------------------------------------------------------------------------

    def _share(self, session: _Session, question: bytes) -> SignedAnswer:
        answer = _client(session).share(decode(question, Roster))
        self._records.advance(session.opened.config.session, SumEvent.SHARES_DEALT)
        return answer

    def _mask(self, session: _Session, question: bytes) -> SignedAnswer:
        boxes = decode(question, Boxes)
        client, opened = _client(session), session.opened
        policy = self._policy()  # read anew: the owner may have changed it while we trained
        policy.check_config(opened.config)
        lanes = self._encode(session)
        answer = client.mask(boxes, lanes)
        lanes.main.flags.writeable = lanes.exact.flags.writeable = False
        # The last step before it may leave: what fails until here costs nothing, what fails
        # afterwards is paid for, whether it arrived or not.
        self._records.leave(opened.config, opened.data, policy)
        session.vector, session.exact, session.lanes = None, {}, lanes
        return answer

    def _consent(self, session: _Session, question: bytes) -> SignedAnswer:
        client, opened = _client(session), session.opened
        answer = client.consent(decode(question, Survivors))
        self._records.sign_survivors(
            opened.config,
            opened.data,
            client.survivors,
            min_difference=max(self._policy().min_cohort, opened.config.min_survivors),
        )
        return answer

    def _reveal(self, session: _Session, question: bytes) -> SignedAnswer:
        answer = _client(session).reveal(decode(question, Unmask))
        self._records.reveal(session.opened.config.session)
        session.lanes = None  # whoever unmasks has them
        return answer

    def _encode(self, session: _Session) -> Lanes:
        assert session.vector is not None, "kept from S0 to S2"
        seed = np.frombuffer(self._entropy(32), np.uint32)
        rng = np.random.default_rng(seed)
        config = session.opened.config
        return encode_vector(config, session.vector, session.exact, rng=rng, entropy=self._entropy)

    # --- one answer per stage, or a refusal ------------------------------------------------------

    def _answer(
        self,
        session: bytes,
        stage: Stage,
        question: bytes,
        make: Callable[[_Session], SignedAnswer],
    ) -> bytes:
        with self._lock:
            self.forget_expired()
            known = self._sessions.get(session)
            if known is None:
                return self._refusal_of_ended(session, stage)
            asked = hashlib.sha256(question).digest()
            if stage in known.said or stage != _STAGES[len(known.said)]:
                return self._repeat(known, stage, asked)
            try:
                answer = encode(make(known))
            except ShoalError as error:
                return self._refuse(known, stage, error)
            except BaseException:
                self._end(session, SumEvent.REFUSAL, "this device failed")
                raise
            known.said[stage] = asked, answer
            return answer

    def _repeat(self, known: _Session, stage: Stage, asked: bytes) -> bytes:
        """Answer what is not the next stage; the session goes on as if it had not been asked."""
        before, answer = known.said.get(stage, (b"", b""))
        if before == asked:
            return answer
        config, digest = known.opened.config, known.opened.config_digest
        reason = (
            "another question was answered at this stage"
            if stage in known.said
            else f"the stage {_STAGES[len(known.said)]!r} comes before this one"
        )
        return self._refusal(config.session, digest, stage, reason)

    def _refuse(self, known: _Session, stage: Stage, error: ShoalError) -> bytes:
        """End a session that this device has no part in any more, and say so."""
        config, digest = known.opened.config, known.opened.config_digest
        logger.warning("refused at %r of run %s: %s", stage, config.run_id, error)
        reason = _NO_DISK if isinstance(error, UnavailableError) else str(error)
        self._end(config.session, SumEvent.REFUSAL, reason)
        return self._refusal(config.session, digest, stage, reason)

    def _refusal_of_ended(self, session: bytes, stage: Stage) -> bytes:
        ended = self._records.known(session)
        if ended is None:
            raise PeerError("no such session was opened on this device")
        reason = f"this session is {ended.state} on this device: {ended.cause or 'it has ended'}"
        return self._refusal(session, ended.config_digest, stage, reason)

    def _refusal(self, session: bytes, config_digest: bytes, stage: Stage, reason: str) -> bytes:
        return encode(
            sign_answer(
                self._enrolment.key,
                session=session,
                stage=stage,
                config_digest=config_digest,
                roster_digest=b"",  # whoever refuses needs none
                device_id=self._enrolment.device_id,
                body=b"",
                refusal=as_text(reason) or "refused",
            )
        )

    def _end(self, session: bytes, event: SumEvent, cause: str) -> None:
        """Forget a session at once, and write down why as well as the disk allows."""
        if known := self._sessions.pop(session, None):
            known.wipe()
        try:
            self._records.end(session, event, as_text(cause))
        except UnavailableError as error:
            # Nothing of it can be said any more; the next process notes it as lost.
            logger.warning("the end of a session could not be written down: %s", error)

    def _earlier_sessions(self, config: SumConfig) -> Sequence[bytes]:
        """Return this run's sessions that a new one replaces; raise PeerError if it is older."""
        earlier = [
            known.opened.config
            for known in self._sessions.values()
            if (known.opened.config.run_id, known.opened.config.purpose)
            == (config.run_id, config.purpose)
        ]
        if any(other.round_number > config.round_number for other in earlier):
            raise PeerError(f"round {config.round_number} is over: a later one has begun here")
        return [other.session for other in earlier if other.session != config.session]

    def _client_of(self, opened: OpenSum) -> SumClient:
        own_id = self._enrolment.device_id

        def check_roster(members: Sequence[Member]) -> None:
            self._policy().check_roster(members, self._now(), own_id=own_id)

        return SumClient(
            opened.config,
            opened.config_digest,
            device_id=own_id,
            identity=self._enrolment.key,
            members=opened.members,
            check_roster=check_roster,
            entropy=self._entropy,
            threads=self._threads,
        )

    def _policy(self) -> OwnerPolicy:
        try:
            return read_policy(self._home)
        except ConfigError as error:
            logger.warning("%s", error)
            raise PolicyError(
                "this device's policy.toml cannot be read; "
                "its owner sees why with `shoal-agent policy check`"
            ) from error


def _client(session: _Session) -> SumClient:
    assert session.client is not None, "made at S0, the first stage"
    return session.client
