"""From real devices' ranges and judgement to the files that agents can choose from."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data
from shared.messages import utc_now
from shared.tasks.spec import TaskSpec
from simulations.local_fleet import LocalFleet

AGENTS = tuple(f"pump-house-{number}" for number in range(5))
POLICY = "min_cohort = 5\nexact_sums = true\n"
PROGRAMS = f"{os.environ['PATH']}:/usr/sbin"
DEADLINE_S = 150.0
ENDED = {"finished", "failed", "stopped"}
STEPS = ["distil", "scratch", "probe", "calibrate", "build", "judge", "sign"]
STATIC = {"int8-vnni", "int8-x86", "int8-arm"}
SPEC = TaskSpec(
    "pumps",
    "tabular",
    {
        "kind": "classification",
        "model": "mlp",
        "features": [
            {"name": "pressure", "minimum": 0.0, "maximum": 16.0},
            {"name": "heat", "minimum": -20.0, "maximum": 120.0},
        ],
        "target": "state",
        "labels": ["ok", "worn", "failed"],
    },
)


def plan(name: str, **judge: Any) -> dict[str, Any]:
    return {
        "name": name,
        "task": {"name": SPEC.name, "uses": SPEC.uses, "options": SPEC.options},
        "rounds": 1,
        "evaluate": False,
        "cohort": {"size": 5},
        "privacy": {"at_least": 4, "drop_fraction": 0.2},
        "compression": {
            "int8": True,
            "calibration_noise": "none",
            "calibration_max_rows": 100,
            "distil": {"student": "mlp", "rounds": 2},
        },
        "judge": {"noise": "none", "min_devices": 4, "max_latency_ratio": 20, **judge},
    }


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Five agents with rows of their own, and a coordinator on free ports."""
    fleet = LocalFleet(tmp_path_factory.mktemp("compression"))
    try:
        start_coordinator(fleet)
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


def start_coordinator(fleet: LocalFleet) -> None:
    broker = "mosquitto" if shutil.which("mosquitto", path=PROGRAMS) else "embedded"
    ports = ("--port", "0", "--mqtt-port", "0", "--fleet-port", "0")
    fleet.start_coordinator(*ports, "--broker", broker)


def write_rows(path: Path, index: int) -> Path:
    rng = np.random.default_rng(index)
    pressures, heats = rng.uniform(0, 16, 200), np.clip(rng.normal(55, 20, 200), -20, 120)
    states = np.where(heats > 80, "failed", np.where(pressures > 12, "worn", "ok"))
    rows = zip(pressures, heats, states, strict=True)
    lines = ["pressure,heat,state", *(f"{p:.4f},{h:.4f},{s}" for p, h, s in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def job_of(fleet: LocalFleet, run_id: str) -> Mapping[str, Any]:
    job: Mapping[str, Any] = fleet.get(f"/v1/compressions/{run_id}")
    return job


def wait_for_state(fleet: LocalFleet, run_id: str, states: set[str]) -> Mapping[str, Any]:
    def probe() -> Mapping[str, Any] | None:
        run: Mapping[str, Any] = fleet.get(f"/v1/runs/{run_id}")
        return run if run["state"] in states else None

    return fleet.wait_for(f"run {run_id} to be {states}", probe, deadline_s=DEADLINE_S)


def until_calibrating(fleet: LocalFleet, run_id: str) -> str:
    """Wait until devices are asked for ranges, and return the run that asks them."""

    def probe() -> str | None:
        runs = {run["run_id"]: run["state"] for run in fleet.get("/v1/runs")}
        wanted = f"{run_id}-calibrate"
        return wanted if runs.get(wanted) in {"recruiting", "running"} else None

    return fleet.wait_for("devices to be asked for ranges", probe, deadline_s=DEADLINE_S)


def test_ranges_become_static_int8_although_the_coordinator_is_killed_in_between(
    fleet: LocalFleet,
) -> None:
    run_id = fleet.post("/v1/runs", plan("pumps"))["run_id"]
    until_calibrating(fleet, run_id)
    assert [step["step"] for step in job_of(fleet, run_id)["steps"]] == STEPS[:3]
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    start_coordinator(fleet)

    run = wait_for_state(fleet, run_id, ENDED)
    assert run["state"] == "finished", run["cause"]
    job = job_of(fleet, run_id)
    assert [step["step"] for step in job["steps"]] == STEPS
    assert job["steps"][3]["result"] == f"measured by run {run_id}-calibrate"
    runs = {r["run_id"]: r for r in fleet.get("/v1/runs")}
    assert {name: r["purpose"] for name, r in runs.items()} == {
        run_id: "train",
        f"{run_id}-distil": "train",
        f"{run_id}-scratch": "train",
        f"{run_id}-calibrate": "statistics",
        f"{run_id}-judge": "judge",
    }
    assert [name for name, r in runs.items() if r["model_version"]] == [run_id]
    version = fleet.get(f"/v1/models/{run['model_version']}")
    judgement = version["judgement"]
    assert judgement["devices"] >= 4
    assert judgement["reference"] == "its own fp32 file"
    judged = {each["variant"]: each["verdicts"] for each in judgement["variants"]}
    assert set(judged) == {v["variant"] for v in version["variants"]}
    assert version["ship"] in judged
    static = {v["variant"]: v for v in version["variants"] if v["variant"] in STATIC}
    assert set(static) == STATIC
    for variant in static.values():
        assert variant["passed"], variant["cause"]
        assert variant["step"].startswith("q0.9")
        assert variant["relative_error"] < 0.05

    def all_serve() -> bool | None:
        reported = [device["reported"] or {} for device in fleet.get("/v1/devices")]
        return all(r.get("serving_version") == run["model_version"] for r in reported) or None

    fleet.wait_for("all agents to serve the version", all_serve, deadline_s=DEADLINE_S)


def test_a_version_that_is_worse_on_the_devices_is_held_back_and_named(
    fleet: LocalFleet,
) -> None:
    """It learned next to nothing, and computes that perfectly."""
    before = {d["device_id"]: d["reported"] for d in fleet.get("/v1/devices")}
    bad = {**plan("pumps"), "name": "hasty", "seed": 3}
    bad["compression"] = {"int8": False}
    bad["training"] = {"learning_rate": 1e-9}
    run_id = fleet.post("/v1/runs", bad)["run_id"]

    run = wait_for_state(fleet, run_id, ENDED)
    assert run["state"] == "failed"
    (served,) = {r["serving_version"] for r in before.values()}
    assert f"no variant passed on the devices, compared with version {served[:12]}" in run["cause"]
    assert "fp32: score: it loses" in run["cause"]
    job = job_of(fleet, run_id)
    assert [step["step"] for step in job["steps"]] == ["build"]
    for judged in job["judgement"]["variants"]:
        assert "fail" in {verdict["outcome"] for verdict in judged["verdicts"]}
    after = {d["device_id"]: d["reported"] for d in fleet.get("/v1/devices")}
    assert {r["serving_version"] for r in after.values()} == {served}
    shown = fleet.command(
        "cloud_coordinator", "compression", "show", run_id, "--home", str(fleet.coordinator_home)
    )
    for words in ("judged on", f"version {served[:12]}", "score", "it loses"):
        assert words in shown


def test_the_commands_show_what_was_done(fleet: LocalFleet) -> None:
    home = ("--home", str(fleet.coordinator_home))
    jobs = json.loads(fleet.command("cloud_coordinator", "compression", "list", "--json", *home))
    job = jobs[-1]
    shown = fleet.command("cloud_coordinator", "compression", "show", job["run_id"], *home)
    for words in (
        "ranges of",
        "measured by run",
        "compute what torch does",
        "passed on",
        "version",
    ):
        assert words in shown
    assert job["run_id"] in fleet.command("cloud_coordinator", "compression", "list", *home)
