"""A coordinator, a SuperLink and devices in one object, on a clock that only waiting moves.

Devices misbehave on request. The rules of the real thing hold: a device acts when it is nudged, a
message has a time to live, what was pulled once is gone, and errors made by the SuperLink bear its
own node id.
"""

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.checkpoint import load_state
from cloud_coordinator.rounds.host import HostEvent, Report
from cloud_coordinator.rounds.training_rounds import build_server_app
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    ConfigsSigned,
    DeviceAnswered,
    DeviceJoined,
    DeviceLeft,
    NudgeDevices,
    ReplyWaits,
    ResumePoint,
    RoundClosed,
    RoundRecord,
    RoundSaved,
    RunFailed,
    RunFinished,
    SignConfigs,
    StopRun,
)
from shared.errors import ShoalError
from shared.membership import Member
from shared.parameters import Vector
from shared.privacy_plan import AggregationPlan, PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE
from shared.signing import SigningKey, seal
from shared.tasks.spec import TaskSpec
from tests.unit.cloud_coordinator.rounds.simulated_sums import SumPart, encoded

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
SUPERLINK = 1
TASK = TaskSpec(
    name="pumps",
    uses="tabular",
    options={
        "kind": "classification",
        "features": [{"name": "pressure", "minimum": 0, "maximum": 1}],
        "target": "state",
        "labels": ["ok", "failed"],
    },
)
SIZE = 4  # parameters of that task's linear model


PLAIN = PrivacyPlan(mode="plain")


def plan_of(
    *,
    rounds: int = 2,
    evaluate: bool = False,
    seed: int = 7,
    privacy: PrivacyPlan = PLAIN,
    aggregation: AggregationPlan | None = None,
    **cohort: Any,
) -> RunPlan:
    return RunPlan(
        name="pumps",
        task=TASK,
        rounds=rounds,
        evaluate=evaluate,
        seed=seed,
        training=TrainingPlan(),
        privacy=privacy,
        aggregation=aggregation or AggregationPlan(),
        cohort=CohortPlan(**cohort),
    )


@dataclass
class SimulatedDevice:
    """Moves the parameters half-way to its target. Fields may be changed while a run goes on."""

    name: str
    node_id: int
    target: Vector
    examples: float = 10
    train_s: float = 1.0
    dead: bool = False  # takes messages and never answers
    error: str = ""  # what its ClientApp raises
    unreachable: bool = False  # the SuperLink gives it up
    announces: bool = True
    answers_twice: bool = False
    refused: bool = False  # the SuperLink takes no messages for it
    alter: Callable[[RecordDict], None] = lambda _: None  # what it does to its reply
    stage_s: float = 0.01  # it takes for each later stage of a secure sum
    silent_at: str = ""  # from this stage of a secure sum on it says nothing any more
    loses: set[str] = field(default_factory=set)  # stages whose first question gets lost

    def __post_init__(self) -> None:
        self.sums = SumPart(self.name)

    def answer(self, message: Message) -> RecordDict:
        kind = message.metadata.message_type
        if kind.startswith("query."):
            return self._answer_stage(kind.removeprefix("query."), message)
        if "sum" in message.content.config_records:
            return self._take_part(message)
        parameters = message.content.array_records["parameters"].to_numpy_ndarrays()[0]
        if message.metadata.message_type == "train":
            trained = (parameters + self.target) / 2
            metrics = MetricRecord({"examples": self.examples, "loss_sum": self.examples / 2})
            content = RecordDict(
                {"parameters": ArrayRecord([trained.astype(np.float32)]), "metrics": metrics}
            )
        else:
            distance = float(np.abs(parameters - self.target).sum())
            content = RecordDict(
                {
                    "metrics": MetricRecord(
                        {
                            "examples": self.examples,
                            "loss_sum": self.examples * distance,
                            "correct": self.examples / (1 + distance),
                        }
                    )
                }
            )
        self.alter(content)
        return content

    def _take_part(self, message: Message) -> RecordDict:
        parameters = message.content.array_records["parameters"].to_numpy_ndarrays()[0]
        sealed = message.content.config_records["sum"]["config"]
        assert isinstance(sealed, bytes)
        if message.metadata.message_type == "train":
            vector = (self.target - parameters) / 2
            exact = {
                "examples": self.examples,
                "seen": self.examples,
                "loss_sum": self.examples / 2,
            }
            exact["unclipped"] = 1.0
        else:
            vector = np.zeros(0, np.float32)
            distance = float(np.abs(parameters - self.target).sum())
            exact = {
                "examples": self.examples,
                "loss_sum": self.examples * distance,
                "correct": self.examples / (1 + distance),
            }
        content = RecordDict(
            {"sum": ConfigRecord({"answer": encoded(self.sums.advertise(sealed, vector, exact))})}
        )
        self.alter(content)
        return content

    def _answer_stage(self, stage: str, message: Message) -> RecordDict:
        record = message.content.config_records["sum"]
        session, question = record["session"], record["question"]
        assert isinstance(session, bytes)
        assert isinstance(question, bytes)
        answer, lanes = self.sums.answer_with_lanes(session, stage, question)
        content = RecordDict({"sum": ConfigRecord({"answer": encoded(answer)})})
        if lanes is not None:
            content["lanes"] = ArrayRecord([lanes.main])
            content["exact"] = ArrayRecord([lanes.exact])
        self.alter(content)
        return content

    def is_silent_at(self, stage: str) -> bool:
        """Whether it has stopped to answer by this stage."""
        order = ["train", "evaluate", "share", "mask", "consent", "reveal"]
        return bool(self.silent_at) and order.index(stage) >= order.index(self.silent_at)


class SimulatedFleet(Grid):
    """The Grid, and with `host` the coordinator around the rounds."""

    def __init__(self, devices: int, *, seed: int = 0) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK
        rng = np.random.default_rng(seed)
        self.devices = {
            name: SimulatedDevice(name, 100 + i, rng.normal(size=SIZE).astype(np.float32))
            for i, name in enumerate(f"edge-{i}" for i in range(devices))
        }
        self.command_key = SigningKey.generate()
        self.members = {
            name: Member(name, device.sums.identity.public, EPOCH)
            for name, device in self.devices.items()
        }
        for device in self.devices.values():
            device.sums.members, device.sums.trusted = self.members, self.command_key.public
        self.asked: list[AskDevices] = []
        self.now_s = 0.0
        self.pushed: list[Message] = []
        self.pulled_again: list[str] = []
        self.events: list[HostEvent] = []
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting: dict[str, Message] = {}  # not taken by the device yet
        self._expires: dict[str, float] = {}
        self._replies: dict[str, Message] = {}
        self._answered: set[str] = set()

    # --- time -------------------------------------------------------------------------------------

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when_s, next(self._order), action))

    def advance(self, timeout_s: float) -> None:
        """Let time pass until something is told, at most ``timeout_s``."""
        end_s = self.now_s + timeout_s
        while not self.events and self._due and self._due[0][0] <= end_s:
            when_s, _, action = heapq.heappop(self._due)
            self.now_s = max(self.now_s, when_s)
            action()
        if not self.events:
            self.now_s = end_s

    # --- the coordinator's side -------------------------------------------------------------------

    def join(self, *names: str) -> None:
        for name in names or self.devices:
            key = str(self.members[name].key) if name in self.members else ""
            self.events.append(
                DeviceJoined(
                    name, self.devices[name].node_id, identity_key=key, membership_version=1
                )
            )

    def leave(self, name: str, cause: str = "went offline") -> None:
        self.devices[name].dead = True
        self.events.append(DeviceLeft(name, cause))

    def restart(self) -> None:
        """End this life of SuperLink and worker; the devices' processes live on."""
        self._due.clear()
        self._waiting.clear()
        self._replies.clear()
        self.events.clear()

    def ask(self, message: AskDevices) -> None:
        """Carry a question of a secure sum to devices, and their answers back."""
        self.asked.append(message)
        for name in message.device_ids:
            device = self.devices[name]
            if device.dead or device.is_silent_at(message.stage):
                continue
            if message.stage in device.loses:
                device.loses.remove(message.stage)
                continue
            self.at(self.now_s + device.stage_s, partial(self._answer_stage, device, message))

    def _answer_stage(self, device: SimulatedDevice, message: AskDevices) -> None:
        if device.dead or message.session not in device.sums.opened:
            return
        answer = device.sums.answer(message.session, message.stage, message.question)
        self.events.append(DeviceAnswered(device.name, encoded(answer)))

    def nudge(self, name: str) -> None:
        """Have the device take what waits for it."""
        device = self.devices[name]
        for message in [
            m for m in self._waiting.values() if m.metadata.dst_node_id == device.node_id
        ]:
            del self._waiting[message.metadata.message_id]
            kind = message.metadata.message_type
            takes_s = device.stage_s if kind.startswith("query.") else device.train_s
            if not device.dead and not device.is_silent_at(kind.removeprefix("query.")):
                self.at(self.now_s + takes_s, partial(self._reply, device, message))

    def _reply(self, device: SimulatedDevice, message: Message) -> None:
        message_id = message.metadata.message_id
        if device.dead or self.now_s > self._expires[message_id]:
            return
        if device.unreachable:
            reply = Message(Error(5, "node unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK
        elif device.error:
            trace = f"Traceback (most recent call last):\n  ...\nValueError: {device.error}\n"
            reply = Message(Error(2, trace), reply_to=message)
        else:
            try:
                reply = Message(device.answer(message), reply_to=message)
            except ShoalError as error:
                reply = Message(Error(2, str(error)), reply_to=message)
        self._replies[message_id] = reply
        if device.announces and not device.unreachable:
            self.events += [ReplyWaits(message_id)] * (2 if device.answers_twice else 1)

    # --- Flower's Grid ----------------------------------------------------------------------------

    def set_run(self, run: Run) -> None:
        pass

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return [device.node_id for device in self.devices.values()]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node_id) for node_id in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        refused = {device.node_id for device in self.devices.values() if device.refused}
        ids = []
        for message in messages:
            message_id = f"m{len(self.pushed)}"
            self.pushed.append(message)
            if message.metadata.dst_node_id in refused:
                ids.append("")
                continue
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            self._expires[message_id] = self.now_s + message.metadata.ttl
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for message_id in message_ids:
            if message_id in self._answered:
                self.pulled_again.append(message_id)
            if reply := self._replies.pop(message_id, None):
                self._answered.add(message_id)
                found.append(reply)
            elif self.now_s > self._expires[message_id]:
                self._answered.add(message_id)
                asked = next(m for m in self.pushed if m.metadata.message_id == message_id)
                found.append(Message(Error(3, "message unavailable"), reply_to=asked))
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        raise NotImplementedError

    def unanswered_replies(self) -> int:
        """Return how many replies the SuperLink still keeps."""
        return len(self._replies)


class SimulatedHost:
    """A `RunHost` that saves rounds at once."""

    def __init__(
        self,
        fleet: SimulatedFleet,
        plan: RunPlan,
        folder: Path,
        *,
        resume: ResumePoint | None = None,
        announces: bool = True,
        times_selected: Mapping[str, int] | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.world = fleet
        self.run_id, self.fleet = "run", "plant"
        self.scratch = scratch
        self.members: Mapping[str, Member] = {} if announces else fleet.members
        self.membership_version = 0 if announces else 1
        self.plan = plan
        self.blobs = BlobStore(folder)
        self.resume = resume
        self.next_round = 1 if resume is None else resume.round_number + 1
        self.announces = announces
        self.times_selected: Mapping[str, int] = times_selected or {}
        self.reports: list[Report] = []
        self.saves = True  # False: the coordinator hangs
        self.on_report: Callable[[Report], None] = lambda _: None

    def wait(self, timeout_s: float) -> Sequence[HostEvent]:
        if not self.announces:
            for name in self.world.devices:
                self.world.nudge(name)
        self.world.advance(timeout_s)
        events, self.world.events = self.world.events, []
        told = RoundSaved | StopRun | ConfigsSigned
        return events if self.announces else [e for e in events if isinstance(e, told)]

    def report(self, message: Report) -> None:
        self.reports.append(message)
        match message:
            case NudgeDevices(names):
                for name in names if self.announces else ():
                    self.world.nudge(name)
            case SignConfigs(payloads):
                self.world.events.append(ConfigsSigned(tuple(map(self._seal, payloads))))
            case AskDevices():
                assert self.announces
                self.world.ask(message)
            case RoundClosed(record) if self.saves:
                self.world.events.append(RoundSaved(record.round_number))
            case _:
                pass
        self.on_report(message)

    def _seal(self, payload: bytes) -> bytes:
        return seal(payload, payload_type=CONFIG_PAYLOAD_TYPE, key=self.world.command_key)

    def seconds(self) -> float:
        return self.world.now_s

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.world.now_s)

    @property
    def records(self) -> list[RoundRecord]:
        return [report.record for report in self.reports if isinstance(report, RoundClosed)]

    @property
    def outcome(self) -> RunFinished | RunFailed | None:
        last = self.reports[-1] if self.reports else None
        return last if isinstance(last, RunFinished | RunFailed) else None

    def perform(self) -> None:
        """Run to the end."""
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        build_server_app(self)(self.world, context)

    def parameters(self, round_number: int = -1) -> Vector:
        """Return what the round (the last by default) committed."""
        record = next(
            r
            for r in reversed(self.records)
            if round_number in {-1, r.round_number} and r.parameters_sha256
        )
        assert record.parameters_sha256
        point = ResumePoint(
            round_number=record.round_number, parameters_sha256=record.parameters_sha256
        )
        return load_state(self.blobs, point).parameters
