"""The smaller network of a task that may learn from its own one."""

from shared.errors import ConfigError
from shared.tasks.task import Task, seeded_model
from shared.tasks.vectors import vector_size


def student_of(task: Task, name: str) -> Task:
    """Return a task's student, which costs a device no more than the network its owner agreed to.

    Raises:
        ConfigError: the task offers no such student, or it is larger than the task's own network.
    """
    student = task.student(name)
    size, own = (vector_size(seeded_model(each, 0)) for each in (student, task))
    if size > own:
        raise ConfigError(
            f"the student {name!r} has {size:,} parameters, more than the {own:,} of the task's "
            "own network; choose a smaller one"
        )
    return student
