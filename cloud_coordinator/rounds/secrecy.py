"""How a round's sums kept the devices' vectors secret, for its record."""

import math
from collections.abc import Mapping

from cloud_coordinator.rounds.clipping import central_charge
from cloud_coordinator.rounds.sum_work import SumOutcome
from cloud_coordinator.rounds.worker_messages import GroupSecrecy, Secrecy
from shared.privacy_plan import PrivacyPlan
from shared.secure_sum.accounting import charge_of
from shared.secure_sum.config import SumConfig


def secrecy_of(privacy: PrivacyPlan, outcome: SumOutcome, causes: Mapping[int, str]) -> Secrecy:
    """Return what people may ask about the sums of one question.

    Args:
        privacy: of the plan.
        outcome: the sums.
        causes: by group: why its sum is not there, or was left out.
    """
    config = outcome.groups[0].config if outcome.groups else None
    noisy = privacy.noise != "none"
    return Secrecy(
        groups=tuple(
            GroupSecrecy(
                group=group.group,
                roster=group.roster,
                survivors=group.survivors,
                corrupted=group.corrupted,
                threshold=group.threshold,
                cause=causes.get(group.group, ""),
            )
            for group in outcome.groups
        ),
        noise=privacy.noise,
        noise_multiplier=privacy.noise_multiplier if noisy else None,
        epsilon=_epsilon(privacy, config) if config and noisy else None,
        delta=privacy.delta if noisy else None,
        clip_norm=config.encoding.clip_norm if config else None,
        lane_bits=config.encoding.lane_bits if config else 0,
        bytes_up=max((part.bytes_up for part in outcome.participations), default=0),
        blamed=dict(outcome.blamed),
        stage_seconds={name: round(s, 3) for name, s in outcome.stage_seconds.items()},
    )


def _epsilon(privacy: PrivacyPlan, config: SumConfig) -> float | None:
    """Return ε of one sum, and None where nothing is promised."""
    enforced = config.noise is not None
    charge = charge_of(config) if enforced else central_charge(privacy.noise_multiplier, 1)
    epsilon = charge.epsilon(privacy.delta)
    return epsilon if math.isfinite(epsilon) else None
