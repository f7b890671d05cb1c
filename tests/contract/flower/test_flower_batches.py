"""Batches of small messages give what the standard calls give, to those who may, within limits."""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest

from cloud_coordinator.flower.grid import RunGrid, open_run
from edge_agent.flower_node import FlowerNode
from shared.framing import MAX_MESSAGE_BYTES, Frames
from tests.contract.flower.conftest import LiveSuperLink

Join = Callable[..., FlowerNode]
SMALL, LARGE = 1_000, 100_000  # parameters of 4 bytes


class Raw(Frames):
    """A body that may be anything."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._body = body

    def SerializeToString(self, *, deterministic: bool = True) -> bytes:  # noqa: N802  # protobuf's
        assert deterministic
        return self._body


@pytest.fixture
def grid(superlink: LiveSuperLink) -> Iterator[RunGrid]:
    with open_run(**superlink.run_options()) as opened:
        yield opened


def vectors(grid: RunGrid, ids: list[str]) -> dict[str, Any]:
    return {
        reply.metadata.reply_to_message_id: reply.content.array_records["parameters"]
        .to_numpy_ndarrays()[0]
        .tolist()
        for reply in grid.iter_replies(ids)
    }


def training(node: FlowerNode, size: int, start: int = 0) -> Message:
    vector = np.arange(start, start + size, dtype=np.float32)
    content = RecordDict({"parameters": ArrayRecord([vector])})
    return Message(content, node.node_id, "train", ttl=60.0, group_id="1")


def counting(node: FlowerNode) -> Message:
    content = RecordDict({"q": ConfigRecord({"a": 1})})
    return Message(content, node.node_id, "query.count", ttl=60.0, group_id="1")


def asked(door: Any) -> list[str]:
    """Return a list to which the names of all calls from now on are added."""
    names: list[str] = []
    door._client.event_hooks["request"].append(
        lambda request: names.append(request.url.path.rpartition("/")[2])
    )
    return names


class Anything:
    def ParseFromString(self, _: bytes) -> None:  # noqa: N802  # protobuf's
        pass


def post(node: FlowerNode, path: str, body: bytes) -> int:
    """Send a body as this node; return the status."""
    try:
        node._client._unary_unary(
            path=f"/v1/fleet/{path}", rpc_method=path, request=Raw(body), response_type=Anything
        )
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return 200


def framed(*parts: Any) -> bytes:
    return Frames(part.SerializeToString() for part in parts).SerializeToString()


def test_a_small_message_takes_one_request_each_time(grid: RunGrid, join: Join) -> None:
    node = join()
    grid.push_messages([counting(node)])
    list(node.work())  # meets the run
    by_node, by_worker = asked(node._client), asked(grid._runtime)

    ids = grid.push_messages([counting(node)])
    assert list(node.work()) == ids
    (reply,) = grid.iter_replies(ids)

    assert reply.content.config_records["n"]["n"] == 2
    assert by_node == ["pull-batch", "push-batch", "pull-batch"]
    assert by_worker == ["push-batch", "pull-batch"]


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("batched", ["node", "worker", "both"])
def test_batches_give_what_the_standard_calls_give(
    grid: RunGrid, join: Join, monkeypatch: pytest.MonkeyPatch, size: int, batched: str
) -> None:
    nodes = [join(partition) for partition in range(3)]
    if batched == "worker":
        for node in nodes:
            monkeypatch.setattr(node._client._batches, "_known", False)
    if batched == "node":
        monkeypatch.setattr(grid._runtime._batches, "_known", False)

    ids = grid.push_messages([training(node, size) for node in nodes])
    assert [list(node.work()) for node in nodes] == [[message_id] for message_id in ids]

    sent = np.arange(size, dtype=np.float32)
    assert vectors(grid, ids) == {
        message_id: (sent + np.float32(0.5) * (np.float32(partition + 1) - sent)).tolist()
        for partition, message_id in enumerate(ids)
    }


def test_a_large_object_goes_by_the_standard_calls_and_what_is_small_beside_it_does_not(
    grid: RunGrid, join: Join
) -> None:
    node = join()
    by_node, by_worker = asked(node._client), asked(grid._runtime)

    ids = grid.push_messages([training(node, LARGE)])
    list(node.work())
    assert set(vectors(grid, ids)) == set(ids)

    for calls in (by_node, by_worker):
        one_each = ("push-batch", "push-object", "pull-object", "confirm-message-received")
        assert [calls.count(name) for name in one_each] == [1, 1, 1, 1]


def test_what_a_batch_cannot_hold_arrives_all_the_same(grid: RunGrid, join: Join) -> None:
    node = join()
    size = (MAX_MESSAGE_BYTES - 10_000) // 4
    by_worker = asked(grid._runtime)

    ids = grid.push_messages([training(node, size, start) for start in range(36)])
    assert by_worker.count("push-batch") == 1
    assert 0 < by_worker.count("push-object") < 40
    assert list(node.work()) == ids
    assert set(vectors(grid, ids)) == set(ids)


def test_the_superlink_forgets_what_came_in_a_batch(grid: RunGrid, join: Join) -> None:
    node = join()
    ids = grid.push_messages([counting(node)])
    list(node.work())
    (reply,) = grid.iter_replies(ids)

    for object_id in (*ids, reply.object_id):
        request = PullObjectRequest(
            node=Node(node_id=1), run_id=grid.run.run_id, object_id=object_id
        )
        assert not grid._runtime.PullObject(request).object_found


def test_a_half_uploaded_reply_stays_out_until_it_is_whole(
    grid: RunGrid, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = join()
    push_batch = node._client.push_batch
    seen: list[tuple[int, int]] = []

    def push_half(request: Any, objects: list[Any]) -> Any:
        pushed = push_batch(request, objects[:1])
        asked_for = PullAppMessagesRequest(message_ids=ids)
        arrivals, inline = pull_batch(asked_for)
        seen.append((len(pushed.objects_to_push), len(inline)))
        monkeypatch.setattr(grid._runtime, "pull_batch", lambda _: (arrivals, inline))
        return pushed

    pull_batch = grid._runtime.pull_batch
    monkeypatch.setattr(node._client, "push_batch", push_half)
    ids = grid.push_messages([counting(node)])
    assert list(node.work()) == ids  # the rest goes by the standard calls

    assert seen == [(2, 1)]  # what is there comes along, but it is not whole
    (reply,) = grid.iter_replies(ids)
    assert reply.content.config_records["n"]["n"] == 1


@pytest.mark.parametrize("ours", ["node", "worker"])
def test_a_superlink_without_batches_is_asked_once(
    grid: RunGrid, join: Join, monkeypatch: pytest.MonkeyPatch, ours: str
) -> None:
    node = join()
    door: Any = node._client if ours == "node" else grid._runtime
    names = asked(door)
    call = door._batches._post
    monkeypatch.setattr(
        door._batches,
        "_post",
        lambda path, **options: call(path=path.replace("-batch", "-unheard-of"), **options),
    )

    ids = grid.push_messages([counting(node)])
    assert list(node.work()) == ids
    (reply,) = grid.iter_replies(ids)

    assert reply.content.config_records["n"]["n"] == 1
    assert [name for name in names if name.endswith("unheard-of")] == names[:1]


def test_nobody_pulls_anothers_messages_or_replies_in_anothers_name(
    grid: RunGrid, join: Join
) -> None:
    thief, victim = join(), join(1)
    mine, other = Node(node_id=thief.node_id), Node(node_id=victim.node_id)
    ids = grid.push_messages([counting(victim)])
    forged = MessageProto(metadata=Metadata(src_node_id=victim.node_id))
    own = MessageProto(metadata=Metadata(src_node_id=thief.node_id))

    assert post(thief, "pull-batch", framed(PullMessagesRequest(node=other))) == 401
    for node, message, uploader in ((other, own, mine), (mine, forged, mine), (mine, own, other)):
        request = PushMessagesRequest(node=node, messages_list=[message])
        item = PushObjectRequest(node=uploader, object_id="0" * 64)
        assert post(thief, "push-batch", framed(request, item)) == 401
    assert list(victim.work()) == ids


@pytest.mark.parametrize("path", ["pull-batch", "push-batch"])
@pytest.mark.parametrize("size", [10, 4 * 2**20])
def test_a_stranger_is_refused_unread(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey, path: str, size: int
) -> None:
    with superlink.node(key) as stranger:
        assert post(stranger, path, b"x" * size) == 401


@pytest.mark.parametrize("path", ["pull-batch", "push-batch"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x00",
        struct.pack(">I", 5) + b"four",
        struct.pack(">I", 2**32 - 1) + b"x",
        struct.pack(">I", 0) * 1000,
        struct.pack(">I", 3) + b"\xff\xff\xff",
    ],
    ids=["empty", "cut length", "cut part", "lying length", "too many parts", "no protobuf"],
)
def test_a_lying_body_is_refused_and_nobody_else_harmed(
    join: Join, grid: RunGrid, path: str, body: bytes
) -> None:
    node = join()
    assert post(node, path, body) == 400

    ids = grid.push_messages([counting(node)])
    assert list(node.work()) == ids


@pytest.mark.parametrize("size", [MAX_MESSAGE_BYTES, 2**20])
def test_more_than_a_small_message_is_refused(join: Join, size: int) -> None:
    node = join()
    mine = Node(node_id=node.node_id)
    own = MessageProto(metadata=Metadata(src_node_id=node.node_id))
    request = PushMessagesRequest(node=mine, messages_list=[own])
    item = PushObjectRequest(node=mine, object_id="0" * 64, object_content=b"x" * size)
    assert post(node, "push-batch", framed(request, item)) == 413


@pytest.mark.parametrize("path", ["pull-batch", "push-batch"])
def test_errors_in_a_batch_are_those_of_the_standard_call(join: Join, path: str) -> None:
    node = join()
    mine = Node(node_id=node.node_id)
    own = MessageProto(metadata=Metadata(src_node_id=node.node_id, run_id=5))
    nothing: Any = {
        "pull-batch": PullMessagesRequest(node=mine),
        "push-batch": PushMessagesRequest(node=mine, messages_list=[own]),
    }[path]
    standard = path.replace("batch", "messages")
    wanted = post(node, standard, nothing.SerializeToString())
    assert post(node, path, framed(nothing)) == wanted
