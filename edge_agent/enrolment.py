"""How this device joins a coordinator, and what it trusts from then on.

Everything hangs on the join token's last part, the fingerprint of the coordinator's command key:
the reply is believed only under that key, is kept sealed, and is checked again at each start. So
nobody who stands between, or who edits the file later, can slip in another key or address.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from shared.enrolment import (
    REPLY_PAYLOAD_TYPE,
    EnrolmentReply,
    EnrolmentRequest,
    JoinToken,
    binding,
)
from shared.errors import ConfigError, PeerError, UnavailableError
from shared.files import make_folder, write_atomic, write_private
from shared.messages import DEVICE_ID_PATTERN
from shared.signing import SigningKey, VerifyingKey, open_sealed
from shared.untrusted import NOT_JSON

_REPLY_FILE = "enrolment.json"
_PIN_FILE = "command-key-id"
_MAX_REPLY_BYTES = 64 * 1024
_TIMEOUT_S = 30.0
_KEY_ID = re.compile(r"^[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Enrolment:
    """Who this device is, whom it obeys and where they are."""

    device_id: str
    fleet: str
    api_url: str
    mqtt_url: str
    superlink_ca_pem: str
    node_key_path: Path  # EC P-256, OpenSSH form, as Flower reads it
    key: SigningKey = field(repr=False)  # signs all that the device says
    command_keys: Mapping[str, VerifyingKey]  # by key id: what may command
    model_keys: Mapping[str, VerifyingKey]  # by key id: what may sign manifests
    # By key id: what may sign the membership list. Empty: no secure sum has this device.
    fleet_keys: Mapping[str, VerifyingKey] = field(default_factory=dict)
    root: bytes = b""  # TUF metadata: what says which models are released. Empty: none is fetched
    mqtt_ca_pem: str = ""  # of a broker at mqtts://; empty: a CA that the system knows


def enroll(
    home: Path,
    coordinator_url: str,
    token: str,
    device_id: str | None,
    *,
    fleet_key_id: str | None = None,
    root_fingerprint: str | None = None,
) -> Enrolment:
    """Join the coordinator that made ``token``, and keep the proof under ``home``.

    After a lost reply it may simply be called again: the same keys give the same device.

    Args:
        home: the agent's state folder; keys are made there, readable by the owner alone.
        coordinator_url: ``http://host:port`` of the coordinator's API.
        token: what ``shoal token create`` printed.
        device_id: the name wished for; None lets the coordinator choose.
        fleet_key_id: hex SHA-256 of the fleet key, learned from somebody else than the coordinator;
            None believes the coordinator this once.
        root_fingerprint: hex SHA-256 of the TUF root, learned likewise.

    Raises:
        ConfigError: enrolled already, not a token, a damaged key file, or the coordinator refused.
        PeerError: the answer does not come from the coordinator that made the token, or it names
            another fleet key or root; nothing is kept then.
        UnavailableError: no coordinator answers there.
    """
    if is_enrolled(home):
        enrolled = load_enrolment(home)
        raise ConfigError(
            f"{home} is enrolled already as {enrolled.device_id}; choose another --home"
        )
    parsed = JoinToken.parse(token)
    if fleet_key_id is not None and not _KEY_ID.match(fleet_key_id):
        raise ConfigError(
            f"{fleet_key_id!r} is no fleet key's fingerprint; copy the 64 characters that "
            "'shoal membership show' prints"
        )
    if root_fingerprint is not None and not _KEY_ID.match(root_fingerprint):
        raise ConfigError(
            f"{root_fingerprint!r} is no root's fingerprint; copy the 64 characters that "
            "'shoal trust status' prints"
        )
    make_folder(home)
    try:
        identity = SigningKey.load_or_create(home / "identity.pem")
        node_key = _load_or_create_node_key(home / "node.pem")
    except ValueError as error:
        raise ConfigError(
            f"a key file in {home} is damaged ({error}); enrol with a new --home"
        ) from error
    request = _signed_request(parsed, identity, node_key, device_id)
    sealed = _ask(coordinator_url, request)
    reply = open_reply(sealed, parsed.coordinator_key_id)
    _check_fleet_key(reply, fleet_key_id)
    _check_root(reply, root_fingerprint)
    write_private(home / _PIN_FILE, parsed.coordinator_key_id.encode())
    write_atomic(home / _REPLY_FILE, sealed)
    return load_enrolment(home)


def is_enrolled(home: Path) -> bool:
    """Return whether `enroll` came to its end here."""
    return (home / _REPLY_FILE).exists()


def load_enrolment(home: Path) -> Enrolment:
    """Read what `enroll` kept, checked against the pinned key once more.

    Raises:
        ConfigError: not enrolled, or the files were changed since.
    """
    try:
        sealed = (home / _REPLY_FILE).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{home} is not enrolled; run 'shoal-agent enroll --home {home} "
            "--coordinator URL --token TOKEN' first"
        ) from error
    try:
        reply = open_reply(sealed, (home / _PIN_FILE).read_text().strip())
        identity_path = (home / "identity.pem").resolve(strict=True)  # a lost one is not replaced
        identity = SigningKey.load_or_create(identity_path)
        command_key = VerifyingKey.from_text(reply.command_key)
        model_key = VerifyingKey.from_text(reply.model_key)
        fleet_keys = _fleet_keys(reply)
    except (PeerError, OSError, ValueError) as error:
        raise ConfigError(
            f"the enrolment in {home} is damaged ({error}); enrol again with a new --home"
        ) from error
    return Enrolment(
        device_id=reply.device_id,
        fleet=reply.fleet,
        api_url=reply.api_url,
        mqtt_url=reply.mqtt_url,
        mqtt_ca_pem=reply.mqtt_ca_pem,
        superlink_ca_pem=reply.superlink_ca_pem,
        node_key_path=home / "node.pem",
        key=identity,
        command_keys={command_key.key_id: command_key},
        model_keys={model_key.key_id: model_key},
        fleet_keys=fleet_keys,
        root=reply.root_metadata,
    )


class _Payload(msgspec.Struct):
    """The one field of a DSSE envelope that names the key to check it with."""

    payload: bytes


def open_reply(sealed: bytes, coordinator_key_id: str) -> EnrolmentReply:
    """Return the reply if the key named ``coordinator_key_id`` sealed it.

    Raises:
        PeerError: it is no such reply, or another key sealed it.
    """
    try:
        claimed = msgspec.json.decode(
            msgspec.json.decode(sealed, type=_Payload).payload, type=EnrolmentReply
        )
    except NOT_JSON as error:
        raise PeerError(f"that is no enrolment reply: {error}; check the address") from error
    key = VerifyingKey.from_text(claimed.command_key)
    if key.key_id != coordinator_key_id:
        raise PeerError(
            "the coordinator that answered is not the one that made this token; somebody may "
            "stand in between: check the address and take a new token"
        )
    open_sealed(sealed, payload_type=REPLY_PAYLOAD_TYPE, trusted={key.key_id: key})
    return claimed


def _fleet_keys(reply: EnrolmentReply) -> dict[str, VerifyingKey]:
    if not reply.fleet_key:
        return {}
    key = VerifyingKey.from_text(reply.fleet_key)
    return {key.key_id: key}


def _check_fleet_key(reply: EnrolmentReply, wanted: str | None) -> None:
    """Raise PeerError unless the reply names the fleet key that was ``wanted``, if one was."""
    named = _fleet_keys(reply)
    if wanted is not None and wanted not in named:
        raise PeerError(
            f"the coordinator names the fleet key {next(iter(named), 'none')[:12]}, not "
            f"{wanted[:12]}; ask whoever gave you --fleet-key before you enrol this device"
        )


def _check_root(reply: EnrolmentReply, wanted: str | None) -> None:
    """Raise PeerError unless the reply holds the root that was ``wanted``, if one was."""
    named = hashlib.sha256(reply.root_metadata).hexdigest()
    if wanted is not None and wanted != named:
        raise PeerError(
            f"the coordinator's TUF root is {named[:12]}, not {wanted[:12]}; ask whoever gave you "
            "--root before you enrol this device"
        )


def _signed_request(
    token: JoinToken,
    identity: SigningKey,
    node_key: ec.EllipticCurvePrivateKey,
    device_id: str | None,
) -> EnrolmentRequest:
    """Prove that both keys are ours, bound to this token."""
    node_key_pem = (
        node_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    )
    bound = binding(
        token_id=token.token_id, identity_key=str(identity.public), node_key_pem=node_key_pem
    )
    request = EnrolmentRequest(
        token_id=token.token_id,
        secret=token.secret,
        device_id=device_id,
        identity_key=str(identity.public),
        node_key_pem=node_key_pem,
        identity_proof=identity.sign(bound),
        node_proof=node_key.sign(bound, ec.ECDSA(SHA256())),
    )
    try:
        return msgspec.convert(msgspec.to_builtins(request), EnrolmentRequest)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{device_id!r} cannot name a device; use small letters, digits and hyphens, "
            f"at most 63 ({DEVICE_ID_PATTERN})"
        ) from error


def _ask(coordinator_url: str, request: EnrolmentRequest) -> bytes:
    """Post the request and return the sealed reply."""
    url = f"{coordinator_url.rstrip('/')}/v1/enroll"
    try:
        response = httpx.post(
            url,
            content=msgspec.json.encode(request),
            headers={"content-type": "application/json"},
            timeout=_TIMEOUT_S,
            trust_env=False,  # a proxy cannot reach this machine's loopback
        )
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ConfigError(
            f"{coordinator_url!r} is not a coordinator's address; write http://host:port"
        ) from error
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"no coordinator answers at {coordinator_url} ({error}); is 'shoal serve' running?"
        ) from error
    if response.is_server_error:
        raise UnavailableError(
            f"the coordinator at {coordinator_url} failed (HTTP {response.status_code}); "
            "look at its log and try again"
        )
    if not response.is_success:
        raise ConfigError(f"the coordinator refused: {_reason_of(response)}")
    if len(response.content) > _MAX_REPLY_BYTES:
        raise PeerError(f"the answer of {url} is too large to be an enrolment reply")
    return response.content


class _Refusal(msgspec.Struct):
    error: str


def _reason_of(response: httpx.Response) -> str:
    """Return the sentence of an error response, or its status where there is none."""
    try:
        return msgspec.json.decode(response.content, type=_Refusal).error
    except NOT_JSON:
        return f"HTTP {response.status_code}; check the address and take a new token"


def _load_or_create_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read Flower's node key from its OpenSSH form, made (mode 0600) if it is missing."""
    if path.exists():
        key = load_ssh_private_key(path.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"{path} holds another kind of key; move it away and enrol again")
        return key
    key = ec.generate_private_key(ec.SECP256R1())
    write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return key
