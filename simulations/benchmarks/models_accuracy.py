"""``shoal-sim bench models-accuracy``: what compression costs a trained model, in points.

Ten devices with a Dirichlet(0.3) share of Fashion-MNIST train a teacher together, then a student
with it and the same student from scratch, by the code that agents run. Each result goes through the
coordinator's pipeline, with ranges measured on devices' rows, and its very files answer all 10,000
test images. What is shipped is the student that is better on the devices' held-out rows, as a job
chooses it.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from cloud_coordinator.models.static_int8 import KINDS
from edge_agent.inference.engine import EngineOptions, open_session
from edge_agent.training import Teacher, evaluate
from shared.errors import ConfigError
from shared.parameters import Vector
from shared.run_plan import TrainingPlan
from shared.tasks.examples import Examples, split_held_out
from shared.tasks.registry import load_task
from shared.tasks.task import Task
from simulations.benchmarks.built_models import BuiltModel, ModelFile, build_model
from simulations.benchmarks.report import Row, row_at_most
from simulations.datasets import load_images
from simulations.partition import dirichlet_partition
from simulations.summed_training import Fleet, plain_mean, train_rounds

Progress = Callable[[str], None]
INT8 = "points lost by wide-cnn to static int8 alone"
LARGE = "points lost from wide-cnn, 2.8 M parameters, fp32 to small-cnn as shipped"
MIDDLE = "points lost from mid-cnn, 203 k parameters, fp32 to small-cnn-half as shipped"
LARGE_GAIN = "points that small-cnn gains by its teacher, against from scratch"
MIDDLE_GAIN = "points that small-cnn-half gains by its teacher, against from scratch"
_ROWS = (INT8, LARGE, MIDDLE, LARGE_GAIN, MIDDLE_GAIN)
_DEVICES, _SEED, _PROCESSES = 10, 1, 2
_TEMPERATURE, _WEIGHT = 4.0, 0.8  # as plans have them by default
_BATCH = 100  # images of a request
_TEACHING = TrainingPlan(max_batches=60, batch_size=32, learning_rate=0.02, momentum=0.9)


@dataclass(frozen=True, slots=True)
class _Case:
    """A teacher and its student."""

    teacher: str
    student: str
    teacher_rounds: int
    student_rounds: int


_CASES = (_Case("wide-cnn", "small-cnn", 10, 16), _Case("mid-cnn", "small-cnn-half", 14, 24))


def run(*, only: str | None, quick: bool, progress: Progress) -> list[Row]:
    """Measure all rows, or one.

    Args:
        only: the name of one row, or None; the two cases are trained in any case.
        quick: fewer rounds.
        progress: is told what was found.

    Raises:
        ConfigError: there is no such row.
    """
    if only is not None and only not in _ROWS:
        raise ConfigError(f"there is no row {only!r}; choose one of: {'; '.join(_ROWS)}")
    with ProcessPoolExecutor(_PROCESSES, mp_context=get_context("spawn")) as pool:
        large, middle = pool.map(_measure, _CASES, [quick] * len(_CASES))
    for case, found in zip(_CASES, (large, middle), strict=True):
        progress(f"{case.teacher}: " + ", ".join(f"{k} {v:.2%}" for k, v in found.items()))
    rows = [
        row_at_most(INT8, 100 * (large["teacher"] - large["int8"]), "points", limit=0.3),
        row_at_most(LARGE, 100 * (large["teacher"] - large["shipped"]), "points", limit=1.0),
        row_at_most(MIDDLE, 100 * (middle["teacher"] - middle["shipped"]), "points", limit=0.5),
        _gain(LARGE_GAIN, large),
        _gain(MIDDLE_GAIN, middle),
    ]
    return [row for row in rows if only in {None, row.name}]


def _gain(name: str, found: Mapping[str, float]) -> Row:
    gain = 100 * (found["student"] - found["scratch"])
    return Row(
        name=name,
        value=round(gain, 2),
        unit="points",
        reference=None,
        ratio=None,
        target="",
        ok=None,
    )


def _measure(case: _Case, quick: bool) -> dict[str, float]:  # noqa: FBT001  # mapped over
    """Train a teacher and its student, build both, and return the accuracy of each file."""
    torch.set_num_threads(1)
    data = load_images(None)
    rng = np.random.default_rng(_SEED)
    parts = dirichlet_partition(data.train.targets, devices=_DEVICES, alpha=0.3, rng=rng)
    split = [split_held_out(data.train.take(rows)) for rows in parts]
    devices, held_out = [part for part, _ in split], [part for _, part in split]
    spec = data.task(name="images", model=case.teacher)
    task = load_task(spec)
    few = 4 if quick else 1
    fleet = Fleet(task, devices, data.test)
    taught = _train(fleet, case.teacher_rounds // few)
    teacher = Teacher(task, taught, _TEMPERATURE, _WEIGHT)
    learning = Fleet(task.student(case.student), devices, data.test)
    student = _train(learning, case.student_rounds // few, teacher)
    scratch = _train(learning, case.student_rounds // few)
    inputs = _some_of_each(devices)
    with tempfile.TemporaryDirectory() as folder:

        def built(name: str, parameters: Vector, *, as_student: bool) -> BuiltModel:
            network = case.student if as_student else ""
            return build_model(spec, parameters, inputs, Path(folder) / name, student=network)

        best = max(student, scratch, key=lambda p: _score(learning.task, p, held_out))
        large = built("teacher", taught, as_student=False)
        small = built("student", student, as_student=True)
        alone = built("scratch", scratch, as_student=True)
        shipped = small if best is student else alone
        return {
            "teacher": _accuracy(large.file("fp32"), data.test),
            "int8": min(_accuracy(large.file(kind.name), data.test) for kind in KINDS),
            "student": _accuracy(small.file("fp32"), data.test),
            "scratch": _accuracy(alone.file("fp32"), data.test),
            "shipped": _accuracy(shipped.file(shipped.built.ship), data.test),
        }


def _train(fleet: Fleet, rounds: int, teacher: Teacher | None = None) -> Vector:
    each = train_rounds(fleet, _TEACHING, plain_mean, rounds=rounds, seed=_SEED, teacher=teacher)
    return deque(each, maxlen=1).pop()


def _score(task: Task, parameters: Vector, held_out: Sequence[Examples]) -> float:
    """Return how good parameters are on all devices' held-out rows, as a job compares students."""
    sums: dict[str, float] = {}
    for rows in held_out:
        for name, value in evaluate(task, parameters, rows).items():
            sums[name] = sums.get(name, 0.0) + value
    return task.score(sums)


def _some_of_each(devices: Sequence[Examples]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Return rows of all devices, as many of each."""
    return np.concatenate([rows.inputs[:50] for rows in devices])


def _accuracy(file: ModelFile, test: Examples) -> float:
    session = open_session(file.content, file.session_config, EngineOptions())
    name = session.get_inputs()[0].name
    inputs = test.inputs.astype(np.float32)
    answers = [
        np.asarray(session.run(None, {name: inputs[start : start + _BATCH]})[0]).argmax(axis=1)
        for start in range(0, len(inputs), _BATCH)
    ]
    return float(np.mean(np.concatenate(answers) == test.targets))
