from itertools import count

import numpy as np
import pytest

from cloud_coordinator.models.parity import (
    Parity,
    choose,
    compare,
    median_latencies_us,
    objection,
    open_session,
    spread,
)
from cloud_coordinator.models.pipeline_messages import VariantReport
from shared.errors import UnfitModelError


def logits(rows: int = 64, classes: int = 10) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 4, (rows, classes)).astype(np.float32)


def report(
    variant: str,
    *,
    size_bytes: int,
    latency_us: float | None,
    passed: bool = True,
    cause: str = "",
    needs: tuple[str, ...] = (),
) -> VariantReport:
    return VariantReport(
        variant=variant,
        passed=passed,
        cause=cause,
        size_bytes=size_bytes,
        latency_p50_us=latency_us,
        needs=needs,
    )


def test_equal_outputs_have_no_difference() -> None:
    truth = logits()
    assert compare(truth, truth, classes=True) == Parity(0.0, 0.0, 1.0)


def test_the_error_is_measured_against_the_spread_of_the_outputs() -> None:
    truth = logits()
    parity = compare(truth + np.float32(0.04), truth, classes=False)
    assert parity.relative_error == pytest.approx(0.04 / truth.std(), rel=1e-3)
    assert parity.agreement is None


def test_a_constant_offset_does_not_hide_an_error() -> None:
    around_zero = np.linspace(-1, 1, 50, dtype=np.float32)[:, None]
    assert spread(around_zero + 100) == pytest.approx(spread(around_zero), rel=1e-3)


def test_outputs_that_are_all_the_same_have_a_spread_too() -> None:
    assert spread(np.zeros((4, 2), np.float32)) > 0
    assert spread(np.full((4, 1), 1000, np.float32)) == pytest.approx(1.0)


def test_only_rows_that_torch_decides_clearly_count_for_agreement() -> None:
    truth = np.array([[5, -5], [-5, 5], [0.01, 0.0]], np.float32)
    swapped_toss = np.array([[5, -5], [-5, 5], [0.0, 0.01]], np.float32)
    swapped_decision = np.array([[-5, 5], [-5, 5], [0.01, 0.0]], np.float32)
    assert compare(swapped_toss, truth, classes=True).agreement == 1.0
    assert compare(swapped_decision, truth, classes=True).agreement == 0.5


@pytest.mark.parametrize(
    ("parity", "words"),
    [
        (Parity(1e-6, 1e-7, 1.0), ""),
        (Parity(1e-6, 1e-7, None), ""),
        (Parity(0.4, 0.06, 1.0), "off by 6.00% of their spread, more than 5.00%"),
        (Parity(0.1, 0.01, 0.9), "the same class for 90.0%"),
        (Parity(float("nan"), float("nan"), 1.0), "NaN"),
        (Parity(float("inf"), float("inf"), 1.0), "NaN or infinity"),
    ],
)
def test_a_variant_is_refused_with_its_reason(parity: Parity, words: str) -> None:
    found = objection(parity, max_relative_error=0.05)
    assert words in found
    assert bool(found) == bool(words)


def test_the_smallest_variant_is_shipped_if_it_is_fast_enough() -> None:
    reports = [
        report("fp32", size_bytes=800, latency_us=100),
        report("fp16", size_bytes=400, latency_us=110),
        report("int8-weights", size_bytes=210, latency_us=101),
        report("int8-dynamic", size_bytes=200, latency_us=700),
    ]
    assert choose(reports) == "int8-weights"


def test_one_and_a_half_times_the_fastest_is_still_fast_enough() -> None:
    reports = [
        report("fp32", size_bytes=800, latency_us=100),
        report("fp16", size_bytes=400, latency_us=150),
        report("int8-weights", size_bytes=200, latency_us=150.1),
    ]
    assert choose(reports) == "fp16"


def test_a_variant_that_did_not_pass_neither_ships_nor_sets_the_pace() -> None:
    reports = [
        report("fp32", size_bytes=800, latency_us=100),
        report("fp16", size_bytes=400, latency_us=10, passed=False, cause="off"),
        report("int8-weights", size_bytes=0, latency_us=None, passed=False, cause="not built"),
    ]
    assert choose(reports) == "fp32"


def test_the_faster_of_two_equally_small_variants_is_shipped() -> None:
    reports = [
        report("fp32", size_bytes=400, latency_us=120),
        report("fp16", size_bytes=400, latency_us=100),
    ]
    assert choose(reports) == "fp16"


def test_a_variant_that_not_every_processor_computes_is_not_shipped_to_all() -> None:
    reports = [
        report("fp32", size_bytes=400, latency_us=100),
        report("int8-vnni", size_bytes=100, latency_us=20, needs=("vnni",)),
        report("int8-x86", size_bytes=101, latency_us=90),
    ]
    assert choose(reports) == "int8-x86"


def test_nothing_ships_when_fp32_itself_is_wrong() -> None:
    reports = [
        report("fp32", size_bytes=800, latency_us=100, passed=False, cause="its outputs hold NaN"),
        report("fp16", size_bytes=400, latency_us=100),
    ]
    with pytest.raises(UnfitModelError, match="its outputs hold NaN"):
        choose(reports)


def test_latencies_are_medians_over_turns() -> None:
    ticks = count()
    calls = {"slow": lambda: next(ticks), "quick": lambda: None}
    # Each look at the clock takes a microsecond, and so does the slow call.
    found = median_latencies_us(calls, clock=lambda: next(ticks) * 1e-6)
    assert found == pytest.approx({"slow": 2.0, "quick": 1.0})


def test_a_very_slow_model_is_timed_for_one_turn_only() -> None:
    hours = count(step=3600)
    calls = {"slow": lambda: None}
    assert median_latencies_us(calls, clock=lambda: next(hours)) == pytest.approx({"slow": 3.6e9})


def test_a_file_that_is_no_model_is_unfit() -> None:
    with pytest.raises(UnfitModelError, match="ONNX Runtime cannot load it"):
        open_session(b"not a model", {})
