"""One small real run, our own apps and all, that three kinds of Flower are to compute alike.

As a program it performs the run in Flower's simulation engine:
``python -m tests.contract.flower.small_run FOLDER [plain|secure]``.
"""

import csv
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid
from numpy.typing import NDArray

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.rounds.local_host import LocalHost
from cloud_coordinator.rounds.training_rounds import build_server_app, perform_run
from edge_agent.data_registry import DataRegistry
from edge_agent.enrolment import load_enrolment
from edge_agent.kept_sums import KeptSums, stop_keeper
from edge_agent.local_data import check_data, read_local_data
from edge_agent.membership import members_for
from edge_agent.training_app import build_client_app
from shared.parameters import load_parameters
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from shared.signing import SigningKey
from shared.tasks.spec import TaskSpec
from tests.enrolled_homes import FLEET, enrol_homes

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
PLAIN = RunPlan(
    name="pumps",
    task=TASK,
    rounds=2,
    seed=11,
    evaluate=False,
    privacy=PrivacyPlan(mode="plain"),
    training=TrainingPlan(batch_size=16),
    cohort=CohortPlan(size=DEVICES, quorum=DEVICES),
)
SECURE = msgspec.structs.replace(
    PLAIN,
    rounds=1,
    evaluate=True,
    # Lanes this wide round to less than the last bits of float32 that sums differ in anyway.
    privacy=PrivacyPlan(at_least=DEVICES - 1, lane_bits=32, stage_deadline_s=120),
)
PLANS = {"plain": PLAIN, "secure": SECURE}
POLICY = f"""
min_cohort = {DEVICES}
exact_sums = true
individual_updates = true
"""


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    parameters: NDArray[np.float32]  # shape (d,)
    metrics: Mapping[str, float]


def make_fleet(folder: Path) -> None:
    """Make the agents' homes, each with its own part of the data, and the coordinator's key."""
    homes = {f"edge-{device}": _make_home(folder, device) for device in range(DEVICES)}
    enrol_homes(homes, policy=POLICY, command_key=SigningKey.load_or_create(folder / "command.pem"))


def home_of(folder: Path, device: int) -> Path:
    """Return the home of one agent."""
    return folder / f"home-{device}"


def _make_home(folder: Path, device: int) -> Path:
    home = home_of(folder, device)
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


def perform(grid: Grid, folder: Path, plan: RunPlan, *, run_id: str) -> Result:
    """Perform a run over any Grid.

    Args:
        grid: reaches the devices.
        folder: of `make_fleet`.
        plan: one of `PLANS`.
        run_id: another one each time, since no device answers the same question of a run twice.
    """
    host = host_of(folder, plan, run_id)
    perform_run(host, grid)
    return result_of(host)


def host_of(folder: Path, plan: RunPlan, run_id: str) -> LocalHost:
    home = home_of(folder, 0)
    return LocalHost(
        plan,
        BlobStore(folder / run_id),
        run_id=run_id,
        fleet=FLEET,
        command_key=SigningKey.load_or_create(folder / "command.pem"),
        members=members_for(home, load_enrolment(home), 1),
        membership_version=1,
    )


def result_of(host: LocalHost) -> Result:
    """Return what the last round gave, in which all devices must have taken part."""
    assert not host.failure, host.failure
    for record in host.records[1:]:
        assert [part.outcome for part in record.participations] == ["replied"] * DEVICES, record
    last = host.records[-1]
    assert (last.round_number, last.parameters_sha256 is not None) == (host.plan.rounds, True)
    parameters = load_parameters(host.blobs.path_of(str(last.parameters_sha256)))
    return Result(parameters, last.metrics)


def simulate(folder: Path, plan: RunPlan) -> Result:
    """Perform the run in Flower's simulation engine, on the homes in ``folder``."""
    from flwr.simulation import run_simulation

    def home(context: Context) -> Path:
        return home_of(folder, int(context.node_config["partition-id"]))

    host = host_of(folder, plan, "simulated")
    run_simulation(
        server_app=build_server_app(host),
        client_app=build_client_app(
            lambda context: read_local_data(home(context) / "data.csv", TASK, name=DATA),
            sums_of=lambda context: KeptSums(home(context), keeper=folder),  # one for all
        ),
        num_supernodes=DEVICES,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    return result_of(host)


if __name__ == "__main__":
    here, chosen = Path(sys.argv[1]), sys.argv[2]
    try:
        simulated = simulate(here, PLANS[chosen])
    finally:
        stop_keeper(here)
    (here / f"simulated-{chosen}.json").write_bytes(msgspec.json.encode(dict(simulated.metrics)))
    np.save(here / f"simulated-{chosen}.npy", simulated.parameters)
    os._exit(0)  # Ray's own end takes seconds more
