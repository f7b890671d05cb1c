"""Who may say what to a real SuperLink: from outside, from inside, with which key, and when."""

import ssl
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from cloud_coordinator.flower.superlink_messages import CONTROL_SECRET_HEADER, SuperLinkSecrets
from shared.errors import ConfigError, UnavailableError
from tests.contract.flower.conftest import LiveSuperLink

PROTOBUF = {"content-type": "application/protobuf"}
FOREIGN_VERSION = {
    "flwr-package-name": "flwr",
    "flwr-package-version": "1.39.0",
    "flwr-component-name": "flwr-serverapp",
}


@pytest.fixture(scope="module")
def client(superlink: LiveSuperLink) -> Iterator[httpx.Client]:
    trust = ssl.create_default_context(cadata=superlink.parent.ca_pem)
    with httpx.Client(verify=trust, timeout=10) as opened:
        yield opened


class Caller:
    """Sends Fleet requests as one node would, and as none should."""

    def __init__(self, client: httpx.Client, superlink: LiveSuperLink) -> None:
        self._client = client
        self._base = f"https://{superlink.parent.public_address}/v1/fleet/"
        self.key = generate_private_key(SECP256R1())

    def headers(
        self,
        *,
        signed_at: datetime | None = None,
        signer: EllipticCurvePrivateKey | None = None,
    ) -> dict[str, str]:
        timestamp = (signed_at or datetime.now(UTC)).isoformat()
        signature = sign_message(signer or self.key, timestamp.encode())
        return {
            **PROTOBUF,
            "flwr-public-key": b64encode(public_key_to_bytes(self.key.public_key())).decode(),
            "flwr-timestamp": timestamp,
            "flwr-signature": b64encode(signature).decode(),
        }

    def post(
        self, path: str, message: Any, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        headers = self.headers() if headers is None else headers
        content = message if isinstance(message, bytes) else message.SerializeToString()
        return self._client.post(self._base + path, content=content, headers=headers)


@pytest.fixture
def caller(client: httpx.Client, superlink: LiveSuperLink) -> Caller:
    return Caller(client, superlink)


@pytest.fixture
def node_id(caller: Caller, superlink: LiveSuperLink) -> int:
    return superlink.register(caller.key)


def pull(node_id: int) -> PullMessagesRequest:
    return PullMessagesRequest(node=Node(node_id=node_id))


def test_a_registered_key_may_pull(caller: Caller, node_id: int) -> None:
    assert caller.post("pull-messages", pull(node_id)).status_code == 200


def test_one_signature_serves_many_requests(caller: Caller, node_id: int) -> None:
    headers = caller.headers()
    statuses = {caller.post("pull-messages", pull(node_id), headers).status_code for _ in range(3)}
    assert statuses == {200}


def test_an_unregistered_key_cannot_activate(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey
) -> None:
    with (
        superlink.node(key) as node,
        pytest.raises(UnavailableError, match=r"does not let this device in \(412 .*2004"),
    ):
        node.join()


def test_an_unregistered_key_cannot_speak_for_a_registered_node(
    caller: Caller, superlink: LiveSuperLink
) -> None:
    somebody = superlink.register(generate_private_key(SECP256R1()))
    assert caller.post("pull-messages", pull(somebody)).status_code == 401


def test_one_node_cannot_speak_for_another(
    caller: Caller, node_id: int, superlink: LiveSuperLink
) -> None:
    other = superlink.register(generate_private_key(SECP256R1()))
    assert node_id != other
    assert caller.post("pull-messages", pull(other)).status_code == 401


def test_one_node_cannot_reply_in_anothers_name(
    caller: Caller, node_id: int, superlink: LiveSuperLink
) -> None:
    other = superlink.register(generate_private_key(SECP256R1()))
    forged = Message(metadata=Metadata(src_node_id=other))
    request = PushMessagesRequest(node=Node(node_id=node_id), messages_list=[forged])
    assert caller.post("push-messages", request).status_code == 401


def test_one_key_cannot_activate_another(caller: Caller, node_id: int) -> None:
    assert node_id
    other = public_key_to_bytes(generate_private_key(SECP256R1()).public_key())
    request = ActivateNodeRequest(public_key=other, heartbeat_interval=30)
    assert caller.post("activate-node", request).status_code == 401


@pytest.mark.parametrize("age_s", [-60, 400, 90_000])
def test_a_signature_outside_the_window_is_refused(
    caller: Caller, node_id: int, age_s: float
) -> None:
    headers = caller.headers(signed_at=datetime.now(UTC) - timedelta(seconds=age_s))
    assert caller.post("pull-messages", pull(node_id), headers).status_code == 401


def test_a_signature_by_another_key_is_refused(caller: Caller, node_id: int) -> None:
    headers = caller.headers(signer=generate_private_key(SECP256R1()))
    assert caller.post("pull-messages", pull(node_id), headers).status_code == 401


@pytest.mark.parametrize("missing", ["flwr-public-key", "flwr-timestamp", "flwr-signature"])
def test_an_incomplete_signature_is_refused(caller: Caller, node_id: int, missing: str) -> None:
    headers = {name: value for name, value in caller.headers().items() if name != missing}
    assert caller.post("pull-messages", pull(node_id), headers).status_code == 401


@pytest.mark.parametrize("broken", ["flwr-public-key", "flwr-timestamp", "flwr-signature"])
def test_a_garbled_signature_is_refused(caller: Caller, node_id: int, broken: str) -> None:
    headers = {**caller.headers(), broken: "garbled"}
    assert caller.post("pull-messages", pull(node_id), headers).status_code == 401


def test_an_unregistered_again_key_is_out_at_once_whatever_was_cached(
    caller: Caller, node_id: int, superlink: LiveSuperLink
) -> None:
    headers = caller.headers()
    assert caller.post("pull-messages", pull(node_id), headers).status_code == 200

    superlink.unregister(node_id)

    assert caller.post("pull-messages", pull(node_id), headers).status_code == 401
    activate = ActivateNodeRequest(
        public_key=public_key_to_bytes(caller.key.public_key()), heartbeat_interval=30
    )
    refused = caller.post("activate-node", activate)
    assert (refused.status_code, refused.json()["code"]) == (412, 2004)
    with pytest.raises(ConfigError, match="enrol the device again"):
        superlink.register(caller.key)


def test_registering_twice_gives_the_same_node(
    superlink: LiveSuperLink, key: EllipticCurvePrivateKey
) -> None:
    assert superlink.register(key) == superlink.register(key)


def test_unregistering_a_stranger_changes_nothing(superlink: LiveSuperLink) -> None:
    superlink.unregister(4711)


def test_a_large_body_of_a_stranger_is_refused_unread(caller: Caller) -> None:
    assert caller.post("push-object", b"x" * (8 * 2**20)).status_code == 401


def test_a_body_above_the_limit_is_refused(caller: Caller, node_id: int) -> None:
    request = PushObjectRequest(
        node=Node(node_id=node_id), object_id="0" * 64, object_content=b"x" * (17 * 2**20)
    )
    assert caller.post("push-object", request).status_code == 413


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-messages",
        "/v1/runtime/pull-batch",
        "/v1/runtime/push-batch",
        "/v1/fleet/unheard-of",
        "/v1/fleet/../control/start-run",
        "//v1/control/start-run",
    ],
)
def test_nothing_but_the_fleet_api_is_there_from_outside(
    client: httpx.Client, superlink: LiveSuperLink, path: str
) -> None:
    secrets = SuperLinkSecrets.read(superlink.parent.secrets_path)
    headers = {**PROTOBUF, CONTROL_SECRET_HEADER: secrets.control}
    url = httpx.URL(f"https://{superlink.parent.public_address}").copy_with(raw_path=path.encode())
    assert client.post(url, headers=headers).status_code == 404
    assert client.get(url, headers=headers).status_code == 404


@pytest.mark.parametrize("secret", [None, "", "0" * 64])
def test_the_control_api_is_closed_without_its_secret(
    client: httpx.Client, superlink: LiveSuperLink, secret: str | None
) -> None:
    headers = PROTOBUF | ({} if secret is None else {CONTROL_SECRET_HEADER: secret})
    url = f"https://{superlink.parent.private_address}/v1/control/list-runs"
    assert client.post(url, headers=headers).status_code == 401


def test_the_control_api_opens_with_its_secret(
    client: httpx.Client, superlink: LiveSuperLink
) -> None:
    secrets = SuperLinkSecrets.read(superlink.parent.secrets_path)
    url = f"https://{superlink.parent.private_address}/v1/control/list-runs"
    headers = {**PROTOBUF, CONTROL_SECRET_HEADER: secrets.control}
    assert client.post(url, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["acquire-task", "pull-messages", "push-object", "get-nodes", "pull-batch", "push-batch"],
)
def test_the_runtime_api_is_closed_without_a_token(
    client: httpx.Client, superlink: LiveSuperLink, path: str
) -> None:
    url = f"https://{superlink.parent.private_address}/v1/runtime/{path}"
    refused = client.post(url, headers={**PROTOBUF, "flwr-task-token": "guessed"})
    assert (refused.status_code, refused.json()["code"]) == (401, 1008)


def test_a_worker_of_another_flower_version_is_refused(
    client: httpx.Client, superlink: LiveSuperLink
) -> None:
    url = f"https://{superlink.parent.private_address}/v1/runtime/pull-messages"
    refused = client.post(url, headers={**PROTOBUF, **FOREIGN_VERSION})
    assert (refused.status_code, refused.json()["code"]) == (412, 1001)


def test_the_secrets_and_keys_are_the_owners_alone(superlink: LiveSuperLink) -> None:
    folder = superlink.home / "flower"
    for name in ("secrets.json", "ca.key", "server.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_none_is_refused_in_one_sentence(superlink: LiveSuperLink) -> None:
    with pytest.raises(ConfigError, match="refuses the node key of oven"):
        superlink._do(superlink.parent.register_node("no key", "oven"))
