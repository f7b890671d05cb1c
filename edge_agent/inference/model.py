"""From a slot on disk to a model that was checked in this very process.

The bytes that are hashed are the bytes that are loaded: the file is read once. The golden batch
then has to come out as the manifest says, because a runtime may compute something else than the
one that the version was judged with (another instruction set, a miscompiled kernel).
"""

import math
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from edge_agent.inference.engine import DTYPES, Array, Engine, EngineOptions
from edge_agent.slot_files import MODEL, unverified_manifest
from shared.errors import UnfitModelError, UntrustedModelError
from shared.manifest import Artifact, Manifest, TensorSpec


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded version, and how far it was from its golden outputs on this machine."""

    version: str
    manifest: Manifest
    artifact: Artifact  # the one of the manifest's files that is here
    engine: Engine
    largest_difference: float  # in units of the output


def load_model(slot: Path, options: EngineOptions | None = None) -> Model:
    """Read, load and check the model in ``slot``.

    Raises:
        UntrustedModelError: a file is missing, or the model is not the one that the manifest names.
        UnfitModelError: it does not load here, or its results are wrong.
    """
    version, manifest = unverified_manifest(slot)
    content, artifact = _read_known(slot / MODEL, manifest)
    engine = Engine(
        content,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        session_config=artifact.session_config,
        options=options,
    )
    off = _check_golden(engine, manifest, artifact)
    return Model(version, manifest, artifact, engine, off)


def golden_inputs(manifest: Manifest) -> dict[str, Array]:
    """Return the golden batch as the model's one input, shape (rows, …).

    Raises:
        UnfitModelError: the manifest has several inputs, or its batch is cut off.
    """
    if len(manifest.inputs) != 1 or len(manifest.outputs) != 1:
        raise UnfitModelError(
            f"the manifest has {len(manifest.inputs)} inputs and {len(manifest.outputs)} outputs; "
            "this agent serves models with one of each"
        )
    spec = manifest.inputs[0]
    values = _rows(manifest.golden.inputs, spec, manifest.golden.rows, "inputs")
    return {spec.name: np.ascontiguousarray(values.astype(DTYPES[spec.datatype]))}


def _read_known(path: Path, manifest: Manifest) -> tuple[bytes, Artifact]:
    """Return the file and what the manifest says of it; only its digest tells which one it is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UntrustedModelError(f"cannot read {path}: {error.strerror}") from error
    except MemoryError as error:
        raise UnfitModelError("the model needs more memory than there is for it") from error
    found = sha256(content).hexdigest()
    if (artifact := manifest.artifact(found)) is None:
        raise UntrustedModelError(f"{path} has digest {found[:12]} and its manifest names no such")
    return content, artifact


def _check_golden(engine: Engine, manifest: Manifest, artifact: Artifact) -> float:
    """Return the largest difference from the golden outputs, which is within the tolerance."""
    golden, spec = manifest.golden, manifest.outputs[0]
    allowed = artifact.allowed_difference(golden)
    feeds = golden_inputs(manifest)
    wanted = _rows(golden.outputs, spec, golden.rows, "outputs")
    got = engine.run(feeds)[0]
    if got.shape != wanted.shape or got.dtype != DTYPES[spec.datatype]:
        raise UnfitModelError(
            f"output {spec.name!r} came as {got.dtype}{list(got.shape)}, "
            f"not as {spec.datatype}{list(wanted.shape)}"
        )
    if not np.isfinite(got).all():
        raise UnfitModelError(f"output {spec.name!r} holds NaN or infinity on the golden batch")
    difference = float(np.abs(got.astype(np.float64) - wanted).max())
    if not difference <= allowed:  # a NaN in the manifest must not pass either
        raise UnfitModelError(
            f"the golden batch differs by {difference:.3g}, more than the tolerance of "
            f"{allowed:.3g}"
        )
    return difference


def _rows(content: bytes, spec: TensorSpec, rows: int, what: str) -> Array:
    shape = (rows, *spec.shape[1:])
    if any(dim < 1 for dim in shape) or len(content) != 4 * math.prod(shape):
        raise UnfitModelError(f"the golden {what} do not have the shape {list(shape)}")
    return np.frombuffer(content, dtype="<f4").reshape(shape)
