"""What a machine-learning engineer writes: one `Task`, and nothing else.

A task says which data it needs (its contract), builds the network *including preprocessing* (so
that serving cannot disagree with training), and measures in sums, so that results of many devices
can be added. Sizes: ``b`` examples in a batch, ``n`` rows in a data set.

A task of one's own is a module with a subclass of `Task`, installed on the coordinator and on each
device, because only configuration travels, never code. Its task file, the same text everywhere,
names it::

    name = "two-moons"            # what runs, invitations and data are about
    uses = "two_moons:TwoMoons"   # module:object, or an entry point of the group "shoal.tasks"
    [options]                     # handed to `Task.from_options`
    hidden = 16

What the training side promises in return:

- Inputs arrive in float32 (`Task.input` is FP32) as the contract's source gave them: features
  (b, features) in the contract's order, pictures (b, channels, height, width) with pixels in
  [0, 255]. Targets are class indices int64 (b,), or numbers float32 (b,).
- The floating entries of the network's ``state_dict()`` travel and are averaged. Constants belong
  into non-persistent buffers. Layers without running statistics (no BatchNorm) average best.
- The network must survive ``torch.onnx.export`` with a dynamic batch: no branch on values.
- What is random in the network draws from torch's global generator, which is seeded.

The shortest whole example is tests/example_task/two_moons.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from shared.errors import ConfigError
from shared.manifest import TensorSpec
from shared.tasks.contract import DataContract

LARGEST_LOSS = 10.0  # nats that one example counts for under noise; guessing among 1,000 is 7


class Task(ABC):
    """One thing to learn. Instances are made from the options of a `TaskSpec` and never change."""

    primary_metric: ClassVar[str]  # the key of `summarize` that people watch
    higher_is_better: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Build the task; raise ConfigError that names an option which is unknown or impossible."""

    @property
    @abstractmethod
    def contract(self) -> DataContract:
        """The rows that the task can learn from."""

    @property
    @abstractmethod
    def input(self) -> TensorSpec:
        """The one input of the served model: raw values, before any preprocessing."""

    @property
    @abstractmethod
    def output(self) -> TensorSpec:
        """The one output of the served model."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names by index; empty where there are no classes."""
        return ()

    @abstractmethod
    def build_model(self) -> nn.Module:
        """Return a fresh network from raw inputs (b, …) to outputs (b, …), randomly initialised.

        Parameters are initialised from torch's global generator, which the caller seeds.
        """

    def student(self, name: str) -> "Task":
        """Return this task with a smaller network, which may learn from this one.

        Inputs, outputs, labels and contract stay the same.

        Raises:
            ConfigError: the task offers no network of this name, by default none at all.
        """
        raise ConfigError(
            f"this task offers no student {name!r}: overwrite `Task.student`, or leave "
            "[compression.distil] out"
        )

    def distil_loss(
        self, outputs: Tensor, taught: Tensor, targets: Tensor, *, temperature: float, weight: float
    ) -> Tensor:
        """Return the mean loss of a batch with a teacher, a scalar to minimise.

        With labels it is Hinton et al. 2015: the divergence from the teacher's softened
        probabilities, times temperature squared so that its gradients keep their size; without, the
        squared error against the teacher's outputs.

        Args:
            outputs: shape (b, …), the student's.
            taught: shape (b, …), the teacher's, without gradients.
            targets: shape (b,).
            temperature: that probabilities are softened by; above 1 they tell of all classes.
            weight: of the teacher's word, in [0, 1]; `loss` has the rest.
        """
        if self.labels:
            soft = functional.kl_div(
                functional.log_softmax(outputs / temperature, dim=1),
                functional.log_softmax(taught / temperature, dim=1),
                reduction="batchmean",
                log_target=True,
            )
            soft = soft * temperature**2
        else:
            soft = functional.mse_loss(outputs, taught)
        return weight * soft + (1 - weight) * self.loss(outputs, targets)

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar to minimise."""

    @abstractmethod
    def measure(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return statistics of a batch that may be *added* over batches and devices.

        Must hold ``examples`` (the number of rows) and ``loss_sum``.
        """

    @property
    def statistics(self) -> Mapping[str, float]:
        """The names that `measure` returns, with the largest magnitude that one example may add.

        Where noise protects the devices, it has to hide the largest contribution that is kept: a
        device's mean beyond its bound is clipped, and a bound that is far too large costs accuracy.
        By default the names are found by measuring a fresh network, with a bound of
        `LARGEST_LOSS` for ``loss_sum`` and of 1 for all else, as counts have it.
        """
        with torch.inference_mode():
            inputs = torch.from_numpy(self.example_inputs(np.random.default_rng(0), 2))
            targets = torch.zeros(2, dtype=torch.int64 if self.contract.labels else torch.float32)
            names = self.measure(seeded_model(self, 0).eval()(inputs), targets)
        return {name: LARGEST_LOSS if name == "loss_sum" else 1.0 for name in names}

    @abstractmethod
    def summarize(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Turn added statistics into metrics: ``loss`` and `primary_metric` at least."""

    def score(self, sums: Mapping[str, float]) -> float:
        """Return how good added statistics of at least one example are, in [0, 1].

        By default the `primary_metric`, cut off at both ends, or of one that should be low
        1 / (1 + loss). What is no number is 0.
        """
        summary = self.summarize(sums)
        value = summary[self.primary_metric]
        if not self.higher_is_better:
            value = 1 / (1 + max(0.0, summary["loss"]))
        return min(1.0, max(0.0, value)) if math.isfinite(value) else 0.0

    @abstractmethod
    def example_inputs(self, rng: np.random.Generator, rows: int) -> NDArray[Any]:
        """Draw plausible raw inputs from the contract alone, for export and golden batches."""


def seeded_model(task: Task, seed: int) -> nn.Module:
    """Build the task's network with weights that depend on ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.build_model()
