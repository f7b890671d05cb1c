"""Refuses plans that could not end in a sum, or would promise more than a sum can keep.

Each refusal names the key, its number and what to write.
"""

import math

from shared.errors import ConfigError, PeerError
from shared.privacy_plan import (
    FEWEST_ROBUST_GROUPS,
    ROBUST,
    AggregationPlan,
    Layout,
    PrivacyPlan,
    lay_out,
    noise_of,
    trimmed_groups,
)
from shared.secure_sum.choice import choose_encoding
from shared.secure_sum.config import MAX_ROSTER, check_roster_size, corrupted_of

_LENGTHS = (10, 1000, 100_000, 10_000_000)  # of models; see `_check_room`


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
    layout = lay_out(privacy, aggregation, size=size, asked=asked, quorum=quorum)
    _check_room(privacy, layout)
    if aggregation.combine in ROBUST:
        _check_robust(aggregation, layout)


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
    if privacy.noise == "central" and (group or asked > MAX_ROSTER):
        raise ConfigError(
            f"privacy.noise 'central' is made for the mean of one sum, and cohort.size {size} with "
            f"aggregation.group_size {group} makes several: ask {MAX_ROSTER} devices at most and "
            "leave group_size out, or write noise = 'distributed'"
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


def _check_room(privacy: PrivacyPlan, layout: Layout) -> None:
    """Refuse lanes that hold the noise for a model of no size; its own size is checked later."""
    for length in _LENGTHS:
        try:
            choose_encoding(
                length=length,
                lane_bits=privacy.lane_bits,
                clip_norm=privacy.clip_norm,
                max_roster=layout.max_roster,
                rotate=privacy.rotate,
                noise=noise_of(privacy, layout),
                rotation_seed=bytes(16),
            )
        except ConfigError as error:
            refusal = error
        else:
            return
    raise ConfigError(
        f"privacy.lane_bits {privacy.lane_bits} with noise_multiplier "
        f"{privacy.noise_multiplier:g} and noise_kind {privacy.noise_kind!r}: {refusal}"
    )


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
