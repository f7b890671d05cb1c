"""The lean listener answers what stock Flower answers, byte for byte, in success and in failure."""

from base64 import b64encode
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from fastapi import FastAPI
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.main import create_app

from cloud_coordinator.flower.lean_listener import LeanListener
from cloud_coordinator.flower.superlink_messages import SuperLinkSecrets
from cloud_coordinator.flower.superlink_process import flower_config

PORT = 8000
KEY = generate_private_key(SECP256R1())
PUBLIC_KEY = public_key_to_bytes(KEY.public_key())
ANSWERS: dict[str, Callable[[int], tuple[str, Any]]] = {
    "activation": lambda _: (
        "fleet/activate-node",
        ActivateNodeRequest(public_key=PUBLIC_KEY, heartbeat_interval=30),
    ),
    "activation with an impossible interval": lambda _: (
        "fleet/activate-node",
        ActivateNodeRequest(public_key=PUBLIC_KEY, heartbeat_interval=1),
    ),
    "deactivation of a node that is not active": lambda node: (
        "fleet/deactivate-node",
        DeactivateNodeRequest(node_id=node),
    ),
    "registration by the node itself": lambda _: (
        "fleet/register-node",
        RegisterNodeFleetRequest(public_key=PUBLIC_KEY),
    ),
    "unregistration by the node itself": lambda node: (
        "fleet/unregister-node",
        UnregisterNodeFleetRequest(node_id=node),
    ),
    "heartbeat": lambda node: (
        "fleet/send-node-heartbeat",
        SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30),
    ),
    "pull without messages": lambda node: (
        "fleet/pull-messages",
        PullMessagesRequest(node=Node(node_id=node)),
    ),
    "push of nothing": lambda node: (
        "fleet/push-messages",
        PushMessagesRequest(node=Node(node_id=node)),
    ),
    "unknown run": lambda node: (
        "fleet/get-run",
        GetRunRequest(node=Node(node_id=node), run_id=5),
    ),
    "unknown bundle": lambda node: (
        "fleet/get-fab",
        GetFabRequest(node=Node(node_id=node), hash_str="x", run_id=5),
    ),
    "object pushed for an unknown run": lambda node: (
        "fleet/push-object",
        PushObjectRequest(node=Node(node_id=node), run_id=5, object_id="0" * 64),
    ),
    "object pulled from an unknown run": lambda node: (
        "fleet/pull-object",
        PullObjectRequest(node=Node(node_id=node), run_id=5, object_id="0" * 64),
    ),
    "confirmation in an unknown run": lambda node: (
        "fleet/confirm-message-received",
        ConfirmMessageReceivedRequest(node=Node(node_id=node), run_id=5),
    ),
    "another node's id": lambda node: (
        "fleet/pull-messages",
        PullMessagesRequest(node=Node(node_id=node + 1)),
    ),
    "another node's key": lambda _: (
        "fleet/activate-node",
        ActivateNodeRequest(
            public_key=public_key_to_bytes(generate_private_key(SECP256R1()).public_key())
        ),
    ),
    "no protobuf": lambda _: ("fleet/pull-messages", b"\xff\xff\xff"),
    "runtime without a token": lambda _: ("runtime/pull-messages", PullAppMessagesRequest()),
}


@pytest.fixture(scope="module")
def stock() -> FastAPI:
    secrets = SuperLinkSecrets(control="aa", superexec="bb")
    return create_app(flower_config(secrets, PORT), SuperLinkLifespan)


@pytest.fixture(scope="module")
def node_id(stock: FastAPI) -> int:
    state = stock.state.linkstate_factory.state()
    registered: int = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, PUBLIC_KEY, 30)
    return registered


def headers_now() -> dict[str, str]:
    timestamp = now().isoformat()
    return {
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(PUBLIC_KEY).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(sign_message(KEY, timestamp.encode())).decode(),
    }


async def ask(app: Any, path: str, message: Any, headers: dict[str, str]) -> httpx.Response:
    content = message if isinstance(message, bytes) else message.SerializeToString()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url=f"http://x:{PORT}") as client:
        return await client.post(f"/v1/{path}", content=content, headers=headers)


async def both(
    stock: FastAPI, node_id: int, path: str, message: Any, headers: dict[str, str]
) -> tuple[httpx.Response, httpx.Response]:
    """Ask stock Flower and the lean listener, with the node in the same state before each."""
    state = stock.state.linkstate_factory.state()
    lean = LeanListener(stock, private_port=PORT, control_secret="aa")
    answers = []
    for app in (stock, lean):
        state.deactivate_node(node_id)
        answers.append(await ask(app, path, message, headers))
    return answers[0], answers[1]


@pytest.mark.parametrize("case", ANSWERS)
async def test_it_answers_as_stock_flower_does(stock: FastAPI, node_id: int, case: str) -> None:
    path, message = ANSWERS[case](node_id)

    wanted, got = await both(stock, node_id, path, message, headers_now())

    assert got.status_code == wanted.status_code
    assert got.content == wanted.content
    assert got.headers["content-type"] == wanted.headers["content-type"]


async def test_another_media_type_is_refused_as_by_stock_flower(
    stock: FastAPI, node_id: int
) -> None:
    headers = headers_now() | {"content-type": "application/json"}
    request = PullMessagesRequest(node=Node(node_id=node_id))

    wanted, got = await both(stock, node_id, "fleet/pull-messages", request, headers)

    assert (got.status_code, got.content) == (wanted.status_code, wanted.content)
    assert got.status_code == 415


async def test_a_missing_signature_is_refused_as_by_stock_flower(
    stock: FastAPI, node_id: int
) -> None:
    headers = {"content-type": "application/protobuf"}
    request = PullMessagesRequest(node=Node(node_id=node_id))

    wanted, got = await both(stock, node_id, "fleet/pull-messages", request, headers)

    assert (got.status_code, got.content) == (wanted.status_code, wanted.content)
    assert got.status_code == 401
