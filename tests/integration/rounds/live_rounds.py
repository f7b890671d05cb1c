"""A real SuperLink, run worker and trainers, each in its process, with pipes in place of MQTT."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from sklearn.datasets import load_digits

from cloud_coordinator.flower.superlink import SuperLink
from cloud_coordinator.rounds.cohort import training_seed
from cloud_coordinator.rounds.initial_model import initial_parameters
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    ConfigsSigned,
    DeviceAnswered,
    DeviceJoined,
    FromWorker,
    NudgeDevices,
    ReplyWaits,
    ResumePoint,
    RoundClosed,
    RoundRecord,
    RoundSaved,
    RunFailed,
    RunFinished,
    SignConfigs,
    StartRun,
    WorkerReady,
)
from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data, read_local_data
from edge_agent.trainer_messages import (
    FromTrainer,
    MessageWaits,
    StageAnswered,
    StageQuestion,
    StartTraining,
    TrainerFailed,
    TrainerJoined,
    TrainerReplied,
)
from edge_agent.training import train
from edge_agent.training_app import device_seed
from shared.child import Child
from shared.errors import UnavailableError
from shared.messages import utc_now
from shared.parameters import Vector
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE
from shared.signing import seal
from shared.tasks.spec import TaskSpec
from tests.enrolled_homes import ALL_MAY_LEAVE, FLEET, enrol_homes

DEADLINE_S = 90.0
DEVICES = ("edge-0", "edge-1", "edge-2")
SECURE_DEVICES = tuple(f"edge-{number}" for number in range(6))
SUMS_MAY_LEAVE = "min_cohort = 5\nexact_sums = true\n"
TASK = TaskSpec(
    name="digits",
    uses="tabular",
    options={
        "kind": "classification",
        "features": [{"name": f"pixel-{i}", "minimum": 0, "maximum": 16} for i in range(64)],
        "target": "digit",
        "labels": [str(digit) for digit in range(10)],
    },
)


def digits_plan(*, rounds: int, epochs: int = 1) -> RunPlan:
    return RunPlan(
        name="digits",
        task=TASK,
        privacy=PrivacyPlan(mode="plain"),
        rounds=rounds,
        training=TrainingPlan(epochs=epochs, learning_rate=0.02),
        cohort=CohortPlan(
            size=len(DEVICES), quorum=len(DEVICES), recruit_deadline_s=60, round_deadline_s=60
        ),
    )


def secure_plan(*, rounds: int) -> RunPlan:
    plan = digits_plan(rounds=rounds)
    size = len(SECURE_DEVICES)
    return msgspec.structs.replace(
        plan,
        cohort=msgspec.structs.replace(plan.cohort, size=size, quorum=5),
        privacy=PrivacyPlan(at_least=4, max_weight=250, clip_norm=4.0, stage_deadline_s=20),
    )


def write_digits(folder: Path, names: Sequence[str] = DEVICES) -> dict[str, Path]:
    """Give each device the digits of other writers: its own part of the rows."""
    digits = load_digits()
    paths = {}
    parts = np.array_split(np.arange(len(digits.target)), len(names))
    for name, rows in zip(names, parts, strict=True):
        paths[name] = folder / f"{name}.npz"
        inputs = digits.data[rows].astype(np.float32)
        np.savez(paths[name], inputs=inputs, targets=digits.target[rows])
    return paths


def averaged_by_hand(plan: RunPlan, paths: Sequence[Path]) -> Vector:
    """Return what federated averaging of all devices gives, without Flower and our rounds."""
    parts = [read_local_data(path, plan.task) for path in paths]
    weights = [len(part.train) for part in parts]
    parameters = initial_parameters(plan.task, plan.seed)
    for number in range(1, plan.rounds + 1):
        seed = training_seed(plan.seed, number)
        updates = [
            train(
                part.task,
                parameters,
                part.train,
                plan.training,
                seed=device_seed(seed, number, part.digest),
            ).parameters
            for part in parts
        ]
        mean = np.average(np.array(updates, dtype=np.float64), axis=0, weights=weights)
        parameters = mean.astype(np.float32)
    return parameters


@dataclass
class Device:
    """One trainer child and the pipe to it."""

    name: str
    node_id: int
    child: Child
    joined: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class LiveRounds:
    """What the coordinator does between a worker and the trainers, without its database."""

    def __init__(
        self,
        home: Path,
        superlink: SuperLink,
        *,
        names: Sequence[str] = DEVICES,
        policy: str = ALL_MAY_LEAVE,
    ) -> None:
        self.home = home
        self.names = names
        self.enrolled = enrol_homes({name: home / name for name in names}, policy=policy)
        self.superlink = superlink
        self.data: list[Path] = []
        self.devices: dict[str, Device] = {}
        self.worker: Child | None = None
        self.records: list[RoundRecord] = []
        self.last_word: RunFinished | RunFailed | None = None
        self.on_message: Callable[[FromWorker], Awaitable[None]] = _ignore
        self._tasks: set[asyncio.Task[None]] = set()

    async def start_trainers(self) -> None:
        """Start one for each device, with its own part of the digits; return when all joined."""
        data = write_digits(self.home, self.names)
        self.data = list(data.values())
        await asyncio.gather(*(self._start_trainer(name, data[name]) for name in self.names))

    async def _start_trainer(self, name: str, data: Path) -> None:
        home = self.home / name
        key = generate_private_key(SECP256R1())
        key_path = home / "node.pem"
        key_path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        DataRegistry(home).add(check_data("digits", data, TASK, now=utc_now()))
        node_id = await self.superlink.register_node(public.decode(), name)
        child = await Child.start(
            [sys.executable, "-m", "edge_agent.trainer"],
            name=f"trainer of {name}",
            log_path=home / "trainer.log",
        )
        self.devices[name] = Device(name, node_id, child)
        await child.send(
            StartTraining(
                run_id="run",
                session_id="session",
                task=TASK,
                data_name="digits",
                home=str(home),
                superlink_address=self.superlink.public_address,
                superlink_ca_pem=self.superlink.ca_pem,
                node_key_path=str(key_path),
                lease_s=120,
            )
        )
        self._spawn(self._hear_trainer(self.devices[name]))
        await asyncio.wait_for(self.devices[name].joined, DEADLINE_S)

    async def start_worker(
        self, plan: RunPlan, *, resume: ResumePoint | None = None, next_round: int = 0
    ) -> Child:
        self.last_word = None
        self.worker = await Child.start(
            [sys.executable, "-m", "cloud_coordinator.rounds.run_worker"],
            name="run worker",
            log_path=self.home / "worker.log",
        )
        await self.worker.send(
            StartRun(
                run_id="run",
                session_id="session",
                fleet=FLEET,
                plan=plan,
                resume=resume,
                next_round=next_round,
                blobs=str(self.home / "blobs"),
                scratch=str(self.home / "scratch"),
                superlink_address=self.superlink.private_address,
                superlink_ca_pem=self.superlink.ca_pem,
                superlink_secrets_path=str(self.superlink.secrets_path),
            )
        )
        self._spawn(self._hear_worker(self.worker))
        return self.worker

    async def finish(self) -> int:
        """Wait for the worker's end and return its exit status."""
        assert self.worker is not None
        status = await asyncio.wait_for(self.worker.wait(), DEADLINE_S)
        await asyncio.sleep(0)  # its last word is read before its end is known
        return status

    async def close(self) -> None:
        children = [device.child for device in self.devices.values()]
        if self.worker is not None:
            children.append(self.worker)
        await asyncio.gather(*(child.stop() for child in children))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _hear_worker(self, worker: Child) -> None:
        async for message in worker.messages(FromWorker):
            match message:
                case WorkerReady():
                    for device in self.devices.values():
                        await worker.send(self._joined(device))
                case NudgeDevices(names):
                    for name in names:
                        await self.devices[name].child.send(MessageWaits())
                case SignConfigs(payloads):
                    await worker.send(ConfigsSigned(tuple(map(self._seal, payloads))))
                case AskDevices():
                    await self._ask(message)
                case RoundClosed(record):
                    self.records.append(record)
                    await worker.send(RoundSaved(record.round_number))
                case RunFinished() | RunFailed():
                    self.last_word = message
                case _:
                    pass
            await self.on_message(message)

    def _joined(self, device: Device) -> DeviceJoined:
        key = self.enrolled.members[device.name].key
        return DeviceJoined(
            device.name, device.node_id, identity_key=str(key), membership_version=1
        )

    def _seal(self, payload: bytes) -> bytes:
        return seal(payload, payload_type=CONFIG_PAYLOAD_TYPE, key=self.enrolled.command_key)

    async def _ask(self, asked: AskDevices) -> None:
        for name in asked.device_ids:
            question = StageQuestion(
                message_id="question",
                session=asked.session,
                stage=asked.stage,
                question=asked.question,
            )
            await self.devices[name].child.send(question)

    async def _hear_trainer(self, device: Device) -> None:
        async for message in device.child.messages(FromTrainer):
            match message:
                case TrainerJoined():
                    device.joined.set_result(None)
                case TrainerReplied(message_id=message_id) if self.worker is not None:
                    await self.worker.send(ReplyWaits(message_id))
                case StageAnswered(answer=answer) if self.worker is not None:
                    await self.worker.send(DeviceAnswered(device.name, answer))
                case TrainerFailed(cause):
                    device.joined.set_exception(UnavailableError(cause))
                case _:
                    pass

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(asyncio.get_running_loop().create_task(work))


async def _ignore(_: FromWorker) -> None:
    pass


@contextlib.asynccontextmanager
async def live_rounds(
    home: Path, *, names: Sequence[str] = DEVICES, policy: str = ALL_MAY_LEAVE
) -> AsyncIterator[LiveRounds]:
    """Start a SuperLink; end it and all children afterwards."""
    superlink = await SuperLink.start(home)
    rounds = LiveRounds(home, superlink, names=names, policy=policy)
    try:
        yield rounds
    finally:
        await rounds.close()
        await superlink.stop()
