"""A real SuperLink child, and nodes that work at it in threads."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloud_coordinator.flower.superlink import SuperLink
from edge_agent.flower_node import FlowerNode
from tests.contract.flower.flower_probe import CLIENT_APP, TASK, app

DEADLINE_S = 30.0


def public_pem(key: EllipticCurvePrivateKey) -> str:
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


class LiveSuperLink:
    """A SuperLink whose event loop runs in a thread, so that blocking tests can use it."""

    def __init__(self, home: Path, *, public_port: int = 0) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="superlink-loop")
        self._thread.start()
        self.home = home
        self.parent = self._do(SuperLink.start(home, public_port=public_port))

    def register(self, key: EllipticCurvePrivateKey, name: str = "device") -> int:
        node_id: int = self._do(self.parent.register_node(public_pem(key), name))
        return node_id

    def unregister(self, node_id: int) -> None:
        self._do(self.parent.unregister_node(node_id))

    def wait(self) -> int:
        status: int = self._do(self.parent.wait())
        return status

    def close(self) -> None:
        self._do(self.parent.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()

    def run_options(self, **changes: Any) -> dict[str, Any]:
        return {
            "address": self.parent.private_address,
            "ca_pem": self.parent.ca_pem,
            "secrets_path": self.parent.secrets_path,
            "task": TASK,
            "client_app": CLIENT_APP,
            "patience_s": 5.0,
            **changes,
        }

    def node(self, key: EllipticCurvePrivateKey, partition: int = 0, **changes: Any) -> FlowerNode:
        options = {
            "address": self.parent.public_address,
            "ca_pem": self.parent.ca_pem,
            "private_key": key,
            "app": app,
            "task": TASK,
            "node_config": {"partition-id": partition},
            "client_app": CLIENT_APP,
            "patience_s": 5.0,
            **changes,
        }
        return FlowerNode(**options)

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


class PollingNode:
    """A device that asks all the time, for server logic that nudges nobody."""

    def __init__(self, node: FlowerNode) -> None:
        self.node = node
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="polling-node")
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE_S)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            for _ in self.node.work():
                pass


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveSuperLink]:
    live = LiveSuperLink(tmp_path_factory.mktemp("coordinator"))
    yield live
    live.close()


@pytest.fixture
def key() -> EllipticCurvePrivateKey:
    return generate_private_key(SECP256R1())


@pytest.fixture
def join(superlink: LiveSuperLink) -> Iterator[Callable[..., FlowerNode]]:
    """Return a function that enrols and activates one more device."""
    with ExitStack() as leaving:

        def join_one(partition: int = 0, **changes: Any) -> FlowerNode:
            fresh = generate_private_key(SECP256R1())
            superlink.register(fresh)
            node = leaving.enter_context(superlink.node(fresh, partition, **changes))
            node.join()
            return node

        yield join_one
