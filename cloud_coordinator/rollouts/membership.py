"""Who is in which wave, and where each device stands by what it reports. Pure."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import msgspec

from cloud_coordinator.devices.tables import DeviceRow
from cloud_coordinator.rollouts.decision import Member, Standing
from cloud_coordinator.rollouts.tables import RolloutDeviceRow
from shared.errors import ConfigError
from shared.messages import DeploymentState, Health, PresenceState, Reported
from shared.rollout_plan import RolloutPlan, WavePlan

_REFUSALS = ("unfit", "untrusted")  # what another attempt would not mend


@dataclass(frozen=True, slots=True)
class Known:
    """The digests that a device of a rollout may rightly report."""

    wanted: str  # the rollout's version
    back: str | None  # the version before, where devices are to go back to it
    artifacts: Mapping[str, Collection[str]]  # of each version there is: its files


def wave_members(
    wave: WavePlan, devices: Sequence[DeviceRow], *, taken: Collection[str], seed: str
) -> list[str]:
    """Choose who joins a wave when it opens.

    Args:
        wave: its size counts those that are taken.
        devices: all that have data for the task.
        taken: devices of the waves before it.
        seed: the same one gives the same order of devices.

    Returns:
        The ids of those that are new.
    """
    fitting = [d.device_id for d in devices if d.device_id not in taken and _fits(wave, d)]
    fitting.sort(key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    if wave.devices is not None:
        size = wave.devices
    else:
        assert wave.percent is not None  # a wave has one of them
        size = math.ceil(round(wave.percent / 100 * len(devices), 9))
    return fitting[: max(0, size - len(taken))]


def check_waves(plan: RolloutPlan, devices: Sequence[DeviceRow], *, task: str) -> None:
    """Raise ConfigError where a wave would be empty, so that nobody tries the version first."""
    if plan.gates.min_served == 0:
        return
    if not devices:
        raise ConfigError(
            f"no device has data for {task!r}, so none could serve it first; let one join, or "
            "write gates.min_served = 0"
        )
    for number, wave in enumerate(plan.waves, start=1):
        if not any(_fits(wave, device) for device in devices):
            where = ", ".join(f"{key} = {value!r}" for key, value in wave.where.items())
            names = ", ".join(sorted(d.device_id for d in devices)[:5])
            raise ConfigError(
                f"wave {number}: {where} matches none of the {len(devices)} devices with data for "
                f"{task!r} ({names}{', …' if len(devices) > 5 else ''}); change its where"
            )


def member_of(row: RolloutDeviceRow, device: DeviceRow, known: Known) -> Member:
    """Return where a device stands in a rollout, by the last it said of itself."""
    reported = msgspec.convert(device.reported, Reported) if device.reported else None
    health = msgspec.convert(device.health, Health) if device.health else None
    standing = _standing(row, device, reported, known)
    served = health.served if health is not None else None
    is_new = standing is Standing.SERVING and served is not None and served.version == known.wanted
    return Member(
        device_id=device.device_id,
        wave=row.wave_number,
        told_at=row.told_at,
        standing=standing,
        serving_since=row.serving_since,
        served=served if is_new else None,
        before=health.before if health is not None and is_new else None,
        cause=reported.cause if reported is not None else "",
    )


def _standing(
    row: RolloutDeviceRow, device: DeviceRow, reported: Reported | None, known: Known
) -> Standing:
    if device.presence != PresenceState.READY:
        return Standing.AWAY
    if reported is None or reported.desired_version < row.told_version:
        return Standing.CONVERGING
    version, artifact = reported.serving_version, reported.serving_artifact
    settled = version == known.wanted or reported.deployment is DeploymentState.SERVING
    if version is not None and settled and artifact not in known.artifacts.get(version, ()):
        return Standing.STRANGE
    if version == known.wanted:
        return Standing.SERVING
    if version is not None and version == known.back:
        return Standing.RETURNED
    refused = reported.failure in _REFUSALS and reported.deployment is DeploymentState.FAILED
    return Standing.FAILED if refused else Standing.CONVERGING


def _fits(wave: WavePlan, device: DeviceRow) -> bool:
    facts = {
        "device": device.device_id,
        "owner": device.owner,
        "accelerator": (device.hello or {}).get("accelerator", ""),
    }
    return all(fnmatchcase(facts[key], pattern) for key, pattern in wave.where.items())
