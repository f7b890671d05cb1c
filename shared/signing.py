"""Ed25519 identities and DSSE envelopes: what a device obeys, it can prove who said.

DSSE (https://github.com/secure-systems-lab/dsse, protocol.md) signs the exact bytes of a payload
together with its type, so there is no canonical JSON to disagree about. A key is named by the
SHA-256 of its raw 32 public bytes, in hex; that name is also what join tokens pin.
"""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shared.errors import PeerError
from shared.files import write_private
from shared.untrusted import NOT_JSON


class VerifyingKey:
    """The public half: 32 raw bytes, and the name that others know it by."""

    def __init__(self, raw: bytes) -> None:
        try:
            self._key = Ed25519PublicKey.from_public_bytes(raw)
        except ValueError as error:
            raise PeerError("not an Ed25519 public key of 32 bytes") from error
        self.raw = raw
        self.key_id = hashlib.sha256(raw).hexdigest()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read the base64 form that JSON documents carry; raise PeerError where it is none."""
        try:
            return cls(b64decode(text, validate=True))
        except ValueError as error:
            raise PeerError("a public key must be base64") from error

    def __str__(self) -> str:
        return b64encode(self.raw).decode()

    def verify(self, signature: bytes, content: bytes) -> None:
        """Raise PeerError unless ``signature`` is this key's over ``content``."""
        try:
            self._key.verify(signature, content)
        except InvalidSignature as error:
            raise PeerError(f"bad signature for key {self.key_id[:12]}") from error


class SigningKey:
    """An identity's private half; it never leaves the file it was born in."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = VerifyingKey(key.public_key().public_bytes_raw())

    @classmethod
    def load_or_create(cls, path: Path) -> Self:
        """Read the PEM file at ``path``, made (mode 0600) if it is missing."""
        if path.exists():
            key = load_pem_private_key(path.read_bytes(), password=None)
            if not isinstance(key, Ed25519PrivateKey):
                raise ValueError(f"{path} holds another kind of key than Ed25519")
            return cls(key)
        key = Ed25519PrivateKey.generate()
        write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return cls(key)

    @classmethod
    def generate(cls) -> Self:
        """Make a key that lives in memory only."""
        return cls(Ed25519PrivateKey.generate())

    def sign(self, content: bytes) -> bytes:
        """Return the 64 byte signature over ``content``."""
        return self._key.sign(content)


class _Signature(msgspec.Struct, frozen=True):
    keyid: str
    sig: bytes  # msgspec carries bytes as base64


class _Dsse(msgspec.Struct, frozen=True, rename="camel"):
    payload_type: str
    payload: bytes
    signatures: list[_Signature]


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(_Dsse)


def seal(payload: bytes, *, payload_type: str, key: SigningKey) -> bytes:
    """Wrap ``payload`` into a DSSE envelope signed by ``key``."""
    signature = _Signature(key.public.key_id, key.sign(_pre_authentication(payload_type, payload)))
    return _ENCODER.encode(_Dsse(payload_type, payload, [signature]))


def open_sealed(sealed: bytes, *, payload_type: str, trusted: Mapping[str, VerifyingKey]) -> bytes:
    """Return the payload of a DSSE envelope that one of the ``trusted`` keys (by key id) signed.

    Raises:
        PeerError: malformed, of another type, signed by no trusted key, or altered.
    """
    try:
        envelope = _DECODER.decode(sealed)
    except NOT_JSON as error:
        raise PeerError(f"not a signed envelope: {error}") from error
    if envelope.payload_type != payload_type:
        raise PeerError(f"envelope holds {envelope.payload_type[:64]!r}, wanted {payload_type!r}")
    for signature in envelope.signatures:
        if key := trusted.get(signature.keyid):
            key.verify(signature.sig, _pre_authentication(payload_type, envelope.payload))
            return envelope.payload
    raise PeerError("signed by no key that is trusted here")


def _pre_authentication(payload_type: str, payload: bytes) -> bytes:
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
