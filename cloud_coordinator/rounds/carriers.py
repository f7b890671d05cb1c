"""How the stages of secure sums travel: the same questions and answers, on two roads.

To our own agents the kilobyte stages go over the control plane, and only masked vectors through
Flower (`RelayedStages`). Stock SuperNodes and Flower's simulation engine have no control plane:
there, every stage is a Flower message (`FlowerStages`).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

from cloud_coordinator.rounds.collection import TTL_MARGIN_S, WAVE, Collection, SideBySide
from cloud_coordinator.rounds.exchange import Reply
from cloud_coordinator.rounds.host import HostEvent, RunHost
from cloud_coordinator.rounds.roster import Roster
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.stage import Stage as FlowerStage
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    DeviceAnswered,
    DeviceJoined,
    DeviceLeft,
    Participation,
    RoundProgress,
)
from shared.errors import PeerError
from shared.messages import RelayedStage
from shared.secure_sum.masking import Lanes
from shared.secure_sum.messages import SignedAnswer, decode

logger = logging.getLogger(__name__)

# A question or an answer can get lost; the same question gets the same answer. The pause doubles:
# where all are slow, as many devices are that deal many shares, asking again makes them slower.
REPEAT_S = 5.0
_PLENTY = 0.8  # of the devices: the rest are given up sooner than at the deadline

CarriedStage = Literal["share", "mask", "consent", "reveal"]
TakeAnswer = Callable[[str, SignedAnswer, Lanes | None], None]


@dataclass(frozen=True, slots=True)
class SumStage:
    """One stage of one session.

    Attributes:
        session: its name.
        questions: what each device is asked, by the name that the roster has for it.
        take: takes a device's answer; raises PeerError where it does not count.
        needed: with fewer answers there will be no sum.
        enough: says that whatever comes now is not needed.
    """

    session: bytes
    questions: Mapping[str, bytes]
    take: TakeAnswer
    needed: int
    enough: Callable[[], bool] = lambda: False


class StageCarrier(Protocol):
    """Carries one stage of sums that are made side by side."""

    def carry(
        self, name: CarriedStage, stages: Sequence[SumStage], *, round_number: int, timeout_s: float
    ) -> list[tuple[Participation, ...]]:
        """Ask, take the answers, and return what became of each device, by stage.

        Raises:
            StoppedError: the run is to end now.
            UnavailableError: the SuperLink is gone.
        """
        ...


class FlowerStages:
    """Every stage as Flower messages, one for each device."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._host, self._roster, self._exchange = parts.host, parts.roster, parts.exchange

    def carry(
        self, name: CarriedStage, stages: Sequence[SumStage], *, round_number: int, timeout_s: float
    ) -> list[tuple[Participation, ...]]:
        """Ask nodes by Flower; see `StageCarrier`."""
        nodes = self._roster.nodes
        takes = {device: stage.take for stage in stages for device in stage.questions}
        devices = {nodes[device]: device for device in takes if device in nodes}
        asked = {
            nodes[device]: (stage.session, question)
            for stage in stages
            for device, question in stage.questions.items()
            if device in nodes
        }
        message_ids = self._exchange.ask_stage(
            name, asked, round_number=round_number, ttl_s=timeout_s + TTL_MARGIN_S
        )
        ids = {devices[node]: message_id for node, message_id in message_ids.items()}
        whose = {message_id: device for device, message_id in ids.items()}

        def fold(reply: Reply) -> int:
            if reply.answer is None:
                raise PeerError("the reply holds no answer to a secure sum")
            device = whose[reply.message_id]
            takes[device](device, reply.answer, reply.lanes)
            return 0

        collections = _collections(self._host, stages, ids, name=name, timeout_s=timeout_s)
        _say_begun(self._host, collections, name, round_number, timeout_s)
        FlowerStage(self._parts, round_number=round_number, name=name).run(collections, fold)
        return [part.close(self._host.seconds()) for part in collections.parts]


class RelayedStages:
    """Small stages over the control plane, masked vectors through Flower."""

    def __init__(self, parts: RunParts) -> None:
        self._host, self._roster = parts.host, parts.roster
        self._by_flower = FlowerStages(parts)

    def carry(
        self, name: CarriedStage, stages: Sequence[SumStage], *, round_number: int, timeout_s: float
    ) -> list[tuple[Participation, ...]]:
        """Have the coordinator ask; see `StageCarrier`."""
        if name == "mask":
            return self._by_flower.carry(
                name, stages, round_number=round_number, timeout_s=timeout_s
            )
        names = {device: device for stage in stages for device in stage.questions}
        collections = _collections(self._host, stages, names, name=name, timeout_s=timeout_s)
        _say_begun(self._host, collections, name, round_number, timeout_s)
        relay = _Relay(
            self._host,
            self._roster,
            name,
            stages,
            collections=collections,
            round_number=round_number,
        )
        relay.run()
        return [part.close(self._host.seconds()) for part in collections.parts]


class _Relay:
    """One stage on its way over the control plane; in its collections, devices name messages."""

    def __init__(
        self,
        host: RunHost,
        roster: Roster,
        name: RelayedStage,
        stages: Sequence[SumStage],
        *,
        collections: SideBySide,
        round_number: int,
    ) -> None:
        self._host, self._roster = host, roster
        self._name, self._stages, self._round_number = name, stages, round_number
        self._collections = collections
        self._stage_of = {device: stage for stage in stages for device in stage.questions}
        self._until = host.now() + timedelta(seconds=collections.patience_s(host.seconds()))

    def run(self) -> None:
        """Ask, and ask again, until every collection is over."""
        host, collections = self._host, self._collections
        ask_at_s, pause_s = host.seconds(), REPEAT_S
        while not self._is_over(now_s := host.seconds()):
            if now_s >= ask_at_s:
                ask_at_s, pause_s = now_s + pause_s, 2 * pause_s
                self._ask(frozenset(collections.pending))
            patience_s = min(collections.patience_s(now_s), ask_at_s - now_s)
            for event in self._roster.wait(max(0.0, patience_s)):
                self._hear(event)

    def _is_over(self, now_s: float) -> bool:
        """Say whether nobody is waited for: once plenty have answered, none who is away is."""
        here = self._roster.nodes.keys()
        return all(
            part.is_over(now_s) or (part.has_plenty and here.isdisjoint(part.pending))
            for part in self._collections.parts
        )

    def _ask(self, devices: frozenset[str]) -> None:
        """Ask these devices; those who are asked the same are asked at once."""
        for stage in self._stages:
            by_question: dict[bytes, list[str]] = {}
            for device, question in stage.questions.items():
                if device in devices:
                    by_question.setdefault(question, []).append(device)
            for question, asked in by_question.items():
                self._host.report(
                    AskDevices(
                        device_ids=tuple(asked),
                        session=stage.session,
                        stage=self._name,
                        question=question,
                        deadline_at=self._until,
                    )
                )

    def _hear(self, event: HostEvent) -> None:
        match event:
            case DeviceAnswered(device_id, content) if device_id in self._collections.pending:
                self._take(device_id, content)
            case DeviceJoined(device_id) if device_id in self._collections.pending:
                self._ask(frozenset({device_id}))  # it was away, and may have missed it
            case DeviceLeft(device_id, cause) if self._name == "share":
                # Later, whoever comes back can still help, and others do not wait for it long.
                self._collections.leave(device_id, cause)
            case _:
                pass  # the roster has heard it

    def _take(self, device: str, content: bytes) -> None:
        stage = self._stage_of[device]
        try:
            answer = decode(content, SignedAnswer)
            if answer.session != stage.session or (
                answer.stage != self._name and not answer.refusal
            ):
                logger.debug("%s answered an earlier question", device)
                return
            stage.take(device, answer, None)
        except PeerError as error:
            logger.warning("an answer of %s does not count: %s", device, error)
            self._collections.fail(device, str(error), gone=False, bytes_up=len(content))
        else:
            self._collections.count(
                device, num_examples=0, bytes_up=len(content), now_s=self._host.seconds()
            )
        _say_progress(self._host, self._collections, self._name, self._round_number)


def _collections(
    host: RunHost,
    stages: Sequence[SumStage],
    message_ids: Mapping[str, str],
    *,
    name: CarriedStage,
    timeout_s: float,
) -> SideBySide:
    now_s = host.seconds()
    wave = max(1, WAVE // max(1, len(stages))) if name == "mask" else len(message_ids)
    return SideBySide(
        [
            Collection(
                list(stage.questions),
                {d: message_ids[d] for d in stage.questions if d in message_ids},
                wanted=len(stage.questions),
                needed=stage.needed,
                started_s=now_s,
                deadline_s=now_s + timeout_s,
                bytes_down=max(map(len, stage.questions.values()), default=0),
                plenty=max(stage.needed, math.ceil(_PLENTY * len(stage.questions))),
                enough=stage.enough,
                wave=max(1, wave),
            )
            for stage in stages
        ]
    )


def _say_begun(
    host: RunHost, collections: SideBySide, name: CarriedStage, round_number: int, timeout_s: float
) -> None:
    until = host.now() + timedelta(seconds=timeout_s)
    host.report(
        RoundProgress(
            round_number=round_number,
            stage=name,
            replied=0,
            cohort=collections.wanted,
            until=until,
        )
    )


def _say_progress(
    host: RunHost, collections: SideBySide, name: CarriedStage, round_number: int
) -> None:
    host.report(
        RoundProgress(
            round_number=round_number,
            stage=name,
            replied=collections.replied,
            cohort=collections.wanted,
        )
    )
