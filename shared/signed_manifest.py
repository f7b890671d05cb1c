"""A manifest and the signature that makes it worth something.

Agents serve nothing whose manifest the model key has not signed.
"""

import hashlib
from collections.abc import Mapping

import msgspec

from shared.errors import PeerError, UntrustedModelError
from shared.manifest import ALLOWED_SESSION_CONFIG, MAX_MANIFEST_BYTES, Manifest
from shared.signing import SigningKey, VerifyingKey, open_sealed, seal
from shared.untrusted import NOT_JSON

PAYLOAD_TYPE = "application/vnd.shoal.manifest.v1+json"


class SignedManifest(msgspec.Struct, frozen=True):
    """A manifest that was checked, its name, and the sealed bytes that prove it."""

    version: str  # hex SHA-256 of the manifest's bytes
    manifest: Manifest
    sealed: bytes


def sign_manifest(manifest: Manifest, key: SigningKey) -> SignedManifest:
    """Serialise, name and sign ``manifest``."""
    payload = msgspec.json.encode(manifest)
    sealed = seal(payload, payload_type=PAYLOAD_TYPE, key=key)
    return SignedManifest(hashlib.sha256(payload).hexdigest(), manifest, sealed)


def open_manifest(
    sealed: bytes, *, trusted: Mapping[str, VerifyingKey], version: str | None = None
) -> SignedManifest:
    """Check a sealed manifest and return it.

    Args:
        sealed: what was downloaded.
        trusted: model keys by key id.
        version: the digest that was asked for, if one was.

    Raises:
        UntrustedModelError: too large, signed by nobody trusted, altered, another version, or it
            asks for something that is not allowed.
    """
    if len(sealed) > MAX_MANIFEST_BYTES:
        raise UntrustedModelError(f"manifest of {len(sealed)} bytes is over {MAX_MANIFEST_BYTES}")
    try:
        payload = open_sealed(sealed, payload_type=PAYLOAD_TYPE, trusted=trusted)
        manifest = msgspec.json.decode(payload, type=Manifest)
    except (PeerError, *NOT_JSON) as error:
        raise UntrustedModelError(f"manifest cannot be trusted: {error}") from error
    digest = hashlib.sha256(payload).hexdigest()
    if version is not None and digest != version:
        raise UntrustedModelError(f"asked for version {version[:12]} and got {digest[:12]}")
    if all(a.variant != manifest.ship for a in manifest.artifacts):
        raise UntrustedModelError(
            f"manifest ships {manifest.ship!r} but describes no such artifact"
        )
    for artifact in manifest.artifacts:
        if extra := artifact.session_config.keys() - ALLOWED_SESSION_CONFIG:
            raise UntrustedModelError(f"artifact asks for session settings {sorted(extra)}")
    return SignedManifest(digest, manifest, sealed)
