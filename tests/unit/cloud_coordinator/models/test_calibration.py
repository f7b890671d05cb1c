"""Which ranges have to be measured, and how answers become ranges."""

import math

import numpy as np
import onnx
import pytest
from onnx import helper

from cloud_coordinator.models.calibration import (
    EXACT_STEPS,
    NOISED_STEPS,
    RangeStep,
    float_tensors,
    plan_ranges,
    ranges_from,
    steps_for,
)
from shared.errors import UnfitModelError
from shared.statistics.vectors import Answer
from shared.tasks.contract import DataContract, Feature, ImageShape
from tests.unit.cloud_coordinator.models.graphs import convolutional, graph, inner, pictures

PICTURES = DataContract(sources=("idx",), image=ImageShape(8, 8))


def answer(feature: str, value: float, *, error: float = 0.0, name: str = "q0.99") -> Answer:
    kind = "mean" if name == "mean" else "quantiles"
    return Answer(kind, feature, {name: value}, {name: error} if error else {})


def test_only_tensors_without_a_neighbours_range_are_measured() -> None:
    model = convolutional()
    plan = plan_ranges(model, inner(model, pictures(16)), PICTURES)
    assert {(c.tensor, c.side) for c in plan.columns} == {
        ("scaled", "high"),
        ("scaled", "low"),
        ("r1", "high"),
        ("c2", "high"),
        ("c2", "low"),
        ("sum", "high"),
        ("sum", "low"),
        ("y", "high"),
        ("y", "low"),
    }
    assert plan.known == {"x": (0.0, 255.0)}
    assert plan.same_as == {"c1": "r1", "p1": "r1", "flat": "sum"}


def test_centres_are_the_octaves_of_what_drawn_inputs_give() -> None:
    model = convolutional()
    drawn = inner(model, pictures(16))
    plan = plan_ranges(model, drawn, PICTURES)
    centres = {(c.tensor, c.side): c.centre for c in plan.columns}
    assert centres["r1", "high"] == pytest.approx(math.log2(drawn["r1"].max()), abs=1e-3)
    # Pictures have no negative pixels: that side is looked for four octaves below the other.
    assert centres["scaled", "low"] == pytest.approx(centres["scaled", "high"] - 4, abs=2e-3)


def test_answers_give_every_float_tensor_its_range() -> None:
    model = convolutional()
    plan = plan_ranges(model, inner(model, pictures(16)), PICTURES)
    answers = [answer(c.feature, 3.0 if c.side == "high" else 1.0) for c in plan.columns]
    ranges = ranges_from(answers, plan, RangeStep("q0.99", "q0.99"))
    assert set(ranges) == set(float_tensors(model))
    assert ranges["x"] == (0.0, 255.0)
    assert ranges["sum"] == ranges["flat"] == (-2.0, 8.0)
    assert ranges["r1"] == ranges["c1"] == ranges["p1"] == (0.0, 8.0)


def test_under_noise_an_octave_and_the_error_come_on_top_of_the_mean() -> None:
    model = convolutional()
    plan = plan_ranges(model, inner(model, pictures(16)), PICTURES)
    answers = [answer(c.feature, 2.0, error=0.5, name="mean") for c in plan.columns]
    assert steps_for(answers) == NOISED_STEPS
    ranges = ranges_from(answers, plan, NOISED_STEPS[0])
    assert ranges["y"] == (-(2.0**3.5), 2.0**3.5)


def test_noise_of_more_than_an_octave_says_how_many_more_devices_it_takes() -> None:
    model = convolutional()
    plan = plan_ranges(model, inner(model, pictures(16)), PICTURES)
    answers = [answer(c.feature, 2.0, error=2.5, name="mean") for c in plan.columns]
    with pytest.raises(UnfitModelError, match=r"±2\.5 octaves hides .* ask 2\.5 times as many"):
        ranges_from(answers, plan, NOISED_STEPS[0])


def test_an_answer_that_is_missing_or_lost_in_noise_is_named() -> None:
    model = convolutional()
    plan = plan_ranges(model, inner(model, pictures(16)), PICTURES)
    answers = [answer(c.feature, 2.0) for c in plan.columns]
    with pytest.raises(UnfitModelError, match="no device said what range 'low y' has"):
        ranges_from([a for a in answers if a.feature != "low y"], plan, EXACT_STEPS[1])
    for lost in (Answer("quantiles", "low y", {}, {}), answer("low y", math.nan)):
        others = [a for a in answers if a.feature != "low y"]
        with pytest.raises(UnfitModelError, match="'low y' is lost in noise"):
            ranges_from([*others, lost], plan, EXACT_STEPS[1])


def linear(nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    return graph(nodes, {"w": np.ones((4, 3), np.float32)}, shape=(4,), output="y")


@pytest.mark.parametrize(
    ("maximum", "known"), [(9.0, {"x": (0.0, 9.0)}), (math.inf, {})], ids=["promised", "open"]
)
def test_an_input_without_a_promised_range_is_measured(
    maximum: float, known: dict[str, tuple[float, float]]
) -> None:
    model = linear([helper.make_node("MatMul", ["x", "w"], ["y"])])
    features = tuple(Feature(name=n, minimum=0.0, maximum=maximum) for n in "abcd")
    contract = DataContract(sources=("csv",), features=features)
    drawn = inner(model, np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    plan = plan_ranges(model, drawn, contract)
    assert plan.known == known
    assert ("x" in {column.tensor for column in plan.columns}) is not bool(known)


def test_a_tensor_that_mixes_rows_is_named_with_its_operator() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("MatMul", ["centred", "w"], ["y"]),
    ]
    model = linear(nodes)
    drawn = inner(model, np.ones((8, 4), np.float32))
    with pytest.raises(UnfitModelError, match="tensor 'mean' of operator ReduceMean mixes rows"):
        plan_ranges(model, drawn, PICTURES)


def test_more_ranges_than_a_question_holds_are_refused() -> None:
    names = [f"t{i}" for i in range(60)]
    nodes = [
        helper.make_node("Sin", [before], [name])
        for before, name in zip(["x", *names], names, strict=False)
    ]
    model = linear([*nodes, helper.make_node("MatMul", ["t59", "w"], ["y"])])
    drawn = inner(model, np.ones((8, 4), np.float32))
    with pytest.raises(UnfitModelError, match="122 ranges would have to be measured"):
        plan_ranges(model, drawn, PICTURES)
