"""Seven real agents and a coordinator, broker and agents tapped, and all local data unusual."""

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud_coordinator.rounds.cohort import training_seed
from cloud_coordinator.rounds.initial_model import initial_parameters
from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import LocalData, check_data, read_local_data
from edge_agent.training import train
from edge_agent.training_app import device_seed
from shared.listening import free_port
from shared.messages import utc_now
from shared.parameters import Vector, load_parameters
from shared.privacy_plan import PrivacyPlan
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from shared.tasks.spec import TaskSpec
from simulations.local_fleet import LocalFleet
from tests.integration.security.mqtt_tap import MqttTap

DEVICES = tuple(f"edge-{number}" for number in range(7))
FEATURES = ("first", "second", "third")
LABELS = ("calm", "storm")
TASK = TaskSpec(
    "weather",
    "tabular",
    {
        "kind": "classification",
        "features": [{"name": name, "minimum": -50, "maximum": 50} for name in FEATURES],
        "target": "state",
        "labels": list(LABELS),
    },
)
POLICY = "min_cohort = 5\nexact_sums = true\nindividual_updates = true\n"
WIRETAP = Path(__file__).parent / "wiretap"
DEADLINE_S = 120.0
_NOTHING: Mapping[str, int] = MappingProxyType({})
_seeds = itertools.count(1)
ENDED = {"finished", "failed", "stopped"}


def plan(*, rounds: int = 1000, evaluate: bool = False, **given: Any) -> RunPlan:
    """Return a run of secure sums in which two of the seven may vanish.

    Each begins with another model: devices refuse exact sums from the same one whose survivors
    differ by a few.
    """
    return RunPlan(
        name="weather",
        task=TASK,
        rounds=rounds,
        seed=next(_seeds),
        deploy=False,
        evaluate=evaluate,
        privacy=given.pop(
            "privacy",
            PrivacyPlan(
                at_least=4, lane_bits=32, max_weight=30_000, clip_norm=4.0, stage_deadline_s=15
            ),
        ),
        training=TrainingPlan(batch_size=512, learning_rate=0.05),
        cohort=CohortPlan(
            **{
                "size": len(DEVICES),
                "quorum": 5,
                "recruit_deadline_s": 60,
                "round_deadline_s": 30,
                **given,
            }
        ),
    )


def committed(run: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records of a run's rounds that gave a model; the first is the initial one."""
    return [record for record in run["rounds"] if record["state"] == "committed"]


@dataclass(frozen=True)
class Canaries:
    """What one device's data hold and nobody else's."""

    values: tuple[float, ...]  # of features; in usable rows
    words: tuple[str, ...]  # as text anywhere in the file, or its name
    rows: tuple[int, int]  # of each label


class LiveSums:
    """The processes, the taps, and what a test asks of them."""

    def __init__(self, home: Path, environment: pytest.MonkeyPatch) -> None:
        self.home, self.wire = home, home / "wire"
        self.wire.mkdir()
        self.fleet = LocalFleet(home / "fleet")
        self.tap = MqttTap(home / "broker")
        self.canaries: dict[str, Canaries] = {}
        self._environment = environment
        self._ports = [str(free_port()) for _ in range(2)]

    def start(self) -> None:
        """Start all programs, and enrol all devices."""
        self.start_coordinator()
        uses = {"uses": len(DEVICES), "ttl_s": 600}
        token = self.fleet.post("/v1/tokens", uses)["token"]
        for number, name in enumerate(DEVICES):
            self.fleet.enroll(name, token, policy=POLICY)
            self._give_data(number, name)
            self.start_agent(name)

    def start_coordinator(self) -> None:
        """Start it, on the same ports each time."""
        api, flower = self._ports
        self.fleet.start_coordinator(
            "--port", api, "--fleet-port", flower, "--broker", self.tap.url
        )

    def start_agent(self, name: str) -> None:
        """Start one that writes down what it sends, and what it hides."""
        with self._environment.context() as here:
            paths = [str(WIRETAP), *filter(None, [os.environ.get("PYTHONPATH")])]
            here.setenv("PYTHONPATH", os.pathsep.join(paths))
            here.setenv("WIRETAP_FOLDER", str(self.wire))
            self.fleet.start_agent(name, "--inference-port", "0")

    def close(self) -> None:
        """End everything."""
        self.tap.hook = lambda _: ()
        self.fleet.stop()
        self.tap.close()

    # --- data -------------------------------------------------------------------------------------

    def _give_data(self, number: int, name: str) -> None:
        rng = np.random.default_rng(number)
        path = self.home / f"ward-of-doctor-{'abcdefg'[number]}quist.csv"
        rare = tuple(round(float(v), 9) for v in rng.uniform(20, 40, 3))
        rows = (10_007 + 211 * number, 10_103 + 307 * number)
        lines = [",".join((*FEATURES, "state"))]
        for label, count in zip(LABELS, rows, strict=True):
            values = rng.normal(-1 if label == "calm" else 1, 1, (count, 3)).round(3)
            values[:50] = rare
            lines += [",".join(map(str, (*row, label))) for row in values]
        stranger = f"never-heard-of-{'abcdefg'[number]}-before"
        lines += [f"1,2,3,{stranger}", f"{77_000_000 + number}.25,2,3,calm"]  # rows to be left out
        path.write_text("\n".join(lines) + "\n")
        entry = check_data("weather", path, TASK, now=utc_now())
        assert sum(entry.skipped.values()) == 2
        DataRegistry(self.fleet.agent_home(name)).add(entry)
        words = (stranger, path.stem, f"{77_000_000 + number}.25")
        self.canaries[name] = Canaries(rare, words, rows)

    @cached_property
    def data(self) -> Mapping[str, LocalData]:
        """What each device reads."""
        registries = {name: DataRegistry(self.fleet.agent_home(name)) for name in DEVICES}
        return {
            name: read_local_data(Path(registry.find(TASK).path), TASK)
            for name, registry in registries.items()
        }

    # --- runs -------------------------------------------------------------------------------------

    def start_run(self, asked: RunPlan) -> str:
        """Start a run and return its id."""
        self._await_online()
        return str(self.fleet.post("/v1/runs", msgspec.to_builtins(asked))["run_id"])

    def _await_online(self) -> None:
        def online() -> bool | None:
            found = [device["online"] for device in self.fleet.get("/v1/devices")]
            return (len(found) == len(DEVICES) and all(found)) or None

        self.fleet.wait_for("all agents to be online", online, deadline_s=DEADLINE_S)

    def watch(
        self, asked: RunPlan, enough: Callable[[Mapping[str, Any]], bool]
    ) -> Mapping[str, Any]:
        """Start a run, stop it when ``enough`` says so of it, and return it."""
        return self.follow(self.start_run(asked), enough)

    def follow(
        self,
        run_id: str,
        enough: Callable[[Mapping[str, Any]], bool],
        *,
        between: Callable[[], None] = lambda: None,
        deadline_s: float = DEADLINE_S,
    ) -> Mapping[str, Any]:
        """Stop a run when ``enough`` says so of it, and return it; its export takes too long."""
        stopped = False

        def probe() -> Mapping[str, Any] | None:
            nonlocal stopped
            between()
            run: Mapping[str, Any] = self.fleet.get(f"/v1/runs/{run_id}")
            if self.tap.failure is not None:
                raise self.tap.failure
            if run["state"] not in ENDED and enough(run) and not stopped:
                self.fleet.post(f"/v1/runs/{run_id}/stop")
                stopped = True
            return run if run["state"] in ENDED else None

        run = self.fleet.wait_for("the run to end", probe, deadline_s=deadline_s)
        assert stopped, run["cause"]
        return run

    def committed(self, run: Mapping[str, Any]) -> Vector:
        """Return the parameters of the last round that was committed."""
        digest = committed(run)[-1]["parameters_sha256"]
        (path,) = (self.fleet.coordinator_home / "blobs").rglob(f"*{digest}*")
        return load_parameters(path)

    def averaged_by_hand(self, asked: RunPlan, run: Mapping[str, Any]) -> Vector:
        """Return what averaging the updates of each round gives, without us in between."""
        parameters = initial_parameters(asked.task, asked.seed)
        for record in committed(run)[1:]:
            parts = [
                self.data[part["device_id"]]
                for part in record["participations"]
                if part["outcome"] == "replied"
            ]
            number = record["round_number"]
            seed = training_seed(asked.seed, number)
            trained = [
                train(
                    part.task,
                    parameters,
                    part.train,
                    asked.training,
                    seed=device_seed(seed, number, part.digest),
                ).parameters.astype(np.float64)
                for part in parts
            ]
            weights = [len(part.train) for part in parts]
            parameters = np.average(trained, axis=0, weights=weights).astype(np.float32)
        return parameters

    # --- processes --------------------------------------------------------------------------------

    def kill(self, victim: str) -> None:
        """End at once "coordinator", "worker", "superlink", an agent, or "trainer of" one."""
        coordinator = self.fleet.coordinator
        if victim == "coordinator":
            assert coordinator is not None
            self.fleet.coordinator = None  # whoever polls does not miss it
            coordinator.kill()
        elif victim in {"worker", "superlink"}:
            assert coordinator is not None
            word = "run_worker" if victim == "worker" else "superlink_process"
            _kill_child(coordinator.pid, word)
        elif victim.startswith("trainer of "):
            agent = self.fleet.agents[victim.removeprefix("trainer of ")]
            _kill_child(agent.pid, "edge_agent.trainer")
        else:
            self.fleet.kill_agent(victim)

    # --- what was heard ---------------------------------------------------------------------------

    def sent(self, *, after: Mapping[str, int] = _NOTHING) -> Sequence[bytes]:
        """Return what devices have sent, one stream for each connection.

        Args:
            after: leaves out what `marks` saw at an earlier time.
        """
        paths = sorted(self.wire.glob("*.sent"))
        return [path.read_bytes()[after.get(path.name, 0) :] for path in paths]

    def marks(self) -> Mapping[str, int]:
        """Return how much each connection has sent by now."""
        return {path.name: path.stat().st_size for path in self.wire.glob("*.sent")}

    def hidden(self, kind: str, *, after: Mapping[str, int] = _NOTHING) -> list[dict[str, Any]]:
        """Return what devices kept to themselves, one kind of what the wiretap notes.

        Args:
            kind: see wiretap/sitecustomize.py.
            after: leaves out what `noted` counted at an earlier time.
        """
        found: list[dict[str, Any]] = []
        for path in sorted(self.wire.glob("*.hidden")):
            lines = path.read_text().splitlines()
            found += [json.loads(line) for line in lines[after.get(path.name, 0) :]]
        return [one for one in found if one["kind"] == kind]

    def noted(self) -> Mapping[str, int]:
        """Return how many things each process has kept to itself by now."""
        paths = self.wire.glob("*.hidden")
        return {path.name: len(path.read_text().splitlines()) for path in paths}


def _kill_child(parent: int, word: str) -> None:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (pid,) = (int(pid) for pid in children if word in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(pid, signal.SIGKILL)
    while _is_alive(pid):
        time.sleep(0.005)


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def live_sums(home: Path) -> Iterator[LiveSums]:
    """Start everything, and end it."""
    environment = pytest.MonkeyPatch()
    live = LiveSums(home, environment)
    try:
        live.start()
        yield live
    finally:
        live.close()
        environment.undo()
