"""What the daemon shows its owner: a snapshot it keeps in its database, read by ``status``."""

from datetime import datetime
from pathlib import Path

import msgspec

from edge_agent.data_registry import DataRegistry
from edge_agent.enrolment import Enrolment, load_enrolment
from edge_agent.slots import Slots, verified_manifest
from edge_agent.state import AgentState, is_running
from shared.errors import DataError, UntrustedModelError
from shared.messages import DeploymentState

STATE_FILE = "state.db"
_FACT = "status"
_DIGEST_LENGTH = 12  # of 64, as the coordinator shows them


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What is true on the device, as the daemon last saw it."""

    pid: int
    online: bool = False  # the broker is connected
    doing: str = ""  # the run its trainer works for, and what it does; empty: nothing
    desired_version: int = 0
    deployment: DeploymentState = DeploymentState.IDLE
    serving_version: str | None = None  # digest of the manifest
    serving_artifact: str | None = None  # digest of the model file
    variant: str = ""  # what its manifest calls that file
    inference_address: str | None = None  # host:port
    grpc_address: str | None = None  # host:port, where the owner wants gRPC
    labelled: int = 0  # rows of its answers for which an application brought back a label
    correct: int = 0  # rows among them that were right
    cause: str = ""  # why the last deployment failed
    outbox_depth: int = 0  # messages that the coordinator has not acknowledged
    refused_messages: int = 0


class AgentStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What ``shoal-agent status --json`` prints."""

    device_id: str
    fleet: str
    coordinator: str
    running: bool
    tasks: tuple[str, ...]  # that the owner gave data to
    data_problem: str = ""  # why the data registry cannot be read
    inference_url: str | None  # only while it runs
    serving_model: str | None  # name under which the inference server offers the version
    snapshot: Snapshot | None  # None before the first start
    read_at: datetime


def save_snapshot(state: AgentState, snapshot: Snapshot) -> None:
    """Keep ``snapshot`` in place of the one before."""
    state.write(_FACT, snapshot)


def read_status(home: Path, *, now: datetime) -> AgentStatus:
    """Say how the agent of ``home`` is; raise ConfigError where none is enrolled."""
    enrolment = load_enrolment(home)
    running = is_running(home)
    snapshot = None
    if (home / STATE_FILE).exists():
        with AgentState(home / STATE_FILE) as state:
            snapshot = state.read(_FACT, Snapshot)
    address = snapshot.inference_address if snapshot is not None and running else None
    tasks, data_problem = _tasks(home)
    return AgentStatus(
        device_id=enrolment.device_id,
        fleet=enrolment.fleet,
        coordinator=enrolment.api_url,
        running=running,
        tasks=tasks,
        data_problem=data_problem,
        inference_url=f"http://{address}" if address else None,
        serving_model=_served_model(home, enrolment, snapshot),
        snapshot=snapshot,
        read_at=now,
    )


def _tasks(home: Path) -> tuple[tuple[str, ...], str]:
    """Return the tasks that have data here, also before the daemon runs, or why nobody knows."""
    try:
        return tuple(sorted(entry.task.name for entry in DataRegistry(home).entries())), ""
    except DataError as error:
        return (), str(error)


def _served_model(home: Path, enrolment: Enrolment, snapshot: Snapshot | None) -> str | None:
    slot = Slots(home).current
    if slot is None or snapshot is None:
        return None
    try:
        found = verified_manifest(slot, enrolment.model_keys)
    except UntrustedModelError:
        return None
    return found.manifest.model if found.version == snapshot.serving_version else None


def describe(status: AgentStatus) -> str:
    """Return the status in lines for a person."""
    snapshot = status.snapshot or Snapshot(pid=0)
    online = "online" if snapshot.online else "not connected to the coordinator's broker"
    tasks = status.data_problem or ", ".join(status.tasks) or "no task; see shoal-agent data add"
    lines = [
        f"device    {status.device_id} of fleet {status.fleet}",
        f"joined    {status.coordinator}",
        f"daemon    {f'runs, {online}' if status.running else 'does not run'}",
        f"data for  {tasks}",
        f"training  {snapshot.doing or 'nothing'}",
        f"serving   {_serving(status, snapshot)}",
    ]
    if status.running and snapshot.grpc_address:
        lines.append(f"gRPC      at {snapshot.grpc_address}")
    if snapshot.labelled:
        right = snapshot.correct / snapshot.labelled
        lines.append(f"labels    {snapshot.labelled} came back, {right:.1%} of them as predicted")
    if snapshot.cause:
        lines.append(f"trouble   {snapshot.cause}")
    if snapshot.outbox_depth:
        lines.append(f"unsent    {snapshot.outbox_depth} messages wait for the coordinator")
    return "\n".join(lines)


def _serving(status: AgentStatus, snapshot: Snapshot) -> str:
    if not snapshot.serving_version:
        return "no model yet"
    version = snapshot.serving_version[:_DIGEST_LENGTH]
    model = f"model {status.serving_model or '?'}, version {version}"
    return f"{model}, at {status.inference_url}" if status.inference_url else model
