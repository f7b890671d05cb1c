"""Model parameters as one flat float32 vector of ``d`` numbers, the form in which they travel.

The order is that of ``state_dict()``; integer buffers (such as BatchNorm's step counter) stay on
the device. Stored as safetensors, never pickled.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.errors import UntrustedModelError

Vector = NDArray[np.float32]
_KEY = "parameters"


def save_vectors(vectors: Mapping[str, NDArray[np.float32] | NDArray[np.float64]]) -> bytes:
    """Serialise named vectors (parameters, optimiser state) as safetensors."""
    return save({name: np.ascontiguousarray(vector) for name, vector in vectors.items()})


def load_vectors(content: bytes) -> dict[str, NDArray[np.float32] | NDArray[np.float64]]:
    """Read what `save_vectors` wrote; raise UntrustedModelError where it is something else."""
    try:
        return load(content)
    except (SafetensorError, ValueError) as error:
        raise UntrustedModelError(f"not a safetensors file: {error}") from error


def load_parameters(path: Path) -> Vector:
    """Read the vector ``parameters``, shape (d,), from a file that `save_vectors` made."""
    vectors = load_vectors(path.read_bytes())
    if _KEY not in vectors:
        raise UntrustedModelError(f"{path.name} holds no parameters")
    return vectors[_KEY].astype(np.float32, copy=False)
