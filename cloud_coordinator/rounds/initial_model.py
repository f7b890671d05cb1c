"""The model that a run starts from, and how its results are put into words: the door to tasks."""

from collections.abc import Mapping

from shared.parameters import Vector
from shared.tasks.contract import DataContract
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from shared.tasks.students import student_of
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector


def initial_parameters(task: TaskSpec, seed: int, *, student: str = "") -> Vector:
    """Return the parameters, shape (d,), that depend on the task and ``seed`` alone.

    Raises:
        ConfigError: the task has no such ``student``; empty: its own network.
    """
    loaded = load_task(task)
    return to_vector(seeded_model(student_of(loaded, student) if student else loaded, seed))


def check_student(task: TaskSpec, name: str) -> None:
    """Raise ConfigError where a task has no student of this name, or it is no smaller."""
    student_of(load_task(task), name)


def statistic_bounds(task: TaskSpec) -> Mapping[str, float]:
    """Return the names of what devices measure, and how much of each one example may add."""
    return load_task(task).statistics


def contract_of(task: TaskSpec) -> DataContract:
    """Return which rows the task learns from."""
    return load_task(task).contract


def summarize(task: TaskSpec, sums: Mapping[str, float]) -> dict[str, float]:
    """Turn statistics added over devices into metrics; raises what the task's code raises."""
    return load_task(task).summarize(sums)


def score(task: TaskSpec, sums: Mapping[str, float]) -> float:
    """Return how good added statistics are, in [0, 1]; raises what the task's code raises."""
    return load_task(task).score(sums)
