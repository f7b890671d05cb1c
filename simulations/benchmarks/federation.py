"""A SuperLink, agents and a run's worker side by side on this machine, to be measured.

The worker's part is played by this process through `RunGrid`, as the run worker does. Nudges go by
pipe in place of MQTT, so what is measured is Flower's side alone.
"""

import asyncio
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Message

from cloud_coordinator.flower.grid import RunGrid, open_run
from cloud_coordinator.flower.superlink import SuperLink
from edge_agent.trainer_messages import (
    FromTrainer,
    MessageWaits,
    StartTraining,
    TrainerJoined,
    TrainerReplied,
)
from shared.child import Child
from shared.errors import UnavailableError
from simulations.benchmarks.light_agents import (
    AgentReplied,
    AgentsJoined,
    FromAgents,
    NudgeAgent,
    StartAgents,
)
from simulations.benchmarks.probe_apps import TASK

T = TypeVar("T")
_DEADLINE_S = 120.0
_BATCH = 32


class Federation:
    """Made by `federation`; blocking, from one thread."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        # Children die with the thread that started them, so one thread starts them all.
        thread = threading.Thread(target=self._loop.run_forever, name="children", daemon=True)
        thread.start()
        stack.callback(self._loop.close)
        stack.callback(thread.join, _DEADLINE_S)
        stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        self._stack = stack
        self._superlink: SuperLink = self._do(SuperLink.start(folder))
        stack.callback(lambda: self._do(self._superlink.stop()))
        self._nudges: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self._replied: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.node_ids: list[int] = []

    @property
    def superlink_pid(self) -> int:
        """Process to be measured."""
        return self._superlink.pid

    @contextmanager
    def run(self) -> Iterator[RunGrid]:
        """Open a run for this process; it names our real app, as trainers run no other."""
        with open_run(
            address=self._superlink.private_address,
            ca_pem=self._superlink.ca_pem,
            secrets_path=self._superlink.secrets_path,
            task=TASK,
        ) as grid:
            yield grid

    def add_trainers(self, count: int) -> None:
        """Start real trainer processes, and return once all have joined."""
        for _ in range(count):
            self._do(self._add_trainer(f"agent-{len(self.node_ids)}"))

    def add_light_agents(self, count: int) -> None:
        """Start agents that share one process, and return once all have joined."""
        self._do(self._add_light_agents(count))

    def nudge(self, agents: Sequence[int]) -> None:
        """Tell agents (by index) that a message waits."""
        for agent in agents:
            asyncio.run_coroutine_threadsafe(self._nudges[agent](), self._loop)

    def replied(self) -> list[str]:
        """Wait for an announced reply; return the ids of all that are announced, at most 32."""
        ids: list[str] = []
        try:
            ids.append(self._replied.get(timeout=_DEADLINE_S))
            while len(ids) < _BATCH:
                ids.append(self._replied.get_nowait())
        except queue.Empty:
            if not ids:
                raise UnavailableError("the agents do not answer; see their logs") from None
        return ids

    async def _add_trainer(self, name: str) -> None:
        key = generate_private_key(SECP256R1())
        key_path = self._folder / f"{name}.pem"
        key_path.write_bytes(private_text(key))
        self.node_ids.append(await self._superlink.register_node(public_pem(key), name))
        child = await self._start("simulations.benchmarks.probe_trainer", name)
        await child.send(
            StartTraining(
                run_id="bench",
                session_id="bench",
                task=TASK,
                data_name="",
                home=str(self._folder),
                superlink_address=self._superlink.public_address,
                superlink_ca_pem=self._superlink.ca_pem,
                node_key_path=str(key_path),
                lease_s=3600.0,
            )
        )
        self._nudges.append(lambda: child.send(MessageWaits()))
        await self._listen(child, FromTrainer, TrainerJoined, TrainerReplied)

    async def _add_light_agents(self, count: int) -> None:
        keys = [generate_private_key(SECP256R1()) for _ in range(count)]
        child = await self._start("simulations.benchmarks.light_agents", "light-agents")
        for index, key in enumerate(keys):
            name = f"light-{index}"
            self.node_ids.append(await self._superlink.register_node(public_pem(key), name))
            self._nudges.append(lambda index=index: child.send(NudgeAgent(index)))  # type: ignore[misc]
        await child.send(
            StartAgents(
                address=self._superlink.public_address,
                ca_pem=self._superlink.ca_pem,
                keys=tuple(private_text(key).decode() for key in keys),
            )
        )
        await self._listen(child, FromAgents, AgentsJoined, AgentReplied)

    async def _start(self, module: str, name: str) -> Child:
        log_path = self._folder / "logs" / f"{name}.log"
        child = await Child.start([sys.executable, "-m", module], name=name, log_path=log_path)
        self._stack.callback(lambda: self._do(child.stop()))
        return child

    async def _listen(
        self, child: Child, kind: Any, joined: type[msgspec.Struct], replied: Any
    ) -> None:
        """Wait until the child has joined, then collect its replies for as long as it lives."""
        messages = child.messages(kind)
        async with asyncio.timeout(_DEADLINE_S):
            first = await anext(messages)
        if not isinstance(first, joined):
            raise UnavailableError(f"{child.name} did not join: {first}")

        async def collect() -> None:
            async for message in messages:
                if isinstance(message, replied):
                    self._replied.put(message.message_id)

        task = asyncio.create_task(collect(), name=f"replies of {child.name}")
        self._stack.callback(lambda: self._loop.call_soon_threadsafe(task.cancel))

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_DEADLINE_S)


@contextmanager
def federation() -> Iterator[Federation]:
    """Start a SuperLink; end it and all agents that were added at the end."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, ExitStack() as stack:
        yield Federation(Path(folder), stack)


def perform_round(
    fleet: Federation,
    grid: RunGrid,
    messages: Sequence[Message],
    *,
    fold: Callable[[Message], None] = lambda _: None,
    wave: int | None = None,
) -> float:
    """Push one message to each node, nudge, pull and fold all replies; return the seconds.

    Args:
        fleet: answers.
        grid: of an open run.
        messages: one per agent, in the order of ``fleet.node_ids``.
        fold: is given each reply, which is then forgotten.
        wave: at most so many agents are nudged and not folded at a time; None nudges all at once.
    """
    started = time.monotonic()
    pending = set(grid.push_messages(messages))
    unnudged = list(range(len(messages)))
    first, unnudged = unnudged[:wave], unnudged[wave:] if wave else []
    fleet.nudge(first)
    while pending:
        for reply in grid.iter_replies(fleet.replied()):
            if reply.has_error():
                raise UnavailableError(f"an agent failed: {reply.error.reason}")
            fold(reply)
            pending.discard(reply.metadata.reply_to_message_id)
            if unnudged:
                fleet.nudge([unnudged.pop(0)])
    return time.monotonic() - started


def public_pem(key: EllipticCurvePrivateKey) -> str:
    """Return the form in which the SuperLink takes a node key."""
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


def private_text(key: EllipticCurvePrivateKey) -> bytes:
    """Return the OpenSSH form in which Flower reads a node key."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
