"""How one data set is dealt to many devices, so that they differ as real ones do."""

import numpy as np
from numpy.typing import NDArray

_ATTEMPTS = 100


def dirichlet_partition(
    labels: NDArray[np.int64],
    *,
    devices: int,
    alpha: float,
    rng: np.random.Generator,
    min_rows: int = 20,
) -> list[NDArray[np.int64]]:
    """Deal rows so that each class is spread over devices by a draw from Dirichlet(alpha).

    Follows Hsu et al., "Measuring the Effects of Non-Identical Data Distribution", 2019, in the
    form of NIID-Bench (Li et al., 2022): class by class, redrawn until every device has enough.

    Args:
        labels: shape (n,), class indices.
        devices: how many parts.
        alpha: small is skewed (0.3: a few classes dominate a device), large is even.
        rng: decides all.
        min_rows: fewest rows that a device may get.

    Returns:
        One array of row indices per device; together they hold each row once.

    Raises:
        ValueError: no draw gave every device ``min_rows``.
    """
    for _ in range(_ATTEMPTS):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(devices)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            shares = rng.dirichlet(np.full(devices, alpha))
            cuts = (np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
            for part, chunk in zip(parts, np.split(rows, cuts), strict=True):
                part.append(chunk)
        dealt = [np.sort(np.concatenate(part)) for part in parts]
        if min(len(rows) for rows in dealt) >= min_rows:
            return dealt
    raise ValueError(f"no Dirichlet({alpha}) draw gave each of {devices} devices {min_rows} rows")
