"""How each statistic becomes a block of numbers that add up, and is read from their sum.

A device speaks for at most ``max_rows`` rows: its block is an *average* over its rows times
w = min(rows, max_rows) / max_rows. So the L2 norm of every block is bounded whatever the data are,
which is what noise is measured by, and sums of blocks are sums over rows, up to devices that have
more. Quantiles come from a binary tree of histograms, read after making its levels agree
(Hay et al., "Boosting the Accuracy of Differentially Private Histograms Through Consistency",
VLDB 2010), so one noised answer serves all of them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from shared.statistics.questions import (
    Count,
    Histogram,
    Labels,
    Mean,
    OfFeature,
    Quantiles,
    RowsPerDevice,
    Statistic,
    StatisticsQuestion,
    Variance,
    column_of,
    range_of,
)
from shared.tasks.contract import DataContract
from shared.tasks.examples import Examples

Floats = NDArray[np.float64]
_LARGEST_POWER = 30  # of two: rows of one device
_DIGITS = 6  # of exact counts, after the point: further ones are of the arithmetic


@dataclass(frozen=True, slots=True)
class Figures:
    """What a statistic says, and how far noise may have moved it."""

    values: dict[str, float]
    standard_error: dict[str, float] = field(default_factory=dict)  # of the noise; empty: exact


_NOTHING = Figures({})


@dataclass(frozen=True, slots=True)
class Scale:
    """What the numbers of a sum stand for."""

    weight: float  # sum of w; noise may leave nothing above 0 to divide by
    max_rows: int  # rows that a weight of 1 stands for
    sigma: float  # standard deviation of the noise in each number; 0 where there is none


class Block(ABC):
    """One statistic's share of the vector."""

    size: int

    @abstractmethod
    def measure(self, rows: Examples) -> Floats:
        """Return the average over at least one row, shape (size,), of L2 norm as `norm_of` says."""

    @abstractmethod
    def read(self, total: Floats, scale: Scale) -> Figures:
        """Read the sum, shape (size,), of all devices' w times their average."""


class _CountBlock(Block):
    size = 1

    def measure(self, rows: Examples) -> Floats:
        assert len(rows)  # of no rows there is no average
        return np.ones(1)

    def read(self, total: Floats, scale: Scale) -> Figures:
        return _counts({"count": total[0]}, scale)


class _MomentsBlock(Block):
    """Mean, and with ``order`` 2 the mean square, of a feature scaled to [-1, 1]."""

    def __init__(self, values: "_Values", order: int) -> None:
        self._values, self.size = values, order

    def measure(self, rows: Examples) -> Floats:
        scaled = 2 * self._values.of(rows) - 1
        return np.array([np.mean(scaled**power) for power in range(1, self.size + 1)])

    def read(self, total: Floats, scale: Scale) -> Figures:
        if scale.weight <= 0:
            return _NOTHING
        half = (self._values.maximum - self._values.minimum) / 2
        moments = np.clip(total / scale.weight, -1, 1)
        error = scale.sigma / scale.weight
        figures = {"mean": self._values.minimum + half * (moments[0] + 1)}
        errors = {"mean": half * error}
        if self.size > 1:
            variance = max(0.0, moments[1] - moments[0] ** 2) * half**2
            figures |= {"variance": variance, "standard_deviation": math.sqrt(variance)}
            # First order: the errors of both moments are independent.
            errors["variance"] = half**2 * error * math.hypot(1, 2 * moments[0])
        return Figures(figures, errors if scale.sigma else {})


class _HistogramBlock(Block):
    def __init__(self, values: "_Values", bins: int) -> None:
        self._values, self.size = values, bins

    def measure(self, rows: Examples) -> Floats:
        return _frequencies(self._values.of(rows), self.size)

    def read(self, total: Floats, scale: Scale) -> Figures:
        edges = self._values.edges(self.size)
        names = [f"[{low:g}, {high:g}]" for low, high in pairwise(edges)]
        return _counts(dict(zip(names, total, strict=True)), scale)


class _QuantilesBlock(Block):
    def __init__(self, values: "_Values", statistic: Quantiles) -> None:
        self._values, self._at, self._levels = values, statistic.at, statistic.levels
        self.size = 2 ** (self._levels + 1) - 2  # levels of 2, 4, … 2^levels bins

    def measure(self, rows: Examples) -> Floats:
        leaves = _frequencies(self._values.of(rows), 2**self._levels)
        return np.concatenate(
            [leaves.reshape(2**level, -1).sum(axis=1) for level in range(1, self._levels + 1)]
        )

    def read(self, total: Floats, scale: Scale) -> Figures:
        if scale.weight <= 0:
            return _NOTHING
        leaves = np.maximum(_consistent(_levels_of(total)), 0.0)
        steps = np.concatenate([[0.0], np.cumsum(leaves)])
        reached = steps / steps[-1] if steps[-1] > 0 else np.linspace(0, 1, len(steps))
        edges = self._values.edges(len(leaves))
        values = {f"q{p:g}": _first_reached(p, reached, edges) for p in self._at}
        if not scale.sigma:
            return Figures(values)
        # Every prefix is a sum of at most one node per level, so its noise is at most this.
        blur = scale.sigma * math.sqrt(self._levels) / scale.weight
        low = [_first_reached(max(0.0, p - blur), reached, edges) for p in self._at]
        high = [_first_reached(min(1.0, p + blur), reached, edges) for p in self._at]
        errors = [(above - below) / 2 for below, above in zip(low, high, strict=True)]
        return Figures(values, dict(zip(values, errors, strict=True)))


class _LabelsBlock(Block):
    def __init__(self, labels: Sequence[str]) -> None:
        self._labels, self.size = labels, len(labels)

    def measure(self, rows: Examples) -> Floats:
        return np.bincount(rows.targets, minlength=self.size) / len(rows)

    def read(self, total: Floats, scale: Scale) -> Figures:
        return _counts(dict(zip(self._labels, total, strict=True)), scale)


class _RowsPerDeviceBlock(Block):
    """One-hot: a device says which power of two its rows come to; its weight is always 1."""

    size = _LARGEST_POWER + 1

    def measure(self, rows: Examples) -> Floats:
        block = np.zeros(self.size)
        block[min(_LARGEST_POWER, len(rows).bit_length() - 1)] = 1.0
        return block

    def read(self, total: Floats, scale: Scale) -> Figures:
        used = np.flatnonzero(total > 0)
        shown = range(int(used[-1]) + 1) if used.size else range(0)
        names = [f"{2**power} to {2 ** (power + 1) - 1}" for power in shown]
        counts = [
            float(total[p]) if scale.sigma else round(float(total[p]), _DIGITS) for p in shown
        ]
        figures = dict(zip(names, counts, strict=True))
        errors = dict.fromkeys(names, scale.sigma) if scale.sigma else {}
        devices = np.maximum(total, 0)
        if devices.sum() > 0:
            reached = np.cumsum(devices) / devices.sum()
            figures["p90"] = float(2 ** (int(np.argmax(reached >= 0.9)) + 1) - 1)
        return Figures(figures, errors)


@dataclass(frozen=True, slots=True)
class _Values:
    """One feature's values, scaled to [0, 1] and clipped to it."""

    column: int | None
    is_target: bool
    minimum: float
    maximum: float

    def of(self, rows: Examples) -> Floats:
        if self.is_target:
            values = rows.targets
        else:
            values = rows.inputs if self.column is None else rows.inputs[:, self.column]
        scaled = (values.astype(np.float64) - self.minimum) / (self.maximum - self.minimum)
        return np.clip(scaled.reshape(-1), 0.0, 1.0)

    def edges(self, bins: int) -> Floats:
        return np.linspace(self.minimum, self.maximum, bins + 1)


def blocks_of(question: StatisticsQuestion, contract: DataContract) -> list[Block]:
    """Return a block for each statistic, in order; raise ConfigError where one cannot be asked."""
    return [_block(statistic, contract) for statistic in question.of]


def norm_of(statistic: Statistic) -> float:
    """Return the largest L2 norm that one device's block of a statistic can have."""
    match statistic:
        case Variance():
            return math.sqrt(2)
        case Quantiles(levels=levels):
            return math.sqrt(levels)
        case _:
            return 1.0


def ignores_weight(block: Block) -> bool:
    """Say whether a device counts once in this block, however many rows it has."""
    return isinstance(block, _RowsPerDeviceBlock)


def _block(statistic: Statistic, contract: DataContract) -> Block:
    match statistic:
        case Count():
            return _CountBlock()
        case Labels():
            return _LabelsBlock(contract.labels)
        case RowsPerDevice():
            return _RowsPerDeviceBlock()
        case _:
            return _feature_block(statistic, contract)


def _feature_block(statistic: OfFeature, contract: DataContract) -> Block:
    minimum, maximum = range_of(statistic, contract)
    column = column_of(statistic.feature, contract)
    is_target = column is None and contract.image is None
    values = _Values(column, is_target, minimum, maximum)
    match statistic:
        case Mean():
            return _MomentsBlock(values, 1)
        case Variance():
            return _MomentsBlock(values, 2)
        case Histogram(bins=bins):
            return _HistogramBlock(values, bins)
        case Quantiles():
            return _QuantilesBlock(values, statistic)


def _first_reached(wanted: float, reached: Floats, edges: Floats) -> float:
    """Return the lowest value at which the rising curve is ``wanted``, straight between edges."""
    right = min(max(1, int(np.searchsorted(reached, wanted))), len(reached) - 1)
    rise = reached[right] - reached[right - 1]
    part = (wanted - reached[right - 1]) / rise if rise > 0 else 0.0
    return float(edges[right - 1] + part * (edges[right] - edges[right - 1]))


def _frequencies(scaled: Floats, bins: int) -> Floats:
    """Return the share of values, each in [0, 1], in each of ``bins`` equal parts."""
    places = np.minimum((scaled * bins).astype(np.int64), bins - 1)
    return np.bincount(places, minlength=bins) / len(scaled)


def _counts(totals: dict[str, float], scale: Scale) -> Figures:
    values = {name: float(total) * scale.max_rows for name, total in totals.items()}
    if not scale.sigma:
        return Figures({name: round(value, _DIGITS) for name, value in values.items()})
    return Figures(values, dict.fromkeys(values, scale.sigma * scale.max_rows))


def _levels_of(total: Floats) -> list[Floats]:
    """Part the tree's numbers into its levels, of 2, 4, … bins."""
    levels: list[Floats] = []
    start = 0
    while start < len(total):
        levels.append(total[start : start + 2 ** (len(levels) + 1)])
        start += 2 ** len(levels)
    return levels


def _consistent(levels: Sequence[Floats]) -> Floats:
    """Return the leaves, adjusted so that every parent is the sum of its children.

    Least squares for equally noisy nodes of a binary tree (Hay et al. 2010, section 4.2): upwards
    each node takes the best mean of itself and its children, downwards the rest is shared evenly.
    """
    best = [np.array(level) for level in levels]
    for depth in range(len(best) - 2, -1, -1):
        height = len(best) - depth  # of this node's subtree, a leaf being 1
        own = 2.0 ** (height - 1) / (2.0**height - 1)
        best[depth] = own * best[depth] + (1 - own) * best[depth + 1].reshape(-1, 2).sum(axis=1)
    for depth in range(len(best) - 1):
        children = best[depth + 1].reshape(-1, 2)
        missing = best[depth] - children.sum(axis=1)
        best[depth + 1] = (children + missing[:, None] / 2).reshape(-1)
    return best[-1]
