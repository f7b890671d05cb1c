"""Join tokens and enrolment, on SQLite and on PostgreSQL."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloud_coordinator.database import Database
from cloud_coordinator.devices.enrolment import Enrolment
from cloud_coordinator.devices.tables import DeviceRow, JoinTokenRow
from shared.enrolment import EnrolmentRequest, JoinToken, binding
from shared.errors import ConflictError, ShoalError, UnauthorizedError
from shared.signing import SigningKey
from tests.integration.coordinator.fake_device import DeviceKeys

COORDINATOR = "c" * 64
HOUR = timedelta(hours=1)


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 23, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def enrolment(database: Database, clock: Clock) -> Enrolment:
    return Enrolment(database, coordinator_key_id=COORDINATOR, clock=clock)


def test_a_device_joins_under_the_name_it_wishes(enrolment: Enrolment, database: Database) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    keys = DeviceKeys()
    assert enrolment.enrol(keys.request(token, "camera-1")) == "camera-1"
    with database.transaction() as session:
        row = session.get(DeviceRow, "camera-1")
        assert row is not None
        assert row.identity_key == str(keys.identity.public)
        assert row.node_key_pem == keys.node_pem


def test_a_device_without_a_wish_is_given_a_name(enrolment: Enrolment) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    assert enrolment.enrol(DeviceKeys().request(token)).startswith("device-")


def test_a_token_pins_the_coordinator_and_its_secret_is_not_stored(
    enrolment: Enrolment, database: Database
) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    assert token.coordinator_key_id == COORDINATOR
    with database.transaction() as session:
        row = session.get(JoinTokenRow, token.token_id)
        assert row is not None
        assert row.secret_hash == token.secret_hash
        assert token.secret not in str(vars(row))


def test_a_lost_reply_can_be_asked_for_again_even_when_the_token_is_spent_and_expired(
    enrolment: Enrolment, clock: Clock
) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    request = DeviceKeys().request(token)
    first = enrolment.enrol(request)
    clock.now += 2 * HOUR
    assert enrolment.enrol(request) == first


def test_the_same_keys_with_a_new_token_are_the_same_device(enrolment: Enrolment) -> None:
    keys = DeviceKeys()
    first = enrolment.enrol(keys.request(enrolment.create_token(uses=1, lifetime=HOUR)))
    second = enrolment.create_token(uses=1, lifetime=HOUR)
    assert enrolment.enrol(keys.request(second)) == first
    assert next(t for t in enrolment.tokens() if t.token_id == second.token_id).uses_left == 0


def test_a_spent_token_is_refused(enrolment: Enrolment) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    enrolment.enrol(DeviceKeys().request(token))
    with pytest.raises(UnauthorizedError, match="was used up; get a new one"):
        enrolment.enrol(DeviceKeys().request(token))


def test_an_expired_token_is_refused(enrolment: Enrolment, clock: Clock) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    clock.now += HOUR
    with pytest.raises(UnauthorizedError, match="expired at 2026-11-23T13:00:00"):
        enrolment.enrol(DeviceKeys().request(token))


def test_a_wrong_secret_and_an_unknown_token_are_refused_alike(enrolment: Enrolment) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    wrong = JoinToken(token.token_id, "0" * 64, COORDINATOR)
    unknown = JoinToken("0" * 16, token.secret, COORDINATOR)
    sentences = set()
    for bad in (wrong, unknown):
        with pytest.raises(UnauthorizedError) as caught:
            enrolment.enrol(DeviceKeys().request(bad))
        sentences.add(str(caught.value))
    assert len(sentences) == 1


def test_a_taken_name_is_refused_and_costs_no_use(enrolment: Enrolment) -> None:
    token = enrolment.create_token(uses=2, lifetime=HOUR)
    enrolment.enrol(DeviceKeys().request(token, "camera-1"))
    with pytest.raises(ConflictError, match="'camera-1' already; choose another name"):
        enrolment.enrol(DeviceKeys().request(token, "camera-1"))
    assert enrolment.tokens()[0].uses_left == 1


def test_a_key_of_another_device_is_refused(enrolment: Enrolment) -> None:
    token = enrolment.create_token(uses=2, lifetime=HOUR)
    first, second = DeviceKeys(), DeviceKeys()
    enrolment.enrol(first.request(token))
    second.identity = first.identity
    with pytest.raises(ConflictError, match="belongs to another device"):
        enrolment.enrol(second.request(token))


def altered_node_key(request: EnrolmentRequest) -> EnrolmentRequest:
    return msgspec.structs.replace(request, node_key_pem=DeviceKeys().node_pem)


def altered_identity(request: EnrolmentRequest) -> EnrolmentRequest:
    return msgspec.structs.replace(request, identity_key=str(SigningKey.generate().public))


def altered_token(request: EnrolmentRequest) -> EnrolmentRequest:
    other = DeviceKeys().request(JoinToken("f" * 16, request.secret, COORDINATOR))
    return msgspec.structs.replace(request, identity_proof=other.identity_proof)


def garbage_proof(request: EnrolmentRequest) -> EnrolmentRequest:
    return msgspec.structs.replace(request, node_proof=b"\x00")


def key_on_another_curve(request: EnrolmentRequest) -> EnrolmentRequest:
    keys = DeviceKeys()
    node = ec.generate_private_key(ec.SECP384R1())
    pem = node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    identity = str(keys.identity.public)
    content = binding(token_id=request.token_id, identity_key=identity, node_key_pem=pem)
    return msgspec.structs.replace(
        request,
        identity_key=identity,
        node_key_pem=pem,
        identity_proof=keys.identity.sign(content),
        node_proof=node.sign(content, ec.ECDSA(SHA256())),
    )


def no_key_at_all(request: EnrolmentRequest) -> EnrolmentRequest:
    return msgspec.structs.replace(request, node_key_pem="hello")


@pytest.mark.parametrize(
    "alter",
    [
        altered_node_key,
        altered_identity,
        altered_token,
        garbage_proof,
        key_on_another_curve,
        no_key_at_all,
    ],
)
def test_a_request_that_does_not_prove_both_keys_is_refused_and_costs_no_use(
    enrolment: Enrolment, alter: Callable[[EnrolmentRequest], EnrolmentRequest]
) -> None:
    token = enrolment.create_token(uses=1, lifetime=HOUR)
    with pytest.raises(UnauthorizedError, match="does not prove that the device holds its keys"):
        enrolment.enrol(alter(DeviceKeys().request(token)))
    assert enrolment.tokens()[0].uses_left == 1


def test_of_many_at_once_only_as_many_join_as_the_token_allows(enrolment: Enrolment) -> None:
    token = enrolment.create_token(uses=3, lifetime=HOUR)

    def try_to_enrol(_: int) -> bool:
        try:
            enrolment.enrol(DeviceKeys().request(token))
        except ShoalError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        joined = sum(pool.map(try_to_enrol, range(12)))
    assert joined == 3
    assert enrolment.tokens()[0].uses_left == 0
