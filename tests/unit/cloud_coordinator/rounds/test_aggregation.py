import tracemalloc
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_coordinator.rounds.aggregation import (
    MAX_EXAMPLES,
    AddedStatistics,
    ModelState,
    WeightedMean,
    fed_avg,
)
from shared.errors import PeerError
from shared.parameters import Vector


def mean_of(updates: Iterable[tuple[Vector, int]], size: int) -> WeightedMean:
    mean = WeightedMean(size)
    for parameters, examples in updates:
        mean.add(parameters, {"examples": examples})
    return mean


@given(seed=st.integers(0, 2**32 - 1), devices=st.integers(1, 30))
@settings(deadline=None)
def test_the_order_of_arrival_changes_the_mean_by_less_than_1e_6(seed: int, devices: int) -> None:
    rng = np.random.default_rng(seed)
    updates = [
        (rng.normal(scale=10 ** rng.uniform(-3, 3), size=50).astype(np.float32), weight)
        for weight in rng.integers(1, 10**6, size=devices).tolist()
    ]

    first = mean_of(updates, 50).mean()
    other = mean_of([updates[i] for i in rng.permutation(devices)], 50).mean()

    scale = max(np.abs(update).max() for update, _ in updates)
    assert np.abs(first - other).max() <= 1e-6 * scale


@given(weights=st.lists(st.integers(1, MAX_EXAMPLES), min_size=1, max_size=8))
@settings(deadline=None)
def test_the_mean_is_that_of_the_textbook(weights: list[int]) -> None:
    rng = np.random.default_rng(0)
    size = 70_000  # more than one block
    vectors = [rng.normal(size=size).astype(np.float32) for _ in weights]

    mean = mean_of(zip(vectors, weights, strict=True), size)

    expected = np.average(np.array(vectors, dtype=np.float64), axis=0, weights=weights)
    assert mean.count == len(weights)
    np.testing.assert_allclose(mean.mean(), expected, rtol=1e-9, atol=1e-9)


def peak_bytes(devices: int, size: int) -> int:
    update = np.ones(size, dtype=np.float32)
    tracemalloc.start()
    try:
        mean_of(((update, 10) for _ in range(devices)), size).mean()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_one_vector_however_many_devices_take_part() -> None:
    size = 500_000
    ten, hundred = peak_bytes(10, size), peak_bytes(100, size)

    assert hundred <= ten * 1.05
    assert hundred <= 8 * size * 1.5


@pytest.mark.parametrize(
    ("parameters", "statistics"),
    [
        ([1, np.nan, 3], {"examples": 1}),
        ([1, np.inf, 3], {"examples": 1}),
        ([1, 2], {"examples": 1}),
        ([[1, 2, 3]], {"examples": 1}),
        ([1, 2, 3], {}),
        ([1, 2, 3], {"examples": 0}),
        ([1, 2, 3], {"examples": -1}),
        ([1, 2, 3], {"examples": 0.5}),
        ([1, 2, 3], {"examples": MAX_EXAMPLES * 2}),
        ([1, 2, 3], {"examples": float("nan")}),
        ([1, 2, 3], {"examples": 1, "loss_sum": float("inf")}),
        ([1, 2, 3], {"examples": 1, **{f"s{i}": 0 for i in range(200)}}),
    ],
)
def test_an_update_that_cannot_be_used_is_refused_and_leaves_no_trace(
    parameters: list[float], statistics: dict[str, float]
) -> None:
    mean = mean_of([(np.full(3, 2, dtype=np.float32), 5)], 3)

    with pytest.raises(PeerError):
        mean.add(np.array(parameters, dtype=np.float32), statistics)

    assert (mean.count, mean.statistics) == (1, {"examples": 5})
    np.testing.assert_array_equal(mean.mean(), [2, 2, 2])


def test_statistics_are_added_by_name() -> None:
    added = AddedStatistics()
    added.add({"examples": 3, "correct": 2})
    added.add({"examples": 4, "loss_sum": 1.5})
    added.add({"examples": 0})

    assert added.sums == {"examples": 7, "correct": 2, "loss_sum": 1.5}


def test_fedavg_takes_the_mean_in_the_precision_that_travels() -> None:
    state = ModelState(np.zeros(3, dtype=np.float32))

    following = fed_avg(state, np.array([1.0, 2.0, 1 / 3]))

    assert following.parameters.dtype == np.float32
    assert following.optimizer == {}
    np.testing.assert_allclose(following.parameters, [1, 2, 1 / 3], rtol=1e-6)
