"""The whole loop on this machine, with real parts: what ``make demo`` runs.

A coordinator and its agents start as separate processes; each agent owns a skewed part of a real
data set; they train together, the result is exported, compressed with ranges that they measured,
judged by them, signed, delivered, self-tested and served, by one agent first and then by all; then
the same test images go to each agent's endpoint. At last a version that is far too slow is rolled
out on purpose, and turned back by itself. Started again on the same folder, the demo goes on with
the devices, and with the run, that are there.
"""

import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.live import Live

from edge_agent.data_registry import DataRegistry
from edge_agent.enrolment import is_enrolled
from edge_agent.local_data import check_data
from edge_agent.privacy.policy import POLICY_FILE
from edge_agent.training import evaluate
from shared.compression_plan import CompressionPlan
from shared.errors import ConfigError, DataError, UnavailableError
from shared.files import explained_disk_errors, make_folder, write_atomic
from shared.judge_plan import JudgePlan
from shared.messages import utc_now
from shared.privacy_plan import PrivacyPlan
from shared.rollout_plan import RolloutPlan, WavePlan
from shared.run_plan import CohortPlan, RunPlan, TrainingPlan
from shared.tasks.examples import Examples
from shared.tasks.registry import load_task
from shared.tasks.spec import TaskSpec
from shared.tasks.task import seeded_model
from shared.tasks.vectors import to_vector
from simulations import demo_view
from simulations.datasets import ImageDataset, load_images
from simulations.local_fleet import LocalFleet
from simulations.oip_client import InferenceClient
from simulations.partition import dirichlet_partition

ALPHA = 0.3
MIN_COHORT = 5  # what the agents' owners ask of every sum
POLICY = f"min_cohort = {MIN_COHORT}\nexact_sums = true\n"
MAX_WEIGHT = 30_000  # examples; an agent that has more counts as if it had so many
TEST_BATCH = 100
LATENCY_REQUESTS = 200
ROLLOUT = RolloutPlan(
    waves=(WavePlan(devices=1, bake_s=2), WavePlan(percent=100, bake_s=0)), watch_s=1
)
_ENDED = {"finished", "failed", "stopped"}
_ROLLED = {"completed", "rolled_back", "dropped", "paused"}


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What a person may change on the command line."""

    home: Path
    data: Path | None = None
    agents: int = 5
    rounds: int = 10
    seed: int = 7
    keep: bool = False


def run_demo(options: DemoOptions, console: Console) -> None:
    """Run the loop from nothing to served predictions, and show each step.

    Raises:
        ShoalError: a step failed or took longer than its deadline; all children are ended.
    """
    if options.agents < MIN_COHORT:
        raise ConfigError(
            f"{options.agents} agents are too few: their owners' policy lets no device into a sum "
            f"of fewer than {MIN_COHORT} (min_cohort); take --agents {MIN_COHORT} or more"
        )
    dataset = load_images(options.data)
    console.print(
        f"[bold]Shoal[/]: {options.agents} agents learn [bold]{dataset.title}[/] together "
        f"({len(dataset.train):,} training and {len(dataset.test):,} test images, "
        f"seed {options.seed}). No image leaves its agent, and of what the agents learn the "
        "coordinator only ever sees the sum."
    )
    fleet = LocalFleet(options.home, outlive_us=options.keep)
    try:
        _Demo(options, console, dataset, fleet).run()
    except BaseException:
        _end(console, fleet)
        raise
    if options.keep:
        _say_what_runs(console, fleet)
        _say_where(console, fleet)
    else:
        _end(console, fleet)


class _Demo:
    """The steps, in order; each shows what it did."""

    def __init__(
        self, options: DemoOptions, console: Console, dataset: ImageDataset, fleet: LocalFleet
    ) -> None:
        self.options, self.console, self.dataset, self.fleet = options, console, dataset, fleet
        self.names = [f"agent-{number}" for number in range(1, options.agents + 1)]
        self.task = dataset.task(name="demo-images", model="small-cnn")
        self.slow_task = dataset.task(name="demo-images", model="wide-cnn")

    def run(self) -> None:
        self._start_coordinator()
        self._prepare_agents()
        self._start_agents()
        run = self._train()
        version = self._await_version(run)
        self._await_rollout(version["version"], ends_as="completed")
        self._measure(version)
        self._ship_a_bad_one(version["version"])

    def _start_coordinator(self) -> None:
        with self.console.status("starting the coordinator, its broker and its SuperLink …"):
            self.fleet.start_coordinator("--port", "0", "--mqtt-port", "0", "--fleet-port", "0")
        self.console.print(f"[green]✓[/] coordinator at {self.fleet.api_url}")

    def _prepare_agents(self) -> None:
        parts = self._deal()
        labels = self.dataset.labels
        counts = {n: np.bincount(parts[n].targets, minlength=len(labels)) for n in parts}
        self.console.print(demo_view.partition_table(counts, labels))
        fresh = [n for n in self.names if not is_enrolled(self.fleet.agent_home(n))]
        with self.console.status("enrolling agents and checking their data …"):
            if fresh:
                token = self.fleet.post("/v1/tokens", {"uses": len(fresh), "ttl_s": 600})["token"]
            for name in fresh:
                self.fleet.enroll(name, token)
            for name in self.names:
                if not self._has_data(name):
                    self._give_data(name, parts[name])
        self.console.print(
            f"[green]✓[/] {len(self.names)} agents are enrolled ({len(fresh)} of them now), "
            "each with its own data and its owner's policy:\n"
            f"  min_cohort = {MIN_COHORT}     this device is in no sum of fewer devices\n"
            "  exact_sums = true  sums without noise are allowed, and counted"
        )

    def _deal(self) -> dict[str, Examples]:
        train = self.dataset.train
        rng = np.random.default_rng(self.options.seed)
        try:
            parts = dirichlet_partition(
                train.targets, devices=len(self.names), alpha=ALPHA, rng=rng
            )
        except ValueError as error:
            raise ConfigError(f"{error}; choose fewer --agents") from error
        return {name: train.take(rows) for name, rows in zip(self.names, parts, strict=True)}

    def _has_data(self, name: str) -> bool:
        """Return whether the agent owns its part of this data set, dealt as this time."""
        try:
            entry = DataRegistry(self.fleet.agent_home(name)).find(self.task)
        except DataError:
            return False
        return entry.path == str(self._part_path(name))

    def _part_path(self, name: str) -> Path:
        dealt = f"seed-{self.options.seed}-for-{self.options.agents}"
        return self.fleet.home / "data" / dealt / f"{name}.npz"

    def _give_data(self, name: str, part: Examples) -> None:
        path = self._part_path(name)
        make_folder(path.parent)
        with explained_disk_errors(path.parent):
            np.savez(path, images=part.inputs, labels=part.targets)
        self._add_data(name, self.task)
        write_atomic(self.fleet.agent_home(name) / POLICY_FILE, POLICY.encode())

    def _add_data(self, name: str, task: TaskSpec) -> None:
        """Let the agent learn ``task`` from its part, as ``shoal-agent data add`` would."""
        entry = check_data("images", self._part_path(name), task, now=utc_now())
        DataRegistry(self.fleet.agent_home(name)).add(entry)

    def _start_agents(self) -> None:
        for name in self.names:
            self.fleet.start_agent(name, "--inference-port", "0")
        with self.console.status("agents connect over MQTT …"):
            self.fleet.wait_for(
                "all agents to be online",
                lambda: all(d["online"] for d in self._devices()) or None,
                deadline_s=60,
            )
        self.console.print(f"[green]✓[/] {len(self.names)} agents are online")

    def _train(self) -> Mapping[str, Any]:
        run_id = self._interrupted_run()
        if run_id:
            self.console.print(f"[green]✓[/] run {run_id} goes on where it was interrupted")
        else:
            run_id = self._start(self._plan())
        run = self._follow(run_id)
        self.console.print(demo_view.secrecy_words(run))
        return run

    def _start(self, plan: RunPlan) -> str:
        return str(self.fleet.post("/v1/runs", msgspec.to_builtins(plan))["run_id"])

    def _follow(self, run_id: str) -> Mapping[str, Any]:
        """Show a run until it ends well; raise UnavailableError where it does not."""
        polls = self.fleet.polls(
            "the run to end", lambda: self.fleet.get(f"/v1/runs/{run_id}"), deadline_s=900
        )
        with Live(console=self.console, refresh_per_second=4) as live:
            for run in polls:
                live.update(demo_view.rounds_table(run))
                if run["state"] in _ENDED:
                    break
        self.console.print()
        if run["state"] != "finished":
            raise UnavailableError(f"the run {run['state']}: {run['cause']}")
        return run  # type: ignore[no-any-return]  # a JSON document

    def _interrupted_run(self) -> str | None:
        """Return the run that goes on by itself; one about another data set is stopped."""
        ours = None
        for run in self.fleet.get("/v1/runs"):
            if run["state"] in _ENDED:
                continue
            plan = self.fleet.get(f"/v1/runs/{run['run_id']}")["plan"]
            if plan["task"] == msgspec.to_builtins(self.task):
                ours = str(run["run_id"])
            else:
                self.fleet.post(f"/v1/runs/{run['run_id']}/stop")
        return ours

    def _plan(self) -> RunPlan:
        agents = self.options.agents
        return RunPlan(
            name="demo",
            task=self.task,
            rounds=self.options.rounds,
            seed=self.options.seed,
            training=TrainingPlan(max_batches=80, batch_size=32, learning_rate=0.02, momentum=0.9),
            cohort=CohortPlan(
                size=agents, quorum=MIN_COHORT, recruit_deadline_s=60, round_deadline_s=120
            ),
            privacy=PrivacyPlan(at_least=MIN_COHORT - 1, max_weight=MAX_WEIGHT),
            compression=CompressionPlan(calibration_noise="none", calibration_max_rows=200),
            judge=JudgePlan(noise="none", max_rows=300),
            rollout=ROLLOUT,
        )

    def _slow_plan(self) -> RunPlan:
        """One round of hardly any training, which no device judges: correct, and far too slow."""
        return msgspec.structs.replace(
            self._plan(),
            name="demo-too-slow",
            task=self.slow_task,
            rounds=1,
            training=TrainingPlan(max_batches=1, learning_rate=0.001),
            evaluate=False,
            compression=None,
            judge=None,
        )

    def _await_version(self, run: Mapping[str, Any]) -> Mapping[str, Any]:
        version: Mapping[str, Any] = self.fleet.get(f"/v1/models/{run['model_version']}")
        self.console.print(demo_view.variants_table(version))
        self.console.print(demo_view.judgement_table(version["judgement"]))
        return version

    def _await_rollout(self, version: str, *, ends_as: str) -> Mapping[str, Any]:
        """Show how a version goes to the agents, wave by wave, until it is there or gone."""
        rollouts = self.fleet.get("/v1/rollouts")
        rollout_id = next(r["rollout_id"] for r in rollouts if r["version"] == version)
        polls = self.fleet.polls(
            "the rollout to end", lambda: self.fleet.get(f"/v1/rollouts/{rollout_id}"),
            deadline_s=120,
        )  # fmt: skip
        with Live(console=self.console, refresh_per_second=4) as live:
            for rollout in polls:
                live.update(demo_view.rollout_table(rollout))
                if rollout["state"] in _ROLLED:
                    break
        self.console.print()
        if rollout["state"] != ends_as:
            raise UnavailableError(f"the rollout is {rollout['state']}: {rollout['cause']}")
        return rollout  # type: ignore[no-any-return]  # a JSON document

    def _ship_a_bad_one(self, good: str) -> None:
        """Roll out a version that is too slow, and watch it go back by itself."""
        self.console.print(
            "Now a bad version, on purpose: a network that is far too slow, and hardly trained.\n"
            "No device judges it beforehand, and nobody stops it by hand."
        )
        for name in self.names:  # the owners agree to it, as they must
            self._add_data(name, self.slow_task)
        with self.console.status("training it …"):
            run_id = self._start(self._slow_plan())
            ended = self.fleet.polls(
                "the run to end", lambda: self.fleet.get(f"/v1/runs/{run_id}"), deadline_s=300
            )
            run = next(run for run in ended if run["state"] in _ENDED)
        if run["state"] != "finished":
            raise UnavailableError(f"the run {run['state']}: {run['cause']}")
        rollout = self._await_rollout(run["model_version"], ends_as="rolled_back")
        for name in self.names:
            self._add_data(name, self.task)
        serving = [d["reported"]["serving_version"] for d in self._devices()]
        self.console.print(demo_view.rollback_words(rollout, serving.count(good), len(serving)))

    def _measure(self, version: Mapping[str, Any]) -> None:
        with self.console.status("sending the test images to every agent …"):
            before = self._accuracy_before()
            rows = [self._measure_agent(name, before, version) for name in self.names]
        self.console.print(demo_view.results_table(rows))

    def _accuracy_before(self) -> float:
        task = load_task(self.task)
        initial = to_vector(seeded_model(task, self.options.seed))
        return task.summarize(evaluate(task, initial, self.dataset.test))[task.primary_metric]

    def _measure_agent(
        self, name: str, before: float, version: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        inputs = self.dataset.test.inputs.astype(np.float32)
        with InferenceClient(self._endpoint(name), version["model"]) as client:
            answers = [
                client.infer(inputs[start : start + TEST_BATCH]).argmax(axis=1)
                for start in range(0, len(inputs), TEST_BATCH)
            ]
            latencies = client.latencies_ms(inputs[:1], requests=LATENCY_REQUESTS)
        device = next(d for d in self._devices() if d["device_id"] == name)
        sizes = {v["variant"]: v["size_bytes"] for v in version["variants"]}
        return {
            "agent": name,
            "before": before,
            "after": float(np.mean(np.concatenate(answers) == self.dataset.test.targets)),
            "serving": device["reported"]["serving_version"],
            "wanted": version["version"],
            "full_bytes": sizes["fp32"],
            "shipped_bytes": sizes[version["ship"]],
            "p50_ms": statistics.median(latencies),
        }

    def _endpoint(self, name: str) -> str:
        home = str(self.fleet.agent_home(name))
        status = self.fleet.command("edge_agent", "status", "--home", home, "--json")
        return str(msgspec.json.decode(status)["inference_url"])

    def _devices(self) -> Sequence[Mapping[str, Any]]:
        devices: list[Mapping[str, Any]] = self.fleet.get("/v1/devices")
        return [device for device in devices if device["device_id"] in self.names]


def _end(console: Console, fleet: LocalFleet) -> None:
    """End every process, whatever is pressed meanwhile, and say where their traces lie."""
    console.print("[yellow]Ending every process; this takes some seconds …[/]")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave some
    try:
        fleet.stop()
    finally:
        signal.signal(signal.SIGINT, before)
    _say_where(console, fleet)


def _say_what_runs(console: Console, fleet: LocalFleet) -> None:
    pids = [fleet.coordinator, *fleet.agents.values()]
    console.print(
        "[bold]Everything keeps running.[/] End it with: kill "
        + " ".join(str(program.pid) for program in pids if program)
    )


def _say_where(console: Console, fleet: LocalFleet) -> None:
    home, coordinator = _shortest(fleet.home), _shortest(fleet.coordinator_home)
    programs = _shortest(Path(sys.executable).parent)
    lines = [
        f"logs      less {home / 'logs'}/* {coordinator / 'logs'}/*",
        f"database  {coordinator / 'shoal.db'} (SQLite; tables runs, rounds, devices …)",
        f"models    {coordinator / 'blobs'} and {home / 'agents'}/*/models",
        f"look      {programs / 'shoal-agent'} status --home {home / 'agents' / 'agent-1'}",
        f"          {programs / 'shoal'} model list --home {coordinator}",
    ]
    if fleet.coordinator is None:
        lines.append(f"          while {programs / 'shoal'} serve --home {coordinator} runs")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)


def _shortest(path: Path) -> Path:
    """Return ``path`` from here where it lies below the working folder."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
