"""The order of a compression's steps, whatever is done already."""

from itertools import pairwise

import pytest

from cloud_coordinator.compression.steps import (
    Calibrated,
    LeftOut,
    ProbeMade,
    Signed,
    Step,
    StepResult,
    VariantsBuilt,
    in_words,
    next_step,
)
from shared.compression_plan import CompressionPlan
from shared.statistics.probes import Probe, ProbeColumn

COLUMNS = (ProbeColumn("x", "high", 0.0), ProbeColumn("x", "low", 0.0))
RESULTS: dict[Step, StepResult] = {
    Step.PROBE: ProbeMade(probe=Probe(model_sha256="a" * 64, columns=COLUMNS)),
    Step.CALIBRATE: Calibrated(run_id="run-calibrate", answers=()),
    Step.BUILD: VariantsBuilt(passed=5, built=6),
    Step.SIGN: Signed(version="b" * 64),
}


def order(plan: CompressionPlan, results: dict[Step, StepResult]) -> list[Step]:
    done: dict[Step, StepResult] = {}
    while (step := next_step(plan, done)) is not None:
        assert step not in done
        done[step] = results[step]
    return list(done)


def test_static_int8_asks_devices_before_it_builds() -> None:
    assert order(CompressionPlan(), RESULTS) == list(Step)


def test_without_static_int8_no_device_is_asked() -> None:
    assert order(CompressionPlan(int8=False), RESULTS) == [Step.BUILD, Step.SIGN]


def test_a_model_that_cannot_be_probed_is_built_without_asking() -> None:
    results = {**RESULTS, Step.PROBE: LeftOut(cause="a tensor mixes rows")}
    assert order(CompressionPlan(), results) == [Step.PROBE, Step.BUILD, Step.SIGN]


def test_devices_that_do_not_answer_do_not_end_the_job() -> None:
    results = {**RESULTS, Step.CALIBRATE: LeftOut(cause="too few devices")}
    assert order(CompressionPlan(), results) == list(Step)


@pytest.mark.parametrize("count", range(len(Step) + 1))
def test_after_a_crash_the_first_step_that_is_not_done_comes_next(count: int) -> None:
    steps = list(Step)
    done = {step: RESULTS[step] for step in steps[:count]}
    assert next_step(CompressionPlan(), done) == next(iter(steps[count:]), None)


def test_every_result_has_words_of_its_own() -> None:
    words = [in_words(result) for result in (*RESULTS.values(), LeftOut(cause="too few devices"))]
    assert words[0] == "2 ranges of 1 tensors to measure"
    assert words[-1] == "left out: too few devices"
    assert all(a != b for a, b in pairwise(sorted(words)))
