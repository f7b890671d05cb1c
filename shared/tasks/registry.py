"""From a task's name to the task: only what is installed here can be named, code never travels."""

import importlib
import inspect
from importlib.metadata import EntryPoint, entry_points

from shared.errors import ConfigError
from shared.tasks.spec import TaskSpec
from shared.tasks.task import Task

GROUP = "shoal.tasks"


def load_task(spec: TaskSpec) -> Task:
    """Make the task that ``spec`` describes.

    Importing runs the named module's code. A device therefore loads only specs that its owner gave
    data to (see edge_agent/data_registry.py), whatever a coordinator asks for.

    Raises:
        ConfigError: nothing of that name is installed, it cannot be imported, it is no `Task`, or
            the task refuses its options.
    """
    kind = _import(_find(spec.uses))
    if not (isinstance(kind, type) and issubclass(kind, Task)):
        raise ConfigError(
            f"{spec.uses!r} names {kind!r}, which is no task; "
            "name a subclass of shared.tasks.task.Task"
        )
    try:
        return kind.from_options(spec.options)
    except TypeError as error:
        if inspect.isabstract(kind):
            raise ConfigError(f"task {spec.uses!r} is unfinished: {error}; write that") from error
        raise


def _find(uses: str) -> EntryPoint:
    if ":" in uses:
        return EntryPoint(name=uses, value=uses, group=GROUP)
    installed = entry_points(group=GROUP)
    if uses not in installed.names:
        raise ConfigError(
            f"no task {uses!r} is installed here, there are {', '.join(sorted(installed.names))}; "
            "install the package that offers it, or write module:object"
        )
    return installed[uses]


def _import(entry: EntryPoint) -> object:
    module, _, name = entry.value.partition(":")
    try:
        kind: object = importlib.import_module(module.strip())
        for attribute in name.strip().split("."):
            kind = getattr(kind, attribute)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"task {entry.name!r} cannot be imported: {error}; install its package on this machine "
            "or put its folder on PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ConfigError(
            f"task {entry.name!r} cannot be found: {error}; write module:object, such as "
            "my_package.my_task:MyTask"
        ) from error
    return kind
