"""Apps that compute nothing: what remains of a round is what the machinery costs.

``client`` runs in our trainers, in light agents and in stock SuperNodes; ``server`` in stock
Flower's own ServerApp process, where it times its rounds as any user of Flower could.
"""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from shared.tasks.spec import TaskSpec

CLIENT_APP = "simulations.benchmarks.probe_apps:client"
SERVER_APP = "simulations.benchmarks.probe_apps:server"
TASK = TaskSpec("empty-round", "simulations.benchmarks.probe_apps:none")
_NODE_POLL_S = 0.5
client = ClientApp()
server = ServerApp()


@client.query()
def reply(message: Message, context: Context) -> Message:
    """Answer with as many bytes as the question asks for, different on each node."""
    ask = message.content.config_records["ask"]
    size, form = ask["bytes"], ask["form"]
    assert isinstance(size, int)
    if form == "vector":
        vector = np.full(size // 4, context.node_id % 1000, dtype=np.float32)
        content = RecordDict({"answer": ArrayRecord([vector])})
    else:
        padding = context.node_id.to_bytes(8, "little") * (size // 8)
        content = RecordDict({"answer": ConfigRecord({"bytes": padding})})
    return Message(content, reply_to=message)


def question(node_id: int, *, size: int, form: str, number: int, down: bytes = b"") -> Message:
    """Ask for ``size`` bytes as a ``vector`` or as plain ``bytes``, with ``down`` bytes of ours."""
    record = ConfigRecord({"bytes": size, "form": form, "round": number, "down": down})
    content = RecordDict({"ask": record})
    return Message(content, node_id, "query", ttl=300.0, group_id=str(number))


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Wait for the nodes, then time rounds and write them to the file that the run names."""
    nodes, rounds = int(str(context.run_config["nodes"])), int(str(context.run_config["rounds"]))
    while len(node_ids := list(grid.get_node_ids())) < nodes:
        time.sleep(_NODE_POLL_S)
    seconds = []
    for number in range(rounds):
        started = time.monotonic()
        messages = [question(n, size=0, form="bytes", number=number) for n in node_ids]
        replies = list(grid.send_and_receive(messages, timeout=300))
        assert len(replies) == nodes
        assert not any(reply.has_error() for reply in replies)
        seconds.append(time.monotonic() - started)
    Path(str(context.run_config["result"])).write_text(json.dumps(seconds), encoding="utf-8")
