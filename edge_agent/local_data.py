"""The owner's data on their way to a task: named, read, checked, parted into train and held out.

Loading a task imports torch, so the daemon leaves this module to its children and to commands.
"""

import re
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from edge_agent.data_registry import DataEntry
from shared.config import read_toml
from shared.errors import ConfigError
from shared.tasks.examples import Examples, split_held_out
from shared.tasks.registry import load_task
from shared.tasks.sources import read_source
from shared.tasks.spec import TaskSpec
from shared.tasks.task import Task

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, slots=True, eq=False)
class LocalData:
    """All that a device needs to take part in a run."""

    task: Task
    train: Examples
    held_out: Examples  # never trained on, in any run
    digest: str  # of all usable rows, in hex; makes the device's randomness its own
    task_digest: str = ""  # of the task's spec
    name: str = ""  # the owner's, in the registry
    path: str = ""  # absolute; empty where the data lie in no file


def read_local_data(path: Path, spec: TaskSpec, *, name: str = "") -> LocalData:
    """Load the task and read its data, which their owner calls ``name``.

    Raises:
        ConfigError: the task cannot be loaded here.
        DataError: the data do not fit it.
    """
    return replace(_read(path, spec)[0], name=name)


def check_data(name: str, path: Path, spec: TaskSpec, *, now: datetime) -> DataEntry:
    """Read the data and describe them as the registry keeps it; raises as `read_local_data`."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot name data; use up to 63 lower-case letters, digits and dashes"
        )
    path = path.expanduser().resolve()
    data, skipped = _read(path, spec)
    return DataEntry(
        name=name,
        path=str(path),
        task=spec,
        usable_rows=len(data.train) + len(data.held_out),
        skipped=skipped,
        train_rows=len(data.train),
        held_out_rows=len(data.held_out),
        digest=data.digest,
        checked_at=now,
    )


def read_task_spec(text: str) -> TaskSpec:
    """Read a task as an owner names it on the command line.

    Args:
        text: path of a TOML file with ``name``, ``uses`` and ``[options]``; or what ``uses`` would
            say, for a task that needs no options. It is then named by its last part:
            ``my_package.tasks:TwoMoons`` is ``twomoons``.

    Raises:
        ConfigError: no such file, or it is not a task.
    """
    path = Path(text)
    if path.suffix == ".toml" or path.is_file():
        return read_toml(path, TaskSpec)
    name = re.sub(r"[^a-z0-9]+", "-", text.rpartition(":")[2].lower()).strip("-")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{text!r} names no task; give a task file or module:object")
    return TaskSpec(name=name, uses=text)


def _read(path: Path, spec: TaskSpec) -> tuple[LocalData, dict[str, int]]:
    task = load_task(spec)
    intake = read_source(path, task.contract)
    train, held_out = split_held_out(intake.examples)
    data = LocalData(
        task,
        train,
        held_out,
        intake.examples.digest(),
        task_digest=spec.digest,
        path=str(path.absolute()),
    )
    return data, dict(intake.skipped)
