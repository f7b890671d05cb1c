"""What a session does for its worker's secure sums: it knows members, signs and carries questions.

The worker has no keys and speaks no MQTT; a configuration is sealed by the command key here, and
the kilobyte stages travel as signed messages to each device.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Protocol

from cloud_coordinator.control_link import ControlLink
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    ConfigsSigned,
    DeviceJoined,
    SignConfigs,
)
from shared.errors import ConfigError, ConflictError, UnavailableError
from shared.membership import Member
from shared.messages import SumQuestion

_SHORTEST_LIFE = timedelta(seconds=1)
_NOT_LISTED = (
    "it is not in the signed membership list yet; 'shoal membership show' says what it waits for"
)


class KnowsMembers(Protocol):
    """The membership list; see devices/membership.py."""

    def current(self) -> tuple[int, Mapping[str, Member]]:
        """Return the version and members that a roster may be made of now; blocks.

        Raises:
            UnavailableError: nobody has signed a list yet.
        """
        ...


class SumRelay:
    """Of one session of one run."""

    def __init__(
        self,
        *,
        run_id: str,
        session_id: str,
        link: ControlLink,
        membership: KnowsMembers,
        sign: Callable[[bytes], bytes],
        clock: Callable[[], datetime],
    ) -> None:
        """Describe the relay.

        Args:
            run_id: the run.
            session_id: of the run, which is in every message.
            link: carries the questions.
            membership: who may be in a sum.
            sign: seals a configuration with the command key.
            clock: returns aware UTC.
        """
        self._run_id, self._session_id = run_id, session_id
        self._link, self._membership = link, membership
        self._seal, self._clock = sign, clock
        self._version = 0
        self._why_nobody = ""  # why there is no membership list
        self.members: Mapping[str, Member] = {}

    async def read_members(self) -> None:
        """Learn who may be in a sum now; where that cannot be, what was known stays."""
        try:
            self._version, self.members = await asyncio.to_thread(self._membership.current)
            self._why_nobody = ""
        except (UnavailableError, ConfigError, ConflictError) as error:
            self._why_nobody = str(error)

    def why_not(self, device_id: str) -> str:
        """Return why a device may not be in a sum; empty if it may."""
        return "" if device_id in self.members else self._why_nobody or _NOT_LISTED

    def joined(self, device_id: str, node_id: int) -> DeviceJoined:
        """Tell the worker of a device, and with which identity it may be in a sum."""
        member = self.members.get(device_id)
        return DeviceJoined(
            device_id,
            node_id,
            identity_key=str(member.key) if member else "",
            membership_version=self._version,
        )

    def sign(self, message: SignConfigs) -> ConfigsSigned:
        """Seal what sums are about."""
        return ConfigsSigned(tuple(map(self._seal, message.payloads)))

    async def ask(self, message: AskDevices, joined: frozenset[str]) -> None:
        """Carry one question; one that is lost, the worker asks again."""
        question = SumQuestion(
            run_id=self._run_id,
            session_id=self._session_id,
            session=message.session,
            stage=message.stage,
            question=message.question,
        )
        lifetime = max(message.deadline_at - self._clock(), _SHORTEST_LIFE)
        await asyncio.gather(
            *(
                self._link.try_send(question, device=device_id, lifetime=lifetime)
                for device_id in message.device_ids
                if device_id in joined
            )
        )
