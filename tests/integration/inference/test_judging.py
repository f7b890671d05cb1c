"""Files that are judged on a device: what they may do to it, and which gate stops which."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper

from cloud_coordinator.compression.gates import Findings, judge_variants
from edge_agent.judging import judge, try_files
from shared.errors import StoppedError
from shared.judge_plan import JudgePlan
from shared.judging import Candidate, JudgeQuestion, Scorecard
from shared.tasks.examples import Examples
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from tests.integration.inference.tiny_models import (
    CLASSES,
    FEATURES,
    build,
    endless,
    gigantic,
    linear,
    not_finite,
)

GOOD = linear()
ROWS = np.random.default_rng(0).uniform(-1, 1, (70, FEATURES)).astype(np.float32)
TARGETS = (ROWS @ GOOD.weights).argmax(axis=1)
TASK = load_task(
    TaskSpec(
        "insects",
        "tabular",
        {
            "kind": "classification",
            "features": [{"name": f"x{n}", "minimum": -1, "maximum": 1} for n in range(FEATURES)],
            "target": "kind",
            "labels": ["ant", "bee", "cat"],
        },
    )
)
DEADLINE_S = 60.0


def named(*names: str) -> tuple[Candidate, ...]:
    return tuple(Candidate(name=name, sha256=f"{index:064x}") for index, name in enumerate(names))


def wrong_labels() -> bytes:
    """A model that names what is least likely."""
    weights = numpy_helper.from_array(-GOOD.weights, "w")
    return build([helper.make_node("MatMul", ["x", "w"], ["y"])], [weights])


def slow(size: int = 1500) -> bytes:
    """The good model, with some ten milliseconds of work that changes nothing."""
    large = np.full((size, size), 1e-6, np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("ReduceMax", ["xw"], ["some"], keepdims=0),
        helper.make_node("Mul", ["large", "some"], ["scaled"]),
        helper.make_node("MatMul", ["scaled", "large"], ["product"]),
        helper.make_node("ReduceMax", ["product"], ["most"], keepdims=0),
        helper.make_node("Mul", ["most", "zero"], ["nothing"]),
        helper.make_node("Add", ["xw", "nothing"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(GOOD.weights, "w"),
        numpy_helper.from_array(large, "large"),
        numpy_helper.from_array(np.zeros((), np.float32), "zero"),
    ]
    return build(nodes, tensors)


def test_each_files_outputs_and_costs_come_back() -> None:
    found = try_files(named("one", "two"), [GOOD.content, wrong_labels()], ROWS[:8], ROWS)
    np.testing.assert_allclose(found.outputs["one"], ROWS @ GOOD.weights, rtol=1e-5)
    np.testing.assert_allclose(found.outputs["two"], -ROWS @ GOOD.weights, rtol=1e-5)
    for facts in found.facts.values():
        assert facts.failure == ""
        assert 0 < facts.p50_ms <= facts.p95_ms
        assert facts.load_ms > 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a model", "the model does not load"),
        (gigantic().content, "the model failed|the process that tried it"),
    ],
)
def test_a_file_that_does_not_run_here_costs_itself_alone(content: bytes, words: str) -> None:
    found = try_files(named("bad", "good"), [content, GOOD.content], ROWS[:8], ROWS)
    assert any(word in found.facts["bad"].failure for word in words.split("|"))
    assert list(found.outputs) == ["good"]
    assert found.facts["good"].failure == ""


def test_a_file_that_hangs_is_ended_and_the_others_are_still_tried() -> None:
    files = [endless().content, GOOD.content]
    found = try_files(named("bad", "good"), files, ROWS[:8], ROWS, time_limit_s=4)
    assert found.facts["bad"].failure == "the process that tried it took more than 4 seconds"
    assert list(found.outputs) == ["good"]


def test_judging_ends_as_soon_as_it_is_to_stop() -> None:
    answers = iter([False, True])
    with pytest.raises(StoppedError):
        try_files(
            named("bad"), [endless().content], ROWS[:8], ROWS, should_stop=lambda: next(answers)
        )


def test_nothing_of_the_rows_touches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    try_files(named("good"), [GOOD.content], ROWS[:8], ROWS)
    assert list(tmp_path.iterdir()) == []


def test_more_rows_than_a_pipe_holds_arrive_although_the_process_is_slow_to_start() -> None:
    rows = np.tile(ROWS, (1000, 1))
    found = try_files(named("good"), [GOOD.content], ROWS[:8], rows, time_limit_s=DEADLINE_S)
    assert found.outputs["good"].shape == (len(rows), CLASSES)


def test_a_device_without_rows_says_what_files_cost_and_nothing_else() -> None:
    question = JudgeQuestion(candidates=named("fp32"), reference="fp32", max_rows=100, labels=3)
    empty = Examples(ROWS[:0], TARGETS[:0])
    vector, (facts,) = judge(question, [GOOD.content], TASK, empty)
    assert not vector.any()
    assert facts.p50_ms > 0


def test_of_many_rows_no_more_are_judged_than_was_asked() -> None:
    question = JudgeQuestion(candidates=named("fp32"), reference="fp32", max_rows=7, labels=3)
    vector, _ = judge(question, [GOOD.content], TASK, Examples(ROWS, TARGETS))
    assert vector[0] == 1.0
    (answer,) = Scorecard(question).read(vector, sigma=0.0)
    assert answer.values["mean"] == 1.0


def findings(names: Sequence[str], files: Sequence[bytes], devices: int = 3) -> Findings:
    """Judge files on some devices' rows, and add up what they say."""
    question = JudgeQuestion(
        candidates=named(*names), reference=names[0], max_rows=20, labels=CLASSES
    )
    card = Scorecard(question)
    total, facts = np.zeros(card.length), {}
    for number in range(devices):
        rows = Examples(ROWS[number::devices], TARGETS[number::devices])
        vector, told = judge(question, files, TASK, rows)
        total += vector
        facts[f"edge-{number}"] = {each.name: each for each in told}
    return Findings(
        answers={answer.feature: answer for answer in card.read(total, sigma=0.0)},
        facts=facts,
        reference=names[0],
        sizes={name: len(file) for name, file in zip(names, files, strict=True)},
    )


def test_judgement_stops_each_model_that_a_rollout_would_have_to_turn_back() -> None:
    """Crash on load, NaN, ten times slower and wrong labels, each by the gate that is for it."""
    names = ("good", "broken", "nan", "slow", "wrong")
    files = [GOOD.content, b"not a model", not_finite().content, slow(), wrong_labels()]
    found = findings(names, files)
    judged = {each.variant: each for each in judge_variants(JudgePlan(noise="none"), found)}
    failed = {
        name: [v.gate for v in each.verdicts if v.outcome == "fail"]
        for name, each in judged.items()
    }
    assert failed["good"] == []
    assert failed["broken"][0] == "runs"
    assert failed["nan"][:2] == ["score", "worst decile"]
    assert failed["slow"] == ["latency"]
    assert failed["wrong"][0] == "score"
