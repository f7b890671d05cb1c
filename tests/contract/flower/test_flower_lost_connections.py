"""A wire that breaks in the middle of a transfer costs a device time, never the round."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict

from cloud_coordinator.flower.grid import open_run
from edge_agent.flower_node import FlowerNode
from tests.contract.flower.conftest import DEADLINE_S, LiveSuperLink

PARAMETERS = 250_000  # a megabyte, so that a connection can break inside of it
CUT_AFTER_BYTES = 300_000
CUTS = 3


class BreakingWire:
    """Carries TCP to ``target``; cuts ``cuts`` connections once they carried so much one way."""

    def __init__(self, target: str, *, direction: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._direction = direction
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self.cuts = 0
        self._thread = threading.Thread(target=self._accept, name="wire")
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Take no more connections, and wait for the end of those that are there."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        self._listener.close()

    def _accept(self) -> None:
        with ExitStack() as ending, contextlib.suppress(OSError):  # shut down: the end
            while True:
                near = ending.enter_context(self._listener.accept()[0])
                far = ending.enter_context(socket.create_connection(self._target))
                for way in (("up", near, far), ("down", far, near)):
                    carrier = threading.Thread(target=self._carry, args=way)
                    carrier.start()
                    ending.callback(carrier.join, DEADLINE_S)

    def _carry(self, direction: str, source: socket.socket, sink: socket.socket) -> None:
        carried = 0
        with contextlib.suppress(OSError):  # the other direction cut it
            while chunk := source.recv(16_384):
                carried += len(chunk)
                if direction == self._direction and carried > CUT_AFTER_BYTES and self._cuts():
                    break
                sink.sendall(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _cuts(self) -> bool:
        with self._lock:
            if self.cuts == CUTS:
                return False
            self.cuts += 1
            return True


@pytest.fixture(params=["up", "down"])
def wire(request: pytest.FixtureRequest, superlink: LiveSuperLink) -> Iterator[BreakingWire]:
    made = BreakingWire(superlink.parent.public_address, direction=request.param)
    yield made
    made.close()


def test_a_connection_lost_in_a_transfer_is_made_anew_and_the_reply_arrives_whole(
    superlink: LiveSuperLink, wire: BreakingWire, join: Callable[..., FlowerNode]
) -> None:
    node = join(address=wire.address, patience_s=DEADLINE_S)
    vector = np.random.default_rng(0).normal(size=PARAMETERS).astype(np.float32)
    content = RecordDict({"parameters": ArrayRecord([vector])})

    with open_run(**superlink.run_options()) as grid:
        pushed = grid.push_messages(
            [Message(content, node.node_id, "train", ttl=120.0, group_id="1")]
        )
        assert list(node.work()) == pushed
        (reply,) = grid.iter_replies(pushed)

    assert wire.cuts == CUTS
    (trained,) = reply.content.array_records["parameters"].to_numpy_ndarrays()
    np.testing.assert_array_equal(trained, vector + np.float32(0.5) * (np.float32(1) - vector))
