import threading
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloud_coordinator.flower.tls import ensure_tls
from edge_agent import flower_node
from edge_agent.eligibility import agree
from edge_agent.flower_node import CLIENT_APP, FlowerNode, load_node_key
from shared.errors import DataError
from shared.tasks.spec import TaskSpec

TASK = TaskSpec("pumps", "tabular", {"model": "linear"})


def config(task: TaskSpec) -> dict[str, str]:
    return {"task": msgspec.json.encode(task).decode()}


def test_the_task_that_was_agreed_to_is_served() -> None:
    agree(TASK, CLIENT_APP, components={"clientapp": CLIENT_APP}, run_config=config(TASK))


@pytest.mark.parametrize("named", ["os:system", "", None])
def test_no_other_app_is_run(named: str | None) -> None:
    with pytest.raises(DataError, match="nothing but 'edge_agent"):
        agree(TASK, CLIENT_APP, components={"clientapp": named}, run_config=config(TASK))


def test_the_same_name_with_other_options_is_another_task() -> None:
    other = TaskSpec("pumps", "tabular", {"model": "mlp"})
    with pytest.raises(DataError, match="agreed to 'pumps' with other options"):
        agree(TASK, CLIENT_APP, components={"clientapp": CLIENT_APP}, run_config=config(other))


@pytest.mark.parametrize("run_config", [{}, {"task": "[]"}, {"task": 3}])
def test_a_run_without_a_task_is_refused(run_config: dict[str, object]) -> None:
    with pytest.raises(DataError, match="names no task"):
        agree(TASK, CLIENT_APP, components={"clientapp": CLIENT_APP}, run_config=run_config)


def test_a_node_key_is_read_in_the_form_that_flower_reads(tmp_path: Path) -> None:
    key = generate_private_key(SECP256R1())
    path = tmp_path / "node.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))

    assert load_node_key(path).private_numbers() == key.private_numbers()


@pytest.mark.parametrize("content", [None, b"", b"garbled"])
def test_a_node_key_that_cannot_be_read_is_said_in_one_sentence(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "node.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="enrol this device again"):
        load_node_key(path)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.pem"
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    with pytest.raises(DataError, match="no elliptic curve key"):
        load_node_key(path)


def test_one_heartbeat_that_goes_wrong_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flower_node, "_HEARTBEAT_INTERVAL_S", 0.01)
    calls, second = [0], threading.Event()

    def garbled(*_: object) -> None:
        calls[0] += 1
        if calls[0] > 1:
            second.set()
        raise ValueError("an answer that nobody understands")

    node = FlowerNode(
        address="127.0.0.1:1",
        ca_pem=ensure_tls(tmp_path, now=datetime.now(UTC)).ca.read_text(),
        private_key=generate_private_key(SECP256R1()),
        app=lambda message, _: message,
        task=TASK,
        node_config={},
    )
    monkeypatch.setattr(node, "_activate", lambda: None)
    monkeypatch.setattr(node, "_call", garbled)
    with node:
        node.join()
        assert second.wait(10)
    assert "heartbeat failed" in caplog.text
