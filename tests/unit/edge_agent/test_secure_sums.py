"""The shell around a device's part in secure sums: whole sessions, attacks, crashes, disks."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from edge_agent.secure_sums import SecureSums
from shared.secure_sum.encoding import decode_sum
from tests.unit.edge_agent.sum_fleet import (
    Fleet,
    Session,
    config_of,
    noised_config_of,
    vector_of,
)

NAMES = ("edge-1", "edge-2", "edge-3", "edge-4", "edge-5")


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path, *NAMES)


@pytest.fixture
def sums(fleet: Fleet) -> Iterator[dict[str, SecureSums]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(fleet.sums(name)) for name in NAMES}


def test_devices_sum_their_vectors(fleet: Fleet, sums: dict[str, SecureSums]) -> None:
    config = config_of()
    result = Session(fleet, config, sums).run()
    assert result is not None
    total, exact = decode_sum(config, result.lanes, count=len(NAMES))
    assert np.abs(total - sum(vector_of(n, config) for n in range(5))).max() < 5 / 500
    assert exact == {"examples": 150.0}


def test_noised_sums_too(fleet: Fleet, sums: dict[str, SecureSums]) -> None:
    config = noised_config_of()
    result = Session(fleet, config, sums).run()
    assert result is not None
    assert result.survivors == NAMES
