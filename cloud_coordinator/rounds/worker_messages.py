"""What the coordinator and a run's worker child (the ServerApp process) say to each other.

The worker decides and computes; the coordinator alone writes the database and speaks MQTT. So a
round is committed in three steps: the worker stores the blobs and says `RoundClosed`, the
coordinator writes one transaction, and only `RoundSaved` lets the worker go on.
"""

from datetime import datetime
from typing import Literal

import msgspec

from shared.judging import CandidateFacts
from shared.messages import RelayedStage
from shared.run_plan import RunPlan
from shared.statistics.vectors import Answer


class ResumePoint(msgspec.Struct, frozen=True, kw_only=True):
    """The last committed round; number 0 is the initial model."""

    round_number: int
    parameters_sha256: str
    optimizer_sha256: str | None = None


class StartRun(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First line to the worker."""

    run_id: str
    session_id: str
    fleet: str = ""
    plan: RunPlan
    resume: ResumePoint | None  # None: initialise from the plan's seed, and close round 0 first
    next_round: int  # number of the round to start with; abandoned rounds keep theirs
    times_selected: dict[str, int] = {}  # by device id: rounds of this run that asked it so far
    blobs: str  # folder of content-addressed files
    scratch: str = ""  # folder of this run alone, for sums that are not finished
    superlink_address: str  # host:port of the private listener
    superlink_ca_pem: str
    superlink_secrets_path: str  # file, mode 0600, see flower/superlink.py


class DeviceJoined(msgspec.Struct, frozen=True, tag="device-joined"):
    """The device's trainer is connected; it may be selected from now on."""

    device_id: str
    node_id: int
    identity_key: str = ""  # base64, from the membership list; empty: it is in no secure sum
    membership_version: int = 0  # of that list


class DeviceLeft(msgspec.Struct, frozen=True, tag="device-left"):
    """The device is gone (trainer ended, or presence lost): count it out of the round at once."""

    device_id: str
    cause: str


class ReplyWaits(msgspec.Struct, frozen=True, tag="reply-waits"):
    """A device announced its reply to this Flower message."""

    message_id: str


class ConfigsSigned(msgspec.Struct, frozen=True, tag="configs-signed"):
    """The answer to `SignConfigs`."""

    sealed: tuple[bytes, ...]  # in the order of the question


class DeviceAnswered(msgspec.Struct, frozen=True, tag="device-answered"):
    """A device's answer at one stage of a secure sum."""

    device_id: str
    answer: bytes  # an encoded `SignedAnswer`; nothing in it is checked yet


class RoundSaved(msgspec.Struct, frozen=True, tag="round-saved"):
    """The round's record is durable."""

    round_number: int


class StopRun(msgspec.Struct, frozen=True, tag="stop"):
    """End after nothing more than tidying up."""

    cause: str


ToWorker = (
    StartRun
    | DeviceJoined
    | DeviceLeft
    | ReplyWaits
    | ConfigsSigned
    | DeviceAnswered
    | RoundSaved
    | StopRun
)

Outcome = Literal["replied", "failed", "late", "dropped", "not-needed"]


class Participation(msgspec.Struct, frozen=True, kw_only=True):
    """One selected device's part in a round, and why it has none if so."""

    device_id: str
    outcome: Outcome
    cause: str = ""
    num_examples: int = 0  # 0 in secure rounds: nobody but the device knows
    seconds: float | None = None  # from push to fold, by the worker's clock
    bytes_down: int = 0
    bytes_up: int = 0
    facts: tuple[CandidateFacts, ...] = ()  # of files that the device judged


class GroupSecrecy(msgspec.Struct, frozen=True, kw_only=True):
    """One sum of a round: of how many devices, and how many of them it takes to break it."""

    group: int
    roster: int  # devices that dealt keys to each other
    survivors: int  # whose vectors are in the sum; 0: there is no sum
    corrupted: int = 0  # c: so many in league with the coordinator learn nothing
    threshold: int = 0  # t: shares that rebuild a secret
    cause: str = ""  # why there is no sum, or why it was left out


class Secrecy(msgspec.Struct, frozen=True, kw_only=True):
    """How the devices' updates of a round stayed secret, for people who ask."""

    groups: tuple[GroupSecrecy, ...]
    noise: Literal["none", "distributed", "central"] = "none"  # central: only promised, by us
    noise_multiplier: float | None = None
    epsilon: float | None = None  # of this round's sums alone; None: exact, no bound
    delta: float | None = None
    clip_norm: float | None = None
    lane_bits: int = 0
    bytes_up: int = 0  # by the device that sent most
    blamed: dict[str, str] = {}  # devices that broke the protocol, and how
    stage_seconds: dict[str, float] = {}


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
    answers: tuple[Answer, ...] = ()  # where the run asks for statistics
    secrecy: Secrecy | None = None  # None: the coordinator saw each device's update


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


class SignConfigs(msgspec.Struct, frozen=True, tag="sign-configs"):
    """Seal these configurations of secure sums with the command key. Answered, in order."""

    payloads: tuple[bytes, ...]


class AskDevices(msgspec.Struct, frozen=True, kw_only=True, tag="ask-devices"):
    """Carry one question of a secure sum to some devices; asked again while it is unanswered."""

    device_ids: tuple[str, ...]
    session: bytes
    stage: RelayedStage
    question: bytes
    deadline_at: datetime


StageName = Literal["train", "evaluate", "statistics", "share", "mask", "consent", "reveal"]


class RoundProgress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """For people who watch."""

    round_number: int
    stage: StageName
    replied: int
    cohort: int
    until: datetime | None = None  # None: as was said before


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
    | SignConfigs
    | AskDevices
    | RoundProgress
    | RoundClosed
    | RunFinished
    | RunFailed
)
