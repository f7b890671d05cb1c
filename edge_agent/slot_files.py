"""What one slot holds, for those who only read: the agent's own children.

Free of cryptography: the daemon checks the signature before it names a slot to a child, and what it
reports as served are the digests that the child computed.
"""

import hashlib
from pathlib import Path

import msgspec

from shared.errors import UntrustedModelError
from shared.manifest import Manifest

MANIFEST = "manifest.json"  # the sealed bytes, as downloaded
MODEL = "model.onnx"


class _Sealed(msgspec.Struct, frozen=True, rename="camel"):
    payload: bytes


def sealed_manifest(slot: Path) -> bytes:
    """Return the manifest's sealed bytes; raise UntrustedModelError where they cannot be read."""
    path = slot / MANIFEST
    try:
        return path.read_bytes()
    except OSError as error:
        raise UntrustedModelError(f"cannot read {path}: {error.strerror}") from error


def unverified_manifest(slot: Path) -> tuple[str, Manifest]:
    """Read a slot's manifest and its version without checking who signed it.

    Raises:
        UntrustedModelError: missing, or not a manifest.
    """
    try:
        payload = msgspec.json.decode(sealed_manifest(slot), type=_Sealed).payload
        manifest = msgspec.json.decode(payload, type=Manifest)
    except msgspec.DecodeError as error:
        raise UntrustedModelError(f"{slot / MANIFEST} is not a manifest: {error}") from error
    return hashlib.sha256(payload).hexdigest(), manifest
