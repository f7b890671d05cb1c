"""Bad versions, shipped on purpose: a real agent's own facts turn each back, and nobody helps."""

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from cloud_coordinator.blobs import BlobStore
from cloud_coordinator.database import Database
from cloud_coordinator.keys import load_keys
from cloud_coordinator.models.tables import ModelVersionRow, VariantRow
from cloud_coordinator.runs.tables import RunRow
from edge_agent.data_registry import DataRegistry
from edge_agent.local_data import check_data
from shared.messages import utc_now
from shared.run_plan import RunPlan
from shared.signed_manifest import sign_manifest
from simulations.datasets import load_digits_images
from simulations.local_fleet import LocalFleet
from tests.integration.inference.tiny_models import (
    CLASSES,
    FEATURES,
    Floats,
    Version,
    build,
    gigantic,
    linear,
    version_of,
)

AGENT = "canary"
BAKE_S = 10
ONE_BY_ONE = {
    "waves": [{"devices": 1, "bake_s": BAKE_S}, {"percent": 100, "bake_s": 0}],
    "watch_s": 1,
}
INPUTS: Floats = np.abs(np.random.default_rng(0).normal(size=(8, FEATURES))).astype(np.float32)
WEIGHTS: Floats = np.ones((FEATURES, CLASSES), np.float32)


def not_finite_below_zero() -> Version:
    """A version that passes its golden batch, and answers NaN wherever an input is negative."""
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"]),
        helper.make_node("MatMul", ["root", "w"], ["y"]),
    ]
    content = build(nodes, [numpy_helper.from_array(WEIGHTS, "w")])
    return version_of(content, INPUTS, np.sqrt(INPUTS) @ WEIGHTS)


def slow() -> Version:
    """A version that computes the right thing in some milliseconds, where others take some µs."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep_in"], ["keep_out"]),
            helper.make_node("Identity", ["value_in"], ["value_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_in", TensorProto.FLOAT, ["b", CLASSES]),
        ],
        [
            helper.make_tensor_value_info("keep_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_out", TensorProto.FLOAT, ["b", CLASSES]),
        ],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Loop", ["steps", "", "xw"], ["y"], body=body),
    ]
    steps = numpy_helper.from_array(np.array(5_000, np.int64), "steps")
    content = build(nodes, [numpy_helper.from_array(WEIGHTS, "w"), steps])
    return version_of(content, INPUTS, INPUTS @ WEIGHTS)


class Shop:
    """A coordinator with one real agent, into whose registry versions are put past all checks."""

    def __init__(self, fleet: LocalFleet) -> None:
        self.fleet = fleet
        home = fleet.coordinator_home
        self._key = load_keys(home).model
        self._blobs = BlobStore(home / "blobs")
        self._database = Database(f"sqlite:///{home / 'shoal.db'}")
        self._count = 0

    def ship(self, version: Version) -> str:
        """Sign a version as the coordinator would, had it built that; return its digest."""
        self._count += 1
        run_id = f"by-hand-{self._count}"
        signed = sign_manifest(version.signed.manifest, self._key)
        now = utc_now()
        plan = RunPlan(
            name="by-hand", task=load_digits_images().task(name="digits", model="small-cnn")
        )
        with self._database.transaction() as session:
            session.add(
                RunRow(
                    run_id=run_id,
                    name=plan.name,
                    state="finished",
                    plan=msgspec.to_builtins(plan),
                    plan_digest=plan.digest,
                    created_at=now,
                    model_version=signed.version,
                )
            )
            session.flush()
            session.add(
                ModelVersionRow(
                    run_id=run_id,
                    version=signed.version,
                    model="tiny",
                    state="signed",
                    created_at=now,
                    rounds=1,
                    parameters_sha256=hashlib.sha256(run_id.encode()).hexdigest(),
                    sealed=signed.sealed,
                    variants=[
                        VariantRow(
                            variant="fp32",
                            position=0,
                            shipped=True,
                            passed=True,
                            sha256=self._blobs.put(version.content),
                            size_bytes=len(version.content),
                            session_config={},
                        )
                    ],
                )
            )
        return signed.version

    def roll_out(self, version: str, plan: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
        answer: Mapping[str, Any] = self.fleet.post(
            "/v1/rollouts", {"version": version, "plan": plan}
        )
        return answer

    def ended(self, rollout: Mapping[str, Any], *, deadline_s: float = 60.0) -> Mapping[str, Any]:
        def probe() -> Mapping[str, Any] | None:
            found: Mapping[str, Any] = self.fleet.get(f"/v1/rollouts/{rollout['rollout_id']}")
            return found if found["ended_at"] else None

        return self.fleet.wait_for("the rollout to end", probe, deadline_s=deadline_s)

    def serving(self) -> str | None:
        (device,) = self.fleet.get("/v1/devices")
        version = (device["reported"] or {}).get("serving_version")
        return None if version is None else str(version)

    def until_serving(self, version: str) -> None:
        def probe() -> bool | None:
            return self.serving() == version or None

        self.fleet.wait_for("the agent to serve it", probe, deadline_s=60)

    def ask(self, values: list[float], times: int) -> list[int]:
        """Ask the agent's server for predictions; return the statuses."""
        status = self.fleet.command(
            "edge_agent", "status", "--home", str(self.fleet.agent_home(AGENT)), "--json"
        )
        url = msgspec.json.decode(status)["inference_url"]
        body = {"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": values}]}
        with httpx.Client(base_url=url, trust_env=False) as client:
            return [
                client.post("/v2/models/tiny/infer", json=body).status_code for _ in range(times)
            ]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    fleet = LocalFleet(tmp_path_factory.mktemp("shop"))
    try:
        fleet.start_coordinator("--port", "0", "--mqtt-port", "0", "--fleet-port", "0")
        token = fleet.post("/v1/tokens", {"uses": 1, "ttl_s": 600})["token"]
        fleet.enroll(AGENT, token)
        digits = load_digits_images()
        path = fleet.home / "digits.npz"
        np.savez(path, images=digits.train.inputs[:50], labels=digits.train.targets[:50])
        entry = check_data(
            "digits", path, digits.task(name="digits", model="small-cnn"), now=utc_now()
        )
        DataRegistry(fleet.agent_home(AGENT)).add(entry)
        fleet.start_agent(AGENT, "--inference-port", "0")
        fleet.wait_for(
            "the agent to say what it has data for",
            lambda: [d for d in fleet.get("/v1/devices") if d["tasks"] == ["digits"]] or None,
            deadline_s=60,
        )
        yield Shop(fleet)
    finally:
        fleet.stop()


@pytest.fixture(scope="module")
def good(shop: Shop) -> str:
    """The version that is served before, and again after each of the bad ones."""
    version = shop.ship(linear(1))
    shop.roll_out(version)
    shop.until_serving(version)
    return version


def turned_back(shop: Shop, rollout: Mapping[str, Any], good: str) -> Mapping[str, Any]:
    """Wait until nobody's help was needed; the agent serves what it served."""
    back = shop.ended(rollout)
    assert back["state"] == "rolled_back"
    assert back["wave"] == 1
    shop.until_serving(good)
    assert Path(shop.fleet.agent_home(AGENT)).exists()
    assert shop.ask([1.0, 1.0, 1.0, 1.0], 1) == [200]
    return back


def test_a_version_that_dies_when_it_is_loaded_never_serves(shop: Shop, good: str) -> None:
    back = turned_back(shop, shop.roll_out(shop.ship(gigantic()), ONE_BY_ONE), good)
    assert back["gate"] == "deployment"
    assert f"1 of 1 device refuse it; {AGENT}: " in back["cause"]


def test_a_version_that_is_ten_times_slower_is_turned_back_by_its_latency(
    shop: Shop, good: str
) -> None:
    back = turned_back(shop, shop.roll_out(shop.ship(slow()), ONE_BY_ONE), good)
    assert back["gate"] == "latency"
    assert float(back["cause"].split()[2]) > 10


def test_a_version_that_answers_nan_in_service_is_turned_back_by_its_errors(
    shop: Shop, good: str
) -> None:
    version = shop.ship(not_finite_below_zero())
    rollout = shop.roll_out(version, ONE_BY_ONE)
    shop.until_serving(version)
    assert set(shop.ask([-1.0, 1.0, 1.0, 1.0], 25)) == {500}
    started = time.monotonic()
    back = turned_back(shop, rollout, good)
    assert back["gate"] == "errors"
    assert time.monotonic() - started < 60
