"""An enrolled device that sends rubbish through Flower costs its own reply, and nobody else's."""

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from cloud_coordinator.flower.grid import RunGrid, open_run
from edge_agent import flower_node
from edge_agent.flower_node import FlowerNode
from tests.contract.flower.conftest import LiveSuperLink

Join = Callable[..., FlowerNode]


@dataclass(frozen=True)
class Rubbish:
    """An object whose bytes mean nothing to Flower, or something else than they should."""

    content: bytes

    @property
    def object_id(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def deflate(self) -> bytes:
        return self.content


def headed(kind: str, body: bytes, children: str = "") -> bytes:
    """Return an object in Flower's own form: kind, children and length of the body, then it."""
    return f"{kind} {children} {len(body)}".encode() + b"\x00" + body


CONTENTS = {  # what the SuperLink accepts; it refuses worse already at the upload
    "another kind": headed("ConfigRecord", b""),
    "a record that is none": headed("RecordDict", struct.pack("<I", 2**31)),
    "a child that is not there": headed("RecordDict", b"{}", "0" * 64),
}


@pytest.fixture
def grid(superlink: LiveSuperLink) -> Iterator[RunGrid]:
    with open_run(**superlink.run_options()) as opened:
        yield opened


def ask(grid: RunGrid, *nodes: FlowerNode) -> list[str]:
    content = RecordDict({"q": ConfigRecord({"a": 1})})
    return grid.push_messages(
        [Message(content, n.node_id, "query.count", ttl=60, group_id="1") for n in nodes]
    )


def lie(
    monkeypatch: pytest.MonkeyPatch,
    tree: Callable[[Any], ObjectTree],
    objects: Callable[[Any], Mapping[str, Any]],
) -> None:
    monkeypatch.setattr(flower_node, "get_object_tree", tree)
    monkeypatch.setattr(flower_node, "get_all_nested_objects", objects)


def assert_only_the_liar_fails(
    grid: RunGrid, liar: FlowerNode, honest: FlowerNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ask(grid, liar, honest)
    list(liar.work())
    monkeypatch.undo()
    list(honest.work())
    replies = {r.metadata.reply_to_message_id: r for r in grid.iter_replies(ids)}
    assert replies[ids[0]].error.code == ErrorCode.MESSAGE_UNAVAILABLE
    assert replies[ids[1]].content.config_records["n"]["n"] == 1


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_reply_that_cannot_be_read_fails_alone(
    content: bytes, grid: RunGrid, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar, honest = join(), join(1)
    rubbish = Rubbish(content)

    def tree(reply: Any) -> ObjectTree:
        leaf = ObjectTree(object_id=rubbish.object_id)
        return ObjectTree(object_id=reply.object_id, children=[leaf])

    def objects(reply: Any) -> Mapping[str, Any]:
        return {**get_all_nested_objects(reply), rubbish.object_id: rubbish}

    lie(monkeypatch, tree, objects)
    assert_only_the_liar_fails(grid, liar, honest, monkeypatch)


@pytest.mark.parametrize("children", [0, 2])
def test_a_reply_without_one_content_fails_alone(
    children: int, grid: RunGrid, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    liar, honest = join(), join(1)

    def tree(reply: Any) -> ObjectTree:
        whole = get_object_tree(reply)
        return ObjectTree(object_id=whole.object_id, children=list(whole.children) * children)

    lie(monkeypatch, tree, get_all_nested_objects)
    assert_only_the_liar_fails(grid, liar, honest, monkeypatch)
