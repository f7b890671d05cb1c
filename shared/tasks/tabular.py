"""The built-in task `tabular`: a label or a number from the numeric columns of a CSV file.

In a task file::

    name = "failures"
    uses = "tabular"
    [options]
    kind = "classification"     # or "regression"
    model = "mlp"               # or "linear"
    target = "state"            # the column to predict
    labels = ["ok", "failed"]   # of a classification
    loss = "cross-entropy"      # or "balanced", where devices have few of the classes each
    [[options.features]]
    name = "temperature"        # the column
    minimum = -40               # rows outside are skipped
    maximum = 120

A regression has ``target_minimum`` and ``target_maximum`` in place of labels. The served network
takes raw values in the order of the features. It standardises them by itself, with numbers that are
the same on every device: the middle and half of the range, or a feature's ``mean`` and ``scale``
(``target_mean`` and ``target_scale``) where those are given.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.config import convert
from shared.errors import ConfigError
from shared.manifest import TensorSpec
from shared.tasks.contract import DataContract, Feature, check_labels
from shared.tasks.losses import ClassificationLoss, classification_loss
from shared.tasks.metrics import (
    classification_bounds,
    classification_summary,
    classification_sums,
    regression_bounds,
    regression_summary,
    regression_sums,
)
from shared.tasks.task import Task

_DEFAULT_HIDDEN = 64
_USUAL_REACH = 4.0  # scales around the mean, where nobody wrote how far a target may be from it

Finite = Annotated[float, Meta(ge=-1e30, le=1e30)]
Positive = Annotated[float, Meta(gt=0, le=1e30)]


class TabularFeature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One input column: its range, its standardisation, or both."""

    name: str
    minimum: Finite | None = None
    maximum: Finite | None = None
    mean: Finite | None = None
    scale: Positive | None = None


class TabularOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a person writes under ``[options]``."""

    kind: Literal["classification", "regression"]
    model: Literal["linear", "mlp"] = "linear"
    features: Annotated[tuple[TabularFeature, ...], Meta(min_length=1, max_length=10_000)]
    target: str
    labels: Annotated[tuple[str, ...], Meta(max_length=10_000)] = ()
    loss: ClassificationLoss | None = None  # of a classification; cross-entropy by default
    target_minimum: Finite | None = None
    target_maximum: Finite | None = None
    target_mean: Finite | None = None
    target_scale: Positive | None = None
    hidden: Annotated[int, Meta(ge=1, le=10_000)] | None = None  # width of the mlp, 64 by default

    def __post_init__(self) -> None:
        names = [feature.name for feature in self.features]
        if len({*names, self.target}) != len(names) + 1:
            raise ConfigError("features: a column is named twice, or is the target; name it once")
        if self.hidden is not None and self.model == "linear":
            raise ConfigError('hidden: a linear model has no hidden layer; write model = "mlp"')
        _check_target(self)


def _check_target(options: TabularOptions) -> None:
    """Refuse what belongs to a label where a number is predicted, and the other way round."""
    ranged = [
        name
        for name in ("target_minimum", "target_maximum", "target_mean", "target_scale")
        if getattr(options, name) is not None
    ]
    if options.kind == "regression" and options.labels:
        raise ConfigError("labels: a regression has none; leave them out or classify")
    if options.kind == "regression" and options.loss:
        raise ConfigError("loss: a regression always has the squared error; leave it out")
    if options.kind == "classification" and ranged:
        raise ConfigError(f"{ranged[0]}: a classification has labels instead; leave it out")
    if options.kind == "classification" and len(options.labels) < 2:
        raise ConfigError("labels: a classification needs two or more; list them")
    check_labels(options.labels)


@dataclass(frozen=True, slots=True)
class _Column:
    """What one column may hold, and how it is standardised: (value - mean) / scale."""

    minimum: float
    maximum: float
    mean: float
    scale: float


class Standardise(nn.Module):
    """Maps raw columns, shape (b, columns), to (value - mean) / scale."""

    def __init__(self, columns: Sequence[_Column]) -> None:
        super().__init__()
        # Not persistent: they come from the task's options and never travel as parameters.
        self.mean = nn.Buffer(torch.tensor([c.mean for c in columns]), persistent=False)
        self.scale = nn.Buffer(torch.tensor([c.scale for c in columns]), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Standardise a batch."""
        return (values - self.mean) / self.scale


class Restore(nn.Module):
    """Maps standard numbers back to the unit of one column."""

    def __init__(self, column: _Column) -> None:
        super().__init__()
        self._column = column

    def forward(self, values: Tensor) -> Tensor:
        """Restore a batch of any shape."""
        return values * self._column.scale + self._column.mean


class Tabular(Task):
    """Predicts one column from others; what both kinds share."""

    def __init__(self, options: TabularOptions) -> None:
        self._options = options
        self._columns = [
            _column(f"feature {f.name!r}", f.minimum, f.maximum, f.mean, f.scale)
            for f in options.features
        ]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Tabular":
        """Build a `TabularClassification` or `TabularRegression` from `TabularOptions`."""
        read = convert(dict(options), TabularOptions, source="options of tabular")
        return TabularRegression(read) if read.kind == "regression" else TabularClassification(read)

    @property
    def contract(self) -> DataContract:
        """Rows whose features lie in their ranges."""
        features = tuple(
            Feature(name=feature.name, minimum=column.minimum, maximum=column.maximum)
            for feature, column in zip(self._options.features, self._columns, strict=True)
        )
        return DataContract(
            sources=("csv", "npz"),
            features=features,
            target=self._options.target,
            labels=self._options.labels,
        )

    @property
    def input(self) -> TensorSpec:
        """Raw values, in the order of the features."""
        return TensorSpec("features", "FP32", (-1, len(self._columns)))

    def example_inputs(self, rng: np.random.Generator, rows: int) -> NDArray[Any]:
        """Draw rows from the ranges, or around the means, shape (rows, features)."""
        columns = [_draw(column, rng, rows) for column in self._columns]
        return np.stack(columns, axis=1).astype(np.float32)

    def student(self, name: str) -> "Tabular":
        """Return the same task with another network: ``linear``, or ``mlp`` of 64 hidden units."""
        options = {**msgspec.to_builtins(self._options), "model": name, "hidden": None}
        return Tabular.from_options(options)

    def _network(self, outputs: int) -> list[nn.Module]:
        inputs = len(self._columns)
        if self._options.model == "linear":
            return [Standardise(self._columns), nn.Linear(inputs, outputs)]
        hidden = self._options.hidden or _DEFAULT_HIDDEN
        return [
            Standardise(self._columns),
            nn.Linear(inputs, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        ]


class TabularClassification(Tabular):
    """Predicts a label."""

    primary_metric = "accuracy"

    @property
    def output(self) -> TensorSpec:
        """One score for each label; their softmax is the probability."""
        return TensorSpec("logits", "FP32", (-1, len(self.labels)))

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by index."""
        return self._options.labels

    def build_model(self) -> nn.Module:
        """Return the network from raw values to logits."""
        return nn.Sequential(*self._network(len(self.labels)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss in nats; see `classification_loss`."""
        return classification_loss(self._options.loss or "cross-entropy", outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Count examples and hits, and sum the loss."""
        return classification_sums(outputs, targets)

    @property
    def statistics(self) -> Mapping[str, float]:
        """What `measure` returns, and how much of it one example may be."""
        return classification_bounds()

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return ``loss`` and ``accuracy``."""
        return classification_summary(sums)


class TabularRegression(Tabular):
    """Predicts a number; trains on it in standard units, and answers in its own."""

    primary_metric = "r2"

    def __init__(self, options: TabularOptions) -> None:
        super().__init__(options)
        o = options
        name = f"target {o.target!r}"
        self._target = _column(
            name, o.target_minimum, o.target_maximum, o.target_mean, o.target_scale
        )

    @property
    def contract(self) -> DataContract:
        """Rows whose features and target lie in their ranges."""
        low, high = self._target.minimum, self._target.maximum
        return msgspec.structs.replace(super().contract, target_minimum=low, target_maximum=high)

    @property
    def output(self) -> TensorSpec:
        """The prediction, in the target's own unit."""
        return TensorSpec("prediction", "FP32", (-1, 1))

    def build_model(self) -> nn.Module:
        """Return the network from raw values to the prediction, shape (b, 1)."""
        return nn.Sequential(*self._network(1), Restore(self._target))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error in standard units, whatever the target's unit."""
        return ((outputs[:, 0] - targets) / self._target.scale).square().mean()

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Sum the errors and what R² needs."""
        mean, scale = self._target.mean, self._target.scale
        return regression_sums(outputs[:, 0], targets, mean=mean, scale=scale)

    @property
    def statistics(self) -> Mapping[str, float]:
        """What `measure` returns, and how much of it one example may be."""
        target = self._target
        ends = [(end - target.mean) / target.scale for end in (target.minimum, target.maximum)]
        reach = max(map(abs, ends))
        return regression_bounds(_USUAL_REACH if math.isinf(reach) else reach)

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return ``loss``, ``rmse``, ``mae`` and ``r2``."""
        return regression_summary(sums, scale=self._target.scale)


def _column(
    name: str,
    minimum: float | None,
    maximum: float | None,
    mean: float | None,
    scale: float | None,
) -> _Column:
    """Complete what a person left out, or raise ConfigError."""
    low = float("-inf") if minimum is None else minimum
    high = float("inf") if maximum is None else maximum
    if low >= high:
        raise ConfigError(f"{name}: minimum {low:g} is not below maximum {high:g}; swap them")
    if mean is not None and scale is not None:
        return _Column(low, high, mean, scale)
    if math.isinf(high - low):
        raise ConfigError(f"{name} needs minimum and maximum, or mean and scale; add them")
    middle, half = (low + high) / 2, (high - low) / 2
    return _Column(low, high, middle if mean is None else mean, half if scale is None else scale)


def _draw(column: _Column, rng: np.random.Generator, rows: int) -> NDArray[Any]:
    if math.isinf(column.maximum - column.minimum):
        drawn = rng.normal(column.mean, column.scale, rows)
        return drawn.clip(column.minimum, column.maximum)
    return rng.uniform(column.minimum, column.maximum, rows)
