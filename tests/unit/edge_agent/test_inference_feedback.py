import json
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from edge_agent.inference import feedback
from edge_agent.inference.feedback import Counts, Feedback, Receipt
from edge_agent.inference.protocol import RequestError
from shared.messages import Telemetry
from tests.integration.inference.tiny_models import linear

MANIFEST = linear().signed.manifest  # classes ant, bee, cat
SCORES = np.array([[9, 1, 0], [0, 1, 9]], np.float32)  # ant, cat


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def answers(registry: CollectorRegistry) -> Feedback:
    return Feedback(registry)


def remember(answers: Feedback, request_id: str | None = None, version: str = "v1") -> int:
    number = answers.remember(version, MANIFEST, request_id, [SCORES])
    assert number is not None
    return number


def say(*labelled: dict[str, Any]) -> bytes:
    return json.dumps({"answers": labelled}).encode()


def test_labels_are_compared_with_what_was_predicted(answers: Feedback) -> None:
    remember(answers, "mine")
    number = remember(answers)
    receipt = answers.accept(
        say({"id": "mine", "labels": ["ant", "bee"]}, {"answer": number, "labels": [0, 2]})
    )
    assert receipt == Receipt(labelled=4, correct=3, unknown=0)
    assert answers.counts("v1") == Counts(labelled=4, correct=3)


def test_an_answer_is_labelled_once(answers: Feedback) -> None:
    number = remember(answers, "mine")
    twice = {"id": "mine", "labels": [0, 2]}
    assert answers.accept(say(twice, twice)) == Receipt(2, 2, unknown=1)
    assert answers.accept(say({"answer": number, "labels": [0, 2]})) == Receipt(0, 0, unknown=1)
    assert answers.counts("v1") == Counts(2, 2)


def test_a_label_counts_for_the_version_that_answered(
    answers: Feedback, registry: CollectorRegistry
) -> None:
    remember(answers, "old", "v1")
    remember(answers, "new", "v2")
    answers.accept(say({"id": "old", "labels": [1, 1]}, {"id": "new", "labels": [0, 2]}))
    assert answers.counts("v1") == Counts(2, 0)
    assert answers.counts("v2") == Counts(2, 2)
    text = generate_latest(registry).decode()
    assert 'shoal_feedback_labelled_total{version="v1"} 2.0' in text
    assert 'shoal_feedback_correct_total{version="v1"} 0.0' in text
    assert 'shoal_feedback_correct_total{version="v2"} 2.0' in text


def test_an_id_used_again_means_the_latest_answer(answers: Feedback) -> None:
    first = remember(answers, "again", "v1")
    remember(answers, "again", "v2")
    answers.accept(say({"id": "again", "labels": [0, 2]}))
    assert answers.counts("v2") == Counts(2, 2)
    assert answers.accept(say({"answer": first, "labels": [0, 2]})).labelled == 2


@pytest.mark.parametrize(("answers_kept", "rows_kept"), [(3, 1000), (1000, 6)])
def test_the_oldest_answers_are_forgotten_first(
    answers: Feedback, monkeypatch: pytest.MonkeyPatch, answers_kept: int, rows_kept: int
) -> None:
    monkeypatch.setattr(feedback, "_MOST_ANSWERS", answers_kept)
    monkeypatch.setattr(feedback, "_MOST_ROWS", rows_kept)
    for number in range(5):
        remember(answers, f"id-{number}")
    receipt = answers.accept(say(*({"id": f"id-{n}", "labels": [0, 2]} for n in range(5))))
    assert receipt == Receipt(labelled=6, correct=6, unknown=2)
    assert not answers._answers
    assert not answers._numbers
    assert answers._rows == 0


def test_an_endless_id_is_not_kept(answers: Feedback) -> None:
    number = remember(answers, "x" * 10_000)
    assert not answers._numbers
    assert answers.accept(say({"answer": number, "labels": [0, 2]})).labelled == 2


def test_only_the_latest_versions_are_counted(
    answers: Feedback, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "_MOST_VERSIONS", 2)
    for version in ("v1", "v2", "v3"):
        remember(answers, version, version)
        answers.accept(say({"id": version, "labels": [0, 2]}))
    assert answers.counts("v1") == Counts()
    text = generate_latest(registry).decode()
    assert 'version="v1"' not in text
    assert 'version="v3"' in text


def test_outputs_that_are_no_classes_are_not_remembered(answers: Feedback) -> None:
    regression = msgspec.structs.replace(MANIFEST, labels=())
    assert answers.remember("v1", regression, "mine", [SCORES]) is None
    assert answers.remember("v1", MANIFEST, "mine", [SCORES[:, :2]]) is None
    assert answers.remember("v1", MANIFEST, "mine", [SCORES[0]]) is None


@pytest.mark.parametrize(
    ("labelled", "complaint"),
    [
        ({"id": "mine", "labels": [0]}, "the answer has 2 rows and 1 labels came"),
        ({"id": "mine", "labels": [0, 3]}, "has no class '3'; 3 are in its metadata"),
        ({"id": "mine", "labels": [0, -1]}, "has no class '-1'"),
        ({"id": "mine", "labels": ["ant", "dog"]}, "has no class 'dog'"),
        ({"id": "mine", "labels": []}, "not understood"),
        ({"id": "mine", "labels": [0, 2], "image": "…"}, "not understood"),
        ({"labels": [0, 2]}, "name each answer either by the request's id or by its number"),
        ({"id": "mine", "answer": 1, "labels": [0, 2]}, "name each answer either by"),
    ],
)
def test_feedback_that_does_not_fit_counts_nothing(
    answers: Feedback, labelled: dict[str, Any], complaint: str
) -> None:
    remember(answers, "mine")
    remember(answers, "fine")
    with pytest.raises(RequestError, match=complaint):
        answers.accept(say({"id": "fine", "labels": [0, 2]}, labelled))
    assert answers.counts("v1") == Counts()
    assert answers.accept(say({"id": "fine", "labels": [0, 2]})).labelled == 2


def test_telemetry_has_no_place_for_what_labels_say() -> None:
    fields = set(Telemetry.__struct_fields__)
    assert not [name for name in fields if "label" in name or "correct" in name]
