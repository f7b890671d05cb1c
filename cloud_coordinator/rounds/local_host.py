"""A run without a coordinator: for Flower's simulation engine and for stock SuperNodes.

Nobody announces anything, records are kept in memory, and the parameters lie in a blob store. All
stages of a secure sum travel as Flower messages; the configurations are signed right here.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.host import HostEvent, Report
from cloud_coordinator.rounds.worker_messages import (
    ConfigsSigned,
    ResumePoint,
    RoundClosed,
    RoundRecord,
    RoundSaved,
    RunFailed,
    SignConfigs,
    StopRun,
)
from shared.membership import Member
from shared.messages import utc_now
from shared.run_plan import RunPlan
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE
from shared.signing import SigningKey, seal


class LocalHost:
    """A `RunHost` that keeps the records in `records`."""

    announces = False

    def __init__(
        self,
        plan: RunPlan,
        blobs: BlobStore,
        *,
        resume: ResumePoint | None = None,
        run_id: str | None = None,
        fleet: str = "local",
        command_key: SigningKey | None = None,
        members: Mapping[str, Member] | None = None,
        membership_version: int = 1,
        scratch: Path | None = None,
    ) -> None:
        """Describe a run.

        Args:
            plan: what to do.
            blobs: where parameters are kept.
            resume: the round to go on from.
            run_id: names the run towards the devices' ledgers; the plan's name where it is None.
            fleet: the devices' fleet.
            command_key: signs the configurations of secure sums; devices trust its public half.
            members: who may be in a secure sum.
            membership_version: of the signed list that ``members`` are from.
            scratch: folder for sums that are not finished.
        """
        self.plan = plan
        self.blobs = blobs
        self.resume = resume
        self.next_round = 1 if resume is None else resume.round_number + 1
        self.times_selected: Mapping[str, int] = {}
        self.run_id = run_id or plan.name
        self.fleet = fleet
        self.members: Mapping[str, Member] = members or {}
        self.membership_version = membership_version
        self.scratch = scratch
        self.records: list[RoundRecord] = []
        self.failure = ""  # why the run failed; empty while it did not
        self._command_key = command_key or SigningKey.generate()
        self._answers: list[HostEvent] = []
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the run at its next wait; from any thread."""
        self._stop.set()

    def wait(self, timeout_s: float) -> Sequence[HostEvent]:
        """Return what was asked for since the last call; else sleep: nothing else is announced."""
        if not self._answers and self._stop.wait(timeout_s):
            return [StopRun("stopped")]
        answers, self._answers = self._answers, []
        return answers

    def report(self, message: Report) -> None:
        """Keep what lasts, and sign what is to be signed."""
        match message:
            case RoundClosed(record):
                self.records.append(record)
                self._answers.append(RoundSaved(record.round_number))
            case SignConfigs(payloads):
                self._answers.append(ConfigsSigned(tuple(map(self._seal, payloads))))
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

    def _seal(self, payload: bytes) -> bytes:
        return seal(payload, payload_type=CONFIG_PAYLOAD_TYPE, key=self._command_key)
