"""Statistics asked of real agents by real programs: ``shoal stats`` from plan to figures."""

import json
import os
import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data, read_local_data
from shared.errors import UnavailableError
from shared.messages import utc_now
from shared.tasks.spec import TaskSpec
from simulations.local_fleet import LocalFleet

AGENTS = tuple(f"pump-house-{number}" for number in range(5))
POLICY = "min_cohort = 5\nexact_sums = true\n"
PROGRAMS = f"{os.environ['PATH']}:/usr/sbin"
TASK = """\
name = "pumps"
uses = "tabular"

[options]
kind = "classification"
features = [
    {name = "pressure", minimum = 0.0, maximum = 16.0},
    {name = "heat", minimum = -20.0, maximum = 120.0},
]
target = "state"
labels = ["ok", "worn", "failed"]
"""
PLAN = """\
name = "pumps-stats"
task = "pumps.toml"

[cohort]
size = 5

[privacy]
noise = "{noise}"
at_least = 4
drop_fraction = 0.2

[statistics]
max_rows = 400

[[statistics.of]]
kind = "count"

[[statistics.of]]
kind = "variance"
feature = "heat"

[[statistics.of]]
kind = "histogram"
feature = "pressure"
bins = 8

[[statistics.of]]
kind = "quantiles"
feature = "heat"
at = [0.5, 0.9]

[[statistics.of]]
kind = "labels"

[[statistics.of]]
kind = "rows-per-device"
"""
SPEC = TaskSpec(
    "pumps",
    "tabular",
    {
        "kind": "classification",
        "features": [
            {"name": "pressure", "minimum": 0.0, "maximum": 16.0},
            {"name": "heat", "minimum": -20.0, "maximum": 120.0},
        ],
        "target": "state",
        "labels": ["ok", "worn", "failed"],
    },
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Five agents with rows of their own, unequally many, and a coordinator on free ports."""
    fleet = LocalFleet(tmp_path_factory.mktemp("statistics"))
    try:
        broker = "mosquitto" if shutil.which("mosquitto", path=PROGRAMS) else "embedded"
        ports = ("--port", "0", "--mqtt-port", "0", "--fleet-port", "0")
        fleet.start_coordinator(*ports, "--broker", broker)
        token = fleet.post("/v1/tokens", {"uses": len(AGENTS), "ttl_s": 600})["token"]
        for index, name in enumerate(AGENTS):
            fleet.enroll(name, token, policy=POLICY)
            path = write_rows(fleet.home / f"{name}.csv", index)
            entry = check_data("mine", path, SPEC, now=utc_now())
            DataRegistry(fleet.agent_home(name)).add(entry)
            fleet.start_agent(name, "--inference-port", "0")
        yield fleet
    finally:
        fleet.stop()


def write_rows(path: Path, index: int) -> Path:
    rng = np.random.default_rng(index)
    lines = ["pressure,heat,state"]
    for _ in range(120 + 60 * index):
        state = rng.choice(["ok", "worn", "failed"], p=[0.7, 0.2, 0.1])
        heat = np.clip(rng.normal(55 + 5 * index, 12), -20, 120)
        lines.append(f"{rng.uniform(0, 16):.4f},{heat:.4f},{state}")
    path.write_text("\n".join(lines) + "\n")
    return path


def pooled(fleet: LocalFleet) -> tuple[list[int], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return how many training rows each agent has, and all pressures, heats and classes."""
    parts = [read_local_data(fleet.home / f"{name}.csv", SPEC).train for name in AGENTS]
    inputs = np.concatenate([part.inputs for part in parts]).astype(np.float64)
    targets = np.concatenate([part.targets for part in parts])
    return [len(part) for part in parts], inputs[:, 0], inputs[:, 1], targets


def shoal(fleet: LocalFleet, *argv: str) -> str:
    return fleet.command("cloud_coordinator", *argv, "--home", str(fleet.coordinator_home))


def ask(fleet: LocalFleet, noise: str) -> Mapping[str, Any]:
    """Ask as an operator does, and return the run."""
    (fleet.home / "pumps.toml").write_text(TASK)
    plan = fleet.home / f"{noise}.toml"
    plan.write_text(PLAN.format(noise=noise))
    run: Mapping[str, Any] = json.loads(
        shoal(fleet, "stats", "start", str(plan), "--watch", "--json")
    )
    return run


def answers_of(run: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    (answered,) = [record for record in run["rounds"] if record["answers"]]
    return {answer["kind"]: answer for answer in answered["answers"]}


def charges(fleet: LocalFleet, name: str) -> list[tuple[str, str, str]]:
    with closing(sqlite3.connect(fleet.agent_home(name) / "privacy.db")) as ledger:
        rows = ledger.execute("SELECT purpose, part, kind FROM charges ORDER BY charged_at")
        return rows.fetchall()


def test_exact_figures_equal_those_of_the_pooled_rows_and_are_booked_by_every_device(
    fleet: LocalFleet,
) -> None:
    run = ask(fleet, "none")

    assert (run["state"], run["model_version"]) == ("finished", None)
    sizes, pressures, heats, targets = pooled(fleet)
    found = {kind: answer["values"] for kind, answer in answers_of(run).items()}
    assert found["count"] == {"count": sum(sizes)}
    counts, _ = np.histogram(pressures, bins=8, range=(0, 16))
    assert list(found["histogram"].values()) == counts.tolist()
    assert list(found["labels"].values()) == np.bincount(targets, minlength=3).tolist()
    assert found["variance"]["mean"] == pytest.approx(heats.mean(), rel=1e-6)
    assert found["variance"]["variance"] == pytest.approx(heats.var(), rel=1e-4)
    leaf = 140 / 2**8
    assert found["quantiles"]["q0.5"] == pytest.approx(np.quantile(heats, 0.5), abs=leaf)
    assert found["quantiles"]["q0.9"] == pytest.approx(np.quantile(heats, 0.9), abs=leaf)
    assert sum(v for k, v in found["rows-per-device"].items() if k != "p90") == len(AGENTS)
    for name in AGENTS:
        assert charges(fleet, name)[-1] == ("statistics", "train", "exact")

    shown = " ".join(shoal(fleet, "stats", "show", run["run_id"]).split())
    assert f"count count {sum(sizes)} exact" in shown
    assert run["run_id"] in shoal(fleet, "stats", "list")
    assert run["run_id"] in shoal(fleet, "run", "list")
    assert f"shoal stats show {run['run_id']}" in shoal(fleet, "run", "show", run["run_id"])


def test_noised_figures_are_within_what_they_state_and_charged_by_their_curve(
    fleet: LocalFleet,
) -> None:
    run = ask(fleet, "distributed")

    assert run["state"] == "finished"
    sizes, _, _, targets = pooled(fleet)
    found = answers_of(run)
    (labels,) = [found["labels"]]
    for value, error, true in zip(
        labels["values"].values(),
        labels["standard_error"].values(),
        np.bincount(targets, minlength=3),
        strict=True,
    ):
        assert error > 0
        assert abs(value - true) < 6 * error
    assert found["count"]["values"] != {"count": sum(sizes)}
    assert charges(fleet, AGENTS[0])[-1] == ("statistics", "train", "noised")


def test_owners_who_want_no_statistics_stop_a_sum_that_needs_all(fleet: LocalFleet) -> None:
    policy = fleet.agent_home(AGENTS[0]) / "policy.toml"
    policy.write_text(f"{POLICY}statistics = false\n")
    try:
        with pytest.raises(UnavailableError, match="attempts were abandoned") as caught:
            ask(fleet, "none")
    finally:
        policy.write_text(POLICY)

    assert "statistics = false in policy.toml" in str(caught.value)
