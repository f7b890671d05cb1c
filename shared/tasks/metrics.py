"""Measures as sums, so that those of many batches and many devices can simply be added."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


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
