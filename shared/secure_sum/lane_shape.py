"""Which lanes a configuration asks for; both sides refuse others."""

import numpy as np

from shared.secure_sum.config import SumConfig
from shared.secure_sum.masking import Lanes

MAIN_TYPES = {16: np.uint16, 32: np.uint32}


def empty_lanes(config: SumConfig) -> Lanes:
    """Return a sum of no vectors: all lanes are zero."""
    main = np.zeros(config.encoding.length, dtype=MAIN_TYPES[config.encoding.lane_bits])
    return Lanes(main=main, exact=np.zeros(len(config.exact_lanes), dtype=np.uint64))


def lanes_fit(config: SumConfig, lanes: Lanes) -> bool:
    """Say whether type and shape are those of the configuration."""
    return (
        lanes.main.dtype == MAIN_TYPES[config.encoding.lane_bits]
        and lanes.main.shape == (config.encoding.length,)
        and lanes.exact.shape == (len(config.exact_lanes),)
    )
