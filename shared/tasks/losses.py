"""Losses of classification that tasks may choose from."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

ClassificationLoss = Literal["cross-entropy", "balanced"]
_ABSENT = 0.01  # what a class that a batch lacks counts for; above 0, or its score would be free


def classification_loss(kind: ClassificationLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean loss of a batch in nats.

    ``balanced`` adds the logarithm of each class's count in the batch to its score while training
    (Ren et al., "Balanced Meta-Softmax", NeurIPS 2020; in federated learning Zhang et al.,
    "Federated Learning with Label Distribution Skew via Logits Calibration", ICML 2022). A device
    that has few of the classes then no longer unlearns the others, which is what makes label skew
    costly. The scores are those of a world where all classes are equally frequent.

    Args:
        kind: which loss.
        logits: shape (b, classes).
        targets: shape (b,), class indices.
    """
    if kind == "balanced":
        counts = torch.bincount(targets, minlength=logits.shape[1])
        logits = logits + (counts + _ABSENT).log()
    return functional.cross_entropy(logits, targets)
