"""Measures as sums, so that those of many batches and many devices can simply be added."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from shared.tasks.task import LARGEST_LOSS


@torch.no_grad()
def classification_sums(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Measure a batch.

    Args:
        logits: shape (b, classes).
        targets: shape (b,), class indices.

    Returns:
        ``examples``, ``loss_sum`` (cross entropy in nats) and ``correct``.
    """
    return {
        "examples": float(len(targets)),
        "loss_sum": float(functional.cross_entropy(logits, targets, reduction="sum")),
        "correct": float((logits.argmax(dim=1) == targets).sum()),
    }


def classification_summary(sums: Mapping[str, float]) -> dict[str, float]:
    """Return mean ``loss`` and ``accuracy`` in [0, 1] of at least one example."""
    examples = sums["examples"]
    return {"loss": sums["loss_sum"] / examples, "accuracy": sums["correct"] / examples}


def classification_bounds() -> dict[str, float]:
    """Return how much one example may add to each of `classification_sums` under noise."""
    return {"examples": 1.0, "loss_sum": LARGEST_LOSS, "correct": 1.0}


@torch.no_grad()
def regression_sums(
    predictions: Tensor, targets: Tensor, *, mean: float, scale: float
) -> dict[str, float]:
    """Measure a batch in standard units, (value - mean) / scale, where sums stay exact.

    Args:
        predictions: shape (b,), in the target's own unit.
        targets: shape (b,), in the same unit.
        mean: the same on all devices, from the task's options.
        scale: likewise.

    Returns:
        ``examples``, ``loss_sum`` (squared errors), ``absolute_error_sum``, and ``target_sum`` and
        ``target_square_sum``, which R² needs.
    """
    standard_targets = (targets.to(torch.float64) - mean) / scale
    errors = (predictions.to(torch.float64) - mean) / scale - standard_targets
    return {
        "examples": float(len(targets)),
        "loss_sum": float(errors.square().sum()),
        "absolute_error_sum": float(errors.abs().sum()),
        "target_sum": float(standard_targets.sum()),
        "target_square_sum": float(standard_targets.square().sum()),
    }


def regression_bounds(reach: float) -> dict[str, float]:
    """Return how much one example may add to each of `regression_sums` under noise.

    Args:
        reach: largest magnitude of a target in standard units; predictions are taken to reach no
            further, so that an error is at most twice as large.
    """
    return {
        "examples": 1.0,
        "loss_sum": (2 * reach) ** 2,
        "absolute_error_sum": 2 * reach,
        "target_sum": reach,
        "target_square_sum": reach**2,
    }


def regression_summary(sums: Mapping[str, float], *, scale: float) -> dict[str, float]:
    """Summarise at least one example.

    Returns:
        ``loss`` (mean squared error in standard units), ``rmse`` and ``mae`` in the target's unit,
        and ``r2``: 1 is perfect, 0 is as good as always saying the mean.
    """
    examples = sums["examples"]
    squared_error = sums["loss_sum"]
    variation = sums["target_square_sum"] - sums["target_sum"] ** 2 / examples
    return {
        "loss": squared_error / examples,
        "rmse": math.sqrt(squared_error / examples) * scale,
        "mae": sums["absolute_error_sum"] / examples * scale,
        # Where all targets are the same there is nothing to explain.
        "r2": 1 - squared_error / variation if variation > 0 else 0.0,
    }


def scale_statistics(sums: Mapping[str, float], bounds: Mapping[str, float]) -> NDArray[np.float64]:
    """Return one device's statistics as noise can hide them: its means, each over its bound.

    The order is that of the sorted names, on every device. Devices count alike, however many
    examples they have, so that how many is not told: their ``examples`` become 1.

    Args:
        sums: what `Task.measure` gave, added over batches; zeros where there are no examples.
        bounds: `Task.statistics`.

    Returns:
        Shape (len(bounds),), each in [-1, 1], 1 for what is no number; zeros where there are no
        examples.
    """
    examples = sums["examples"]
    if not examples:
        return np.zeros(len(bounds))
    means = np.array([sums[name] / examples / bounds[name] for name in sorted(bounds)])
    return np.where(np.isnan(means), 1.0, means).clip(-1, 1)


def restore_statistics(total: NDArray[np.float64], bounds: Mapping[str, float]) -> dict[str, float]:
    """Read the sum of several devices' `scale_statistics` as statistics `Task.summarize` takes.

    Args:
        total: shape (len(bounds),).
        bounds: `Task.statistics`.
    """
    return {name: float(total[at]) * bounds[name] for at, name in enumerate(sorted(bounds))}
