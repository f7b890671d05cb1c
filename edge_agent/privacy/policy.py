"""What the owner of this device allows: ``policy.toml`` in its home, which beats the coordinator.

A coordinator proposes each sum, signed and complete; here stands what this device accepts. What is
not written has a strict default, so no file at all is the safe choice. Findings R3, R8 to R11 and
R16 of the security review decided which keys there are. A refusal names the key, what the owner
allows and what was asked; it reaches the coordinator, so it says nothing about the data.
"""

import math
from collections.abc import Container, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
from msgspec import Meta

from shared.config import read_toml
from shared.errors import ConfigError, PeerError, PolicyError
from shared.membership import Member
from shared.messages import Identifier
from shared.secure_sum.config import (
    MAX_ROSTER,
    SumConfig,
    check_roster_size,
    corrupted_of,
    survivors_needed,
)

POLICY_FILE = "policy.toml"

_Fraction = Annotated[float, Meta(ge=0, lt=0.5)]


class OwnerPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All keys of ``policy.toml``, with the values that hold where a key is missing."""

    min_cohort: Annotated[int, Meta(ge=2, le=MAX_ROSTER)] = 18
    corrupt_fraction: _Fraction = 0.1
    corrupt_devices: Annotated[int, Meta(ge=1, le=MAX_ROSTER)] = 1
    max_corrupt: Annotated[int, Meta(ge=1, le=MAX_ROSTER)] | None = None
    exact_sums: bool = False
    max_exact_sums: Annotated[int, Meta(ge=0)] = 1000
    min_noise_multiplier: Annotated[float, Meta(ge=0, le=1000)] = 0.0
    epsilon: Annotated[float, Meta(ge=0, le=1_000_000)] = 8.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-6
    individual_updates: bool = False
    statistics: bool = True
    required_peers: tuple[Identifier, ...] = ()
    min_peers_known_for_days: Annotated[float, Meta(ge=0, le=36_500)] = 0.0
    min_owners: Annotated[int, Meta(ge=1, le=MAX_ROSTER)] = 1

    def __post_init__(self) -> None:
        """Refuse what no sum can satisfy; raise ValueError, which msgspec turns into its own."""
        if self.corrupt_devices >= self.min_cohort:
            raise ValueError(
                f"corrupt_devices = {self.corrupt_devices} leaves nobody honest among "
                f"min_cohort = {self.min_cohort}"
            )
        if self.max_corrupt is not None and self.max_corrupt < self.corrupted:
            raise ValueError(
                f"max_corrupt = {self.max_corrupt} is below the {self.corrupted} that "
                f"corrupt_fraction and corrupt_devices make of min_cohort = {self.min_cohort}"
            )

    @property
    def corrupted(self) -> int:
        """How many of `min_cohort` devices may be in league with the coordinator."""
        share = math.ceil(round(self.corrupt_fraction * self.min_cohort, 9))
        return max(1, self.corrupt_devices, share)

    @property
    def min_honest(self) -> int:
        """Fewest honest devices among whose vectors this device's may hide."""
        return self.min_cohort - self.corrupted

    def check_config(self, config: SumConfig) -> None:
        """Raise PolicyError unless the owner allows this sum, whoever will be in its roster."""
        if config.purpose == "statistics":
            self._check_statistics(config)
        self._check_corrupted(config)
        self._check_size(config)
        self._check_noise(config)

    def check_members(self, members: Container[str]) -> None:
        """Raise PolicyError where no roster of these devices can be what the owner accepts."""
        for wanted in self.required_peers:
            if wanted not in members:
                _refuse(f"required_peers has {wanted!r}", "the membership list lacks that device")

    def check_roster(self, members: Sequence[Member], now: datetime, *, own_id: str = "") -> None:
        """Raise PolicyError unless the owner accepts these devices beside the own one.

        Args:
            members: the whole roster, the own device included.
            now: aware; how long peers are known is counted up to it.
            own_id: the device that asks; it may be new itself.
        """
        ids = {member.device_id for member in members}
        for wanted in self.required_peers:
            if wanted not in ids:
                _refuse(f"required_peers has {wanted!r}", "the roster lacks that device")
        youngest_allowed = now - timedelta(days=self.min_peers_known_for_days)
        new = sum(m.device_id != own_id and m.known_since > youngest_allowed for m in members)
        if self.min_peers_known_for_days and new:
            _refuse(
                f"min_peers_known_for_days = {self.min_peers_known_for_days:g}",
                f"{new} of the {len(members)} devices in the roster are known for less",
            )
        owners = len({member.owner for member in members})  # all without an owner count as one
        if owners < self.min_owners:
            _refuse(f"min_owners = {self.min_owners}", f"the roster has devices of {owners}")

    def check_plain_update(self) -> None:
        """Raise PolicyError unless an update may leave by itself, outside any sum."""
        if not self.individual_updates:
            _refuse("individual_updates = false", "the run asks for each device's own update")

    def _check_statistics(self, config: SumConfig) -> None:
        if not self.statistics:
            _refuse("statistics = false", "this sum is a statistic")
        if config.threshold == "group":
            raise PolicyError("statistics are summed over no groups, and this sum is of one")
        # Noised ones may be of shards, where a fleet is more than one sum can hold.
        if config.noise is None and config.groups > 1:
            raise PolicyError(
                "statistics without noise are summed over one group only, and this sum is one of "
                f"{config.groups}"
            )

    def _check_noise(self, config: SumConfig) -> None:
        if config.noise is None:
            if not self.exact_sums:
                _refuse("exact_sums = false", "this sum has no noise that devices add themselves")
            return
        if config.noise.multiplier < self.min_noise_multiplier:
            _refuse(
                f"min_noise_multiplier = {self.min_noise_multiplier:g}",
                f"this sum has a noise multiplier of {config.noise.multiplier:g}",
            )
        from shared.secure_sum.accounting import charge_of  # noqa: PLC0415  # numpy: not the daemon's

        try:
            promises_nothing = charge_of(config).infinite
        except ConfigError as error:
            raise PeerError(f"no device can draw the noise of this sum: {error}") from error
        if promises_nothing:
            raise PolicyError(
                "the noise of this sum promises nothing; no device needs to take part"
            )

    def _check_corrupted(self, config: SumConfig) -> None:
        if config.corrupt_fraction < self.corrupt_fraction:
            _refuse(
                f"corrupt_fraction = {self.corrupt_fraction:g}",
                f"this sum reckons with {config.corrupt_fraction:g}",
            )
        if config.corrupt_devices < self.corrupt_devices:
            _refuse(
                f"corrupt_devices = {self.corrupt_devices}",
                f"this sum reckons with {config.corrupt_devices} at least",
            )
        largest = corrupted_of(config, config.max_roster)
        if self.max_corrupt is not None and largest > self.max_corrupt:
            _refuse(
                f"max_corrupt = {self.max_corrupt}",
                f"{largest} of {config.max_roster} devices in this sum may be corrupted",
            )

    def _check_size(self, config: SumConfig) -> None:
        survivors, honest = fewest_survivors(config)
        if survivors < self.min_cohort:
            _refuse(f"min_cohort = {self.min_cohort}", f"this sum may be of {survivors} devices")
        if honest < self.min_honest:
            _refuse(
                f"min_cohort = {self.min_cohort}, of which {self.min_honest} must be honest",
                f"this sum may be of {honest} honest devices",
            )
        if config.noise is not None and config.noise.survivors > honest:
            raise PolicyError(
                f"the noise of this sum needs the shares of {config.noise.survivors} devices, and "
                f"only {honest} honest ones are certain to be in it"
            )


def fewest_survivors(config: SumConfig) -> tuple[int, int]:
    """Return how few devices, and how few honest ones, the sum may be of.

    Looks at every roster that `check_roster_size` lets pass, since the numbers of corrupted and of
    dropped devices depend on its size.

    Raises:
        PeerError: no roster of any size can end in this sum.
    """
    sizes = [size for size in range(2, config.max_roster + 1) if _can_end(config, size)]
    if not sizes:
        raise PeerError(
            f"no roster of up to {config.max_roster} devices can end in this sum; "
            "lower min_survivors, at_least or drop_fraction"
        )
    survivors = [survivors_needed(config, size) for size in sizes]
    honest = [
        needed - corrupted_of(config, size) for size, needed in zip(sizes, survivors, strict=True)
    ]
    return min(survivors), min(honest)


def read_policy(home: Path) -> OwnerPolicy:
    """Return what the owner wrote, or the defaults where there is no file.

    Raises:
        ConfigError: the file cannot be read or does not fit; names the key.
    """
    path = home / POLICY_FILE
    return read_toml(path, OwnerPolicy) if path.exists() else OwnerPolicy()


def _can_end(config: SumConfig, size: int) -> bool:
    try:
        check_roster_size(config, size)
    except PeerError:
        return False
    return True


def _refuse(allowed: str, asked: str) -> NoReturn:
    raise PolicyError(f"this device's owner has {allowed} in {POLICY_FILE}, and {asked}")
