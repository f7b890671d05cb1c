"""Main of the run worker, a child of the coordinator: one life of one run, over pipes.

Starts with ``python -m cloud_coordinator.rounds.run_worker``, reads `StartRun`, and ends

- with status 0 after `RunFinished`, or having been told to stop (`StopRun`, closed input, SIGTERM);
- with status 1 after `RunFailed`: the run itself cannot go on;
- with status 1 and a traceback: a bug; with a signal: killed. A new life may or may not do better;
- with status 75 (`EX_TEMPFAIL`) after `RunFailed`: what it needs is gone for now (the SuperLink,
  disk space), and a new life may go on from the last commit.

Standard error is its log.
"""

import logging
import os
import queue
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.flower.grid import open_run
from cloud_coordinator.rounds.host import HostEvent, Report
from cloud_coordinator.rounds.training_rounds import perform_run
from cloud_coordinator.rounds.worker_messages import (
    ResumePoint,
    RunFailed,
    StartRun,
    StopRun,
    ToWorker,
    WorkerReady,
)
from shared.child import ParentLink, die_with_parent
from shared.errors import PeerError, ShoalError, UnavailableError
from shared.logs import configure_logging
from shared.membership import Member
from shared.messages import utc_now
from shared.run_plan import RunPlan

logger = logging.getLogger(__name__)

_START_DEADLINE_S = 60.0


class PipeHost:
    """The coordinator, as the rounds see it: a `RunHost` behind the pipe."""

    announces = True

    def __init__(self, link: ParentLink[ToWorker], start: StartRun) -> None:
        self._link = link
        self._start = start
        self.blobs = BlobStore(Path(start.blobs))
        self.scratch = Path(start.scratch) if start.scratch else None
        self.members: Mapping[str, Member] = {}  # they are told as they join
        self.membership_version = 0
        self.failed = False  # the run is over, and not well

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self._start.run_id

    @property
    def fleet(self) -> str:
        """Whose devices take part."""
        return self._start.fleet

    @property
    def plan(self) -> RunPlan:
        """What to do."""
        return self._start.plan

    @property
    def resume(self) -> ResumePoint | None:
        """The last committed round."""
        return self._start.resume

    @property
    def next_round(self) -> int:
        """Number of the round to start with."""
        return self._start.next_round

    @property
    def times_selected(self) -> Mapping[str, int]:
        """How often each device was asked in earlier lives."""
        return self._start.times_selected

    def wait(self, timeout_s: float) -> Sequence[HostEvent]:
        """Return all that the coordinator said since the last call, or says within the time."""
        events: list[HostEvent] = []
        try:
            events.append(_event(self._link.incoming.get(timeout=timeout_s)))
            while True:
                events.append(_event(self._link.incoming.get_nowait()))
        except queue.Empty:
            return events

    def report(self, message: Report) -> None:
        """Tell the coordinator."""
        self.failed = self.failed or isinstance(message, RunFailed)
        self._link.send(message)

    def seconds(self) -> float:
        """Return the machine's monotonic clock."""
        return time.monotonic()

    def now(self) -> datetime:
        """Return the wall clock."""
        return utc_now()


def main() -> int:
    """Perform the run that the first line names, and return the exit status."""
    die_with_parent()
    configure_logging("INFO")
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    link: ParentLink[ToWorker] = ParentLink(ToWorker)
    signal.signal(signal.SIGTERM, lambda *_: link.incoming.put(None))
    try:
        start = link.incoming.get(timeout=_START_DEADLINE_S)
    except queue.Empty:
        logger.error("no StartRun came within %.0f s", _START_DEADLINE_S)  # noqa: TRY400  # no news in its traceback
        return os.EX_TEMPFAIL
    if not isinstance(start, StartRun):  # stopped before it began
        return os.EX_OK
    return _perform(link, start)


def _perform(link: ParentLink[ToWorker], start: StartRun) -> int:
    """Perform the run; a bug in it ends the process with a traceback and status 1."""
    host = PipeHost(link, start)
    try:
        with open_run(
            address=start.superlink_address,
            ca_pem=start.superlink_ca_pem,
            secrets_path=Path(start.superlink_secrets_path),
            task=start.plan.task,
        ) as grid:
            link.send(WorkerReady())
            perform_run(host, grid)
    except ShoalError as error:
        logger.warning("run %s cannot go on: %s", start.run_id, error)
        link.send(RunFailed(str(error)))
        return os.EX_TEMPFAIL if isinstance(error, UnavailableError) else 1
    return 1 if host.failed else os.EX_OK


def _event(message: ToWorker | None) -> HostEvent:
    if message is None:  # the pipe was closed, or SIGTERM came
        return StopRun("the coordinator ended")
    if isinstance(message, StartRun):
        raise PeerError("the coordinator started the same worker twice")
    return message


if __name__ == "__main__":
    sys.exit(main())
