"""Who is asked to train in a round, and when there are enough devices to ask. Pure."""

from collections.abc import Collection, Mapping

import numpy as np

from shared.run_plan import CohortPlan

SETTLE_S = 5.0  # with a quorum there, so long nobody new must have joined before a round starts


def wanted_devices(plan: CohortPlan) -> int:
    """Return how many devices a round asks: over-selection makes up for those that drop out."""
    return plan.asked


def select_cohort(
    joined: Collection[str],
    plan: CohortPlan,
    *,
    rng: np.random.Generator,
    times_selected: Mapping[str, int],
) -> tuple[str, ...]:
    """Draw the devices of one round: at random, first among those that were asked least.

    Chance alone would leave some devices out for many rounds in a row, and what only they have
    seen would fade from the model; asking the least asked first bounds that gap. What counts is
    being asked, not having replied, or else a device that always fails would be asked always.

    Args:
        joined: ids of the devices that may be asked; their order does not matter.
        plan: how many are wanted.
        rng: made by `cohort_rng`, so that a round that is run again asks the same devices.
        times_selected: how often each device was asked so far in this run; absent means never.

    Returns:
        At most `wanted_devices` ids, in the order in which they are to be nudged.
    """
    drawn = [str(device) for device in rng.permutation(sorted(joined))]
    drawn.sort(key=lambda device: times_selected.get(device, 0))  # stable: random among equals
    return tuple(drawn[: wanted_devices(plan)])


def cohort_rng(seed: int, round_number: int) -> np.random.Generator:
    """Return the generator that selects in one round of one run."""
    return np.random.default_rng([seed, round_number])


def training_seed(seed: int, round_number: int) -> int:
    """Return the seed, in [0, 2**63), that the devices of one round start from."""
    return int(np.random.SeedSequence([seed, round_number, 1]).generate_state(1, np.uint64)[0] >> 1)


def can_start(available: int, plan: CohortPlan, *, quiet_s: float) -> bool:
    """Say whether a round may start with so many devices.

    Args:
        available: devices that may be asked now.
        plan: what the round wants and needs.
        quiet_s: seconds since a device last joined; shortly after the start of a run the others
            are on their way, and the first to arrive should not train alone.
    """
    if available >= wanted_devices(plan):
        return True
    return available >= plan.quorum and quiet_s >= SETTLE_S
