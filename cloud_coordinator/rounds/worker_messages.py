"""What the coordinator and a run's worker child (the ServerApp process) say to each other.

The worker decides and computes; the coordinator alone writes the database and speaks MQTT. So a
round is committed in three steps: the worker stores the blobs and says `RoundClosed`, the
coordinator writes one transaction, and only `RoundSaved` lets the worker go on.
"""

from datetime import datetime
from typing import Literal

import msgspec

from shared.run_plan import RunPlan


class ResumePoint(msgspec.Struct, frozen=True, kw_only=True):
    """The last committed round; number 0 is the initial model."""

    round_number: int
    parameters_sha256: str
    optimizer_sha256: str | None = None


class StartRun(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First line to the worker."""

    run_id: str
    session_id: str
    plan: RunPlan
    resume: ResumePoint | None  # None: initialise from the plan's seed, and close round 0 first
    next_round: int  # number of the round to start with; abandoned rounds keep theirs
    times_selected: dict[str, int] = {}  # by device id: rounds of this run that asked it so far
    blobs: str  # folder of content-addressed files
    superlink_address: str  # host:port of the private listener
    superlink_ca_pem: str
    superlink_secrets_path: str  # file, mode 0600, see flower/superlink.py


class DeviceJoined(msgspec.Struct, frozen=True, tag="device-joined"):
    """The device's trainer is connected; it may be selected from now on."""

    device_id: str
    node_id: int


class DeviceLeft(msgspec.Struct, frozen=True, tag="device-left"):
    """The device is gone (trainer ended, or presence lost): count it out of the round at once."""

    device_id: str
    cause: str


class ReplyWaits(msgspec.Struct, frozen=True, tag="reply-waits"):
    """A device announced its reply to this Flower message."""

    message_id: str


class RoundSaved(msgspec.Struct, frozen=True, tag="round-saved"):
    """The round's record is durable."""

    round_number: int


class StopRun(msgspec.Struct, frozen=True, tag="stop"):
    """End after nothing more than tidying up."""

    cause: str


ToWorker = StartRun | DeviceJoined | DeviceLeft | ReplyWaits | RoundSaved | StopRun

Outcome = Literal["replied", "failed", "late", "dropped", "not-needed"]


class Participation(msgspec.Struct, frozen=True, kw_only=True):
    """One selected device's part in a round, and why it has none if so."""

    device_id: str
    outcome: Outcome
    cause: str = ""
    num_examples: int = 0
    seconds: float | None = None  # from push to fold, by the worker's clock
    bytes_down: int = 0
    bytes_up: int = 0


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """All there is to know about one closed round. Times are aware UTC."""

    round_number: int  # 0 is the initial model, measured but not trained
    state: Literal["committed", "abandoned"]
    cause: str = ""  # of an abandonment, or why a committed round has no metrics
    started_at: datetime
    closed_at: datetime
    participations: tuple[Participation, ...]
    metrics: dict[str, float]  # on held-out rows, after the round; empty where not measured
    training_sums: dict[str, float] = {}  # the devices' training statistics, added
    parameters_sha256: str | None = None  # of the blob; None when abandoned
    optimizer_sha256: str | None = None


class WorkerReady(msgspec.Struct, frozen=True, tag="ready"):
    """Attached to the SuperLink; tell me who joined."""


class WaitingForDevices(msgspec.Struct, frozen=True, kw_only=True, tag="waiting"):
    """Too few devices are joined for a round; the coordinator may invite more."""

    joined: int
    wanted: int
    until: datetime


class RoundStarted(msgspec.Struct, frozen=True, kw_only=True, tag="round-started"):
    """The cohort is fixed."""

    round_number: int
    cohort: tuple[str, ...]
    deadline_at: datetime


class NudgeDevices(msgspec.Struct, frozen=True, tag="nudge"):
    """Messages wait for these devices; workers nudge in waves to bound the SuperLink's memory."""

    device_ids: tuple[str, ...]


class RoundProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """For people who watch."""

    round_number: int
    stage: Literal["train", "evaluate"]
    replied: int
    cohort: int


class RoundClosed(msgspec.Struct, frozen=True, tag="round-closed"):
    """The round ended; blobs it names are on disk. Answered by `RoundSaved`."""

    record: RoundRecord


class RunFinished(msgspec.Struct, frozen=True, tag="finished"):
    """The last round is committed; the worker ends with status 0."""


class RunFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The worker ends: with status 1 where the run is over, with 75 where a new session may help.

    75 (`EX_TEMPFAIL`): the SuperLink is gone, the disk is full; start again from the last commit,
    after a pause that grows. Any other status without this message, a signal too, is the same.
    """

    cause: str


FromWorker = (
    WorkerReady
    | WaitingForDevices
    | RoundStarted
    | NudgeDevices
    | RoundProgress
    | RoundClosed
    | RunFinished
    | RunFailed
)
