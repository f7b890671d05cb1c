"""Real programs, from a join token to served predictions, and through crashes in the middle."""

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data, read_task_spec
from shared.messages import utc_now
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from simulations.datasets import ImageDataset, load_digits_images
from simulations.local_fleet import LocalFleet
from simulations.oip_client import InferenceClient

AGENTS = ("left", "right")
EXAMPLE_TASK = Path(__file__).parents[2] / "example_task"
DEADLINE_S = 150.0
PROGRAMS = f"{os.environ['PATH']}:/usr/sbin"
ENDED = {"finished", "failed", "stopped"}
HEAVY = re.compile(r"/(torch|onnx|flwr|grpc|sqlalchemy|pandas|scipy|sklearn)/.*\.so")


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_digits_images()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, digits: ImageDataset) -> Iterator[LocalFleet]:
    """Two agents, each with every second digit, and a coordinator on free ports."""
    fleet = LocalFleet(tmp_path_factory.mktemp("loop"))
    monkeypatch = pytest.MonkeyPatch()  # a user's own task is where Python finds it, on both sides
    monkeypatch.syspath_prepend(EXAMPLE_TASK)
    monkeypatch.setenv("PYTHONPATH", f"{EXAMPLE_TASK}:{os.environ.get('PYTHONPATH', '')}")
    try:
        start_coordinator(fleet)
        token = fleet.post("/v1/tokens", {"uses": len(AGENTS), "ttl_s": 600})["token"]
        for index, name in enumerate(AGENTS):
            fleet.enroll(name, token, policy="individual_updates = true\n")
            give_digits(fleet, name, digits, np.arange(index, len(digits.train), len(AGENTS)))
            fleet.start_agent(name, "--inference-port", "0")
        yield fleet
    finally:
        fleet.stop()
        monkeypatch.undo()


def start_coordinator(fleet: LocalFleet) -> None:
    # The demo's and the tutorial's tests run on the embedded broker, this one on production's.
    broker = "mosquitto" if shutil.which("mosquitto", path=PROGRAMS) else "embedded"
    ports = ("--port", "0", "--mqtt-port", "0", "--fleet-port", "0")
    fleet.start_coordinator(*ports, "--broker", broker)


def give_digits(
    fleet: LocalFleet, name: str, digits: ImageDataset, rows: np.ndarray[Any, Any]
) -> None:
    path = fleet.home / f"{name}.npz"
    part = digits.train.take(rows)
    np.savez(path, images=part.inputs, labels=part.targets)
    spec = digits.task(name="digits", model="small-cnn")
    DataRegistry(fleet.agent_home(name)).add(check_data("digits", path, spec, now=utc_now()))


def plan(digits: ImageDataset, *, rounds: int, name: str = "digits") -> Mapping[str, Any]:
    document: Mapping[str, Any] = msgspec.to_builtins(
        RunPlan(
            name=name,
            task=digits.task(name="digits", model="small-cnn"),
            rounds=rounds,
            seed=3,
            privacy=PrivacyPlan(mode="plain"),
            training=TrainingPlan(epochs=2, batch_size=16, learning_rate=0.05),
            cohort=CohortPlan(size=2, quorum=2, recruit_deadline_s=90, round_deadline_s=60),
        )
    )
    return document


def wait_until(
    fleet: LocalFleet, run_id: str, what: str, holds: Callable[[Mapping[str, Any]], bool]
) -> Mapping[str, Any]:
    def probe() -> Mapping[str, Any] | None:
        run: Mapping[str, Any] = fleet.get(f"/v1/runs/{run_id}")
        return run if holds(run) else None

    return fleet.wait_for(what, probe, deadline_s=DEADLINE_S)


def finished(fleet: LocalFleet, run_id: str) -> Mapping[str, Any]:
    run = wait_until(fleet, run_id, "the run to end", lambda run: run["state"] in ENDED)
    assert run["state"] == "finished", run["cause"]
    return run


def all_serve(fleet: LocalFleet, version: str) -> None:
    def probe() -> bool | None:
        reported = [device["reported"] or {} for device in fleet.get("/v1/devices")]
        return all(r.get("serving_version") == version for r in reported) or None

    fleet.wait_for("all agents to serve the version", probe, deadline_s=DEADLINE_S)


def committed_rounds(run: Mapping[str, Any]) -> list[int]:
    return [r["round_number"] for r in run["rounds"] if r["state"] == "committed"]


def endpoint(fleet: LocalFleet, name: str) -> str:
    status = fleet.command("edge_agent", "status", "--home", str(fleet.agent_home(name)), "--json")
    return str(msgspec.json.decode(status)["inference_url"])


def test_every_agent_serves_the_result_then_a_better_one_then_the_first_again_if_asked(
    fleet: LocalFleet, digits: ImageDataset
) -> None:
    first = finished(fleet, fleet.post("/v1/runs", plan(digits, rounds=1))["run_id"])
    all_serve(fleet, first["model_version"])
    second = finished(fleet, fleet.post("/v1/runs", plan(digits, rounds=6))["run_id"])
    assert second["model_version"] != first["model_version"]
    all_serve(fleet, second["model_version"])
    for name in AGENTS:
        with InferenceClient(endpoint(fleet, name), "digits") as client:
            assert client.versions == [second["model_version"]]
            answers = client.infer(digits.test.inputs.astype(np.float32)).argmax(axis=1)
        assert np.mean(answers == digits.test.targets) >= 0.9
    fleet.post("/v1/rollouts", {"version": first["model_version"]})
    all_serve(fleet, first["model_version"])


def test_a_run_ends_by_itself_after_its_coordinator_was_killed_in_mid_round(
    fleet: LocalFleet, digits: ImageDataset
) -> None:
    run_id = fleet.post("/v1/runs", plan(digits, rounds=8))["run_id"]
    wait_until(fleet, run_id, "round 2 to commit", lambda run: 2 in committed_rounds(run))
    assert fleet.coordinator is not None
    fleet.coordinator.kill()
    start_coordinator(fleet)
    run = finished(fleet, run_id)
    assert committed_rounds(run) == list(range(9))
    all_serve(fleet, run["model_version"])


def test_a_run_ends_by_itself_after_the_superlink_was_killed_in_mid_round(
    fleet: LocalFleet, digits: ImageDataset
) -> None:
    run_id = fleet.post("/v1/runs", plan(digits, rounds=8))["run_id"]
    wait_until(fleet, run_id, "round 2 to commit", lambda run: 2 in committed_rounds(run))
    os.kill(fleet.get("/v1/health")["children"]["superlink"]["pid"], signal.SIGKILL)
    run = finished(fleet, run_id)
    assert committed_rounds(run)[-1] == 8
    all_serve(fleet, run["model_version"])


def test_an_agent_killed_in_mid_round_stops_nobody_and_takes_part_again_when_it_is_back(
    fleet: LocalFleet, digits: ImageDataset
) -> None:
    patient = dict(plan(digits, rounds=500))
    patient["cohort"] = {**patient["cohort"], "quorum": 1}
    lost, other = AGENTS
    run_id = fleet.post("/v1/runs", patient)["run_id"]
    wait_until(
        fleet, run_id, "both to take part", lambda run: outcomes(run, lost)[-1:] == ["replied"]
    )

    fleet.kill_agent(lost)
    # Whether it was to train, or was about to be asked: the round goes on without its reply.
    run = wait_until(fleet, run_id, "a round without it", lambda run: not replied_last(run, lost))
    missed = [part for part in participations(run, lost) if part["outcome"] != "replied"]
    assert all(part["cause"] for part in missed)
    assert "failed" not in outcomes(run, other)
    rounds_before = len(run["rounds"])

    fleet.start_agent(lost, "--inference-port", "0")
    run = wait_until(
        fleet,
        run_id,
        "it to take part again",
        lambda run: len(run["rounds"]) > rounds_before and replied_last(run, lost),
    )
    assert committed_rounds(run) == list(range(len(run["rounds"])))
    fleet.post(f"/v1/runs/{run_id}/stop")
    wait_until(fleet, run_id, "the run to end", lambda run: run["state"] == "stopped")


def outcomes(run: Mapping[str, Any], device: str) -> list[str]:
    return [part["outcome"] for part in participations(run, device)]


def replied_last(run: Mapping[str, Any], device: str) -> bool:
    """Tell whether the device replied in the newest closed round."""
    last = run["rounds"][-1]["participations"]
    return any(p["device_id"] == device and p["outcome"] == "replied" for p in last)


def participations(run: Mapping[str, Any], device: str) -> list[Mapping[str, Any]]:
    return [
        part
        for record in run["rounds"]
        for part in record["participations"]
        if part["device_id"] == device
    ]


def test_an_agent_that_was_away_serves_the_current_version_when_it_returns(
    fleet: LocalFleet, digits: ImageDataset
) -> None:
    name = AGENTS[0]
    fleet.kill_agent(name)
    alone = dict(plan(digits, rounds=1))
    alone["cohort"] = {**alone["cohort"], "size": 1, "quorum": 1}
    run = finished(fleet, fleet.post("/v1/runs", alone)["run_id"])
    fleet.start_agent(name, "--inference-port", "0")
    all_serve(fleet, run["model_version"])


def test_a_task_of_one_s_own_is_learned_exported_and_served(
    fleet: LocalFleet, tmp_path: Path
) -> None:
    spec = read_task_spec(str(EXAMPLE_TASK / "TASK.toml"))
    for seed, name in enumerate(AGENTS):
        path = tmp_path / f"{name}.csv"
        points, moons = two_moons(np.random.default_rng(seed))
        rows = [f"{x:.4f},{y:.4f},{moon}" for (x, y), moon in zip(points, moons, strict=True)]
        path.write_text("\n".join(["x,y,moon", *rows]))
        entry = check_data("moons", path, spec, now=utc_now())
        DataRegistry(fleet.agent_home(name)).add(entry)
    own = RunPlan(
        name="moons",
        task=spec,
        rounds=4,
        privacy=PrivacyPlan(mode="plain"),
        training=TrainingPlan(epochs=15),
        cohort=CohortPlan(size=2, quorum=2, recruit_deadline_s=90),
    )

    run = finished(fleet, fleet.post("/v1/runs", msgspec.to_builtins(own))["run_id"])
    all_serve(fleet, run["model_version"])

    points, moons = two_moons(np.random.default_rng(9))
    for name in AGENTS:
        with InferenceClient(endpoint(fleet, name), "two-moons") as client:
            answers = client.infer(points.astype(np.float32)).argmax(axis=1)
        assert np.mean(np.array(["upper", "lower"])[answers] == moons) >= 0.95


def two_moons(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    """Draw 400 points, shape (400, 2), on two interleaved half circles, and their names."""
    angles, lower = rng.uniform(0, np.pi, 400), rng.random(400) < 0.5
    x = np.where(lower, 1 - np.cos(angles), np.cos(angles))
    y = np.where(lower, 0.5 - np.sin(angles), np.sin(angles))
    points = np.stack([x, y], axis=1) + rng.normal(0, 0.1, (400, 2))
    return points, np.where(lower, "lower", "upper")


def test_after_all_this_neither_daemons_nor_inference_servers_hold_a_heavy_library(
    fleet: LocalFleet,
) -> None:
    for name in AGENTS:
        daemon = fleet.agents[name].pid
        children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        servers = [pid for pid, command in commands.items() if "inference" in command]
        assert len(servers) == 1
        for pid in (daemon, *servers):
            assert not HEAVY.findall(Path(f"/proc/{pid}/maps").read_text())


def test_nothing_secret_stands_in_any_log(fleet: LocalFleet) -> None:
    secrets = [(fleet.coordinator_home / "admin-token").read_text().strip()]
    for path in (*fleet.home.rglob("*.pem"),):
        lines = path.read_text().splitlines()
        if "PRIVATE" in lines[0]:
            secrets += [line for line in lines[1:-1] if line]
    logs = [path.read_text(errors="replace") for path in fleet.home.rglob("*.log")]
    assert len(secrets) > 5
    assert not [secret for secret in secrets for log in logs if secret in log]


def test_secrets_are_readable_by_their_owner_alone(fleet: LocalFleet) -> None:
    for path in _secrets_of(fleet.home):
        assert path.stat().st_mode & 0o077 == 0, path


def _secrets_of(home: Path) -> list[Path]:
    keys = [p for p in home.rglob("*.pem") if "PRIVATE" in p.read_text()]
    return [*keys, *home.rglob("admin-token")]
