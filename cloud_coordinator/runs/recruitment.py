"""Who is invited to a run, and what became of it; pure, for one session of one run.

Every online device whose owner gave data for the task is invited, up to `MOST_DEVICES`: rounds
select their cohorts from those who joined. Whoever declined, did not answer or left is asked again
after a while, because reasons pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from cloud_coordinator.devices.service import Device

MOST_DEVICES = 256  # of one SuperLink
_ASK_AGAIN_AFTER_NO = timedelta(minutes=1)
_LONGEST_PAUSE = timedelta(minutes=1)


class InvitationState(StrEnum):
    """What became of an invitation."""

    INVITED = "invited"  # no answer yet
    ACCEPTED = "accepted"  # its trainer is starting
    JOINED = "joined"  # connected to the SuperLink
    DECLINED = "declined"  # said no, with a reason
    UNANSWERED = "unanswered"  # said nothing, or said yes and never joined
    LEFT = "left"  # was there, and is gone


_PENDING = {InvitationState.INVITED, InvitationState.ACCEPTED}
_PRESENT = _PENDING | {InvitationState.JOINED}


@dataclass(frozen=True, slots=True)
class Invitation:
    """One device's invitation."""

    device_id: str
    state: InvitationState
    until: datetime | None  # pending: its deadline; otherwise when the device may be asked again
    reason: str = ""
    attempts: int = 1


class Recruitment:
    """All invitations of one session. Each method returns the invitations that it changed."""

    def __init__(
        self,
        *,
        task: str,
        answer_time: timedelta,
        join_time: timedelta,
        most_devices: int = MOST_DEVICES,
    ) -> None:
        self._task = task
        self._answer_time, self._join_time = answer_time, join_time
        self._most_devices = most_devices
        self._invitations: dict[str, Invitation] = {}

    @property
    def joined(self) -> frozenset[str]:
        """Devices that are connected to the SuperLink."""
        return self._in({InvitationState.JOINED})

    @property
    def present(self) -> frozenset[str]:
        """Devices that joined or still may."""
        return self._in(_PRESENT)

    def count(self, state: InvitationState) -> int:
        """Return how many invitations are in ``state``."""
        return len(self._in({state}))

    def whom_to_invite(self, devices: Iterable[Device], now: datetime) -> list[Device]:
        """Choose among all devices those to ask now."""
        room = self._most_devices - len(self.present)
        return [device for device in devices if self._is_due(device, now)][: max(0, room)]

    def next_deadline(self) -> datetime | None:
        """Return when `expire` or `whom_to_invite` will next have something to do."""
        return min((i.until for i in self._invitations.values() if i.until), default=None)

    def invite(self, device_id: str, now: datetime) -> list[Invitation]:
        """Note that a device was asked."""
        last = self._invitations.get(device_id)
        attempts = last.attempts + 1 if last else 1
        return self._put(
            Invitation(
                device_id,
                InvitationState.INVITED,
                now + self._answer_time,
                attempts=attempts,
            )
        )

    def answer(
        self, device_id: str, *, accepted: bool, reason: str, now: datetime
    ) -> list[Invitation]:
        """Note a yes or no; one that comes after the device joined, or unasked, changes nothing."""
        invitation = self._invitations.get(device_id)
        if invitation is None or invitation.state is InvitationState.JOINED:
            return []
        if accepted:
            state, until = InvitationState.ACCEPTED, now + self._join_time
        else:
            state, until = InvitationState.DECLINED, now + _ASK_AGAIN_AFTER_NO
        return self._put(replace(invitation, state=state, until=until, reason=reason))

    def join(self, device_id: str) -> list[Invitation]:
        """Note that a device's trainer is connected; one that was never invited is not let in."""
        invitation = self._invitations.get(device_id)
        if invitation is None or invitation.state is InvitationState.JOINED:
            return []
        return self._put(replace(invitation, state=InvitationState.JOINED, until=None, reason=""))

    def leave(self, device_id: str, *, cause: str, now: datetime) -> list[Invitation]:
        """Note that a device is gone; it is asked again after a pause that grows."""
        invitation = self._invitations.get(device_id)
        if invitation is None or invitation.state not in _PRESENT:
            return []
        pause = min(_LONGEST_PAUSE, timedelta(seconds=2.0 ** min(invitation.attempts, 10) / 2))
        return self._put(
            replace(invitation, state=InvitationState.LEFT, until=now + pause, reason=cause)
        )

    def expire(self, now: datetime) -> list[Invitation]:
        """Give up on devices whose deadline passed."""
        late = [
            invitation
            for invitation in self._invitations.values()
            if invitation.state in _PENDING and invitation.until and invitation.until <= now
        ]
        return [changed for invitation in late for changed in self._put(_given_up(invitation, now))]

    def _is_due(self, device: Device, now: datetime) -> bool:
        if not device.online or self._task not in device.tasks:
            return False
        last = self._invitations.get(device.device_id)
        if last is None:
            return True
        return last.state not in _PRESENT and last.until is not None and last.until <= now

    def _in(self, states: set[InvitationState]) -> frozenset[str]:
        return frozenset(i.device_id for i in self._invitations.values() if i.state in states)

    def _put(self, invitation: Invitation) -> list[Invitation]:
        self._invitations[invitation.device_id] = invitation
        return [invitation]


def _given_up(invitation: Invitation, now: datetime) -> Invitation:
    invited = invitation.state is InvitationState.INVITED
    reason = "did not answer in time" if invited else "said yes and did not join in time"
    return replace(invitation, state=InvitationState.UNANSWERED, until=now, reason=reason)
