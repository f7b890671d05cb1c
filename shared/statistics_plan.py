"""What a plan's privacy comes to where it asks for statistics in place of training.

Statistics never use groups, are noised unless the plan says otherwise, and travel in lanes of 32
bits, since they are few numbers. What the security review found about them is R4 and R8.
"""

import msgspec

from shared.errors import ConfigError
from shared.privacy_plan import AggregationPlan, PrivacyPlan
from shared.secure_sum.config import MAX_ROSTER


def privacy_of_statistics(
    privacy: PrivacyPlan, aggregation: AggregationPlan, *, asked: int
) -> PrivacyPlan:
    """Return the table with what only training chooses set to what statistics have.

    Args:
        privacy: as written.
        aggregation: as written; statistics have none.
        asked: devices that are asked.

    Raises:
        ConfigError: statistics cannot be asked like this; says what to write.
    """
    if privacy.mode == "plain":
        raise ConfigError(
            "privacy.mode 'plain' would show each device's statistics, and they leave a device "
            "only in a secure sum: write mode = 'secure' or leave it out"
        )
    if privacy.noise == "central":
        raise ConfigError(
            "privacy.noise 'central' lets the coordinator see exact statistics: write noise = "
            "'distributed', or noise = 'none' where the devices' owners allow exact sums"
        )
    if privacy.adaptive_clipping:
        raise ConfigError(
            "privacy.adaptive_clipping is of updates, and statistics are bounded by "
            "statistics.max_rows: leave it out"
        )
    if aggregation != AggregationPlan():
        raise ConfigError(
            "[aggregation] is of updates, and statistics are one sum of all devices: leave it out"
        )
    if privacy.noise == "none" and asked > MAX_ROSTER:
        raise ConfigError(
            f"statistics without noise are one sum of at most {MAX_ROSTER} devices, and "
            f"cohort.size asks {asked}: lower it, or write noise = 'distributed'"
        )
    return msgspec.structs.replace(privacy, weights="uniform", lane_bits=32, rotate=False)
