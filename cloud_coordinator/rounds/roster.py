"""Who may be asked: the devices that are joined, less those still busy with a closed round."""

import logging
from collections.abc import Iterable, Mapping, Sequence

from cloud_coordinator.rounds.collection import Leftover
from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.host import HostEvent, RunHost
from cloud_coordinator.rounds.worker_messages import (
    DeviceJoined,
    DeviceLeft,
    ReplyWaits,
    RoundSaved,
    StopRun,
)
from shared.errors import StoppedError, UnavailableError

logger = logging.getLogger(__name__)

_SAVE_DEADLINE_S = 60.0


class Roster:
    """Hears all that the host tells, at whatever point of a round it does.

    Replies that come after their round closed change nothing any more; they are pulled all the
    same, because the SuperLink keeps what nobody pulls.
    """

    def __init__(self, host: RunHost, exchange: Exchange) -> None:
        self._host = host
        self._exchange = exchange
        self._nodes: dict[str, int] = {}  # by device id
        self._last_joined_s = host.seconds()
        self._leftovers: dict[str, Leftover] = {}  # by message id

    @property
    def nodes(self) -> Mapping[str, int]:
        """Flower's handle of each joined device."""
        return self._nodes

    @property
    def quiet_s(self) -> float:
        """Seconds since a device last joined."""
        return self._host.seconds() - self._last_joined_s

    def available(self) -> frozenset[str]:
        """Return the devices that may be asked now."""
        now_s = self._host.seconds()
        busy = {left.device_id for left in self._leftovers.values() if now_s < left.busy_until_s}
        return frozenset(self._nodes.keys() - busy)

    def look_around(self) -> None:
        """Find out what nobody announces: expired messages, and all where nothing is announced."""
        now_s = self._host.seconds()
        self._drop_replies([m for m, left in self._leftovers.items() if left.expires_s <= now_s])
        if not self._host.announces:
            self._drop_replies(list(self._leftovers))
            for node_id in self._exchange.node_ids():
                self._join(f"node-{node_id}", node_id)

    def wait(self, timeout_s: float) -> Sequence[HostEvent]:
        """Return what the host tells within ``timeout_s``, applied to the roster already.

        Raises:
            StoppedError: the run is to end now.
        """
        events = self._host.wait(timeout_s)
        for event in events:
            match event:
                case DeviceJoined(device_id, node_id):
                    self._join(device_id, node_id)
                case DeviceLeft(device_id, _):
                    self._nodes.pop(device_id, None)
                case ReplyWaits(message_id):
                    if message_id in self._leftovers:
                        self._drop_replies([message_id])
                case StopRun(cause):
                    raise StoppedError(cause)
                case RoundSaved():
                    pass
        return events

    def wait_until_saved(self, round_number: int) -> None:
        """Wait for the word that the round's record is durable.

        Raises:
            UnavailableError: it did not come in time.
        """
        deadline_s = self._host.seconds() + _SAVE_DEADLINE_S
        while (left_s := deadline_s - self._host.seconds()) > 0:
            if RoundSaved(round_number) in self.wait(left_s):
                return
        raise UnavailableError(
            f"the coordinator did not save round {round_number} within {_SAVE_DEADLINE_S:.0f} s; "
            "look into its log"
        )

    def leave_behind(self, leftovers: Mapping[str, Leftover], *, replied: Iterable[str]) -> None:
        """Remember the unanswered messages of a closed round.

        Args:
            leftovers: by message id.
            replied: messages whose reply was announced already.
        """
        self._leftovers.update(leftovers)
        self._drop_replies([m for m in replied if m in self._leftovers])

    def _join(self, device_id: str, node_id: int) -> None:
        if self._nodes.get(device_id) != node_id:
            self._nodes[device_id] = node_id
            self._last_joined_s = self._host.seconds()

    def _drop_replies(self, message_ids: Sequence[str]) -> None:
        for reply in self._exchange.replies(message_ids):
            if left := self._leftovers.pop(reply.message_id, None):
                logger.info("dropped a reply of %s to a round that is closed", left.device_id)
