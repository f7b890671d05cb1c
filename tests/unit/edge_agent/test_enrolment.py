"""Joining a coordinator, over real HTTP, with a coordinator that can misbehave."""

import hashlib
import http.server
import json
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_pem_public_key, load_ssh_private_key

from edge_agent.enrolment import enroll, load_enrolment
from shared.enrolment import (
    REPLY_PAYLOAD_TYPE,
    EnrolmentReply,
    EnrolmentRequest,
    JoinToken,
    binding,
)
from shared.errors import ConfigError, PeerError, UnavailableError
from shared.listening import free_port
from shared.signing import SigningKey, VerifyingKey, seal


class SmallCoordinator:
    """Answers ``POST /v1/enroll``; tests change how."""

    def __init__(self) -> None:
        self.key = SigningKey.generate()
        self.model_key = SigningKey.generate()
        self.fleet_key = str(SigningKey.generate().public)
        self.root = b"root metadata"
        self.requests: list[EnrolmentRequest] = []
        self.failure: tuple[int, bytes] | None = None
        self.sealed_by = self.key
        self.claims = self.key

    def token(self) -> str:
        return str(JoinToken.new(self.key.public.key_id))

    def answer(self, body: bytes) -> tuple[int, bytes]:
        request = msgspec.json.decode(body, type=EnrolmentRequest)
        self.requests.append(request)
        if self.failure is not None:
            return self.failure
        reply = EnrolmentReply(
            device_id=request.device_id or "device-1",
            fleet="main",
            command_key=str(self.claims.public),
            model_key=str(self.model_key.public),
            api_url="http://127.0.0.1:8470",
            mqtt_url="mqtt://127.0.0.1:8471",
            superlink_ca_pem="a certificate",
            fleet_key=self.fleet_key,
            root_metadata=self.root,
        )
        payload = msgspec.json.encode(reply)
        return 200, seal(payload, payload_type=REPLY_PAYLOAD_TYPE, key=self.sealed_by)


@pytest.fixture
def coordinator() -> SmallCoordinator:
    return SmallCoordinator()


@pytest.fixture
def url(coordinator: SmallCoordinator) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            status, content = coordinator.answer(body) if self.path == "/v1/enroll" else (404, b"")
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_enrolled_device_knows_who_it_is_and_whom_it_trusts(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    enrolled = enroll(tmp_path, url, coordinator.token(), "edge-1")

    assert (enrolled.device_id, enrolled.fleet) == ("edge-1", "main")
    assert enrolled.mqtt_url == "mqtt://127.0.0.1:8471"
    assert list(enrolled.command_keys) == [coordinator.key.public.key_id]
    assert list(enrolled.model_keys) == [coordinator.model_key.public.key_id]
    assert [str(key) for key in enrolled.fleet_keys.values()] == [coordinator.fleet_key]
    assert enrolled.root == coordinator.root
    again = load_enrolment(tmp_path)
    assert again.key.public.key_id == enrolled.key.public.key_id
    assert "key=" not in repr(again).replace("_key", "")


def test_the_request_proves_possession_of_both_keys(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    enroll(tmp_path, url, coordinator.token(), None)
    (request,) = coordinator.requests

    content = binding(
        token_id=request.token_id,
        identity_key=request.identity_key,
        node_key_pem=request.node_key_pem,
    )
    VerifyingKey.from_text(request.identity_key).verify(request.identity_proof, content)
    node_key = load_pem_public_key(request.node_key_pem.encode())
    assert isinstance(node_key, ec.EllipticCurvePublicKey)
    node_key.verify(request.node_proof, content, ec.ECDSA(SHA256()))


def test_private_files_are_readable_by_the_owner_alone(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    enroll(tmp_path, url, coordinator.token(), None)
    for name in ("identity.pem", "node.pem", "command-key-id"):
        assert mode(tmp_path / name) == 0o600, name


def test_flower_can_read_the_node_key(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    enrolled = enroll(tmp_path, url, coordinator.token(), None)
    key = load_ssh_private_key(enrolled.node_key_path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)


def test_after_a_lost_reply_the_same_keys_are_sent_again(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    token = coordinator.token()
    coordinator.failure = (502, b"")
    with pytest.raises(UnavailableError, match="HTTP 502"):
        enroll(tmp_path, url, token, "edge-1")
    coordinator.failure = None
    enroll(tmp_path, url, token, "edge-1")

    first, second = coordinator.requests
    assert (first.identity_key, first.node_key_pem) == (second.identity_key, second.node_key_pem)


def test_a_home_is_enrolled_once(coordinator: SmallCoordinator, url: str, tmp_path: Path) -> None:
    enroll(tmp_path, url, coordinator.token(), "edge-1")
    with pytest.raises(ConfigError, match="enrolled already as edge-1; choose another --home"):
        enroll(tmp_path, url, coordinator.token(), "edge-2")


def test_the_coordinators_refusal_is_passed_on(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    sentence = "the join token was used up; get a new one from 'shoal token create'"
    coordinator.failure = (401, json.dumps({"error": sentence}).encode())
    with pytest.raises(ConfigError, match="the coordinator refused: the join token was used up"):
        enroll(tmp_path, url, coordinator.token(), None)


def test_a_refusal_without_words_says_its_status(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    coordinator.failure = (403, b"<html>proxy</html>")
    with pytest.raises(ConfigError, match="HTTP 403"):
        enroll(tmp_path, url, coordinator.token(), None)


def test_another_coordinator_than_the_tokens_is_not_believed(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    coordinator.claims = coordinator.sealed_by = SigningKey.generate()
    with pytest.raises(PeerError, match="somebody may stand in between"):
        enroll(tmp_path, url, coordinator.token(), None)
    with pytest.raises(ConfigError, match="is not enrolled"):
        load_enrolment(tmp_path)


def test_a_reply_that_only_claims_the_tokens_key_is_not_believed(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    coordinator.sealed_by = SigningKey.generate()
    with pytest.raises(PeerError, match="no key that is trusted"):
        enroll(tmp_path, url, coordinator.token(), None)


@pytest.mark.parametrize("content", [b"", b"hello", b'{"payload": "aGk="}', b"x" * 100_000])
def test_an_answer_that_is_no_reply_is_not_believed(
    coordinator: SmallCoordinator, url: str, tmp_path: Path, content: bytes
) -> None:
    coordinator.failure = (200, content)
    with pytest.raises(PeerError, match=r"no enrolment reply|too large"):
        enroll(tmp_path, url, coordinator.token(), None)


def test_no_coordinator_there_is_said_in_a_sentence(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    token = str(JoinToken.new("0" * 64))
    with pytest.raises(UnavailableError, match="is 'shoal serve' running"):
        enroll(tmp_path, address, token, None)


@pytest.mark.parametrize("address", ["127.0.0.1:8470", "ftp://x", "http://"])
def test_an_address_of_another_kind_is_said_in_a_sentence(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="write http://host:port"):
        enroll(tmp_path, address, str(JoinToken.new("0" * 64)), None)


@pytest.mark.parametrize("token", ["", "shoal1.abc", "shoal2." + "0" * 200])
def test_what_is_no_token_is_said_in_a_sentence(tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigError, match="not a join token"):
        enroll(tmp_path, "http://127.0.0.1:1", token, None)


@pytest.mark.parametrize("name", ["Edge", "edge_1", "-edge", "e" * 64, ""])
def test_a_name_that_no_device_can_have_is_refused_here(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a device; use small letters"):
        enroll(tmp_path, "http://127.0.0.1:1", str(JoinToken.new("0" * 64)), name)


def test_a_device_that_is_not_enrolled_is_told_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run 'shoal-agent enroll --home"):
        load_enrolment(tmp_path)


def _swap_reply(home: Path, other: Path) -> None:
    shutil.copy(other / "enrolment.json", home / "enrolment.json")


def _edit_reply(home: Path, _: Path) -> None:
    path = home / "enrolment.json"
    path.write_bytes(path.read_bytes().replace(b'"sig":"', b'"sig":"AAAA'))


def _lose_identity(home: Path, _: Path) -> None:
    (home / "identity.pem").unlink()


def _break_identity(home: Path, _: Path) -> None:
    (home / "identity.pem").write_text("nothing")


def _lose_pin(home: Path, _: Path) -> None:
    (home / "command-key-id").unlink()


@pytest.mark.parametrize(
    "damage", [_swap_reply, _edit_reply, _lose_identity, _break_identity, _lose_pin]
)
def test_an_enrolment_that_was_tampered_with_is_not_used(
    coordinator: SmallCoordinator,
    url: str,
    tmp_path: Path,
    damage: Callable[[Path, Path], None],
) -> None:
    home, other = tmp_path / "home", tmp_path / "other"
    enroll(home, url, coordinator.token(), "edge-1")
    coordinator.key = coordinator.claims = coordinator.sealed_by = SigningKey.generate()
    enroll(other, url, coordinator.token(), "edge-1")
    damage(home, other)
    with pytest.raises(ConfigError, match=r"is damaged .* enrol again"):
        load_enrolment(home)


def test_a_fleet_key_that_was_learned_elsewhere_is_pinned(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    wanted = VerifyingKey.from_text(coordinator.fleet_key).key_id
    enrolled = enroll(tmp_path, url, coordinator.token(), "edge-1", fleet_key_id=wanted)
    assert list(enrolled.fleet_keys) == [wanted]


@pytest.mark.parametrize("named", [str(SigningKey.generate().public), ""], ids=["other", "none"])
def test_another_fleet_key_than_the_one_learned_elsewhere_leaves_nothing_enrolled(
    coordinator: SmallCoordinator, url: str, tmp_path: Path, named: str
) -> None:
    wanted = VerifyingKey.from_text(coordinator.fleet_key).key_id
    coordinator.fleet_key = named
    with pytest.raises(PeerError, match="ask whoever gave you --fleet-key") as caught:
        enroll(tmp_path, url, coordinator.token(), "edge-1", fleet_key_id=wanted)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="is not enrolled"):
        load_enrolment(tmp_path)


@pytest.mark.parametrize("fingerprint", ["", "abc", "A" * 64, "a" * 64 + "\n"])
def test_something_else_than_a_fingerprint_is_refused_before_anything_is_sent(
    coordinator: SmallCoordinator, url: str, tmp_path: Path, fingerprint: str
) -> None:
    with pytest.raises(ConfigError, match="is no fleet key's fingerprint"):
        enroll(tmp_path, url, coordinator.token(), "edge-1", fleet_key_id=fingerprint)
    assert not coordinator.requests


def test_an_older_coordinator_without_a_fleet_key_can_be_joined(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    coordinator.fleet_key = ""
    assert not enroll(tmp_path, url, coordinator.token(), "edge-1").fleet_keys


def test_the_root_that_a_person_named_is_the_one_that_is_pinned(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    wanted = hashlib.sha256(b"another root").hexdigest()
    with pytest.raises(PeerError, match="ask whoever gave you --root"):
        enroll(tmp_path, url, coordinator.token(), "edge-1", root_fingerprint=wanted)
    with pytest.raises(ConfigError, match="is not enrolled"):
        load_enrolment(tmp_path)
    coordinator.root = b"another root"
    enrolled = enroll(tmp_path, url, coordinator.token(), "edge-1", root_fingerprint=wanted)
    assert enrolled.root == b"another root"


def test_a_root_that_is_no_fingerprint_is_refused_before_anything_is_sent(
    coordinator: SmallCoordinator, url: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'shoal trust status' prints"):
        enroll(tmp_path, url, coordinator.token(), "edge-1", root_fingerprint="abc")
    assert coordinator.requests == []
