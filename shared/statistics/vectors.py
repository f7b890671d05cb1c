"""A device's contribution to a statistics question, and the answer in the sum of all of them."""

import math
from collections.abc import Mapping

import msgspec
import numpy as np

from shared.errors import DataError
from shared.statistics.blocks import (
    Block,
    Floats,
    Scale,
    blocks_of,
    ignores_weight,
    norm_of,
)
from shared.statistics.questions import StatisticsQuestion
from shared.tasks.contract import DataContract
from shared.tasks.examples import Examples

# Encoding rounds at random; what is this close below a whole step goes up for certain. So whole
# numbers of rows stay whole, whatever the last digits of their floats were.
_HAIR = 2.0**-45


class Answer(msgspec.Struct, frozen=True):
    """One statistic as it is put on record."""

    kind: str
    feature: str  # empty where it is about rows
    values: dict[str, float]
    standard_error: dict[str, float]  # of the noise, by the same names; empty: none was added


def largest_norm(question: StatisticsQuestion) -> float:
    """Return the largest L2 norm of one device's vector, whatever its data; noise goes by it."""
    # The first number, w, is at most 1.
    return math.sqrt(1 + sum(norm_of(statistic) ** 2 for statistic in question.of))


class StatisticsVector:
    """The layout of one question's vector: the sum of weights, then a block per statistic."""

    def __init__(self, question: StatisticsQuestion, contract: DataContract) -> None:
        """Lay out; raise ConfigError where something cannot be asked of such data."""
        self._question = question
        self._blocks: list[Block] = blocks_of(question, contract)
        self.length = 1 + sum(block.size for block in self._blocks)
        self.norm = largest_norm(question)

    def contribution(self, rows: Examples) -> Floats:
        """Return one device's vector, shape (length,), of L2 norm at most `norm`.

        Raises:
            DataError: there are no rows.
        """
        if not len(rows):
            raise DataError("this device has no rows to answer from")
        weight = min(1.0, len(rows) / self._question.max_rows)
        parts = [
            block.measure(rows) * (1.0 if ignores_weight(block) else weight)
            for block in self._blocks
        ]
        return np.concatenate([[weight], *parts]) * (1 - _HAIR)

    def read(self, total: Floats, *, sigma: float) -> list[Answer]:
        """Read the sum of all contributions.

        Args:
            total: shape (length,).
            sigma: standard deviation of the noise in each of its numbers; 0 where there is none.
        """
        weight, start, answers = float(total[0]), 1, []
        for statistic, block in zip(self._question.of, self._blocks, strict=True):
            part = total[start : start + block.size]
            start += block.size
            figures = block.read(part, Scale(weight, self._question.max_rows, sigma))
            answers.append(
                Answer(
                    kind=str(statistic.__struct_config__.tag),
                    feature=getattr(statistic, "feature", ""),
                    values=_plain(figures.values),
                    standard_error=_plain(figures.standard_error),
                )
            )
        return answers


def _plain(figures: Mapping[str, float]) -> dict[str, float]:
    """Return Python's own floats, which is what JSON takes."""
    return {name: float(value) for name, value in figures.items()}
