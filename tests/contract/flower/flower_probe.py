"""A tiny federation whose results can be computed by hand: apps and server logic for the contracts.

Imported by the tests, by stock ``flower-supernode`` processes and by Flower's simulation engine.
"""

import time
from collections.abc import Iterable, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from numpy.typing import NDArray

from shared.tasks.spec import TaskSpec

CLIENT_APP = "tests.contract.flower.flower_probe:app"
TASK = TaskSpec("probe", "tests.contract.flower.flower_probe:none")
_RATE = np.float32(0.5)
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move half the way towards a point that depends on the node's partition alone."""
    (vector,) = message.content.array_records["parameters"].to_numpy_ndarrays()
    partition = int(context.node_config["partition-id"])
    moved = (vector + _RATE * (np.float32(partition + 1) - vector)).astype(np.float32)
    metrics = MetricRecord({"examples": partition + 1})
    content = RecordDict({"parameters": ArrayRecord([moved]), "metrics": metrics})
    return Message(content, reply_to=message)


@app.query("count")
def count(message: Message, context: Context) -> Message:
    """Say how many messages of this run this node has counted."""
    before = context.state.config_records.get("n", ConfigRecord({"n": 0}))["n"]
    assert isinstance(before, int)
    counted = before + 1
    context.state.config_records["n"] = ConfigRecord({"n": counted})
    return Message(RecordDict({"n": ConfigRecord({"n": counted})}), reply_to=message)


@app.query("fail")
def fail(message: Message, context: Context) -> Message:
    """Raise an error whose text quotes local data."""
    raise ValueError(f"row 17 holds the secret {message.metadata.run_id} {context.node_id}")


@app.query("sleep")
def sleep(message: Message, _: Context) -> Message:
    """Train for a long time."""
    time.sleep(60)
    return Message(message.content, reply_to=message)


def federate(grid: Grid, node_ids: Sequence[int], *, rounds: int) -> NDArray[np.float64]:
    """Average weighted by examples, over all nodes; return the parameters, shape (3,)."""
    vector = np.zeros(3, dtype=np.float32)
    for number in range(1, rounds + 1):
        content = RecordDict({"parameters": ArrayRecord([vector])})
        messages = [
            Message(content, node_id, "train", ttl=120.0, group_id=str(number))
            for node_id in node_ids
        ]
        vector = _mean(grid.send_and_receive(messages, timeout=120)).astype(np.float32)
    return vector.astype(np.float64)


def _mean(replies: Iterable[Message]) -> NDArray[np.float64]:
    total, weight = np.zeros(3), 0.0
    for reply in sorted(replies, key=_examples):
        (vector,) = reply.content.array_records["parameters"].to_numpy_ndarrays()
        total += _examples(reply) * vector.astype(np.float64)
        weight += _examples(reply)
    return total / weight


def _examples(reply: Message) -> float:
    value = reply.content.metric_records["metrics"]["examples"]
    assert isinstance(value, int | float)
    return float(value)
