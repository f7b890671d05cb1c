"""The scorecards of judged files: what one device puts in, and what their sum says."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.judging import (
    GAIN,
    MAX_JUDGED_BYTES,
    MEAN,
    WORST_DECILE,
    Candidate,
    JudgeQuestion,
    Score,
    Scorecard,
    base_of_files,
    check_sizes,
    recalls_of,
)

NAMES = ("current", "fp32", "int8-weights")
CANDIDATES = tuple(Candidate(name=name, sha256=f"{index:064x}") for index, name in enumerate(NAMES))
NO_LABELS = np.zeros(0)


def question(**changes: object) -> JudgeQuestion:
    asked = JudgeQuestion(candidates=CANDIDATES, reference="current", max_rows=100)
    return msgspec.structs.replace(asked, **changes)


def scored(*values: float) -> dict[str, Score]:
    return {name: Score(value, NO_LABELS) for name, value in zip(NAMES, values, strict=True)}


def test_the_sum_says_what_the_weighted_devices_scored() -> None:
    card = Scorecard(question())
    rng = np.random.default_rng(0)
    scores, rows = rng.uniform(0.5, 1.0, (200, 3)), rng.integers(1, 200, 200)
    total = sum(
        card.contribution(scored(*each), int(count), NO_LABELS)
        for each, count in zip(scores, rows, strict=True)
    )
    current, fp32, int8 = card.read(np.asarray(total), sigma=0.0)
    weights = np.minimum(1.0, rows / 100)
    means = (weights @ scores) / weights.sum()
    assert current.values[MEAN] == pytest.approx(means[0])
    assert fp32.values[GAIN] == pytest.approx(means[1] - means[0])
    assert int8.values[GAIN] == pytest.approx(means[2] - means[0])
    assert MEAN not in int8.values
    for answer, column in zip((current, fp32, int8), scores.T, strict=True):
        assert answer.values[WORST_DECILE] == pytest.approx(np.quantile(column, 0.1), abs=0.012)
        assert answer.standard_error == {}


def test_a_file_that_did_not_survive_the_rows_scores_nothing() -> None:
    card = Scorecard(question())
    alive = {"current": Score(0.8, NO_LABELS), "fp32": Score(0.9, NO_LABELS)}
    _, fp32, int8 = card.read(card.contribution(alive, 100, NO_LABELS), sigma=0.0)
    assert fp32.values[GAIN] == pytest.approx(0.1)
    assert int8.values[GAIN] == pytest.approx(-0.8)
    assert int8.values[WORST_DECILE] < 0.01


def test_a_device_without_rows_adds_nothing() -> None:
    card = Scorecard(question(labels=2))
    assert not card.contribution({}, 0, np.zeros(2)).any()


def test_right_answers_are_told_by_class() -> None:
    card = Scorecard(question(labels=3))
    hits = {"current": [8, 2, 0], "fp32": [8, 1, 0], "int8-weights": [4, 2, 0]}
    scores = {name: Score(0.5, np.array(each, float)) for name, each in hits.items()}
    vector = card.contribution(scores, 12, np.array([8.0, 4.0, 0.0]))
    assert [recalls_of(answer) for answer in card.read(vector, sigma=0.0)] == [
        {0: pytest.approx(1.0), 1: pytest.approx(0.5)},
        {0: pytest.approx(1.0), 1: pytest.approx(0.25)},
        {0: pytest.approx(0.5), 1: pytest.approx(0.5)},
    ]


@given(
    values=st.lists(st.floats(allow_nan=False), min_size=3, max_size=3),
    rows=st.integers(1, 10_000),
    reach=st.floats(0.01, 1.0),
    labels=st.sampled_from([0, 4]),
    data=st.data(),
)
def test_no_device_says_more_than_its_norm(
    values: list[float], rows: int, reach: float, labels: int, data: st.DataObject
) -> None:
    card = Scorecard(question(reach=reach, labels=labels))
    by_label = np.zeros(labels)
    if labels:
        by_label[data.draw(st.integers(0, labels - 1))] = rows
    scores = {name: Score(v, by_label) for name, v in zip(NAMES, values, strict=True)}
    vector = card.contribution(scores, rows, by_label)
    assert vector.shape == (card.length,)
    assert np.linalg.norm(vector) <= card.norm + 1e-9


def test_under_noise_figures_come_with_their_error_and_keep_within_it() -> None:
    card = Scorecard(question(reach=0.1, bins=10))
    rng = np.random.default_rng(1)
    clean = sum(
        card.contribution(scored(0.85, 0.85 + gain, 0.85 - gain), 100, NO_LABELS)
        for gain in rng.normal(0.0, 0.02, 100)
    )
    exact = [answer.values for answer in card.read(np.asarray(clean), sigma=0.0)]
    sigma, off = 2.0, []
    for _ in range(200):
        noised = np.asarray(clean) + rng.normal(0.0, sigma, card.length)
        read = card.read(noised, sigma=sigma)
        errors = read[1].standard_error
        off.append((read[1].values[GAIN] - exact[1][GAIN]) / errors[GAIN])
        assert errors[GAIN] == pytest.approx(0.1 * sigma / 100, rel=0.1)
        assert 0.0 <= read[1].values[WORST_DECILE] <= 1.0
        assert errors[WORST_DECILE] > 0
    assert np.std(off) == pytest.approx(1.0, abs=0.2)
    assert max(np.abs(off)) < 4.5


def test_what_only_noise_is_left_of_says_so() -> None:
    card = Scorecard(question())
    for answer in card.read(np.zeros(card.length), sigma=1.0):
        assert max(answer.standard_error.values()) == np.inf


def test_other_files_are_another_base() -> None:
    assert base_of_files(CANDIDATES) != base_of_files(CANDIDATES[:2])
    assert base_of_files(CANDIDATES) != base_of_files(CANDIDATES[::-1])


@pytest.mark.parametrize("reference", ["fp16", ""])
def test_a_question_without_its_reference_is_refused(reference: str) -> None:
    text = msgspec.json.encode(question()).replace(
        b'"reference":"current"', b'"reference":"%s"' % reference.encode()
    )
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=JudgeQuestion)


def test_files_that_are_more_than_a_device_takes_are_refused_with_what_to_do() -> None:
    check_sizes(question(), [1, 2, 3])
    with pytest.raises(ConfigError, match=r"current, fp32, int8-weights are .*: lower judge\."):
        check_sizes(question(), [MAX_JUDGED_BYTES, 1, 1])
