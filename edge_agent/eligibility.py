"""Whether this device takes part in a run: its own decisions, from plain values.

The daemon answers an invitation; the trainer then holds the run that it meets to the answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from edge_agent.privacy.policy import POLICY_FILE, OwnerPolicy
from shared.errors import DataError, PolicyError
from shared.messages import Invitation
from shared.tasks.spec import TaskSpec
from shared.untrusted import NOT_JSON


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


def decide(
    invitation: Invitation,
    data: DataFacts | No,
    policy: OwnerPolicy | No,
    *,
    busy_with: str | None,
) -> Yes | No:
    """Answer an invitation.

    A reason reaches the coordinator, so it says nothing about the data, not even how much there is.

    Args:
        invitation: what is asked.
        data: the owner's data for its task, or why there are none.
        policy: what the owner allows, or why nobody knows; each sum is held to it once more.
        busy_with: the run that the trainer works for, if any.
    """
    if busy_with not in {None, invitation.run_id}:
        return No(f"this device already takes part in run {busy_with}")
    for missing in (data, policy):
        if isinstance(missing, No):
            return missing
    assert not isinstance(data, No)
    assert not isinstance(policy, No)
    if reason := _forbidden(invitation, policy):
        return No(reason)
    if reason := too_few(data.train_rows, invitation.min_examples):
        return No(reason)
    return Yes(data.name)


def too_few(train_rows: int, min_examples: int) -> str:
    """Return why a device has too few training examples; empty where it has enough.

    The number is the coordinator's, and may be another one each time: halving what is left, twenty
    questions would tell exactly how many rows there are. So only powers of two are told apart.
    """
    wanted = 1 << max(0, min_examples - 1).bit_length()
    if train_rows >= wanted:
        return ""
    return (
        f"fewer than {wanted} training examples here; devices tell powers of two apart, so the "
        f"{min_examples} asked for count as so many"
    )


def _forbidden(invitation: Invitation, policy: OwnerPolicy) -> str:
    """Return why the owner does not allow such a run, as far as an invitation tells."""
    if invitation.mode == "plain":
        try:
            policy.check_plain_update()
        except PolicyError as error:
            return str(error)
    elif invitation.min_survivors < policy.min_cohort:
        return (
            f"this device's owner has min_cohort = {policy.min_cohort} in {POLICY_FILE}, and the "
            f"run's sums may be of {invitation.min_survivors} devices"
        )
    return ""


def agree(
    task: TaskSpec,
    client_app: str,
    *,
    components: Mapping[str, Any],
    run_config: Mapping[str, Any],
) -> None:
    """Raise DataError unless a run names our app and the very task that was agreed to."""
    if components.get("clientapp") != client_app:
        raise DataError(
            f"the run wants {components.get('clientapp')!r} and this device runs "
            f"nothing but {client_app!r}"
        )
    try:
        asked = msgspec.json.decode(str(run_config.get("task")), type=TaskSpec)
    except NOT_JSON as error:
        raise DataError("the run names no task; start it through Shoal") from error
    if asked.digest != task.digest:
        raise DataError(
            f"the run is about task {asked.name!r} and this device agreed to "
            f"{task.name!r} with other options"
        )
