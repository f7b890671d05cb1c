"""One small real run, our own apps and all, that three kinds of Flower are to compute alike.

As a program it performs the run in Flower's simulation engine:
``python -m tests.contract.flower.small_run FOLDER``.
"""

import csv
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid
from numpy.typing import NDArray

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.local_host import LocalHost
from cloud_coordinator.rounds.training_rounds import build_server_app, perform_run
from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import LocalData, check_data, read_local_data
from edge_agent.training_app import build_client_app
from shared.parameters import load_parameters
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from shared.tasks.spec import TaskSpec

DEVICES = 3
DATA = "meter"
_FEATURES = ("pressure", "flow")
TASK = TaskSpec(
    "pumps",
    "tabular",
    {
        "kind": "classification",
        "features": [{"name": name, "minimum": -5, "maximum": 5} for name in _FEATURES],
        "target": "state",
        "labels": ["ok", "failed"],
    },
)
PLAN = RunPlan(
    name="pumps",
    task=TASK,
    rounds=2,
    seed=11,
    evaluate=False,
    training=TrainingPlan(batch_size=16),
    cohort=CohortPlan(size=DEVICES, quorum=DEVICES),
)


def make_home(folder: Path, device: int) -> Path:
    """Return an agent's home whose owner has given a device's part of the data to the task."""
    home = folder / f"home-{device}"
    home.mkdir()
    rng = np.random.default_rng(device)
    with (home / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*_FEATURES, "state"])
        for row in rng.normal(loc=device - 1, size=(120, 2)).clip(-5, 5):
            writer.writerow([*row, "failed" if row.sum() > 0 else "ok"])
    entry = check_data(DATA, home / "data.csv", TASK, now=datetime.now(UTC))
    DataRegistry(home).add(entry)
    return home


def perform(grid: Grid, folder: Path) -> NDArray[np.float32]:
    """Perform the run over any Grid and return its final parameters, shape (d,)."""
    host = LocalHost(PLAN, BlobStore(folder))
    perform_run(host, grid)
    return result_of(host)


def result_of(host: LocalHost) -> NDArray[np.float32]:
    """Return the parameters of the last round, all of whose devices must have taken part."""
    assert not host.failure, host.failure
    for record in host.records[1:]:
        assert [part.outcome for part in record.participations] == ["replied"] * DEVICES, record
    last = host.records[-1]
    assert (last.round_number, last.parameters_sha256 is not None) == (PLAN.rounds, True)
    return load_parameters(host.blobs.path_of(str(last.parameters_sha256)))


def simulate(folder: Path) -> NDArray[np.float32]:
    """Perform the run in Flower's simulation engine, on the homes in ``folder``."""
    from flwr.simulation import run_simulation

    def load(context: Context) -> LocalData:
        return read_local_data(
            folder / f"home-{context.node_config['partition-id']}" / "data.csv", TASK
        )

    host = LocalHost(PLAN, BlobStore(folder / "simulated"))
    run_simulation(
        server_app=build_server_app(host),
        client_app=build_client_app(load),
        num_supernodes=DEVICES,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return result_of(host)


if __name__ == "__main__":
    here = Path(sys.argv[1])
    np.save(here / "simulated.npy", simulate(here))
    os._exit(0)  # Ray's own end takes seconds more
