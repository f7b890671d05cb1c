"""What the rounds need of the process around them.

Two exist: the worker child, whose host is the coordinator behind a pipe (`run_worker`), and a run
without a coordinator, as in Flower's simulation engine (`local_host`).
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    ConfigsSigned,
    DeviceAnswered,
    DeviceJoined,
    DeviceLeft,
    NudgeDevices,
    ReplyWaits,
    ResumePoint,
    RoundClosed,
    RoundProgress,
    RoundSaved,
    RoundStarted,
    RunFailed,
    RunFinished,
    SignConfigs,
    StopRun,
    WaitingForDevices,
)
from shared.membership import Member
from shared.run_plan import RunPlan

HostEvent = (
    DeviceJoined | DeviceLeft | ReplyWaits | ConfigsSigned | DeviceAnswered | RoundSaved | StopRun
)
Report = (
    WaitingForDevices
    | RoundStarted
    | NudgeDevices
    | SignConfigs
    | AskDevices
    | RoundProgress
    | RoundClosed
    | RunFinished
    | RunFailed
)


class RunHost(Protocol):
    """One life of one run, as seen by its rounds."""

    @property
    def run_id(self) -> str:
        """The run's name, the same in all its lives."""
        ...

    @property
    def fleet(self) -> str:
        """Whose devices take part."""
        ...

    @property
    def plan(self) -> RunPlan:
        """What to do."""
        ...

    @property
    def resume(self) -> ResumePoint | None:
        """The last committed round; None: begin with the plan's seed."""
        ...

    @property
    def next_round(self) -> int:
        """Number of the round to start with."""
        ...

    @property
    def times_selected(self) -> Mapping[str, int]:
        """How often each device was asked in earlier lives of this run, by device id."""
        ...

    @property
    def blobs(self) -> BlobStore:
        """Where parameters and optimiser state are kept."""
        ...

    @property
    def scratch(self) -> Path | None:
        """Folder for sums that are not finished, of this run alone; None: a crash loses them."""
        ...

    @property
    def members(self) -> Mapping[str, Member]:
        """Who may be in a secure sum, as far as it is known before anybody joins."""
        ...

    @property
    def membership_version(self) -> int:
        """Of the list that `members` are from; 0 where there are none."""
        ...

    @property
    def announces(self) -> bool:
        """Whether `wait` tells who joins, leaves and has replied.

        Where it does not, everybody whom the Grid lists takes part, and replies are polled for.
        """
        ...

    def wait(self, timeout_s: float) -> Sequence[HostEvent]:
        """Return what happened, in order: at once if something did, else after ``timeout_s``."""
        ...

    def report(self, message: Report) -> None:
        """Say how it goes, or ask for something.

        `RoundClosed` is answered by the event `RoundSaved`, `SignConfigs` by `ConfigsSigned`.
        Where nothing is announced, `AskDevices` is not understood.
        """
        ...

    def seconds(self) -> float:
        """Return a clock that never jumps, in seconds."""
        ...

    def now(self) -> datetime:
        """Return the wall clock, aware UTC, for records that people read."""
        ...
