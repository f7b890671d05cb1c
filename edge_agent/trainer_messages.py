"""What the daemon and its trainer child say to each other, as JSON lines over the child's pipes."""

import msgspec

from shared.messages import RelayedStage
from shared.tasks.spec import TaskSpec


class StartTraining(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First line to the child: everything it needs to take the SuperNode role in one run."""

    run_id: str  # ours
    session_id: str
    task: TaskSpec
    data_name: str  # key of the agent's data registry
    home: str  # the agent's state folder
    superlink_address: str  # host:port
    superlink_ca_pem: str
    node_key_path: str
    lease_s: float


class RejoinTraining(msgspec.Struct, frozen=True, kw_only=True, tag="rejoin"):
    """The run goes on in a new session: forget the old SuperLink, join this one, stay warm."""

    session_id: str
    superlink_address: str
    superlink_ca_pem: str
    lease_s: float


class MessageWaits(msgspec.Struct, frozen=True, tag="message-waits"):
    """The coordinator nudged: pull now."""


class StageQuestion(msgspec.Struct, frozen=True, kw_only=True, tag="stage-question"):
    """A small stage of a secure sum, asked over the control link."""

    message_id: str  # of the question
    session: bytes  # of the sum
    stage: RelayedStage
    question: bytes


class StopTraining(msgspec.Struct, frozen=True, tag="stop"):
    """Leave the SuperLink and end."""

    cause: str


ToTrainer = StartTraining | RejoinTraining | MessageWaits | StageQuestion | StopTraining


class TrainerJoined(msgspec.Struct, frozen=True, tag="joined"):
    """Activated at the SuperLink of this session."""

    session_id: str


class TrainerReplied(msgspec.Struct, frozen=True, tag="replied"):
    """A reply and all its objects are in the SuperLink of this session."""

    message_id: str
    session_id: str


class StageAnswered(msgspec.Struct, frozen=True, kw_only=True, tag="stage-answered"):
    """The answer to a `StageQuestion`; there is none where the question makes no sense."""

    message_id: str  # of the question
    stage: RelayedStage
    answer: bytes


class TrainerProgress(msgspec.Struct, frozen=True, tag="progress"):
    """For the owner's eyes: what the trainer does now."""

    doing: str


class TrainerFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The last line before the child ends with status 1."""

    cause: str


FromTrainer = TrainerJoined | TrainerReplied | StageAnswered | TrainerProgress | TrainerFailed
