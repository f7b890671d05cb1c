"""A task of one's own, outside Shoal's packages: which of two interleaved half circles is it?

All that is needed is this module where Python finds it (an installed package, or a folder on
PYTHONPATH) and the task file beside it, on the coordinator and on each device.
"""

from collections.abc import Mapping
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shared.config import convert
from shared.manifest import TensorSpec
from shared.tasks.contract import DataContract, Feature
from shared.tasks.metrics import classification_summary, classification_sums
from shared.tasks.task import Task


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a person may write under ``[options]``."""

    hidden: int = 16  # width of both hidden layers


class TwoMoons(Task):
    """Says to which moon a point belongs."""

    primary_metric = "accuracy"
    labels = ("upper", "lower")
    contract = DataContract(
        sources=("csv",),
        features=(
            Feature(name="x", minimum=-2, maximum=3),
            Feature(name="y", minimum=-2, maximum=2),
        ),
        target="moon",
        labels=labels,
    )
    input = TensorSpec("point", "FP32", (-1, 2))
    output = TensorSpec("logits", "FP32", (-1, 2))

    def __init__(self, options: Options) -> None:
        self._options = options

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(convert(dict(options), Options, source="options of two_moons"))

    def build_model(self) -> nn.Module:
        hidden = self._options.hidden
        return nn.Sequential(
            nn.Linear(2, hidden),
            nn.Tanh(),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 2),
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets)

    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return classification_sums(outputs, targets)

    @property
    def statistics(self) -> Mapping[str, float]:
        return {"examples": 1.0, "loss_sum": 5.0, "correct": 1.0}

    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        return classification_summary(sums)

    def example_inputs(self, rng: np.random.Generator, rows: int) -> NDArray[Any]:
        return rng.uniform((-2, -2), (3, 2), (rows, 2)).astype(np.float32)
