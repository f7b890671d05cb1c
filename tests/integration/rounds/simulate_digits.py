"""Performs the rounds of `digits_plan` in Flower's simulation engine; arguments HOME and ROUNDS.

A program of its own, because Ray wants a process of its own. Blobs and ``records.json`` go to HOME.
"""

import functools
import sys
from pathlib import Path

import msgspec
from flwr.app import Context
from flwr.simulation import run_simulation

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.local_host import LocalHost
from cloud_coordinator.rounds.training_rounds import build_server_app
from edge_agent.local_data import LocalData, read_local_data
from edge_agent.sum_access import NoOwner
from edge_agent.training_app import build_client_app
from tests.integration.rounds.live_rounds import DEVICES, TASK, digits_plan


@functools.cache
def read_part(folder: str, part: int) -> LocalData:
    return read_local_data(Path(folder) / f"{DEVICES[part]}.npz", TASK)


def main() -> None:
    home, rounds = Path(sys.argv[1]), int(sys.argv[2])

    def load(context: Context) -> LocalData:
        return read_part(str(home), int(context.node_config["partition-id"]))

    host = LocalHost(digits_plan(rounds=rounds), BlobStore(home / "blobs"))
    run_simulation(
        server_app=build_server_app(host),
        client_app=build_client_app(load, sums_of=lambda _: NoOwner()),
        num_supernodes=len(DEVICES),
        backend_config={"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 2}},
    )
    (home / "records.json").write_bytes(msgspec.json.encode(host.records))
