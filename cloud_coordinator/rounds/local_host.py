"""A run without a coordinator: for Flower's simulation engine and for stock SuperNodes.

Nobody announces anything, records are kept in memory, and the parameters lie in a blob store.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.host import HostEvent, Report
from cloud_coordinator.rounds.worker_messages import (
    ResumePoint,
    RoundClosed,
    RoundRecord,
    RoundSaved,
    RunFailed,
    StopRun,
)
from shared.messages import utc_now
from shared.run_plan import RunPlan


class LocalHost:
    """A `RunHost` that keeps the records in `records`."""

    announces = False

    def __init__(
        self, plan: RunPlan, blobs: BlobStore, *, resume: ResumePoint | None = None
    ) -> None:
        self.plan = plan
        self.blobs = blobs
        self.resume = resume
        self.next_round = 1 if resume is None else resume.round_number + 1
        self.times_selected: Mapping[str, int] = {}
        self.records: list[RoundRecord] = []
        self.failure = ""  # why the run failed; empty while it did not
        self._saved: list[HostEvent] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the run at its next wait; from any thread."""
        self._stop.set()

    def wait(self, timeout_s: float) -> Sequence[HostEvent]:
        """Return the rounds saved since the last call; else sleep, as nothing else is announced."""
        if not self._saved and self._stop.wait(timeout_s):
            return [StopRun("stopped")]
        saved, self._saved = self._saved, []
        return saved

    def report(self, message: Report) -> None:
        """Keep what lasts."""
        match message:
            case RoundClosed(record):
                self.records.append(record)
                self._saved.append(RoundSaved(record.round_number))
            case RunFailed(cause):
                self.failure = cause
            case _:
                pass

    def seconds(self) -> float:
        """Return the machine's monotonic clock."""
        return time.monotonic()

    def now(self) -> datetime:
        """Return the wall clock."""
        return utc_now()
