"""Questions about what happens inside a model: how large its tensors become on the owners' rows.

Static int8 needs a range for every tensor. The largest value of a row is a bounded column like any
other once it is a logarithm that is clipped to some octaves around a centre, and averages and
quantiles of such columns are statistics, with the same floors, noise and limits. The centres come
from inputs that are drawn from the task's contract, so they cost no privacy.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from shared.manifest import Digest
from shared.tasks.contract import DataContract, Feature
from shared.tasks.examples import Examples

DEFAULT_REACH = 4.0  # octaves to either side of a centre
MOST_NOISE = 1.0  # octaves of standard error; more hides what a range is
MAX_COLUMNS = 100  # each costs a statistic of its own
Side = Literal["low", "high"]


class ProbeColumn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The base-2 logarithm of a tensor's largest element in one row, or of its negated smallest."""

    tensor: Annotated[str, Meta(min_length=1, max_length=500)]
    side: Side
    centre: float  # in octaves

    @property
    def feature(self) -> str:
        """The column's name in a question."""
        return f"{self.side} {self.tensor}"


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A model whose inner tensors are asked about; its file comes with the message."""

    model_sha256: Digest  # of an ONNX file whose outputs are `tensors`, each of shape (b, …)
    columns: Annotated[tuple[ProbeColumn, ...], Meta(min_length=1, max_length=MAX_COLUMNS)]
    reach: Annotated[float, Meta(gt=0, le=16)] = DEFAULT_REACH

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that are measured, each once, in the order of the file's outputs."""
        return tuple(dict.fromkeys(column.tensor for column in self.columns))


def contract_of_probe(probe: Probe) -> DataContract:
    """Return the columns as features with their ranges, as `StatisticsVector` wants them."""
    return DataContract(
        sources=(),
        features=tuple(
            Feature(
                name=column.feature,
                minimum=column.centre - probe.reach,
                maximum=column.centre + probe.reach,
            )
            for column in probe.columns
        ),
    )


def rows_of_probe(probe: Probe, extremes: NDArray[np.float32]) -> Examples:
    """Return what is averaged.

    Args:
        probe: what was asked.
        extremes: shape (n, columns): of each row the largest element, or the negated smallest.

    Returns:
        Logarithms, shape (n, columns); what is not above 0 is the lower end of its range, and what
        is not a number the upper one, whatever became of the row.
    """
    centres = np.array([column.centre for column in probe.columns])
    low, high = centres - probe.reach, centres + probe.reach
    values = np.where(np.isnan(extremes), np.inf, extremes.astype(np.float64))
    with np.errstate(divide="ignore"):
        octaves = np.log2(np.maximum(values, 0.0))
    columns: NDArray[Any] = np.clip(octaves, low, high)
    return Examples(columns, np.zeros(len(extremes), np.float32))


def extremes_of(probe: Probe, tensors: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """Return each row's extremes, shape (n, columns), of tensors of shape (n, …) by name."""
    columns = []
    for column in probe.columns:
        values = tensors[column.tensor]
        rows = values.reshape(len(values), -1)
        columns.append(rows.max(axis=1) if column.side == "high" else -rows.min(axis=1))
    result: NDArray[np.float32] = np.stack(columns, axis=1).astype(np.float32)
    return result
