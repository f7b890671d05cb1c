"""What a plan says of secure sums, and how that parts the devices of a round into sums.

The plan proposes; every device's owner disposes: what a device accepts is its own policy's word.
plan_checks.py refuses what could not end in a sum, or would promise more than a sum can keep.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.errors import ConfigError
from shared.secure_sum.config import (
    DEFAULT_AT_LEAST,
    MAX_ROSTER,
    Fraction,
    LaneBits,
    Noise,
    corrupted_of,
    survivors_needed,
)

GROUP_DROP_FRACTION = 0.1  # so few devices cannot tolerate more with their higher threshold
ROBUST = ("median", "trimmed-mean", "norm-bound")  # how to combine sums of groups
PER_DEVICE = ("krum", "multi-krum", "bulyan", "foolsgold")  # these look at single updates
FEWEST_ROBUST_GROUPS = 3  # of two, nobody can say which is wrong


class PrivacyPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How updates are hidden and noised."""

    mode: Literal["secure", "plain"] = "secure"  # plain: the coordinator sees each update
    at_least: Annotated[int, Meta(ge=1, le=MAX_ROSTER)] = DEFAULT_AT_LEAST  # honest survivors
    corrupt_fraction: Fraction = 0.1  # of a sum's devices, in league with the coordinator
    corrupt_devices: Annotated[int, Meta(ge=1, le=MAX_ROSTER)] = 1  # at least so many
    drop_fraction: Fraction = 0.3  # of a sum's devices, lost after training; in groups 0.1 at most
    lane_bits: LaneBits = 16  # on the wire, for each parameter
    clip_norm: Annotated[float, Meta(gt=0, le=1e9)] = 10.0  # L2, of an update
    rotate: bool = True  # spread each update over all lanes before it is rounded
    weights: Literal["examples", "uniform"] = "examples"
    max_weight: Annotated[int, Meta(ge=1, le=10**9)] = 1000  # examples; more count as so many
    noise: Literal["none", "distributed", "central"] = "none"
    noise_kind: Literal["skellam", "discrete-gaussian"] = "skellam"  # of distributed noise
    noise_multiplier: Annotated[float, Meta(gt=0, le=1000)] = 1.0  # its σ, over clip_norm
    delta: Annotated[float, Meta(gt=0, le=0.01)] = 1e-6
    adaptive_clipping: bool = False  # clip_norm is the first round's
    target_unclipped: Annotated[float, Meta(gt=0, lt=1)] = 0.5  # fraction of devices
    clip_learning_rate: Annotated[float, Meta(gt=0, le=1)] = 0.2
    stage_deadline_s: Annotated[float, Meta(gt=0, le=3600)] = 30.0  # for one stage's answers


class AggregationPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How sums become one update."""

    group_size: Annotated[int, Meta(ge=0, le=MAX_ROSTER)] = 0  # devices; 0: as large as can be
    combine: str = "mean"  # of the groups' means; or one of ROBUST
    poisoned_fraction: Fraction = 0.0  # γ, of all devices, that send what they like
    trim_fraction: Annotated[float, Meta(gt=0, lt=0.5)] = 0.2  # of groups, at each end
    norm_bound: Annotated[float, Meta(gt=0, le=1e9)] | None = None  # L2, of a group's mean

    def __post_init__(self) -> None:
        """Refuse what needs no other part of the plan to be wrong."""
        if self.combine in PER_DEVICE:
            raise ConfigError(
                f"aggregation.combine {self.combine!r} compares single devices' updates; a sum "
                "hides single devices, so it cannot be checked one by one: use groups with "
                "combine = 'median' and a group_size"
            )
        if self.combine not in ("mean", *ROBUST):
            choices = ", ".join(map(repr, ("mean", *ROBUST)))
            raise ConfigError(
                f"aggregation.combine: there is no {self.combine!r}; choose one of {choices}"
            )
        if (self.combine == "norm-bound") != (self.norm_bound is not None):
            raise ConfigError(
                "aggregation.norm_bound and combine = 'norm-bound' need each other: write both, "
                "or neither"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one round's devices are parted into sums; fits where `Limits` are asked for."""

    groups: int  # sums side by side
    wanted: int  # fewest devices of the cohort in one of them
    max_roster: int  # devices that are asked for one
    min_survivors: int
    at_least: int
    corrupt_fraction: float
    corrupt_devices: int
    drop_fraction: float
    threshold: Literal["majority", "group"]

    @property
    def corrupted(self) -> int:
        """How many of the largest roster may be in league with the coordinator."""
        return corrupted_of(self, self.max_roster)

    @property
    def honest_survivors(self) -> int:
        """Honest devices that are certain to be in each sum: whose noise can be counted on."""
        return min(
            survivors_needed(self, size) - corrupted_of(self, size)
            for size in range(self.min_survivors, self.max_roster + 1)
            if survivors_needed(self, size) <= size
        )

    @property
    def tolerated_drops(self) -> int:
        """Devices that one full roster may lose after it agreed on keys."""
        return self.max_roster - survivors_needed(self, self.max_roster)


def lay_out(
    privacy: PrivacyPlan,
    aggregation: AggregationPlan,
    *,
    size: int,
    asked: int,
    quorum: int = 0,
    grouped: bool = True,
) -> Layout:
    """Part a round's devices into sums.

    Args:
        privacy: what each sum must hold.
        aggregation: the size of groups, if any.
        size: devices that the round wants.
        asked: devices that it asks, which is more by over-selection.
        quorum: fewest survivors of the round; where it is one sum, of that.
        grouped: False for measuring and for statistics, which never use groups.
    """
    in_groups = grouped and aggregation.group_size > 0
    groups = max(1, size // aggregation.group_size) if in_groups else -(-asked // MAX_ROSTER)
    layout = Layout(
        groups=groups,
        wanted=size // groups,
        max_roster=-(-asked // groups),
        min_survivors=0,
        at_least=privacy.at_least,
        corrupt_fraction=privacy.corrupt_fraction,
        corrupt_devices=privacy.corrupt_devices,
        drop_fraction=min(privacy.drop_fraction, GROUP_DROP_FRACTION if in_groups else 1.0),
        threshold="group" if in_groups else "majority",
    )
    return with_roster(layout, layout.max_roster, quorum=quorum)


def with_roster(layout: Layout, roster_max: int, *, quorum: int = 0) -> Layout:
    """Return the layout for a sum that so many devices are asked for; c follows from that.

    Args:
        layout: of the plan.
        roster_max: devices that are asked for this sum.
        quorum: fewest survivors of the round, which binds where it is one sum.
    """
    layout = replace(layout, max_roster=roster_max)
    fewest = layout.at_least + layout.corrupted
    return replace(layout, min_survivors=max(2, fewest, quorum if layout.groups == 1 else 0))


def round_quorum(layout: Layout, aggregation: AggregationPlan) -> int:
    """Return the fewest devices that a round of secure sums may commit with.

    Of several sums more than half must end, and what is robust needs three to compare.
    """
    sums = layout.groups // 2 + 1
    if aggregation.combine in ROBUST:
        sums = max(sums, FEWEST_ROBUST_GROUPS)
    return sums * layout.min_survivors


def noise_of(privacy: PrivacyPlan, layout: Layout) -> Noise | None:
    """Return the noise of one sum: its honest survivors' shares alone make up the whole of it."""
    if privacy.noise != "distributed":
        return None
    return Noise(
        kind=privacy.noise_kind,
        multiplier=privacy.noise_multiplier,
        survivors=layout.honest_survivors,
    )


def trimmed_groups(aggregation: AggregationPlan, groups: int) -> int:
    """Return how many groups' values are left out at each end of a coordinate."""
    return math.floor(round(aggregation.trim_fraction * groups, 9))
