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

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from numpy.typing import NDArray

from cloud_coordinator.flower.grid import RunGrid, open_run
from cloud_coordinator.flower.superlink_messages import QUIET_FLOWER
from edge_agent.flower_node import CLIENT_APP
from edge_agent.training_app import app
from shared.listening import free_port
from tests.contract.flower.conftest import LiveSuperLink, PollingNode
from tests.contract.flower.small_run import DATA, DEVICES, TASK, make_home, perform

SUPERNODE = Path(sysconfig.get_path("scripts")) / "flower-supernode"
JOIN_DEADLINE_S = 60.0
STOP_DEADLINE_S = 60.0
# Between processes the order of arrival differs, and with it the last bits of a sum in float64.
RTOL, ATOL = 1e-6, 1e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("small-run")
    for device in range(DEVICES):
        make_home(made, device)
    return made


@pytest.fixture(scope="module")
def through_our_doors(superlink: LiveSuperLink, folder: Path) -> NDArray[np.float32]:
    with open_run(**options(superlink)) as grid, ExitStack() as leaving:
        for device in range(DEVICES):
            leaving.enter_context(our_node(superlink, folder, device))
        return perform(grid, folder / "ours")


def test_our_doors_repeat_themselves(
    superlink: LiveSuperLink, folder: Path, through_our_doors: NDArray[np.float32]
) -> None:
    with open_run(**options(superlink)) as grid, ExitStack() as leaving:
        for device in range(DEVICES):
            leaving.enter_context(our_node(superlink, folder, device))
        again = perform(grid, folder / "again")

    np.testing.assert_allclose(again, through_our_doors, rtol=RTOL, atol=ATOL)
    assert np.abs(again).max() > 0.01  # something was learned


def test_stock_supernodes_beside_ours_give_the_same_model(
    superlink: LiveSuperLink, folder: Path, through_our_doors: NDArray[np.float32]
) -> None:
    with open_run(**options(superlink)) as grid, ExitStack() as leaving:
        leaving.enter_context(our_node(superlink, folder, 0))
        for device in (1, 2):
            leaving.enter_context(stock_node(superlink, folder, device))
        wait_until_joined(grid, DEVICES)
        mixed = perform(grid, folder / "mixed")

    np.testing.assert_allclose(mixed, through_our_doors, rtol=RTOL, atol=ATOL)


def test_flowers_simulation_engine_gives_the_same_model(
    folder: Path, through_our_doors: NDArray[np.float32]
) -> None:
    pytest.importorskip("ray")
    with (folder / "simulation.log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-m", "tests.contract.flower.small_run", str(folder)],
            check=True,
            timeout=180,
            stdout=log,
            stderr=log,
            env={**os.environ, **QUIET_FLOWER, **quiet_ray()},
        )

    np.testing.assert_allclose(
        np.load(folder / "simulated.npy"), through_our_doors, rtol=RTOL, atol=ATOL
    )


def options(superlink: LiveSuperLink) -> dict[str, Any]:
    return superlink.run_options(task=TASK, client_app=CLIENT_APP)


@contextmanager
def our_node(superlink: LiveSuperLink, folder: Path, device: int) -> Iterator[None]:
    key = generate_private_key(SECP256R1())
    superlink.register(key)
    config = {"home": str(folder / f"home-{device}"), "data": DATA}
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
                f'--node-config=home="{folder}/home-{device}" data="{DATA}"',
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
