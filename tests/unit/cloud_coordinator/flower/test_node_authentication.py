from base64 import b64encode
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from fastapi import HTTPException
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from cloud_coordinator.flower.node_authentication import NodeAuthenticator

START = datetime(2026, 5, 1, tzinfo=UTC)
KEY = generate_private_key(SECP256R1())
PEM = public_key_to_bytes(KEY.public_key())


class Clock:
    now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nodes() -> dict[bytes, int]:
    return {PEM: 7}


@pytest.fixture
def authenticator(nodes: dict[bytes, int], clock: Clock) -> NodeAuthenticator:
    return NodeAuthenticator(nodes.get, clock)


def headers(timestamp: str = START.isoformat()) -> dict[str, str]:
    return {
        "flwr-public-key": b64encode(PEM).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(sign_message(KEY, timestamp.encode())).decode(),
    }


def test_a_registered_key_is_named_with_its_node(authenticator: NodeAuthenticator) -> None:
    assert authenticator.authenticate(headers()) == (PEM, 7)


def test_a_signature_is_remembered_but_only_within_its_window(
    authenticator: NodeAuthenticator, clock: Clock
) -> None:
    signed = headers()
    authenticator.authenticate(signed)
    clock.now = START + timedelta(seconds=304)
    assert authenticator.authenticate(signed) == (PEM, 7)

    clock.now = START + timedelta(seconds=306)

    with pytest.raises(HTTPException) as refused:
        authenticator.authenticate(signed)
    assert refused.value.status_code == 401


def test_a_remembered_signature_does_not_outlive_its_keys_registration(
    authenticator: NodeAuthenticator, nodes: dict[bytes, int]
) -> None:
    signed = headers()
    authenticator.authenticate(signed)
    nodes.clear()
    assert authenticator.authenticate(signed) == (PEM, None)


def test_one_wrong_part_of_a_remembered_signature_is_refused(
    authenticator: NodeAuthenticator,
) -> None:
    signed = headers()
    authenticator.authenticate(signed)
    with pytest.raises(HTTPException):
        authenticator.authenticate({**signed, "flwr-timestamp": "2026-05-01T00:00:01+00:00"})


def test_strangers_fill_no_memory(authenticator: NodeAuthenticator) -> None:
    for _ in range(3):
        stranger = generate_private_key(SECP256R1())
        signed = headers() | {
            "flwr-public-key": b64encode(public_key_to_bytes(stranger.public_key())).decode(),
            "flwr-signature": b64encode(
                sign_message(stranger, START.isoformat().encode())
            ).decode(),
        }
        assert authenticator.authenticate(signed)[1] is None
    assert not authenticator._signed_at


@pytest.mark.parametrize("timestamp", ["2026-05-01T00:00:00", "yesterday", ""])
def test_a_timestamp_that_names_no_moment_is_refused(
    authenticator: NodeAuthenticator, timestamp: str
) -> None:
    with pytest.raises(HTTPException):
        authenticator.authenticate(headers(timestamp))
