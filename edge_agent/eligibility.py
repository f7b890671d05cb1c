"""Whether this device takes part in a run: its own decision, from plain values."""

from dataclasses import dataclass
from typing import Protocol

from shared.messages import Invitation
from shared.tasks.spec import TaskSpec


class DataFacts(Protocol):
    """What the decision needs to know about one data source of the owner."""

    @property
    def name(self) -> str:
        """Key in the data registry."""
        ...

    @property
    def train_rows(self) -> int:
        """Rows that may be trained on."""
        ...


class KnowsData(Protocol):
    """The owner's registry of data."""

    def find(self, task: TaskSpec) -> DataFacts:
        """Return the data for ``task``; raise DataError with the reason when there is none."""
        ...


@dataclass(frozen=True, slots=True)
class Yes:
    """Take part, with this data."""

    data_name: str


@dataclass(frozen=True, slots=True)
class No:
    """Do not take part; the coordinator counts reasons."""

    reason: str


def decide(invitation: Invitation, data: DataFacts | No, *, busy_with: str | None) -> Yes | No:
    """Answer an invitation; ``busy_with`` is the run that the trainer works for, if any.

    A reason reaches the coordinator, so it says nothing about the data, not even how much there is.
    """
    if busy_with not in {None, invitation.run_id}:
        return No(f"this device already takes part in run {busy_with}")
    if isinstance(data, No):
        return data
    if data.train_rows < invitation.min_examples:
        return No(f"fewer training examples here than the {invitation.min_examples} asked for")
    return Yes(data.name)
