"""The model of ``shoal-sim bench serving``: a CNN of 205 k parameters in int8, untrained.

Its values do not matter to its speed; two seeds make two versions to swap between.
"""

import hashlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_inference_collection import InferenceSession
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.quant_utils import QuantFormat, QuantType
from onnxruntime.quantization.quantize import quantize_static
from torch import nn
from torch.export import Dim

from edge_agent.slot_files import MANIFEST, MODEL
from shared.files import write_atomic
from shared.manifest import Artifact, GoldenBatch, Lineage, Manifest, TensorSpec
from shared.messages import utc_now
from shared.signed_manifest import sign_manifest
from shared.signing import SigningKey
from shared.tasks.spec import TaskSpec

NAME = "cnn"
SHAPE = (1, 28, 28)  # of one input, in [0, 255]
CLASSES = 10
_WIDTHS = (32, 64, 128, 96)
_CALIBRATION_ROWS, _GOLDEN_ROWS = 128, 8
_TOLERANCE = 1e-3


def put_version(slot: Path, seed: int) -> Path:
    """Write a slot with the version of ``seed``, as the agent's download would; return it."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as temporary:
        exported = _exported(seed, Path(temporary))
        content = _quantised(exported, _images(rng, _CALIBRATION_ROWS))
    golden = _images(rng, _GOLDEN_ROWS)
    outputs = np.asarray(InferenceSession(content).run(None, {"image": golden})[0])
    digest = hashlib.sha256(content).hexdigest()
    manifest = Manifest(
        model=NAME,
        task=TaskSpec(NAME, "image-classification"),
        created_at=utc_now(),
        inputs=(TensorSpec("image", "FP32", (-1, *SHAPE)),),
        outputs=(TensorSpec("logits", "FP32", (-1, CLASSES)),),
        labels=tuple(f"class-{index}" for index in range(CLASSES)),
        artifacts=(Artifact(variant="int8", sha256=digest, size_bytes=len(content)),),
        ship="int8",
        golden=GoldenBatch(
            inputs=golden.tobytes(),
            outputs=outputs.astype("<f4").tobytes(),
            rows=_GOLDEN_ROWS,
            tolerance=_TOLERANCE,
        ),
        lineage=Lineage(
            run_id="bench", rounds=0, plan_digest=digest, parameters_sha256=digest, code_version="0"
        ),
    )
    slot.mkdir(parents=True)
    write_atomic(slot / MODEL, content)
    key = SigningKey(Ed25519PrivateKey.generate())
    write_atomic(slot / MANIFEST, sign_manifest(manifest, key).sealed)
    return slot


def binary_request() -> tuple[bytes, int]:
    """Return the body of a request with one image in binary, and the length of its JSON."""
    image = _images(np.random.default_rng(0), 1)
    parameters = {"binary_data_size": image.nbytes}
    head = _request(parameters=parameters)
    return head + image.tobytes(), len(head)


def json_request() -> bytes:
    """Return the body of a request with one image in JSON."""
    image = _images(np.random.default_rng(0), 1)
    return _request(data=image.ravel().tolist())


def _request(**content: object) -> bytes:
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, *SHAPE], **content}
    wanted = {"binary_data_output": "parameters" in content}
    return msgspec.json.encode({"inputs": [tensor], "parameters": wanted})


def _images(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    return rng.integers(0, 256, (rows, *SHAPE)).astype("<f4")


def _exported(seed: int, folder: Path) -> Path:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for place, (before, width) in enumerate(zip((1, *_WIDTHS), _WIDTHS, strict=False)):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers += [nn.ReLU()] + [nn.MaxPool2d(2)] * (place < 2)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(_WIDTHS[-1], CLASSES)]
    logging.disable(logging.WARNING)  # torch's exporter and the quantiser talk a lot
    program = torch.onnx.export(
        nn.Sequential(*layers).eval(),
        (torch.zeros(2, *SHAPE),),
        dynamo=True,
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: Dim("batch", min=1)},),
        verbose=False,
    )
    assert program is not None  # only the old exporter returns None
    path = folder / "fp32.onnx"
    program.save(path, external_data=False)
    return path


class _Calibration(CalibrationDataReader):
    """Hands out images one batch at a time."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = iter(np.split(images, 4))

    def get_next(self) -> dict[str, NDArray[np.float32]]:
        batch = next(self._batches, None)
        return {} if batch is None else {"image": batch}


def _quantised(fp32: Path, images: NDArray[np.float32]) -> bytes:
    int8 = fp32.with_name("int8.onnx")
    quantize_static(
        fp32,
        int8,
        _Calibration(images),
        quant_format=QuantFormat.QOperator,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return int8.read_bytes()
