"""The columns that a probe adds to a fleet's statistics."""

import math

import numpy as np
import pytest

from shared.statistics.probes import (
    Probe,
    ProbeColumn,
    contract_of_probe,
    extremes_of,
    rows_of_probe,
)
from shared.statistics.questions import Mean, Quantiles, StatisticsQuestion, check_question
from shared.statistics.vectors import StatisticsVector

PROBE = Probe(
    model_sha256="a" * 64,
    columns=(ProbeColumn("x", "high", 3.0), ProbeColumn("x", "low", 1.0)),
    reach=2.0,
)


def test_extremes_are_each_rows_largest_and_negated_smallest_element() -> None:
    values = np.array([[[1, -2], [3, 4]], [[-5, 0], [0, -1]]], np.float32)
    np.testing.assert_array_equal(extremes_of(PROBE, {"x": values}), [[4, 2], [0, 5]])


def test_rows_are_octaves_within_reach_and_what_is_no_number_is_the_upper_end() -> None:
    extremes = np.array(
        [[8, 2], [2.0**20, 2.0**-20], [-1, 0], [np.nan, np.nan], [np.inf, -np.inf]], np.float32
    )
    rows = rows_of_probe(PROBE, extremes)
    np.testing.assert_array_equal(rows.inputs, [[3, 1], [5, -1], [1, -1], [5, 3], [5, -1]])


@pytest.mark.parametrize("seed", range(20))
def test_no_rows_whatever_they_are_exceed_the_norm_that_noise_is_measured_by(seed: int) -> None:
    rng = np.random.default_rng(seed)
    extremes = rng.choice([0, -1, np.nan, np.inf, 1e30, 8], (50, 2)).astype(np.float32)
    question = StatisticsQuestion(
        of=(Mean(feature="high x"), Quantiles(feature="low x", at=(0.9,), levels=4)), probe=PROBE
    )
    contract = contract_of_probe(PROBE)
    check_question(question, contract)
    vector = StatisticsVector(question, contract)
    contribution = vector.contribution(rows_of_probe(PROBE, extremes))
    assert np.isfinite(contribution).all()
    assert np.linalg.norm(contribution) <= vector.norm


def test_quantiles_of_octaves_are_read_within_a_bin() -> None:
    extremes = np.stack([np.linspace(4, 16, 999), np.ones(999)], axis=1).astype(np.float32)
    question = StatisticsQuestion(
        of=(Quantiles(feature="high x", at=(0.5, 0.9), levels=8),), max_rows=999, probe=PROBE
    )
    vector = StatisticsVector(question, contract_of_probe(PROBE))
    (answer,) = vector.read(vector.contribution(rows_of_probe(PROBE, extremes)), sigma=0.0)
    for name, share in {"q0.5": 0.5, "q0.9": 0.9}.items():
        assert abs(answer.values[name] - math.log2(4 + 12 * share)) < 4 / 2**8 + 1e-3
