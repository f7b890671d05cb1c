"""What one device puts into a secure sum, still as plain floats; pure.

The configuration says which numbers are wanted: main lanes and, without noise, exact ones. What is
made here leaves this device's memory in no other form than encoded and masked.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.training import Update
from shared.errors import PeerError
from shared.judging import CandidateFacts
from shared.parameters import Vector
from shared.secure_sum.config import SumConfig
from shared.secure_sum.encoding import was_clipped
from shared.statistics.questions import StatisticsQuestion
from shared.statistics.vectors import StatisticsVector
from shared.tasks.contract import DataContract
from shared.tasks.examples import Examples
from shared.tasks.metrics import scale_statistics

EXAMPLES = "examples"  # the exact lane that weighs a device; updates are weighted where it is asked
UNCLIPPED = "unclipped"  # the exact lane that counts updates within the clip norm


@dataclass(frozen=True, slots=True, eq=False)
class Contribution:
    """One device's numbers."""

    vector: NDArray[Any] = field(repr=False)  # shape (d,), float, in its own unit
    exact: Mapping[str, float] = field(repr=False)  # by the names of the exact lanes
    facts: tuple[CandidateFacts, ...] = ()  # about this machine alone; told in clear


def training_contribution(config: SumConfig, received: Vector, update: Update) -> Contribution:
    """Return what training gave: trained - received, weighted where the sum weighs devices.

    A weighted update is clipped first, so that no device moves the mean by more than the clip norm
    however little it weighs; then it is multiplied by w/w_max, where w_max is the largest value of
    the lane ``examples``.

    Whether a device takes part must not depend on its data, or a coordinator that chooses the
    parameters could ask it anything: a difference too large for a float counts as no update.

    Args:
        config: of the session.
        received: shape (d,), the parameters before training.
        update: from `train`; `Update.nothing` where that diverged.

    Raises:
        PeerError: the sum is of another length, or asks for what training does not give.
    """
    _check_length(config, received.size)
    with np.errstate(over="ignore"):
        vector = update.parameters - received
    if not np.isfinite(vector).all():
        vector, update = np.zeros_like(received), Update.nothing(received)
    known = {
        EXAMPLES: float(update.num_examples),
        UNCLIPPED: 0.0 if was_clipped(config, vector) else 1.0,
        **update.sums,
    }
    exact = _chosen(config, known)
    if EXAMPLES in exact:
        largest = _largest(config, EXAMPLES)
        exact[EXAMPLES] = min(exact[EXAMPLES], largest)
        if not exact.get(UNCLIPPED, known[UNCLIPPED]):
            vector *= np.float32(config.encoding.clip_norm / _norm(vector))
        vector *= np.float32(exact[EXAMPLES] / largest)
    return Contribution(vector, exact)


def evaluation_contribution(
    config: SumConfig, sums: Mapping[str, float], bounds: Mapping[str, float]
) -> Contribution:
    """Return what was measured: added up exactly, or as bounded means where noise hides them.

    Args:
        config: of the session; without main lanes the sum is exact.
        sums: from `evaluate`; nothing but ``examples`` = 0 where there are no rows.
        bounds: `Task.statistics`.

    What is not finite counts as its bound; a refusal would tell of this one device that it is.

    Raises:
        PeerError: the sum asks for what the task does not measure.
    """
    if config.encoding.length == 0:
        known = {name: _bounded(sums.get(name, 0.0), sums, bounds[name]) for name in bounds}
        return Contribution(np.zeros(0, np.float32), _chosen(config, known))
    vector = scale_statistics(sums, bounds)
    _check_length(config, vector.size)
    return Contribution(vector, _chosen(config, {}))


def statistics_contribution(
    config: SumConfig, question: StatisticsQuestion, contract: DataContract, rows: Examples
) -> Contribution:
    """Return a device's answer to a statistics question; zeros where it has no rows.

    Raises:
        PeerError: the sum is of another length, or has exact lanes.
        ConfigError: something cannot be asked of such data.
    """
    layout = StatisticsVector(question, contract)
    _check_length(config, layout.length)
    vector = layout.contribution(rows) if len(rows) else np.zeros(layout.length)
    return Contribution(vector, _chosen(config, {}))


def judgement_contribution(
    config: SumConfig, scorecard: NDArray[np.float64], facts: tuple[CandidateFacts, ...]
) -> Contribution:
    """Return a device's scorecard, and what it says of its machine; PeerError as above."""
    _check_length(config, scorecard.size)
    return Contribution(scorecard, _chosen(config, {}), facts)


def _chosen(config: SumConfig, known: Mapping[str, float]) -> dict[str, float]:
    wanted = [lane.name for lane in config.exact_lanes]
    if unknown := sorted(set(wanted) - set(known)):
        raise PeerError(f"a device cannot say {unknown[0]!r} in a sum to {config.purpose}")
    return {name: known[name] for name in wanted}


def _check_length(config: SumConfig, size: int) -> None:
    if config.encoding.length != size:
        raise PeerError(f"the sum has {config.encoding.length} lanes for a vector of {size}")


def _largest(config: SumConfig, name: str) -> float:
    (lane,) = (lane for lane in config.exact_lanes if lane.name == name)
    return lane.max_steps / lane.steps_per_unit


def _bounded(value: float, sums: Mapping[str, float], bound: float) -> float:
    return value if math.isfinite(value) else sums["examples"] * bound


def _norm(vector: Vector) -> float:
    return float(np.sqrt(np.sum(np.square(vector, dtype=np.float64))))
