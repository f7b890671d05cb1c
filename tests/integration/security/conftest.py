from collections.abc import Iterator

import pytest

from tests.integration.security.live_sums import LiveSums, live_sums


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveSums]:
    """One fleet for all tests here; each leaves it whole."""
    with live_sums(tmp_path_factory.mktemp("live")) as fleet:
        yield fleet
