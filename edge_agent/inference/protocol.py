"""The Open Inference Protocol v2 over HTTP, as pure functions from bytes to arrays and back.

Follows https://github.com/kserve/open-inference-protocol (specification/protocol/inference_rest.md)
and its binary tensor extension, which Triton's clients use by default: the body starts with
``Inference-Header-Content-Length`` bytes of JSON, and the tensors that declare a
``binary_data_size`` follow in order, little endian, row major. Compressed bodies count that length
after decompression. Everything that a client can get wrong raises `RequestError` with the HTTP
status and one sentence that names what was wanted and what came.
"""

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
from msgspec import Meta

from edge_agent.inference.engine import DTYPES, Array
from shared.errors import PeerError
from shared.manifest import TensorSpec
from shared.untrusted import NOT_JSON

MAX_JSON_BYTES = 8 * 1024 * 1024
# Memory that one byte of JSON takes while it is read: numbers about 11 bytes, empty lists 33.
JSON_WEIGHT = 12
JSON_LENGTH_HEADER = "Inference-Header-Content-Length"
NO_LOADING = "models are deployed by the coordinator, not loaded by clients"
ANSWER_HEADER = "Shoal-Answer"  # number of an answer, under which feedback may name it
# Which kinds of numbers may fill a tensor from JSON: never a fraction into an integer.
_KINDS = {"f": "fiu", "i": "iu", "u": "iu", "b": "b"}
_LEAST_PACKED_BYTES = 1024  # a smaller answer takes longer to pack than to send
_WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}


class RequestError(PeerError):
    """The client's mistake."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# The product of a hundred thousand dimensions takes half a minute, in which nobody is answered.
_MOST_DIMENSIONS = 16
_Dimension = Annotated[int, Meta(ge=0, le=2**63 - 1)]


class _Parameters(msgspec.Struct, frozen=True):
    binary_data_size: Annotated[int, Meta(ge=0)] | None = None  # of an input
    binary_data: bool | None = None  # of an output
    binary_data_output: bool = False  # of the request
    shared_memory_region: str | None = None
    classification: int | None = None


class _Input(msgspec.Struct, frozen=True):
    name: str
    shape: Annotated[tuple[_Dimension, ...], Meta(max_length=_MOST_DIMENSIONS)]
    datatype: str
    parameters: _Parameters = _Parameters()
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class _Output(msgspec.Struct, frozen=True):
    name: str
    parameters: _Parameters = _Parameters()


class _Body(msgspec.Struct, frozen=True):
    inputs: tuple[_Input, ...]
    outputs: tuple[_Output, ...] = ()
    id: str | None = None
    parameters: _Parameters = _Parameters()


_DECODER = msgspec.json.Decoder(_Body)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What a client asks for, not yet compared with any model."""

    id: str | None
    tensors: Mapping[str, tuple[str, Array]]  # datatype and values by name
    outputs: Mapping[str, bool]  # name, and whether it is wanted in binary; empty: all
    binary: bool  # the form of outputs that were not named


def decompress(body: bytes, encoding: str, *, limit_bytes: int) -> bytes:
    """Undo the Content-Encoding of a request; more than ``limit_bytes`` is refused, not unpacked.

    Raises:
        RequestError: an unknown encoding (415), broken data (400), or too much of it (413).
    """
    if encoding in {"", "identity"}:
        return body
    if encoding not in _WINDOW_BITS:
        raise RequestError(
            f"content encoding {encoding!r} is not understood; use gzip, deflate or none",
            status=415,
        )
    unpacker = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        content = unpacker.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not valid {encoding}: {error}") from error
    if len(content) > limit_bytes:
        raise too_large(limit_bytes)
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(f"the {encoding} body is cut off or followed by something else")
    return content


def compress(body: bytes, accepted: str) -> tuple[bytes, str]:
    """Pack an answer if its client takes it packed.

    Args:
        body: of the answer.
        accepted: the request's Accept-Encoding.

    Returns:
        The body to send and its Content-Encoding, empty where it goes as it is.
    """
    offers = [offer.strip().lower().split(";") for offer in accepted.split(",")]
    wanted = {name.strip() for name, *weight in offers if not _is_zero(weight)}
    encoding = next((name for name in _WINDOW_BITS if name in wanted), "")
    if not encoding or len(body) < _LEAST_PACKED_BYTES:
        return body, ""
    packer = zlib.compressobj(zlib.Z_BEST_SPEED, zlib.DEFLATED, _WINDOW_BITS[encoding])
    return packer.compress(body) + packer.flush(), encoding


def _is_zero(weight: list[str]) -> bool:
    """Whether an offer says that its encoding is not wanted, as in ``gzip;q=0``."""
    return any(re.fullmatch(r"\s*q=0(\.0*)?\s*", part) for part in weight)


def too_large(limit_bytes: int) -> RequestError:
    """Return the refusal of a body over the limit."""
    return RequestError(
        f"the body is over the limit of {limit_bytes} bytes; send fewer rows at a time", status=413
    )


def parse(body: bytes, json_length: str | None) -> InferRequest:
    """Read the body of an infer request.

    Args:
        body: decompressed.
        json_length: value of `JSON_LENGTH_HEADER`, if the client sent it.

    Raises:
        RequestError: it breaks the protocol.
    """
    split = length_of_json(body, json_length)
    view = memoryview(body)
    try:
        document = _DECODER.decode(view[:split])
    except NOT_JSON as error:
        raise RequestError(f"the request is not one of the protocol: {error}") from error
    rest = view[split:]
    tensors: dict[str, tuple[str, Array]] = {}
    for tensor in document.inputs:
        if tensor.name in tensors:
            raise RequestError(f"input {tensor.name!r} is given twice")
        values, rest = _values(tensor, rest)
        tensors[tensor.name] = (tensor.datatype, values)
    if rest:
        raise RequestError(f"{len(rest)} bytes follow the last tensor")
    binary = document.parameters.binary_data_output
    return InferRequest(
        document.id, tensors, {o.name: _wants_binary(o, binary) for o in document.outputs}, binary
    )


def match(
    request: InferRequest, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> dict[str, Array]:
    """Compare a request with a model's signature and return the arrays to run.

    Raises:
        RequestError: a tensor is unknown, missing, or of another type or shape than wanted.
    """
    _require_known("input", request.tensors, inputs)
    _require_known("output", request.outputs, outputs)
    rows: int | None = None
    for spec in inputs:
        if spec.name not in request.tensors:
            raise RequestError(f"input {spec.name!r} is missing")
        datatype, values = request.tensors[spec.name]
        if datatype != spec.datatype:
            raise RequestError(f"input {spec.name!r} wants {spec.datatype} and got {datatype}")
        if not _fits(values.shape, spec.shape):
            raise RequestError(
                f"input {spec.name!r} wants shape {list(spec.shape)}, where -1 is any number of "
                f"at least one, and got {list(values.shape)}"
            )
        if spec.shape[:1] == (-1,) and rows not in {None, values.shape[0]}:
            raise RequestError(f"the inputs have {rows} and {values.shape[0]} rows")
        rows = values.shape[0] if spec.shape[:1] == (-1,) else rows
    return {spec.name: request.tensors[spec.name][1] for spec in inputs}


def render(
    request: InferRequest,
    *,
    model: str,
    version: str,
    outputs: Sequence[TensorSpec],
    results: Sequence[Array],
) -> tuple[bytes, int | None]:
    """Return the body of a response, and the length of its JSON if binary tensors follow it."""
    described: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for spec, values in zip(outputs, results, strict=True):
        if request.outputs and spec.name not in request.outputs:
            continue
        tensor: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype}
        tensor["shape"] = values.shape
        if request.outputs.get(spec.name, request.binary):
            chunk = np.ascontiguousarray(values, DTYPES[spec.datatype]).tobytes()
            tensor["parameters"] = {"binary_data_size": len(chunk)}
            chunks.append(chunk)
        else:
            tensor["data"] = np.ascontiguousarray(values).ravel()
        described.append(tensor)
    document: dict[str, Any] = {"model_name": model, "model_version": version}
    if request.id is not None:
        document["id"] = request.id
    document["outputs"] = described
    head = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((head, *chunks)), len(head)) if chunks else (head, None)


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], content: bytes) -> Array:
    """Return one tensor that came as little-endian, row-major bytes.

    Raises:
        RequestError: its type is unknown, or its shape and length do not fit.
    """
    parameters = _Parameters(binary_data_size=len(content))
    tensor = _Input(name, _dimensions(name, shape), datatype, parameters)
    return _values(tensor, memoryview(content))[0]


def from_numbers(name: str, datatype: str, shape: tuple[int, ...], numbers: Array) -> Array:
    """Return one tensor of a known type that came as numbers.

    Raises:
        RequestError: they do not fit its shape or type.
    """
    return _fitted(_Input(name, _dimensions(name, shape), datatype), numbers)


def render_error(message: str) -> bytes:
    """Return the one form of error that clients of the protocol can read."""
    return orjson.dumps({"error": message})


def length_of_json(body: bytes, json_length: str | None) -> int:
    """Return where a body's JSON ends and its binary tensors begin.

    Raises:
        RequestError: there is no such place, or the JSON alone is over `MAX_JSON_BYTES` (413).
    """
    length = len(body) if json_length is None else _split_at(json_length, len(body))
    if length > MAX_JSON_BYTES:
        raise RequestError(
            f"{length} bytes of JSON are over the limit of {MAX_JSON_BYTES}; send fewer rows at a "
            "time, or the tensors in binary",
            status=413,
        )
    return length


def _split_at(json_length: str, body_length: int) -> int:
    if json_length.isascii() and json_length.isdigit() and len(json_length) < 20:
        length = int(json_length)
        if length <= body_length:
            return length
    raise RequestError(
        f"{JSON_LENGTH_HEADER} is {json_length[:40]!r} and the body has {body_length} bytes"
    )


def _values(tensor: _Input, rest: memoryview) -> tuple[Array, memoryview]:
    """Return one tensor's values, and the binary data that is left for those after it."""
    if tensor.datatype not in DTYPES:
        raise RequestError(
            f"input {tensor.name!r} has type {tensor.datatype!r}; known are {', '.join(DTYPES)}"
        )
    if tensor.parameters.shared_memory_region is not None:
        raise RequestError("shared memory is not offered; send the tensor's data")
    size = tensor.parameters.binary_data_size
    if (size is None) == (tensor.data is msgspec.UNSET):
        raise RequestError(f"input {tensor.name!r} needs either data or a binary_data_size")
    if size is None:
        return _from_json(tensor), rest
    dtype = DTYPES[tensor.datatype]
    wanted = math.prod(tensor.shape) * dtype.itemsize
    if size != wanted or size > len(rest):
        raise RequestError(
            f"input {tensor.name!r} of {tensor.datatype} {list(tensor.shape)} takes {wanted} "
            f"bytes, declares {size}, and {len(rest)} are left in the body"
        )
    return _shaped(np.frombuffer(rest[:size], dtype), tensor), rest[size:]


def _dimensions(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) > _MOST_DIMENSIONS or any(dim < 0 for dim in shape):
        raise RequestError(f"input {name!r} has a shape that no array can have")
    return shape


def _from_json(tensor: _Input) -> Array:
    """Read numbers from JSON, flat or nested like the shape."""
    assert isinstance(tensor.data, msgspec.Raw)
    try:
        found = np.asarray(msgspec.json.decode(tensor.data))
    except (*NOT_JSON, ValueError) as error:
        raise RequestError(f"input {tensor.name!r} is not an even array of numbers") from error
    return _fitted(tensor, found)


def _fitted(tensor: _Input, found: Array) -> Array:
    """Give numbers the type and shape of their tensor, if they fit without loss."""
    dtype = DTYPES[tensor.datatype]
    if found.size and found.dtype.kind not in _KINDS[dtype.kind]:
        raise RequestError(f"input {tensor.name!r} holds other values than {tensor.datatype}")
    if found.size != math.prod(tensor.shape) or found.ndim not in {1, len(tensor.shape)}:
        raise RequestError(
            f"input {tensor.name!r} declares shape {list(tensor.shape)} and holds "
            f"{found.size} values of shape {list(found.shape)}"
        )
    with np.errstate(over="ignore"):
        values = _shaped(found.astype(dtype), tensor)
    lossless = np.isfinite(values) if dtype.kind == "f" else values.ravel() == found.ravel()
    if not lossless.all():
        raise RequestError(f"input {tensor.name!r} holds values that do not fit {tensor.datatype}")
    return values


def _shaped(values: Array, tensor: _Input) -> Array:
    """Give values their shape; beside a 0, its other dimensions may be beyond any array."""
    try:
        return values.reshape(tensor.shape)
    except ValueError as error:
        raise RequestError(f"input {tensor.name!r} has a shape that no array can have") from error


def _wants_binary(output: _Output, default: bool) -> bool:  # noqa: FBT001 - a private helper
    if output.parameters.classification or output.parameters.shared_memory_region is not None:
        raise RequestError(
            f"output {output.name!r} asks for classification or shared memory, which are not "
            "offered; ask for the plain tensor"
        )
    binary = output.parameters.binary_data
    return default if binary is None else binary


def _require_known(kind: str, names: Mapping[str, Any], specs: Sequence[TensorSpec]) -> None:
    known = [spec.name for spec in specs]
    if unknown := [name for name in names if name not in known]:
        raise RequestError(f"the model has no {kind} {unknown[0]!r}; it has {', '.join(known)}")


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        got >= 1 if want == -1 else got == want for got, want in zip(shape, wanted, strict=True)
    )
