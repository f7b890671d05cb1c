"""How a device joins: a one-time token, one request, one signed reply.

The token carries the fingerprint (key id) of the coordinator's command key, so the reply, and with
it every address and key the device will ever trust, is authenticated even over plain loopback HTTP.
The request proves possession of both keys that it binds to the device id.
"""

import hashlib
import re
import secrets
from typing import Annotated, Self

import msgspec
from msgspec import Meta

from shared.errors import ConfigError
from shared.messages import DEVICE_ID_PATTERN, Identifier

REPLY_PAYLOAD_TYPE = "application/vnd.shoal.enrolment.v1+json"
_TOKEN = re.compile(r"^shoal1\.([0-9a-f]{16})\.([0-9a-f]{64})\.([0-9a-f]{64})$")

DeviceId = Annotated[str, Meta(pattern=DEVICE_ID_PATTERN)]


class JoinToken(msgspec.Struct, frozen=True):
    """What `shoal token create` prints. The coordinator stores only `secret_hash`."""

    token_id: str
    secret: str  # 32 random bytes, hex
    coordinator_key_id: str  # hex SHA-256 of the command key

    @classmethod
    def new(cls, coordinator_key_id: str) -> Self:
        """Draw a fresh token that pins the coordinator's command key."""
        return cls(secrets.token_hex(8), secrets.token_hex(32), coordinator_key_id)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the printed form; raise ConfigError where it is not one."""
        if match := _TOKEN.match(text.strip()):
            return cls(*match.groups())
        raise ConfigError(
            "that is not a join token (shoal1.…); copy the whole line that "
            "'shoal token create' printed"
        )

    def __str__(self) -> str:
        return f"shoal1.{self.token_id}.{self.secret}.{self.coordinator_key_id}"

    @property
    def secret_hash(self) -> str:
        """Hex SHA-256 of the secret: all that the coordinator keeps."""
        return hashlib.sha256(self.secret.encode()).hexdigest()


class EnrolmentRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/enroll``. Retried with the same keys it gives the same device id."""

    token_id: Identifier
    secret: Identifier
    device_id: DeviceId | None  # a wish; None: the coordinator names the device
    identity_key: str  # base64 of 32 raw Ed25519 bytes
    node_key_pem: Annotated[str, Meta(max_length=1000)]  # Flower node key, EC P-256, public PEM
    identity_proof: bytes  # Ed25519 signature over `binding`
    node_proof: bytes  # ECDSA-SHA256 signature (DER) over `binding`


class EnrolmentReply(msgspec.Struct, frozen=True, kw_only=True):
    """Sealed by the command key under `REPLY_PAYLOAD_TYPE`; the device keeps the sealed bytes."""

    device_id: DeviceId
    fleet: Identifier
    command_key: str  # base64; its key id is what the token pinned
    model_key: str  # base64; signs manifests
    api_url: str
    mqtt_url: str  # mqtt://host:port, or mqtts:// for TLS
    mqtt_ca_pem: str = ""  # of such a broker; empty: a CA that the system knows
    superlink_ca_pem: str
    fleet_key: str = ""  # base64; signs the membership list. Empty: a coordinator without one
    root_metadata: bytes = b""  # the TUF root to pin. Empty: a coordinator without one


def binding(*, token_id: str, identity_key: str, node_key_pem: str) -> bytes:
    """Return the bytes that both proofs sign: which keys are bound by which token."""
    return b"shoal enrolment v1\n" + msgspec.json.encode([token_id, identity_key, node_key_pem])
