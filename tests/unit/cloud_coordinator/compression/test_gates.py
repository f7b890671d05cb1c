"""What lets a variant pass, what holds it back, and in which words."""

from collections.abc import Mapping

import msgspec
import pytest

from cloud_coordinator.compression.gates import Findings, choose, judge_variants
from shared.judge_plan import JudgePlan
from shared.judging import GAIN, MEAN, WORST_DECILE, CandidateFacts
from shared.statistics.vectors import Answer

PLAN = JudgePlan(noise="none", min_devices=3)
DEVICES = ("edge-0", "edge-1", "edge-2")
WORST_TENTH = (
    "worst decile: the worst tenth of the devices loses 0.1000 of a score of 0.8000, and 0.02 is "
    "the most allowed"
)
SIZES = {"fp32": 4000, "int8-weights": 1000}


def answer(name: str, values: Mapping[str, float], **errors: float) -> Answer:
    return Answer("score", name, dict(values), {k.replace("_", " "): v for k, v in errors.items()})


def facts(**p50_ms: float) -> dict[str, CandidateFacts]:
    found = {"current": 1.0, "fp32": 1.0, "int8-weights": 0.8}
    found.update({name.replace("_", "-"): value for name, value in p50_ms.items()})
    return {
        name: CandidateFacts(name=name, p50_ms=ms, p95_ms=2 * ms, memory_bytes=1000)
        for name, ms in found.items()
    }


def findings(**changes: object) -> Findings:
    base = {
        "answers": {
            "current": answer("current", {MEAN: 0.9, WORST_DECILE: 0.8}),
            "fp32": answer("fp32", {GAIN: 0.01, WORST_DECILE: 0.8}),
            "int8-weights": answer("int8-weights", {GAIN: -0.004, WORST_DECILE: 0.79}),
        },
        "facts": {device: facts() for device in DEVICES},
        "reference": "current",
        "sizes": SIZES,
    }
    return Findings(**{**base, **changes})  # type: ignore[arg-type]


def scored(**values: object) -> Findings:
    """Findings in which the small variant has other answers."""
    answers = dict(findings().answers)
    own = answers["int8-weights"]
    answers["int8-weights"] = msgspec.structs.replace(own, **values)
    return findings(answers=answers)


def objection(found: Findings, plan: JudgePlan = PLAN) -> str:
    fp32, small = judge_variants(plan, found)
    assert fp32.passed, fp32.objection
    return small.objection


def test_what_keeps_every_limit_passes() -> None:
    judged = judge_variants(PLAN, findings())
    assert [each.objection for each in judged] == ["", ""]
    assert [v.gate for v in judged[0].verdicts] == [
        "devices", "runs", "score", "worst decile", "latency",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {GAIN: -0.021, WORST_DECILE: 0.79},
            "score: it loses 0.0210 of a mean score of 0.9000, and 0.005 is the most allowed",
        ),
        ({GAIN: 0.0, WORST_DECILE: 0.7}, WORST_TENTH),
    ],
)
def test_a_gate_that_fails_says_which_and_by_how_much(values: dict[str, float], words: str) -> None:
    assert objection(scored(values=values)) == words


def test_a_class_that_is_forgotten_holds_a_variant_back_though_the_mean_is_well() -> None:
    answers = dict(findings().answers)
    for name, recall in (("current", 0.9), ("fp32", 0.9), ("int8-weights", 0.6)):
        values = {**answers[name].values, "label 0": 0.95, "label 1": recall}
        answers[name] = msgspec.structs.replace(answers[name], values=values)
    assert objection(findings(answers=answers)) == (
        "label: of class 1 it names 0.3000 fewer right, and 0.05 is the most allowed"
    )


def test_inside_the_noise_nothing_is_decided_and_nothing_passes() -> None:
    near = scored(
        values={GAIN: -0.004, WORST_DECILE: 0.8}, standard_error={GAIN: 0.002, WORST_DECILE: 0.0}
    )
    (verdict,) = [v for v in judge_variants(PLAN, near)[1].verdicts if v.gate == "score"]
    assert verdict.outcome == "undecided"
    assert verdict.words.endswith(
        "(noise: ± 0.0020), too near the limit of 0.005 for this noise: ask more devices, judge "
        "fewer candidates, or allow exact sums"
    )


@pytest.mark.parametrize(("gain", "outcome"), [(-0.001, "pass"), (-0.009, "fail")])
def test_outside_the_noise_it_is(gain: float, outcome: str) -> None:
    clear = scored(
        values={GAIN: gain, WORST_DECILE: 0.8}, standard_error={GAIN: 0.002, WORST_DECILE: 0.0}
    )
    (verdict,) = [v for v in judge_variants(PLAN, clear)[1].verdicts if v.gate == "score"]
    assert verdict.outcome == outcome


def test_the_reference_has_lost_nothing_against_itself_whatever_the_noise() -> None:
    answers = {
        "fp32": answer("fp32", {MEAN: 0.9, WORST_DECILE: 0.8}, mean=0.3, worst_decile=0.3),
        "int8-weights": answer("int8-weights", {GAIN: 0.0, WORST_DECILE: 0.8}, gain=0.3),
    }
    answers["fp32"] = msgspec.structs.replace(
        answers["fp32"], standard_error={MEAN: 0.3, WORST_DECILE: 0.3}
    )
    found = findings(answers=answers, reference="fp32")
    fp32, small = judge_variants(PLAN, found)
    assert fp32.passed
    assert not small.passed


def test_too_few_devices_can_choose_nothing() -> None:
    few = findings(facts={"edge-0": facts()})
    assert [each.objection for each in judge_variants(PLAN, few)] == [
        "devices: 1 devices judged it, fewer than 3"
    ] * 2


def test_a_variant_that_some_devices_cannot_run_is_named_with_one_of_them() -> None:
    broken = facts()
    broken["int8-weights"] = CandidateFacts(name="int8-weights", failure="no {kernel}")
    found = findings(facts={"edge-0": broken, "edge-1": facts(), "edge-2": facts()})
    assert objection(found) == (
        "runs: it fails on 33% of the devices (edge-0: no {kernel}), and 0.1 is the most allowed"
    )


def test_a_variant_that_no_device_can_run_has_no_latency_either() -> None:
    broken = facts()
    broken["int8-weights"] = CandidateFacts(name="int8-weights", failure="no kernel")
    small = judge_variants(PLAN, findings(facts=dict.fromkeys(DEVICES, broken)))[1]
    outcomes = {v.gate: v.outcome for v in small.verdicts}
    assert (outcomes["runs"], outcomes["latency"]) == ("fail", "undecided")


def test_latency_is_compared_on_the_same_device() -> None:
    """A fleet of fast and slow machines: the variant is ten times slower on most of them."""
    slow = facts(current=5.0, fp32=5.0, int8_weights=50.0)
    found = findings(facts={"edge-0": slow, "edge-1": slow, "edge-2": facts()})
    assert objection(found) == (
        "latency: its p95 is 10.00 times the reference's on the median device, and 1.5 is the "
        "most allowed"
    )


def test_size_and_memory_are_judged_where_a_plan_limits_them() -> None:
    plan = msgspec.structs.replace(PLAN, max_bytes=2000, max_memory_bytes=999)
    fp32, small = judge_variants(plan, findings())
    assert fp32.objection == "size: its file is 4,000 bytes, and 2000 is the most allowed"
    assert small.objection == (
        "memory: it takes 1,000 bytes on a device, and 999 is the most allowed"
    )


def test_the_smallest_is_favoured_unless_it_is_slow() -> None:
    assert choose(["fp32", "int8-weights"], findings(), {}) == "int8-weights"
    slow = findings(facts=dict.fromkeys(DEVICES, facts(int8_weights=2.0)))
    assert choose(["fp32", "int8-weights"], slow, {}) == "fp32"
    assert choose([], findings(), {}) == ""


def test_what_asks_something_of_a_processor_is_favoured_only_where_there_is_nothing_else() -> None:
    needs = {"int8-weights": ("vnni",)}
    assert choose(["fp32", "int8-weights"], findings(), needs) == "fp32"
    assert choose(["int8-weights"], findings(), needs) == "int8-weights"
