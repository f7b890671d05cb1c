"""What a device puts into a sum: every number that is asked for, and no other."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contributions import (
    evaluation_contribution,
    statistics_contribution,
    training_contribution,
)
from edge_agent.training import Update
from shared.errors import PeerError
from shared.secure_sum.config import Encoding, ExactLane, SumConfig
from shared.statistics.questions import Count, StatisticsQuestion
from shared.tasks.contract import DataContract, Feature
from shared.tasks.examples import Examples
from shared.tasks.metrics import classification_bounds
from tests.unit.edge_agent.sum_fleet import config_of

RECEIVED = np.array([1.0, -2.0, 0.5, 3.0], np.float32)
STEP = np.array([0.1, -0.2, 0.3, 0.4], np.float32)
SUMS = {"seen": 80.0, "loss_sum": 12.5}
MEASURED = {"examples": 8.0, "loss_sum": 4.0, "correct": 6.0}


def config_for(*lanes: ExactLane, length: int = 4, clip_norm: float = 1.0) -> SumConfig:
    encoding = Encoding(
        lane_bits=32, length=length, clip_norm=clip_norm, steps_per_unit=1000.0, max_steps=2**20
    )
    return config_of(encoding=encoding, exact_lanes=lanes)


def lane(name: str, largest: int = 2**40) -> ExactLane:
    return ExactLane(name=name, max_steps=largest)


def update(step: Any = STEP, num_examples: int = 40) -> Update:
    return Update(RECEIVED + np.asarray(step, np.float32), num_examples, SUMS)


def test_without_weights_it_is_what_training_changed_and_nothing_else() -> None:
    made = training_contribution(config_for(), RECEIVED, update())

    np.testing.assert_allclose(made.vector, STEP, rtol=1e-6)
    assert made.vector.dtype == np.float32
    assert made.exact == {}


def test_where_devices_are_weighed_the_update_is_weighed_too() -> None:
    config = config_for(lane("examples", 100), lane("seen"), lane("loss_sum"))

    made = training_contribution(config, RECEIVED, update(num_examples=25))

    np.testing.assert_allclose(made.vector, STEP * 0.25, rtol=1e-6)
    assert made.exact == {"examples": 25.0, "seen": 80.0, "loss_sum": 12.5}


def test_a_device_with_very_many_examples_counts_as_the_largest_weight() -> None:
    config = config_for(lane("examples", 100))

    made = training_contribution(config, RECEIVED, update(num_examples=10_000))

    np.testing.assert_allclose(made.vector, STEP, rtol=1e-6)
    assert made.exact == {"examples": 100.0}


@given(
    length=st.floats(0.01, 100),
    weight=st.integers(1, 200),
    counted=st.sampled_from([(), (lane("unclipped", 1),)]),
)
def test_no_weighted_update_is_longer_than_the_clip_norm_times_its_weight(
    length: float, weight: int, counted: tuple[ExactLane, ...]
) -> None:
    step = STEP / np.linalg.norm(STEP) * length
    config = config_for(lane("examples", 100), *counted)

    made = training_contribution(config, RECEIVED, update(step, weight))

    share = min(weight, 100) / 100
    assert np.linalg.norm(made.vector) <= share * 1.00001
    assert np.linalg.norm(made.vector) == pytest.approx(share * min(length, 1), rel=1e-3)


@pytest.mark.parametrize(("length", "unclipped"), [(0.9, 1.0), (1.1, 0.0)])
def test_a_device_says_whether_its_update_was_within_the_clip_norm_where_that_is_counted(
    length: float, unclipped: float
) -> None:
    step = STEP / np.linalg.norm(STEP) * length

    made = training_contribution(config_for(lane("unclipped", 1)), RECEIVED, update(step))

    assert made.exact == {"unclipped": unclipped}


def test_a_difference_beyond_all_floats_counts_as_no_update() -> None:
    config = config_for(lane("examples", 100), lane("seen"), lane("loss_sum"))
    far = Update(-RECEIVED * np.float32(1e38), 40, SUMS)

    made = training_contribution(config, RECEIVED * np.float32(1e38), far)

    assert not made.vector.any()
    assert made.exact == {"examples": 0.0, "seen": 0.0, "loss_sum": 0.0}


def test_measures_that_are_not_finite_count_as_the_largest_that_are_kept() -> None:
    bounds = classification_bounds()
    measured = {"examples": 8.0, "loss_sum": float("nan"), "correct": 6.0}
    exact = config_for(lane("loss_sum"), lane("correct"), length=0)

    assert evaluation_contribution(exact, measured, bounds).exact == {
        "loss_sum": 8 * bounds["loss_sum"],
        "correct": 6.0,
    }
    noised = evaluation_contribution(config_for(length=3), measured, bounds)
    assert noised.vector.tolist() == [0.75, 1.0, 1.0]  # correct, examples, loss_sum
    measured["loss_sum"] = float("inf")
    assert evaluation_contribution(config_for(length=3), measured, bounds).vector[2] == 1.0


def test_what_training_does_not_say_is_not_made_up() -> None:
    with pytest.raises(PeerError, match="cannot say 'label_7' in a sum to train"):
        training_contribution(config_for(lane("label_7")), RECEIVED, update())


def test_a_sum_of_another_length_is_refused() -> None:
    with pytest.raises(PeerError, match="5 lanes for a vector of 4"):
        training_contribution(config_for(length=5), RECEIVED, update())


def test_measures_are_exact_where_there_are_no_main_lanes() -> None:
    bounds = classification_bounds()
    config = config_for(lane("examples"), lane("correct"), length=0)

    assert evaluation_contribution(config, MEASURED, bounds).exact == {
        "examples": 8.0,
        "correct": 6.0,
    }
    nothing = evaluation_contribution(config, {"examples": 0.0}, bounds)
    assert nothing.exact == {"examples": 0.0, "correct": 0.0}
    assert nothing.vector.shape == (0,)


def test_measures_under_noise_are_bounded_means_without_how_many_rows_there_are() -> None:
    made = evaluation_contribution(config_for(length=3), MEASURED, classification_bounds())

    np.testing.assert_allclose(made.vector, [0.75, 1.0, 0.05])  # correct, examples, loss_sum
    assert made.exact == {}


@pytest.mark.parametrize(
    "config", [config_for(lane("rare"), length=0), config_for(lane("correct"), length=3)]
)
def test_measures_that_the_task_does_not_name_or_exact_ones_beside_noise_are_refused(
    config: SumConfig,
) -> None:
    with pytest.raises(PeerError, match="a device cannot say"):
        evaluation_contribution(config, MEASURED, classification_bounds())


def test_a_device_without_rows_answers_zeros_to_a_statistics_question() -> None:
    question = StatisticsQuestion(of=(Count(),), max_rows=10)
    contract = DataContract(
        sources=("csv",), features=(Feature(name="x", minimum=0, maximum=1),), target="y"
    )
    rows = Examples(np.full((5, 1), 0.5, np.float32), np.zeros(5, np.float32))

    some = statistics_contribution(config_for(length=2), question, contract, rows)
    none = statistics_contribution(
        config_for(length=2), question, contract, rows.take(np.arange(0))
    )

    assert some.vector[0] == pytest.approx(0.5)
    assert not none.vector.any()


def test_a_contribution_shows_nothing_of_itself() -> None:
    made = training_contribution(config_for(lane("seen")), RECEIVED, update())
    assert "0.1" not in repr(made)
    assert "80" not in repr(made)
