import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.config import convert
from shared.errors import ConfigError, DataError
from shared.statistics.questions import (
    Count,
    Histogram,
    Labels,
    Mean,
    Quantiles,
    RowsPerDevice,
    Statistic,
    StatisticsQuestion,
    Variance,
    check_question,
)
from shared.statistics.vectors import StatisticsVector
from shared.tasks.contract import DataContract, Feature, ImageShape
from shared.tasks.examples import Examples

MACHINES = DataContract(
    sources=("csv",),
    features=(Feature(name="heat", minimum=-40, maximum=120), Feature(name="speed")),
    labels=("ok", "failed"),
)
HOUSES = DataContract(
    sources=("csv",),
    features=(Feature(name="rooms", minimum=0, maximum=10),),
    target="price",
    target_minimum=0,
    target_maximum=100,
)
PICTURES = DataContract(sources=("npz",), image=ImageShape(2, 2), labels=("cat", "dog"))


def rows(heats: list[float], labels: list[int] | None = None) -> Examples:
    inputs = np.array([[heat, 0.0] for heat in heats], np.float32).reshape(-1, 2)
    return Examples(inputs, np.array(labels or [0] * len(heats), np.int64))


def total(question: StatisticsQuestion, devices: list[Examples]) -> dict[str, dict[str, float]]:
    vector = StatisticsVector(question, MACHINES)
    summed = np.sum([vector.contribution(device) for device in devices], axis=0)
    answers = vector.read(summed, sigma=0.0)
    return {answer.kind: answer.values for answer in answers}


def test_sums_of_devices_give_the_statistics_of_all_rows_together() -> None:
    rng = np.random.default_rng(1)
    heats = [rng.uniform(-40, 120, size).astype(np.float32) for size in (30, 7, 63)]
    labels = [rng.integers(0, 2, len(part)) for part in heats]
    of = (
        Count(),
        Mean(feature="heat"),
        Variance(feature="heat"),
        Histogram(feature="heat", bins=4),
        Labels(),
    )
    devices = [rows(list(h), list(y)) for h, y in zip(heats, labels, strict=True)]

    found = total(StatisticsQuestion(of=of, max_rows=100), devices)

    everything = np.concatenate(heats).astype(np.float64)
    assert found["count"]["count"] == pytest.approx(100)
    assert found["mean"]["mean"] == pytest.approx(everything.mean())
    assert found["variance"]["variance"] == pytest.approx(everything.var())
    assert found["variance"]["standard_deviation"] == pytest.approx(everything.std())
    counts, _ = np.histogram(everything, bins=4, range=(-40, 120))
    assert list(found["histogram"].values()) == pytest.approx(counts.tolist())
    assert found["labels"]["failed"] == pytest.approx(np.concatenate(labels).sum())


def test_quantiles_are_those_of_all_rows_to_the_width_of_a_leaf() -> None:
    rng = np.random.default_rng(2)
    heats = np.clip(rng.normal(20, 15, 4000), -40, 120)
    question = StatisticsQuestion(
        of=(Quantiles(feature="heat", at=(0.05, 0.5, 0.95), levels=8),), max_rows=1000
    )

    found = total(question, [rows(list(part)) for part in np.split(heats, 8)])["quantiles"]

    leaf = 160 / 2**8
    for p in (0.05, 0.5, 0.95):
        assert found[f"q{p:g}"] == pytest.approx(np.quantile(heats, p), abs=leaf)


def test_levels_that_agree_make_noisy_quantiles_better_than_leaves_alone() -> None:
    rng = np.random.default_rng(3)
    question = StatisticsQuestion(of=(Quantiles(feature="heat", at=(0.5,), levels=8),), max_rows=10)
    vector = StatisticsVector(question, MACHINES)
    heats = rng.uniform(-40, 120, 1000)
    exact = np.sum([vector.contribution(rows(list(part))) for part in np.split(heats, 100)], axis=0)
    leaves = slice(1 + 2**8 - 2, None)
    errors_together, errors_leaves = [], []
    for _ in range(40):
        noisy = exact + rng.normal(0, 1.0, exact.shape)
        noisy[0] = exact[0]
        (answer,) = vector.read(noisy, sigma=1.0)
        errors_together.append(answer.values["q0.5"] - np.median(heats))
        reached = np.cumsum(np.maximum(noisy[leaves], 0))
        alone = np.interp(0.5, reached / reached[-1], np.linspace(-40, 120, 257)[1:])
        errors_leaves.append(alone - np.median(heats))

    assert np.std(errors_together) < 0.7 * np.std(errors_leaves)


def test_a_device_with_more_rows_counts_as_if_it_had_so_many() -> None:
    question = StatisticsQuestion(of=(Count(), Mean(feature="heat")), max_rows=10)

    found = total(question, [rows([0.0] * 1000), rows([100.0] * 10)])

    assert found["count"]["count"] == pytest.approx(20)
    assert found["mean"]["mean"] == pytest.approx(50.0)


def test_how_many_rows_devices_have_is_told_by_powers_of_two() -> None:
    devices = [rows([0.0] * size) for size in [1, 3, 3, 9, 10, 12, 15, 8, 15, 200]]

    found = total(StatisticsQuestion(of=(RowsPerDevice(),), max_rows=1), devices)

    by_size = found["rows-per-device"]
    assert by_size["1 to 1"] == 1
    assert by_size["2 to 3"] == 2
    assert by_size["8 to 15"] == 6
    assert by_size["p90"] == 15


def test_pixels_and_a_numeric_target_can_be_asked_for() -> None:
    pictures = Examples(np.full((3, 1, 2, 2), 51, np.uint8), np.zeros(3, np.int64))
    houses = Examples(np.ones((2, 1), np.float32), np.array([10.0, 30.0], np.float32))
    pixels = StatisticsVector(StatisticsQuestion(of=(Mean(feature="pixels"),)), PICTURES)
    target = StatisticsVector(StatisticsQuestion(of=(Mean(feature="target"),)), HOUSES)

    (of_pixels,) = pixels.read(pixels.contribution(pictures), sigma=0.0)
    (of_target,) = target.read(target.contribution(houses), sigma=0.0)

    assert of_pixels.values["mean"] == pytest.approx(51)
    assert of_target.values["mean"] == pytest.approx(20)


ALL: tuple[Statistic, ...] = (
    Count(),
    Mean(feature="heat"),
    Variance(feature="heat"),
    Histogram(feature="heat", bins=5),
    Quantiles(feature="heat", levels=4),
    Labels(),
    RowsPerDevice(),
)


@given(
    heats=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    max_rows=st.integers(1, 50),
    which=st.sets(st.sampled_from(range(len(ALL))), min_size=1),
)
def test_no_device_moves_the_sum_by_more_than_the_promised_norm(
    heats: list[float], max_rows: int, which: set[int]
) -> None:
    question = StatisticsQuestion(of=tuple(ALL[i] for i in sorted(which)), max_rows=max_rows)
    vector = StatisticsVector(question, MACHINES)

    contribution = vector.contribution(rows(heats, [1] * len(heats)))

    assert contribution.shape == (vector.length,)
    assert np.linalg.norm(contribution) <= vector.norm * (1 + 1e-12)


def test_the_promised_norm_is_reached_so_noise_is_not_more_than_needed() -> None:
    question = StatisticsQuestion(of=(Count(), Labels(), Quantiles(feature="heat")), max_rows=5)
    vector = StatisticsVector(question, MACHINES)

    contribution = vector.contribution(rows([7.0] * 9))

    assert np.linalg.norm(contribution) == pytest.approx(vector.norm)


def test_standard_errors_are_those_of_the_noise() -> None:
    rng = np.random.default_rng(4)
    question = StatisticsQuestion(of=(Count(), Mean(feature="heat"), Variance(feature="heat")))
    vector = StatisticsVector(question, MACHINES)
    exact = 200 * vector.contribution(rows([10.0, 30.0] * 500))
    runs = [vector.read(exact + rng.normal(0, 0.5, exact.shape), sigma=0.5) for _ in range(400)]

    for place, name in ((0, "count"), (1, "mean"), (2, "variance")):
        seen = float(np.std([answers[place].values[name] for answers in runs]))
        said = runs[0][place].standard_error[name]
        assert said == pytest.approx(seen, rel=0.15)


def test_the_stated_error_of_a_quantile_covers_what_noise_does() -> None:
    rng = np.random.default_rng(5)
    question = StatisticsQuestion(of=(Quantiles(feature="heat", at=(0.5,)),), max_rows=10)
    vector = StatisticsVector(question, MACHINES)
    exact = 300 * vector.contribution(rows(list(rng.uniform(-40, 120, 500))))
    medians = []
    for _ in range(100):
        (answer,) = vector.read(exact + rng.normal(0, 1.0, exact.shape), sigma=1.0)
        medians.append(answer.values["q0.5"])
    said = answer.standard_error["q0.5"]

    assert 0.5 * np.std(medians) < said < 4 * np.std(medians)


def test_noise_that_leaves_nothing_to_divide_by_gives_no_figures() -> None:
    vector = StatisticsVector(StatisticsQuestion(of=(Mean(feature="heat"),)), MACHINES)

    (answer,) = vector.read(np.array([-0.3, 2.0]), sigma=1.0)

    assert answer.values == {}


def test_counts_need_nothing_to_divide_by_and_stay_unbiased() -> None:
    question = StatisticsQuestion(of=(Mean(feature="heat"), Count(), Labels()), max_rows=10)
    vector = StatisticsVector(question, MACHINES)

    mean, count, labels = vector.read(np.array([-0.3, 2.0, -0.2, 0.5, -1.0]), sigma=1.0)

    assert mean.values == {}
    assert count.values == {"count": -2.0}
    assert labels.values == {"ok": 5.0, "failed": -10.0}
    assert count.standard_error == {"count": 10.0}


def test_a_device_without_rows_says_so() -> None:
    vector = StatisticsVector(StatisticsQuestion(of=(Count(),)), MACHINES)
    with pytest.raises(DataError, match="no rows"):
        vector.contribution(rows([]))


@pytest.mark.parametrize(
    ("statistic", "complaint"),
    [
        (Mean(feature="haet"), "no feature 'haet'; known here: heat, speed"),
        (Mean(feature="speed"), "give the statistic a minimum below a maximum"),
        (Histogram(feature="heat", minimum=5, maximum=5), "give the statistic a minimum"),
        (Mean(feature="pixels"), "no feature 'pixels'"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_to_change(
    statistic: Statistic, complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        check_question(StatisticsQuestion(of=(statistic,)), MACHINES)


def test_classes_are_counted_only_where_there_are_classes() -> None:
    with pytest.raises(ConfigError, match="no classes"):
        check_question(StatisticsQuestion(of=(Labels(),)), HOUSES)


def test_a_range_given_with_the_statistic_wins() -> None:
    question = StatisticsQuestion(
        of=(Mean(feature="speed", minimum=0, maximum=1),), max_rows=math.prod((2, 5))
    )
    vector = StatisticsVector(question, MACHINES)
    fast = Examples(np.array([[0, 0.25], [0, 99]], np.float32), np.zeros(2, np.int64))

    (answer,) = vector.read(vector.contribution(fast), sigma=0.0)

    assert answer.values["mean"] == pytest.approx((0.25 + 1) / 2)


def test_a_question_is_read_from_a_plan_and_a_typo_is_named() -> None:
    document = {"of": [{"kind": "quantiles", "feature": "heat", "at": [0.5]}]}
    assert convert(document, StatisticsQuestion, source="plan").of == (
        Quantiles(feature="heat", at=(0.5,)),
    )
    with pytest.raises(ConfigError):
        convert({"of": [{"kind": "maximum"}]}, StatisticsQuestion, source="plan")
    assert msgspec.json.decode(
        msgspec.json.encode(StatisticsQuestion(of=ALL)), type=StatisticsQuestion
    ) == StatisticsQuestion(of=ALL)
