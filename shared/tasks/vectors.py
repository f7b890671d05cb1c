"""A network's parameters as the one flat float32 vector in which they travel, and back.

The layout is that of ``state_dict()``: every floating-point entry (weights, and buffers such as
BatchNorm's running means) flattened in its order. Integer entries, such as BatchNorm's step
counter, say nothing that could be averaged and stay where they are.
"""

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import PeerError
from shared.parameters import Vector


def vector_size(model: nn.Module) -> int:
    """Return ``d``, the number of elements of the model's vector."""
    return sum(entry.numel() for entry in _entries(model))


def to_vector(model: nn.Module) -> Vector:
    """Return a copy of the model's parameters, shape (d,)."""
    vector = np.empty(vector_size(model), dtype=np.float32)
    start = 0
    for entry in _entries(model):
        stop = start + entry.numel()
        vector[start:stop] = entry.to(device="cpu", dtype=torch.float32).numpy().ravel()
        start = stop
    return vector


def load_vector(model: nn.Module, vector: Vector) -> None:
    """Copy ``vector``, shape (d,), into the model's parameters.

    Raises:
        PeerError: the vector belongs to another network, or holds NaN or infinity; the model is
            unchanged.
    """
    size = vector_size(model)
    if vector.shape != (size,):
        raise PeerError(
            f"parameters of shape {vector.shape} do not fit a model of {size} parameters; "
            "both sides must run the same task"
        )
    if not np.isfinite(vector).all():
        raise PeerError("parameters hold NaN or infinity")
    start = 0
    with torch.no_grad():
        for entry in _entries(model):
            stop = start + entry.numel()
            # A copy, because torch refuses to borrow the read-only arrays that messages hold.
            entry.copy_(torch.tensor(vector[start:stop]).reshape(entry.shape))
            start = stop


def _entries(model: nn.Module) -> list[Tensor]:
    # Tensors of a state_dict share memory with the model and are detached from autograd.
    return [entry for entry in model.state_dict().values() if entry.is_floating_point()]
