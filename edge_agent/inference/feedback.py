"""Labels that local applications bring back for answers they were given, counted per version.

A device that learns the truth later (the part was fine, the patient was well) tells the server, and
so the owner sees how right a version is on this device's own data. Only predicted classes are kept,
of the latest answers, in memory. The counts are derived from data: they are shown on the device,
and nothing here sends them anywhere.
"""

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta
from prometheus_client import CollectorRegistry, Counter

from edge_agent.inference.engine import Array
from edge_agent.inference.protocol import RequestError
from shared.manifest import Manifest
from shared.untrusted import NOT_JSON

MAX_BODY_BYTES = 1024 * 1024
_MOST_ANSWERS, _MOST_ROWS = 10_000, 100_000  # remembered; the oldest are forgotten first
_LONGEST_ID = 128  # of a request, in characters; an answer to a longer one has its number alone
_MOST_VERSIONS = 8  # counted at a time, so that years of rollouts do not fill memory


class Labelled(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The truth about one answer: a class per row, by name or by index."""

    labels: Annotated[tuple[int | str, ...], Meta(min_length=1)]
    id: str | None = None  # the request's own; the latest answer to it is meant
    answer: int | None = None  # or the number in the answer's Shoal-Answer header


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    answers: Annotated[tuple[Labelled, ...], Meta(min_length=1)]


class Receipt(msgspec.Struct, frozen=True):
    """What became of the labels."""

    labelled: int  # rows
    correct: int  # rows among them whose predicted class was the label
    unknown: int  # answers that are forgotten, were labelled before, or never were


class Counts(msgspec.Struct, frozen=True):
    """How right one version was."""

    labelled: int = 0  # rows
    correct: int = 0


@dataclass(frozen=True, slots=True)
class _Remembered:
    version: str
    request_id: str | None
    classes: tuple[str, ...]
    predicted: tuple[int, ...]  # index of the class, by row


class Feedback:
    """The latest answers of one server process, and how many of those labelled were right."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Count in ``registry``, too."""
        # Numbers go on over restarts of the process, so that a late label meets no other answer.
        self._next = time.time_ns() // 1000
        self._answers: OrderedDict[int, _Remembered] = OrderedDict()
        self._numbers: dict[str, int] = {}  # of the latest answer, by the request's id
        self._rows = 0
        self._counts: OrderedDict[str, Counts] = OrderedDict()
        self._labelled = Counter(
            "shoal_feedback_labelled",
            "Rows of answers for which a label came back, by version.",
            ["version"],
            registry=registry,
        )
        self._correct = Counter(
            "shoal_feedback_correct",
            "Rows of answers whose predicted class was the label, by version.",
            ["version"],
            registry=registry,
        )

    def remember(
        self, version: str, manifest: Manifest, request_id: str | None, results: Sequence[Array]
    ) -> int | None:
        """Keep what was predicted, and return the answer's number; None if it has no classes."""
        scores = results[0]
        if not manifest.labels or scores.shape[1:] != (len(manifest.labels),):
            return None
        if len(scores) > _MOST_ROWS:
            return None
        if request_id is not None and len(request_id) > _LONGEST_ID:
            request_id = None
        number, self._next = self._next, self._next + 1
        predicted = tuple(scores.argmax(axis=1).tolist())
        self._answers[number] = _Remembered(version, request_id, manifest.labels, predicted)
        self._rows += len(predicted)
        if request_id is not None:
            self._numbers[request_id] = number
        while len(self._answers) > _MOST_ANSWERS or self._rows > _MOST_ROWS:
            self._forget(next(iter(self._answers)))
        return number

    def accept(self, body: bytes) -> Receipt:
        """Count the labels in ``body``, each answer once; an error counts none of them.

        Raises:
            RequestError: the body is not understood, or does not fit the answers that it names.
        """
        try:
            answers = msgspec.json.decode(body, type=_Body).answers
        except NOT_JSON as error:
            raise RequestError(f"the feedback is not understood: {error}") from error
        truths: dict[int, list[int]] = {}
        unknown = 0
        for labelled in answers:
            number = self._number(labelled)
            if number is None or number in truths:
                unknown += 1
            else:
                truths[number] = _indices(labelled, self._answers[number])
        rows = [self._count(number, truth) for number, truth in truths.items()]
        return Receipt(sum(len(right) for right in rows), sum(map(sum, rows)), unknown)

    def counts(self, version: str | None) -> Counts:
        """Return how right ``version`` was since this process started."""
        return self._counts.get(version or "", Counts())

    def _number(self, labelled: Labelled) -> int | None:
        """Return the number of an answer that is remembered."""
        if (labelled.id is None) == (labelled.answer is None):
            raise RequestError("name each answer either by the request's id or by its number")
        number = labelled.answer if labelled.id is None else self._numbers.get(labelled.id)
        return number if number in self._answers else None

    def _count(self, number: int, truth: Sequence[int]) -> list[bool]:
        answer = self._forget(number)
        right = [index == label for index, label in zip(answer.predicted, truth, strict=True)]
        before = self._counts.pop(answer.version, Counts())
        self._counts[answer.version] = Counts(
            before.labelled + len(right), before.correct + sum(right)
        )
        self._labelled.labels(answer.version).inc(len(right))
        self._correct.labels(answer.version).inc(sum(right))
        if len(self._counts) > _MOST_VERSIONS:
            oldest, _ = self._counts.popitem(last=False)
            self._labelled.remove(oldest)
            self._correct.remove(oldest)
        return right

    def _forget(self, number: int) -> _Remembered:
        answer = self._answers.pop(number)
        self._rows -= len(answer.predicted)
        if answer.request_id is not None and self._numbers.get(answer.request_id) == number:
            del self._numbers[answer.request_id]
        return answer


def _indices(labelled: Labelled, answer: _Remembered) -> list[int]:
    """Return the labels of one answer as indices of classes."""
    if len(labelled.labels) != len(answer.predicted):
        raise RequestError(
            f"the answer has {len(answer.predicted)} rows and {len(labelled.labels)} labels came"
        )
    names = {name: index for index, name in enumerate(answer.classes)}
    indices = [
        names.get(label, -1) if isinstance(label, str) else label for label in labelled.labels
    ]
    for label, index in zip(labelled.labels, indices, strict=True):
        if not 0 <= index < len(answer.classes):
            raise RequestError(
                f"the model has no class {str(label)[:40]!r}; {len(names)} are in its metadata, "
                f"and 0 to {len(names) - 1} stand for them"
            )
    return indices
