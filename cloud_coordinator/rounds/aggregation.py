"""How updates become the next parameters: one running sum, then a step of the strategy.

The weighted mean is that of FedAvg (McMahan et al., "Communication-Efficient Learning of Deep
Networks from Decentralized Data", 2017). Updates are folded in as they arrive and dropped, so
memory is one float64 vector however many devices take part; float64 also makes the order in which
they arrive irrelevant to 1e-6.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shared.errors import PeerError
from shared.parameters import Vector

EXAMPLES = "examples"  # the statistic that weighs an update
MAX_EXAMPLES = 10**9  # a device that claims more would drown all others
MAX_STATISTICS = 100
MAX_NAME_LENGTH = 128
_BLOCK = 65_536  # elements that are widened to float64 at a time


class AddedStatistics:
    """Statistics of many devices, added up by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}

    def add(self, statistics: Mapping[str, float]) -> None:
        """Add what one device measured.

        Raises:
            PeerError: not finite, too many, or a count of examples that cannot be; nothing was
                added.
        """
        check_statistics(statistics)
        for name, value in statistics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


def check_statistics(statistics: Mapping[str, float]) -> None:
    """Raise PeerError unless ``statistics`` may be added to those of others."""
    if len(statistics) > MAX_STATISTICS:
        raise PeerError(f"{len(statistics)} statistics are over the limit of {MAX_STATISTICS}")
    for name, value in statistics.items():
        if len(name) > MAX_NAME_LENGTH:
            raise PeerError(f"the name {name[:64]!r}… of a statistic is too long")
        if not math.isfinite(value):
            raise PeerError(f"the statistic {name[:64]!r} is {value}")
    examples = statistics.get(EXAMPLES)
    if examples is None or not 0 <= examples <= MAX_EXAMPLES:
        raise PeerError(f"a count of {examples} examples is not between 0 and {MAX_EXAMPLES}")


class WeightedMean:
    """The mean of the devices' parameters, weighted by their numbers of examples."""

    def __init__(self, size: int) -> None:
        """Start at nothing, for vectors of shape (``size``,)."""
        self._sum: NDArray[np.float64] = np.zeros(size)
        self._statistics = AddedStatistics()
        self.count = 0  # updates folded in

    @property
    def statistics(self) -> Mapping[str, float]:
        """The devices' training statistics, added."""
        return self._statistics.sums

    def add(self, parameters: Vector, statistics: Mapping[str, float]) -> int:
        """Fold one device's trained parameters in, and return the weight they got.

        Args:
            parameters: shape (d,).
            statistics: additive; ``examples`` is the weight, a whole number above 0.

        Raises:
            PeerError: the update cannot be used; the sum is as it was.
        """
        self._check(parameters)
        weight = _weight_of(statistics)
        self._statistics.add(statistics)
        for start in range(0, self._sum.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            self._sum[block] += np.multiply(parameters[block], weight, dtype=np.float64)
        self.count += 1
        return weight

    def mean(self) -> NDArray[np.float64]:
        """Return the weighted mean, shape (d,), of at least one update; the sum is used up."""
        self._sum /= self._statistics.sums[EXAMPLES]
        return self._sum

    def _check(self, parameters: Vector) -> None:
        if parameters.shape != self._sum.shape:
            raise PeerError(
                f"an update of shape {parameters.shape} does not fit {self._sum.shape[0]} "
                "parameters"
            )
        if not np.isfinite(parameters).all():
            raise PeerError("the update holds NaN or infinity; training diverged")


def _weight_of(statistics: Mapping[str, float]) -> int:
    check_statistics(statistics)
    weight = int(statistics[EXAMPLES])
    if weight != statistics[EXAMPLES] or weight == 0:
        raise PeerError(f"an update from {statistics[EXAMPLES]} examples has no weight")
    return weight


@dataclass(frozen=True, slots=True)
class ModelState:
    """What a round starts from and leaves behind."""

    parameters: Vector  # shape (d,)
    optimizer: Mapping[str, NDArray[np.float32] | NDArray[np.float64]] = field(default_factory=dict)


Strategy = Callable[[ModelState, NDArray[np.float64]], ModelState]


def fed_avg(_: ModelState, mean: NDArray[np.float64]) -> ModelState:
    """Take the mean itself; FedAvg has no memory."""
    return ModelState(mean.astype(np.float32))


# A strategy turns the state and the mean of the devices' parameters into the next state. Those
# with momentum keep it in `ModelState.optimizer`, which is committed with the parameters.
STRATEGIES: Mapping[str, Strategy] = {"fedavg": fed_avg}
