"""Small ONNX models, good and bad, and signed versions of them."""

import hashlib
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edge_agent.slot_files import MANIFEST, MODEL
from shared.manifest import Artifact, GoldenBatch, Lineage, Manifest, TensorSpec
from shared.signed_manifest import SignedManifest, sign_manifest
from shared.signing import SigningKey
from shared.tasks.spec import TaskSpec

MODEL_KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(b"m" * 32))  # same everywhere
TRUSTED = {MODEL_KEY.public.key_id: MODEL_KEY.public}
FEATURES, CLASSES = 4, 3
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Version:
    """A model file and the signed manifest that describes it."""

    signed: SignedManifest
    content: bytes
    weights: Floats = field(default_factory=lambda: np.zeros((FEATURES, CLASSES), np.float32))

    @property
    def digest(self) -> str:
        return self.signed.version

    @property
    def artifact(self) -> Artifact:
        return self.signed.manifest.shipped

    def put_into(self, slot: Path) -> Path:
        """Write a slot as `Slots.stage` would."""
        slot.mkdir(parents=True)
        (slot / MODEL).write_bytes(self.content)
        (slot / MANIFEST).write_bytes(self.signed.sealed)
        return slot

    def changed(self, **changes: Any) -> "Version":
        """Sign the same file under a manifest with other fields."""
        manifest = msgspec.structs.replace(self.signed.manifest, **changes)
        return replace(self, signed=sign_manifest(manifest, MODEL_KEY))


def linear(seed: int = 0, *, padding: int = 0) -> Version:
    """Return y = x W, its weights drawn from ``seed``; ``padding`` adds so many unused floats."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    initializers = [numpy_helper.from_array(weights, "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    if padding:
        ballast = rng.normal(size=padding).astype(np.float32)
        initializers.append(numpy_helper.from_array(ballast, "ballast"))
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["xw"]),
            helper.make_node("ReduceMax", ["ballast"], ["largest"], keepdims=0),
            helper.make_node("Mul", ["largest", "zero"], ["nothing"]),
            helper.make_node("Add", ["xw", "nothing"], ["y"]),
        ]
        initializers.append(numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    content = build(nodes, initializers)
    inputs = rng.normal(size=(8, FEATURES)).astype(np.float32)
    return version_of(content, inputs, inputs @ weights, weights)


def not_finite() -> Version:
    """Return a model whose every output is NaN."""
    minus_one = numpy_helper.from_array(np.full((FEATURES, CLASSES), -1, np.float32), "w")
    nodes = [
        helper.make_node("Abs", ["x"], ["positive"]),
        helper.make_node("MatMul", ["positive", "w"], ["negative"]),
        helper.make_node("Log", ["negative"], ["y"]),
    ]
    return _dummy(build(nodes, [minus_one]))


def endless() -> Version:
    """Return a model that computes for hours."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep_in"], ["keep_out"]),
            helper.make_node("Sin", ["value_in"], ["value_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_in", TensorProto.FLOAT, ["b", CLASSES]),
        ],
        [
            helper.make_tensor_value_info("keep_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value_out", TensorProto.FLOAT, ["b", CLASSES]),
        ],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("Loop", ["steps", "", "xw"], ["y"], body=body),
    ]
    weights = np.ones((FEATURES, CLASSES), np.float32)
    steps = np.array(2**40, np.int64)
    tensors = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(steps, "steps")]
    return _dummy(build(nodes, tensors))


def gigantic() -> Version:
    """Return a small file that needs 64 GiB to run."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceMax", ["zeros"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["xw", "nothing"], ["y"]),
    ]
    weights = np.ones((FEATURES, CLASSES), np.float32)
    shape = np.array([2**34], np.int64)
    tensors = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(shape, "shape")]
    return _dummy(build(nodes, tensors))


def build(nodes: list[Any], initializers: list[Any]) -> bytes:
    """Serialise a graph from x (b, FEATURES) to y (b, CLASSES)."""
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", CLASSES])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def version_of(
    content: bytes,
    inputs: Floats,
    outputs: Floats,
    weights: Floats | None = None,
    *,
    tolerance: float | None = None,
) -> Version:
    """Describe and sign a model file."""
    digest = hashlib.sha256(content).hexdigest()
    manifest = Manifest(
        model="tiny",
        task=TaskSpec("tiny", "tabular"),
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
        inputs=(TensorSpec("x", "FP32", (-1, FEATURES)),),
        outputs=(TensorSpec("y", "FP32", (-1, CLASSES)),),
        labels=("ant", "bee", "cat"),
        artifacts=(
            Artifact(variant="fp32", sha256=digest, size_bytes=len(content), tolerance=tolerance),
        ),
        ship="fp32",
        golden=GoldenBatch(
            inputs=inputs.tobytes(), outputs=outputs.tobytes(), rows=len(inputs), tolerance=1e-4
        ),
        lineage=Lineage(
            run_id="run-1",
            rounds=3,
            plan_digest=digest,
            parameters_sha256=digest,
            code_version="0.1.0",
        ),
    )
    signed = sign_manifest(manifest, MODEL_KEY)
    if weights is None:
        return Version(signed, content)
    return Version(signed, content, weights)


def _dummy(content: bytes) -> Version:
    inputs = np.ones((2, FEATURES), np.float32)
    return version_of(content, inputs, np.zeros((2, CLASSES), np.float32))
