"""What a plan says of secure sums, ``[privacy]`` and ``[aggregation]``, and what it cannot promise.

The plan proposes; every device's owner disposes (their policy may be stricter, never laxer). Here
a plan is refused that could not end in a sum, or would promise more than a sum can keep.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from shared.errors import ConfigError, PeerError
from shared.secure_sum.config import (
    DEFAULT_AT_LEAST,
    MAX_ROSTER,
    Fraction,
    LaneBits,
    check_roster_size,
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
    fewest = max(2, privacy.at_least + layout.corrupted, quorum if groups == 1 else 0)
    return replace(layout, min_survivors=fewest)


def round_quorum(layout: Layout, aggregation: AggregationPlan) -> int:
    """Return the fewest devices that a round of secure sums may commit with.

    Of several sums more than half must end, and what is robust needs three to compare.
    """
    sums = layout.groups // 2 + 1
    if aggregation.combine in ROBUST:
        sums = max(sums, FEWEST_ROBUST_GROUPS)
    return sums * layout.min_survivors


def check_plan(
    privacy: PrivacyPlan, aggregation: AggregationPlan, *, size: int, asked: int, quorum: int = 0
) -> None:
    """Refuse what could not end in a sum, or what a sum could not keep.

    Raises:
        ConfigError: names the key, its number, and what to write.
    """
    if privacy.mode == "plain":
        _check_plain(privacy, aggregation)
        return
    _check_noise(privacy)
    _check_groups(privacy, aggregation, size=size, asked=asked)
    for grouped in (True, False):  # training, then measuring
        layout = lay_out(
            privacy,
            aggregation,
            size=size,
            asked=asked,
            quorum=quorum if grouped else 0,
            grouped=grouped,
        )
        _check_sizes(layout, size=size, asked=asked, in_groups=layout.threshold == "group")
    if aggregation.combine in ROBUST:
        _check_robust(aggregation, lay_out(privacy, aggregation, size=size, asked=asked))


def _check_plain(privacy: PrivacyPlan, aggregation: AggregationPlan) -> None:
    if privacy.noise != "none":
        raise ConfigError(
            f"privacy.noise {privacy.noise!r} is of sums, and privacy.mode 'plain' has none: "
            "write mode = 'secure' or noise = 'none'"
        )
    if privacy.adaptive_clipping:
        raise ConfigError(
            "privacy.adaptive_clipping is of sums, and privacy.mode 'plain' clips nothing: "
            "write mode = 'secure' or leave it out"
        )
    if aggregation.group_size or aggregation.combine != "mean":
        raise ConfigError(
            f"aggregation.group_size {aggregation.group_size} with combine "
            f"{aggregation.combine!r} means nothing under privacy.mode 'plain', which only "
            "averages: write mode = 'secure' or leave [aggregation] out"
        )


def _check_noise(privacy: PrivacyPlan) -> None:
    if privacy.noise != "none" and privacy.weights != "uniform":
        raise ConfigError(
            f"privacy.weights 'examples' with noise {privacy.noise!r} would send the number of "
            "examples, which is data too, without noise: write weights = 'uniform'"
        )
    if privacy.adaptive_clipping and privacy.noise == "distributed":
        raise ConfigError(
            "privacy.adaptive_clipping needs to know how many updates were clipped, which noise "
            "= 'distributed' does not tell: write a fixed clip_norm, or noise = 'central'"
        )


def _check_groups(
    privacy: PrivacyPlan, aggregation: AggregationPlan, *, size: int, asked: int
) -> None:
    group = aggregation.group_size
    if aggregation.combine in ROBUST and not group:
        raise ConfigError(
            f"aggregation.combine {aggregation.combine!r} needs several sums to compare: a sum "
            "hides single devices, so it cannot be checked one by one; write a group_size"
        )
    if group and size % group:
        down, up = size - size % group, size - size % group + group
        raise ConfigError(
            f"cohort.size {size} leaves {size % group} devices over from groups of "
            f"aggregation.group_size {group}: write {f'{down} or {up}' if down else up}"
        )
    if group and -(-asked * group // size) > MAX_ROSTER:
        raise ConfigError(
            f"aggregation.group_size {group} with cohort.over_selection asks "
            f"{-(-asked * group // size)} devices for one sum, which takes {MAX_ROSTER} at most: "
            "lower either"
        )
    if not group and privacy.noise == "central" and asked > MAX_ROSTER:
        raise ConfigError(
            f"privacy.noise 'central' covers one sum, and cohort.size {size} needs several of at "
            f"most {MAX_ROSTER}: lower it, or write noise = 'distributed'"
        )


def _check_sizes(layout: Layout, *, size: int, asked: int, in_groups: bool) -> None:
    """Refuse devices that are too few for a sum, and rosters that could not be unmasked."""
    if layout.wanted < layout.min_survivors:
        key, given = ("aggregation.group_size" if in_groups else "cohort.size"), layout.wanted
        if layout.groups > 1 and not in_groups:
            key = f"cohort.size {size}, so {layout.groups} sums of"
        over = f" of the {layout.max_roster} that over_selection asks" if asked > size else ""
        raise ConfigError(
            f"{key} {given} is below the {layout.min_survivors} devices that a sum must be of: "
            f"privacy.at_least {layout.at_least} honest ones and {layout.corrupted} that may be "
            f"corrupted{over}; raise it to {_enough(layout, asked / size)}, or lower at_least as "
            "far as the devices' owners allow"
        )
    for roster_size in range(layout.min_survivors, layout.max_roster + 1):
        try:
            check_roster_size(layout, roster_size)
        except PeerError as error:
            raise ConfigError(
                f"privacy.drop_fraction {layout.drop_fraction:g} with corrupt_fraction "
                f"{layout.corrupt_fraction:g} and corrupt_devices {layout.corrupt_devices}: {error}"
            ) from error


def _enough(layout: Layout, over_selection: float) -> str:
    """Return how many devices a sum of these limits needs, which grows with them by c."""
    for size in range(layout.at_least, MAX_ROSTER + 1):
        corrupted = corrupted_of(layout, math.ceil(round(size * over_selection, 9)))
        if size >= layout.at_least + corrupted:
            return f"{size} or more"
    return "more with a lower corrupt_fraction"


def _check_robust(aggregation: AggregationPlan, layout: Layout) -> None:
    """Refuse promises against poisoning that so many groups of that size cannot keep (R4)."""
    groups, poisoned = layout.groups, aggregation.poisoned_fraction
    if groups < FEWEST_ROBUST_GROUPS:
        raise ConfigError(
            f"aggregation.combine {aggregation.combine!r} of {groups} groups cannot tell which is "
            f"wrong: write a cohort.size of {FEWEST_ROBUST_GROUPS * aggregation.group_size} or "
            "more"
        )
    if poisoned * layout.max_roster > math.log(2):
        raise ConfigError(
            f"aggregation.poisoned_fraction {poisoned:g} puts a poisoned device into most groups "
            f"of {layout.max_roster}, and {aggregation.combine!r} needs most groups clean: write "
            f"{math.log(2) / layout.max_roster:.3f} or less, or smaller groups"
        )
    if aggregation.combine != "trimmed-mean":
        return
    if trimmed_groups(aggregation, groups) == 0:
        raise ConfigError(
            f"aggregation.trim_fraction {aggregation.trim_fraction:g} of {groups} groups trims "
            f"none: write {1 / groups:.2f} or more"
        )
    if (hit := 1 - (1 - poisoned) ** layout.max_roster) > aggregation.trim_fraction:
        raise ConfigError(
            f"aggregation.poisoned_fraction {poisoned:g} puts a poisoned device into {hit:.0%} of "
            f"the groups, more than the trim_fraction {aggregation.trim_fraction:g} takes away: "
            "raise trim_fraction or write combine = 'median'"
        )


def trimmed_groups(aggregation: AggregationPlan, groups: int) -> int:
    """Return how many groups' values are left out at each end of a coordinate."""
    return math.floor(round(aggregation.trim_fraction * groups, 9))
