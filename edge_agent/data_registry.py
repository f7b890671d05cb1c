"""Which data the owner of this device gave to which task: one JSON file in the agent's home.

Free of torch, so that the daemon can answer invitations from it. A device trains only for a task
that stands here in exactly the same form (same digest): the owner's word, not the coordinator's.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec

from shared.errors import ConfigError, DataError, NotFoundError
from shared.files import write_private
from shared.tasks.spec import TaskSpec

_FILE = "data.json"
_VERSION = 1


class DataEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One data source, as it was when it was last checked."""

    name: str
    path: str  # absolute
    task: TaskSpec
    usable_rows: int
    skipped: dict[str, int]  # rows left out, by reason
    train_rows: int
    held_out_rows: int
    digest: str  # of all usable rows; another one means that the data changed
    checked_at: datetime  # aware UTC
    problem: str = ""  # why the last check failed; nobody trains on such data

    def broken(self, problem: str, *, at: datetime) -> "DataEntry":
        """Return the entry as it is after a check that failed."""
        return msgspec.structs.replace(self, problem=problem, checked_at=at)


class _Document(msgspec.Struct, frozen=True, kw_only=True):
    version: int = _VERSION
    entries: tuple[DataEntry, ...] = ()


class DataRegistry:
    """The entries of one agent's home. Every call reads the file anew: commands change it."""

    def __init__(self, home: Path) -> None:
        self._path = home / _FILE

    def entries(self) -> Sequence[DataEntry]:
        """Return all entries, sorted by name.

        Raises:
            DataError: the file is damaged.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise DataError(f"cannot read {self._path}: {error.strerror}; mend that") from error
        try:
            document = msgspec.json.decode(content, type=_Document)
        except msgspec.DecodeError as error:
            raise DataError(
                f"{self._path} is damaged ({error}); "
                "delete it and add your data again with `shoal-agent data add`"
            ) from error
        if document.version != _VERSION:
            raise DataError(
                f"{self._path} was written by another version of shoal-agent; install that one"
            )
        return document.entries

    def get(self, name: str) -> DataEntry:
        """Return one entry; raise NotFoundError where there is none of that name."""
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise NotFoundError(f"no data {name!r} here; see `shoal-agent data list`")

    def add(self, entry: DataEntry) -> None:
        """Store ``entry`` in place of the one with its name, if there is one.

        Raises:
            ConfigError: another data source already serves a task of that name.
        """
        others = [other for other in self.entries() if other.name != entry.name]
        for other in others:
            if other.task.name == entry.task.name:
                raise ConfigError(
                    f"task {entry.task.name!r} already has the data {other.name!r}; "
                    f"remove those first with `shoal-agent data remove {other.name}`"
                )
        self._write([*others, entry])

    def remove(self, name: str) -> None:
        """Forget an entry, not its data; raise NotFoundError where there is none."""
        gone = self.get(name)
        self._write([entry for entry in self.entries() if entry != gone])

    def find(self, task: TaskSpec) -> DataEntry:
        """Return the data that the owner gave to exactly this task.

        Raises:
            DataError: the reason why this device cannot train for it. Sent to the coordinator as
                it is, so it says nothing about the data.
        """
        for entry in self.entries():
            if entry.task.name != task.name:
                continue
            if entry.task.digest != task.digest:
                raise DataError(
                    f"data for task {task.name!r} were added for another form of it; "
                    "the owner must add them again with the run's task file"
                )
            if entry.problem:
                raise DataError(
                    f"data for task {task.name!r} failed their last check; "
                    "the owner must mend them and check again"
                )
            return entry
        raise DataError(f"no data for task {task.name!r}")

    def _write(self, entries: Sequence[DataEntry]) -> None:
        document = _Document(entries=tuple(sorted(entries, key=lambda entry: entry.name)))
        write_private(self._path, msgspec.json.format(msgspec.json.encode(document), indent=2))
