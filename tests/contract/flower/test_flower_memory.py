"""What a SuperLink remembers of rounds that are over: nothing, however many there were."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from cloud_coordinator.flower.grid import RunGrid, open_run
from edge_agent.flower_node import FlowerNode
from tests.contract.flower.conftest import LiveSuperLink

PARAMETERS = 250_000  # a megabyte each way in each round
WARM_UP, ROUNDS = 15, 45
MIB = 1024 * 1024


def test_memory_stays_flat_over_many_rounds(
    superlink: LiveSuperLink, join: Callable[..., FlowerNode]
) -> None:
    node = join()
    rng = np.random.default_rng(0)
    with open_run(**superlink.run_options()) as grid:
        perform(grid, node, rng, rounds=WARM_UP)
        before = resident_bytes(superlink.parent.pid)
        perform(grid, node, rng, rounds=ROUNDS)
        grown = resident_bytes(superlink.parent.pid) - before

    assert grown < 12 * MIB  # of the 90 MiB that passed through


def perform(grid: RunGrid, node: FlowerNode, rng: np.random.Generator, *, rounds: int) -> None:
    for number in range(rounds):
        vector = rng.normal(size=PARAMETERS).astype(np.float32)
        content = RecordDict({"parameters": ArrayRecord([vector])})
        message = Message(content, node.node_id, "train", ttl=60.0, group_id=str(number))
        pushed = grid.push_messages([message])
        assert list(node.work()) == pushed
        assert len(list(grid.iter_replies(pushed))) == 1


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
