"""Who may be asked: the devices that are joined, less those still busy with a closed round."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from cloud_coordinator.rounds.collection import Leftover
from cloud_coordinator.rounds.exchange import Exchange
from cloud_coordinator.rounds.host import HostEvent, RunHost
from cloud_coordinator.rounds.worker_messages import (
    ConfigsSigned,
    DeviceAnswered,
    DeviceJoined,
    DeviceLeft,
    ReplyWaits,
    RoundSaved,
    SignConfigs,
    StopRun,
)
from shared.errors import StoppedError, UnavailableError
from shared.membership import Member
from shared.signing import VerifyingKey

logger = logging.getLogger(__name__)

_ANSWER_DEADLINE_S = 60.0


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
        self._members = dict(host.members)
        self._membership_version = host.membership_version
        self._leftovers: dict[str, Leftover] = {}  # by message id

    @property
    def nodes(self) -> Mapping[str, int]:
        """Flower's handle of each joined device."""
        return self._nodes

    @property
    def members(self) -> Mapping[str, Member]:
        """Those of the membership list that were announced, by device id."""
        return self._members

    @property
    def membership_version(self) -> int:
        """Return the newest version of the membership list that names all `members`."""
        return self._membership_version

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
                    self._note_member(event)
                    self._join(device_id, node_id)
                case DeviceLeft(device_id, _):
                    self._nodes.pop(device_id, None)
                case ReplyWaits(message_id):
                    if message_id in self._leftovers:
                        self._drop_replies([message_id])
                case StopRun(cause):
                    raise StoppedError(cause)
                case RoundSaved() | ConfigsSigned() | DeviceAnswered():
                    pass
        return events

    def wait_until_saved(self, round_number: int) -> None:
        """Wait for the word that the round's record is durable.

        Raises:
            UnavailableError: it did not come in time.
        """
        self._wait_for(
            lambda event: event == RoundSaved(round_number), what=f"save round {round_number}"
        )

    def signed(self, payloads: Sequence[bytes]) -> tuple[bytes, ...]:
        """Have configurations of secure sums sealed, and return them.

        Raises:
            UnavailableError: they did not come back in time.
        """
        self._host.report(SignConfigs(tuple(payloads)))
        event = self._wait_for(
            lambda event: isinstance(event, ConfigsSigned), what="sign what a sum is about"
        )
        assert isinstance(event, ConfigsSigned)
        return event.sealed

    def leave_behind(self, leftovers: Mapping[str, Leftover], *, replied: Iterable[str]) -> None:
        """Remember the unanswered messages of a closed round.

        Args:
            leftovers: by message id.
            replied: messages whose reply was announced already.
        """
        self._leftovers.update(leftovers)
        self._drop_replies([m for m in replied if m in self._leftovers])

    def _wait_for(self, is_it: Callable[[HostEvent], bool], *, what: str) -> HostEvent:
        deadline_s = self._host.seconds() + _ANSWER_DEADLINE_S
        while (left_s := deadline_s - self._host.seconds()) > 0:
            if found := next(filter(is_it, self.wait(left_s)), None):
                return found
        raise UnavailableError(
            f"the coordinator did not {what} within {_ANSWER_DEADLINE_S:.0f} s; look into its log"
        )

    def _note_member(self, joined: DeviceJoined) -> None:
        if joined.identity_key:
            key = VerifyingKey.from_text(joined.identity_key)
            self._members[joined.device_id] = Member(joined.device_id, key, self._host.now())
            version = max(self._membership_version, joined.membership_version)
            self._membership_version = version

    def _join(self, device_id: str, node_id: int) -> None:
        if self._nodes.get(device_id) != node_id:
            self._nodes[device_id] = node_id
            self._last_joined_s = self._host.seconds()

    def _drop_replies(self, message_ids: Sequence[str]) -> None:
        for reply in self._exchange.replies(message_ids):
            if left := self._leftovers.pop(reply.message_id, None):
                logger.info("dropped a reply of %s to a round that is closed", left.device_id)
