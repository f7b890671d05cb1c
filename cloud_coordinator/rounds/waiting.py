"""Waits until enough devices are there to begin a round."""

from collections.abc import Callable
from datetime import timedelta

from cloud_coordinator.rounds.cohort import can_start, wanted_devices
from cloud_coordinator.rounds.run_parts import RunParts
from cloud_coordinator.rounds.worker_messages import WaitingForDevices

_LOOK_AROUND_S = 1.0  # while too few devices are there


def wait_for_devices(
    parts: RunParts, eligible: Callable[[frozenset[str]], frozenset[str]]
) -> frozenset[str]:
    """Return the devices that may be asked: fewer than the quorum if the wait was vain.

    Args:
        parts: of the run; its host is told who is waited for.
        eligible: leaves out those who may not be asked.

    Raises:
        StoppedError: the run is to end now.
    """
    host, roster = parts.host, parts.roster
    plan = host.plan.cohort
    deadline_s = host.seconds() + plan.recruit_deadline_s
    until = host.now() + timedelta(seconds=plan.recruit_deadline_s)
    told: int | None = None
    while True:
        roster.look_around()
        joined = eligible(roster.available())
        left_s = deadline_s - host.seconds()
        if can_start(len(joined), plan, quiet_s=roster.quiet_s) or left_s <= 0:
            return joined
        if told != len(joined):
            told = len(joined)
            host.report(WaitingForDevices(joined=told, wanted=wanted_devices(plan), until=until))
        roster.wait(min(left_s, _LOOK_AROUND_S))
