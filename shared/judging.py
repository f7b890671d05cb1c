"""How good the exact files of a version are on the devices' own rows, told as one sum of all.

Every device runs each file on its held-out rows, in a process that may die, and makes a scorecard:
its score with the reference, what each other file gains on that, and in which bin its scores lie.
A paired difference moves far less from device to device than a score does, so it is what noise
hides best. What each file costs the machine is measured on rows drawn from the task's contract,
before the device's own come near it; these facts travel in clear.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from shared.errors import ConfigError
from shared.manifest import Digest
from shared.statistics.blocks import Floats
from shared.statistics.vectors import Answer

MAX_CANDIDATES = 16
MAX_JUDGED_BYTES = 256 * 1024 * 1024  # of all files of one question
MAX_FACTS_BYTES = 64 * 1024  # of one device's, as JSON
SCORE = "score"  # kind of the answers
MEAN, GAIN, WORST_DECILE = "mean", "gain", "worst_decile"  # of an answer's values
_LABEL = "label "
_DECILE = 0.1

Name = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}\Z")]
Cost = Annotated[float, Meta(ge=0, le=1e12)]


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file that is judged."""

    name: Name  # a variant of the version, or the reference
    sha256: Digest
    session_config: dict[str, str] = {}


class JudgeQuestion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which files are judged, and how the scorecard is laid out. The files come with it."""

    candidates: Annotated[tuple[Candidate, ...], Meta(min_length=1, max_length=MAX_CANDIDATES)]
    reference: Name  # the candidate that the others are compared with
    max_rows: Annotated[int, Meta(ge=1, le=1_000_000)]  # that a device counts for
    reach: Annotated[float, Meta(gt=0, le=1)] = 1.0  # a larger gain or loss counts as this
    bins: Annotated[int, Meta(ge=2, le=1000)] = 100  # of the histogram of scores
    labels: Annotated[int, Meta(ge=0, le=1000)] = 0  # classes whose hits are added; 0: none

    def __post_init__(self) -> None:
        """Refuse what has no reference, or one name twice."""
        names = [candidate.name for candidate in self.candidates]
        if names.count(self.reference) != 1 or len(set(names)) != len(names):
            raise ValueError(f"{self.reference!r} must be one of the candidates, each named once")


class CandidateFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one file costs a machine, whatever its rows are."""

    name: Name
    failure: Annotated[str, Meta(max_length=300)] = ""  # why it does not run here; empty: it does
    load_ms: Cost = 0.0
    p50_ms: Cost = 0.0  # of one row
    p95_ms: Cost = 0.0
    memory_bytes: Annotated[int, Meta(ge=0, le=2**50)] = 0  # that it made the process grow by


@dataclass(frozen=True, slots=True)
class Score:
    """How one device's rows fared with one file."""

    value: float  # in [0, 1]
    hits: NDArray[np.float64]  # shape (labels,): rows of each class that were named right


def judge_question(question: bytes) -> str:
    """Return the digest of "judge these files": the question's JSON as it travels."""
    return hashlib.sha256(b"shoal question v1: judge\0" + question).hexdigest()


def base_of_files(candidates: Sequence[Candidate]) -> str:
    """Return the digest of all files that are judged together, in place of a model's."""
    content = "".join(candidate.sha256 for candidate in candidates).encode()
    return hashlib.sha256(b"shoal judged files v1\0" + content).hexdigest()


class Scorecard:
    """The layout of one question's vector.

    In turn: the device's weight w; for each candidate w times its score (of the reference) or its
    gain over reach; a one-hot histogram of its score; and with labels, in parts of ``max_rows``,
    the device's rows of each class and every candidate's hits among them.
    """

    def __init__(self, question: JudgeQuestion) -> None:
        self._question = question
        self._names = [candidate.name for candidate in question.candidates]
        self._reference = self._names.index(question.reference)
        count, bins, labels = len(self._names), question.bins, question.labels
        self._histograms = 1 + count  # where each part begins
        self._labels = self._histograms + count * bins
        self.length = self._labels + (count + 1 if labels else 0) * labels
        # w, each score or gain, each hot bin, and at most 1 in each row of labels.
        self.norm = math.sqrt(1 + 2 * count + (count + 1 if labels else 0))

    def contribution(
        self, scores: Mapping[str, Score], rows: int, rows_by_label: NDArray[np.float64]
    ) -> Floats:
        """Return one device's vector, shape (length,), of L2 norm at most `norm`.

        Args:
            scores: by candidate; one that is missing did not survive the rows and scores 0.
            rows: that were judged; without any the vector is zeros.
            rows_by_label: shape (labels,), of these rows.
        """
        question, vector = self._question, np.zeros(self.length)
        if not rows:
            return vector
        nothing = Score(0.0, np.zeros(question.labels))
        each = [scores.get(name, nothing) for name in self._names]
        values = np.clip([score.value for score in each], 0.0, 1.0)
        shown = np.clip((values - values[self._reference]) / question.reach, -1.0, 1.0)
        shown[self._reference] = values[self._reference]
        weight = min(1.0, rows / question.max_rows)
        vector[0] = weight
        vector[1 : self._histograms] = weight * shown
        hot = np.minimum((values * question.bins).astype(int), question.bins - 1)
        vector[self._histograms + np.arange(len(each)) * question.bins + hot] = 1.0
        if question.labels:
            parts = [rows_by_label, *(score.hits for score in each)]
            share = 1.0 / max(question.max_rows, rows)
            vector[self._labels :] = share * np.concatenate(parts)
        return vector

    def read(self, total: Floats, *, sigma: float) -> list[Answer]:
        """Read the sum of all scorecards, each number with noise of ``sigma``.

        Returns:
            For each candidate an answer of kind ``score``: of the reference the ``mean``, of the
            others the ``gain``; ``worst_decile``: the score that a tenth of the devices is below;
            and by ``label …`` the share of its rows that were named right.
        """
        return [self._answer(index, total, sigma) for index in range(len(self._names))]

    def _answer(self, index: int, total: Floats, sigma: float) -> Answer:
        question = self._question
        is_reference = index == self._reference
        weight, shown = float(total[0]), float(total[1 + index])
        what, reach = (MEAN, 1.0) if is_reference else (GAIN, question.reach)
        value = shown / weight if weight > 0 else 0.0
        start = self._histograms + index * question.bins
        worst, worst_error = _quantile(total[start : start + question.bins], _DECILE, sigma=sigma)
        values = {what: reach * value, WORST_DECILE: worst}
        errors = {
            what: reach * _ratio_error(value, weight, sigma),
            WORST_DECILE: worst_error,
        }
        return Answer(
            kind=SCORE,
            feature=self._names[index],
            values={**values, **self._recalls(index, total)},
            standard_error=errors if sigma else {},
        )

    def _recalls(self, index: int, total: Floats) -> dict[str, float]:
        labels = self._question.labels
        rows = total[self._labels : self._labels + labels]
        start = self._labels + (1 + index) * labels
        hits = total[start : start + labels]
        return {
            f"{_LABEL}{label}": float(hits[label] / rows[label])
            for label in range(labels)
            if rows[label] > 0
        }


def recalls_of(answer: Answer) -> dict[int, float]:
    """Return by class the share of its rows that were named right; empty where not asked."""
    return {
        int(name.removeprefix(_LABEL)): value
        for name, value in answer.values.items()
        if name.startswith(_LABEL)
    }


def check_sizes(question: JudgeQuestion, sizes: Sequence[int]) -> None:
    """Raise ConfigError where files of these sizes are more than a device takes."""
    if (together := sum(sizes)) > MAX_JUDGED_BYTES:
        names = ", ".join(candidate.name for candidate in question.candidates)
        raise ConfigError(
            f"{names} are {together:,} bytes together, and a device judges {MAX_JUDGED_BYTES:,} at "
            "most: lower judge.candidates or judge.max_bytes"
        )


def _quantile(histogram: Floats, at: float, *, sigma: float) -> tuple[float, float]:
    """Return where a share ``at`` of the devices is below, and the standard error of that.

    Bins are not cut off at zero: with noise that would pull everything to one side.
    """
    below = np.cumsum(histogram)
    wanted = at * float(below[-1])
    value = _crossing(below, wanted)
    if not sigma:
        return value, 0.0
    error = sigma * math.sqrt(len(histogram))  # of the sum over all bins, the largest there is
    return value, (_crossing(below, wanted + error) - _crossing(below, wanted - error)) / 2


def _crossing(below: Floats, wanted: float) -> float:
    """Return where the counts reach ``wanted``, within its bin in proportion."""
    bins = len(below)
    if not wanted > 0:
        return 0.0
    reached = np.flatnonzero(below >= wanted)
    if not len(reached):
        return 1.0
    index = int(reached[0])
    before = float(below[index - 1]) if index else 0.0
    height = float(below[index]) - before
    within = (wanted - before) / height if height > 0 else 1.0
    return (index + min(1.0, max(0.0, within))) / bins


def _ratio_error(ratio: float, weight: float, sigma: float) -> float:
    """Return the standard error of a quotient whose both parts have noise of ``sigma``."""
    return sigma * math.sqrt(1 + ratio**2) / weight if weight > 0 else math.inf
