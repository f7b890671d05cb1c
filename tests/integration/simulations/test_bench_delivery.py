import pytest

from shared.errors import ConfigError
from simulations.benchmarks.delivery import DOWNLOAD, REFRESH, run


def test_delivery_is_measured_over_the_coordinators_own_routes() -> None:
    told: list[str] = []
    (row,) = run(only=REFRESH, quick=True, progress=told.append)
    assert row.name == REFRESH
    assert 0 < row.value < 60
    assert len(told) == 6


def test_an_unknown_row_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError, match=f"choose '{REFRESH}' or '{DOWNLOAD}'"):
        run(only="speed", quick=True, progress=lambda _: None)
