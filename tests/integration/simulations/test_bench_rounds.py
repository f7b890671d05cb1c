import pytest

from shared.errors import ConfigError
from simulations.benchmarks.rounds import MEASUREMENTS, run
from simulations.benchmarks.stock_flower import stock_round_seconds


def test_a_row_can_be_measured_alone() -> None:
    told: list[str] = []

    (row,) = run(only="SuperLink CPU per message, 4 KB", quick=True, progress=told.append)

    assert row.name in MEASUREMENTS
    assert 0 < row.value < 100
    assert told == ["measuring SuperLink CPU per message, 4 KB …"]


def test_an_unknown_row_is_refused_with_the_names_of_all() -> None:
    with pytest.raises(ConfigError, match=r"no row 'speed'; choose one of: empty round, 2 agents"):
        run(only="speed", quick=True, progress=lambda _: None)


@pytest.mark.slow
def test_real_agents_are_compared_with_stock_flower() -> None:
    (row,) = run(only="empty round, 2 agents", quick=True, progress=lambda _: None)
    assert row.ratio is not None
    assert row.ratio > 5


@pytest.mark.slow
def test_stock_flower_is_timed_by_its_own_server_app() -> None:
    assert len(stock_round_seconds(1, rounds=1)) == 1
