"""What describes one model version: what it is, what it eats, where it came from. Types alone.

A version is named by the SHA-256 of its manifest's exact bytes; the manifest names each artifact by
the SHA-256 of its file. Signing and checking are in signed_manifest.py, so that the inference
server, which does neither, carries no cryptography.
"""

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

from shared.tasks.spec import TaskSpec

MAX_MANIFEST_BYTES = 4 * 1024 * 1024  # a golden batch of one 224 x 224 colour image takes 1.1 MB
MAX_ARTIFACT_BYTES = 2 * 1024**3
# What an artifact may ask of ONNX Runtime; anything else in `session_config` is refused.
ALLOWED_SESSION_CONFIG = frozenset({"session.disable_quant_qdq"})
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]  # hex SHA-256


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
    # Largest absolute difference on the golden batch that passes; None: the batch's own.
    tolerance: float | None = None
    needs: tuple[str, ...] = ()  # what a processor must have to be fast and right with it

    def allowed_difference(self, golden: "GoldenBatch") -> float:
        """Return how far outputs may be from ``golden``, in units of the output."""
        return golden.tolerance if self.tolerance is None else self.tolerance


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
    network: str = ""  # of the task's students; empty: its own


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed."""

    model: str  # name under which it is served
    task: TaskSpec
    created_at: datetime
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    labels: tuple[str, ...]  # class names by index; empty for regression
    artifacts: tuple[Artifact, ...]
    ship: str  # the variant that the coordinator's own measurements favour
    golden: GoldenBatch
    lineage: Lineage

    @property
    def shipped(self) -> Artifact:
        """The artifact that the coordinator would serve; a device may find another one faster."""
        return next(a for a in self.artifacts if a.variant == self.ship)

    def artifact(self, sha256: str) -> Artifact | None:
        """Return the artifact with this digest."""
        return next((a for a in self.artifacts if a.sha256 == sha256), None)
