"""What the daemon and its inference server may not load: they run for months on small machines."""

import re
from pathlib import Path

from shared.messages import Hello
from shared.signing import SigningKey
from tests.integration.agent.fleet_of_one import (
    Broker,
    Coordinator,
    children_of,
    daemon,
    make_home,
    read_status,
)

IMPORTED = re.compile(r"^import time:.*\|\s+([\w.]+)$", re.MULTILINE)
NEVER = {"torch", "onnx", "flwr", "sqlalchemy", "fastapi", "pandas", "scipy", "ray", "sklearn"}


def imported(log: Path) -> set[str]:
    """Return the top-level modules that a process with PYTHONPROFILEIMPORTTIME names in ``log``."""
    return {name.split(".")[0] for name in IMPORTED.findall(log.read_text())}


async def test_daemon_and_inference_server_load_nothing_heavy(tmp_path: Path) -> None:
    home, key = tmp_path / "home", SigningKey.generate()
    home.mkdir()
    broker = Broker(tmp_path)
    await broker.start()
    identity = make_home(home, command_key=key, mqtt_url=broker.url)
    try:
        async with (
            Coordinator(broker.url, identity, key).connected() as coordinator,
            daemon(home, env={"PYTHONPROFILEIMPORTTIME": "1"}) as agent,
        ):
            await coordinator.until_heard(Hello)
            assert children_of(agent.process.pid)
            await agent.stop()
        assert (await read_status(home))["device_id"]
    finally:
        await broker.stop()

    by_daemon = imported(home / "daemon.log")
    assert {"aiomqtt", "edge_agent"} <= by_daemon
    assert not by_daemon & (NEVER | {"onnxruntime"})
    children = sorted((home / "logs").glob("*.log"))
    assert children
    for log in children:
        assert not imported(log) & (NEVER | {"cryptography", "tuf"}), log.name
