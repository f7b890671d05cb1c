from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.tasks.contract import Feature
from shared.tasks.tabular import Tabular, TabularClassification, TabularRegression

FEATURES = [
    {"name": "pressure", "minimum": 0, "maximum": 10},
    {"name": "temperature", "mean": 20.0, "scale": 15.0, "maximum": 200},
]
PUMPS: dict[str, Any] = {
    "kind": "classification",
    "features": FEATURES,
    "target": "state",
    "labels": ["ok", "failed"],
}
PRICES: dict[str, Any] = {
    "kind": "regression",
    "features": FEATURES,
    "target": "price",
    "target_minimum": 100,
    "target_maximum": 300,
}


def test_the_contract_holds_the_ranges_that_were_written() -> None:
    contract = Tabular.from_options(PUMPS).contract

    assert contract.features == (
        Feature(name="pressure", minimum=0, maximum=10),
        Feature(name="temperature", maximum=200),
    )
    assert contract.target == "state"
    assert contract.labels == ("ok", "failed")


def test_a_regression_s_contract_bounds_the_target() -> None:
    contract = Tabular.from_options(PRICES).contract

    assert (contract.target_minimum, contract.target_maximum) == (100, 300)
    assert contract.labels == ()


@pytest.mark.parametrize(("model", "parameters"), [("linear", 6), ("mlp", 4482)])
def test_classifiers_have_a_score_for_each_label(model: str, parameters: int) -> None:
    task = Tabular.from_options({**PUMPS, "model": model})
    inputs = task.example_inputs(np.random.default_rng(0), 4)
    network = task.build_model()

    assert isinstance(task, TabularClassification)
    assert inputs.shape == (4, 2)
    assert inputs.dtype == np.float32
    assert network(torch.from_numpy(inputs)).shape == (4, 2)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_example_inputs_lie_within_the_contract() -> None:
    inputs = Tabular.from_options(PUMPS).example_inputs(np.random.default_rng(0), 10_000)

    assert 0 <= inputs[:, 0].min() < 0.1
    assert 9.9 < inputs[:, 0].max() <= 10
    assert inputs[:, 1].max() <= 200
    assert inputs[:, 1].mean() == pytest.approx(20, abs=1)


def first_layer_sees(task: Tabular, rows: list[list[float]]) -> Tensor:
    standardise = task.build_model().get_submodule("0")
    seen = standardise(torch.tensor(rows))
    assert isinstance(seen, Tensor)
    return seen


def test_features_are_standardised_by_their_range_or_by_what_was_declared() -> None:
    seen = first_layer_sees(Tabular.from_options(PUMPS), [[0, 5], [5, 20], [10, 35]])

    assert seen.tolist() == [[-1, -1], [0, 0], [1, 1]]


def test_the_constants_of_standardisation_are_no_parameters() -> None:
    network = Tabular.from_options(PRICES).build_model()

    assert list(network.state_dict()) == ["1.weight", "1.bias"]


def test_a_regression_answers_in_the_target_s_own_unit() -> None:
    task = Tabular.from_options(PRICES)
    network = task.build_model()
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)

    predictions = network(torch.tensor([[5.0, 20.0]]))

    assert isinstance(task, TabularRegression)
    assert predictions.tolist() == [[200.0]]
    assert task.loss(predictions, torch.tensor([300.0])).item() == pytest.approx(1)
    metrics = task.summarize(task.measure(predictions, torch.tensor([300.0])))
    assert metrics["mae"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({**PUMPS, "labels": []}, "labels: a classification needs two or more"),
        ({**PUMPS, "target_minimum": 0}, "target_minimum: a classification has labels instead"),
        ({**PRICES, "labels": ["a", "b"]}, "labels: a regression has none"),
        ({**PRICES, "loss": "balanced"}, "loss: a regression always has the squared error"),
        ({**PUMPS, "hidden": 8}, "hidden: a linear model has no hidden layer"),
        ({**PUMPS, "features": []}, "features: expected `array` of length >= 1"),
        ({**PUMPS, "features": [FEATURES[0]] * 2}, "features: a column is named twice"),
        ({**PUMPS, "target": "pressure"}, "features: a column is named twice, or is the target"),
        (
            {**PUMPS, "features": [{"name": "a", "minimum": 0}]},
            "feature 'a' needs minimum and maximum, or mean and scale; add them",
        ),
        (
            {**PUMPS, "features": [{"name": "a", "minimum": 1, "maximum": 1}]},
            "feature 'a': minimum 1 is not below maximum 1; swap them",
        ),
        ({**PRICES, "target_maximum": None}, "target 'price' needs minimum and maximum"),
        ({**PUMPS, "features": [{"name": "a", "max": 1}]}, "unknown key 'max'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Tabular.from_options(options)


def test_every_statistic_of_a_task_is_named_with_its_bound() -> None:
    classifier, regression = Tabular.from_options(PUMPS), Tabular.from_options(PRICES)
    logits, labels = torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64)
    price = torch.tensor([[300.0]])

    assert list(classifier.statistics) == list(classifier.measure(logits, labels))
    sums = regression.measure(price, torch.tensor([100.0]))  # as wrong as the range permits
    assert list(regression.statistics) == list(sums)
    assert all(abs(sums[name]) <= bound for name, bound in regression.statistics.items())
    assert sums["loss_sum"] == regression.statistics["loss_sum"]


def test_targets_without_a_range_are_taken_to_be_some_scales_away() -> None:
    endless = {"target_minimum": None, "target_maximum": None, "target_mean": 0, "target_scale": 5}
    assert Tabular.from_options(PRICES | endless).statistics["target_sum"] == 4
