"""What may be asked about the rows of a fleet, as people write it in a plan.

::

    [statistics]
    max_rows = 1000             # a device with more rows counts as if it had so many

    [[statistics.of]]
    kind = "mean"
    feature = "temperature"     # a column, "target", or "pixels" of a picture

    [[statistics.of]]
    kind = "quantiles"
    feature = "temperature"
    at = [0.1, 0.5, 0.9]

Values beyond a feature's range count as its nearest end: the range is the contract's, or given
here. Smallest and largest values are not on offer: they are single rows' values.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from shared.errors import ConfigError
from shared.statistics.probes import Probe
from shared.tasks.contract import DataContract

MAX_BINS = 4096
_PIXELS, _TARGET = "pixels", "target"

Bins = Annotated[int, Meta(ge=2, le=MAX_BINS)]
Levels = Annotated[int, Meta(ge=2, le=12)]
Probability = Annotated[float, Meta(gt=0, lt=1)]


class _Statistic(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """Base of what can be asked for."""


class Count(_Statistic, frozen=True, kw_only=True, tag="count"):
    """How many rows there are."""


class _OfFeature(_Statistic, frozen=True, kw_only=True):
    feature: str
    minimum: float | None = None  # None: the contract's
    maximum: float | None = None


class Mean(_OfFeature, frozen=True, kw_only=True, tag="mean"):
    """The mean of a feature."""


class Variance(_OfFeature, frozen=True, kw_only=True, tag="variance"):
    """Mean, variance and standard deviation of a feature."""


class Histogram(_OfFeature, frozen=True, kw_only=True, tag="histogram"):
    """How many rows lie in each of ``bins`` equal parts of the range."""

    bins: Bins = 16


class Quantiles(_OfFeature, frozen=True, kw_only=True, tag="quantiles"):
    """Values below which given fractions of the rows lie, from one hierarchical histogram."""

    at: Annotated[tuple[Probability, ...], Meta(min_length=1, max_length=100)] = (0.25, 0.5, 0.75)
    levels: Levels = 8  # the range is cut into 2^levels parts


class Labels(_Statistic, frozen=True, kw_only=True, tag="labels"):
    """How many rows each class has."""


class RowsPerDevice(_Statistic, frozen=True, kw_only=True, tag="rows-per-device"):
    """How many devices have how many rows, by powers of two: what `privacy.max_weight` needs."""


Statistic = Count | Mean | Variance | Histogram | Quantiles | Labels | RowsPerDevice
OfFeature = Mean | Variance | Histogram | Quantiles


class StatisticsQuestion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table ``[statistics]`` of a plan."""

    of: Annotated[tuple[Statistic, ...], Meta(min_length=1, max_length=100)]
    max_rows: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    probe: Probe | None = None  # features are its columns; only a compression asks so


def range_of(statistic: OfFeature, contract: DataContract) -> tuple[float, float]:
    """Return the finite range, minimum below maximum, that the values are clipped to.

    Raises:
        ConfigError: no such feature, or nobody says what range its values have.
    """
    minimum, maximum = _declared(statistic.feature, contract)
    minimum = minimum if statistic.minimum is None else statistic.minimum
    maximum = maximum if statistic.maximum is None else statistic.maximum
    if not (float("-inf") < minimum < maximum < float("inf")):
        raise ConfigError(
            f"the range of {statistic.feature!r} is [{minimum:g}, {maximum:g}]; "
            "give the statistic a minimum below a maximum, both finite"
        )
    return minimum, maximum


def check_question(question: StatisticsQuestion, contract: DataContract) -> None:
    """Raise ConfigError unless everything that is asked can be asked of such data."""
    for statistic in question.of:
        match statistic:
            case Labels() if not contract.labels:
                raise ConfigError("kind 'labels': this task has no classes; ask for a histogram")
            case Mean() | Variance() | Histogram() | Quantiles():
                range_of(statistic, contract)
            case _:
                pass


def column_of(feature: str, contract: DataContract) -> int | None:
    """Return the feature's place among the inputs; None for the target and for pixels."""
    return contract.feature_names.index(feature) if feature in contract.feature_names else None


def _declared(feature: str, contract: DataContract) -> tuple[float, float]:
    if feature == _PIXELS and contract.image is not None:
        return 0.0, 255.0
    for known in contract.features:
        if known.name == feature:
            return known.minimum, known.maximum
    if feature in {_TARGET, contract.target} and not contract.labels:
        return contract.target_minimum, contract.target_maximum
    names = [_PIXELS] if contract.image is not None else list(contract.feature_names)
    names += [] if contract.labels else [_TARGET]
    raise ConfigError(f"there is no feature {feature!r}; known here: {', '.join(names)}")
