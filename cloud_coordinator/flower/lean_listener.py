"""The SuperLink's HTTP face: Flower's own handlers without the layers that cost 95 % of its CPU.

Stock Flower 1.41 passes each request through nine middlewares and two thread hops, 4 ms of one
core; the handlers themselves take 0.2 ms. So this ASGI app calls them directly, for the whole Fleet
API and for the Runtime paths that a round uses, with the checks, errors and bytes on the wire that
stock SuperNodes and clients expect; contract tests hold it to that. Two paths more on each side are
ours: batches of small messages.

Two listeners share it. The public one has the Fleet API and nothing else. The private one has
everything, but Flower's Control API, which has no authentication of its own, demands our secret.
"""

import asyncio
import hmac
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import FastAPI, HTTPException
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkState
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.date import now
from flwr.supercore.dependencies.task import authenticate_task
from flwr.supercore.dependencies.version import VersionDependency
from flwr.supercore.error import ApiErrorCode, FlowerError, http_error_translator
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError, Message
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from cloud_coordinator.flower.batches import (
    Batch,
    is_batch,
    parse_batch,
    pull_batch,
    push_batch,
)
from cloud_coordinator.flower.node_authentication import NodeAuthenticator, refused
from cloud_coordinator.flower.superlink_messages import CONTROL_SECRET_HEADER
from shared.framing import MAX_BATCH_BYTES, MAX_MESSAGE_BYTES

_FLEET = "/v1/fleet/"
_RUNTIME = "/v1/runtime/"
_CONTROL = "/v1/control/"
_KIB, _MIB = 1024, 1024 * 1024
_THREAD_ABOVE_BYTES = 1 * _MIB  # hashing such an object would hold up everybody else
_BODY_DEADLINE_S = 60.0

Handler = Callable[[Any, LinkState], Message]


@dataclass(frozen=True, slots=True)
class _FleetRoute:
    handle: Handler
    max_body_bytes: int = 64 * _KIB
    introduces_key: bool = False  # the request names a key, not a node id


def _activate(request: Any, state: LinkState) -> Message:
    """Let a node begin a new life even if its last one, killed a moment ago, still counts."""
    node_id = state.get_node_id_by_public_key(request.public_key)
    if node_id is not None:
        state.deactivate_node(node_id)
    return fleet_handlers.activate_node(request, state)


def _confirm(request: Any, state: LinkState) -> Message:
    """Let the SuperLink forget a message that this node has; of others' it may not dispose.

    Stock Flower deletes whatever message is named, so that one node could take away another's work.
    So what is expired by now, or none of its business, is left unnamed: Flower's checks remain.
    """
    assert isinstance(state, InMemoryLinkState)  # as superlink_process.py asks for
    message = state.message_ins_store.get(request.message_object_id)
    if message is None or message.metadata.dst_node_id != request.node.node_id:
        request.message_object_id = ""
    return fleet_handlers.confirm_message_received(request, state, state.object_store)


def _pull_fleet_batch(batch: Batch, state: LinkState) -> Any:
    call = partial(_call_fleet, state)
    return pull_batch(call, batch, batch.request.node, state.object_store)


def _push_fleet_batch(batch: Batch, state: LinkState) -> Message:
    return push_batch(partial(_call_fleet, state), batch, limit=MAX_MESSAGE_BYTES)


def _call_fleet(state: LinkState, name: str, request: Any) -> Message:
    return _FLEET_ROUTES[name].handle(request, state)


def _pull_runtime_batch(batch: Batch, state: LinkState, task: Any) -> Any:
    call = partial(_call_runtime, state, task)
    return pull_batch(call, batch, Node(node_id=SUPERLINK_NODE_ID), state.object_store)


def _push_runtime_batch(batch: Batch, state: LinkState, task: Any) -> Message:
    return push_batch(partial(_call_runtime, state, task), batch, limit=MAX_BATCH_BYTES)


def _call_runtime(state: LinkState, task: Any, name: str, request: Any) -> Message:
    return _RUNTIME_ROUTES[name](request, state, task)


_FLEET_ROUTES: Mapping[str, _FleetRoute] = {
    "register-node": _FleetRoute(
        lambda request, state: fleet_handlers.register_node(
            request, state, enable_supernode_auth=True
        ),
        introduces_key=True,
    ),
    "activate-node": _FleetRoute(_activate, introduces_key=True),
    "deactivate-node": _FleetRoute(fleet_handlers.deactivate_node),
    "unregister-node": _FleetRoute(
        lambda request, state: fleet_handlers.unregister_node(
            request, state, enable_supernode_auth=True
        )
    ),
    "send-node-heartbeat": _FleetRoute(fleet_handlers.send_node_heartbeat),
    "pull-messages": _FleetRoute(
        lambda request, state: fleet_handlers.pull_messages(request, state, state.object_store)
    ),
    "push-messages": _FleetRoute(fleet_handlers.push_messages, max_body_bytes=4 * _MIB),
    "get-run": _FleetRoute(fleet_handlers.get_run),
    "get-fab": _FleetRoute(fleet_handlers.get_fab),
    "push-object": _FleetRoute(fleet_handlers.push_object, max_body_bytes=16 * _MIB),
    "pull-object": _FleetRoute(fleet_handlers.pull_object),
    "confirm-message-received": _FleetRoute(_confirm),
    "pull-batch": _FleetRoute(_pull_fleet_batch),
    "push-batch": _FleetRoute(_push_fleet_batch, max_body_bytes=1 * _MIB),
}
_RUNTIME_ROUTES: Mapping[str, Callable[[Any, LinkState, Any], Message]] = {
    "push-messages": runtime_handlers.push_messages,
    "pull-messages": runtime_handlers.pull_messages,
    "push-object": runtime_handlers.push_object,
    "pull-object": runtime_handlers.pull_object,
    "confirm-message-received": runtime_handlers.confirm_message_received,
    "pull-batch": _pull_runtime_batch,
    "push-batch": _push_runtime_batch,
}
_RUNTIME_MAX_BODY_BYTES = 64 * _MIB  # our own worker's, one request for a whole cohort


class LeanListener:
    """ASGI app around the stock one; see the module."""

    def __init__(self, app: FastAPI, *, private_port: int, control_secret: str) -> None:
        self._app = app
        self._private_port = private_port
        self._control_secret = control_secret.encode()
        self._state: LinkState = app.state.linkstate_factory.state()
        self._nodes = NodeAuthenticator(self._state.get_node_id_by_public_key, now)
        # Stock Flower checks the peer's version on the Runtime API and lets all pass on Fleet's.
        self._check_version = VersionDependency(
            component_name="SuperLink", connection_name="Caller <-> SuperLink Runtime API"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass it on to the stock app."""
        if scope["type"] != "http":  # the stock app's own start and end
            await self._app(scope, receive, send)
            return
        answer = self._answer_for(scope)
        if answer is None:
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        response = await http_error_translator(request, answer)
        await response(scope, receive, send)

    def _answer_for(self, scope: Scope) -> Callable[[Request], Any] | None:
        """Choose who answers; None is the stock app."""
        path = scope["path"]
        if path.startswith(_FLEET):
            return self._answer_fleet
        server = scope.get("server")
        if server is None or server[1] != self._private_port:
            return _answer_nothing_here
        if path.startswith(_CONTROL) and not self._knows_secret(scope):
            return _answer_no_control
        if path.startswith(_RUNTIME) and path.removeprefix(_RUNTIME) in _RUNTIME_ROUTES:
            return self._answer_runtime
        return None

    def _knows_secret(self, scope: Scope) -> bool:
        name = CONTROL_SECRET_HEADER.encode()
        given = [value for header, value in scope["headers"] if header == name]
        return len(given) == 1 and hmac.compare_digest(given[0], self._control_secret)

    async def _answer_fleet(self, request: Request) -> Response:
        route = _FLEET_ROUTES.get(request.scope["path"].removeprefix(_FLEET))
        if route is None or request.method != "POST":
            return await _answer_nothing_here(request)
        public_key, node_id = self._nodes.authenticate(request.headers)
        if node_id is None and not route.introduces_key:
            raise refused()
        message, size = await _read_message(request, route.max_body_bytes)
        if route.introduces_key:
            genuine = message.public_key == public_key
        else:
            genuine = _claimed_nodes(message) == {node_id}
        if not genuine:
            raise refused()
        return await _respond(size, lambda: route.handle(message, self._state))

    async def _answer_runtime(self, request: Request) -> Response:
        if request.method != "POST":
            raise HTTPException(status_code=405)
        handle = _RUNTIME_ROUTES[request.scope["path"].removeprefix(_RUNTIME)]
        self._check_version(request)
        task = authenticate_task(request, request.headers.get(TASK_TOKEN_HEADER), self._state)
        message, size = await _read_message(request, _RUNTIME_MAX_BODY_BYTES)
        return await _respond(size, lambda: handle(message, self._state, task))


def _claimed_nodes(message: Any) -> set[int]:
    """Return every node id that a Fleet request speaks for: its own, and its replies' sender.

    Stock Flower checks only the first, so that one node could answer in another's name.
    """
    if isinstance(message, Batch):
        return _claimed_nodes(message.request).union(*map(_claimed_nodes, message.objects))
    node_id = message.node.node_id if hasattr(message, "node") else message.node_id
    replies = getattr(message, "messages_list", ())
    return {node_id, *(reply.metadata.src_node_id for reply in replies)}


async def _answer_nothing_here(_request: Request) -> Response:
    raise HTTPException(status_code=404)


async def _answer_no_control(_request: Request) -> Response:
    raise HTTPException(status_code=401, detail="The control API needs its secret")


async def _read_message(request: Request, limit: int) -> tuple[Any, int]:
    """Return the decoded request and its size; the body itself is not kept."""
    body = await _read_body(request, limit)
    return _parse(request, body), len(body)


async def _read_body(request: Request, limit: int) -> bytearray:
    """Read a body of at most ``limit`` bytes within the deadline, in one copy."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise HTTPException(status_code=413)
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_DEADLINE_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise HTTPException(status_code=413)
    except TimeoutError as error:
        raise HTTPException(status_code=408) from error
    return body


def _parse(request: Request, body: bytearray) -> Any:
    """Decode the request as Flower does, and fail with its errors."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != PROTOBUF_MEDIA_TYPE:
        raise FlowerError(
            ApiErrorCode.UNSUPPORTED_CONTENT_TYPE, f"Unsupported Content-Type: {content_type!r}"
        )
    path = request.scope["path"]
    try:
        if is_batch(path):
            return parse_batch(path, body)
        message = PROTOBUF_REQUEST_TYPES["POST", path]()
        message.ParseFromString(body)
    except DecodeError as error:
        raise FlowerError(
            ApiErrorCode.INVALID_PROTOBUF_PAYLOAD, f"Invalid protobuf payload: {error!r}"
        ) from error
    return message


async def _respond(size: int, handle: Callable[[], Message]) -> Response:
    """Run the handler, beside the event loop where the request has a large ``size`` in bytes."""
    if size > _THREAD_ABOVE_BYTES:
        result = await run_in_threadpool(handle)
    else:
        result = handle()
    return Response(result.SerializeToString(), media_type=PROTOBUF_MEDIA_TYPE)
