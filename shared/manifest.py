"""The signed description of one model version: what it is, what it eats, where it came from.

A version is named by the SHA-256 of its manifest's exact bytes; the manifest names each artifact by
the SHA-256 of its file. Agents serve nothing whose manifest the model key has not signed.
"""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.errors import PeerError, UntrustedModelError
from shared.messages import Digest
from shared.signing import SigningKey, VerifyingKey, open_sealed, seal
from shared.tasks.spec import TaskSpec

PAYLOAD_TYPE = "application/vnd.shoal.manifest.v1+json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024  # a golden batch of one 224 x 224 colour image takes 1.1 MB
MAX_ARTIFACT_BYTES = 2 * 1024**3
# What an artifact may ask of ONNX Runtime; anything else in `session_config` is refused.
ALLOWED_SESSION_CONFIG = frozenset({"session.disable_quant_qdq"})


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output, in the words of the Open Inference Protocol."""

    name: str
    datatype: str  # FP32, INT64, UINT8, …
    shape: tuple[int, ...]  # -1 is the batch


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """One file that computes the version's function."""

    variant: str  # "fp32", "int8-weights", …
    sha256: Digest
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_ARTIFACT_BYTES)]
    session_config: dict[str, str] = msgspec.field(default_factory=dict)


class GoldenBatch(msgspec.Struct, frozen=True, kw_only=True):
    """Inputs and the outputs that they must give, for the self-test on a device.

    The inputs are drawn from the task's contract, never from data. Row major, little endian.
    """

    inputs: bytes  # float32, `rows` times the input's shape without its batch
    outputs: bytes  # float32, `rows` times the output's shape
    rows: int
    tolerance: float  # largest absolute difference that passes, in units of the output


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """From which training this version came."""

    run_id: str
    rounds: int
    plan_digest: Digest
    parameters_sha256: Digest
    code_version: str
    parent: Digest | None = None  # the version that the run started from


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed."""

    model: str  # name under which it is served
    task: TaskSpec
    created_at: datetime
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]  # class names by index; empty for regression
    artifacts: tuple[Artifact, ...]
    ship: str  # the variant that devices serve
    golden: GoldenBatch
    lineage: Lineage

    @property
    def shipped(self) -> Artifact:
        """The artifact that devices serve."""
        return next(a for a in self.artifacts if a.variant == self.ship)


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
    except (PeerError, msgspec.DecodeError) as error:
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
