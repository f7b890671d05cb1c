"""Waits for the replies to one question, and folds and drops each as it comes."""

import logging
from collections.abc import Callable

from cloud_coordinator.rounds.collection import Collection, SideBySide
from cloud_coordinator.rounds.exchange import Reply
from cloud_coordinator.rounds.host import HostEvent
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.worker_messages import (
    DeviceLeft,
    NudgeDevices,
    ReplyWaits,
    RoundProgress,
    StageName,
)
from shared.errors import PeerError

logger = logging.getLogger(__name__)

SAFETY_POLL_S = 5.0  # announcements can be lost: then a reply costs this delay, not the round
_SHORTEST_POLL_S = 0.01
_LONGEST_POLL_S = 0.5

Fold = Callable[[Reply], int]  # returns the number of examples, or raises PeerError


class Stage:
    """The shell around one `Collection`, or several side by side."""

    def __init__(self, parts: RunParts, *, round_number: int, name: StageName) -> None:
        self._host, self._roster, self._exchange = parts.host, parts.roster, parts.exchange
        self._round_number = round_number
        self._name = name
        self._poll_s = SAFETY_POLL_S if parts.host.announces else _SHORTEST_POLL_S
        self._unheard: list[str] = []  # announced after enough had replied

    def run(self, collection: Collection | SideBySide, fold: Fold) -> None:
        """Return when ``collection`` is over; ``fold`` got every answer once.

        Raises:
            StoppedError: the run is to end now.
            UnavailableError: the SuperLink is gone.
        """
        host = self._host
        next_poll_s = host.seconds() + self._poll_s
        while not collection.is_over(now_s := host.seconds()):
            if wave := collection.nudge(now_s):
                host.report(NudgeDevices(wave))
            patience_s = min(collection.patience_s(now_s), max(0.0, next_poll_s - now_s))
            for event in self._roster.wait(patience_s):
                self._hear(event, collection, fold)
            if host.seconds() >= next_poll_s:
                found = self._pull(list(collection.pending), collection, fold)
                self._poll_s = self._next_poll_s(found=found)
                next_poll_s = host.seconds() + self._poll_s
        self._roster.leave_behind(collection.leftovers(host.seconds()), replied=self._unheard)

    def _hear(self, event: HostEvent, collection: Collection | SideBySide, fold: Fold) -> None:
        match event:
            case ReplyWaits(message_id):
                over = collection.is_over(self._host.seconds())
                if message_id in collection.pending and not over:
                    self._pull([message_id], collection, fold)
                else:
                    self._unheard.append(message_id)
            case DeviceLeft(device_id, cause):
                collection.leave(device_id, cause)
            case _:
                pass  # the roster has heard it

    def _pull(
        self, message_ids: list[str], collection: Collection | SideBySide, fold: Fold
    ) -> bool:
        """Pull what is there of ``message_ids``; stop as soon as the collection is over."""
        found = False
        for reply in self._exchange.replies(message_ids):
            if reply.message_id in collection.pending:  # a Grid may deliver twice
                found = True
                self._take(reply, collection, fold)
            if collection.is_over(self._host.seconds()):
                break
        return found

    def _take(self, reply: Reply, collection: Collection | SideBySide, fold: Fold) -> None:
        device = collection.pending[reply.message_id]
        uploaded = reply.nbytes
        if reply.failure:
            collection.fail(reply.message_id, reply.failure, gone=reply.gone)
        else:
            try:
                examples = fold(reply)
            except PeerError as error:
                logger.warning("a reply of %s cannot be used: %s", device, error)
                collection.fail(reply.message_id, str(error), gone=False, bytes_up=uploaded)
            else:
                collection.count(
                    reply.message_id,
                    num_examples=examples,
                    bytes_up=uploaded,
                    now_s=self._host.seconds(),
                )
        self._host.report(
            RoundProgress(
                round_number=self._round_number,
                stage=self._name,
                replied=collection.replied,
                cohort=collection.wanted,
            )
        )

    def _next_poll_s(self, *, found: bool) -> float:
        """Return the pause before the next poll: where nothing is announced, it adapts."""
        if self._host.announces:
            return SAFETY_POLL_S
        return _SHORTEST_POLL_S if found else min(_LONGEST_POLL_S, self._poll_s * 1.5)
