"""The sums of one question, from the first stage to the last, or from where a crash left them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cloud_coordinator.rounds.carriers import CarriedStage, StageCarrier, SumStage
from cloud_coordinator.rounds.cohort import SETTLE_S
from cloud_coordinator.rounds.collection import TTL_MARGIN_S, Collection, SideBySide
from cloud_coordinator.rounds.exchange import Reply
from cloud_coordinator.rounds.pending import PendingSum
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.stage import Stage as FlowerStage
from cloud_coordinator.rounds.sum_session import GroupSum, Session
from cloud_coordinator.rounds.worker_messages import Participation, WaitingForDevices
from shared.errors import ConfigError, PeerError, QuorumError, ShoalError
from shared.judging import CandidateFacts
from shared.secure_sum.config import Purpose, SumConfig, digest_of, encode_config
from shared.secure_sum.lifecycle import ServerState
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import SignedAnswer, encode
from shared.secure_sum.questions import SPENT
from shared.secure_sum.server import SumServer

logger = logging.getLogger(__name__)

_SNAPSHOTS_COST = 0.1  # at most so much of the time is spent on snapshots while vectors arrive
_WHILE: Mapping[CarriedStage, str] = {
    "share": "while keys were shared",
    "mask": "before its masked vector was there",
    "consent": "while unmasking",
    "reveal": "while unmasking",
}

Configure = Callable[[int, bytes, bytes, int], SumConfig]
Push = Callable[[Mapping[int, bytes], float], dict[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SumQuestion:
    """What devices are asked to sum up.

    Attributes:
        purpose: which of a round's sums.
        round_number: of the round.
        stage: what its first stage is called for people who watch.
        configure: from group, session, server key and devices asked makes what is signed.
        push: sends the first message to nodes, given each one's sealed configuration and how long
            it lives; returns the messages' ids by node.
        wanted: answers of a group that are enough to go on.
        timeout_s: of the first stage.
        bytes_down: what a device downloads in it.
    """

    purpose: Purpose
    round_number: int
    stage: Literal["train", "evaluate", "statistics"]
    configure: Configure
    push: Push
    wanted: int
    timeout_s: float
    bytes_down: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOutcome:
    """All groups' sums, and each device's part."""

    groups: tuple[GroupSum, ...]
    participations: tuple[Participation, ...]
    blamed: Mapping[str, str]
    stage_seconds: Mapping[str, float]

    @property
    def spent(self) -> frozenset[str]:
        """Devices that sent their vector for this question before."""
        return frozenset(p.device_id for p in self.participations if SPENT in p.cause)


class SumWork:
    """The sums of one question, from the first stage to the last."""

    def __init__(
        self,
        parts: RunParts,
        carrier: StageCarrier,
        purpose: Purpose,
        round_number: int,
        started_at: datetime,
    ) -> None:
        self._parts, self._carrier = parts, carrier
        self._host, self._roster, self._scratch = parts.host, parts.roster, parts.scratch
        self._purpose, self._round_number, self._started_at = purpose, round_number, started_at
        self._sessions: list[Session] = []
        self._taken: dict[str, Participation] = {}  # each device's part
        self._blamed: dict[str, str] = {}
        self._seconds: dict[str, float] = {}
        self._snapshot_due_s = 0.0

    # --- the first stage -------------------------------------------------------------------------

    def begin(self, question: SumQuestion, groups: Mapping[int, Sequence[str]]) -> None:
        """Have the configurations signed, ask everybody, and take the advertised keys."""
        members = self._roster.members
        for group, devices in groups.items():
            key = X25519PrivateKey.generate()
            public = key.public_key().public_bytes_raw()
            config = question.configure(group, self._parts.entropy(32), public, len(devices))
            payload = encode_config(config)
            invited = [d for d in devices if d in members] if self._host.announces else None
            server = SumServer(
                config, digest_of(payload), members=members, server_key=key, invited=invited
            )
            self._sessions.append(Session(group, config, payload, server))
        sealed = self._roster.signed([session.payload for session in self._sessions])
        self._ask(question, groups, dict(zip(groups, sealed, strict=True)))
        for session in self._living():
            self._close(session, _close_advertising)

    def _ask(
        self,
        question: SumQuestion,
        groups: Mapping[int, Sequence[str]],
        sealed: Mapping[int, bytes],
    ) -> None:
        host, nodes = self._host, self._roster.nodes
        started_s = host.seconds()
        devices = {nodes[d]: d for cohort in groups.values() for d in cohort if d in nodes}
        configs = {
            nodes[d]: sealed[g] for g, cohort in groups.items() for d in cohort if d in nodes
        }
        message_ids = question.push(configs, question.timeout_s + TTL_MARGIN_S)
        ids = {devices[node]: message_id for node, message_id in message_ids.items()}
        whose = {message_id: device for device, message_id in ids.items()}
        sessions = {d: s for s in self._sessions for d in groups[s.group]}
        facts: dict[str, tuple[CandidateFacts, ...]] = {}
        collections = SideBySide(
            [
                Collection(
                    groups[session.group],
                    {d: ids[d] for d in groups[session.group] if d in ids},
                    wanted=min(question.wanted, len(groups[session.group])),
                    needed=session.config.min_survivors,
                    started_s=started_s,
                    deadline_s=started_s + question.timeout_s,
                    bytes_down=question.bytes_down,
                )
                for session in self._sessions
            ]
        )

        def fold(reply: Reply) -> int:
            device = whose[reply.message_id]
            if reply.answer is None:
                raise PeerError("the reply holds no answer to a secure sum")
            self._advertised(sessions[device], device, reply.answer)
            facts[device] = reply.facts
            return 0

        stage = FlowerStage(self._parts, round_number=question.round_number, name=question.stage)
        stage.run(collections, fold)
        for part in collections.parts:
            for taken in part.close(host.seconds()):
                name = taken.device_id
                told = msgspec.structs.replace(taken, facts=facts.get(name, ()))
                self._taken[name] = told
        self._seconds[question.stage] = host.seconds() - started_s

    def _advertised(self, session: Session, name: str, answer: SignedAnswer) -> None:
        """Take a device's keys, and learn who it is where only its node was known."""
        device_id = answer.device_id
        if self._host.announces and device_id != name:
            raise PeerError(f"an answer in the name of {device_id[:64]!r} came from {name}")
        if device_id in session.names:
            raise PeerError(f"{device_id[:64]!r} has answered already, through another node")
        server = session.server
        if not server.take_advertised(answer):
            raise PeerError(_why_not(server, device_id))
        session.names[device_id] = name

    # --- the other stages ------------------------------------------------------------------------

    def perform(self, stage: CarriedStage, on_masked: Callable[[], None]) -> SumOutcome:
        """Go on from ``stage`` to the end."""
        boxes: dict[bytes, dict[str, bytes]] = {}
        if stage == "share":
            self._share()
            for session in self._living():
                self._close(session, lambda s: boxes.update({s.config.session: _boxes_of(s)}))
            self._scratch.save_boxes(
                self._purpose, {d: box for each in boxes.values() for d, box in each.items()}
            )
            self._save()
        else:
            self._await_devices()
            known = self._scratch.load_boxes(self._purpose)
            for session in self._living():
                asked = session.server.waiting_for
                boxes[session.config.session] = {d: known[d] for d in asked if d in known}
        self._mask(boxes)
        self._save()
        on_masked()
        self._consent()
        self._save()
        self._reveal()
        self._save()
        return self._outcome()

    def _share(self) -> None:
        stages = []
        for session in self._living():
            server = session.server
            self._drop_absent(session)
            names = [session.names[d] for d in server.waiting_for]
            stages.append(
                self._stage(
                    session,
                    dict.fromkeys(sorted(names), session.question),
                    server.take_shared,
                    needed=session.survivors_needed,
                )
            )
        self._carry("share", stages)

    def _mask(self, boxes: Mapping[bytes, Mapping[str, bytes]]) -> None:
        sessions = [s for s in self._living() if s.server.state is ServerState.MASKING]
        stages = []
        for session in sessions:
            self._drop_absent(session)
            waiting = session.server.waiting_for
            asked = boxes[session.config.session]
            questions = {session.names[d]: asked[d] for d in sorted(asked) if d in waiting}
            have = len(session.server.masked)
            stages.append(
                self._stage(
                    session,
                    questions,
                    None,
                    needed=max(0, session.survivors_needed - have),
                )
            )
        self._carry("mask", stages)
        for session in sessions:
            self._close(session, lambda s: s.server.close_masking())

    def _consent(self) -> None:
        sessions = [s for s in self._living() if s.server.state is ServerState.AGREEING]
        stages = [
            self._stage(
                session,
                self._same_question(session),
                session.server.take_consent,
                needed=session.server.signatures_needed,
            )
            for session in sessions
        ]
        self._carry("consent", stages)
        for session in sessions:
            self._close(session, lambda s: s.server.close_consent())

    def _reveal(self) -> None:
        sessions = [s for s in self._living() if s.server.state is ServerState.UNMASKING]
        stages = [
            self._stage(
                session,
                self._same_question(session),
                session.server.take_revealed,
                needed=1,
                enough=lambda s=session: self._has_enough(s),  # type: ignore[misc]
            )
            for session in sessions
        ]
        self._carry("reveal", stages)
        for session in sessions:
            self._close(session, self._finish)

    def _has_enough(self, session: Session) -> bool:
        """Say whether waiting for more shares is of no use."""
        if session.cause:
            return True
        try:
            return session.server.enough_revealed
        except ShoalError as error:
            session.fail(error)
            return True

    def _finish(self, session: Session) -> None:
        server = session.server
        session.finish()
        self._note_blamed(session, server)

    # --- what all stages need --------------------------------------------------------------------

    def _living(self) -> list[Session]:
        return [session for session in self._sessions if session.lives]

    def _same_question(self, session: Session) -> dict[str, bytes]:
        """Return what the open stage asks, the same of all who have not answered it."""
        server = session.server
        question = encode(server.question())
        return {session.names[d]: question for d in sorted(server.waiting_for)}

    def _stage(
        self,
        session: Session,
        questions: Mapping[str, bytes],
        take: Callable[[SignedAnswer], bool] | None,
        *,
        needed: int,
        enough: Callable[[], bool] = lambda: False,
    ) -> SumStage:
        server = session.server

        def fold(name: str, answer: SignedAnswer, lanes: Lanes | None) -> None:
            if session.names.get(answer.device_id) != name:
                raise PeerError(f"an answer in the name of {answer.device_id[:64]!r}")
            if take is not None:
                counts = take(answer)
            elif lanes is None and not answer.refusal:
                raise PeerError("a masked vector is missing")
            else:
                counts = server.take_masked(answer, lanes or _NO_LANES)
            if not counts:
                raise PeerError(_why_not(server, answer.device_id))
            if take is None:
                self._save_now_and_then()

        return SumStage(
            session=session.config.session,
            questions=questions,
            take=fold,
            needed=needed,
            enough=enough,
        )

    def _carry(self, name: CarriedStage, stages: Sequence[SumStage]) -> None:
        """Carry one stage, and note what became of those who did not answer it."""
        started_s = self._host.seconds()
        parts: list[tuple[Participation, ...]] = []
        if any(stage.questions for stage in stages):
            parts = self._carrier.carry(
                name,
                stages,
                round_number=self._round_number,
                timeout_s=self._host.plan.privacy.stage_deadline_s,
            )
        for part in (part for each in parts for part in each):
            self._note_part(name, part)
        took_s = self._host.seconds() - started_s
        self._seconds[name] = self._seconds.get(name, 0.0) + took_s

    def _note_part(self, stage: CarriedStage, part: Participation) -> None:
        before = self._taken[part.device_id]
        merged = msgspec.structs.replace(
            before,
            bytes_down=before.bytes_down + part.bytes_down,
            bytes_up=before.bytes_up + part.bytes_up,
        )
        if stage in {"consent", "reveal"}:  # its vector is in the sum, whatever comes now
            if part.outcome not in {"replied", "not-needed"}:
                cause = f"{part.cause} {_WHILE[stage]}"
                merged = msgspec.structs.replace(merged, cause=merged.cause or cause)
        elif part.outcome != "replied":
            outcome = "late" if part.outcome == "not-needed" else part.outcome
            cause = f"{part.cause} {_WHILE[stage]}"
            merged = msgspec.structs.replace(merged, outcome=outcome, cause=cause)
        self._taken[part.device_id] = merged

    def _drop_absent(self, session: Session) -> None:
        """Ask nobody who has left in the meantime."""
        server, here = session.server, self._roster.nodes
        for device_id in server.waiting_for:
            name = session.names[device_id]
            if name not in here:
                server.drop(device_id, "left")
                part = self._taken[name]
                if part.outcome == "replied":
                    gone = "left after it had answered"
                    part = msgspec.structs.replace(part, outcome="dropped", cause=gone)
                    self._taken[name] = part

    def _close(self, session: Session, close: Callable[[Session], object]) -> None:
        """Close a stage of one session; one that is lost does not cost the others."""
        if not session.lives:
            return
        try:
            close(session)
        except (QuorumError, PeerError, ConfigError) as error:
            logger.warning("group %d has no sum: %s", session.group, error)
            session.fail(error)
            self._note_blamed(session, session.server)

    def _note_blamed(self, session: Session, server: SumServer) -> None:
        for blame in server.blamed:
            self._blamed[session.names.get(blame.device_id, blame.device_id)] = blame.cause

    def _outcome(self) -> SumOutcome:
        return SumOutcome(
            groups=tuple(session.outcome() for session in self._sessions),
            participations=tuple(self._taken.values()),
            blamed=dict(self._blamed),
            stage_seconds=dict(self._seconds),
        )

    # --- crashes ---------------------------------------------------------------------------------

    def _save_now_and_then(self) -> None:
        """Keep what has arrived, as often as it costs little."""
        if self._scratch.keeps and (began_s := self._host.seconds()) >= self._snapshot_due_s:
            self._save()
            took_s = self._host.seconds() - began_s
            self._snapshot_due_s = self._host.seconds() + took_s / _SNAPSHOTS_COST

    def _save(self) -> None:
        """Keep all that a new life needs; before the first vector left there is nothing."""
        if not self._scratch.keeps or not any(s.is_worth_keeping for s in self._sessions):
            return
        pending = PendingSum(
            round_number=self._round_number,
            purpose=self._purpose,
            started_at=self._started_at,
            groups=tuple(s.as_pending() for s in self._sessions),
            participations=tuple(self._taken.values()),
            blamed=self._blamed,
            stage_seconds=self._seconds,
        )
        self._scratch.save(pending)

    def restore(self, pending: PendingSum) -> None:
        """Take up what `_save` kept."""
        self._taken = {part.device_id: part for part in pending.participations}
        self._blamed, self._seconds = dict(pending.blamed), dict(pending.stage_seconds)
        self._sessions = [Session.restored(kept) for kept in pending.groups]

    def _await_devices(self) -> None:
        """Wait until those who are needed are back, and a moment longer for the others."""
        host, roster = self._host, self._roster
        patience_s = host.plan.cohort.recruit_deadline_s
        deadline_s = host.seconds() + patience_s
        until = host.now() + timedelta(seconds=patience_s)
        told = -1
        while (left_s := deadline_s - host.seconds()) > 0:
            roster.look_around()
            missing = [self._missing(session) for session in self._living()]
            all_back = all(not out for out, _ in missing)
            enough = all(here >= 0 for _, here in missing) and roster.quiet_s >= SETTLE_S
            if all_back or enough:
                return
            out = sum(each for each, _ in missing)
            wanted = sum(len(session.server.waiting_for) for session in self._living())
            if told != out:
                told = out
                waiting = WaitingForDevices(joined=wanted - out, wanted=wanted, until=until)
                host.report(waiting)
            roster.wait(min(left_s, 1.0))

    def _missing(self, session: Session) -> tuple[int, int]:
        """Return how many are not back yet, and by how many those who are exceed what is needed."""
        server = session.server
        waiting = server.waiting_for
        here = sum(session.names[d] in self._roster.nodes for d in waiting)
        needed = {
            ServerState.MASKING: session.survivors_needed - len(server.masked),
            ServerState.AGREEING: server.signatures_needed,
            ServerState.UNMASKING: server.signatures_needed - 1,
        }[server.state]
        return len(waiting) - here, here - needed


_NO_LANES = Lanes(main=np.empty(0, np.uint16), exact=np.empty(0, np.uint64))  # of a refusal


def _close_advertising(session: Session) -> None:
    session.question = encode(session.server.close_advertising())
    session.roster = len(session.server.roster)


def _boxes_of(session: Session) -> dict[str, bytes]:
    return {d: encode(boxes) for d, boxes in session.server.close_sharing().items()}


def _why_not(server: SumServer, device_id: str) -> str:
    return server.left.get(device_id, "its answer came too late")
