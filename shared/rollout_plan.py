"""How a version is rolled out, as its author writes it: waves, windows and gates.

Part of a run's plan (``[rollout]``), or a file of its own for ``shoal rollout start``.
"""

import zoneinfo
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared.config import convert, read_toml
from shared.errors import ConfigError

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Share = Annotated[float, Meta(ge=0, le=1)]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WEEK = 8  # days to look ahead: the same weekday's window may have begun already


class WavePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One wave. Sizes count the waves before it in; write ``devices`` or ``percent``."""

    devices: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    percent: Annotated[float, Meta(gt=0, le=100)] | None = None  # of devices with data for the task
    bake_s: Annotated[float, Meta(ge=0, le=30 * 24 * 3600)] = 300.0  # of serving, before the next
    where: dict[Literal["device", "owner", "accelerator"], str] = {}  # patterns, as "clinic-*"

    def __post_init__(self) -> None:
        """Refuse a wave of no size, or of two."""
        if (self.devices is None) == (self.percent is None):
            raise ConfigError("a wave needs devices or percent: write one of them")


class WindowPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Hours in which waves may open; one that ends before it starts lasts over midnight."""

    start: Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d\Z")]
    end: Annotated[str, Meta(pattern=r"^([01]\d|2[0-3]):[0-5]\d\Z")]
    days: tuple[Day, ...] = _DAYS  # on which it starts
    zone: str = "UTC"

    def __post_init__(self) -> None:
        """Refuse a zone that is not known here, and a window that is never open."""
        if not self.days or self.start == self.end:
            raise ConfigError("a window needs a day, and an end that is not its start")
        try:
            zoneinfo.ZoneInfo(self.zone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError) as error:
            raise ConfigError(
                f"windows.zone: there is no time zone {self.zone!r} here; write one as "
                "'Europe/Berlin', or UTC"
            ) from error

    def opens(self, now: datetime) -> datetime:
        """Return when it is open next: ``now`` while it is."""
        zone = zoneinfo.ZoneInfo(self.zone)
        local, start, end = now.astimezone(zone), _clock(self.start), _clock(self.end)
        for ahead in range(-1, _WEEK):
            day = local.date() + timedelta(days=ahead)
            if _DAYS[day.weekday()] not in self.days:
                continue
            opened = datetime.combine(day, start, zone)
            closed = datetime.combine(day + timedelta(days=end < start), end, zone)
            if now < closed:
                return max(now, opened.astimezone(now.tzinfo))
        raise AssertionError  # some day of a week is among its days


class GatePlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What devices' own facts may show at most before a rollout is turned back."""

    max_failed: Share = 0.0  # of the devices told, that refuse the version as unfit or untrusted
    max_crashes: Annotated[int, Meta(ge=0, le=1000)] = 0  # of one device's inference server
    max_error_share: Share = 0.02  # of all requests
    min_requests: Annotated[int, Meta(ge=1, le=1_000_000)] = 20  # fewer are not judged
    max_slowdown: Annotated[float, Meta(gt=0, le=1000)] = (
        3.0  # against each device's version before
    )
    min_served: Share = 0.9  # of a wave's devices that are online; 0: nobody need serve it
    converge_s: Annotated[float, Meta(gt=0, le=30 * 24 * 3600)] = 900.0  # to do so, else a halt


class RolloutPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A rollout, wave by wave."""

    waves: tuple[WavePlan, ...]
    windows: tuple[WindowPlan, ...] = ()  # left out: at any time
    gates: GatePlan = GatePlan()
    on_breach: Literal["rollback", "pause"] = "rollback"
    watch_s: Annotated[float, Meta(ge=1, le=3600)] = 5.0  # how often devices say how they do

    def __post_init__(self) -> None:
        """Refuse waves that shrink, or leave devices out at the end."""
        if not self.waves:
            raise ConfigError("a rollout needs a wave: the last one with percent = 100")
        last = self.waves[-1]
        if last.percent != 100 or last.where:
            raise ConfigError(
                "the last wave must have percent = 100 and no where: what passed goes to all"
            )
        for sizes in (
            [w.percent for w in self.waves if w.percent is not None],
            [w.devices for w in self.waves if w.devices is not None],
        ):
            if sizes != sorted(sizes):
                raise ConfigError("waves grow: write their devices and percents in rising order")

    def opens(self, now: datetime) -> datetime:
        """Return when a wave may open next: ``now`` where it may at once."""
        return min((window.opens(now) for window in self.windows), default=now)


# What a run does that says nothing of its rollout: all devices at once, and nobody is waited for.
AT_ONCE = RolloutPlan(waves=(WavePlan(percent=100, bake_s=0),), gates=GatePlan(min_served=0))


def read_rollout_plan(path: Path) -> RolloutPlan:
    """Read a plan's TOML file; raise ConfigError, naming the key, where it does not fit."""
    return read_toml(path, RolloutPlan)


def plan_of(document: Any) -> RolloutPlan:
    """Return what JSON or a database row holds; raise ConfigError where it does not fit."""
    return convert(document, RolloutPlan, source="the rollout plan")


def _clock(text: str) -> time:
    return time.fromisoformat(text)
