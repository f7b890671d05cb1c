"""The trainer's end of judging: files that came with a message, tried where they may do no harm."""

import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.inference.judge import Computed, Computing, Order, Said, Tried, Trying
from edge_agent.inference.trial import BASE_ALLOWANCE_BYTES, COPIES
from edge_agent.throwaway import TIME_LIMIT_S, Ended, run_apart
from edge_agent.training import score
from shared.judging import Candidate, CandidateFacts, JudgeQuestion, Score, Scorecard
from shared.statistics.blocks import Floats
from shared.tasks.examples import Examples
from shared.tasks.task import Task

logger = logging.getLogger(__name__)

_JUDGE = "edge_agent.inference.judge"
_DRAWN_ROWS = 8
_SAID: Any = Said


@dataclass(slots=True)
class Judged:
    """What is known of the files."""

    facts: dict[str, CandidateFacts] = field(default_factory=dict)
    outputs: dict[str, NDArray[np.float32]] = field(default_factory=dict, repr=False)


def judge(
    question: JudgeQuestion,
    files: Sequence[bytes],
    task: Task,
    rows: Examples,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    time_limit_s: float = TIME_LIMIT_S,
) -> tuple[Floats, tuple[CandidateFacts, ...]]:
    """Return a device's scorecard, and what each file costs this machine.

    What a file does to the rows is in the scorecard alone: one that crashes on them, hangs or gives
    no numbers scores 0, for a refusal would tell of them.

    Args:
        question: what is asked.
        files: each candidate's, in its order.
        task: that the files were trained for.
        rows: held-out ones; of many, evenly spaced ones count, as many as the question allows.
        should_stop: asked twice a second.
        time_limit_s: wall clock of one process, of which there is one more for each that dies.

    Raises:
        StoppedError: ``should_stop`` said so.
        UnavailableError: no process could be started.
    """
    count = min(len(rows), question.max_rows)
    chosen = np.unique(np.linspace(0, max(0, len(rows) - 1), count).astype(int))
    judged = rows.take(chosen)
    drawn = task.example_inputs(np.random.default_rng(0), _DRAWN_ROWS)
    found = try_files(
        question.candidates,
        files,
        drawn,
        judged.inputs,
        should_stop=should_stop,
        time_limit_s=time_limit_s,
    )
    scores = {
        name: score
        for name, outputs in found.outputs.items()
        if (score := _score(task, outputs, judged.targets, question.labels)) is not None
    }
    labels = _by_label(judged.targets, question.labels)
    vector = Scorecard(question).contribution(scores, len(judged), labels)
    facts = tuple(found.facts[candidate.name] for candidate in question.candidates)
    return vector, facts


def try_files(
    candidates: Sequence[Candidate],
    files: Sequence[bytes],
    drawn: NDArray[Any],
    rows: NDArray[Any],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    time_limit_s: float = TIME_LIMIT_S,
) -> Judged:
    """Run files on rows, all in one process, and in a new one without whichever ended that.

    Args:
        candidates: the files' names and options.
        files: their content.
        drawn: shape (b, …): inputs that figures are measured on.
        rows: shape (n, …).
        should_stop: asked twice a second.
        time_limit_s: wall clock of one process.

    Returns:
        The facts of all; outputs, shape (n, …), of those that survived the rows.
    """
    judged = Judged()
    left = dict(zip((c.name for c in candidates), zip(candidates, files, strict=True), strict=True))
    while left:
        asked = _order(list(left.values()), drawn, rows)
        ended = run_apart(_JUDGE, asked, should_stop=should_stop, time_limit_s=time_limit_s)
        guilty, done = _take(ended, judged)
        for name in done:
            left.pop(name, None)
        if not guilty:
            break
        if guilty not in judged.facts:
            failure = f"the process that tried it {ended.how}"
            judged.facts[guilty] = CandidateFacts(name=guilty, failure=failure)
        logger.warning("judging: %s ended its process, which %s", guilty, ended.how)
        left.pop(guilty, None)
    for name in left:  # the process died before it said which it would try
        failure = f"the process that should have tried it {ended.how}"
        judged.facts.setdefault(name, CandidateFacts(name=name, failure=failure))
    return judged


def _order(
    files: Sequence[tuple[Candidate, bytes]], drawn: NDArray[Any], rows: NDArray[Any]
) -> bytes:
    contents = [content for _, content in files]
    arrays = [_npy(drawn), _npy(rows)]
    order = Order(
        candidates=tuple(candidate for candidate, _ in files),
        sizes=tuple(map(len, contents)),
        drawn_bytes=len(arrays[0]),
        rows_bytes=len(arrays[1]),
        memory_bytes=BASE_ALLOWANCE_BYTES + COPIES * sum(map(len, contents)),
    )
    return b"".join([msgspec.json.encode(order), b"\n", *contents, *arrays])


def _take(ended: Ended, judged: Judged) -> tuple[str, list[str]]:
    """Note what a process said.

    Returns:
        Which file ended it, empty if none did; and the files that it was done with.
    """
    stream, at_work, done = io.BytesIO(ended.out), "", list[str]()
    while line := stream.readline():
        try:
            said = msgspec.json.decode(line, type=_SAID)
        except msgspec.DecodeError:  # cut off in the middle of a word
            break
        match said:
            case Trying(name) | Computing(name):
                at_work = name
            case Tried(facts):
                at_work = ""
                for each in facts:
                    judged.facts.setdefault(each.name, each)
                    if each.failure:
                        done.append(each.name)
            case Computed(name, nbytes):
                content = stream.read(nbytes)
                if len(content) < nbytes:
                    break
                at_work = ""
                done.append(name)
                if content:
                    judged.outputs[name] = np.load(io.BytesIO(content), allow_pickle=False)
    return at_work, done


def _score(
    task: Task, outputs: NDArray[np.float32], targets: NDArray[Any], labels: int
) -> Score | None:
    """Return how good outputs are; None where they say nothing."""
    if outputs.shape != (len(targets), *task.output.shape[1:]) or not np.isfinite(outputs).all():
        return None
    try:
        value = score(task, outputs, targets)
    except Exception:  # to say no would tell of this device's data
        logger.exception("the task cannot measure what a file gave")
        return None
    hits = np.zeros(labels)
    if labels:
        right = outputs.argmax(axis=1) == targets
        hits = _by_label(targets[right], labels)
    return Score(value, hits)


def _by_label(targets: NDArray[Any], labels: int) -> NDArray[np.float64]:
    """Return how many rows each class has, shape (labels,)."""
    if not labels:
        return np.zeros(0)
    counts: NDArray[np.float64] = np.bincount(targets, minlength=labels)[:labels].astype(np.float64)
    return counts


def _npy(array: NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(array))
    return content.getvalue()
