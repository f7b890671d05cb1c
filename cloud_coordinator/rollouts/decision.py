"""What happens next in a rollout: a pure function of what devices report and of the time.

Only machine facts are judged here, each signed by its device: deployments that fail, crashes,
errors, latencies against the version before on the same device. Nothing of them comes from data.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cloud_coordinator.rollouts.lifecycle import RolloutEvent, RolloutState
from shared.messages import ServedFigures
from shared.rollout_plan import GatePlan, RolloutPlan


class Standing(StrEnum):
    """Where one device is, by what it reports of itself."""

    AWAY = "away"  # not online: converges when it comes back
    CONVERGING = "converging"
    SERVING = "serving"  # the rollout's version, by the digest of the file it reports
    FAILED = "failed"  # it refused the version as unfit or untrusted
    STRANGE = "strange"  # it serves a digest that nobody here knows
    RETURNED = "returned"  # it serves the version before again


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One device of a rollout."""

    device_id: str
    wave: int
    told_at: datetime
    standing: Standing
    serving_since: datetime | None = None
    served: ServedFigures | None = None  # how the new version does on it
    before: ServedFigures | None = None  # how the one before did
    cause: str = ""  # of a failure, the device's own sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """What a decision depends on beside its members."""

    state: RolloutState
    plan: RolloutPlan
    wave: int = 0  # the last that was opened; 0 before any
    can_return: bool = True  # there is a version to go back to
    waits_for: str = ""  # why its first wave must not open yet


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing is due before ``until``, or the next report."""

    why: str
    until: datetime | None = None


@dataclass(frozen=True, slots=True)
class OpenWave:
    """The next wave may begin."""

    number: int


@dataclass(frozen=True, slots=True)
class Halt:
    """A person has to look."""

    gate: str
    cause: str


@dataclass(frozen=True, slots=True)
class TurnBack:
    """The version must go."""

    gate: str
    cause: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The rollout is over."""

    event: RolloutEvent


Decision = Wait | OpenWave | Halt | TurnBack | Finish | None  # None: it has ended
S = RolloutState


def decide(rollout: Rollout, members: Sequence[Member], now: datetime) -> Decision:
    """Say what happens next; the shell carries it out and asks again."""
    match rollout.state:
        case S.PLANNED:
            if rollout.waits_for:
                return Wait(rollout.waits_for)
            return _open(rollout, now)
        case S.ROLLING_BACK:
            left = sum(m.standing is Standing.SERVING for m in members)
            if left and rollout.can_return:
                return Wait(f"{_devices(left)} still to go back")
            return Finish(RolloutEvent.RETURNED)
        case S.ROLLING | S.PAUSED:
            return _judge(rollout, members, now)
    return None


def machine_breach(gates: GatePlan, members: Sequence[Member]) -> tuple[str, str] | None:
    """Return the first gate that devices' own facts fail, and by how much."""
    told = [m for m in members if m.standing is not Standing.AWAY]
    failed = [m for m in told if m.standing is Standing.FAILED]
    if len(failed) > gates.max_failed * len(told):
        first = failed[0]
        cause = f"{len(failed)} of {_devices(len(told))} refuse it; {first.device_id}: "
        return "deployment", cause + first.cause
    if strange := [m for m in told if m.standing is Standing.STRANGE]:
        return "digest", f"{strange[0].device_id} serves a digest that no version here has"
    served = [(m.device_id, m.served) for m in told if m.served is not None]
    for device_id, figures in served:
        if figures.crashes > gates.max_crashes:
            return "crashes", f"the inference server of {device_id} crashed {figures.crashes} times"
    requests = sum(figures.requests for _, figures in served)
    errors = sum(figures.errors for _, figures in served)
    if requests >= gates.min_requests and errors > gates.max_error_share * requests:
        most = f"at most {gates.max_error_share:.1%} may"
        return "errors", f"{errors} of {requests} requests failed by its fault, {most}"
    ratios = [r for m in told if (r := slowdown(m, gates.min_requests)) is not None]
    if ratios and (typical := statistics.median(ratios)) > gates.max_slowdown:
        most = f"at most {gates.max_slowdown:g} are allowed"
        return "latency", f"it takes {typical:.1f} times as long as the version before, {most}"
    return None


def slowdown(member: Member, min_requests: int) -> float | None:
    """Compare a device with itself: by requests where both versions had enough, else by self-test.

    Returns:
        How many times as long the new version takes; None where nothing tells.
    """
    now, before = member.served, member.before
    if now is None or before is None:
        return None
    if min(now.requests, before.requests) >= min_requests and now.p95_ms and before.p95_ms:
        return now.p95_ms / before.p95_ms
    if now.self_test_ms and before.self_test_ms:
        return now.self_test_ms / before.self_test_ms
    return None


def _judge(rollout: Rollout, members: Sequence[Member], now: datetime) -> Decision:
    paused = rollout.state is S.PAUSED
    if breach := machine_breach(rollout.plan.gates, members):
        if rollout.can_return and rollout.plan.on_breach == "rollback":
            return TurnBack(*breach)
        return Wait(breach[1]) if paused else Halt(*breach)
    if paused:
        return Wait("paused; 'shoal rollout resume' or 'abort' goes on")
    wave = [m for m in members if m.wave == rollout.wave]
    if (hold := _convergence(rollout, wave, now)) is not None:
        return hold
    if rollout.wave == len(rollout.plan.waves):
        return Finish(RolloutEvent.LAST_WAVE_PASSED)
    return _open(rollout, now)


def _convergence(rollout: Rollout, wave: Sequence[Member], now: datetime) -> Wait | Halt | None:
    """Return what holds up the wave that is open: devices that do not serve yet, or the bake."""
    gates, plan = rollout.plan.gates, rollout.plan.waves[rollout.wave - 1]
    if not wave or gates.min_served == 0:
        return None
    online = sum(m.standing is not Standing.AWAY for m in wave)
    needed = max(1, math.ceil(gates.min_served * online))
    serving = sorted(m.serving_since for m in wave if m.serving_since is not None)
    if len(serving) < needed:
        what = f"{len(serving)} of {_devices(needed)} in wave {rollout.wave} serve it"
        until = max(m.told_at for m in wave) + timedelta(seconds=gates.converge_s)
        return Wait(what, until) if now < until else Halt("convergence", f"only {what} in time")
    baked = serving[needed - 1] + timedelta(seconds=plan.bake_s)
    return Wait(f"wave {rollout.wave} bakes", baked) if now < baked else None


def _open(rollout: Rollout, now: datetime) -> Wait | OpenWave:
    opens = rollout.plan.opens(now)
    return Wait("its window opens later", opens) if opens > now else OpenWave(rollout.wave + 1)


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"
