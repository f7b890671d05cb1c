"""Many SuperNode roles in one process, a thread each: ``python -m …light_agents``, over pipes.

They are the trainer's own `FlowerNode`, so the SuperLink cannot tell them from processes.
"""

import queue
import threading

import msgspec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from edge_agent.flower_node import FlowerNode
from shared.child import ParentLink, die_with_parent
from shared.logs import configure_logging
from simulations.benchmarks.probe_apps import TASK, client

_START_DEADLINE_S = 60.0


class StartAgents(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """First line to the child; one agent per key."""

    address: str
    ca_pem: str
    keys: tuple[str, ...]  # in OpenSSH form


class NudgeAgent(msgspec.Struct, frozen=True, tag="nudge"):
    """A message waits for the agent with this index."""

    agent: int


ToAgents = StartAgents | NudgeAgent


class AgentsJoined(msgspec.Struct, frozen=True, tag="joined"):
    """All are activated."""


class AgentReplied(msgspec.Struct, frozen=True, tag="replied"):
    """A reply is in the SuperLink in whole."""

    message_id: str


FromAgents = AgentsJoined | AgentReplied


class _Agent:
    def __init__(self, node: FlowerNode, link: ParentLink[ToAgents]) -> None:
        self.nudges: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._node = node
        self._link = link
        node.join()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self.nudges.get()
            for message_id in self._node.work():
                self._link.send(AgentReplied(message_id))


def main() -> None:
    """Serve until the parent closes the pipe."""
    die_with_parent()
    configure_logging("WARNING")
    link: ParentLink[ToAgents] = ParentLink(ToAgents)
    start = link.incoming.get(timeout=_START_DEADLINE_S)
    assert isinstance(start, StartAgents)
    agents = [_Agent(_node(start, text), link) for text in start.keys]
    link.send(AgentsJoined())
    while (message := link.incoming.get()) is not None:
        assert isinstance(message, NudgeAgent)
        agents[message.agent].nudges.put(None)


def _node(start: StartAgents, text: str) -> FlowerNode:
    key = load_ssh_private_key(text.encode(), password=None)
    assert isinstance(key, EllipticCurvePrivateKey)
    return FlowerNode(
        address=start.address,
        ca_pem=start.ca_pem,
        private_key=key,
        app=client,
        task=TASK,
        node_config={},
    )


if __name__ == "__main__":
    main()
