"""The order of a compression's steps, whatever is done already."""

from itertools import pairwise

import msgspec
import pytest

from cloud_coordinator.compression.steps import (
    Calibrated,
    Judged,
    LeftOut,
    ProbeMade,
    Signed,
    Step,
    StepResult,
    StudentTrained,
    VariantsBuilt,
    next_step,
)
from shared.compression_plan import CompressionPlan, DistilPlan
from shared.judge_plan import JudgePlan
from shared.run_plan import RunPlan
from shared.statistics.probes import Probe, ProbeColumn
from shared.tasks.spec import TaskSpec

COLUMNS = (ProbeColumn("x", "high", 0.0), ProbeColumn("x", "low", 0.0))
STUDENT = StudentTrained(
    run_id="run-distil",
    network="small-cnn",
    parameters_sha256="d" * 64,
    rounds=10,
    metrics={"accuracy": 0.87},
)
RESULTS: dict[Step, StepResult] = {
    Step.DISTIL: STUDENT,
    Step.SCRATCH: msgspec.structs.replace(STUDENT, run_id="run-scratch", metrics={}),
    Step.PROBE: ProbeMade(probe=Probe(model_sha256="a" * 64, columns=COLUMNS)),
    Step.CALIBRATE: Calibrated(run_id="run-calibrate", answers=()),
    Step.BUILD: VariantsBuilt(passed=5, built=6),
    Step.JUDGE: Judged(run_id="run-judge", devices=18, passed=2, judged=4),
    Step.SIGN: Signed(version="b" * 64),
}


def plan(compression: CompressionPlan | None, judge: JudgePlan | None = None) -> RunPlan:
    return RunPlan(
        name="nightly",
        task=TaskSpec("digits", "image-classification"),
        compression=compression,
        judge=judge,
    )


EVERYTHING = plan(CompressionPlan(distil=DistilPlan(student="small-cnn")), JudgePlan())


def order(plan: RunPlan, results: dict[Step, StepResult]) -> list[Step]:
    done: dict[Step, StepResult] = {}
    while (step := next_step(plan, done)) is not None:
        assert step not in done
        done[step] = results[step]
    return list(done)


def test_static_int8_asks_devices_before_it_builds() -> None:
    assert order(EVERYTHING, RESULTS) == list(Step)


def test_without_static_int8_no_device_is_asked() -> None:
    assert order(plan(CompressionPlan(int8=False)), RESULTS) == [Step.BUILD, Step.SIGN]
    assert order(plan(None), RESULTS) == [Step.BUILD, Step.SIGN]


def test_what_is_judged_is_judged_before_it_is_signed_compressed_or_not() -> None:
    assert order(plan(None, JudgePlan()), RESULTS) == [Step.BUILD, Step.JUDGE, Step.SIGN]


def test_a_model_that_cannot_be_probed_is_built_without_asking() -> None:
    results = {**RESULTS, Step.PROBE: LeftOut(cause="a tensor mixes rows")}
    assert order(plan(CompressionPlan()), results) == [Step.PROBE, Step.BUILD, Step.SIGN]


def test_devices_that_do_not_answer_do_not_end_the_job() -> None:
    results = {**RESULTS, Step.CALIBRATE: LeftOut(cause="too few devices")}
    assert order(EVERYTHING, results) == list(Step)


@pytest.mark.parametrize("count", range(len(Step) + 1))
def test_after_a_crash_the_first_step_that_is_not_done_comes_next(count: int) -> None:
    steps = list(Step)
    done = {step: RESULTS[step] for step in steps[:count]}
    assert next_step(EVERYTHING, done) == next(iter(steps[count:]), None)


def test_a_student_is_trained_with_and_without_a_teacher_before_anything_is_built() -> None:
    compression = CompressionPlan(int8=False, distil=DistilPlan(student="small-cnn"))
    wanted = [Step.DISTIL, Step.SCRATCH, Step.BUILD, Step.SIGN]
    assert order(plan(compression), RESULTS) == wanted


def test_every_result_has_words_of_its_own() -> None:
    words = [result.words for result in (*RESULTS.values(), LeftOut(cause="too few devices"))]
    assert words[2] == "2 ranges of 1 tensors to measure"
    assert words[-1] == "left out: too few devices"
    assert all(a != b for a, b in pairwise(sorted(words)))
