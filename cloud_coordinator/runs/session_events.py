"""What a session of a run is told, and how it ends."""

from dataclasses import dataclass

from cloud_coordinator.devices.service import Device
from shared.messages import InvitationAnswer, JoinedRun, LeftRun, ReplyWaiting, SumAnswer


@dataclass(frozen=True, slots=True)
class DeviceSeen:
    """A device's presence or its tasks changed."""

    device: Device


@dataclass(frozen=True, slots=True)
class BrokerBack:
    """The link to the broker is up again: devices that were not asked can be."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The session is to end: a person said so, or the coordinator goes down."""

    cause: str


DeviceWord = InvitationAnswer | JoinedRun | LeftRun | ReplyWaiting | SumAnswer


@dataclass(frozen=True, slots=True)
class DeviceSaid:
    """A device spoke about this run."""

    device_id: str
    body: DeviceWord


Post = DeviceSeen | DeviceSaid | BrokerBack | StopAsked


@dataclass(frozen=True, slots=True)
class RoundsDone:
    """The last round is committed."""


@dataclass(frozen=True, slots=True)
class RunBroken:
    """The run cannot go on."""

    cause: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """As asked for."""

    cause: str


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A process died; a new session goes on from the last commit."""

    cause: str
    worker_crashed: bool
    committed: bool  # whether this session closed at least one round


SessionEnd = RoundsDone | RunBroken | Stopped | Interrupted
