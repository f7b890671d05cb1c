"""The same apps give the same model over our doors, over stock SuperNodes, and in simulation."""

import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloud_coordinator.flower.grid import RunGrid, open_run
from cloud_coordinator.flower.superlink_messages import QUIET_FLOWER
from edge_agent.flower_node import CLIENT_APP
from edge_agent.kept_sums import stop_keeper
from edge_agent.sum_access import sums_of_process
from edge_agent.training_app import build_client_app, load_from_home
from shared.listening import free_port
from shared.run_plan import RunPlan
from tests.contract.flower.conftest import LiveSuperLink, PollingNode
from tests.contract.flower.small_run import (
    DATA,
    DEVICES,
    PLAIN,
    SECURE,
    TASK,
    Result,
    home_of,
    make_fleet,
    perform,
)

SUPERNODE = Path(sysconfig.get_path("scripts")) / "flower-supernode"
JOIN_DEADLINE_S = 60.0
STOP_DEADLINE_S = 60.0
# Between processes the order of arrival differs, and with it the last bits of a sum in float64.
RTOL, ATOL = 1e-6, 1e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("small-run")
    make_fleet(made)
    yield made
    for device in range(DEVICES):
        stop_keeper(home_of(made, device))


@pytest.fixture(scope="module")
def through_our_doors(superlink: LiveSuperLink, folder: Path) -> Result:
    return run_on_our_nodes(superlink, folder, PLAIN, "ours")


def run_on_our_nodes(superlink: LiveSuperLink, folder: Path, plan: RunPlan, run_id: str) -> Result:
    with open_run(**options(superlink)) as grid, ExitStack() as leaving:
        for device in range(DEVICES):
            leaving.enter_context(our_node(superlink, folder, device))
        return perform(grid, folder, plan, run_id=run_id)


def test_our_doors_repeat_themselves(
    superlink: LiveSuperLink, folder: Path, through_our_doors: Result
) -> None:
    again = run_on_our_nodes(superlink, folder, PLAIN, "again").parameters

    np.testing.assert_allclose(again, through_our_doors.parameters, rtol=RTOL, atol=ATOL)
    assert np.abs(again).max() > 0.01  # something was learned


def test_stock_supernodes_beside_ours_give_the_same_model(
    superlink: LiveSuperLink, folder: Path, through_our_doors: Result
) -> None:
    mixed = run_on_mixed_nodes(superlink, folder, PLAIN, "mixed").parameters

    np.testing.assert_allclose(mixed, through_our_doors.parameters, rtol=RTOL, atol=ATOL)


def test_flowers_simulation_engine_gives_the_same_model(
    folder: Path, through_our_doors: Result
) -> None:
    simulated = run_in_simulation(folder, "plain").parameters

    np.testing.assert_allclose(simulated, through_our_doors.parameters, rtol=RTOL, atol=ATOL)


@pytest.fixture(scope="module")
def summed_plainly(superlink: LiveSuperLink, folder: Path) -> Result:
    """One round whose updates and measures are averaged without any secrecy."""
    plan = msgspec.structs.replace(SECURE, privacy=PLAIN.privacy)
    return run_on_our_nodes(superlink, folder, plan, "summed-plainly")


def test_secure_sums_over_flower_give_the_model_that_plain_ones_give(
    superlink: LiveSuperLink, folder: Path, summed_plainly: Result
) -> None:
    assert_alike(run_on_our_nodes(superlink, folder, SECURE, "ours-secure"), summed_plainly)


def test_secure_sums_in_flowers_simulation_engine_give_the_same_model(
    folder: Path, summed_plainly: Result
) -> None:
    assert_alike(run_in_simulation(folder, "secure"), summed_plainly)


@pytest.mark.slow
def test_secure_sums_on_stock_supernodes_beside_ours_give_the_same_model(
    superlink: LiveSuperLink, folder: Path, summed_plainly: Result
) -> None:
    assert_alike(run_on_mixed_nodes(superlink, folder, SECURE, "mixed-secure"), summed_plainly)


def assert_alike(summed: Result, plain: Result) -> None:
    np.testing.assert_allclose(summed.parameters, plain.parameters, rtol=1e-5, atol=1e-6)
    assert summed.metrics == pytest.approx(plain.metrics, rel=1e-4)
    assert summed.metrics["accuracy"] > 0.5


def run_on_mixed_nodes(
    superlink: LiveSuperLink, folder: Path, plan: RunPlan, run_id: str
) -> Result:
    with open_run(**options(superlink)) as grid, ExitStack() as leaving:
        leaving.enter_context(our_node(superlink, folder, 0))
        for device in (1, 2):
            leaving.enter_context(stock_node(superlink, folder, device))
        wait_until_joined(grid, DEVICES)
        return perform(grid, folder, plan, run_id=run_id)


def run_in_simulation(folder: Path, plan: str) -> Result:
    pytest.importorskip("ray")
    with (folder / "simulation.log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.contract.flower.small_run", str(folder), plan],
            check=True,
            timeout=180,
            stdout=log,
            stderr=log,
            env={**os.environ, **QUIET_FLOWER, **quiet_ray()},
        )
    metrics = msgspec.json.decode((folder / f"simulated-{plan}.json").read_bytes())
    return Result(np.load(folder / f"simulated-{plan}.npy"), metrics)


def options(superlink: LiveSuperLink) -> dict[str, Any]:
    return superlink.run_options(task=TASK, client_app=CLIENT_APP)


@contextmanager
def our_node(superlink: LiveSuperLink, folder: Path, device: int) -> Iterator[None]:
    key = generate_private_key(SECP256R1())
    superlink.register(key)
    home = home_of(folder, device)
    config = {"home": str(home), "data": DATA}
    app = build_client_app(load_from_home, sums_of=lambda _: sums_of_process(home))
    node = superlink.node(key, app=app, task=TASK, client_app=CLIENT_APP, node_config=config)
    with node:
        node.join()
        polling = PollingNode(node)
        try:
            yield
        finally:
            polling.close()


@contextmanager
def stock_node(superlink: LiveSuperLink, folder: Path, device: int) -> Iterator[None]:
    """Run Flower's own ``flower-supernode`` through the public port."""
    key = generate_private_key(SECP256R1())
    superlink.register(key)
    key_path, ca_path = folder / f"stock-{device}.key", folder / "ca.pem"
    key_path.write_bytes(openssh(key))
    key_path.chmod(0o600)
    ca_path.write_text(superlink.parent.ca_pem)
    log_path = folder / f"stock-{device}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                SUPERNODE,
                f"--superlink={superlink.parent.public_address}",
                f"--root-certificates={ca_path}",
                f"--auth-supernode-private-key={key_path}",
                f"--port={free_port()}",
                f'--node-config=home="{home_of(folder, device)}" data="{DATA}"',
            ],
            stdout=log,
            stderr=log,
            env={
                **os.environ,
                **QUIET_FLOWER,
                "FLWR_HOME": str(folder / f"flwr-{device}"),
                "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
                "PATH": f"{SUPERNODE.parent}{os.pathsep}{os.environ['PATH']}",
            },
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(STOP_DEADLINE_S)


def openssh(key: EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def wait_until_joined(grid: RunGrid, nodes: int) -> None:
    deadline = time.monotonic() + JOIN_DEADLINE_S
    while len(list(grid.get_node_ids())) < nodes:
        assert time.monotonic() < deadline, "the stock SuperNodes did not join"
        threading.Event().wait(0.2)


def quiet_ray() -> dict[str, str]:
    return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
