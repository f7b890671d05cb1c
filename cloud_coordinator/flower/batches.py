"""Batches of small messages with their objects, made of Flower's own handlers in their usual order.

A 4 KB message takes fourteen standard requests from the worker to a node and back, and each costs
the SuperLink 0.4 ms whatever it does. Our own nodes and worker ask for these batches instead; stock
SuperNodes never see them, and large objects go by the standard calls. `shared/framing.py` says what
is on the wire.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import ObjectStore
from google.protobuf.message import DecodeError, Message

from shared.framing import MAX_BATCH_BYTES, MAX_MESSAGE_BYTES, Frames, object_cost

Call = Callable[[str, Any], Any]  # a standard call by its name, in the name of who asks
_REQUEST_TYPES: dict[str, type[Message]] = {
    "/v1/fleet/pull-batch": PullMessagesRequest,
    "/v1/fleet/push-batch": PushMessagesRequest,
    "/v1/runtime/pull-batch": PullAppMessagesRequest,
    "/v1/runtime/push-batch": PushAppMessagesRequest,
}


@dataclass(frozen=True, slots=True)
class Batch:
    """One of Flower's standard requests, with objects."""

    request: Any
    objects: list[PushObjectRequest]


def is_batch(path: str) -> bool:
    """Tell whether a request to this path is a batch."""
    return path in _REQUEST_TYPES


def parse_batch(path: str, body: bytearray) -> Batch:
    """Decode a request.

    Raises:
        DecodeError: it is none.
    """
    frames = Frames()
    try:
        frames.ParseFromString(body)
    except ValueError as error:
        raise DecodeError(str(error)) from error
    first, *others = frames.parts
    request = _REQUEST_TYPES[path].FromString(first)
    return Batch(request, [PushObjectRequest.FromString(other) for other in others])


def push_batch(call: Call, batch: Batch, *, limit: int) -> Message:
    """Push messages, then the objects that came along; the answer names those still to be pushed.

    Raises:
        HTTPException: 413, the objects are more than ``limit`` bytes.
        ValueError: an object is not what its id says; as with a single push, the upload stays open.
    """
    if sum(object_cost(item.object_content) for item in batch.objects) > limit:
        raise HTTPException(status_code=413)
    pushed = call("push-messages", batch.request)
    offered = {item.object_id: item for item in batch.objects}
    missing = [
        object_id
        for object_id in pushed.objects_to_push
        if object_id not in offered or not _push(call, batch.request, pushed, offered[object_id])
    ]
    del pushed.objects_to_push[:]
    pushed.objects_to_push.extend(missing)
    return pushed


def _push(call: Call, request: Any, pushed: Any, item: PushObjectRequest) -> bool:
    item.run_id = request.messages_list[0].metadata.run_id
    item.session_id = pushed.session_id
    return bool(call("push-object", item).stored)


def pull_batch(call: Call, batch: Batch, node: Node, store: ObjectStore) -> Frames:
    """Pull messages with their small objects; confirm those of which that is all.

    A message whose own object comes along is confirmed; of all others, some objects are still to be
    pulled.
    """
    pulled = call("pull-messages", batch.request)
    objects: dict[str, bytes] = {}
    left = MAX_BATCH_BYTES
    for message, tree in zip(pulled.messages_list, pulled.message_object_trees, strict=True):
        sizes, is_all = _small_objects(tree, store)
        left -= sum(sizes.values())
        if left < 0:
            break
        for item in _pull(call, node, message.metadata.run_id, sizes):
            objects[item.object_id] = item.SerializeToString()
        if is_all:
            confirm = ConfirmMessageReceivedRequest(
                node=node, run_id=message.metadata.run_id, message_object_id=tree.object_id
            )
            call("confirm-message-received", confirm)
    return Frames([pulled.SerializeToString(), *objects.values()])


def _small_objects(tree: ObjectTree, store: ObjectStore) -> tuple[dict[str, int], bool]:
    """Return what each object counts, and whether that is all; the message's own comes last.

    Objects that are too large or not there yet are left out, and with them the message's own.
    """
    sizes: dict[str, int] = {}
    left, is_all = MAX_MESSAGE_BYTES, True
    for part in iterate_object_tree(tree):
        content = store.get(part.object_id)
        cost = object_cost(content or b"")
        if not content or cost > left:
            is_all = False
        else:
            sizes[part.object_id] = cost
            left -= cost
    if not is_all:
        sizes.pop(tree.object_id, None)
    return sizes, is_all


def _pull(
    call: Call, node: Node, run_id: int, object_ids: dict[str, int]
) -> Iterator[PushObjectRequest]:
    for object_id in object_ids:
        request = PullObjectRequest(node=node, run_id=run_id, object_id=object_id)
        content = call("pull-object", request).object_content
        yield PushObjectRequest(object_id=object_id, object_content=content)
