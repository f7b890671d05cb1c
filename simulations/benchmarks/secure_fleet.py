"""A coordinator's half of secure rounds, and many light devices in two processes, on this machine.

What carries the messages is real: a SuperLink, mosquitto with TLS, and signed envelopes. The run's
worker and the coordinator's session are threads of this process, which plays both by their own
code: `SecureSums` drives, `SumRelay` and `ControlLink` carry, one word after the other as in a
session. So what it takes is an upper bound of what two processes would.
"""

import asyncio
import queue
import random
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.broker import BrokerPlan, broker_ca_pem, start_broker
from cloud_coordinator.control_link import ControlLink
from cloud_coordinator.flower.grid import RunGrid, open_run
from cloud_coordinator.flower.superlink import SuperLink
from cloud_coordinator.rounds.host import HostEvent, Report
from cloud_coordinator.rounds.worker_messages import (
    AskDevices,
    DeviceAnswered,
    DeviceLeft,
    NudgeDevices,
    ReplyWaits,
    ResumePoint,
    SignConfigs,
)
from cloud_coordinator.runs.sum_relay import SumRelay
from shared.child import Child
from shared.errors import NotFoundError, UnavailableError
from shared.listening import free_port
from shared.membership import Member
from shared.messages import (
    Envelope,
    JoinedRun,
    Nudge,
    Presence,
    PresenceState,
    ReplyWaiting,
    SumAnswer,
    utc_now,
)
from shared.run_plan import RunPlan
from shared.secure_sum.config import CONFIG_PAYLOAD_TYPE
from shared.secure_sum.messages import Stage
from shared.signing import SigningKey, VerifyingKey, seal
from simulations.benchmarks.federation import private_text, public_pem
from simulations.benchmarks.light_sums import (
    RUN,
    SESSION,
    BeginRound,
    DevicesReady,
    LightDevice,
    StartDevices,
)
from simulations.benchmarks.probe_apps import TASK

T = TypeVar("T")
FLEET = "bench"
_HOST = "127.0.0.1"
_PROCESSES = 2
_DEADLINE_S = 60.0


class SecureFleet:
    """Made by `secure_fleet`: a `RunHost` whose devices are real in all that they say.

    Attributes:
        device_ids: all devices; one's index is the place that its vectors are drawn from.
    """

    announces = True
    run_id, fleet = RUN, FLEET
    resume: ResumePoint | None = None
    next_round = 1
    times_selected: Mapping[str, int] = {}

    def __init__(self, plan: RunPlan, devices: int, folder: Path, stack: ExitStack) -> None:
        self.plan, self._folder, self._stack = plan, folder, stack
        self.blobs, self.scratch = BlobStore(folder / "blobs"), folder / "scratch"
        self.members: Mapping[str, Member] = {}  # they are told as they join
        self.membership_version = 0
        self._events: queue.SimpleQueue[HostEvent] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        # Children die with the thread that started them, so one thread starts them all.
        thread = threading.Thread(target=self._loop.run_forever, name="coordinator", daemon=True)
        thread.start()
        stack.callback(self._loop.close)
        stack.callback(thread.join, _DEADLINE_S)
        stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        self._session: _Session = self._do(_Session.start(folder, self._events.put, self._do_last))
        self._agents: list[tuple[Child, Any]] = []
        self.device_ids: Sequence[str] = self._do(self._add(devices))

    # --- for the benchmark -----------------------------------------------------------------------

    @contextmanager
    def run(self) -> Iterator[RunGrid]:
        """Open a Flower run for this process."""
        superlink = self._session.superlink
        with open_run(
            address=superlink.private_address,
            ca_pem=superlink.ca_pem,
            secrets_path=superlink.secrets_path,
            task=TASK,
        ) as grid:
            yield grid

    def begin_round(self, number: int, lost_at: Mapping[str, Stage]) -> DevicesReady:
        """Have all devices come back, some only to be lost; return what all spent so far."""
        return self._do(self._begin_round(BeginRound(number, dict(lost_at))))

    @property
    def superlink_pid(self) -> int:
        """Process to be measured."""
        return self._session.superlink.pid

    # --- `RunHost` -------------------------------------------------------------------------------

    def wait(self, timeout_s: float) -> Sequence[HostEvent]:
        """Return all that happened since the last call, or happens within the time."""
        events: list[HostEvent] = []
        try:
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def report(self, message: Report) -> None:
        """Have the session do what the worker may not."""
        self._loop.call_soon_threadsafe(self._session.hear_worker, message)

    def seconds(self) -> float:
        """Return the machine's monotonic clock."""
        return time.monotonic()

    def now(self) -> datetime:
        """Return the wall clock."""
        return utc_now()

    # --- setting up ------------------------------------------------------------------------------

    async def _add(self, count: int) -> Sequence[str]:
        node_keys = [generate_private_key(SECP256R1()) for _ in range(count)]
        devices = [
            LightDevice(
                device_id=f"device-{place:03}",
                place=place,
                identity=Ed25519PrivateKey.generate().private_bytes_raw(),
                node_key=private_text(node_key).decode(),
            )
            for place, node_key in enumerate(node_keys)
        ]
        await self._session.enrol(devices, [public_pem(key) for key in node_keys])
        superlink = self._session.superlink
        for process in range(_PROCESSES):
            name = f"light-sums-{process}"
            child = await Child.start(
                [sys.executable, "-m", "simulations.benchmarks.light_sums"],
                name=name,
                log_path=self._folder / "logs" / f"{name}.log",
            )
            self._do_last(child.stop)
            await child.send(
                StartDevices(
                    fleet=FLEET,
                    devices=tuple(devices[process::_PROCESSES]),
                    identities={d: str(m.key) for d, m in self._session.members.items()},
                    command_key=str(self._session.key.public),
                    superlink_address=superlink.public_address,
                    superlink_ca_pem=superlink.ca_pem,
                    mqtt_url=self._session.broker.url,
                    mqtt_ca_pem=self._session.broker.ca_pem,
                )
            )
            self._agents.append((child, child.messages(DevicesReady)))
        return [device.device_id for device in devices]

    async def _begin_round(self, begin: BeginRound) -> DevicesReady:
        ready = []
        try:
            async with asyncio.timeout(_DEADLINE_S):
                for child, _ in self._agents:
                    await child.send(begin)
                for _, messages in self._agents:
                    ready.append(await anext(messages))
                await self._session.all_joined.wait()
        except (TimeoutError, StopAsyncIteration):
            logs = "\n".join(child.log_tail(20) for child, _ in self._agents)
            away = ", ".join(self._session.away) or "nobody"
            raise UnavailableError(f"away: {away}; the devices' logs:\n{logs}") from None
        return DevicesReady(
            protocol_s=sum(each.protocol_s for each in ready),
            processor_s=sum(each.processor_s for each in ready),
        )

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(2 * _DEADLINE_S)

    def _do_last(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        self._stack.callback(lambda: self._do(work()))


class _Session:
    """Stands in for the coordinator: knows the devices, and carries words one after the other."""

    def __init__(
        self, superlink: SuperLink, broker: BrokerPlan, tell: Callable[[Any], None]
    ) -> None:
        self.superlink, self.broker, self.key = superlink, broker, SigningKey.generate()
        self.members: dict[str, Member] = {}
        self.all_joined = asyncio.Event()
        self._tell = tell
        self._nodes: dict[str, int] = {}
        self._joined: set[str] = set()
        self._mailbox: asyncio.Queue[Callable[[], Awaitable[None]]] = asyncio.Queue()
        self.link = ControlLink(
            broker.url,
            fleet=FLEET,
            key=self.key,
            devices=self,
            on_message=self._hear,
            on_connect=lambda: asyncio.sleep(0),
            clock=utc_now,
            rng=random.Random(),  # noqa: S311  # jitter
            ca_pem=broker.ca_pem,
        )
        self._relay = SumRelay(
            run_id=RUN,
            session_id=SESSION,
            link=self.link,
            membership=self,
            sign=lambda payload: seal(payload, payload_type=CONFIG_PAYLOAD_TYPE, key=self.key),
            clock=utc_now,
        )

    @classmethod
    async def start(
        cls,
        folder: Path,
        tell: Callable[[Any], None],
        at_the_end: Callable[[Callable[[], Coroutine[Any, Any, object]]], None],
    ) -> "_Session":
        """Start SuperLink and broker, connect, and begin to listen."""
        superlink = await SuperLink.start(folder)
        at_the_end(superlink.stop)
        plan = BrokerPlan("mosquitto", _HOST, free_port(), tls=True)
        broker = await start_broker(plan, home=folder)
        at_the_end(broker.stop)
        plan = BrokerPlan(plan.kind, plan.host, plan.port, tls=True, ca_pem=broker_ca_pem(folder))
        session = cls(superlink, plan, tell)
        jobs = [asyncio.create_task(session.link.run()), asyncio.create_task(session._work())]

        async def end() -> None:
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)

        at_the_end(end)
        await session.link.wait_connected()
        return session

    async def enrol(self, devices: Sequence[LightDevice], node_keys: Sequence[str]) -> None:
        """Let devices in, with the public halves of their node keys."""
        for device, node_key in zip(devices, node_keys, strict=True):
            identity = Ed25519PrivateKey.from_private_bytes(device.identity).public_key()
            key = VerifyingKey(identity.public_bytes_raw())
            name = device.device_id
            self.members[name] = Member(name, key, utc_now())
            self._nodes[name] = await self.superlink.register_node(node_key, name)
        await self._relay.read_members()

    @property
    def away(self) -> Sequence[str]:
        """Return the devices that have not joined."""
        return sorted(self.members.keys() - self._joined)

    async def identity_key(self, device_id: str) -> VerifyingKey:
        """Return a device's key, for the link."""
        if device_id not in self.members:
            raise NotFoundError(f"no device {device_id}")
        return self.members[device_id].key

    def current(self) -> tuple[int, Mapping[str, Member]]:
        """Return the membership list, for the relay."""
        return 1, self.members

    def hear_worker(self, message: Report) -> None:
        """Take up what the worker asks for."""
        match message:
            case NudgeDevices(device_ids):
                self._mailbox.put_nowait(lambda: self._nudge(device_ids))
            case SignConfigs():
                self._tell(self._relay.sign(message))
            case AskDevices():
                joined = frozenset(self._joined)
                self._mailbox.put_nowait(lambda: self._relay.ask(message, joined))
            case _:
                pass

    async def _work(self) -> None:
        while True:
            await (await self._mailbox.get())()

    async def _hear(self, envelope: Envelope) -> None:
        async def take() -> None:
            self._take(envelope)

        self._mailbox.put_nowait(take)

    def _take(self, envelope: Envelope) -> None:
        device_id = envelope.device
        match envelope.body:
            case JoinedRun() if device_id not in self._joined:
                self._joined.add(device_id)
                self._tell(self._relay.joined(device_id, self._nodes[device_id]))
            case Presence(state=PresenceState.LOST) if device_id in self._joined:
                self._joined.discard(device_id)
                self._tell(DeviceLeft(device_id, "went offline"))
            case ReplyWaiting(message_id=message_id) if device_id in self._joined:
                self._tell(ReplyWaits(message_id))
            case SumAnswer(answer=answer) if device_id in self._joined:
                self._tell(DeviceAnswered(device_id, answer))
        if len(self._joined) == len(self.members):
            self.all_joined.set()
        else:
            self.all_joined.clear()

    async def _nudge(self, device_ids: Sequence[str]) -> None:
        nudge = Nudge(run_id=RUN, session_id=SESSION)
        await asyncio.gather(*(self.link.try_send(nudge, device=each) for each in device_ids))


@contextmanager
def secure_fleet(plan: RunPlan, devices: int) -> Iterator[SecureFleet]:
    """Start SuperLink, broker and devices; end all of them at the end."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, ExitStack() as stack:
        yield SecureFleet(plan, devices, Path(folder), stack)
