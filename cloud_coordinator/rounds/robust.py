"""How the sums of groups become one update, though some groups may hold poisoned devices.

A sum hides what each device sent, so one device can move the sum of its group as far as the lanes
reach. Two things bound that: a group whose sum no honest devices could have made is left out by
name, and across groups stand a coordinate-wise median or trimmed mean (Yin et al.,
"Byzantine-Robust Distributed Learning", ICML 2018) or a bound on each group's norm (Sun et al.,
"Can You Really Backdoor Federated Learning?", 2019). A poisoned device costs its whole group.

Groups weigh as many devices as survived, never what these claim.
"""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cloud_coordinator.rounds.clipping import UNCLIPPED
from shared.errors import PeerError, QuorumError
from shared.privacy_plan import FEWEST_ROBUST_GROUPS, ROBUST, AggregationPlan, trimmed_groups
from shared.secure_sum.config import SumConfig
from shared.secure_sum.noise import share_variance

EXAMPLES = "examples"  # the exact lane that weighs a device
SEEN = "seen"  # the one that counts what it trained on, each epoch anew
_COUNTS = {EXAMPLES, SEEN, UNCLIPPED}  # lanes that cannot be negative
Floats = NDArray[np.float64]

_BLOCK = 65_536  # coordinates of all groups that are sorted at a time
_SPREAD = 1.25  # noise of many lanes has nearly the expected norm; of few, seldom more than this
_FEW_LANES = 6.0  # standard deviations that are allowed on top


def check_sum(config: SumConfig, total: Floats, exact: Mapping[str, float], count: int) -> None:
    """Raise PeerError unless ``count`` honest devices could have made this sum.

    Args:
        config: of the session.
        total: the decoded sum, shape (d,), in the vector's unit.
        exact: the sums of its exact lanes.
        count: survivors, |U3|.
    """
    where = f"group {config.group}" if config.groups > 1 else "the sum"
    for lane in config.exact_lanes:
        value, most = exact[lane.name], count * lane.max_steps / lane.steps_per_unit
        least = 0.0 if lane.name in _COUNTS else -most
        if not least <= value <= most:
            raise PeerError(
                f"{where} is left out: {value:g} {lane.name} cannot be of {count} devices with at "
                f"most {lane.max_steps / lane.steps_per_unit:g} each"
            )
    if not np.isfinite(total).all():
        raise PeerError(f"{where} is left out: its sum is not finite")
    norm, most = float(np.linalg.norm(total)), count * config.encoding.clip_norm
    if norm > most + slack(config, count):
        raise PeerError(
            f"{where} is left out: a norm of {norm:g} cannot be of {count} devices with at most "
            f"{config.encoding.clip_norm:g} each"
        )


def slack(config: SumConfig, count: int) -> float:
    """Return how far rounding and noise may take the norm of an honest sum above the clips'."""
    encoding = config.encoding
    # Each device rounds each lane up or down at random, which has a variance of 1/4 at most.
    variance = count / 4
    if config.noise is not None:
        variance += count * share_variance(encoding, config.noise)
    deviation = math.sqrt(variance) / encoding.steps_per_unit
    return deviation * (_SPREAD * math.sqrt(encoding.length) + _FEW_LANES)


def mean_of(config: SumConfig, total: Floats, exact: Mapping[str, float], *, count: int) -> Floats:
    """Return the mean update of one sum, shape (d,), bounded as one honest device's would be.

    Weighted sums hold Σ update·w/w_max, so their mean is that · w_max / Σw.

    Raises:
        PeerError: no honest devices could have made this sum; names the group.
    """
    check_sum(config, total, exact, count)
    if 0 in (exact.get(EXAMPLES), exact.get(SEEN)):
        raise PeerError(
            f"group {config.group} is left out: its devices claim no examples, as those do whose "
            "training diverged; lower training.learning_rate"
        )
    divisor = exact[EXAMPLES] / _largest_weight(config) if EXAMPLES in exact else float(count)
    # A device that claims little weight for a large update would lift the mean: hence the bound.
    mean = total / divisor
    return bounded(mean, config.encoding.clip_norm + slack(config, count) / divisor)


def _largest_weight(config: SumConfig) -> float:
    (lane,) = (lane for lane in config.exact_lanes if lane.name == EXAMPLES)
    return lane.max_steps / lane.steps_per_unit


def bounded(vector: Floats, norm: float) -> Floats:
    """Return ``vector``, shortened to an L2 norm of at most ``norm``."""
    length = float(np.linalg.norm(vector))
    return vector if length <= norm else vector * (norm / length)


class Combiner:
    """Takes the mean of each group as it is known, and combines them.

    Mean and norm bound keep one running sum; median and trimmed mean need all groups' means at
    once, in float32.
    """

    def __init__(self, plan: AggregationPlan, *, groups: int, round_number: int) -> None:
        """Begin a round.

        Args:
            plan: how to combine.
            groups: as many as the round was planned with; of fewer, as many are trimmed.
            round_number: for the error where there are too few.
        """
        self._plan, self._groups, self._round_number = plan, groups, round_number
        self._keeps_all = plan.combine in {"median", "trimmed-mean"}
        self._kept: list[NDArray[np.float32]] = []
        self._sum: Floats | None = None
        self.count = 0  # devices
        self.sums = 0  # groups

    def add(self, mean: Floats, count: int) -> None:
        """Take in the mean of a group, shape (d,), of ``count`` survivors; it is not kept."""
        self.count += count
        self.sums += 1
        if self._keeps_all:
            self._kept.append(mean.astype(np.float32))
            return
        if self._plan.norm_bound is not None:
            mean = bounded(mean, self._plan.norm_bound)
        if self._sum is None:
            self._sum = np.zeros(mean.shape)
        self._sum += mean * count

    def result(self) -> Floats:
        """Return the combined mean, shape (d,).

        Raises:
            QuorumError: too few groups are left to compare, or none.
        """
        fewest = FEWEST_ROBUST_GROUPS if self._plan.combine in ROBUST else 1
        if self.sums < fewest:
            raise QuorumError(
                self._round_number, survivors=self.sums, quorum=fewest, of_what="sums"
            )
        if self._sum is not None:
            return self._sum / self.count
        if self._plan.combine == "median":
            return _by_blocks(self._kept, trimmed=(len(self._kept) - 1) // 2)
        most = (len(self._kept) - 1) // 2
        return _by_blocks(self._kept, trimmed=min(most, trimmed_groups(self._plan, self._groups)))


def _by_blocks(means: list[NDArray[np.float32]], *, trimmed: int) -> Floats:
    """Average each coordinate over all groups but its ``trimmed`` smallest and largest values.

    With all but one or two trimmed, that is the median.
    """
    result = np.empty(means[0].shape)
    for start in range(0, result.size, _BLOCK):
        block = slice(start, start + _BLOCK)
        ordered = np.sort(np.stack([mean[block] for mean in means]), axis=0)
        kept = ordered[trimmed : len(means) - trimmed]
        result[block] = kept.mean(axis=0, dtype=np.float64)
    return result
